"""Dice and other metrics from confusion counts, bootstrap intervals, surface distances."""

from typing import TYPE_CHECKING

from matchai.system.lazy import lazy_exports

if TYPE_CHECKING:
    from matchai.metrics.bootstrap import MAX_UNDEFINED, MIN_GROUPS, NUM_RESAMPLES, Bootstrap, Interval
    from matchai.metrics.confusion import (
        Counts, affected_share, collapse, confusion_counts, dice_per_class, iou_per_class, mean_along, mean_defined,
        notebook_dice, precision_per_class, recall_per_class, summarise,
    )
    from matchai.metrics.scores import (
        ANY_LESION, RATIOS, Distances, ScoredVolume, Scores, as_csv, describe, slice_rows, volume_rows,
    )
    from matchai.metrics.surface_distance import can_measure, surface_distances
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = [
    "ANY_LESION", "MAX_UNDEFINED", "MIN_GROUPS", "NUM_RESAMPLES", "RATIOS", "Bootstrap", "Counts", "Distances",
    "Interval", "ScoredVolume", "Scores", "affected_share", "as_csv", "can_measure", "collapse", "confusion_counts",
    "describe", "dice_per_class", "iou_per_class", "mean_along", "mean_defined", "notebook_dice", "precision_per_class",
    "recall_per_class", "slice_rows", "summarise", "surface_distances", "volume_rows",
]
