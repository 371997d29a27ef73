"""Volumes with an affine: axial slices of any voxel grid, and masks written back to it as NIfTI.

Slices are cut across the voxel axis nearest to the patient's long axis and turned by flips and a transposition alone:
nothing is resampled, so a mask goes back to the very voxels that its slices came from.
"""

import gzip
import itertools
import math
import mmap
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from matchai.system import InputError, format_size, need, write_whole
from matchai.volumes.volume import STEPS, format_shape, release_pages

SAME = 0.1
"""Voxels by which the corners of two grids may differ: less than anyone can draw."""

_LEVEL = 4  # of gzip: above it a mask's file shrinks by few per cent, for twice the time
_PIECE = 16 * 2**20  # bytes that are turned and written at once


@dataclass(eq=False)
class FileVoxels:
    """A 3-D array in a file, the first axis running fastest; opened at first use, from any thread.

    It is mapped again for each piece that is read, so that a large file does not count as this process's memory.

    Args:
        provide: Gives the open file; called once, and again after `close`.
        shape: Voxels along each axis.
        dtype: Of the numbers, in the file's byte order.
        offset: Where they begin, in bytes.
    """

    provide: Callable[[], BinaryIO]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int = 0
    _file: BinaryIO | None = field(default=None, init=False)
    _opening: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __getitem__(self, key: Any) -> NDArray[Any]:
        with self._opening:
            if self._file is None:
                self._file = self.provide()
            mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        whole: NDArray[Any] = np.ndarray(self.shape, self.dtype, mapped, self.offset, order="F")
        return np.array(whole[key])

    def close(self) -> None:
        """Closes the file; a temporary one is gone with it."""
        with self._opening:
            if self._file is not None:
                self._file.close()
                self._file = None


@dataclass(eq=False)
class GridVolume:
    """Voxels on a grid as a `matchai.volumes.volume.Volume`: slice 0 is the lowest.

    Args:
        path: The file or folder that the user named.
        name: For the files that are made of it.
        voxels: (I, J, K) numbers as stored; sliced one plane at a time.
        affine: (4, 4), from voxel indices to millimetres toward the patient's right, front and top (RAS+).
        orientation: Toward which sides rows and columns of the slices shall run, such as "LP".
        scale: Slope and intercept that the file itself names.
        rescale: Slope and intercept that make HU of the scaled numbers.
        header: A nibabel NIfTI header that written files take over: codes, units, the affine to its last bit.
            Without it they have the affine alone.
        unit: Millimetres in the affine's unit of length.
        notes: What the user should know, in sentences that need not name the volume.

    Raises:
        InputError: If the affine cannot place voxels, or nibabel is missing.
    """

    path: Path
    name: str
    voxels: NDArray[Any] | FileVoxels
    affine: NDArray[np.float64]
    orientation: str = "LP"
    _: KW_ONLY
    scale: tuple[float, float] = (1.0, 0.0)
    rescale: tuple[float, float] = (1.0, 0.0)
    header: Any = None
    unit: float = 1.0
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        nibabel = need("nibabel", "medical", f"Reading {self.path}")
        self.affine = np.asarray(self.affine, dtype=np.float64)
        self.is_volume = True
        lengths = np.linalg.norm(self.affine[:3, :3], axis=0)
        if not np.isfinite(self.affine).all():
            raise InputError(f"{self.path}: its affine holds NaN or infinity, so nobody knows where its voxels lie.")
        if not lengths.all() or abs(np.linalg.det(self.affine[:3, :3] / lengths)) < 1e-3:
            raise InputError(
                f"{self.path}: its affine is singular (voxel axes of {format_shape(lengths, '.4g')} mm that do not "
                "span space), so nobody knows where its voxels lie; export it again, or write a true affine into its "
                "header."
            )
        self._axes, self._flips = _axes_and_flips(nibabel.io_orientation(self.affine), self.orientation)
        depth, rows, columns = (self.voxels.shape[axis] for axis in self._axes)
        self.shape: tuple[int, int, int] = depth, rows, columns
        mm = [float(lengths[axis]) * self.unit for axis in self._axes]
        self.spacing: tuple[float, float, float] | None = mm[0], mm[1], mm[2]
        self.voxel_ml: float | None = abs(float(np.linalg.det(self.affine[:3, :3]))) * self.unit**3 / 1000
        self.notes = [*self.notes, *self._geometry_notes(lengths)]

    @property
    def placement(self) -> NDArray[np.float64]:
        """(4, 4) affine, mm, from (slice, row, column) of `read` to the patient's right, front and top."""
        placed = np.eye(4)
        placed[:3, 3] = self.affine[:3, 3]
        for to, (axis, is_flipped) in enumerate(zip(self._axes, self._flips, strict=True)):
            step = self.affine[:3, axis]
            placed[:3, to] = -step if is_flipped else step
            if is_flipped:
                placed[:3, 3] += (self.voxels.shape[axis] - 1) * step
        placed[:3] *= self.unit
        return placed

    def read(self, index: int) -> NDArray[np.float32]:
        """See `matchai.volumes.volume.Volume`."""
        values = self.read_labels(index)
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, and is refused as such
            if self.rescale != (1, 0):
                slope, intercept = self.rescale
                values = values * np.float64(slope) + intercept
            return np.ascontiguousarray(values, dtype=np.float32)

    def read_labels(self, index: int) -> NDArray[Any]:
        """Slice `index`, (H, W) numbers as the file means them: its own scale, no `rescale`.

        Returns:
            The stored dtype in native byte order, or float64 where the file has a scale.
        """
        axis = self._axes[0]
        place = range(self.shape[0])[index]  # an IndexError for what is not there
        place = self.shape[0] - 1 - place if self._flips[0] else place
        plane = np.asarray(self.voxels[(slice(None),) * axis + (place,)])
        if self._axes[1] > self._axes[2]:
            plane = plane.T
        plane = np.flip(plane, tuple(to for to in (0, 1) if self._flips[to + 1]))
        if self.scale != (1, 0):
            slope, intercept = self.scale
            return np.asarray(plane.astype(np.float64) * slope + intercept)
        return np.asarray(plane.astype(plane.dtype.newbyteorder("=")))

    def save_mask(self, folder: Path, mask: NDArray[np.uint8], file_labels: Sequence[int]) -> Path:
        """See `matchai.volumes.volume.Volume`: `NAME_mask.nii.gz`, uint8, numbers by `file_labels`."""
        numbers = np.array(file_labels, dtype=np.uint8)
        return self._save(folder / f"{self.name}_mask.nii.gz", mask, np.uint8, 1, numbers)

    def save_map(self, folder: Path, values: NDArray[np.uint16], what: str) -> Path:
        """See `matchai.volumes.volume.Volume`: `NAME_WHAT.nii.gz`, uint16 with the slope 1/65535."""
        return self._save(folder / f"{self.name}_{what}.nii.gz", values, np.uint16, 1 / STEPS, None)

    def close(self) -> None:
        """Frees the file behind the voxels; reading again opens it again."""
        if isinstance(self.voxels, FileVoxels):
            self.voxels.close()

    def _save(
        self, path: Path, values: NDArray[Any], kind: type[np.generic], slope: float, numbers: NDArray[np.uint8] | None
    ) -> Path:
        assert values.shape == self.shape, f"{values.shape} is not the volume's shape {self.shape}"
        header = self._header_of(np.dtype(kind), slope)
        turned = np.flip(values, tuple(to for to in range(3) if self._flips[to])).transpose(np.argsort(self._axes))
        dtype = np.dtype(kind).newbyteorder(header.endianness)

        def write(file: BinaryIO) -> None:
            # neither a name nor a time in it: the same mask makes the same bytes
            with closing(gzip.GzipFile("", "wb", _LEVEL, file, mtime=0)) as packed:
                header.write_to(packed)
                packed.write(b"\0" * (header.get_data_offset() - packed.tell()))
                for piece in _pieces(turned):
                    named = piece if numbers is None else numbers[piece]
                    packed.write(named.astype(dtype).tobytes(order="F"))
                    release_pages(values)

        write_whole(path, write)
        return path

    def _header_of(self, dtype: np.dtype[Any], slope: float) -> Any:
        nifti1 = need("nibabel.nifti1", "medical", "Writing NIfTI files")
        if self.header is None:
            header = nifti1.Nifti1Header()
            header.set_data_shape(self.voxels.shape)
            header.set_xyzt_units("mm")
            header.set_sform(self.affine, code="scanner")
            # a qform cannot hold the shear of a tilted gantry; ITK, which takes no other grid than one at right angles,
            # then falls back on it, and finds the grid that it makes of the series itself
            header.set_qform(_upright(self.affine), code="scanner")
        else:
            header = self.header.copy()
            header.extensions.clear()  # they tell of the image, and may name the patient
            for field in ("cal_max", "cal_min", "glmax", "glmin", "intent_p1", "intent_p2", "intent_p3", "intent_code"):
                if field in header:
                    header[field] = 0
            for field in ("descrip", "aux_file", "db_name", "intent_name"):
                if field in header:
                    header[field] = b""
        header.set_data_dtype(dtype)
        header.set_slope_inter(slope, 0)
        header.set_data_offset(0)  # "as soon as possible": nibabel fills in the least
        return header

    def _geometry_notes(self, lengths: NDArray[np.float64]) -> Iterator[str]:
        axis = self.affine[:3, self._axes[0]] / lengths[self._axes[0]]
        tilt = math.degrees(math.acos(min(1.0, abs(float(axis[2])))))
        if tilt > 15:
            yield (
                f"The voxel axis nearest to the patient's long axis is {tilt:.0f} degrees off it; slices "
                "are cut along the voxels, not straight across the patient."
            )
        assert self.spacing is not None
        _, rows, columns = self.spacing
        if max(rows, columns) > 1.5 * min(rows, columns):
            yield (
                f"The pixels of its axial slices are {rows:.2f} x {columns:.2f} mm, as it was not scanned "
                "in axial slices; a model trained on square pixels may do badly."
            )


def scratch_file(path: Path, num_bytes: int, scratch: Path | None, write: Callable[[BinaryIO], None]) -> BinaryIO:
    """An open file without a name that holds the unpacked voxels of `path`; gone when it is closed.

    Args:
        path: What is unpacked.
        num_bytes: How many they are.
        scratch: The folder (default: the system's for temporary files).
        write: Writes them to the file.

    Raises:
        InputError: If there is too little room for them, or the file cannot be made or written.
    """
    folder = scratch or Path(tempfile.gettempdir())
    try:
        free = shutil.disk_usage(folder).free
        if free < num_bytes:
            raise InputError(
                f"{path} unpacks to {format_size(num_bytes)}, but {folder} has only {format_size(free)} free; "
                "free some there."
            )
        with ExitStack() as on_failure:
            file = on_failure.enter_context(tempfile.TemporaryFile(dir=folder))
            write(file)
            file.flush()
            on_failure.pop_all()
            return file
    except OSError as error:
        raise InputError(f"{path} cannot be unpacked to {folder}: {error.strerror or error}.") from None


def check_same_geometry(image: GridVolume, mask: GridVolume) -> None:
    """Refuses a mask that does not lie on its image.

    What counts is where slices, rows and columns lie as they are read: in which order a file stores its voxels is its
    own business.

    Args:
        image: The image.
        mask: Its mask, opened with the same orientation.

    Raises:
        InputError: If shapes differ, or a corner lies more than `SAME` voxels elsewhere.
    """
    if image.shape != mask.shape:
        raise InputError(
            f"{mask.path} has {format_shape(mask.shape)} voxels (slices, rows, columns), but its image {image.path} "
            f"has {format_shape(image.shape)}; a mask must lie on its image voxel by voxel: resample it to the image."
        )
    off = displacement(image.placement, mask.placement, image.shape)
    if off > SAME:
        raise InputError(
            f"{mask.path} does not lie on its image {image.path}: by their affines a corner is {off:.3g} voxels away, "
            f"where {SAME:g} are allowed; resample the mask to the image, or, if it was drawn on this very image, "
            "give it the image's affine."
        )


def displacement(affine: NDArray[np.float64], other: NDArray[np.float64], shape: Sequence[int]) -> float:
    """How far two affines (4, 4) place the corners of a grid of `shape` apart, in voxels along the worst axis."""
    corners = np.array(list(itertools.product(*((0, length - 1) for length in shape), (1,))), dtype=np.float64).T
    return float(np.abs((np.linalg.solve(affine, other @ corners) - corners)[:3]).max())


def _axes_and_flips(
    axis_codes: NDArray[np.float64], orientation: str
) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """Which voxel axis makes slices, rows and columns, and which of the three run against it."""
    letters = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1)}
    wanted = [(2, 1), letters[orientation[0]], letters[orientation[1]]]
    axes = [int(np.flatnonzero(axis_codes[:, 0] == world)[0]) for world, _ in wanted]
    flips = [bool(axis_codes[axis, 1] != sign) for axis, (_, sign) in zip(axes, wanted, strict=True)]
    return (axes[0], axes[1], axes[2]), (flips[0], flips[1], flips[2])


def _upright(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """The affine with its third axis turned, if need be, to stand at right angles on the others; no length changes."""
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    normal *= np.sign(normal @ affine[:3, 2]) * np.linalg.norm(affine[:3, 2]) / np.linalg.norm(normal)
    turned = affine.copy()
    turned[:3, 2] = normal
    return turned


def _pieces(turned: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """(I, J, some) at a time, so that a large volume is never in memory whole."""
    step = max(1, _PIECE // max(1, turned[:, :, 0].nbytes))
    for begin in range(0, turned.shape[2], step):
        yield turned[:, :, begin : begin + step]
