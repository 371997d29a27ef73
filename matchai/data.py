"""From a folder to the two sides of a split: which slices train, which validate, and what follows from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matchai.arrays import open_sets
from matchai.digests import fingerprint
from matchai.errors import InputError
from matchai.phantom import write_phantom
from matchai.slices import Progress, Slices, prepare
from matchai.split import assign_folds, check_groups_array, find_groups, volume_numbers

PHANTOM_SIZE = 256  # pixels; the presets that use it train at 128 and below


@dataclass(frozen=True)
class Data:
    """A data set, split.

    Attributes:
        slices: All slices, prepared.
        digests: SHA-256 of every file that was read.
        groups: (N,) int64, slices of one number are of one patient, volume or near-duplicate.
        volumes: (N,) int64; consecutive slices of one number lie next to each other in one volume.
        train: Indices of the training slices.
        val: Indices of the validation slices.
        mean: Over the pixels of the training slices, in units of the window (0 to 1).
        std: Likewise.
        notes: What the user should know, in sentences.
        orientation: Toward which sides of the patient the slices' rows and columns run (`matchai.config`).
    """

    slices: Slices
    digests: dict[str, str]
    groups: NDArray[np.int64]
    volumes: NDArray[np.int64]
    train: list[int]
    val: list[int]
    mean: float
    std: float
    notes: list[str]
    orientation: str

    def presence(self) -> NDArray[np.bool_]:
        """(N, C), whether class c appears in slice n."""
        return np.asarray(self.slices.pixels) > 0


def built_in_phantom(cache: Path, num_slices: int) -> Path:
    """The folder of the built-in synthetic phantom, written there when it is not yet."""
    folder = cache / f"phantom-{num_slices}"
    if not (folder / "images_medseg.npy").exists():
        for leftover in folder.glob("*.npy"):  # a writer that was killed between its renames
            leftover.unlink()
        write_phantom(folder, num_slices, size=PHANTOM_SIZE)
    return folder


def read_data(
    folder: Path,
    cache: Path,
    *,
    sets: Sequence[str],
    images_name: str,
    masks_name: str,
    groups_name: str,
    orientation: str = "auto",
    class_names: Sequence[str],
    background_class: int,
    hu_window: tuple[float, float],
    image_size: int,
    val_fraction: float,
    folds: int,
    fold: int,
    seed: int,
    progress: Progress | None = None,
) -> Data:
    """Opens, checks, prepares and splits a data set; the settings are those of `matchai.config.InputSettings`.

    Raises:
        InputError: With every problem found.
    """
    opened = open_sets(folder, sets, images_name, masks_name, class_names)
    num_slices = sum(map(len, opened))
    known = _read_groups(folder / groups_name, num_slices)
    paths = [path for one in opened for path in (one.image_path, one.mask_path)]
    digests = fingerprint([*paths, *([folder / groups_name] if known is not None else [])], cache / "digests.json")
    slices = prepare(
        opened,
        {path.name: digests[path.name] for path in paths},
        cache,
        hu_window=hu_window,
        image_size=image_size,
        class_names=class_names,
        background_class=background_class,
        progress=progress,
    )
    notes = list(slices.notes)
    if known is not None:
        groups = np.unique(known, return_inverse=True)[1].astype(np.int64)
        volumes = volume_numbers(np.asarray(slices.sets), groups)
        notes.append(f"{num_slices} slices in {groups.max() + 1} groups, from {groups_name}.")
    else:
        found = find_groups(slices.thumbnails, np.asarray(slices.sets))
        groups, volumes = found.groups, found.volumes
        notes.append(found.description)
    presence = np.asarray(slices.pixels) > 0
    shares = [1.0] * folds if folds else [val_fraction, 1 - val_fraction]
    is_val = assign_folds(groups, presence, shares, seed) == (fold if folds else 0)
    train, val = np.flatnonzero(~is_val), np.flatnonzero(is_val)
    problems = [
        f"No training slice has a pixel of {class_names[c]}, so it cannot be learnt: add such slices, choose another "
        "--seed or --fold, or leave the class out of --class-names."
        for c in np.flatnonzero(~presence[train].any(axis=0)).tolist()
    ]
    if problems:
        raise InputError(*problems)
    for c in np.flatnonzero(~presence[val].any(axis=0)).tolist():
        notes.append(
            f"No validation slice has a pixel of {class_names[c]}: its Dice is undefined and left out of every mean."
        )
    mean, std = slices.mean_std(train.tolist())
    return Data(
        slices,
        digests,
        groups,
        volumes,
        train.tolist(),
        val.tolist(),
        mean,
        std,
        notes,
        "LP" if orientation == "auto" else orientation,
    )


def _read_groups(path: Path, num_slices: int) -> NDArray[Any] | None:
    if not path.exists():
        return None
    try:
        groups = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise InputError(
            f"{path} is no complete .npy file of plain numbers or texts; save the {num_slices} groups with numpy.save."
        ) from None
    check_groups_array(groups, num_slices, path.name)
    return np.asarray(groups)
