"""Metrics from counts agree with scikit-learn and MONAI, and do not depend on how the set was grouped."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics.confusion_matrix import ConfusionMatrixMetric
from monai.metrics.meandice import DiceMetric, compute_dice
from monai.metrics.meaniou import compute_iou
from sklearn.metrics import confusion_matrix, f1_score, jaccard_score, precision_score, recall_score
from torch import Tensor

from matchai.metrics.confusion import (
    affected_share,
    collapse,
    confusion_counts,
    dice_per_class,
    iou_per_class,
    mean_along,
    mean_defined,
    notebook_dice,
    precision_per_class,
    recall_per_class,
    summarise,
)

CLASSES = 4
LABELS = list(range(CLASSES))


def masks(seed: int, batch: int = 5, absent: int | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pred, target = torch.randint(0, CLASSES, (2, batch, 9, 7), generator=generator)
    pred = torch.where(torch.rand(pred.shape, generator=generator) < 0.5, target, pred)
    if absent is not None:
        target[target == absent] = (absent + 1) % CLASSES
    return pred, target


def counts(pred: Tensor, target: Tensor) -> Any:
    return confusion_counts(pred, target, CLASSES).numpy()


def test_confusion_counts_are_int64_of_shape_b_c_c() -> None:
    confusion = confusion_counts(*masks(0), CLASSES)
    assert confusion.shape == (5, CLASSES, CLASSES)
    assert confusion.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_confusion_counts_are_scikit_learns(dtype: torch.dtype) -> None:
    pred, target = masks(1)
    for found, p, t in zip(counts(pred.to(dtype), target.to(dtype)), pred, target, strict=True):
        assert np.array_equal(found, confusion_matrix(t.flatten(), p.flatten(), labels=LABELS))


@pytest.mark.parametrize("seed", range(5))
def test_pooled_dice_is_scikit_learns_f1(seed: int) -> None:
    pred, target = masks(seed)
    expected = f1_score(target.flatten(), pred.flatten(), labels=LABELS, average=None)
    assert np.allclose(dice_per_class(counts(pred, target).sum(0)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_pooled_iou_is_scikit_learns_jaccard(seed: int) -> None:
    pred, target = masks(seed)
    expected = jaccard_score(target.flatten(), pred.flatten(), labels=LABELS, average=None)
    assert np.allclose(iou_per_class(counts(pred, target).sum(0)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("absent", [None, 0, 3])
def test_dice_and_iou_of_each_image_are_monais(absent: int | None) -> None:
    pred, target = masks(7, absent=absent)
    one_hot = [torch.nn.functional.one_hot(m, CLASSES).movedim(-1, 1) for m in (pred, target)]
    confusion = counts(pred, target)
    for ours, theirs in ((dice_per_class, compute_dice), (iou_per_class, compute_iou)):
        assert np.allclose(ours(confusion), theirs(one_hot[0], one_hot[1]).numpy(), rtol=0, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("seed", range(3))
def test_pooled_precision_and_recall_are_scikit_learns(seed: int) -> None:
    pred, target = masks(seed)
    for ours, theirs in ((precision_per_class, precision_score), (recall_per_class, recall_score)):
        expected = theirs(target.flatten(), pred.flatten(), labels=LABELS, average=None)
        assert np.allclose(ours(counts(pred, target).sum(0)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("absent", [None, 1])
def test_precision_and_recall_of_each_image_are_monais(absent: int | None) -> None:
    pred, target = masks(8, absent=absent)
    pred[0][pred[0] == 2] = 3  # an image without a predicted pixel of a class
    one_hot = [torch.nn.functional.one_hot(m, CLASSES).movedim(-1, 1) for m in (pred, target)]
    metric = ConfusionMatrixMetric(metric_name=["precision", "recall"], reduction="none")
    metric(*one_hot)
    confusion = counts(pred, target)
    for ours, theirs in zip((precision_per_class, recall_per_class), metric.aggregate(), strict=True):
        assert np.allclose(ours(confusion), np.asarray(theirs), rtol=0, atol=1e-6, equal_nan=True)


def test_means_over_images_are_monais_dice_metric() -> None:
    pred, target = masks(9)
    target[:2][target[:2] == 1] = 3
    metric = DiceMetric(reduction="mean_batch", ignore_empty=True)
    metric(*[torch.nn.functional.one_hot(m, CLASSES).movedim(-1, 1) for m in (pred, target)])
    ours = mean_along(dice_per_class(counts(pred, target)), 0)
    assert np.allclose(ours, np.asarray(metric.aggregate()), rtol=0, atol=1e-6)


def test_any_lesion_is_the_union_of_its_classes() -> None:
    pred, target = masks(10)
    union = confusion_counts((pred > 1).long(), (target > 1).long(), 2).numpy()
    assert np.array_equal(collapse(counts(pred, target), [0, 1]), union)


def test_the_affected_share_is_of_all_that_is_not_background() -> None:
    sizes = np.array([[10, 5, 45, 1000], [0, 0, 20, 5], [0, 0, 0, 9]])
    assert np.array_equal(affected_share(sizes, [0, 1], 3), [25, 0, np.nan], equal_nan=True)


def test_means_along_an_axis_are_those_of_each_column() -> None:
    values = np.array([[1, np.nan, np.nan], [2, 3, np.nan]])
    expected = [mean_defined(column) for column in values.T]
    assert np.array_equal(mean_along(values, 0), expected, equal_nan=True)


def test_a_class_absent_from_the_truth_is_nan_even_where_it_was_predicted() -> None:
    pred, target = masks(2, absent=1)
    assert (pred == 1).any()
    pooled = counts(pred, target).sum(0)
    for values in (dice_per_class(pooled), iou_per_class(pooled)):
        assert np.isnan(values).tolist() == [False, True, False, False]


def test_mean_leaves_out_what_is_undefined() -> None:
    pred, target = masks(2, absent=1)
    expected = f1_score(target.flatten(), pred.flatten(), labels=[0, 2, 3], average="macro")
    summary = summarise(counts(pred, target), [0, 1], 2)
    assert summary["mean_dice"] == pytest.approx(expected, abs=1e-12)
    assert summary["lesion_dice"] == summary["dice_per_class"][0]


def test_the_mean_of_nothing_defined_is_nan() -> None:
    assert math.isnan(mean_defined(np.full(3, np.nan)))


@settings(deadline=None, max_examples=50)
@given(cuts=st.sets(st.integers(1, 11)), order=st.permutations(range(12)))
def test_counts_add_up_in_any_grouping_and_order(cuts: set[int], order: list[int]) -> None:
    pred, target = masks(3, batch=12)
    whole = confusion_matrix(target.flatten(), pred.flatten(), labels=LABELS)
    groups = np.split(np.array(order), sorted(cuts))
    total = sum(counts(pred[group], target[group]).sum(0) for group in groups)
    assert np.array_equal(total, whole)


def test_the_summary_but_the_notebooks_figure_knows_no_batches() -> None:
    confusion = counts(*masks(4, batch=6))
    summaries = [summarise(confusion, [0, 1], batch_size) for batch_size in (1, 4, 6)]
    for summary in summaries:
        summary.pop("notebook_dice")
    assert summaries[0] == summaries[1] == summaries[2]


def test_notebook_dice_counts_an_absent_class_as_1() -> None:
    target = torch.zeros(1, 4, 4, dtype=torch.int64)
    pred = target.clone()
    pred[0, :2] = 1  # Dice of class 0 is 2 * 8 / (8 + 16), of class 1 it is 0; classes 2 and 3 are absent
    assert notebook_dice(counts(pred, target), 1) == pytest.approx((2 / 3 + 0 + 1 + 1) / 4)


def test_notebook_dice_depends_on_the_batch_size() -> None:
    confusion = counts(*masks(5, batch=6, absent=2))
    confusion[:3, :, 2] = 0
    assert notebook_dice(confusion, 1) != pytest.approx(notebook_dice(confusion, 6), abs=1e-3)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_notebook_dice_is_the_mean_over_batches_of_macro_f1(batch_size: int) -> None:
    pred, target = masks(6, batch=5, absent=2)
    pred[pred == 2] = 0
    figures = [
        f1_score(t.flatten(), p.flatten(), labels=LABELS, average="macro", zero_division=1)
        for p, t in zip(torch.split(pred, batch_size), torch.split(target, batch_size), strict=True)
    ]
    assert notebook_dice(counts(pred, target), batch_size) == pytest.approx(np.mean(figures), abs=1e-12)
