"""Metrics from integer counts: add up over slices, batches and processes in any order, divide once.

A confusion matrix of one slice, (C, C) with truth in rows and prediction in columns, holds all that Dice and IoU
need. *Pooled* figures divide the counts of a whole set; a mean of per-image figures is another number.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Counts = NDArray[np.int64]


def confusion_counts(pred: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Counts, for every slice, the pixels of each (truth, prediction).

    Args:
        pred: (B, H, W) integer class indices.
        target: (B, H, W) integer class indices.
        num_classes: C; every index must lie in 0..C-1.

    Returns:
        (B, C, C) int64 on the same device, truth in rows.

    >>> confusion_counts(torch.tensor([[[0, 1]]]), torch.tensor([[[0, 0]]]), num_classes=2).tolist()
    [[[1, 1], [0, 0]]]
    """
    batch = len(target)
    if not pred.is_cpu:  # where bincount waits for the device; sums of ones are exact up to 2^24 pixels
        classes = torch.arange(num_classes, device=pred.device).view(1, -1, 1)
        truth, found = (one.reshape(batch, 1, -1) == classes for one in (target, pred))
        return torch.bmm(truth.float(), found.float().transpose(1, 2)).long()
    cell = target.reshape(batch, -1).long() * num_classes + pred.reshape(batch, -1).long()
    cell += torch.arange(batch, device=cell.device).unsqueeze(1) * num_classes**2
    return torch.bincount(cell.flatten(), minlength=batch * num_classes**2).view(batch, num_classes, num_classes)


def dice_per_class(confusion: Counts) -> NDArray[np.float64]:
    """2 |P ∩ T| / (|P| + |T|) for every class (Dice 1945); NaN for a class without a pixel in the truth.

    Args:
        confusion: (..., C, C) counts, truth in rows.

    Returns:
        (..., C) float64.

    >>> dice_per_class(np.array([[6, 2], [1, 1]])).round(2).tolist()
    [0.8, 0.4]
    """
    return _ratio(confusion, lambda both, truth, pred: (2 * both, truth + pred))


def iou_per_class(confusion: Counts) -> NDArray[np.float64]:
    """|P ∩ T| / |P ∪ T| for every class (Jaccard 1912); NaN for a class without a pixel in the truth.

    Args:
        confusion: (..., C, C) counts, truth in rows.

    Returns:
        (..., C) float64.

    >>> iou_per_class(np.array([[6, 2], [1, 1]])).round(2).tolist()
    [0.67, 0.25]
    """
    return _ratio(confusion, lambda both, truth, pred: (both, truth + pred - both))


def recall_per_class(confusion: Counts) -> NDArray[np.float64]:
    """|P ∩ T| / |T| for every class; NaN for a class without a pixel in the truth.

    Args:
        confusion: (..., C, C) counts, truth in rows.

    Returns:
        (..., C) float64.

    >>> recall_per_class(np.array([[6, 2], [1, 1]])).tolist()
    [0.75, 0.5]
    """
    return _ratio(confusion, lambda both, truth, pred: (both, truth))


def precision_per_class(confusion: Counts) -> NDArray[np.float64]:
    """|P ∩ T| / |P| for every class; NaN for a class without a pixel in the prediction.

    Args:
        confusion: (..., C, C) counts, truth in rows.

    Returns:
        (..., C) float64.

    >>> precision_per_class(np.array([[6, 2], [1, 1]])).round(2).tolist()
    [0.86, 0.33]
    """
    return recall_per_class(np.swapaxes(confusion, -1, -2))


def _ratio(confusion: Counts, parts: Callable[..., tuple[Counts, Counts]]) -> NDArray[np.float64]:
    both = np.diagonal(confusion, axis1=-2, axis2=-1)
    truth, pred = confusion.sum(-1), confusion.sum(-2)
    return divide(*parts(both, truth, pred), where=truth > 0)


def divide(
    numerator: NDArray[Any], denominator: NDArray[Any], *, where: NDArray[np.bool_] | bool = True
) -> NDArray[np.float64]:
    """The quotient; NaN where the denominator is 0, or `where` is false."""
    quotient = np.full(np.shape(denominator), np.nan)
    np.divide(numerator, denominator, out=quotient, where=where & (denominator > 0))
    return quotient


def collapse(confusion: Counts, classes: Sequence[int]) -> Counts:
    """Takes some classes for one, such as any lesion, and all others for another.

    Args:
        confusion: (..., C, C) counts, truth in rows.
        classes: Indices of the classes that become class 0; the rest becomes class 1.

    Returns:
        (..., 2, 2) counts, truth in rows.

    >>> collapse(np.array([[5, 1, 0], [2, 3, 1], [0, 1, 9]]), classes=[0, 1]).tolist()
    [[11, 1], [1, 9]]
    """
    belongs = np.zeros((confusion.shape[-1], 2), np.int64)
    belongs[:, 1] = 1
    belongs[list(classes)] = (1, 0)
    collapsed: Counts = belongs.T @ confusion @ belongs
    return collapsed


def affected_share(sizes: Counts, lesion_classes: Sequence[int], background_class: int) -> NDArray[np.float64]:
    """Pixels of lesions in percent of all that are not background; NaN where all are.

    Args:
        sizes: (..., C) pixels of each class, of a truth or of a prediction.
        lesion_classes: Indices of the classes that are lesions.
        background_class: Index of the class outside the lungs.

    Returns:
        (...) float64.

    >>> affected_share(np.array([10, 15, 75, 900]), lesion_classes=[0, 1], background_class=3).item()
    25.0
    """
    lungs = sizes.sum(-1) - sizes[..., background_class]
    return divide(100 * sizes[..., list(lesion_classes)].sum(-1), lungs)


def mean_defined(values: NDArray[np.float64]) -> float:
    """The mean of the values that are not NaN; NaN where all are.

    >>> round(mean_defined(np.array([0.8, np.nan, 0.4])), 2)
    0.6
    """
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else math.nan


def mean_along(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """`mean_defined` along one axis, such as over images (0) or over classes (-1).

    >>> mean_along(np.array([[0.8, np.nan], [0.4, np.nan]]), axis=0).round(2).tolist()
    [0.6, nan]
    """
    is_known = ~np.isnan(values)
    return divide(np.where(is_known, values, 0).sum(axis=axis), is_known.sum(axis=axis))


def notebook_dice(confusions: Counts, batch_size: int) -> float:
    """The figure of the notebook that matchai grew out of, for comparison with it alone.

    Dice of each class in each batch, a class absent from truth and prediction counting 1, averaged over classes and
    then over batches. It depends on the batch size and flatters rare classes.

    Args:
        confusions: (N, C, C) counts of each slice, in order.
        batch_size: Slices of a batch; the last may be short.

    >>> notebook_dice(np.array([[[6, 2], [1, 1]], [[8, 0], [2, 0]]]), batch_size=1)  # pooled: 0.85 and 0.29
    0.5222222222222223
    """
    figures = []
    for start in range(0, len(confusions), batch_size):
        counts = confusions[start : start + batch_size].sum(0)
        both, sizes = np.diagonal(counts), counts.sum(0) + counts.sum(1)
        figures.append(np.divide(2 * both, sizes, out=np.ones(len(both)), where=sizes > 0).mean())
    return float(np.mean(figures))


def summarise(confusions: Counts, lesion_classes: list[int], batch_size: int) -> dict[str, Any]:
    """Every metric of a validation pass, under the names that the history uses; all but `notebook_dice` pooled.

    Args:
        confusions: (N, C, C) counts of each slice, in order.
        lesion_classes: Indices of the classes whose mean is the lesion Dice.
        batch_size: For `notebook_dice`.

    Returns:
        `dice_per_class`, `mean_dice`, `lesion_dice`, `iou_per_class`, `mean_iou`, `notebook_dice`: floats or lists of
        them, NaN where undefined.

    >>> found = summarise(np.array([[[6, 2], [1, 1]]]), lesion_classes=[1], batch_size=1)
    >>> round(found["mean_dice"], 2), round(found["lesion_dice"], 2)
    (0.6, 0.4)
    """
    pooled = confusions.sum(0)
    dice, iou = dice_per_class(pooled), iou_per_class(pooled)
    return {
        "dice_per_class": dice.tolist(),
        "mean_dice": mean_defined(dice),
        "lesion_dice": mean_defined(dice[lesion_classes]),
        "iou_per_class": iou.tolist(),
        "mean_iou": mean_defined(iou),
        "notebook_dice": notebook_dice(confusions, batch_size),
    }
