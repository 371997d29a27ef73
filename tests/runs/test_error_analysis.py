"""Why a slice scores badly: the words follow from its counts."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from matchai.metrics.confusion import Counts
from matchai.runs.error_analysis import explain, false_lesion

NAMES = ["ground glass", "consolidation", "lungs other", "background"]
LESIONS = [0, 1]


def counts(**cells: int) -> Counts:
    """Counts of a slice of 100,000 background pixels; `t1p0=7` are 7 pixels of class 1 called class 0."""
    confusion = np.diag([0, 0, 0, 100_000]).astype(np.int64)
    for cell, number in cells.items():
        confusion[int(cell[1]), int(cell[3])] = number
    return confusion


def why(**cells: int) -> str:
    return explain(counts(**cells), NAMES, LESIONS)


def test_what_is_missed_is_told_with_what_it_was_called() -> None:
    told = why(t1p1=695, t1p0=1000, t1p3=135)
    assert told == "misses 62 % of 1,830 consolidation pixels, most of them called ground glass"


def test_a_class_that_is_not_found_at_all_is_told() -> None:
    assert why(t0p2=900) == "misses all 900 ground glass pixels, all of them called lungs other"


def test_what_is_found_too_much_is_told_with_what_it_is() -> None:
    assert why(t0p0=800, t2p0=300, t3p0=100) == "takes 400 pixels for ground glass, most of them lungs other"


def test_a_lesion_that_is_not_there_is_told() -> None:
    assert why(t2p0=400, t2p1=12) == "finds 412 lesion pixels where there are none, most of them called ground glass"
    assert why() == "shows no lesion, and none is found"


def test_a_small_lesion_is_called_small() -> None:
    assert why(t0p0=36, t0p3=1) == (
        "misses 3 % of 37 ground glass pixels, all of them called background; small lesion: 37 pixels"
    )


def test_the_fault_that_costs_most_dice_comes_first_not_the_one_with_most_pixels() -> None:
    told = why(t0p0=20_000, t0p3=3000, t1p3=5)
    assert told == "misses all 5 consolidation pixels, all of them called background"


def test_a_class_that_the_slice_does_not_show_is_told_where_much_of_it_is_found() -> None:
    told = why(t0p0=900, t0p2=100, t2p1=400)
    assert told == (
        "misses 10 % of 1,000 ground glass pixels, all of them called lungs other; "
        "finds 400 consolidation pixels where there are none, all of them lungs other"
    )
    assert "consolidation" not in why(t0p0=900, t0p2=100, t2p1=4)


def test_one_confusion_is_told_once() -> None:
    """Consolidation called ground glass is missed by the one and found too much by the other."""
    told = why(t0p0=1000, t1p0=600, t1p1=600)
    assert told == "misses 50 % of 1,200 consolidation pixels, all of them called ground glass"


@given(st_numpy.arrays(np.int64, (4, 4), elements=st.sampled_from([0, 0, 1, 2, 50, 3000])))
def test_the_words_hold_for_any_counts(confusion: Counts) -> None:
    told = explain(confusion, NAMES, LESIONS)
    assert told
    assert not re.search(r"\b(0|100) %|nan|\b1 \w* ?pixels", told)
    is_right = not (confusion[:2].sum() + confusion[2:, :2].sum() - confusion[0, 0] - confusion[1, 1])
    assert is_right == (told.startswith(("every lesion pixel is right", "shows no lesion, and none")))


@pytest.mark.parametrize(("cells", "number"), [({"t2p0": 3, "t3p1": 4}, 7), ({"t0p0": 1, "t3p1": 4}, 0), ({}, 0)])
def test_false_lesions_are_counted_in_slices_without_one(cells: dict[str, int], number: int) -> None:
    assert false_lesion(counts(**cells)[None], LESIONS).tolist() == [number]
