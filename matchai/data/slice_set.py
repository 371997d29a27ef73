"""What training reads: a set of slices with their masks, whatever files they lie in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from matchai.volumes import file_labels


@dataclass(frozen=True)
class Target:
    """A slice's class indices.

    Attributes:
        labels: (H, W) uint8.
        num_overlapping: Pixels that carried several classes.
        num_empty: Pixels that carried none.
        wrong_values: Up to five values that no mask may hold.
    """

    labels: NDArray[np.uint8]
    num_overlapping: int
    num_empty: int
    wrong_values: list[float]


class SliceSet(Protocol):
    """Slices of one size in one orientation, with their masks.

    Attributes:
        name: The set's name, for messages and the cache's key.
        image_path: File or folder of the images, for messages.
        mask_path: Likewise of the masks.
        files: Every file that is read.
        shape: Rows and columns (H, W).
        orientation: Toward which sides of the patient rows and columns run, such as "LP" (`matchai.settings.config`).
        spacing: Millimetres between neighbouring slices, rows and columns; None where unknown.
        is_volume: Whether the set is one volume, its slices neighbours in order.
        notes: What the user should know of the files, in sentences.
    """

    name: str
    image_path: Path
    mask_path: Path
    files: Sequence[Path]
    shape: tuple[int, int]
    orientation: str
    spacing: tuple[float, float, float] | None
    is_volume: bool
    notes: Sequence[str]

    def __len__(self) -> int: ...

    def read_image(self, index: int) -> NDArray[np.float32]:
        """Slice `index` in HU, (H, W) float32; may be called from several threads at once."""

    def read_target(self, index: int, num_classes: int, background_class: int) -> Target:
        """The class indices of slice `index`, and what is odd about its mask; from several threads, too."""

    def expected_values(self, class_names: Sequence[str], background_class: int) -> str:
        """What its masks may hold and how to mend others, the end of a sentence."""

    def close(self) -> None:
        """Frees what reading has opened; what is read later is opened again."""


ROUNDING = 1e-3
"""What a number of a mask may be off a whole one: programs save masks as floats with a scale, which rounds."""


def numbers_of(num_classes: int, background_class: int) -> dict[int, int]:
    """The class of each number in NIfTI and picture masks without a label map: `matchai.volumes.volume.file_labels`."""
    return {number: c for c, number in enumerate(file_labels(num_classes, background_class))}


def read_numbers(mask: NDArray[Any], numbers: Mapping[int, int], background_class: int) -> Target:
    """The class indices of an index mask.

    Args:
        mask: (H, W) of any real dtype.
        numbers: The class of each number that a mask may hold.
        background_class: What other values count as; they are told.
    """
    lowest, highest = min(numbers), max(numbers)
    classes = np.full(highest - lowest + 1, background_class, np.uint8)
    is_known = np.zeros(len(classes), bool)
    for number, c in numbers.items():
        classes[number - lowest], is_known[number - lowest] = c, True
    whole = np.rint(mask) if mask.dtype.kind == "f" else mask
    is_near = (whole >= lowest) & (whole <= highest)  # false for NaN
    near = np.where(is_near, whole, 0).astype(np.int64)  # wide before a number is put in that the dtype may lack
    places = np.where(is_near, near - lowest, 0)
    is_right = is_near & is_known[places]
    if mask.dtype.kind == "f":
        is_right &= np.abs(np.subtract(mask, whole, where=is_near, out=np.zeros(mask.shape))) <= ROUNDING
    labels = classes[places]
    if is_right.all():
        return Target(labels, 0, 0, [])
    labels[~is_right] = background_class
    return Target(labels, 0, 0, np.unique(mask[~is_right])[:5].tolist())


def format_value(value: float) -> str:
    """A number of a mask, for messages: one that is no whole number never looks like one."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


def expected_numbers(numbers: Mapping[int, int], class_names: Sequence[str], is_mapped: bool) -> str:
    """What an index mask may hold and how to mend others, the end of a sentence."""
    known = ", ".join(f"{number} {class_names[c]}" for number, c in sorted(numbers.items()))
    if is_mapped:
        return (
            f"--label-map (or dataset.json) knows {known} alone: give every number in the masks a class by --label-map"
        )
    return (
        f"the numbers of the {len(class_names)} classes are {known}: say what others mean with --label-map "
        "NUMBER:CLASS ..., one entry for each number, or set --class-names"
    )
