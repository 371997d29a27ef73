"""The same slices under two names, which must not stand on both sides of a split."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_Ints = NDArray[np.int64]

# Of thumbnails in 0..1. A copy in another data type or file format differs by its rounding, up to 0.5 HU or 0.00025 of
# the default window; neighbours in the phantom differ by 0.41 at least, two of 50 real MedSeg slices by 0.50.
_SAME = 0.001
_BLANK = 0.01  # standard deviation below which a slice shows nothing that could tell it from others


def find_equal(thumbnails: NDArray[np.float32], groups: _Ints) -> list[tuple[int, int]]:
    """Finds slices of different groups that show the same.

    Args:
        thumbnails: (N, h, w) float32, each slice windowed to 0..1 and resized.
        groups: (N,) int64, the group of each slice; slices of one group are not compared.

    Returns:
        Pairs of places, the lower first, without slices that are blank. Takes 0.2 s for 1,000 slices.
    """
    flat = np.asarray(thumbnails).reshape(len(thumbnails), -1)
    means, spread = flat.mean(1), flat.std(1)
    order = np.argsort(means, kind="stable")
    order = order[spread[order] > _BLANK]
    ends = np.searchsorted(means[order], means[order] + _SAME, side="right")
    pairs = []
    for place, (row, end) in enumerate(zip(order.tolist(), ends.tolist(), strict=True)):
        others = order[place + 1 : end]
        others = others[(groups[others] != groups[row]) & (np.abs(spread[others] - spread[row]) <= _SAME)]
        if len(others):
            is_same = np.abs(flat[others] - flat[row]).max(1) <= _SAME
            pairs += [(min(row, other), max(row, other)) for other in others[is_same].tolist()]
    return sorted(pairs)


def join_groups(groups: _Ints, pairs: Sequence[tuple[int, int]]) -> _Ints:
    """Groups (N,) of which those that share a pair of slices are one, numbered from 0 where any were joined."""
    if not pairs:
        return groups
    joined = groups.copy()
    for first, second in pairs:
        joined[joined == joined[second]] = joined[first]
    return np.unique(joined, return_inverse=True)[1].astype(np.int64)
