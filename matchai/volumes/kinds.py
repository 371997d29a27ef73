"""What a file's name says of its format."""

from pathlib import Path

NIFTI = (".nii.gz", ".nii")
"""The ends of NIfTI files' names, in lower case."""

PICTURES = (".png", ".tif", ".tiff")
"""Of pictures."""

LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif")
"""Of pictures that are refused, as they do not keep their numbers."""

TEXTS = (
    ".txt",
    ".md",
    ".rst",
    ".json",
    ".csv",
    ".tsv",
    ".yaml",
    ".yml",
    ".xml",
    ".html",
    ".log",
    ".pdf",
    ".xlsx",
    ".docx",
)
"""Of files that lie beside scans and tell of them."""

PACKED = (".zip", ".gz", ".tgz", ".tar", ".bz2", ".xz", ".7z", ".rar", ".zst", ".part")
"""Of files that may hold others, or a part of one."""

UNREAD = {
    **dict.fromkeys(LOSSY, "a JPEG, whose compression has lost HU"),
    ".npz": "an archive of arrays: save one with numpy.save",
    ".zip": "a zip archive: unpack it",
    **dict.fromkeys((".mha", ".mhd"), "a MetaImage"),
    **dict.fromkeys((".nrrd", ".nhdr"), "an NRRD file"),
    **dict.fromkeys((".hdr", ".img", ".hdr.gz", ".img.gz"), "half of a .hdr/.img pair"),
}
"""Formats that are not read, and what they are in words, by the end of the name."""

VOLUMES = (*NIFTI, ".npy", *(end for end in UNREAD if end not in (*LOSSY, ".zip")))
"""Of files that may hold a scan each."""


def has_suffix(path: Path, ends: tuple[str, ...]) -> bool:
    """Whether a file's name ends so, in whatever case."""
    return path.name.lower().endswith(ends)


def why_unread(path: Path) -> str | None:
    """What a file of a format that is not read is, and how to convert it, for a sentence; None for all others."""
    end = next((end for end in UNREAD if has_suffix(path, (end,))), None)
    if end is None:
        return None
    if end in (".hdr", ".img", ".hdr.gz", ".img.gz"):
        command = f"import nibabel; nibabel.save(nibabel.load('{path.name}'), 'scan.nii.gz')"
    elif end in (".mha", ".mhd", ".nrrd", ".nhdr"):
        command = f"import SimpleITK as s; s.WriteImage(s.ReadImage('{path.name}'), 'scan.nii.gz')"
    else:
        return UNREAD[end]
    return f'{UNREAD[end]}; convert it to NIfTI: `python -c "{command}"`'
