"""Neighbouring slices: of the slice's own volume alone, mirrored at its ends."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matchai.data.context import mirrored, neighbours

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@pytest.mark.parametrize(
    ("index", "context", "length", "expected"),
    [
        (4, 2, 9, [2, 3, 4, 5, 6]),
        (0, 2, 9, [2, 1, 0, 1, 2]),
        (8, 2, 9, [6, 7, 8, 7, 6]),
        (0, 3, 2, [1, 0, 1, 0, 1, 0, 1]),
        (1, 4, 3, [1, 2, 1, 0, 1, 2, 1, 0, 1]),
        (0, 2, 1, [0, 0, 0, 0, 0]),
        (3, 0, 9, [3]),
    ],
)
def test_the_end_slice_is_the_mirror_and_is_not_repeated(
    index: int, context: int, length: int, expected: list[int]
) -> None:
    assert mirrored(index, context, length) == expected


@given(LENGTHS, st.integers(0, 7), st.data())
def test_neighbours_are_next_to_each_other_and_of_the_own_volume(
    lengths: list[int], context: int, data: st.DataObject
) -> None:
    volumes = np.repeat(np.arange(len(lengths))[::-1], lengths)
    index = data.draw(st.integers(0, len(volumes) - 1))
    found = neighbours(volumes, index, context)
    assert (len(found), found[context]) == (2 * context + 1, index)
    assert {int(volumes[one]) for one in found} == {int(volumes[index])}
    is_alone = lengths[len(lengths) - 1 - int(volumes[index])] == 1
    assert all(abs(b - a) == (not is_alone) for a, b in pairwise(found))


@given(LENGTHS, st.integers(0, 7), st.data())
def test_other_volumes_before_and_after_change_nothing(lengths: list[int], context: int, data: st.DataObject) -> None:
    volumes = np.repeat(np.arange(len(lengths)), lengths)
    index = data.draw(st.integers(0, len(volumes) - 1))
    start = sum(lengths[: int(volumes[index])])
    alone = mirrored(index - start, context, lengths[int(volumes[index])])
    assert neighbours(volumes, index, context) == [start + place for place in alone]
