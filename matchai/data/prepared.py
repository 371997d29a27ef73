"""Prepared slices: checked, windowed, resized once, kept in a memory-mapped cache that is verified before every use."""

import hashlib
import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from matchai.data.augmentation import Augmentation
from matchai.data.context import neighbours
from matchai.data.digests import fingerprint
from matchai.data.inspection import describe_oddities, inspect_slice, refuse_unfit
from matchai.data.slice_set import SliceSet
from matchai.settings import InputSettings
from matchai.system import InputError, format_size, preparing_threads, sync_folder, write_whole
from matchai.volumes import replace_padding

FORMAT = 2  # part of the cache's key: raised whenever the preparation changes
STEPS = 65535  # uint16; over a window of 2000 HU a step is 0.03 HU and rounding 0.015, against CT noise of 10 to 30 HU
THUMBNAIL = 64

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Slices:
    """All slices of a data set at training size, memory-mapped.

    Attributes:
        images: (N, S, S) uint16; 0 to 65535 spans `hu_window`.
        targets: (N, S, S) uint8 class indices.
        thumbnails: (N, 64, 64) float32 in 0..1.
        sums: (N, 2) uint64, each slice's sum and sum of squares over `images`.
        pixels: (N, C) int64, each slice's pixels of each class at training size.
        sets: (N,) int64, the array file or volume each slice comes from.
        hu_window: HU at 0 and at 65535.
        notes: Sentences on what was odd and how it was settled.
    """

    images: NDArray[np.uint16]
    targets: NDArray[np.uint8]
    thumbnails: NDArray[np.float32]
    sums: NDArray[np.uint64]
    pixels: NDArray[np.int64]
    sets: NDArray[np.int64]
    hu_window: tuple[float, float]
    notes: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def mean_std(self, indices: Sequence[int]) -> tuple[float, float]:
        """Mean and standard deviation over the pixels of some slices, in units of the window (0 to 1); exact sums."""
        count = len(indices) * self.images[0].size
        total, squares = (sum(int(value) for value in self.sums[indices, k]) for k in (0, 1))
        mean = total / count
        variance = max(squares / count - mean * mean, 0.0)
        return mean / STEPS, float(np.sqrt(variance)) / STEPS


class SliceDataset(Dataset[tuple[Tensor, Tensor, int]]):
    """Standardised images and targets of some slices.

    An item is image (2 · context + 1, S, S) float32, the slice between its neighbours, target (S, S) uint8, and the
    position of the draw in its epoch. Augmented items are asked for by a `matchai.sampling.Draw`, whose epoch and
    position key the augmentation.

    Args:
        slices: All slices.
        indices: Which of them this data set holds, in order.
        mean: Subtracted from the windowed image (0 to 1).
        std: Divides the difference.
        augmentation: For training, of as many channels as an item's image; None for validation.
        volumes: (N,) number of the volume of each of all slices, see `matchai.data.context.neighbours`.
        context: Neighbours on each side; above 0 it needs `volumes`.
    """

    def __init__(
        self,
        slices: Slices,
        indices: Sequence[int],
        mean: float,
        std: float,
        augmentation: Augmentation | None = None,
        *,
        volumes: NDArray[np.int64] | None = None,
        context: int = 0,
    ) -> None:
        self.slices, self.indices, self.mean, self.std = slices, list(indices), mean, std
        self.augmentation = augmentation
        self.channels = [[index] if volumes is None else neighbours(volumes, index, context) for index in self.indices]
        assert volumes is not None or context == 0, "context needs to know the volumes"

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, draw: int) -> tuple[Tensor, Tensor, int]:
        index = self.indices[draw]
        image = self.slices.images[self.channels[draw]].astype(np.float32) * np.float32(1 / STEPS)
        target = np.array(self.slices.targets[index])
        position = getattr(draw, "position", int(draw))
        if self.augmentation:
            image, target = self.augmentation(image, target, draw.epoch, position)  # type: ignore[attr-defined]
        image = (image - np.float32(self.mean)) / np.float32(self.std + 1e-8)
        return torch.from_numpy(image), torch.from_numpy(np.ascontiguousarray(target)), position


def prepare(
    sets: Sequence[SliceSet],
    digests: dict[str, str],
    cache: Path,
    settings: InputSettings,
    progress: Progress | None = None,
) -> Slices:
    """Opens the cache entry of these slices and settings, or checks every slice and makes it.

    Volumes are read one after another, and closed as soon as their last slice is prepared.

    Args:
        sets: Where the slices lie.
        digests: The `fingerprint` of their files.
        cache: Folder of cache entries; an entry that is damaged is made again.
        settings: Those that the sets were opened with; they say classes, window and size.
        progress: Told (slices done, slices in all).

    Raises:
        InputError: With every problem found in the slices, or if the cache cannot be written.
    """
    folder = cache / _key_of(sets, digests, settings)
    if (found := _open(folder, settings.hu_window)) is not None:
        return found
    need = sum(map(len, sets)) * bytes_per_slice(settings.image_size)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache).free
        if free < need * 1.05:
            raise InputError(
                f"The prepared slices need {format_size(need * 1.05)}, but {format_size(free)} are free in {cache}; "
                "make room, or name another folder with --cache."
            )
        with tempfile.TemporaryDirectory(dir=cache, prefix=".making-") as name:
            beside = Path(name) / "entry"
            beside.mkdir()
            _make(sets, beside, settings, progress)
            if folder.exists():  # damaged: what stands there failed its check
                folder.rename(Path(name) / "damaged")
            beside.rename(folder)
        sync_folder(cache)
    except OSError as error:
        raise InputError(
            f"The cache folder {cache} cannot be written ({error.strerror or error}); name another with --cache."
        ) from None
    made = _open(folder, settings.hu_window)
    assert made is not None, "a cache entry was changed while it was made"
    return made


def _key_of(sets: Sequence[SliceSet], digests: dict[str, str], settings: InputSettings) -> str:
    """A hash of all that decides what an entry holds; settings of how files are read count where they are not usual."""
    defaults = {"orientation": "LP", "rescale": (1, 0), "label_map": [], "nifti_affine": "auto"}
    reading = {"orientation": sets[0].orientation, "rescale": settings.rescale, "label_map": [*settings.label_map]}
    reading["nifti_affine"] = settings.nifti_affine
    parts = [FORMAT, sorted(digests.items()), [s.name for s in sets], settings.hu_window, settings.image_size]
    parts += [[*settings.class_names], settings.background_index]  # in their order, which says what a number means
    if changed := sorted((name, value) for name, value in reading.items() if value != defaults[name]):
        parts.append(changed)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


ARRAYS = ("images", "targets", "thumbnails", "sums", "pixels", "sets")


def _open(folder: Path, hu_window: tuple[float, float]) -> Slices | None:
    """The entry, or None where it is missing or any of its files is not as it was written."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        paths = [folder / f"{name}.npy" for name in ARRAYS]
        if fingerprint(paths) != meta["digests"]:
            return None
        arrays = {name: np.load(path, mmap_mode="r") for name, path in zip(ARRAYS, paths, strict=True)}
        return Slices(**arrays, hu_window=hu_window, notes=meta["notes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _make(sets: Sequence[SliceSet], folder: Path, settings: InputSettings, progress: Progress | None) -> None:
    num_slices, num_classes, image_size = sum(map(len, sets)), len(settings.class_names), settings.image_size
    shapes: dict[str, tuple[Any, tuple[int, ...]]] = {
        "images": (np.uint16, (image_size, image_size)),
        "targets": (np.uint8, (image_size, image_size)),
        "thumbnails": (np.float32, (THUMBNAIL, THUMBNAIL)),
        "sums": (np.uint64, (2,)),
        "pixels": (np.int64, (num_classes,)),
        "sets": (np.int64, ()),
    }
    out = {
        name: open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=(num_slices, *shape))
        for name, (dtype, shape) in shapes.items()
    }

    def prepare_slice(row: int, number: int, index: int) -> dict[str, Any]:
        image, target, found = inspect_slice(
            sets[number], index, num_classes, settings.background_index, settings.hu_window
        )
        if image is None:
            return found
        windowed = window(image, settings.hu_window)
        steps = quantise(resize(windowed, image_size))
        labels = cv2.resize(target, (image_size, image_size), interpolation=cv2.INTER_NEAREST_EXACT)
        wide = steps.astype(np.uint64)
        out["images"][row], out["targets"][row], out["sets"][row] = steps, labels, number
        out["thumbnails"][row] = resize(windowed, THUMBNAIL)
        out["sums"][row] = wide.sum(), (wide * wide).sum()
        out["pixels"][row] = np.bincount(labels.ravel(), minlength=num_classes)
        return found

    found = for_each_slice(sets, prepare_slice, progress)
    refuse_unfit(sets, found, settings.hu_window, settings.class_names, settings.background_index)
    for array in out.values():
        array.flush()
    digests = fingerprint([folder / f"{name}.npy" for name in ARRAYS])
    meta = {"notes": describe_oddities(sets, found, out["pixels"].sum(axis=0), settings), "digests": digests}
    write_whole(folder / "meta.json", json.dumps(meta))


def for_each_slice(
    sets: Sequence[SliceSet], work: Callable[[int, int, int], dict[str, Any]], progress: Progress | None
) -> list[dict[str, Any]]:
    """Calls `work` with the row, the set and the place in it of every slice, on all cores; closes each set after it."""
    places = [(number, index) for number, one in enumerate(sets) for index in range(len(one))]
    num_left = [len(one) for one in sets]
    counting = threading.Lock()

    def work_and_close(row: int) -> dict[str, Any]:
        number, index = places[row]
        found = work(row, number, index)
        with counting:
            num_left[number] -= 1
            is_last = not num_left[number]
        if is_last:  # a decompressed volume takes room on the disk
            sets[number].close()
        return found

    found = []
    try:
        with ThreadPoolExecutor(preparing_threads()) as pool:
            for done, one in enumerate(pool.map(work_and_close, range(len(places))), 1):
                found.append(one)
                if progress:
                    progress(done, len(places))
    finally:
        for one_set in sets:
            one_set.close()
    return found


def bytes_per_slice(image_size: int) -> int:
    """Bytes that a prepared slice takes in the cache: image, target and thumbnail."""
    return image_size**2 * 3 + THUMBNAIL**2 * 4


def window(image: NDArray[np.float32], hu_window: tuple[float, float]) -> NDArray[np.float32]:
    """Clips HU (..., H, W) to `hu_window` and maps it to 0..1, float32; padding becomes air."""
    low, high = hu_window
    image = replace_padding(image, hu_window)
    return np.asarray(np.clip((image - np.float32(low)) / np.float32(high - low), 0, 1))


def quantise(windowed: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Numbers (...) in 0..1 as prepared slices keep them, uint16: 1 becomes `STEPS`."""
    return np.rint(windowed * STEPS).astype(np.uint16)


def resize(image: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Resizes (H, W) to (size, size): area means when shrinking, which do not alias, else bilinear."""
    shrinks = size < min(image.shape)
    kind = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (size, size), interpolation=kind), np.float32)
