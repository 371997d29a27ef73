"""One DICOM file: what its header tells of a CT slice, and its pixels.

Nothing that names a patient is read.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matchai.system import InputError, need

_TAGS = [
    *["SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "SeriesNumber", "SeriesDescription", "Modality"],
    *["Rows", "Columns", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit"],
    *["PixelRepresentation", "NumberOfFrames", "PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient"],
    *["SliceThickness", "RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence", "ImageType"],
    *["PixelPaddingValue", "PixelPaddingRangeLimit"],
]
_NAMED_DICOM = (".dcm", ".dicom", ".ima")
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"


@dataclass(frozen=True)
class DicomImage:
    """What matters of one file's header.

    Attributes:
        path: The file.
        uid: SOPInstanceUID; empty where missing.
        series: SeriesInstanceUID; empty where missing.
        number: SeriesNumber; empty where missing.
        description: SeriesDescription.
        modality: Such as "CT"; empty where missing.
        is_capture: Whether it is a secondary capture or a localizer: a picture, no slice of a scan.
        syntax: UID of the transfer syntax.
        is_packed: Whether pixels are compressed.
        shape: Rows and columns.
        dtype: Of the stored numbers, such as "u2".
        bits: How many are used, and the number of the highest.
        photometric: Such as "MONOCHROME2".
        num_frames: Above 1 for an image that is several.
        has_lookup_table: Whether a table, not a slope, makes HU.
        scale: Slope and intercept that make HU; 1 and 0 for what the file does not tell.
        is_scale_told: Whether it tells both.
        unit: What the scale makes, "HU" where it is not told.
        spacing: (2,) mm between rows and between columns; NaN where missing.
        directions: (2, 3) of the rows and of the columns in the patient; NaN where missing.
        position: (3,) mm toward the left, back and head, of the first pixel; NaN where missing.
        decimals: Of the position as it is written.
        thickness: Of the slice in mm; 0 where missing.
        padding: Lowest and highest stored number that stand for no pixel; None where none is declared.
    """

    path: Path
    uid: str
    series: str
    number: str
    description: str
    modality: str
    is_capture: bool
    syntax: str
    is_packed: bool
    shape: tuple[int, int]
    dtype: str
    bits: tuple[int, int]
    photometric: str
    num_frames: int
    has_lookup_table: bool
    scale: tuple[float, float]
    is_scale_told: bool
    unit: str
    spacing: NDArray[np.float64]
    directions: NDArray[np.float64]
    position: NDArray[np.float64]
    decimals: int
    thickness: float
    padding: tuple[int, int] | None


def read_image(path: Path) -> DicomImage | None:
    """Reads the header of a file.

    Returns:
        What it tells; None if the file is no DICOM image.

    Raises:
        InputError: If it should be one, by its name or by how it begins, and cannot be read.
    """
    header = _header_of(path)
    if header is None:
        return None
    get, uids = header.get, need("pydicom.uid", "medical", f"Reading {path}")
    try:
        with warnings.catch_warnings(action="ignore"):
            slope, intercept = _float(get("RescaleSlope")), _float(get("RescaleIntercept"))
            syntax = _syntax_of(header)
            allocated = int(get("BitsAllocated") or 16)
            if allocated not in (8, 16, 32):
                raise ValueError(f"BitsAllocated is {allocated}, not 8, 16 or 32")
            num_bits, high_bit, number = int(get("BitsStored") or 16), get("HighBit"), get("SeriesNumber")
            dtype = np.dtype(f"{'i' if get('PixelRepresentation') else 'u'}{allocated // 8}")
            is_localizer = "LOCALIZER" in [str(value).upper() for value in get("ImageType") or ()]
            return DicomImage(
                path=path,
                uid=str(get("SOPInstanceUID") or ""),
                series=str(get("SeriesInstanceUID") or ""),
                number="" if number is None else str(number),
                description="".join(filter(str.isprintable, str(get("SeriesDescription") or ""))).strip(),
                modality=str(get("Modality") or ""),
                is_capture=is_localizer or str(get("SOPClassUID") or "").startswith(_SECONDARY_CAPTURE),
                syntax=syntax,
                is_packed=syntax in uids.AllTransferSyntaxes and uids.UID(syntax).is_encapsulated,
                shape=(int(header.Rows), int(header.Columns)),
                dtype=dtype.str[1:],
                bits=(num_bits, num_bits - 1 if high_bit is None else int(high_bit)),
                photometric=str(get("PhotometricInterpretation") or ""),
                num_frames=int(get("NumberOfFrames") or 1),
                has_lookup_table="ModalityLUTSequence" in header,
                scale=(1.0 if slope is None else slope, intercept or 0.0),
                is_scale_told=slope is not None and intercept is not None,
                unit=str(get("RescaleType") or "HU"),
                spacing=_floats(get("PixelSpacing"), 2),
                directions=_floats(get("ImageOrientationPatient"), 6).reshape(2, 3),
                position=_floats(get("ImagePositionPatient"), 3),
                decimals=max((_decimals(str(value)) for value in get("ImagePositionPatient") or ()), default=0),
                thickness=abs(_float(get("SliceThickness")) or 0.0),
                padding=_padding(get("PixelPaddingValue"), get("PixelPaddingRangeLimit"), dtype, num_bits),
            )
    except Exception as error:  # pydicom reads values when they are asked for, and has many ways to fail
        raise InputError(f"{path} has a header value that makes no sense: {error}.") from None


def read_pixels(image: DicomImage) -> NDArray[Any]:
    """Decodes the pixels of an image.

    Returns:
        (H, W) numbers as stored, of the type that the header names, in native byte order.

    Raises:
        InputError: If the file is damaged or incomplete.
    """
    pydicom = need("pydicom", "medical", f"Reading {image.path}")
    try:
        with warnings.catch_warnings(action="ignore"):
            if image.syntax == pydicom.uid.JPEGExtended12Bit and image.bits[0] > 8:
                pixels = _pixels_by_gdcm(image)
            else:
                whole = pydicom.dcmread(image.path, force=True)
                whole.file_meta.TransferSyntaxUID = pydicom.uid.UID(image.syntax)
                pixels = np.asarray(whole.pixel_array)
    except InputError:
        raise
    except Exception as error:  # each decoder has its own
        reason = " ".join(str(error).split())
        raise InputError(f"{image.path} is damaged or truncated: its pixels cannot be read ({reason}).") from None
    if pixels.shape != image.shape:
        raise InputError(f"{image.path} holds pixels of shape {pixels.shape}, but its header says {image.shape}.")
    stored = pixels.astype(image.dtype)
    if not np.array_equal(stored, pixels):
        raise InputError(f"{image.path} holds {pixels.dtype} pixels that its header's {stored.dtype} cannot hold.")
    return stored


@cache
def why_not_decodable(syntax: str) -> str | None:
    """Why images of a transfer syntax cannot be decoded, the rest of a sentence; None if they can."""
    pixels = need("pydicom.pixels", "medical", "Reading DICOM files")
    with warnings.catch_warnings(action="ignore"):
        uid = need("pydicom.uid", "medical", "Reading DICOM files").UID(syntax)
    try:
        is_readable = pixels.get_decoder(uid).is_available
    except NotImplementedError:
        return f"is stored as {uid.name}, which is no way to store CT slices"
    if is_readable:
        return None
    is_beyond_gdcm = uid.name.startswith("High-Throughput")  # the one that GDCM cannot
    packages = "pylibjpeg pylibjpeg-openjpeg" if is_beyond_gdcm else '"matchai[medical]"'
    return f"is packed as {uid.name}, for which no decoder is installed: `pip install {packages}`"


def may_be_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM files do.

    Raises:
        InputError: If it cannot be read.
    """
    return _is_dicom(_start_of(path))


def _start_of(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(132)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from None


def _is_dicom(start: bytes) -> bool:
    # old files have no preamble: they begin with group 2 or 8
    return start[128:] == b"DICM" or (len(start) == 132 and start[:2] in (b"\2\0", b"\x08\0") and start[3] == 0)


def _header_of(path: Path) -> Any:
    """The header of a DICOM image; None for any other file.

    Raises:
        InputError: If it should be a DICOM image, by its name or by how it begins, and cannot be read.
    """
    pydicom = need("pydicom", "medical", f"Reading {path}")
    start = _start_of(path)
    if not _is_dicom(start):
        if start.startswith((b"version https://git-lfs", b"/annex/objects")):
            raise InputError(
                f"{path} is a pointer to a file that is not there; get it with `git lfs pull`, or `git annex get`."
            )
        if path.suffix.lower() in _NAMED_DICOM:
            raise InputError(
                f"{path} is named like a DICOM file, but is {'empty' if not start else 'none'}: encrypted, truncated "
                "or something else; restore it, or take it out of the folder."
            )
        return None
    try:
        with warnings.catch_warnings(action="ignore"):  # of pydicom, for each odd value of each file
            header = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=list(_TAGS))
            kind = pydicom.uid.UID(header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID") or "")
    except Exception as error:  # whatever a damaged file makes pydicom and zlib raise
        raise InputError(f"{path} is damaged or truncated: its header cannot be read ({error}).") from None
    if "Rows" in header and "Columns" in header:
        return header
    is_known = kind.is_private or kind.name != kind
    if not kind.is_valid or not is_known or kind.name.endswith("Image Storage"):
        raise InputError(f"{path} is truncated: its header ends before the size of its image; copy it again.")
    return None


def _pixels_by_gdcm(image: DicomImage) -> NDArray[Any]:
    """Of 12-bit lossy JPEG, which GDCM reads from files but pydicom never gives it."""
    gdcm = need("gdcm", "medical", f"Reading {image.path}")
    reader = gdcm.ImageReader()
    reader.SetFileName(str(image.path))
    if not reader.Read():
        raise ValueError("GDCM cannot read it")
    content = reader.GetImage().GetBuffer().encode("utf-8", "surrogateescape")
    return np.frombuffer(content, image.dtype).reshape(image.shape)


def _syntax_of(header: Any) -> str:
    if stated := header.file_meta.get("TransferSyntaxUID"):
        return str(stated)
    uid = need("pydicom.uid", "medical", "Reading DICOM files")
    is_implicit, is_little = header.original_encoding
    if is_implicit:
        return str(uid.ImplicitVRLittleEndian)
    return str(uid.ExplicitVRLittleEndian if is_little else uid.ExplicitVRBigEndian)


def _float(value: Any) -> float | None:
    """None where the tag is missing or empty."""
    if value in (None, ""):
        return None
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value} is no finite number")
    return number


def _floats(values: Any, count: int) -> NDArray[np.float64]:
    """NaN where the tag is missing or empty, and nowhere else."""
    if values in (None, "") or not len(values):
        return np.full(count, np.nan)
    if len(values) != count or not np.isfinite(numbers := np.array(values, dtype=np.float64)).all():
        raise ValueError(f"{values} are not {count} finite numbers")
    return numbers


def _padding(value: Any, limit: Any, dtype: np.dtype[Any], num_bits: int) -> tuple[int, int] | None:
    """Padding Pixel Value and Range Limit (PS3.3, C.7.5.1.1.2) as stored numbers, from the lower to the higher.

    Headers often write them with the other sign (63536 for -2000 in 16 bits), so what counts are their bits.
    """
    if value in (None, "", b""):
        return None
    ends = []
    if isinstance(value, Sequence) and not isinstance(value, bytes | str):
        value = value[0]
    for end in (value, value if limit in (None, "", b"") else limit):
        # implicit VR: pydicom leaves the bytes as they are where it does not know the sign
        number = int.from_bytes(end, "little") if isinstance(end, bytes) else int(end)
        number &= 2**num_bits - 1
        is_negative = dtype.kind == "i" and number >= 2 ** (num_bits - 1)
        ends.append(number - 2**num_bits if is_negative else number)
    return min(ends), max(ends)


def _decimals(text: str) -> int:
    """How many stand behind the point; enough for any purpose where it is written with an exponent."""
    return 9 if "e" in text.lower() else len(text.partition(".")[2])
