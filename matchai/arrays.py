"""The arrays a user has: opened memory-mapped, read slice by slice, refused in a sentence where they cannot be used."""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matchai.errors import InputError

KNOWN_SETS = ("medseg", "radiopedia")
"""The sets that are looked for when none is named."""


@dataclass(frozen=True)
class ArraySet:
    """One pair of array files.

    Attributes:
        name: The set's name, for messages.
        image_path: File of the images.
        mask_path: File of the masks.
        images: (N, H, W), memory-mapped, any real dtype.
        masks: (N, H, W) class indices or (N, H, W, C) one-hot, memory-mapped, any real dtype.
    """

    name: str
    image_path: Path
    mask_path: Path
    images: NDArray[Any]
    masks: NDArray[Any]

    def __len__(self) -> int:
        return len(self.images)

    def read_image(self, index: int) -> NDArray[np.float32]:
        """Slice `index` in the file's own units, (H, W) float32 in native byte order."""
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, and is refused as such
            return np.asarray(self.images[index], dtype=np.float32)

    def read_target(self, index: int, num_classes: int, background_class: int) -> "Target":
        """The class indices of slice `index`, and what is odd about its mask.

        Pixels of a one-hot mask with several classes take the lowest index; with none, the background.
        """
        mask = np.asarray(self.masks[index])
        if mask.ndim == 2:
            whole = mask if mask.dtype.kind in "iub" else np.where(np.isfinite(mask), mask, -1)
            wrong = (whole < 0) | (whole >= num_classes) | (whole != np.trunc(whole))
            labels = np.where(wrong, background_class, whole).astype(np.uint8)
            return Target(labels, 0, 0, np.unique(mask[wrong])[:5].tolist())
        wrong_values = [] if mask.dtype == bool else np.setdiff1d(mask, [0, 1, 255])[:5].tolist()
        if not wrong_values and mask.dtype != bool and (mask == 1).any() and (mask == 255).any():
            wrong_values = [255]
        labels = np.full(mask.shape[:2], background_class, np.uint8)
        num_set = np.zeros(mask.shape[:2], np.uint8)
        # class by class, the lowest last: a reduction over an axis of four took six of a slice's nine milliseconds
        for c in reversed(range(mask.shape[-1])):
            is_set = mask[..., c] != 0
            np.copyto(labels, c, where=is_set)
            num_set += is_set
        return Target(labels, int((num_set > 1).sum()), int((num_set == 0).sum()), wrong_values)


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


def open_sets(
    folder: Path, sets: Sequence[str], images_name: str, masks_name: str, class_names: Sequence[str]
) -> list[ArraySet]:
    """Opens the image and mask arrays of every set.

    Args:
        folder: Where the files lie.
        sets: The sets' names; empty for those of `KNOWN_SETS` that are there.
        images_name: File name with `{set}` in it, or one name for a single set.
        masks_name: Likewise.
        class_names: (C,) the classes, in channel order.

    Raises:
        InputError: With every problem found.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"The data folder {folder} {what}; --data takes the folder that holds {images_name}.")
    names = list(sets) or (["medseg"] if "{set}" not in images_name + masks_name else list(KNOWN_SETS))
    pairs = [(name, folder / images_name.format(set=name), folder / masks_name.format(set=name)) for name in names]
    if not sets and "{set}" in images_name:
        pairs = [pair for pair in pairs if pair[1].exists() or pair[2].exists()] or pairs[:1]
    opened: list[ArraySet] = []
    problems: list[str] = []
    for name, image_path, mask_path in pairs:
        try:
            opened.append(_open_pair(name, image_path, mask_path, class_names))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(*problems)
    return opened


def _open_pair(name: str, image_path: Path, mask_path: Path, class_names: Sequence[str]) -> ArraySet:
    arrays: list[NDArray[Any]] = []
    problems: list[str] = []
    for path, what in ((image_path, "images"), (mask_path, "masks")):
        try:
            arrays.append(open_array(path, what))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(*problems)
    images, masks = arrays
    if images.dtype.kind == "b":
        problems.append(f"{image_path} holds true and false, but images must be numbers in HU.")
    if not (images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 1)):
        hint = "; move the channel last with numpy.moveaxis" if images.ndim == 4 and images.shape[1] == 1 else ""
        hint = "; a single slice is saved as (1, H, W)" if images.ndim == 2 else hint
        problems.append(f"{image_path} has shape {images.shape}, but images must be (N, H, W) or (N, H, W, 1){hint}.")
    num_classes = len(class_names)
    if masks.ndim == 4 and masks.shape[-1] == 1 and num_classes > 1:
        masks = masks[..., 0]
    if not (masks.ndim == 3 or (masks.ndim == 4 and masks.shape[-1] == num_classes)):
        hint = (
            "; move the channels last with numpy.moveaxis" if masks.ndim == 4 and masks.shape[1] == num_classes else ""
        )
        problems.append(
            f"{mask_path} has shape {masks.shape}, but masks must be one-hot (N, H, W, {num_classes}) for the "
            f"{num_classes} classes {', '.join(class_names)}, or class indices (N, H, W){hint}."
        )
    if problems:
        raise InputError(*problems)
    images = images[..., 0] if images.ndim == 4 else images
    if len(images) != len(masks):
        both = min(len(images), len(masks))
        problems.append(
            f"{image_path} has {len(images)} slices, but {mask_path} has {len(masks)}: slice {both} is the first "
            "without its other half."
        )
    if images.shape[1:3] != masks.shape[1:3]:
        problems.append(
            f"{image_path} has slices of {images.shape[1]}x{images.shape[2]} pixels, but {mask_path} of "
            f"{masks.shape[1]}x{masks.shape[2]}; they must be alike."
        )
    if min(images.shape[1:3]) < 32:
        problems.append(
            f"{image_path} has slices of {images.shape[1]}x{images.shape[2]} pixels, but at least 32x32 are needed."
        )
    if problems:
        raise InputError(*problems)
    return ArraySet(name, image_path, mask_path, images, masks)
