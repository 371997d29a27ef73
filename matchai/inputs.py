"""From a path that a user names to a `Volume`, whatever kind of file or folder stands there."""

from pathlib import Path

from matchai.errors import InputError
from matchai.volumes import UPRIGHT, Volume, open_array_volume

PICTURES = (".png", ".tif", ".tiff")
NO_CT = {
    **dict.fromkeys((".jpg", ".jpeg"), "a JPEG, whose compression has lost HU"),
    ".npz": "an archive of arrays: save one with numpy.save",
    ".zip": "a zip archive: unpack it",
    ".mha": "a MetaImage: convert it to NIfTI",
    ".mhd": "a MetaImage: convert it to NIfTI",
    ".nrrd": "an NRRD file: convert it to NIfTI",
}


def open_volume(
    path: Path,
    wanted: str,
    *,
    orientation: str | None = None,
    rescale: tuple[float, float] | None = None,
    array_rescale: tuple[float, float] = (1.0, 0.0),
    scratch: Path | None = None,
    series: str | None = None,
) -> Volume:
    """Opens a `.npy` array, a NIfTI file, a folder with a DICOM series, a folder of pictures, or one such file.

    Args:
        path: The file or folder.
        wanted: The orientation to turn volumes to that know theirs (`matchai.config`).
        orientation: How slices lie that cannot tell; None for `wanted` in arrays, upright in pictures.
        rescale: Slope and intercept that make HU of the file's numbers; None for none in NIfTI and DICOM.
        array_rescale: Those of arrays and pictures where `rescale` is None.
        scratch: Folder for temporary files; None for the system's.
        series: Number of the DICOM series to take from a folder of several.

    Raises:
        InputError: If nothing stands there, or nothing that can be predicted.
    """
    # each kind needs its own libraries, which the others do without
    suffix = path.suffix.lower()
    if not path.exists():
        raise InputError(
            f"{path} does not exist; give a .npy array, a .nii or .nii.gz file, or a folder of DICOM or picture files."
        )
    if path.is_dir():
        names = [one.name.lower() for one in path.iterdir() if not one.name.startswith(".")]
        if any(name.endswith(PICTURES) for name in names):
            return _open_pictures(path, orientation or UPRIGHT, rescale or array_rescale)
        if names and all(name.endswith((".nii", ".nii.gz", ".npy")) for name in names):
            raise InputError(f"{path} is a folder of volumes; name them: {path}/*")
        from matchai.dicom import open_dicom  # noqa: PLC0415

        return open_dicom(path, wanted, rescale or (1.0, 0.0), scratch=scratch, series=series)
    if suffix == ".npy":
        return open_array_volume(path, orientation or wanted, rescale or array_rescale)
    if path.name.lower().endswith((".nii", ".nii.gz")):
        from matchai.nifti import open_nifti  # noqa: PLC0415

        return open_nifti(path, wanted, rescale or (1.0, 0.0), scratch=scratch)
    if suffix in PICTURES:
        return _open_pictures(path, orientation or UPRIGHT, rescale or array_rescale)
    if suffix in (".dcm", ".ima"):
        raise InputError(f"{path} is one slice of a series; give the folder that holds the series, {path.parent}.")
    what = NO_CT.get(suffix, "of no kind that is known here")
    raise InputError(
        f"{path} is {what}; a prediction takes a .npy array, a .nii or .nii.gz file, or a folder of DICOM, PNG or TIFF "
        "files."
    )


def _open_pictures(path: Path, orientation: str, rescale: tuple[float, float]) -> Volume:
    from matchai.pictures import open_pictures  # noqa: PLC0415

    return open_pictures(path, orientation, rescale)
