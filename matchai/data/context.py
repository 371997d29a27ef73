"""Which slices of a volume are the neighbours of a slice, as further input channels."""

import numpy as np
from numpy.typing import NDArray


def mirrored(index: int, context: int, length: int) -> list[int]:
    """The slices `index - context` to `index + context` of a volume, mirrored at its ends.

    The end slice is not repeated: before slice 0 comes slice 1. In a volume shorter than the reach the mirrors face
    each other; a lone slice is its own neighbour.

    Args:
        index: The slice in the middle, from 0.
        context: Neighbours on each side.
        length: Slices of the volume.

    Returns:
        2 · context + 1 indices below `length`.

    >>> mirrored(1, 2, 9), mirrored(1, 3, 2), mirrored(0, 1, 1)
    ([1, 0, 1, 2, 3], [0, 1, 0, 1, 0, 1, 0], [0, 0, 0])
    """
    assert 0 <= index < length, (index, length)
    period = max(1, 2 * (length - 1))
    places = (place % period for place in range(index - context, index + context + 1))
    return [min(place, period - place) for place in places]


def neighbours(volumes: NDArray[np.int64], index: int, context: int) -> list[int]:
    """The slices `index - context` to `index + context` of many volumes one after another, mirrored at borders.

    Args:
        volumes: (N,) number of the volume of each slice; consecutive slices with equal numbers lie next to each other
            in one volume.
        index: The slice in the middle.
        context: Neighbours on each side.

    Returns:
        2 · context + 1 indices into `volumes`, all of the volume of `index`.
    """
    # no mirror image lies farther from `index` than `context`, so nothing beyond needs to be looked at
    first = last = index
    while first > max(0, index - context) and volumes[first - 1] == volumes[index]:
        first -= 1
    while last < min(len(volumes) - 1, index + context) and volumes[last + 1] == volumes[index]:
        last += 1
    return [first + place for place in mirrored(index - first, context, last - first + 1)]
