"""From a path that a user names to a `Volume`, whatever kind of file or folder stands there."""

from dataclasses import dataclass
from pathlib import Path

from matchai.system import InputError
from matchai.volumes.volume import UPRIGHT, Volume, open_array_volume

PICTURES = (".png", ".tif", ".tiff")
LOSSY = (".jpg", ".jpeg")
NIFTI = (".nii", ".nii.gz")
NO_CT = {
    **dict.fromkeys(LOSSY, "a JPEG, whose compression has lost HU"),
    ".npz": "an archive of arrays: save one with numpy.save",
    ".zip": "a zip archive: unpack it",
    ".mha": "a MetaImage: convert it to NIfTI",
    ".mhd": "a MetaImage: convert it to NIfTI",
    ".nrrd": "an NRRD file: convert it to NIfTI",
}


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
    """What a file's name, or a folder's content, says it is: npy, nifti, picture, dicom (any other folder), unknown."""
    if path.is_dir():
        suffixes = [one.suffix.lower() for one in path.iterdir() if not one.name.startswith(".")]
        is_lossy = bool(suffixes) and set(suffixes) <= set(LOSSY)  # whose refusal says what a JPEG lacks
        return "picture" if is_lossy or any(suffix in PICTURES for suffix in suffixes) else "dicom"
    if path.name.lower().endswith(NIFTI):
        return "nifti"
    return {".npy": "npy", **dict.fromkeys(PICTURES, "picture")}.get(path.suffix.lower(), "unknown")


def open_volume(
    path: Path,
    wanted: str,
    *,
    orientation: str | None = None,
    rescale: tuple[float, float] | None = None,
    trained_on: TrainedOn | None = None,
    scratch: Path | None = None,
    series: str | None = None,
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

    Raises:
        InputError: If nothing stands there, or nothing that can be predicted.
    """
    if not path.exists():
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

        return open_nifti(path, wanted, rescale, scratch=scratch)
    if kind == "dicom":
        names = [one.name.lower() for one in path.iterdir() if not one.name.startswith(".")]
        if names and all(name.endswith((*NIFTI, ".npy")) for name in names):
            raise InputError(f"{path} is a folder of volumes; name them: {path}/*")
        from matchai.volumes.dicom import open_dicom  # noqa: PLC0415

        return open_dicom(path, wanted, rescale, scratch=scratch, series=series)
    suffix = path.suffix.lower()
    if suffix in (".dcm", ".ima"):
        raise InputError(f"{path} is one slice of a series; give the folder that holds the series, {path.parent}.")
    what = NO_CT.get(suffix, "of no kind that is known here")
    raise InputError(
        f"{path} is {what}; a prediction takes a .npy array, a .nii or .nii.gz file, or a folder of DICOM, PNG or TIFF "
        "files."
    )
