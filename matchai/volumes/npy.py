"""`.npy` files: opened memory-mapped, never unpickled, refused in a sentence where they cannot be used."""

import difflib
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import read_array_header_1_0, read_array_header_2_0, read_magic
from numpy.typing import NDArray

from matchai.system import InputError, is_there


def open_array(path: Path, what: str) -> NDArray[Any]:
    """Memory-maps a `.npy` file; never unpickles.

    Args:
        path: The file.
        what: What it holds, in the plural, for messages.

    Raises:
        InputError: If it is missing, no `.npy` file, incomplete, empty or holds anything but real numbers.
    """
    if not is_there(path):
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.npy")], 1, 0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(
            f"{path}: the {what} are missing{hint or '.'} Set --images-name and --masks-name for files of other names."
        )
    if not path.is_file():
        raise InputError(f"{path} is {'a folder' if path.is_dir() else 'a pipe or device'}, not a .npy file of {what}.")
    try:
        with path.open("rb") as file:
            head = file.read(64)
            file.seek(0)
            if not head.startswith(b"\x93NUMPY"):
                raise InputError(f"{path} is {_sniff(head)}, not a .npy array; {what} must be saved with numpy.save.")
            read_header = read_array_header_1_0 if read_magic(file) == (1, 0) else read_array_header_2_0
            shape, _, dtype = read_header(file)
            present = path.stat().st_size - file.tell()
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: the {what} cannot be read ({error.strerror}); check its permissions.") from None
    except (ValueError, SyntaxError, TypeError, EOFError):
        raise InputError(f"{path} has a damaged .npy header; save or download the {what} again.") from None
    if dtype.hasobject:
        raise InputError(f"{path} stores Python objects, which can run code and are never loaded; save plain numbers.")
    if dtype.kind not in "fiub" or dtype.names:
        raise InputError(f"{path} holds {dtype}, but {what} must be real numbers.")
    expected = math.prod(shape) * dtype.itemsize
    if present < expected:
        raise InputError(
            f"{path} is incomplete: {present:,} of {expected:,} bytes are there; copy or download it again."
        )
    if not expected:
        raise InputError(f"{path} is empty: its shape is {shape}.")
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def axes_note(array: NDArray[Any]) -> str | None:
    """A sentence for an array of three axes whose slices seem to lie along the last; None for any other."""
    first, second, last = array.shape if array.ndim == 3 else (0, 1, 0)
    is_last_least = last < 0.6 * min(first, second) and last < 128  # as of slices that lie along the last axis
    if array.ndim != 3 or not (first == second != last or is_last_least):
        return None
    return (
        f"Its shape {array.shape} is read as {first} slices of {second}x{last} pixels; if the slices lie along the "
        "last axis, save numpy.moveaxis(array, -1, 0) instead."
    )


def _sniff(head: bytes) -> str:
    kinds = (
        (b"PK", "an .npz or zip archive"),
        (b"\x80", "a Python pickle, which can run code and is never loaded"),
        (b"version https://git-lfs", "a Git-LFS pointer (run `git lfs pull`)"),
        (b"<", "a web page, as after a download without login"),
        (b"\x1f\x8b", "a gzip file (unpack it first)"),
        (b"\x89HDF", "an HDF5 file"),
    )
    if not head:
        return "an empty file"
    return next((kind for start, kind in kinds if head.lstrip().startswith(start)), "something else")
