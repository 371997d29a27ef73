"""Training data as pairs of files: `images/` and `masks/` with NIfTI volumes, or with PNG or TIFF pictures.

nnU-Net's `imagesTr/` and `labelsTr/` are read as well, with the labels that its `dataset.json` names.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from matchai.data.slice_set import SliceSet, Target, expected_numbers, numbers_of, read_numbers
from matchai.settings import InputSettings
from matchai.system import InputError, Problems, is_there, list_folder
from matchai.volumes import (
    LOSSY,
    NIFTI,
    PICTURES,
    TEXTS,
    GridVolume,
    PictureVolume,
    check_same_geometry,
    check_size,
    format_shape,
    has_suffix,
    natural_key,
    nifti,
    open_nifti,
    open_pictures,
    pictures_in,
    read_picture_header,
    why_unread,
)

LAYOUTS = (("images", "masks"), ("imagesTr", "labelsTr"))
"""The two folders, as matchai and as nnU-Net names them."""

IMAGE_FOLDERS = tuple(f"{images}/" for images, _ in LAYOUTS)
"""How the names of images begin that lie in such a folder."""

DATASET_JSON = "dataset.json"
"""nnU-Net's description of a data set, in the folder above."""

MAX_PROBLEMS = 20
MAX_NAMES = 10


@dataclass(eq=False)
class PairSet:
    """A volume with its mask, or a folder of pictures with theirs: a `matchai.data.slice_set.SliceSet`.

    Attributes:
        name: The set's name, for messages.
        image_path: File or folder of the images.
        mask_path: Likewise of the masks.
        files: Every file that is read.
        images: Gives slices in HU.
        masks: Gives numbers.
        numbers: The class of each number in the masks, by a label map; None for those of
            `matchai.data.slice_set.numbers_of`.
        is_volume: Whether it is one volume.
        shape: Rows and columns.
        orientation: Toward which sides of the patient rows and columns run.
        spacing: Millimetres between neighbouring slices, rows and columns; None where unknown.
        notes: What the user should know of the images.
    """

    name: str
    image_path: Path
    mask_path: Path
    files: Sequence[Path]
    images: GridVolume | PictureVolume
    masks: GridVolume | PictureVolume
    numbers: Mapping[int, int] | None
    is_volume: bool

    def __post_init__(self) -> None:
        self.shape = self.images.shape[1:]
        self.orientation, self.spacing, self.notes = self.images.orientation, self.images.spacing, self.images.notes

    def __len__(self) -> int:
        return self.images.shape[0]

    def read_image(self, index: int) -> NDArray[np.float32]:
        """See `matchai.data.slice_set.SliceSet`."""
        return self.images.read(index)

    def read_target(self, index: int, num_classes: int, background_class: int) -> Target:
        """See `matchai.data.slice_set.SliceSet`."""
        numbers = numbers_of(num_classes, background_class) if self.numbers is None else self.numbers
        return read_numbers(self.masks.read_labels(index), numbers, background_class)

    def expected_values(self, class_names: Sequence[str], background_class: int) -> str:
        """See `matchai.data.slice_set.SliceSet`."""
        numbers = numbers_of(len(class_names), background_class) if self.numbers is None else self.numbers
        return expected_numbers(numbers, class_names, self.numbers is not None)

    def close(self) -> None:
        """See `matchai.data.slice_set.SliceSet`."""
        self.images.close()
        self.masks.close()


def find_layout(folder: Path) -> tuple[str, str] | None:
    """The names of the two folders in a folder that is meant to hold pairs of files; None for any other.

    Raises:
        InputError: If something in the folder cannot be opened, or it has folders by both layouts.
    """
    names = {path.name for path in list_folder(folder)[1]}
    found = [layout for layout in LAYOUTS if names.intersection(layout)]
    if len(found) > 1:
        raise InputError(
            f"{folder} holds folders of two layouts, {' and '.join('/'.join(layout) for layout in found)}; keep one."
        )
    return found[0] if found else None


def open_pairs(
    folder: Path,
    layout: tuple[str, str],
    settings: InputSettings,
    numbers: Mapping[int, int] | None,
    scratch: Path | None,
) -> Sequence[SliceSet]:
    """Opens the pairs of the two folders, in natural order of their names.

    A mask has the name of its image, which may end in nnU-Net's `_0000`. Each NIfTI pair and each pair of stacks (TIFF
    files of several pages) is a set of its own; single pictures are one set together.

    Args:
        folder: The folder above.
        layout: The names of the folders of images and of masks.
        settings: What volumes are turned to (orientation; auto: LP), and how pictures lie (auto: PL); slope and
            intercept that make HU of what the files give (rescale).
        numbers: The class of each number in the masks; None for those that `dataset.json` names or, without it, those
            of `matchai.data.slice_set.numbers_of`.
        scratch: Folder for volumes while they are decompressed (default: the system's).

    Raises:
        InputError: With every problem found, up to `MAX_PROBLEMS`.
    """
    missing = [one for one in layout if not is_there(folder / one)]
    if missing:
        there = layout[1] if missing == [layout[0]] else layout[0]
        raise InputError(
            f"{folder} has a folder {there}, but none named {missing[0]}, where the other halves should lie."
        )
    image_folder, mask_folder = (folder / one for one in layout)
    kind, images = _list_files(image_folder)
    mask_kind, masks = _list_files(mask_folder)
    if kind != mask_kind:
        raise InputError(
            f"{image_folder} holds {kind}, but {mask_folder} {mask_kind}: convert one of them, so that a mask "
            "lies on its image pixel by pixel."
        )
    pairs = _pair(image_folder, mask_folder, images, masks)
    description = folder / DATASET_JSON
    has_description = numbers is None and is_there(description)
    if has_description:
        numbers = read_labels(description, settings.class_names, settings.background_class)
    if kind == "NIfTI files":
        opened = _each(pairs, lambda image, mask: _open_volume(image, mask, settings, numbers, scratch))
    else:
        opened = _open_pictures(image_folder, mask_folder, pairs, settings, numbers)
    if has_description:  # what the numbers mean belongs to the data, whose content decides what a run resumes with
        opened[0].files = [*opened[0].files, description]
    return opened


def read_labels(path: Path, class_names: Sequence[str], background_class: str) -> dict[int, int]:
    """The class of each number in the masks, by the names in nnU-Net's `dataset.json` (of either version).

    Names are compared without regard to case, hyphens and underscores; number 0 is the background if no
    class has its name.

    Raises:
        InputError: If the file cannot be read, or names anything but one class for each number.
    """
    try:
        labels = json.loads(path.read_text(encoding="utf-8-sig"))["labels"]
        # version 2 has {"lesion": 1}, version 1 {"1": "lesion"}
        is_first = all(str(key).isdecimal() for key in labels)
        pairs = [(int(k), str(v)) for k, v in labels.items()] if is_first else [(int(v), k) for k, v in labels.items()]
        named = dict(pairs)
        if len(named) < len(pairs) or not (is_first or all(float(v) == int(v) for v in labels.values())):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"{path} names no labels with one number each; say what the numbers in the masks mean with --label-map "
            "NUMBER:CLASS ..."
        ) from None
    classes = {_plain(name): c for c, name in enumerate(class_names)}
    known = {number: classes.get(_plain(name)) for number, name in named.items()}
    if known.get(0, 0) is None:  # whatever its name
        known[0] = class_names.index(background_class)
    numbers = {number: c for number, c in known.items() if c is not None}
    if len(numbers) < len(known):
        told = ", ".join(f"{number} {name}" for number, name in sorted(named.items()))
        example = " ".join(f"{number}:CLASS" for number in sorted(named))
        raise InputError(
            f"{path} names the labels {told}, but the classes are {', '.join(class_names)}; say which is which with "
            f"--label-map {example}, or set --class-names."
        )
    return numbers


def _plain(name: str) -> str:
    return re.sub(r"[-_\s]+", " ", name.casefold()).strip()


def _list_files(folder: Path) -> tuple[str, dict[str, Path]]:
    """What kind of files a folder holds, and these by their stems in natural order."""
    files, folders = list_folder(folder)
    for path in folders:
        if path.suffix or any(list_folder(path)):
            raise InputError(
                f"{folder} holds the folder {path.name}, but training reads the files in it alone; move the files up, "
                "and convert DICOM series to NIfTI, for example with dcm2niix."
            )
    for path in files:
        if (what := why_unread(path)) is not None:
            raise InputError(f"{path} is {what}.")
        if not has_suffix(path, (*NIFTI, *PICTURES, *LOSSY, *TEXTS)):
            raise InputError(
                f"{path} is of no kind that is read here; convert it to NIfTI, or take it out of the folder."
            )
    volumes = [path for path in files if has_suffix(path, NIFTI)]
    slices = pictures_in(folder)
    if bool(volumes) == bool(slices):
        found = (
            f"NIfTI files ({volumes[0].name}) and pictures ({slices[0].name}); keep one kind" if volumes else "neither"
        )
        raise InputError(f"{folder} must hold NIfTI files (.nii, .nii.gz) or PNG or TIFF pictures, but holds {found}.")
    stems: dict[str, Path] = {}
    for path in sorted(volumes or slices, key=lambda path: natural_key(path.name)):
        name = nifti.stem(path) if volumes else path.stem
        if name in stems:
            raise InputError(f"{stems[name]} and {path.name} have the same name; keep one of them.")
        stems[name] = path
    return "NIfTI files" if volumes else "pictures", stems


def _pair(
    image_folder: Path, mask_folder: Path, images: Mapping[str, Path], masks: Mapping[str, Path]
) -> list[tuple[Path, Path]]:
    pairs, lonely, used = [], [], set()
    for name, image in images.items():
        found = next((one for one in (name, name.removesuffix("_0000")) if one in masks), None)
        if found is None:
            lonely.append(image.name)
            continue
        if found in used:
            raise InputError(f"{image} and another image both belong to {masks[found]} by their names; keep one.")
        pairs.append((image, masks[found]))
        used.add(found)
    unused = [mask.name for name, mask in masks.items() if name not in used]
    Problems(
        f"{there}: {len(names)} of {len(files)} files have no namesake in {other}: "
        f"{', '.join(names[:MAX_NAMES])}{' ...' if len(names) > MAX_NAMES else ''}; add these, or take the files away."
        for there, other, names, files in (
            (image_folder, mask_folder, lonely, images),
            (mask_folder, image_folder, unused, masks),
        )
        if names
    ).raise_any()
    return pairs


def _each(pairs: Sequence[tuple[Path, Path]], open_pair: Callable[[Path, Path], PairSet]) -> Sequence[SliceSet]:
    opened: list[PairSet] = []
    problems = Problems()
    for image, mask in pairs:
        with problems.collect():
            opened.append(open_pair(image, mask))
            check_size(opened[-1].image_path, *opened[-1].shape)
        if len(set(problems)) >= MAX_PROBLEMS:
            break
    Problems(dict.fromkeys(problems)).raise_any()  # without an extra every file has the same
    return opened


def _open_volume(
    image: Path, mask: Path, settings: InputSettings, numbers: Mapping[int, int] | None, scratch: Path | None
) -> PairSet:
    orientation = "LP" if settings.orientation == "auto" else settings.orientation
    images = open_nifti(image, orientation, settings.rescale, scratch, settings.nifti_affine)
    masks = open_nifti(mask, orientation, (1.0, 0.0), scratch, settings.nifti_affine)
    check_same_geometry(images, masks)
    return PairSet(nifti.stem(image), image, mask, (image, mask), images, masks, numbers, is_volume=True)


def _open_pictures(
    image_folder: Path,
    mask_folder: Path,
    pairs: Sequence[tuple[Path, Path]],
    settings: InputSettings,
    numbers: Mapping[int, int] | None,
) -> Sequence[SliceSet]:
    stacks = [
        image for image, _ in pairs if image.suffix.lower() != ".png" and read_picture_header(image).num_pages > 1
    ]
    if stacks and len(stacks) < len(pairs):
        single = next(image for image, _ in pairs if image not in stacks)
        raise InputError(
            f"{image_folder} holds stacks of several pages ({stacks[0].name}) and single slices ({single.name}), so "
            "that nobody knows which slices are neighbours; keep one kind."
        )

    def open_pair(image: Path, mask: Path) -> PairSet:
        is_stack = bool(stacks)
        image_files = [image] if is_stack else [one for one, _ in pairs]
        mask_files = [mask] if is_stack else [one for _, one in pairs]
        images = open_pictures(image, settings.orientation, settings.rescale, files=image_files)
        masks = open_pictures(mask, settings.orientation, files=mask_files, is_mask=True)
        if images.shape != masks.shape:
            raise InputError(
                f"{mask} has {format_shape(masks.shape)} pixels (slices, rows, columns), but its image {image} has "
                f"{format_shape(images.shape)}; a mask must lie on its image pixel by pixel."
            )
        name, files = image.stem if is_stack else image.name, [*image_files, *mask_files]
        return PairSet(name, image, mask, files, images, masks, numbers, is_volume=is_stack)

    return _each(pairs if stacks else [(image_folder, mask_folder)], open_pair)
