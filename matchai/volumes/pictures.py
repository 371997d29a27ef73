"""PNG and TIFF pictures: grey slices whose numbers become HU, masks by their numbers, never by their colours."""

import contextlib
import re
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, TiffImagePlugin, UnidentifiedImageError

from matchai.system import InputError, is_there, list_folder, sync_file, sync_folder, walk_files
from matchai.volumes.kinds import LOSSY, PICTURES, TEXTS, VOLUMES, has_suffix
from matchai.volumes.volume import UPRIGHT, rescaled

MAX_SIDE = 8192  # pixels; no scanner makes more, a file that claims more would only fill the memory

# what may lie in the numbers of a mode of Pillow's
_GREY = {"L": "8-bit grey", "I;16": "16-bit grey", "I;16B": "16-bit grey", "I": "whole-number grey", "F": "real grey"}
_OTHER = {"1": "black and white", "P": "a palette", "LA": "grey with transparency", "PA": "a palette"}
_WHITE_IS_ZERO, _BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 0, 258, 262, 339


def natural_key(name: str) -> list[Any]:
    """The key that sorts names as people count: slice2 before slice10."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [*(int(part) if place % 2 else part for place, part in enumerate(parts)), name]


def pictures_in(folder: Path) -> list[Path]:
    """The PNG and TIFF files of a folder, in natural order; hidden ones do not count.

    Raises:
        InputError: If there are JPEGs, or volumes of another format, or something that cannot be opened.
    """
    paths, folders = list_folder(folder)
    lossy = sorted((path.name for path in paths if has_suffix(path, LOSSY)), key=natural_key)
    if lossy:
        raise InputError(
            f"{folder / lossy[0]} is a JPEG ({len(lossy)} there): it loses the numbers of CT values and labels, which "
            "no other format brings back; export PNG or TIFF from the source, or take these files away."
        )
    pictures = [path for path in paths if has_suffix(path, PICTURES)]
    volumes = [path for path in paths if has_suffix(path, VOLUMES)]
    if pictures and volumes:
        raise InputError(
            f"{folder} holds pictures ({pictures[0].name}) and {volumes[0].name}, so it is not clear which are the "
            "slices; give a folder that holds one kind."
        )
    if pictures:
        _refuse_others(folder, paths, folders)
    return sorted(pictures, key=lambda path: natural_key(path.name))


def _refuse_others(folder: Path, paths: Sequence[Path], folders: Sequence[Path]) -> None:
    """Refuses what lies beside pictures and may be more of the slices."""
    for path in folders:
        if has_suffix(path, PICTURES) or any(has_suffix(one, (*PICTURES, *VOLUMES)) for one in walk_files(path)):
            raise InputError(
                f"{folder} holds pictures and the folder {path.name}, which may hold more of the slices; give a folder "
                "that holds all of them, or take the other out."
            )
    others = [path for path in paths if not has_suffix(path, (*PICTURES, *TEXTS))]
    if others:
        raise InputError(
            f"{folder} holds pictures and {others[0].name}, which is not read and may be one of the slices; convert it "
            "to PNG, or take it out of the folder."
        )


@dataclass(frozen=True)
class PictureHeader:
    """What a picture's header says.

    Attributes:
        shape: Rows and columns.
        num_pages: More than one in a stack.
        kind: What its numbers are, in words.
    """

    shape: tuple[int, int]
    num_pages: int
    kind: str

    def __str__(self) -> str:
        return f"{self.shape[0]}x{self.shape[1]} pixels of {self.kind}"


def read_picture_header(path: Path, *, is_mask: bool = False) -> PictureHeader:
    """Reads a picture's header, and those of a stack's further pages.

    Raises:
        InputError: If it is missing, no PNG or TIFF, damaged, too large, or has no single number a pixel.
    """
    with (
        _readable(path),
        warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning),
        Image.open(path, formats=("PNG", "TIFF")) as image,
    ):
        num_pages = getattr(image, "n_frames", 1)
        headers = []
        for page in range(num_pages):
            image.seek(page)
            headers.append(PictureHeader((image.height, image.width), num_pages, _check(path, image, is_mask)))
    for number, header in enumerate(headers, 1):
        if header != headers[0]:
            raise InputError(
                f"{path}: page {number} is {header}, but page 1 is {headers[0]}; the pages of a stack must be alike."
            )
    return headers[0]


@dataclass(eq=False)
class PictureVolume:
    """Pictures in order as a `matchai.volumes.volume.Volume`: a file a slice, or one stack with a page a slice.

    Args:
        path: The file or folder that the user named.
        files: The pictures, in order; a single stack's own path.
        header: What all their headers say.
        orientation: How the slices lie.
        rescale: Slope and intercept that make HU of the numbers.
    """

    path: Path
    files: Sequence[Path]
    header: PictureHeader
    orientation: str
    rescale: tuple[float, float]
    spacing: tuple[float, float, float] | None = None
    voxel_ml: float | None = None
    notes: Sequence[str] = ()
    _stack: ImageFile.ImageFile | None = field(default=None, init=False)
    _reading: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __post_init__(self) -> None:
        self.name = self.path.resolve().name if self.path.is_dir() else self.path.stem
        self.shape: tuple[int, int, int] = (max(len(self.files), self.header.num_pages), *self.header.shape)
        self.is_volume = self.header.num_pages > 1

    def read(self, index: int) -> NDArray[np.float32]:
        """See `matchai.volumes.volume.Volume`."""
        return rescaled(self._numbers(index, is_mask=False), self.rescale)

    def read_labels(self, index: int) -> NDArray[Any]:
        """Slice `index` of masks, (H, W): grey numbers as stored, palette entries by their index."""
        return self._numbers(index, is_mask=True)

    def close(self) -> None:
        """Closes a stack's file; reading again opens it again."""
        with self._reading:
            if self._stack is not None:
                self._stack.close()
                self._stack = None

    def save_mask(self, folder: Path, mask: NDArray[np.uint8], file_labels: Sequence[int]) -> Path:
        """See `matchai.volumes.Volume`: 8-bit pictures of the same names in `NAME_mask/`, or one file for one."""
        numbers = np.array(file_labels, np.uint8)
        return self._save(folder, "mask", lambda index: numbers[mask[index]])

    def save_map(self, folder: Path, values: NDArray[np.uint16], what: str) -> Path:
        """See `matchai.volumes.Volume`: 16-bit pictures of the same names in `NAME_WHAT/`, or one file for one."""
        return self._save(folder, what, lambda index: np.asarray(values[index], np.uint16))

    def _numbers(self, index: int, *, is_mask: bool) -> NDArray[Any]:
        index = range(self.shape[0])[index]
        is_stack = len(self.files) < self.shape[0]
        path = self.files[0 if is_stack else index]
        with _readable(path):
            if path.suffix.lower() == ".png":
                content = path.read_bytes()
                Image.open(BytesIO(content), formats=("PNG",)).verify()  # the checksums, which decoding passes over
                with Image.open(BytesIO(content), formats=("PNG",)) as image:
                    return self._decode(path, image, is_mask)
            if not is_stack:
                with Image.open(path, formats=("TIFF", "PNG")) as image:
                    return self._decode(path, image, is_mask)
            with self._reading:  # one open file, as each must find its way through all pages before
                if self._stack is None:
                    self._stack = Image.open(path, formats=("TIFF",))
                self._stack.seek(index)
                return self._decode(path, self._stack, is_mask)

    def _decode(self, path: Path, image: ImageFile.ImageFile, is_mask: bool) -> NDArray[Any]:
        _check(path, image, is_mask)
        if image.size[::-1] != self.shape[1:]:
            raise InputError(f"{path} has another size than when it was opened; was it changed meanwhile?")
        # of pictures of 1, 2 and 4 bits Pillow spreads the numbers to 0..255
        spread = next((85 if bits == "L;2" else 17 for bits in ("L;2", "L;4") if _raw_mode(image).startswith(bits)), 1)
        tags = getattr(image, "tag_v2", {})
        has_sign, bits = 2 in tags.get(_SAMPLE_FORMAT, (1,)), tags.get(_BITS, (8,))
        image.load()
        numbers: NDArray[Any] = np.array(image)
        if image.mode == "1":
            return numbers.astype(np.uint8)
        if image.mode == "L" and has_sign:
            return numbers.view(np.int8)
        if image.mode == "I" and bits == (32,) and not has_sign:
            return numbers.view(np.uint32)
        return numbers // spread if is_mask and spread > 1 else numbers

    def _save(self, folder: Path, what: str, read: Callable[[int], NDArray[Any]]) -> Path:
        assert self.path.is_dir() or len(self.files) == 1
        name = f"{self.name}_{what}"
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}.", suffix=".tmp") as beside:
            made = Path(beside) / name
            if self.path.is_dir():
                made.mkdir()
                for index, path in enumerate(self.files):
                    _write_png(made / f"{path.stem}.png", read(index))
                sync_folder(made)
                return _move_folder(made, folder / name)
            if self.files[0].suffix.lower() == ".png":
                made = made.with_name(f"{name}.png")
                _write_png(made, read(0))
            else:
                made = made.with_name(f"{name}.tif")
                _write_stack(made, map(read, range(self.shape[0])))
            made.replace(folder / made.name)
        sync_folder(folder)
        return folder / made.name


def open_pictures(
    path: Path,
    orientation: str = "auto",
    rescale: tuple[float, float] = (1.0, 0.0),
    *,
    files: Sequence[Path] | None = None,
    is_mask: bool = False,
) -> PictureVolume:
    """Opens a folder of PNG or TIFF slices, or one such file, in which each page is a slice.

    Args:
        path: The folder or the file.
        orientation: How the slices lie; auto: as viewers show them (`matchai.volumes.volume.UPRIGHT`).
        rescale: Slope and intercept that make HU of the numbers.
        files: The pictures of the folder to take, in order (default: all in natural order).
        is_mask: Whether they are masks, which may have palettes and differ in their bits.

    Raises:
        InputError: If there is none, or one is no picture that can be used, or not like the others.
    """
    if not is_there(path):
        raise InputError(f"{path} does not exist.")
    if not (path.is_file() or path.is_dir()):
        raise InputError(f"{path} is a pipe or device, not a picture.")
    if files is None:
        files = pictures_in(path) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path} holds no pictures ({', '.join(PICTURES)}).")
    first = read_picture_header(files[0], is_mask=is_mask)
    if first.num_pages > 1 and len(files) == 1:
        path = files[0]
    if path.is_dir():
        seen: dict[str, Path] = {}
        for file in files:
            header = first if file == files[0] else read_picture_header(file, is_mask=is_mask)
            if header.num_pages > 1 and len(files) > 1:
                raise InputError(
                    f"{file} has {header.num_pages} pages among other pictures; name it alone, as a stack."
                )
            if header.shape != first.shape or (header.kind != first.kind and not is_mask):
                raise InputError(
                    f"{file} is {header}, but {files[0].name} is {first}; the slices of a folder must be alike."
                )
            if (other := seen.setdefault(file.stem, file)) != file:
                raise InputError(f"{other} and {file.name} would be one slice by their names; keep one of them.")
    return PictureVolume(path, files, first, UPRIGHT if orientation == "auto" else orientation, rescale)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Tells in a sentence what a decoder says of a damaged file in many ways."""
    try:
        yield
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(
            f"{path} claims to have more than {MAX_SIDE} x {MAX_SIDE} pixels, which no CT slice has."
        ) from None
    except FileNotFoundError:
        raise InputError(f"{path} does not exist.") from None
    except PermissionError:
        raise InputError(f"{path} cannot be read; check its permissions.") from None
    except Exception as error:  # what a decoder raises at damaged bytes is documented nowhere
        raise InputError(f"{path} is {_fault_of(path, error)}") from None


def _fault_of(path: Path, error: Exception) -> str:
    """Why a picture cannot be decoded, by how its file begins; the end of a sentence."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        head = file.read(12)
        if not head:
            return "empty; copy or export it again."
        if head.startswith(b"\xff\xd8"):
            return "a JPEG: it loses the numbers of CT values and labels; export PNG or TIFF from the source."
        if not head.startswith((b"\x89PNG", b"II", b"MM")):
            return "no PNG or TIFF picture; was it downloaded whole?"
    reason = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
    return (
        f"damaged, incomplete, or of a kind that cannot be read{reason}; copy or export it again, as 8-bit or 16-bit "
        "grey."
    )


def _check(path: Path, image: Image.Image, is_mask: bool) -> str:
    """Refuses what has not one number a pixel; returns in words what numbers it has."""
    tags = getattr(image, "tag_v2", {})
    if max(image.size) > MAX_SIDE:
        size = f"{image.height}x{image.width}"
        raise InputError(f"{path} has {size} pixels, which no CT slice has; the most is {MAX_SIDE} a side.")
    if image.format == "PNG" and getattr(image, "n_frames", 1) > 1:
        raise InputError(f"{path} is an animated PNG; save its frames as slices of their own.")
    if "jpeg" in str(image.info.get("compression")) or image.info.get("compression") == "webp":
        raise InputError(
            f"{path} is compressed as JPEG, which loses the numbers of CT values and labels; export it again without."
        )
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        raise InputError(
            f"{path} says that white is 0, and readers differ on whether its numbers are turned over; save it with "
            "black as 0 (photometric interpretation 1)."
        )
    if image.mode in _GREY:
        is_signed = 2 in tags.get(_SAMPLE_FORMAT, ())
        return f"signed {tags.get(_BITS, (0,))[0]}-bit grey" if is_signed else _GREY[image.mode]
    if is_mask and image.mode in ("1", "P"):
        return _OTHER[image.mode]
    found = _OTHER.get(image.mode, f"colours ({image.mode})")
    what, how = (
        ("mask", "grey or as the index of a palette") if is_mask else ("CT slice", "in 8, 16 or 32 bits of grey")
    )
    raise InputError(f"{path} holds {found}, but a {what} holds one number a pixel, {how}; save it so.")


def _raw_mode(image: ImageFile.ImageFile) -> str:
    """How the bits lie in the file, as Pillow calls it; empty where that is not told."""
    tiles: list[Any] = list(image.tile)
    arguments = tiles[0][3] if tiles else ""
    return str(arguments if isinstance(arguments, str) else arguments[0])


def _write_png(path: Path, image: NDArray[Any]) -> None:
    Image.fromarray(image).save(path, "PNG")
    sync_file(path)


def _write_stack(path: Path, pages: Iterator[NDArray[Any]]) -> None:
    with TiffImagePlugin.AppendingTiffWriter(path, new=True) as writer:
        for page in pages:
            Image.fromarray(page).save(writer, "TIFF", compression="tiff_adobe_deflate")
            writer.newFrame()
    sync_file(path)


def _move_folder(made: Path, folder: Path) -> Path:
    """Moves a whole folder to its place; an older one of the same files goes."""
    if folder.exists():
        strangers = {path.name for path in folder.iterdir()} - {path.name for path in made.iterdir()}
        if strangers:
            raise InputError(f"{folder} holds {min(strangers)}, which would be lost; name another --output.")
        folder.rename(made.with_name("old"))
    made.rename(folder)
    sync_folder(folder.parent)
    return folder
