"""What may be wrong with slices and their masks: found slice by slice, then refused or told for the whole."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from matchai.data.slice_set import SliceSet, format_value
from matchai.settings import InputSettings
from matchai.system import Problems
from matchai.volumes import ValueCounts, count_values, implausible_values, raw_slice

MAX_PROBLEMS = 20
MANY_OF_ALL = 0.6  # share of all lesion classes together that is told
MANY_LESIONS = 0.5  # share of all that is not background, from which on a lesion class is told as unlikely


class InspectedSlice(NamedTuple):
    """A slice as its files have it.

    Attributes:
        image: (H, W) in HU; None where pixels are NaN or infinite.
        labels: (H, W) class indices.
        found: What `refuse_unfit` judges and `describe_oddities` tells.
    """

    image: NDArray[np.float32] | None
    labels: NDArray[np.uint8]
    found: dict[str, Any]


def inspect_slice(
    one: SliceSet, index: int, num_classes: int, background_class: int, hu_window: tuple[float, float]
) -> InspectedSlice:
    """Reads a slice and its mask, and notes what may be wrong with them, which `refuse_unfit` then judges."""
    image, target = one.read_image(index), one.read_target(index, num_classes, background_class)
    finite = np.isfinite(image)
    found = {"overlapping": target.num_overlapping, "empty": target.num_empty, "wrong": target.wrong_values}
    if not finite.all():
        first = np.unravel_index(int(np.argmin(finite)), image.shape)
        return InspectedSlice(None, target.labels, found | {"non_finite": int((~finite).sum()), "first": first})
    return InspectedSlice(image, target.labels, found | {"values": count_values(image, hu_window)})


def refuse_unfit(
    sets: Sequence[SliceSet],
    found: Sequence[dict[str, Any]],
    hu_window: tuple[float, float],
    class_names: Sequence[str],
    background_class: int,
) -> None:
    """Refuses slices that cannot be trained on or judged by, given what `inspect_slice` found in each.

    Raises:
        InputError: With the first `MAX_PROBLEMS` problems.
    """
    problems = Problems()
    rest = iter(found)
    for one in sets:
        rows = list(itertools.islice(rest, len(one)))
        problems += _image_problems(one, rows, hu_window) + _mask_problems(one, rows, class_names, background_class)
    Problems(problems[:MAX_PROBLEMS]).raise_any()


def _image_problems(one: SliceSet, rows: Sequence[dict[str, Any]], hu_window: tuple[float, float]) -> list[str]:
    broken = [index for index, row in enumerate(rows) if "non_finite" in row]
    if broken:
        row = rows[broken[0]]
        which = ", ".join(map(str, broken[:10])) + (" ..." if len(broken) > 10 else "")
        return [
            f"{one.image_path} has NaN or infinite pixels in {len(broken)} of {len(rows)} slices ({which}); slice "
            f"{broken[0]} has {row['non_finite']}, the first at row {row['first'][0]}, column {row['first'][1]}. "
            "Replace them, by -1000 HU (air) say."
        ]
    problem = implausible_values(str(one.image_path), _values_of(rows), hu_window)
    if problem is None and (raw := [index for index, row in enumerate(rows) if raw_slice(row["values"], hu_window)]):
        which = ", ".join(map(str, raw[:10])) + (" ..." if len(raw) > 10 else "")
        problem = (
            f"{one.image_path} holds {len(raw)} of {len(rows)} slices ({which}) that look like raw CT values without "
            "their offset, among others in HU; bring all to HU (value - 1024, as a rule)."
        )
    return [problem] if problem else []


def _values_of(rows: Sequence[dict[str, Any]]) -> ValueCounts:
    return ValueCounts.total(row["values"] for row in rows)


def _mask_problems(
    one: SliceSet, rows: Sequence[dict[str, Any]], class_names: Sequence[str], background_class: int
) -> list[str]:
    wrong = [index for index, row in enumerate(rows) if row["wrong"]]
    if not wrong:
        return []
    values = ", ".join(map(format_value, rows[wrong[0]]["wrong"]))
    return [
        f"{one.mask_path} holds {values} in slice {wrong[0]} ({len(wrong)} of {len(rows)} slices hold such values), "
        f"but {one.expected_values(class_names, background_class)}."
    ]


def describe_oddities(
    sets: Sequence[SliceSet], found: list[dict[str, Any]], totals: NDArray[np.int64], settings: InputSettings
) -> list[str]:
    """What is odd about slices that may be trained on, in sentences.

    Args:
        sets: The sets of the slices.
        found: What `inspect_slice` found in each slice.
        totals: (C,) pixels of each class at training size.
        settings: Those that the sets were opened with.
    """
    notes = [note] if (note := _values_of(found).padding_note()) else []
    overlapping, empty = (sum(one[name] for one in found) for name in ("overlapping", "empty"))
    if overlapping:
        notes.append(f"{overlapping:,} pixels carry several classes; each takes the first in channel order.")
    if empty:
        notes.append(f"{empty:,} pixels carry no class; they count as {settings.background_class}.")
    for height, width in dict.fromkeys(one.shape for one in sets if one.shape[0] != one.shape[1]):
        names = [one.image_path.name for one in sets if one.shape == (height, width)]
        which = names[0] if len(names) == 1 else f"{len(names)} files from {names[0]} on"
        notes.append(f"{which}: slices of {height}x{width} pixels are squeezed to a square.")
    inside = totals.sum() - totals[settings.background_index]
    lesions = totals[settings.lesion_indices].sum()
    if inside and lesions >= MANY_OF_ALL * inside and len(settings.lesion_indices) > 1:
        notes.append(
            f"{' and '.join(settings.lesion_classes)} cover {lesions / inside:.0%} of all that is not "
            f"{settings.background_class}, which is much for lesions: check --label-map and --class-names."
        )
    for c in settings.lesion_indices:
        if inside and totals[c] >= MANY_LESIONS * inside:
            notes.append(
                f"{settings.class_names[c]} covers {totals[c] / inside:.0%} of all that is not "
                f"{settings.background_class}, which is much for a lesion: check --label-map and --class-names."
            )
    most = settings.class_names[int(totals.argmax())]
    if most != settings.background_class:
        notes.append(
            f"The most frequent class is {most} ({totals.max() / totals.sum():.0%} of the pixels), not "
            f"{settings.background_class}: check --class-names and --background-class."
        )
    return notes
