"""DICOM series: sorted by place, checked, decoded once, and handed on as a grid.

Nothing that names a patient is read or told.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from matchai.system import InputError, need, plural, walk_files
from matchai.volumes.decoding import decode
from matchai.volumes.dicom_image import DicomImage, read_image, why_not_decodable
from matchai.volumes.grid import FileVoxels, GridVolume, scratch_file
from matchai.volumes.hounsfield import AIR
from matchai.volumes.kinds import LOSSY, NIFTI, PACKED, PICTURES, VOLUMES, has_suffix, why_unread
from matchai.volumes.volume import format_shape

MAX_NAMES = 5
_MOST_TEXT = 2**20  # bytes
_SAME_PLACE = 0.01  # of the widest gap, below which two images are of one place
_UNEVEN, _EVEN = 0.05, 0.01  # of the usual gap: what others may differ from it at most, and without a word
_TO_RAS = np.diag([-1.0, -1.0, 1.0])  # DICOM counts toward the patient's left, back and head


def open_dicom(
    folder: Path,
    orientation: str = "LP",
    rescale: tuple[float, float] = (1.0, 0.0),
    scratch: Path | None = None,
    series: str | None = None,
) -> GridVolume:
    """Opens the CT series in a folder and the folders in it.

    Args:
        folder: Where the files lie, of whatever names; files that are no DICOM images are left out, and told.
        orientation: Toward which sides rows and columns of the slices shall run.
        rescale: Slope and intercept that make HU of what the files' own rescale gives.
        scratch: Folder for the decoded voxels, which are written at the first read and gone with `close` (default: the
            system's folder for temporary files).
        series: SeriesNumber or SeriesInstanceUID of the one to read, where there are several.

    Returns:
        The volume. Damage of pixels shows when the first slice is read, as an `InputError` too.

    Raises:
        InputError: If there is no series, or several and none is chosen, or it is no CT, incomplete, mixed, damaged, or
            stored in a way that cannot be read for sure.
    """
    need("pydicom", "medical", f"Reading {folder}")
    found, left_out = _images_in(folder)
    images, selection_notes = _choose(folder, found, left_out, series)
    selection_notes += _left_out_notes(folder, left_out, len(images))
    _check_content(images)
    _check_sameness(images)
    images, notes = _without_duplicates(images)
    images, affine, position_notes = _sort_by_position(folder, images)
    has_padding = any(image.padding is not None for image in images)
    is_uniform = len({(image.scale, image.dtype) for image in images}) == 1 and not has_padding
    dtype = np.dtype(images[0].dtype if is_uniform else np.float32)
    air = (AIR - rescale[1]) / rescale[0]
    shape = (images[0].shape[1], images[0].shape[0], len(images))
    opened = GridVolume(
        folder,
        folder.resolve().name,
        FileVoxels(lambda: _decode(folder, images, None if is_uniform else air, dtype, scratch), shape, dtype),
        affine,
        orientation,
        scale=images[0].scale if is_uniform else (1.0, 0.0),
        rescale=rescale,
        notes=[*selection_notes, *_content_notes(images), *notes, *position_notes],
    )
    if len(images) == 1 and not images[0].thickness:
        opened.spacing, opened.voxel_ml = None, None
    return opened


def _images_in(folder: Path) -> tuple[list[DicomImage], list[Path]]:
    """The DICOM images, and the other files."""
    if not folder.is_dir():
        raise InputError(f"{folder} {'is a file, not a folder' if folder.exists() else 'does not exist'}.")
    images, others = [], []
    for path in walk_files(folder):
        if path.name.upper() == "DICOMDIR":
            continue
        if (image := read_image(path)) is not None:
            images.append(image)
        else:
            others.append(path)
    return images, others


def _left_out_notes(folder: Path, others: Sequence[Path], num_images: int) -> list[str]:
    """Names the files that are no DICOM images; refuses those that may be the scan, or a part of it.

    Raises:
        InputError: If there are volumes of other formats, more pictures than a preview or two, or empty files.
    """
    for path in others:
        if has_suffix(path, VOLUMES):
            raise InputError(
                f"{folder} holds DICOM images and {path.name}, so it is not clear which is the scan; give a folder "
                "that holds one of them."
            )
        if has_suffix(path, PACKED) or _may_be_damaged(path):
            what = "is packed" if has_suffix(path, PACKED) else "is empty or no DICOM image any more"
            raise InputError(
                f"{path} {what}, among DICOM images, and may hold one of the slices; unpack it, copy it again, or "
                "take it out."
            )
    pictures = [path for path in others if has_suffix(path, (*PICTURES, *LOSSY))]
    if len(pictures) > max(1, num_images // 10):
        raise InputError(
            f"{folder} holds {plural(num_images, 'DICOM image')} and {len(pictures)} pictures such as "
            f"{pictures[0].name}, so it is not clear which are the scan; give a folder that holds one kind."
        )
    if not others:
        return []
    names = ", ".join(path.name for path in others[:MAX_NAMES]) + (" ..." if others[MAX_NAMES:] else "")
    return [f"Left out, as {'they are no DICOM images' if others[1:] else 'it is no DICOM image'}: {names}."]


def _may_be_damaged(path: Path) -> bool:
    """Whether a file is named as DICOM files are, without a suffix or by a UID, and is no text."""
    if path.suffix and not path.suffix[1:].isdecimal():
        return False
    try:
        start = path.read_bytes()[:512] if path.stat().st_size < _MOST_TEXT else b"\0"
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from None
    return not start or (start[128:132] != b"DICM" and any(byte < 9 for byte in start))


def _choose(
    folder: Path, images: Sequence[DicomImage], others: Sequence[Path], wanted: str | None
) -> tuple[list[DicomImage], list[str]]:
    """The series that is asked for, or the only one, or the only scan; and what is left out for it."""
    if not images:
        raise InputError(f"{folder} holds no DICOM images{_instead(others)}.")
    captures = [image for image in images if image.is_capture]
    if wanted is None and captures and len(captures) < len(images):  # pictures in a scan's own series, too
        kept, notes = _choose(folder, [image for image in images if not image.is_capture], others, None)
        what = f"{plural(len(captures), 'capture')} or localizers, first {captures[0].path.name}"
        left = ", ".join(sorted({f"{one.number} '{one.description}'" for one in captures}))
        return kept, [f"Left out, as no scans: series {left} ({what}).", *notes]
    found: dict[str, list[DicomImage]] = defaultdict(list)
    for image in images:
        found[image.series].append(image)
    numbers = Counter(members[0].number for members in found.values())
    matching = [members for uid, members in found.items() if wanted in (None, uid, members[0].number)]
    if len(matching) == 1:
        return matching[0], []
    scans = [members for members in matching if not _is_no_scan(members)]
    if wanted is None and len(scans) == 1 and scans[0][0].modality == "CT":
        rest = "; ".join(_describe_series(members, with_uid=False) for members in matching if members is not scans[0])
        return scans[0], [f"Left out, as no scans: series {rest}."]
    shown = sorted(found.values(), key=lambda members: (len(members[0].number), members[0].number, members[0].series))
    listed = "; ".join(_describe_series(members, numbers[members[0].number] > 1) for members in shown)
    way = "`--series NUMBER` chooses one"
    if max(numbers.values()) > 1:
        way += ", `--series UID` where numbers are equal or missing"
    found_text = f"holds {len(found)} series" if wanted is None or matching else f"holds no series {wanted}"
    raise InputError(f"{folder} {found_text}: {listed}; {way}.")


def _instead(others: Sequence[Path]) -> str:
    """What a folder without DICOM images holds, for the end of a sentence."""
    told = next((f"{path.name} is {what}" for path in others if (what := why_unread(path)) is not None), None)
    if told is None:
        volumes = [path for path in others if has_suffix(path, (*NIFTI, ".npy", *PICTURES))]
        told = f"name {volumes[0].name} itself, or the folder that it lies in" if volumes else None
    return f", but {told}" if told else ""


def _is_no_scan(series: Sequence[DicomImage]) -> bool:
    """Whether a series is plainly none: captures, localizers, a single key image, or what no scanner makes."""
    first = series[0]
    is_single = len(series) == 1 and first.num_frames == 1
    return is_single or first.is_capture or first.modality not in ("CT", "MR", "PT", "NM", "")


def _describe_series(members: Sequence[DicomImage], with_uid: bool) -> str:
    first = members[0]
    about = [first.modality] if first.modality not in ("CT", "") else []
    about += [f"{len(members)} image{'s' if len(members) > 1 else ''}"]
    about += [f"{first.thickness:g} mm"] if first.thickness else []
    about += [f"UID {first.series or 'missing'}"] if with_uid or not first.number else []
    return f"{first.number or 'no number'} '{first.description}' ({', '.join(about)})"


def _check_content(images: Sequence[DicomImage]) -> None:
    """Refuses what is no CT slice, or whose numbers cannot be made HU for sure."""

    def refuse(is_wrong: Callable[[DicomImage], bool], what: str) -> None:
        wrong = [image for image in images if is_wrong(image)]
        if wrong:
            how_many = f"{len(wrong)} of {len(images)} images" if len(images) > 1 else "its image"
            raise InputError(f"{wrong[0].path} {what} ({how_many} of the series).")

    other = next((image.modality for image in images if image.modality not in ("CT", "")), "")
    refuse(lambda i: i.modality not in ("CT", ""), f"is of modality {other}, but matchai reads CT, in HU")
    refuse(
        lambda i: i.num_frames > 1,
        "holds several frames (an enhanced, multi-frame image), which matchai does not read: convert it to NIfTI, for "
        "example with dcm2niix",
    )
    refuse(
        lambda i: i.photometric == "MONOCHROME1",
        "is MONOCHROME1: by the standard its numbers are HU all the same, but common readers (ITK) invert them, so "
        "they may have been written inverted; convert the series to NIfTI, look whether air is near -1000, and give "
        "`--rescale` if it is not",
    )
    refuse(lambda i: i.photometric != "MONOCHROME2", "is no grey image (RGB, a palette); it shows a picture, not HU")
    refuse(lambda i: i.has_lookup_table, "has a modality lookup table instead of a rescale slope: convert it to NIfTI")
    refuse(lambda i: i.bits[1] != i.bits[0] - 1, "does not keep its numbers in the low bits (HighBit): convert it")
    refuse(lambda i: i.scale[0] == 0, "has the rescale slope 0, so every pixel is alike")
    nowhere = "so nobody knows where it lies"
    refuse(lambda i: bool(np.isnan(i.position).any()), f"has no ImagePositionPatient, {nowhere}")
    refuse(lambda i: bool(np.isnan(i.directions).any()), f"has no ImageOrientationPatient, {nowhere}")
    refuse(lambda i: bool(np.isnan(i.spacing).any()), f"has no PixelSpacing, {nowhere}")
    refuse(lambda i: i.spacing.min() <= 0, "has a PixelSpacing that is not above 0")
    refuse(
        lambda i: not np.allclose(i.directions @ i.directions.T, np.eye(2), atol=1e-3),
        "has an ImageOrientationPatient that is no pair of directions at right angles",
    )
    for image in images:
        if problem := why_not_decodable(image.syntax):
            raise InputError(f"{image.path} {problem}.")


def _check_sameness(images: Sequence[DicomImage]) -> None:
    """Refuses images that do not belong on one grid, such as a localizer in its series."""
    kinds = [(image.shape, *image.spacing.round(2), *image.directions.round(2).flat) for image in images]
    first = images[kinds.index(Counter(kinds).most_common(1)[0][0])]
    for image in images:
        differences = []
        if image.shape != first.shape:
            differences.append(f"{format_shape(image.shape)} pixels and not {format_shape(first.shape)}")
        if not np.allclose(image.spacing, first.spacing, rtol=1e-3):
            found, expected = format_shape(image.spacing, "g"), format_shape(first.spacing, "g")
            differences.append(f"pixels of {found} mm and not {expected} mm")
        if not np.allclose(image.directions, first.directions, atol=1e-3):
            differences.append("another direction in the patient")
        if differences:
            raise InputError(
                f"{image.path} has {' and '.join(differences)}, unlike {first.path.name} of the same series; is it a "
                "localizer? Take what does not belong out of the folder."
            )


def _without_duplicates(images: Sequence[DicomImage]) -> tuple[list[DicomImage], list[str]]:
    kept: dict[tuple[str, bytes], DicomImage] = {}
    rest: list[DicomImage] = []
    num_dropped = 0
    for image in images:
        twin = kept.setdefault((image.uid, image.position.tobytes()), image) if image.uid else image
        if twin is image:
            rest.append(image)
        elif len({pixels.tobytes() for pixels in decode([twin, image])}) > 1:
            raise InputError(
                f"{twin.path} and {image.path} have one SOPInstanceUID and place, but different pixels; take the wrong "
                "one out of the folder."
            )
        else:
            num_dropped += 1
    note = f"{num_dropped} of {len(images)} files were copies of others, and were left out."
    return rest, [note] if num_dropped else []


def _sort_by_position(
    folder: Path, images: Sequence[DicomImage]
) -> tuple[list[DicomImage], NDArray[np.float64], list[str]]:
    """The images from one end to the other, and the affine (RAS+) of (column, row, image)."""
    first = images[0]
    normal = np.cross(*first.directions)
    order = np.argsort([normal @ image.position for image in images], kind="stable")
    images = [images[index] for index in order]
    positions = np.array([image.position for image in images])
    thickness = images[0].thickness or 1.0
    step = (positions[-1] - positions[0]) / (len(images) - 1) if len(images) > 1 else normal * thickness
    notes = []
    if len(images) > 1:
        notes += _check_gaps(folder, images, positions, normal)
        tilt = float(np.degrees(np.arccos(min(1.0, step @ normal / np.linalg.norm(step)))))
        if tilt > 0.1:
            notes.append(
                f"The gantry was tilted by {tilt:.1f} degrees; masks are written with its shear, "
                "which ITK leaves out, in its own reading of the series too."
            )
    elif not images[0].thickness:
        notes.append("It is a single image without SliceThickness, so its volume in mL is unknown.")
    affine = np.eye(4)
    between_rows, between_columns = first.spacing
    across = np.stack([first.directions[0] * between_columns, first.directions[1] * between_rows, step], axis=1)
    affine[:3, :3] = _TO_RAS @ across
    affine[:3, 3] = _TO_RAS @ positions[0]
    return images, affine, notes


def _check_gaps(
    folder: Path, images: Sequence[DicomImage], positions: NDArray[np.float64], normal: NDArray[np.float64]
) -> list[str]:
    """Refuses a series with gaps, or out of line; tells of gaps that are a little uneven."""
    gaps = np.diff(positions @ normal)
    expected = float(np.sort(gaps)[(len(gaps) - 1) // 2])  # of 1 and 2 mm, the 2 is the gap
    main = int(np.argmax(np.abs(normal)))
    spots = positions[:, main]

    def between(index: int) -> str:
        return f"between {'xyz'[main]} = {spots[index]:g} and {spots[index + 1]:g} mm"

    same = int(np.argmin(gaps))
    if gaps[same] < _SAME_PLACE * gaps.max():
        raise InputError(
            f"{images[same].path} and {images[same + 1].path} are two images of one place ({'xyz'[main]} = "
            f"{spots[same]:g} mm): two phases or kernels in one series? Leave those of one scan in the folder."
        )
    # positions written with few decimals are off by their rounding, which is no gap; a missing image is
    rounding = min(10.0 ** -max(image.decimals for image in images), 0.2 * expected)
    allowed = max(_UNEVEN * expected, rounding) + 1e-6
    off = int(np.argmax(np.abs(gaps - expected)))
    deviation = abs(float(gaps[off]) - expected)
    if deviation > allowed:
        missing = round(float(gaps[off]) / expected) - 1
        guess = f"{missing} image{'s are' if missing > 1 else ' is'} missing" if missing > 0 else "spacing is uneven"
        raise InputError(
            f"{folder}: slice gap {gaps[off]:.4g} mm {between(off)} where {expected:.4g} is expected: {guess}; copy "
            "the series again, whole, or resample it to even spacing and save it as NIfTI."
        )
    row = np.linspace(positions[0], positions[-1], len(images))
    aside = float(np.linalg.norm(positions - row, axis=1).max())
    if aside > max(allowed, 0.25 * min(expected, *images[0].spacing)):
        worst = int(np.argmax(np.linalg.norm(np.diff(positions - row, axis=0), axis=1)))
        raise InputError(
            f"{folder}: its images do not lie in one straight, even row, but up to {aside:.4g} mm off it, first of all "
            f"between {images[worst].path} and {images[worst + 1].path}; save the series resampled, as NIfTI."
        )
    if deviation <= _EVEN * expected:
        return []
    return [f"Its slice gaps differ by up to {deviation:.2g} mm ({deviation / expected:.1%}); they are taken as even."]


def _content_notes(images: Sequence[DicomImage]) -> Iterator[str]:
    num_bare = sum(not image.is_scale_told for image in images)
    if num_bare:
        yield (
            f"{num_bare} of {len(images)} images name no rescale slope or intercept, taken as 1 and 0; if "
            "values are no HU, give `--rescale`."
        )
    if any(not image.modality for image in images):
        yield "It does not name its modality, and is taken for CT."
    declared = sorted({image.padding for image in images if image.padding is not None})
    if declared:
        shown = ", ".join(f"{low}" if low == high else f"{low} to {high}" for low, high in declared[:3])
        yield f"Its pixels of {shown} are declared as padding, and are taken as air ({AIR:g} HU)."
    others = sorted({image.unit for image in images if image.unit.upper() not in ("HU", "US")})
    if others:
        yield f"It says that its numbers are {', '.join(others)}, not HU."


def _decode(
    folder: Path, images: Sequence[DicomImage], air: float | None, dtype: np.dtype[Any], scratch: Path | None
) -> BinaryIO:
    """All pixels in one file without a name: scaled, padding being `air`; or as they are stored, where it is None."""

    def write(file: BinaryIO) -> None:
        for image, values in zip(images, decode(images), strict=True):
            wanted = values if air is None else values * image.scale[0] + image.scale[1]
            if air is not None and image.padding is not None:
                wanted[(values >= image.padding[0]) & (values <= image.padding[1])] = air
            file.write(wanted.astype(dtype).tobytes())

    return scratch_file(folder, len(images) * int(np.prod(images[0].shape)) * dtype.itemsize, scratch, write)
