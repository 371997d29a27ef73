"""From a folder to prepared slices: `arrays` opens every format for training; then caching, splits, augmentation."""

from typing import TYPE_CHECKING

from matchai.system.lazy import lazy_exports

if TYPE_CHECKING:
    from matchai.data.arrays import ArraySet, open_sets
    from matchai.data.augmentation import Augmentation
    from matchai.data.context import mirrored
    from matchai.data.dataset import (
        OF_VOLUMES, Data, built_in_phantom, digest_sets, group_slices, read_data, read_groups,
    )
    from matchai.data.pairs import DATASET_JSON, IMAGE_FOLDERS
    from matchai.data.inspection import inspect_slice, refuse_unfit
    from matchai.data.phantom import phantom_slices, write_phantom
    from matchai.data.prepared import (
        STEPS, THUMBNAIL, SliceDataset, Slices, bytes_per_slice, for_each_slice, prepare, quantise, resize, window,
    )
    from matchai.data.slice_set import SliceSet, Target, format_value
    from matchai.data.split import FoundGroups, assign_folds, find_groups
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = [
    "DATASET_JSON", "IMAGE_FOLDERS", "OF_VOLUMES", "STEPS", "THUMBNAIL", "ArraySet", "Augmentation", "Data",
    "FoundGroups", "SliceDataset", "SliceSet", "Slices", "Target", "assign_folds", "built_in_phantom",
    "bytes_per_slice", "digest_sets", "find_groups", "for_each_slice", "format_value", "group_slices", "inspect_slice",
    "mirrored", "open_sets", "phantom_slices", "prepare", "quantise", "read_data", "read_groups", "refuse_unfit",
    "resize", "window", "write_phantom",
]
