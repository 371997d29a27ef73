"""Surface distances are MONAI's of the whole image, known where they can be told by hand, and defined where empty."""

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from monai.metrics.surface_dice import compute_surface_dice
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from matchai.metrics import surface_distance
from matchai.metrics.surface_distance import surface_distances
from matchai.system.errors import InputError

Mask = NDArray[np.bool_]

# MONAI's own words, to itself
pytestmark = pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")


def blobs(seed: int, shape: tuple[int, ...], share: float = 0.15) -> Mask:
    field = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.5, mode="constant")
    return np.asarray(field > np.quantile(field, 1 - share))


def box(shape: tuple[int, ...], *bounds: tuple[int, int]) -> Mask:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*one) for one in bounds)] = True
    return mask


def monais(pred: Mask, truth: Mask, spacing: tuple[float, ...], tolerance: float) -> tuple[float, float]:
    one, other = (torch.from_numpy(mask)[None, None].float() for mask in (pred, truth))
    hd95 = compute_hausdorff_distance(one, other, include_background=True, percentile=95, spacing=spacing)
    nsd = compute_surface_dice(one, other, [tolerance], include_background=True, spacing=spacing)
    return hd95.item(), nsd.item()


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.7, 1.3)])
@pytest.mark.parametrize("seed", range(4))
def test_distances_in_an_image_are_monais(seed: int, spacing: tuple[float, float]) -> None:
    pred, truth = blobs(seed, (40, 33)), blobs(seed + 100, (40, 33))
    found = surface_distances(pred, truth, spacing, 2)
    assert found == pytest.approx(monais(pred, truth, spacing, 2), abs=1e-4)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (5.0, 0.7, 0.8)])
def test_distances_in_a_volume_are_monais_of_the_whole(spacing: tuple[float, float, float]) -> None:
    pred, truth = np.zeros((2, 12, 50, 60), bool)
    pred[3:9, 5:30, 10:40], truth[2:10, 8:33, 12:50] = blobs(0, (6, 25, 30)), blobs(1, (8, 25, 38))
    assert surface_distances(pred, truth, spacing, 2) == pytest.approx(monais(pred, truth, spacing, 2), abs=1e-4)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**20), share=st.floats(0.02, 0.5), apart=st.integers(0, 3))
def test_borders_at_the_images_edge_are_monais(seed: int, share: float, apart: int) -> None:
    pred = blobs(seed, (14, 11), share)
    truth = np.roll(pred, apart, 0)
    assert surface_distances(pred, truth, (1, 1), 1) == pytest.approx(monais(pred, truth, (1, 1), 1), abs=1e-4)


@pytest.mark.parametrize("apart", [1, 2, 7])
def test_parallel_lines_are_as_far_apart_as_they_are(apart: int) -> None:
    pred, truth = box((40, 30), (10, 11), (0, 30)), box((40, 30), (10 + apart, 11 + apart), (0, 30))
    hd95, nsd = surface_distances(pred, truth, (0.5, 1.0), 1.0)
    assert hd95 == pytest.approx(0.5 * apart)
    assert nsd == (1.0 if 0.5 * apart <= 1 else 0.0)


def test_parallel_planes_are_as_far_apart_as_slices_are() -> None:
    pred, truth = box((9, 12, 12), (2, 3), (0, 12), (0, 12)), box((9, 12, 12), (5, 6), (0, 12), (0, 12))
    assert surface_distances(pred, truth, (2.5, 0.7, 0.7), 7.4) == pytest.approx((7.5, 0.0))


def test_a_square_within_another_has_the_distances_of_their_sides() -> None:
    outer, inner = box((60, 60), (10, 50), (10, 50)), box((60, 60), (13, 47), (13, 47))
    # from each of the inner border's 132 pixels it is 3 to the outer; of the outer's 156 five lie around each corner
    hd95, nsd = surface_distances(outer, inner, (1, 1), 3)
    around_corners = [math.hypot(3, k) for k in (1, 1, 2, 2, 3)] * 4
    assert hd95 == pytest.approx(np.percentile([3.0] * 136 + around_corners, 95))
    assert nsd == pytest.approx((132 + 136) / (132 + 156))


def test_a_right_prediction_has_no_distance() -> None:
    mask = blobs(5, (30, 30))
    assert surface_distances(mask, mask, (1, 1), 0) == (0, 1)


def test_a_tolerance_counts_its_own_distance_as_right() -> None:
    pred, truth = box((20, 20), (5, 6), (0, 20)), box((20, 20), (7, 8), (0, 20))
    assert surface_distances(pred, truth, (1, 1), 2)[1] == 1
    assert surface_distances(pred, truth, (1, 1), 1.99)[1] == 0


def test_two_empty_masks_have_no_distance() -> None:
    empty = np.zeros((8, 8), bool)
    assert np.isnan(surface_distances(empty, empty, (1, 1), 2)).all()


@pytest.mark.parametrize("swap", [False, True])
def test_one_empty_mask_is_as_far_as_the_image_is_wide(swap: bool) -> None:
    pred, truth = np.zeros((30, 40), bool), box((30, 40), (3, 5), (3, 5))
    pred, truth = (truth, pred) if swap else (pred, truth)
    assert surface_distances(pred, truth, (1, 1), 2) == (50, 0)
    assert surface_distances(pred, truth, (0.5, 0.5), 2) == (25, 0)


def test_without_monai_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("monai", "monai.metrics"):
        monkeypatch.setitem(sys.modules, name, None)
    mask = box((8, 8), (1, 3), (1, 3))
    assert not surface_distance.can_measure()
    with pytest.raises(InputError, match=r'pip install "matchai\[evaluate\]"'):
        surface_distances(mask, mask, (1, 1), 2)
