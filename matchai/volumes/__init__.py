"""Files of images: NIfTI, DICOM, PNG, TIFF and `.npy` as volumes in HU, and masks back on the input's own grid."""

from typing import TYPE_CHECKING

from matchai.system.lazy import lazy_exports

if TYPE_CHECKING:
    from matchai.volumes import nifti
    from matchai.volumes.grid import GridVolume, check_same_geometry
    from matchai.volumes.hounsfield import ValueCounts, count_values, implausible_values, raw_slice, replace_padding
    from matchai.volumes.kinds import LOSSY, NIFTI, PICTURES, TEXTS, has_suffix, why_unread
    from matchai.volumes.nifti import open_nifti
    from matchai.volumes.npy import axes_note, open_array
    from matchai.volumes.open import TrainedOn, kind_of, open_volume
    from matchai.volumes.pictures import PictureVolume, natural_key, open_pictures, pictures_in, read_picture_header
    from matchai.volumes.volume import STEPS, UPRIGHT, Volume, check_size, file_labels, format_shape, rescaled, turn
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = [
    "LOSSY", "NIFTI", "PICTURES", "STEPS", "TEXTS", "UPRIGHT", "GridVolume", "PictureVolume", "TrainedOn",
    "ValueCounts", "Volume", "axes_note", "check_same_geometry", "check_size", "count_values", "file_labels",
    "format_shape", "has_suffix", "implausible_values", "kind_of", "natural_key", "nifti", "open_array", "open_nifti",
    "open_pictures", "open_volume", "pictures_in", "raw_slice", "read_picture_header", "replace_padding", "rescaled",
    "turn", "why_unread",
]
