"""Files of images: NIfTI, DICOM, PNG, TIFF and `.npy` as volumes in HU, and masks back on the input's own grid."""

from typing import TYPE_CHECKING

from matchai.system.lazy import lazy_exports

# fmt: off
if TYPE_CHECKING:
    from matchai.volumes import nifti
    from matchai.volumes.grid import check_same_geometry
    from matchai.volumes.hounsfield import implausible_range
    from matchai.volumes.nifti import open_nifti
    from matchai.volumes.npy import open_array
    from matchai.volumes.open import TrainedOn, kind_of, open_volume
    from matchai.volumes.pictures import look_at, natural, open_pictures, pictures_in
    from matchai.volumes.volume import STEPS, UPRIGHT, Volume, file_labels, turn

__all__ = [
    "STEPS", "UPRIGHT", "TrainedOn", "Volume", "check_same_geometry", "file_labels", "implausible_range", "kind_of",
    "look_at", "natural", "nifti", "open_array", "open_nifti", "open_pictures", "open_volume", "pictures_in",
    "turn",
]
# fmt: on

__getattr__ = lazy_exports(__name__)
