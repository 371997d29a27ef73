"""NIfTI files: opened, checked, and read without being held in memory."""

import contextlib
import gzip
import logging
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from matchai.system import InputError, is_there, need
from matchai.volumes.grid import FileVoxels, GridVolume, displacement, scratch_file
from matchai.volumes.kinds import NIFTI, why_unread
from matchai.volumes.volume import format_shape

MAX_OFF = 0.1
"""Voxels by which two ways to place a volume may differ: a tenth of one is less than anyone can draw."""

SPACING_OFF = 0.01
"""Share by which two spacings may differ."""

_GZIP = b"\x1f\x8b"
_PIECE = 2**20


def stem(path: Path) -> str:
    """A file's name without the NIfTI suffix, in whatever case."""
    return next((path.name[: -len(end)] for end in NIFTI if path.name.lower().endswith(end)), path.stem)


def open_nifti(
    path: Path,
    orientation: str = "LP",
    rescale: tuple[float, float] = (1.0, 0.0),
    scratch: Path | None = None,
    affine: str = "auto",
) -> GridVolume:
    """Opens a NIfTI-1 or NIfTI-2 file of one volume, packed by gzip or not.

    Args:
        path: The file.
        orientation: Toward which sides rows and columns of the slices shall run.
        rescale: Slope and intercept that make HU of what the file's own scale gives.
        scratch: Folder for the unpacked voxels of a packed file, which are written at the first read and gone with
            `close` (default: the system's folder for temporary files).
        affine: Which of a header's two affines places the voxels: `sform`, `qform` (without one, the directions of the
            sform with the spacing of pixdim), or `auto`, the sform where there is one and pixdim does not deny it.

    Returns:
        The volume. A packed file's damage may show only when its first slice is read, as an `InputError` too.

    Raises:
        InputError: If it is missing, damaged, no NIfTI file, or no volume of real numbers with a place in space.
    """
    nibabel = need("nibabel", "medical", f"Reading {path}")
    if not is_there(path):
        raise InputError(f"{path} does not exist.")
    if not path.is_file():
        raise InputError(f"{path} is {'a folder' if path.is_dir() else 'a pipe or device'}, not a NIfTI file.")
    try:
        header, pixdim, is_packed = _read_header(nibabel, path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from None
    shape, dtype, offset = _shape_of(header, path), _dtype_of(header, path), _offset_of(header, path)
    num_bytes = offset + math.prod(shape) * dtype.itemsize
    size = path.stat().st_size
    if not is_packed and size < num_bytes:
        raise InputError(
            f"{path} is incomplete: {size} of the {num_bytes} bytes that its header promises are there; copy it again."
        )
    scale = _scale_of(nibabel, header, path)
    placed, affine_notes = _affine_of(nibabel, header, pixdim, path, affine)

    def provide() -> BinaryIO:
        return _unpack(path, num_bytes, scratch) if is_packed else path.open("rb")

    return GridVolume(
        path,
        stem(path),
        FileVoxels(provide, shape, dtype, offset),
        placed,
        orientation,
        scale=scale,
        rescale=rescale,
        header=header,
        unit=_unit_of(header)[1],
        notes=[*_notes_of(header), *affine_notes],
    )


def _shape_of(header: Any, path: Path) -> tuple[int, int, int]:
    shape = header.get_data_shape()
    if len(shape) < 3 or min(shape) < 1 or math.prod(shape[3:]) != 1:
        raise InputError(
            f"{path} has the shape {format_shape(shape)}; a volume has three axes"
            + (": save one of its volumes to a file of its own." if len(shape) > 3 else ", and voxels along each.")
        )
    return shape[0], shape[1], shape[2]


def _offset_of(header: Any, path: Path) -> int:
    offset: int = header.get_data_offset()
    if offset < header.sizeof_hdr:
        raise InputError(
            f"{path} says that its voxels begin at byte {offset} (vox_offset), within its own header of "
            f"{header.sizeof_hdr} bytes; write the file again, for example with nibabel."
        )
    return offset


def _affine_of(
    nibabel: Any, header: Any, pixdim: NDArray[np.float64], path: Path, choice: str
) -> tuple[NDArray[np.float64], list[str]]:
    """The affine that places the voxels, and what should be known of the choice.

    Raises:
        InputError: If the only affine is none, or the sform's spacing is not pixdim's and nobody says which is right.
    """
    qform, problem = None, None
    try:
        qform = header.get_qform(coded=True)[0]
    except (nibabel.spatialimages.HeaderDataError, ValueError) as error:
        problem = error
    sform = header.get_sform(coded=True)[0]
    if (choice == "qform" or sform is None) and not (np.isfinite(pixdim) & (pixdim > 0)).all():
        raise InputError(
            f"{path} tells no spacing (pixdim is {format_shape(pixdim, 'g')}); write the true one, or a true affine, "
            "into its header."
        )
    is_placing = sform is not None and np.isfinite(sform).all() and np.linalg.det(sform[:3, :3]) != 0
    if choice == "auto" and sform is not None and not is_placing and qform is not None and np.isfinite(qform).all():
        raise InputError(
            f"{path} has an sform that cannot place voxels (it is singular, or not finite), but a good qform; take "
            "that by --nifti-affine qform, or write a true sform."
        )
    if choice == "qform" or sform is None:
        if problem is not None:
            raise InputError(f"{path} has a qform that is no rotation ({problem}); write a true affine into it.")
        if qform is None and sform is not None:
            qform = sform @ np.diag([*(pixdim / np.linalg.norm(sform[:3, :3], axis=0)), 1])
        return (header.get_base_affine() if qform is None else qform), []
    if choice == "auto":
        _check_spacing(sform, pixdim, path)
    if qform is None or not np.isfinite(qform).all() or not is_placing:
        return sform, []
    off = displacement(sform, qform, header.get_data_shape()[:3])
    if off <= MAX_OFF:
        return sform, []
    return sform, [
        f"Its sform and its qform place voxels up to {off:.3g} voxels apart; the sform is taken "
        "(--nifti-affine qform takes the other)."
    ]


def _check_spacing(sform: NDArray[np.float64], pixdim: NDArray[np.float64], path: Path) -> None:
    """Refuses an sform with another spacing than pixdim; of a sheared one pixdim may tell the distance of planes."""
    lengths = np.linalg.norm(sform[:3, :3], axis=0)
    if not np.isfinite(lengths).all() or not lengths.all():
        return  # told with the affine
    volume = abs(np.linalg.det(sform[:3, :3]))
    areas = np.array([np.linalg.norm(np.cross(sform[:3, a], sform[:3, b])) for a, b in ((1, 2), (0, 2), (0, 1))])
    heights = volume / np.maximum(areas, np.finfo(float).tiny)
    is_told = np.isfinite(pixdim) & (pixdim > 0)
    is_alike = np.isclose(pixdim, lengths, rtol=SPACING_OFF) | np.isclose(pixdim, heights, rtol=SPACING_OFF)
    if (is_told & ~is_alike).any():
        raise InputError(
            f"{path}: voxels measure {format_shape(lengths, '.4g')} by its sform, but {format_shape(pixdim, '.4g')} by "
            "its qform and pixdim; say which is right with --nifti-affine sform or --nifti-affine qform."
        )


def _unit_of(header: Any) -> tuple[str, float]:
    """The unit of length, and how many mm it is."""
    return {1: ("metre", 1000.0), 3: ("micrometre", 0.001)}.get(int(header["xyzt_units"]) % 8, ("mm", 1.0))


def _notes_of(header: Any) -> list[str]:
    notes = []
    if not header["sform_code"] and not header["qform_code"]:
        notes.append(
            "It has no orientation (sform and qform codes are 0); it is taken as nibabel takes it: the first "
            "axis runs to the patient's left, the second to the front, the third to the head. Check that its pictures "
            "are upright."
        )
    name, unit = _unit_of(header)
    if unit != 1:
        notes.append(f"It says that its unit of length is the {name}; spacing and volumes are told in mm.")
    return notes


def _read_header(nibabel: Any, path: Path) -> tuple[Any, NDArray[np.float64], bool]:
    """The header, the spacing as it stands in it, and whether the file is packed by gzip, whatever its name says."""
    with path.open("rb") as plain:
        is_packed = plain.read(2) == _GZIP
        plain.seek(0)
        file: Any = gzip.GzipFile(fileobj=plain) if is_packed else plain
        try:
            start = file.read(540)
            file.seek(0)
            for kind in (nibabel.Nifti1Header, nibabel.Nifti2Header):
                if kind.may_contain_header(start):
                    raw = kind(start[: kind.sizeof_hdr], check=False)
                    if raw["magic"].item() == kind.pair_magic:
                        pair = why_unread(path.with_suffix(".hdr"))
                        raise InputError(f"{path} is the header of a .hdr/.img pair: {pair}.")
                    with _silence("nibabel.global"):  # what it mends in a header it tells without the file's name
                        # nibabel mends a pixdim of 0, which is not told, to 1
                        pixdim = np.abs(raw["pixdim"][1:4]).astype(np.float64)
                        return kind.from_fileobj(file), pixdim, is_packed
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise _damaged(path, error) from None
        except (nibabel.spatialimages.HeaderDataError, ValueError, KeyError, OverflowError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} has a NIfTI header that makes no sense: {error}.") from None
    found = "is empty" if not start else f"begins with {start[:12]!r}"
    raise InputError(f"{path} is no NIfTI file: it {found}; was it downloaded whole?")


@contextlib.contextmanager
def _silence(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled


def _dtype_of(header: Any, path: Path) -> np.dtype[Any]:
    dtype: np.dtype[Any] = header.get_data_dtype()
    if dtype.kind not in "iuf":
        what = "complex numbers" if dtype.kind == "c" else "colours (RGB)" if dtype.names else f"{dtype}"
        raise InputError(f"{path} holds {what}; a CT volume, or a mask, holds one real number a voxel.")
    return dtype


def _scale_of(nibabel: Any, header: Any, path: Path) -> tuple[float, float]:
    """Slope and intercept; 1 and 0 where the file names none."""
    try:
        slope, intercept = header.get_slope_inter()
    except nibabel.spatialimages.HeaderDataError:
        raise InputError(
            f"{path} has the scale slope {header['scl_slope']} but the intercept {header['scl_inter']}; "
            "write a finite scl_inter into its header."
        ) from None
    return (1.0, 0.0) if slope is None else (slope, intercept)


def _unpack(path: Path, num_bytes: int, scratch: Path | None) -> BinaryIO:
    """Unpacks the first `num_bytes` to a file without a name, and checks the rest."""

    def write(file: BinaryIO) -> None:
        missing = num_bytes
        try:
            with gzip.open(path) as packed:
                while piece := packed.read(_PIECE):  # to its end, where the checksum stands
                    file.write(piece[:missing])
                    missing -= min(missing, len(piece))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise _damaged(path, error) from None
        if missing:
            raise InputError(
                f"{path} is incomplete: unpacked it has {num_bytes - missing} of the {num_bytes} bytes that its header "
                "promises; copy it again."
            )

    return scratch_file(path, num_bytes, scratch, write)


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} is damaged or incomplete: {error}; copy it again.")
