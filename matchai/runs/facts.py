"""What a run's folder tells of the run, gathered once for its report and its model card; the data need not be there."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matchai.data import OF_VOLUMES
from matchai.metrics import ANY_LESION, RATIOS, Bootstrap, Counts, collapse, dice_per_class, mean_along
from matchai.settings import PRESETS, TrainConfig, parsing
from matchai.system import InputError, is_there
from matchai.training import checkpoint

METRICS = ("Dice", "IoU", "precision", "recall")
"""As they are written; in the order of `matchai.metrics.RATIOS`."""
ALL_CLASSES, LESION_CLASSES = "mean of all classes", "mean of lesion classes"


@dataclass(frozen=True)
class Score:
    """A figure and its interval.

    Attributes:
        value: NaN where it is undefined.
        low: Lower bound; NaN where there is no interval.
        high: Upper bound; likewise.
        undefined: The share of the resamples that had no value and were left out.
    """

    value: float
    low: float = np.nan
    high: float = np.nan
    undefined: float = 0.0

    @property
    def has_interval(self) -> bool:
        """Whether there is one; fewer than two groups give none."""
        return bool(self.low <= self.high)

    def format(self, about: str = "") -> str:
        """The figure with its interval in brackets, after `about`, where there is one."""
        if np.isnan(self.value):
            return "undefined"
        return f"{self.value:.3f}" + (f" ({about}{self.low:.3f}–{self.high:.3f})" if self.has_interval else "")


@dataclass(frozen=True)
class ClassScores:
    """How a class, or several taken together, was segmented.

    Attributes:
        name: Of the class; or `ANY_LESION`, `ALL_CLASSES` or `LESION_CLASSES`.
        scores: By `METRICS`; a mean has no precision and no recall.
        num_pixels: Of the truth; None for a mean, or where it was not kept.
        num_slices: Validation slices that show it; likewise.
    """

    name: str
    scores: dict[str, Score]
    num_pixels: int | None = None
    num_slices: int | None = None

    def format(self, metric: str) -> str:
        """A score in words; "–" where the mean of such scores is no figure of its own."""
        is_mean = self.name in (ALL_CLASSES, LESION_CLASSES)
        return "–" if is_mean and metric in METRICS[2:] else self.scores[metric].format()


@dataclass(frozen=True)
class RunFacts:
    """What a run's folder holds.

    Attributes:
        folder: The folder, as the user named it.
        config: All settings.
        recorded: What the run found when it began: digests, versions, device; {} for what an old run did not record.
        history: A row for every finished epoch.
        train: Indices of the training slices.
        val: Indices of the validation slices.
        groups: The group of every slice.
        about: What the header of the best weights says; {} before there are any.
        best: The row of the epoch whose weights were kept; None before the first validation.
        confusions: (N, C, C) counts of each validation slice at that epoch, in the order of `val`; None where the
            resumable state is gone.
    """

    folder: Path
    config: TrainConfig
    recorded: dict[str, Any]
    history: list[dict[str, Any]]
    train: list[int]
    val: list[int]
    groups: list[int]
    about: dict[str, Any]
    best: dict[str, Any] | None
    confusions: Counts | None

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def class_names(self) -> list[str]:
        """C names in channel order."""
        return list(self.config.input.class_names)

    @property
    def is_finished(self) -> bool:
        """Whether all epochs are done."""
        return len(self.history) >= self.config.optimisation.epochs

    @property
    def is_synthetic(self) -> bool:
        """Whether it was trained on the built-in phantom."""
        return self.config.input.data is None

    @property
    def source(self) -> str:
        """Of which data, in words; of a path the last name alone."""
        data = self.config.input.data
        return "the built-in synthetic phantom" if data is None else f"data set {data.name or data.resolve().name}"

    @property
    def val_groups(self) -> list[int]:
        """The group of each validation slice."""
        return [self.groups[index] for index in self.val]

    @property
    def num_val_groups(self) -> int:
        """How many groups the validation slices are of."""
        return len(set(self.val_groups))

    @property
    def grouping(self) -> str:
        """Where the groups come from: "given", "volumes" or "found"."""
        files: dict[str, str] = self.recorded.get("data", {})
        if self.is_synthetic or self.config.input.groups_name in files:
            return "given"
        return "volumes" if any(OF_VOLUMES in note for note in self.recorded.get("notes", [])) else "found"

    @property
    def preset(self) -> TrainConfig:
        """The settings of the run's preset."""
        return TrainConfig().updated(**PRESETS.get(self.config.run.preset, {}))

    @cached_property
    def class_scores(self) -> list[ClassScores]:
        """Every class, the two means and any lesion at the best epoch, pooled over pixels; empty before it."""
        if self.best is None:
            return []
        if self.confusions is None:
            return _class_scores_of_row(self.best, self.class_names)
        return _class_scores(self.confusions, self.val_groups, self.class_names, self.config.input.lesion_indices)

    def score(self, name: str, metric: str = "Dice") -> Score:
        """A figure of `class_scores`; undefined where there is none."""
        return next((one.scores[metric] for one in self.class_scores if one.name == name), Score(np.nan))


def read_facts(folder: Path) -> RunFacts:
    """Reads a run, finished or not, and changes nothing in its folder.

    Raises:
        InputError: If the folder holds no run, or one of its files cannot be read.
    """
    settings = folder / "config.yaml"
    if not is_there(settings):
        reason = "holds no config.yaml, so it is no matchai run" if folder.is_dir() else "is no folder"
        raise InputError(f"{folder} {reason}; give the folder that training wrote (--output, or runs/PRESET).")
    config = TrainConfig().updated(**parsing.load(settings))
    if not (folder / "split.json").exists():
        raise InputError(f"{folder} has no split.json yet: its run has not begun; train it first.")
    split = _read_json(folder / "split.json")
    history_file = folder / "history.jsonl"
    history = _read_json(history_file, is_lines=True) if history_file.exists() else []
    about = checkpoint.load_about(folder) if (folder / checkpoint.BEST).exists() else {}
    best_epoch, confusions = about.get("epoch"), None
    if kept := checkpoint.peek(folder, "best_confusions"):
        record, confusions = kept
        history, best_epoch = record["history"], record["best_epoch"]
    num_classes = len(config.input.class_names)
    if confusions is not None and confusions.shape != (len(split["val"]), num_classes, num_classes):
        raise InputError(
            f"{folder}: the counts in {checkpoint.LAST} are of {len(confusions)} slices, but split.json names "
            f"{len(split['val'])} for validation; the folder holds files of several runs."
        )
    best = next((row for row in history if row["epoch"] == best_epoch), None)
    recorded = parsing.load_recorded(settings)
    parts = split["train"], split["val"], split["groups"]
    return RunFacts(folder, config, recorded, history, *parts, about, best, confusions)


def rank_by_lesion_dice(confusions: Counts, lesions: Sequence[int]) -> tuple[list[int], list[float]]:
    """Orders slices that show a lesion from the worst to the best.

    Args:
        confusions: (N, C, C) counts of each slice.
        lesions: Indices of the lesion classes.

    Returns:
        The positions, the worst first, and for every slice its lesion Dice: the mean over the lesion classes that it
        shows, NaN for one that shows none and is not ranked.
    """
    dice = mean_along(dice_per_class(confusions)[:, list(lesions)], -1)
    ranked = sorted(np.flatnonzero(~np.isnan(dice)).tolist(), key=lambda row: float(dice[row]))
    return ranked, dice.tolist()


def _class_scores(
    confusions: Counts, groups: Sequence[int], class_names: Sequence[str], lesions: list[int]
) -> list[ClassScores]:
    names = [*class_names, ALL_CLASSES, LESION_CLASSES, ANY_LESION]

    def measure(counts: Counts) -> NDArray[np.float64]:
        """From (..., C, C) to (..., metrics times names)."""
        any_lesion, columns = collapse(counts, lesions), []
        for name, metric in RATIOS.items():
            of_classes, of_any = metric(counts), metric(any_lesion)[..., :1]
            means = np.stack([mean_along(of_classes, -1), mean_along(of_classes[..., lesions], -1)], -1)
            if name in METRICS[2:]:
                means = np.full_like(means, np.nan)
            columns.append(np.concatenate([of_classes, means, of_any], -1))
        return np.concatenate(columns, -1)

    values, interval = measure(confusions.sum(0)), Bootstrap(groups).of_counts(confusions, measure)
    cells = np.stack([values, *interval], -1).tolist()
    scores = np.array([Score(*cell) for cell in cells], object).reshape(len(METRICS), len(names))
    truth = confusions.sum(-1)  # (N, C)
    sizes = [*truth.T, None, None, truth[:, lesions].sum(-1)]
    class_scores = []
    for name, size, column in zip(names, sizes, scores.T, strict=True):
        counted = () if size is None else (int(size.sum()), int((size > 0).sum()))
        class_scores.append(ClassScores(name, dict(zip(METRICS, column, strict=True)), *counted))
    return class_scores


def _class_scores_of_row(row: dict[str, Any], class_names: Sequence[str]) -> list[ClassScores]:
    """What a row of the history holds, without intervals."""

    def scores_of(name: str, dice: float | None, iou: float | None) -> ClassScores:
        known = zip(METRICS, (dice, iou, None, None), strict=True)
        return ClassScores(name, {metric: Score(np.nan if value is None else value) for metric, value in known})

    unknown: list[float | None] = [None] * len(class_names)
    dice, iou = row.get("dice_per_class") or unknown, row.get("iou_per_class") or unknown
    return [
        *map(scores_of, class_names, dice, iou),
        scores_of(ALL_CLASSES, row.get("mean_dice"), row.get("mean_iou")),
        scores_of(LESION_CLASSES, row.get("lesion_dice"), None),
    ]


def _read_json(path: Path, *, is_lines: bool = False) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()] if is_lines else json.loads(text)
    except (OSError, ValueError):
        raise InputError(f"{path} cannot be read as the JSON that a run writes; restore it, or train again.") from None
