"""How good predictions are, in figures that each say what they are: pooled over pixels, or a mean over images."""

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matchai.metrics.bootstrap import MAX_UNDEFINED, NUM_RESAMPLES, Bootstrap, Interval, Number
from matchai.metrics.confusion import (
    Counts,
    affected_share,
    collapse,
    dice_per_class,
    iou_per_class,
    mean_along,
    precision_per_class,
    recall_per_class,
)

Floats = NDArray[np.float64]

RATIOS: dict[str, Callable[[Counts], Floats]] = {
    "dice": dice_per_class,
    "iou": iou_per_class,
    "precision": precision_per_class,
    "recall": recall_per_class,
}
ANY_LESION = "any lesion"


@dataclass(frozen=True)
class Distances:
    """Surface distances of the regions of images, or of volumes.

    A region is each class but the background, in channel order, and last any lesion.

    Attributes:
        hd95: (M, K) in `unit`, NaN where a region is empty in truth and prediction.
        nsd: (M, K) likewise, 0 to 1.
        unit: `mm` or `px`.
        tolerance: Of `nsd`, in `unit`.
    """

    hd95: Floats
    nsd: Floats
    unit: str
    tolerance: float

    def columns(self) -> dict[str, Floats]:
        """The figures under their names, which tell unit and tolerance."""
        return {f"hd95_{self.unit}": self.hd95, f"nsd_{self.tolerance:g}_{self.unit}": self.nsd}


@dataclass(frozen=True)
class Scores:
    """What was counted in the slices of an evaluation, and measured.

    Attributes:
        class_names: (C,) names.
        lesion_classes: Indices of the lesion classes.
        background_class: Index of the background.
        sources: (N,) the set or volume that each slice is of.
        indices: (N,) its number therein.
        groups: (N,) its patient, volume or set of near-duplicates.
        sides: (N,) what the run did with it, such as `validation`.
        confusions: (N, C, C) counts at the slice's own size, truth in rows.
        distances: Of the N slices; None where they were not measured, or of volumes.
        volumes: Those with a geometry.
        volume_distances: Of these; NaN for one of which slices were left out.
    """

    class_names: Sequence[str]
    lesion_classes: Sequence[int]
    background_class: int
    sources: Sequence[str]
    indices: NDArray[np.int64]
    groups: NDArray[np.int64]
    sides: Sequence[str]
    confusions: Counts
    distances: Distances | None
    volumes: Sequence["ScoredVolume"] = ()
    volume_distances: Distances | None = None

    @property
    def regions(self) -> list[str]:
        """The K regions whose surface is measured."""
        return [name for c, name in enumerate(self.class_names) if c != self.background_class] + [ANY_LESION]

    def of_all(self, figure: Callable[[Counts], NDArray[Number]]) -> Callable[[Counts], NDArray[Number]]:
        """From counts (..., C, C) to a figure of every class and of any lesion (..., C + 1)."""
        return lambda counts: np.concatenate(
            [figure(counts), figure(collapse(counts, self.lesion_classes))[..., :1]], axis=-1
        )

    def sizes(self, confusions: Counts) -> Counts:
        """From counts (..., C, C) to the true pixels of every class and of any lesion (..., C + 1)."""
        return self.of_all(lambda counts: counts.sum(-1))(confusions)

    def volume_confusions(self) -> Counts:
        """(V, C, C) counts of each volume."""
        return np.stack([self.confusions[one.slices].sum(0) for one in self.volumes])

    def shares(self, confusions: Counts) -> tuple[Floats, Floats]:
        """The affected share by truth and by prediction, in percent."""
        by_truth, by_prediction = (
            affected_share(confusions.sum(axis), self.lesion_classes, self.background_class) for axis in (-1, -2)
        )
        return by_truth, by_prediction


@dataclass(frozen=True)
class ScoredVolume:
    """A volume whose voxels have a size.

    Attributes:
        name: Its name.
        slices: Which of the N slices are of it, in order.
        spacing: Millimetres between slices, rows and columns.
    """

    name: str
    slices: NDArray[np.int64]
    spacing: tuple[float, float, float]

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel in mL."""
        return math.prod(self.spacing) / 1000


DEFINITIONS = {
    "pooled_over_pixels": "The pixels of all slices are counted together and divided once, so large lesions decide.",
    "mean_over_images": "The figure of each slice, then the mean over the slices where it is defined (num_images).",
    "mean_over_volumes": "The figure of each volume, then the mean over the volumes where it is defined.",
    "mean_over_groups": "The figure of each group (its slices counted together), then the mean over the groups.",
    "interval": "Percentile bootstrap over groups: groups, never slices, are drawn again with replacement. null where "
    "fewer than two groups have a value.",
    "dice": "2 |P and T| / (|P| + |T|); undefined where the truth T has no pixel of the class.",
    "iou": "|P and T| / |P or T|; undefined where the truth has no pixel of the class.",
    "precision": "|P and T| / |P|; undefined where no pixel of the class is predicted.",
    "recall": "|P and T| / |T|; undefined where the truth has no pixel of the class.",
    ANY_LESION: "All lesion classes taken for one.",
    "hd95": "The greater of both directions' 95th percentile of the distances between the borders of prediction and "
    "truth. Both empty: undefined, left out. Exactly one empty: the diagonal of the image or volume.",
    "nsd": "Normalised surface Dice: the share of both borders that lies within the tolerance (in the name) of the "
    "other. Both empty: undefined, left out. Exactly one empty: 0.",
    "affected_share": "Lesion pixels in percent of all pixels that are not background; errors in percentage points.",
}


def describe(scores: Scores) -> dict[str, Any]:
    """Every figure with its interval, named by what it is a figure of: plain values, None where undefined.

    Args:
        scores: What was counted and measured.

    Returns:
        What `evaluation.json` holds of it: `classes` and `any_lesion` with the figures of each, `means_over_classes`,
        `affected_share` in percent, `confusion` summed over the slices, and `definitions`, a sentence for each figure.
    """
    bootstrap = Bootstrap(scores.groups)
    names, pooled = [*scores.class_names, ANY_LESION], scores.confusions.sum(0)
    figures: list[dict[str, Any]] = [
        {"true_pixels": int(true), "predicted_pixels": int(found)}
        for true, found in zip(scores.sizes(pooled), scores.sizes(pooled.T), strict=True)
    ]
    for name, ratio in RATIOS.items():
        statistic = scores.of_all(ratio)
        each = statistic(scores.confusions)
        whole = _figures(statistic(pooled), bootstrap.of_counts(scores.confusions, statistic))
        for figure, one in zip(figures, whole, strict=True):
            figure[f"{name}_pooled_over_pixels"] = one
        _put_means(figures, f"{name}_mean_over_images", "num_images", each, bootstrap)
    by_name = dict(zip(names, figures, strict=True))
    measured = [by_name[region] for region in scores.regions]
    if scores.distances is not None:
        _put_distance_means(measured, "images", scores.distances, scores.confusions, scores, bootstrap)
    if scores.volume_distances is not None:
        counts = scores.volume_confusions()
        over_volumes = Bootstrap([scores.groups[one.slices[0]] for one in scores.volumes])
        _put_distance_means(measured, "volumes", scores.volume_distances, counts, scores, over_volumes)
    lesions = list(scores.lesion_classes)
    means: dict[str, Callable[[Counts], Floats]] = {
        "mean_dice_pooled_over_pixels": lambda counts: mean_along(dice_per_class(counts), -1),
        "lesion_dice_pooled_over_pixels": lambda counts: mean_along(dice_per_class(counts)[..., lesions], -1),
        "mean_iou_pooled_over_pixels": lambda counts: mean_along(iou_per_class(counts), -1),
    }
    return {
        "num_slices": len(scores.confusions),
        "num_groups": bootstrap.num_groups,
        "interval": {"level": bootstrap.level, "num_resamples": NUM_RESAMPLES, "over": "groups"},
        "means_over_classes": {
            name: _figures(statistic(pooled), bootstrap.of_counts(scores.confusions, statistic))[0]
            for name, statistic in means.items()
        },
        "classes": {name: by_name[name] for name in scores.class_names},
        "any_lesion": figures[-1],
        "affected_share": _describe_shares(scores, bootstrap),
        "confusion": pooled.tolist(),
        "definitions": DEFINITIONS,
    }


def _describe_shares(scores: Scores, bootstrap: Bootstrap) -> dict[str, Any]:
    truth, pred = scores.shares(scores.confusions.sum(0))
    described: dict[str, Any] = {
        "true_percent_pooled_over_pixels": _plain(truth),
        "predicted_percent_pooled_over_pixels": _plain(pred),
    }
    of_groups = bootstrap.sum_groups(scores.confusions)
    # the same resamples: they are keyed by the number of groups
    over_groups = Bootstrap(range(bootstrap.num_groups))
    for what, confusions, resamples in (("images", scores.confusions, bootstrap), ("groups", of_groups, over_groups)):
        truth, pred = scores.shares(confusions)
        for name, values in (("absolute_error_points", np.abs(pred - truth)), ("error_points", pred - truth)):
            _put_means([described], f"{name}_mean_over_{what}", f"num_{what}", values[:, None], resamples)
    return described


def _put_distance_means(
    figures: Sequence[dict[str, Any]],
    over: str,
    distances: Distances,
    confusions: Counts,
    scores: Scores,
    bootstrap: Bootstrap,
) -> None:
    """Puts both distances of K regions, with how many images (volumes) had no region in truth or prediction alone."""
    kept = [c for c in range(len(scores.class_names)) if c != scores.background_class] + [len(scores.class_names)]
    true, found = (scores.sizes(counts)[:, kept] > 0 for counts in (confusions, np.swapaxes(confusions, -1, -2)))
    num_one_empty = ((true != found) & ~np.isnan(distances.nsd)).sum(axis=0)
    for name, values in distances.columns().items():
        _put_means(figures, f"{name}_mean_over_{over}", f"num_{over}", values, bootstrap)
        for figure, number in zip(figures, num_one_empty, strict=True):
            figure[f"{name}_mean_over_{over}"]["num_with_one_empty"] = int(number)


def _put_means(
    figures: Sequence[dict[str, Any]], name: str, number_name: str, values: Floats, bootstrap: Bootstrap
) -> None:
    """Puts the mean of each column of (M, K) values into one of K descriptions, with how many it is a mean of."""
    numbers = (~np.isnan(values)).sum(axis=0)
    means = _figures(mean_along(values, 0), bootstrap.of_means(values))
    for figure, one, number in zip(figures, means, numbers, strict=True):
        figure[name] = one | {number_name: int(number)}


def _figures(values: Floats, interval: Interval) -> list[dict[str, Any]]:
    """One description a value."""
    described = []
    for value, low, high, undefined in zip(*(np.atleast_1d(one) for one in (values, *interval)), strict=True):
        one: dict[str, Any] = {"value": _plain(value), "low": _plain(low), "high": _plain(high)}
        if undefined > MAX_UNDEFINED and one["low"] is not None:
            one["resamples_without_a_value"] = _plain(undefined)
        described.append(one)
    return described


def _plain(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)


def slice_rows(scores: Scores) -> list[dict[str, Any]]:
    """A row for each slice: where it is from, its counts and its figures; None where undefined.

    Args:
        scores: What was counted and measured.

    Returns:
        N rows with the same keys, as `as_csv` takes them: counts in pixels, shares in percent, distances in the unit
        that their key ends with.
    """
    rows: list[dict[str, Any]] = [
        {"source": source, "index": int(index), "group": int(group), "side": side}
        for source, index, group, side in zip(scores.sources, scores.indices, scores.groups, scores.sides, strict=True)
    ]
    _put_counts(rows, scores, scores.confusions)
    if scores.distances is not None:
        _put_distances(rows, scores, scores.distances)
    return rows


def volume_rows(scores: Scores) -> list[dict[str, Any]]:
    """A row for each volume with a geometry, as `slice_rows` makes them; volumes in mL too, spacings in mm."""
    rows: list[dict[str, Any]] = []
    for one in scores.volumes:
        spacing = dict(zip(("slice", "row", "column"), one.spacing, strict=True))
        rows.append(
            {"volume": one.name, "group": int(scores.groups[one.slices[0]]), "slices": len(one.slices)}
            | {f"{axis}_spacing_mm": value for axis, value in spacing.items()}
        )
    if rows:
        _put_counts(rows, scores, scores.volume_confusions(), [one.voxel_ml for one in scores.volumes])
        if scores.volume_distances is not None:
            _put_distances(rows, scores, scores.volume_distances)
    return rows


def _put_counts(
    rows: Sequence[dict[str, Any]], scores: Scores, confusions: Counts, voxel_ml: Sequence[float] | None = None
) -> None:
    ratios = {name: scores.of_all(ratio)(confusions) for name, ratio in RATIOS.items()}
    any_lesion = collapse(confusions, scores.lesion_classes)
    truth, pred = scores.shares(confusions)
    for number, row in enumerate(rows):
        for column, name in enumerate([*scores.class_names, ANY_LESION]):
            counts, c = (confusions[number], column) if column < len(scores.class_names) else (any_lesion[number], 0)
            hits, true, found = int(counts[c, c]), int(counts[c].sum()), int(counts[:, c].sum())
            key = name.replace(" ", "_")
            row |= {f"{key}_true_pixels": true, f"{key}_predicted_pixels": found}
            if voxel_ml is not None:
                row |= {f"{key}_true_ml": true * voxel_ml[number], f"{key}_predicted_ml": found * voxel_ml[number]}
            row |= {f"{key}_tp": hits, f"{key}_fp": found - hits, f"{key}_fn": true - hits}
            row |= {f"{key}_{ratio}": _plain(values[number, column]) for ratio, values in ratios.items()}
        row["true_affected_percent"], row["predicted_affected_percent"] = _plain(truth[number]), _plain(pred[number])
        row["affected_absolute_error_points"] = _plain(np.abs(pred[number] - truth[number]))


def _put_distances(rows: Sequence[dict[str, Any]], scores: Scores, distances: Distances) -> None:
    for name, values in distances.columns().items():
        for number, row in enumerate(rows):
            for region, value in zip(scores.regions, values[number], strict=True):
                row[f"{region.replace(' ', '_')}_{name}"] = _plain(value)


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    r"""Rows as CSV, a cell empty where a value is undefined.

    Args:
        rows: One or more, with the same keys.

    >>> as_csv([{"slice": 0, "dice": 0.5}, {"slice": 1, "dice": None}])
    'slice,dice\n0,0.5\n1,\n'
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
