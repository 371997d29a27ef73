"""The slices that a user has to train on: arrays, pairs of NIfTI files or of pictures; refused where unfit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matchai.data.pairs import find_layout, open_pairs
from matchai.data.slice_set import ROUNDING, SliceSet, Target, expected_numbers, read_numbers
from matchai.settings import InputSettings, parse_label_map
from matchai.system import InputError, Problems, is_there
from matchai.volumes import axes_note, check_size, open_array, rescaled

KNOWN_SETS = ("medseg", "radiopedia")
"""The sets that are looked for when none is named."""


@dataclass(eq=False)
class ArraySet:
    """One pair of array files, a `matchai.data.slice_set.SliceSet`.

    Attributes:
        name: The set's name, for messages.
        image_path: File of the images.
        mask_path: File of the masks.
        images: (N, H, W), memory-mapped, any real dtype.
        masks: (N, H, W) numbers or (N, H, W, C) one-hot, memory-mapped, any real dtype.
        orientation: As the user says that the slices lie.
        rescale: Slope and intercept that make HU of the images' numbers.
        numbers: The class of each number in the masks, by a label map; None for the class indices.
        files: The two files.
        shape: Rows and columns.
    """

    name: str
    image_path: Path
    mask_path: Path
    images: NDArray[Any]
    masks: NDArray[Any]
    orientation: str = "LP"
    rescale: tuple[float, float] = (1.0, 0.0)
    numbers: Mapping[int, int] | None = None
    spacing: tuple[float, float, float] | None = None
    is_volume: bool = False
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.files: Sequence[Path] = (self.image_path, self.mask_path)
        self.shape: tuple[int, int] = (self.images.shape[1], self.images.shape[2])

    def __len__(self) -> int:
        return len(self.images)

    def read_image(self, index: int) -> NDArray[np.float32]:
        """See `matchai.data.slice_set.SliceSet`."""
        return rescaled(self.images[index], self.rescale)

    def read_target(self, index: int, num_classes: int, background_class: int) -> Target:
        """See `matchai.data.slice_set.SliceSet`.

        Pixels of a one-hot mask with several classes take the lowest index; with none, the background.
        """
        mask = np.asarray(self.masks[index])
        if mask.ndim == 2:
            return read_numbers(mask, self._numbers(num_classes), background_class)
        if mask.dtype.kind == "f":
            whole = np.rint(mask)
            mask = np.where(np.abs(mask - whole) <= ROUNDING, whole, mask)
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

    def expected_values(self, class_names: Sequence[str], background_class: int) -> str:
        """See `matchai.data.slice_set.SliceSet`."""
        if self.masks.ndim == 4:
            return "one-hot masks hold only 0 and 1 (or 0 and 255): save classes, not probabilities"
        return expected_numbers(self._numbers(len(class_names)), class_names, self.numbers is not None)

    def close(self) -> None:
        """Nothing to free: the system drops the pages of a memory map as it needs to."""

    def _numbers(self, num_classes: int) -> Mapping[int, int]:
        return {c: c for c in range(num_classes)} if self.numbers is None else self.numbers


def open_sets(folder: Path, settings: InputSettings, scratch: Path | None = None) -> Sequence[SliceSet]:
    """Opens the arrays of every set or, where there are none, the pairs of files in `images/` and `masks/`.

    Args:
        folder: Where the files lie, whatever `settings.data` says.
        settings: Which files, how they lie, which numbers mean which class.
        scratch: Folder for volumes while they are decompressed (default: the system's).

    Raises:
        InputError: With every problem found.
    """
    images_name, masks_name = settings.images_name, settings.masks_name
    if not (is_there(folder) and folder.is_dir()):
        what, example = "is a file" if folder.exists() else "does not exist", images_name.format(set=KNOWN_SETS[0])
        raise InputError(
            f"The data folder {folder} {what}; --data takes the folder that holds {example}, or that of images/ and "
            "masks/."
        )
    layout = find_layout(folder)  # lists the folder, which may not be readable
    numbers = parse_label_map(settings.label_map, settings.class_names) if settings.label_map else None
    names = list(settings.sets) or (["medseg"] if "{set}" not in images_name + masks_name else list(KNOWN_SETS))
    pairs = [(name, folder / images_name.format(set=name), folder / masks_name.format(set=name)) for name in names]
    has_arrays = any(is_there(path) for _, *paths in pairs for path in paths)
    if not settings.sets and not has_arrays and layout is not None:
        return open_pairs(folder, layout, settings, numbers, scratch)
    if not settings.sets and "{set}" in images_name:
        pairs = [pair for pair in pairs if is_there(pair[1]) or is_there(pair[2])] or pairs[:1]
    opened: list[ArraySet] = []
    problems = Problems()
    for pair in pairs:
        with problems.collect():
            opened.append(_open_set(*pair, settings, numbers))
    if problems and not has_arrays:
        problems.append(
            f"NIfTI files and pictures are looked for in {folder / 'images'} and {folder / 'masks'}, or in nnU-Net's "
            "imagesTr and labelsTr."
        )
    problems.raise_any()
    return opened


def _open_set(
    name: str, image_path: Path, mask_path: Path, settings: InputSettings, numbers: Mapping[int, int] | None
) -> ArraySet:
    images, masks = _open_pair(image_path, mask_path, settings.class_names)
    if masks.ndim == 4 and numbers is not None:
        raise InputError(
            f"{mask_path} is one-hot, so its channels say the classes: leave out --label-map, which tells what numbers "
            "mean, or save class numbers (N, H, W)."
        )
    lies = "LP" if settings.orientation == "auto" else settings.orientation
    notes = [f"{image_path.name}: {note}" for note in [axes_note(images)] if note]
    return ArraySet(name, image_path, mask_path, images, masks, lies, settings.rescale, numbers, notes=notes)


def _open_pair(image_path: Path, mask_path: Path, class_names: Sequence[str]) -> tuple[NDArray[Any], NDArray[Any]]:
    problems = Problems()
    with problems.collect():
        images = open_array(image_path, "images")
    with problems.collect():
        masks = open_array(mask_path, "masks")
    problems.raise_any()
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
        is_first = masks.ndim == 4 and masks.shape[1] == num_classes
        hint = "; move the channels last with numpy.moveaxis" if is_first else ""
        problems.append(
            f"{mask_path} has shape {masks.shape}, but masks must be one-hot (N, H, W, {num_classes}) for the "
            f"{num_classes} classes {', '.join(class_names)}, or class indices (N, H, W){hint}."
        )
    problems.raise_any()
    images = images[..., 0] if images.ndim == 4 else images
    if len(images) != len(masks):
        both = min(len(images), len(masks))
        problems.append(
            f"{image_path} has {len(images)} slices, but {mask_path} has {len(masks)}: slice {both} is the first "
            "without its other half."
        )
    size, mask_size = (f"{one.shape[1]}x{one.shape[2]}" for one in (images, masks))
    if size != mask_size:
        problems.append(
            f"{image_path} has slices of {size} pixels, but {mask_path} of {mask_size}; they must be alike."
        )
    with problems.collect():
        check_size(image_path, *images.shape[1:3])
    problems.raise_any()
    return images, masks
