"""Distances between the surfaces of a predicted and a true region, by MONAI, with the empty cases defined.

Counts of pixels say how much two regions share; distances say how far apart their borders lie.
"""

import importlib.util
import math
import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from matchai.system import need

PERCENTILE = 95
Mask = NDArray[np.bool_]


def can_measure() -> bool:
    """Whether MONAI is installed; imports nothing."""
    return importlib.util.find_spec("monai") is not None


def surface_distances(pred: Mask, truth: Mask, spacing: Sequence[float], tolerance: float) -> tuple[float, float]:
    """How far the border of a predicted region lies from the true one.

    The border is made of the region's pixels (voxels) that touch another outside it by a side (a face), or that lie
    at the image's edge. Where both regions are empty there is nothing to measure: both figures are NaN. Where exactly
    one is empty no distance exists: HD95 is the diagonal of the image (volume), which none exceeds, and NSD is 0.

    Args:
        pred: (H, W) or (N, H, W), the predicted region.
        truth: The true one, of the same shape.
        spacing: Distance of neighbouring pixels along each axis, in mm; 1 each for distances in pixels.
        tolerance: Up to which distance a piece of border counts as right, in the same unit.

    Returns:
        HD95, the greater of both directions' 95th percentile of the distances from one border to the other, in the
        unit of `spacing`; and the normalised surface Dice, the share of both borders that lies within `tolerance` of
        the other (Nikolov et al. 2021, each border pixel counting 1).

    Raises:
        InputError: If MONAI is not installed.

    >>> truth = np.zeros((8, 8), bool)
    >>> truth[2:5, 2:5] = True
    >>> surface_distances(np.roll(truth, 1, axis=0), truth, spacing=(1.0, 1.0), tolerance=1.0)
    (1.0, 1.0)
    """
    assert pred.shape == truth.shape, (pred.shape, truth.shape)
    assert len(spacing) == pred.ndim, (spacing, pred.shape)
    boxes = [_box(pred), _box(truth)]
    found = [box for box in boxes if box is not None]
    if len(found) == 0:
        return math.nan, math.nan
    if len(found) == 1:
        return math.hypot(*np.multiply(pred.shape, spacing)), 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch, to MONAI, at its first import
        metrics = need("monai.metrics", "evaluate", "Measuring surface distances")
    # all that follows is done on the box around both, for which alone there may be memory; one pixel more on each side
    # keeps every border that is none of the image's edge
    around = tuple(
        slice(max(min(one[0], other[0]) - 1, 0), max(one[1], other[1]) + 1) for one, other in zip(*found, strict=True)
    )
    edges = metrics.get_mask_edges(np.ascontiguousarray(pred[around]), np.ascontiguousarray(truth[around]), crop=False)
    one_way, other_way = (
        np.asarray(metrics.get_surface_distance(edges[one], edges[1 - one], spacing=list(spacing))) for one in (0, 1)
    )
    hd95 = max(np.percentile(one_way, PERCENTILE), np.percentile(other_way, PERCENTILE))
    num_right = np.count_nonzero(one_way <= tolerance) + np.count_nonzero(other_way <= tolerance)
    return float(hd95), float(num_right / (one_way.size + other_way.size))


def _box(mask: Mask) -> list[tuple[int, int]] | None:
    """First and one past the last index along each axis that hold a pixel of the mask; None without one."""
    bounds = []
    for axis in range(mask.ndim):
        places = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        if not len(places):
            return None
        bounds.append((int(places[0]), int(places[-1]) + 1))
    return bounds
