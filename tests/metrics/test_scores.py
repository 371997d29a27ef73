"""The figures of an evaluation: as MONAI or a plain count has them, named for what they are, told when undefined."""

import csv
import dataclasses
import io
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from monai.metrics.meandice import DiceMetric
from monai.metrics.meaniou import MeanIoU
from numpy.typing import NDArray

from matchai.metrics.confusion import confusion_counts
from matchai.metrics.scores import Distances, ScoredVolume, Scores, as_csv, describe, slice_rows, volume_rows

NAMES = ["ground glass", "consolidation", "lungs other", "background"]
GROUPS = np.array([0, 0, 1, 1, 1, 2])


def labels() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Predictions and truths (6, 12, 12); consolidation is in no truth of the first two slices."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, (6, 12, 12))
    truth[:2][truth[:2] == 1] = 3
    return np.where(rng.random(truth.shape) < 0.6, truth, rng.integers(0, 4, truth.shape)), truth


def scored(pred: NDArray[np.int64], truth: NDArray[np.int64], **changes: Any) -> Scores:
    scores = Scores(
        class_names=NAMES,
        lesion_classes=[0, 1],
        background_class=3,
        sources=["medseg"] * len(pred),
        indices=np.arange(len(pred)),
        groups=GROUPS[: len(pred)],
        sides=["validation"] * len(pred),
        confusions=confusion_counts(torch.from_numpy(pred), torch.from_numpy(truth), 4).numpy(),
        distances=None,
    )
    return dataclasses.replace(scores, **changes)


def one_hot(classes: NDArray[np.int64]) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.from_numpy(classes), 4).movedim(-1, 1)


@pytest.mark.parametrize(("name", "metric"), [("dice", DiceMetric), ("iou", MeanIoU)])
def test_means_over_images_are_monais(name: str, metric: Any) -> None:
    pred, truth = labels()
    theirs = metric(reduction="mean_batch", include_background=True)
    theirs(one_hot(pred), one_hot(truth))
    described = describe(scored(pred, truth))["classes"]
    ours = [described[one][f"{name}_mean_over_images"]["value"] for one in NAMES]
    assert np.allclose(ours, np.asarray(theirs.aggregate()), rtol=0, atol=1e-6)


def test_pooled_figures_are_monais_of_one_image_of_all_pixels() -> None:
    pred, truth = labels()
    theirs = DiceMetric(reduction="mean_batch", include_background=True)
    theirs(one_hot(pred.reshape(1, -1, 12)), one_hot(truth.reshape(1, -1, 12)))
    described = describe(scored(pred, truth))["classes"]
    ours = [described[one]["dice_pooled_over_pixels"]["value"] for one in NAMES]
    assert np.allclose(ours, np.asarray(theirs.aggregate()), rtol=0, atol=1e-6)


def test_any_lesion_is_judged_as_one_class() -> None:
    pred, truth = labels()
    binary = describe(scored(np.where(pred < 2, 0, 3), np.where(truth < 2, 0, 3)))["classes"]["ground glass"]
    assert describe(scored(pred, truth))["any_lesion"] == binary


def test_figures_say_of_how_many_images_they_are_a_mean() -> None:
    described = describe(scored(*labels()))["classes"]["consolidation"]
    assert described["dice_mean_over_images"]["num_images"] == 4
    assert described["precision_mean_over_images"]["num_images"] == 6


def test_every_figure_lies_in_its_interval() -> None:
    described = describe(scored(*labels()))
    figures = [one for group in described["classes"].values() for one in group.values() if isinstance(one, dict)]
    figures += [one for one in described["affected_share"].values() if isinstance(one, dict)]
    for one in [*figures, *described["means_over_classes"].values()]:
        assert one["low"] <= one["value"] <= one["high"]


def test_a_class_that_no_truth_has_is_null_in_strict_json() -> None:
    pred, truth = labels()
    truth[truth == 1] = 3
    described = describe(scored(pred, truth))
    assert described["classes"]["consolidation"]["dice_pooled_over_pixels"] == dict.fromkeys(("value", "low", "high"))
    json.dumps(described, allow_nan=False)


def test_the_error_of_the_affected_share_is_in_percentage_points() -> None:
    truth = np.full((2, 10, 10), 3)
    truth[:, :4] = 2
    truth[:, 0, :5] = 0  # 5 of 40 pixels, 12.5 %
    pred = truth.copy()
    pred[0, 0, :9] = 1  # 22.5 %
    pred[1, 0, :5] = 2  # none
    share = describe(scored(pred, truth, groups=np.array([0, 1])))["affected_share"]
    assert share["absolute_error_points_mean_over_images"]["value"] == pytest.approx((10 + 12.5) / 2)
    assert share["error_points_mean_over_images"]["value"] == pytest.approx((10 - 12.5) / 2)
    assert share["true_percent_pooled_over_pixels"] == 12.5


def test_a_groups_share_is_that_of_its_slices_together() -> None:
    truth = np.full((2, 10, 10), 3)
    truth[0, :2], truth[1, :8] = 0, 2
    share = describe(scored(np.where(truth == 0, 2, truth), truth, groups=np.array([7, 7])))["affected_share"]
    assert share["absolute_error_points_mean_over_groups"]["value"] == pytest.approx(20)
    assert share["absolute_error_points_mean_over_images"]["value"] == pytest.approx(50)


def test_a_row_of_a_slice_counts_its_pixels() -> None:
    pred, truth = labels()
    row = slice_rows(scored(pred, truth))[3]
    assert (row["source"], row["index"], row["group"], row["side"]) == ("medseg", 3, 1, "validation")
    for c, name in enumerate(NAMES):
        key, p, t = name.replace(" ", "_"), pred[3] == c, truth[3] == c
        found = [row[f"{key}_{what}"] for what in ("tp", "fp", "fn", "true_pixels", "predicted_pixels")]
        assert found == [(p & t).sum(), (p & ~t).sum(), (t & ~p).sum(), t.sum(), p.sum()]
        assert row[f"{key}_dice"] == pytest.approx(2 * (p & t).sum() / (p.sum() + t.sum()))


def test_the_table_of_slices_has_an_empty_cell_where_a_figure_is_undefined() -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(slice_rows(scored(*labels()))))))
    assert [row["consolidation_dice"] == "" for row in rows] == [True, True, False, False, False, False]


def distances(num: int, unit: str) -> Distances:
    hd95, nsd = np.full((num, 4), 3.0), np.full((num, 4), 0.75)
    hd95[0], nsd[0] = math.nan, math.nan
    return Distances(hd95, nsd, unit, 2.0)


def test_distances_of_slices_are_named_by_unit_and_tolerance() -> None:
    described = describe(scored(*labels(), distances=distances(6, "px")))
    assert described["classes"]["lungs other"]["nsd_2_px_mean_over_images"] == {
        **{"value": 0.75, "low": 0.75, "high": 0.75},
        **{"num_images": 5, "num_with_one_empty": 0},
    }
    assert "nsd_2_px_mean_over_images" not in described["classes"]["background"]


def test_images_where_exactly_one_mask_is_empty_are_counted() -> None:
    described = describe(scored(*labels(), distances=dataclasses.replace(distances(6, "px"), nsd=np.zeros((6, 4)))))
    assert described["classes"]["consolidation"]["hd95_px_mean_over_images"]["num_with_one_empty"] == 2


def test_a_row_of_a_volume_has_millilitres_and_its_own_figures() -> None:
    pred, truth = labels()
    volumes = [ScoredVolume("a", np.arange(2), (5.0, 1.0, 2.0)), ScoredVolume("b", np.arange(2, 6), (5.0, 1.0, 2.0))]
    scores = scored(pred, truth, volumes=volumes, volume_distances=distances(2, "mm"))
    rows = volume_rows(scores)
    assert [row["volume"] for row in rows] == ["a", "b"]
    assert rows[1]["ground_glass_true_ml"] == pytest.approx((truth[2:] == 0).sum() * 0.01)
    p, t = pred[2:] < 2, truth[2:] < 2
    assert rows[1]["any_lesion_dice"] == pytest.approx(2 * (p & t).sum() / (p.sum() + t.sum()))
    assert [row["any_lesion_hd95_mm"] for row in rows][1] == 3.0
    assert describe(scores)["any_lesion"]["hd95_mm_mean_over_volumes"]["num_volumes"] == 1
