"""What a prediction is made on: axial slices in HU, and the way of a mask back to the input's own grid.

Every kind of input is a `Volume`: `.npy` arrays here, NIfTI files in `nifti`, DICOM series in `dicom`, pictures in
`pictures`.
"""

import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from matchai.system import InputError, write_whole
from matchai.volumes.npy import axes_note, open_array

STEPS = 65535
"""What stands for 1 in maps of numbers in 0..1."""

MIN_SIDE = 32
"""Pixels of height and of width that a slice needs."""

UPRIGHT = "PL"
"""As a viewer shows a slice: the patient's front at the top, the patient's left side at the right."""


class Volume(Protocol):
    """Slices of one input."""

    name: str
    """The input's name without its suffix, for the files that are made of it."""

    path: Path
    """The file or folder that the user named."""

    shape: tuple[int, int, int]
    """Slices, rows and columns (N, H, W), as `read` gives them."""

    orientation: str
    """Toward which sides of the patient rows and columns run, such as "LP" (`matchai.settings.config`)."""

    spacing: tuple[float, float, float] | None
    """Millimetres between neighbouring slices, rows and columns; None where unknown."""

    voxel_ml: float | None
    """Volume of a voxel in mL; None where unknown."""

    is_volume: bool
    """Whether the slices are known to be neighbours in order, of one volume."""

    notes: Sequence[str]
    """What the user should know of the input, in sentences."""

    def read(self, index: int) -> NDArray[np.float32]:
        """Slice `index`, (H, W) float32 in HU, native byte order; may be called from several threads at once."""

    def save_mask(self, folder: Path, mask: NDArray[np.uint8], file_labels: Sequence[int]) -> Path:
        """Writes a mask in the input's own shape and geometry, without loss.

        Args:
            folder: Where to; it exists.
            mask: (N, H, W) class indices, in the order and orientation of `read`; may be memory-mapped.
            file_labels: The number that stands for each class in formats that viewers open; `.npy` files keep the
                class indices.

        Returns:
            The file, or folder of files, named after the input.
        """

    def save_map(self, folder: Path, values: NDArray[np.uint16], what: str) -> Path:
        """Writes a map of numbers in 0..1, such as a probability, in the input's own shape and geometry.

        Args:
            folder: Where to; it exists.
            values: (N, H, W), 65535 standing for 1, in the order and orientation of `read`; may be memory-mapped.
            what: What it shows, part of the file's name.

        Returns:
            The file, or folder of files.
        """

    def close(self) -> None:
        """Gives up what was unpacked; a later `read` unpacks it again."""


def file_labels(num_classes: int, background_class: int) -> list[int]:
    """The number of each class in files for viewers: 0 for the background, the others from 1 in channel order.

    >>> file_labels(4, background_class=3)
    [1, 2, 3, 0]
    """
    others = iter(range(1, num_classes))
    return [0 if c == background_class else next(others) for c in range(num_classes)]


def check_size(path: Path, height: int, width: int) -> None:
    """Refuses slices that are too small for any network.

    Raises:
        InputError: If a side has fewer than `MIN_SIDE` pixels.
    """
    if min(height, width) < MIN_SIDE:
        raise InputError(
            f"{path} has slices of {height}x{width} pixels, but at least {MIN_SIDE}x{MIN_SIDE} are needed."
        )


def turn(image: NDArray[Any], orientation: str, wanted: str) -> NDArray[Any]:
    """Turns slices (..., H, W) from one orientation to another by flips and a transposition; a view, no copy.

    Args:
        image: Slices of any dtype.
        orientation: Toward which sides of the patient their rows and columns run, such as "LP".
        wanted: Toward which they shall run.

    >>> turn(np.array([[1, 2], [3, 4]]), "LP", "PL").tolist()
    [[1, 3], [2, 4]]
    """
    opposite = {"L": "R", "R": "L", "A": "P", "P": "A"}
    if wanted[0] in (orientation[1], opposite[orientation[1]]):
        image, orientation = image.swapaxes(-1, -2), orientation[::-1]
    for axis in (0, 1):
        if orientation[axis] != wanted[axis]:
            image = np.flip(image, axis - 2)
    return image


def rescaled(numbers: NDArray[Any], rescale: tuple[float, float]) -> NDArray[np.float32]:
    """Stored numbers as HU, by slope and intercept; a copy, float32 in native byte order."""
    slope, intercept = rescale
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, and is refused as such
        image = np.array(numbers, dtype=np.float32)
    return image if rescale == (1, 0) else image * np.float32(slope) + np.float32(intercept)


def format_shape(lengths: Iterable[float], spec: str = "") -> str:
    """Lengths in words, each by a format specification: `512 x 512`."""
    return " x ".join(f"{length:{spec}}" for length in lengths)


def release_pages(array: NDArray[Any]) -> None:
    """Gives the system back what was read of a memory-mapped array, which else counts as this process's memory.

    Does nothing for arrays in memory, nor where the system has no such call.
    """
    base: Any = array
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


@dataclass(eq=False)
class ArrayVolume:
    """A `.npy` array: (N, H, W), (N, H, W, 1), or a single slice (H, W)."""

    path: Path
    orientation: str
    rescale: tuple[float, float]
    array: NDArray[Any]
    spacing: tuple[float, float, float] | None = None
    voxel_ml: float | None = None
    is_volume: bool = False
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        array = self.array[None] if self.array.ndim == 2 else self.array
        self._slices = array[..., 0] if array.ndim == 4 else array
        length, height, width = self._slices.shape
        self.name = self.path.stem
        self.shape: tuple[int, int, int] = (length, height, width)

    def read(self, index: int) -> NDArray[np.float32]:
        """See `Volume`."""
        image = rescaled(self._slices[index], self.rescale)
        release_pages(self.array)
        return image

    def save_mask(self, folder: Path, mask: NDArray[np.uint8], file_labels: Sequence[int]) -> Path:
        """See `Volume`; uint8 class indices."""
        return self._save(folder / f"{self.name}_mask.npy", mask, np.uint8, 1)

    def save_map(self, folder: Path, values: NDArray[np.uint16], what: str) -> Path:
        """See `Volume`; float32, in which no two steps fall together."""
        return self._save(folder / f"{self.name}_{what}.npy", values, np.float32, 1 / STEPS)

    def close(self) -> None:
        """See `Volume`; nothing is unpacked."""

    def _save(self, path: Path, values: NDArray[Any], kind: type[np.generic], scale: float) -> Path:
        def write(file: BinaryIO) -> None:
            descr = np.lib.format.dtype_to_descr(np.dtype(kind))
            header = {"descr": descr, "fortran_order": False, "shape": self.array.shape}
            np.lib.format.write_array_header_1_0(file, header)
            for one in values:  # slice by slice, so that a large volume is never in memory whole
                file.write((one if scale == 1 else one * scale).astype(kind).tobytes())
                release_pages(values)

        write_whole(path, write)
        return path


def open_array_volume(path: Path, orientation: str, rescale: tuple[float, float]) -> ArrayVolume:
    """Opens a `.npy` file.

    Args:
        path: The file.
        orientation: How its slices lie.
        rescale: Slope and intercept that make HU of its numbers.

    Raises:
        InputError: If it is no array of slices.
    """
    array = open_array(path, "images")
    if array.ndim not in (2, 3) and not (array.ndim == 4 and array.shape[-1] == 1):
        raise InputError(
            f"{path} has shape {array.shape}, but images must be (N, H, W), (N, H, W, 1), or one slice (H, W)."
        )
    note = axes_note(array)
    return ArrayVolume(path, orientation, rescale, array, notes=[] if note is None else [note])
