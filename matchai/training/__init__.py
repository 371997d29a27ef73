"""The training loop: a step, an epoch, a validation pass, and the state that a run saves and resumes from."""

from typing import TYPE_CHECKING

from matchai.system.lazy import lazy_exports

if TYPE_CHECKING:
    from matchai.training import checkpoint
    from matchai.training.build import (
        build_model_of, build_training, dataset_of, end_workers, slice_weights_of, step_problems,
    )
    from matchai.training.checkpoint import (
        BEST, LAST, State, is_free, load_about, load_state, load_weights, pack_weights, save_state,
    )
    from matchai.training.loop import DivergedError, Training, count_step, predict, train_epoch, validate
    from matchai.training.meters import EpochMeter, epoch_row
    from matchai.training.resume import Progress, collect, restore
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = [
    "BEST", "LAST", "DivergedError", "EpochMeter", "Progress", "State", "Training", "build_model_of", "build_training",
    "checkpoint", "collect", "count_step", "dataset_of", "end_workers", "epoch_row", "is_free", "load_about",
    "load_state", "load_weights", "pack_weights", "predict", "restore", "save_state", "slice_weights_of",
    "step_problems", "train_epoch", "validate",
]
