"""From a folder to the two sides of a split: which slices train, which validate, and what follows from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matchai.data.arrays import ArraySet, open_sets
from matchai.data.digests import condense, fingerprint
from matchai.data.duplicates import find_equal, join_groups
from matchai.data.phantom import write_phantom
from matchai.data.prepared import Progress, Slices, prepare
from matchai.data.slice_set import SliceSet
from matchai.data.split import assign_folds, check_groups_array, find_groups, volume_numbers
from matchai.settings import InputSettings
from matchai.system import InputError, Problems, is_there, plural
from matchai.volumes import kind_of

_Floats = NDArray[np.float32]
_Ints = NDArray[np.int64]

MAX_NOTES = 5  # of the files
PHANTOM_SIZE = 256  # pixels; the presets that use it train at 128 and below
OF_VOLUMES = "one for each volume"
"""What tells in the notes that groups are volumes, neither given nor found."""


@dataclass(frozen=True)
class Data:
    """A data set, split.

    Attributes:
        slices: All slices, prepared.
        digests: SHA-256 of every file that was read; of very many files, one a folder.
        groups: (N,) int64, slices of one number are of one patient, volume or near-duplicate.
        volumes: (N,) int64; consecutive slices of one number lie next to each other in one volume.
        train: Indices of the training slices.
        val: Indices of the validation slices.
        mean: Over the pixels of the training slices, in units of the window (0 to 1).
        std: Likewise.
        notes: What the user should know, in sentences.
        orientation: Toward which sides of the patient the slices' rows and columns run (`matchai.settings.config`).
        kind: Of the files (`matchai.volumes.open.kind_of`).
    """

    slices: Slices
    digests: dict[str, str]
    groups: _Ints
    volumes: _Ints
    train: list[int]
    val: list[int]
    mean: float
    std: float
    notes: list[str]
    orientation: str
    kind: str

    def presence(self) -> NDArray[np.bool_]:
        """(N, C), whether class c appears in slice n."""
        return np.asarray(self.slices.pixels) > 0


def built_in_phantom(cache: Path, num_slices: int) -> Path:
    """The folder of the built-in synthetic phantom, written there when it is not yet.

    Args:
        cache: The folder above it.
        num_slices: How many slices it has, at least 2.

    Raises:
        InputError: If it cannot be written.
    """
    folder = cache / f"phantom-{num_slices}"
    if not (folder / "images_medseg.npy").exists():
        for leftover in folder.glob("*.npy"):  # a writer that was killed between its renames
            leftover.unlink()
        write_phantom(folder, num_slices, size=PHANTOM_SIZE)
    return folder


def read_data(
    folder: Path, cache: Path, settings: InputSettings, *, seed: int, context: int = 0, progress: Progress | None = None
) -> Data:
    """Opens, checks, prepares and splits a data set.

    With `context`, volumes of one known group are told apart by their images, too: half a second for 1,000 slices.

    Args:
        folder: Where the files lie, whatever `settings.data` says.
        cache: Folder of prepared slices.
        settings: Which files, which classes, which pixels, which split.
        seed: Of the split.
        context: Neighbours on each side that the model will see.
        progress: Told (slices prepared, slices in all).

    Raises:
        InputError: With every problem found.
    """
    opened = open_sets(folder, settings, cache)
    known = read_groups(folder / settings.groups_name, opened)
    digests = digest_sets(folder, opened, cache)
    slices = prepare(opened, digests, cache, settings, progress)
    if known is not None:
        digests = digests | fingerprint([folder / settings.groups_name], cache / "digests.json")
    groups, volumes, description = group_slices(slices.thumbnails, opened, known, settings.groups_name, context)
    presence = np.asarray(slices.pixels) > 0
    shares = [1.0] * settings.folds if settings.folds else [settings.val_fraction, 1 - settings.val_fraction]
    is_val = assign_folds(groups, presence, shares, seed) == (settings.fold if settings.folds else 0)
    train, val = np.flatnonzero(~is_val).tolist(), np.flatnonzero(is_val).tolist()
    notes = [*slices.notes, *_notes(opened), description, *([_context_note(volumes)] if context else [])]
    notes += _check_classes(settings.class_names, presence[train], presence[val])
    mean, std = slices.mean_std(train)
    orientation, kind = opened[0].orientation, kind_of(opened[0].files[0])
    return Data(slices, digests, groups, volumes, train, val, mean, std, notes, orientation, kind)


def _context_note(volumes: _Ints) -> str:
    num_alone = int((np.bincount(volumes) == 1).sum())
    return (
        f"Neighbours within {volumes.max() + 1 - num_alone} volumes are further channels; {num_alone} of "
        f"{len(volumes)} slices lie in no volume and are their own neighbours."
    )


def _check_classes(names: Sequence[str], in_train: NDArray[np.bool_], in_val: NDArray[np.bool_]) -> list[str]:
    """Notes of the classes (of (N, C) presence) that no validation slice has.

    Raises:
        InputError: If no training slice has one of them.
    """
    Problems(
        f"No training slice has a pixel of {names[c]}, so it cannot be learnt: add such slices, choose another "
        "--seed or --fold, or leave the class out of --class-names."
        for c in np.flatnonzero(~in_train.any(axis=0)).tolist()
    ).raise_any()
    return [
        f"No validation slice has a pixel of {names[c]}: its Dice is undefined and left out of every mean."
        for c in np.flatnonzero(~in_val.any(axis=0)).tolist()
    ]


def digest_sets(folder: Path, opened: Sequence[SliceSet], cache: Path) -> dict[str, str]:
    """SHA-256 of the files of opened sets, under the names that a run records.

    Args:
        folder: The folder that the sets were opened in.
        opened: What `matchai.data.open_sets` gave.
        cache: Folder that remembers the hashes of files that have not changed.

    Raises:
        OSError: If a file cannot be read.
    """
    paths = [path for one in opened for path in one.files]
    if isinstance(opened[0], ArraySet):
        return fingerprint(paths, cache / "digests.json")
    return condense(fingerprint(paths, cache / "digests.json", folder))


def _notes(opened: Sequence[SliceSet]) -> list[str]:
    notes = list(dict.fromkeys(note for one in opened for note in one.notes))
    more = [f"... and {len(notes) - MAX_NOTES} such notes more."] if len(notes) > MAX_NOTES else []
    return notes[:MAX_NOTES] + more


def group_slices(
    thumbnails: _Floats, opened: Sequence[SliceSet], known: NDArray[Any] | None, groups_name: str, context: int
) -> tuple[_Ints, _Ints, str]:
    """The group and the volume of each slice, each (N,) int64, and where the groups come from in words.

    Groups that hold the same slice are one, whatever names their files have.

    Args:
        thumbnails: As for `matchai.data.split.find_groups`.
        opened: The sets of the slices.
        known: (N,) what `read_groups` gave.
        groups_name: The file of it, for the words.
        context: Neighbours on each side that the model will see; above 0 the images tell volumes of one group apart.
    """
    groups, volumes, origin = _known_or_found_groups(thumbnails, opened, known, groups_name, context)
    equal = find_equal(thumbnails, groups)
    if not equal:
        return groups, volumes, origin
    places = [(one.name, index) for one in opened for index in range(len(one))]
    first, second = (f"slice {index} of {name}" for name, index in (places[row] for row in equal[0]))
    joined = join_groups(groups, equal)
    note = (
        f"{plural(len(equal), 'pair')} of slices in different groups show the same, first {first} and {second}, so "
        f"their groups are one: {plural(int(joined.max()) + 1, 'group')}."
    )
    return joined, volumes, f"{origin} {note}"


def _known_or_found_groups(
    thumbnails: _Floats, opened: Sequence[SliceSet], known: NDArray[Any] | None, groups_name: str, context: int
) -> tuple[_Ints, _Ints, str]:
    sets = np.repeat(np.arange(len(opened)), [len(one) for one in opened])
    are_volumes = all(one.is_volume for one in opened)
    if known is not None:
        groups = np.unique(known, return_inverse=True)[1].astype(np.int64)
        volumes = sets if are_volumes else volume_numbers(sets, groups, thumbnails if context else None)
        return groups, volumes, f"{len(sets)} slices in {plural(groups.max() + 1, 'group')}, from {groups_name}."
    if are_volumes:
        origin = f"{len(sets)} slices in {len(opened)} groups, {OF_VOLUMES}."
        return sets, sets, f"{origin} Where one patient has several, name the patients in {groups_name}."
    found = find_groups(thumbnails, sets)
    return found.groups, found.volumes, found.description


def read_groups(path: Path, opened: Sequence[SliceSet]) -> NDArray[Any] | None:
    """The groups file, (N,) over all slices; for volumes it may hold one entry a volume, in order of their names.

    Args:
        path: A `.npy` file of integers, finite numbers or strings; None is returned where there is none.
        opened: The sets whose slices it groups.

    Raises:
        InputError: If it is damaged, or does not name one group for each slice or volume.
    """
    if not is_there(path):
        return None
    num_slices = sum(map(len, opened))
    try:
        groups = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise InputError(
            f"{path} is no complete .npy file of plain numbers or texts; save the {num_slices} groups with numpy.save."
        ) from None
    if all(one.is_volume for one in opened) and groups.shape != (num_slices,):
        if groups.shape != (len(opened),):
            raise InputError(
                f"{path.name}: the groups have shape {groups.shape}; expected one integer or string for each of the "
                f"{len(opened)} volumes in order of their names, or for each of the {num_slices} slices."
            )
        check_groups_array(groups, len(opened), path.name)
        return np.repeat(groups, [len(one) for one in opened])
    check_groups_array(groups, num_slices, path.name)
    return np.asarray(groups)
