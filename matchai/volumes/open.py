"""From a path that a user names to a `Volume`, whatever kind of file or folder stands there."""

from dataclasses import dataclass
from pathlib import Path

from matchai.system import InputError, is_there, list_folder, walk_files
from matchai.volumes.kinds import LOSSY, NIFTI, PICTURES, has_suffix, why_unread
from matchai.volumes.volume import UPRIGHT, Volume, open_array_volume


@dataclass(frozen=True)
class TrainedOn:
    """The files that a network was trained on.

    Attributes:
        kind: Their `kind_of`.
        orientation: How their slices lie.
        rescale: Slope and intercept that make HU of their numbers.
    """

    kind: str
    orientation: str
    rescale: tuple[float, float]


def kind_of(path: Path) -> str:
    """What a file's name, or a folder's content, says it is: npy, nifti, picture, dicom (any other folder), unknown.

    Raises:
        InputError: If something in a folder cannot be opened.
    """
    if path.is_dir():
        files, _ = list_folder(path)
        pictures = [one for one in files if has_suffix(one, PICTURES)]
        is_lossy = bool(files) and all(has_suffix(one, LOSSY) for one in files)  # whose refusal says what a JPEG lacks
        return "picture" if (is_lossy or pictures) and not _holds_dicom(path) else "dicom"
    if has_suffix(path, NIFTI):
        return "nifti"
    return {".npy": "npy", **dict.fromkeys(PICTURES, "picture")}.get(path.suffix.lower(), "unknown")


def _holds_dicom(folder: Path) -> bool:
    """Whether a DICOM image lies in a folder, or in one below, beside pictures."""
    others = [one for one in walk_files(folder) if not has_suffix(one, (*PICTURES, *LOSSY))]
    if not others:
        return False
    from matchai.volumes.dicom_image import may_be_dicom, read_image  # noqa: PLC0415 needs pydicom

    return any(may_be_dicom(one) and read_image(one) is not None for one in others)


def open_volume(
    path: Path,
    wanted: str,
    *,
    orientation: str | None = None,
    rescale: tuple[float, float] | None = None,
    trained_on: TrainedOn | None = None,
    scratch: Path | None = None,
    series: str | None = None,
    nifti_affine: str = "auto",
) -> Volume:
    """Opens a `.npy` array, a NIfTI file, a folder with a DICOM series, a folder of pictures, or one such file.

    Args:
        path: The file or folder.
        wanted: The orientation to turn volumes to that know theirs (`matchai.settings.config`).
        orientation: How slices lie that cannot tell; None for that of `trained_on` in files of its kind, else `LP` in
            arrays and upright in pictures.
        rescale: Slope and intercept that make HU of the file's numbers; None for those of `trained_on` in files of its
            kind, else none.
        trained_on: The files that the networks were trained on.
        scratch: Folder for temporary files; None for the system's.
        series: Number of the DICOM series to take from a folder of several.
        nifti_affine: As for `matchai.volumes.open_nifti`.

    Raises:
        InputError: If nothing stands there, or nothing that can be predicted.
    """
    if not is_there(path):
        raise InputError(
            f"{path} does not exist; give a .npy array, a .nii or .nii.gz file, or a folder of DICOM or picture files."
        )
    kind = kind_of(path)
    if trained_on is not None and kind == trained_on.kind:
        orientation, rescale = orientation or trained_on.orientation, rescale or trained_on.rescale
    rescale = rescale or (1.0, 0.0)
    # each kind needs libraries of its own, which the others do without
    if kind == "npy":
        return open_array_volume(path, orientation or "LP", rescale)
    if kind == "picture":
        from matchai.volumes.pictures import open_pictures  # noqa: PLC0415

        return open_pictures(path, orientation or UPRIGHT, rescale)
    if kind == "nifti":
        from matchai.volumes.nifti import open_nifti  # noqa: PLC0415

        return open_nifti(path, wanted, rescale, scratch, nifti_affine)
    if kind == "dicom":
        files, _ = list_folder(path)
        if files and all(has_suffix(one, (*NIFTI, ".npy")) for one in files):
            raise InputError(f"{path} is a folder of volumes; name them: {path}/*")
        from matchai.volumes.dicom import open_dicom  # noqa: PLC0415

        return open_dicom(path, wanted, rescale, scratch=scratch, series=series)
    raise InputError(_why_not_opened(path))


def _why_not_opened(path: Path) -> str:
    if has_suffix(path, (".dcm", ".ima")):
        return f"{path} is one slice of a series; give the folder that holds the series, {path.parent}."
    what = why_unread(path) or "of no kind that is known here"
    return (
        f"{path} is {what}; a prediction takes a .npy array, a .nii or .nii.gz file, or a folder of DICOM, PNG or TIFF "
        "files."
    )
