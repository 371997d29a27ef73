"""Numbers of masks become classes."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matchai.data.slice_set import expected_numbers, format_value, numbers_of, read_numbers

DTYPES = ["u1", "i1", "i2", "u2", "i4", "u4", "f4", ">i2", ">f8"]


@given(
    st.dictionaries(st.integers(-100, 100), st.integers(0, 3), min_size=1, max_size=6),
    st.lists(st.integers(-100, 100), min_size=1, max_size=12),
    st.sampled_from(DTYPES),
)
def test_each_number_becomes_its_class_and_others_are_told(
    numbers: dict[int, int], pixels: list[int], dtype: str
) -> None:
    mask = np.array([pixels]).astype(dtype)
    found = read_numbers(mask, numbers, 3)
    values = [int(value) for value in mask[0]]
    assert found.labels.tolist() == [[numbers.get(value, 3) for value in values]]
    assert found.wrong_values == sorted({value for value in values if value not in numbers})[:5]


@pytest.mark.parametrize("value", [0.5, 1.002, np.nan, np.inf, -np.inf, 1e30])
def test_what_is_no_whole_number_is_told(value: float) -> None:
    found = read_numbers(np.array([[1.0, value]]), {0: 0, 1: 1}, 0)
    assert found.labels.tolist() == [[1, 0]]
    assert found.wrong_values == [value] or np.isnan(value)
    assert len(found.wrong_values) == 1


@pytest.mark.parametrize("value", [0.99999999977, 1.0009, 0.9991])
@pytest.mark.parametrize("dtype", ["f4", ">f8"])
def test_a_number_that_a_scale_has_rounded_is_the_whole_one(value: float, dtype: str) -> None:
    found = read_numbers(np.array([[0.0, value]], dtype), {0: 0, 1: 1}, 0)
    assert found.labels.tolist() == [[0, 1]]
    assert found.wrong_values == []


@pytest.mark.parametrize(("value", "shown"), [(0.5, "0.5"), (3.0, "3"), (2.9999999, "2.9999999"), (1.002, "1.002")])
def test_a_wrong_number_is_shown_as_it_is(value: float, shown: str) -> None:
    assert format_value(value) == shown


def test_files_for_viewers_hold_0_for_the_background_and_then_the_classes_in_order() -> None:
    assert numbers_of(4, 3) == {1: 0, 2: 1, 3: 2, 0: 3}
    assert numbers_of(3, 0) == {0: 0, 1: 1, 2: 2}


@pytest.mark.parametrize(
    ("is_mapped", "told"), [(False, "--label-map NUMBER:CLASS"), (True, "--label-map (or dataset.json) knows")]
)
def test_the_way_out_names_every_number_that_is_known(is_mapped: bool, told: str) -> None:
    sentence: Any = expected_numbers({1: 0, 0: 1}, ["lesion", "background"], is_mapped)
    assert "0 background, 1 lesion" in sentence
    assert told in sentence
