"""The network and its loss: a UNet++, batch norm and dropout that do not depend on the number of processes."""

from typing import TYPE_CHECKING

from matchai.system.lazy import lazy_exports

if TYPE_CHECKING:
    from matchai.model.cpu_layers import use_fast_layers
    from matchai.model.dropout import KeyedDropPath, KeyedDropout, KeyedLayer, key_dropout, keyed_layers, set_dropout
    from matchai.model.joined_forward import JoinedForward
    from matchai.model.losses import SegmentationLoss, balanced_class_weights, soften
    from matchai.model.normalisation import (
        SyncBatchNorm, gather_processes, join_buffers, local_norms, sum_dtype, synchronise, synchronise_processes,
    )
    from matchai.model.unetplusplus import PROBE_SIZE, build_model, encoder_names, probe, smp, weights_place
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = [
    "PROBE_SIZE", "JoinedForward", "KeyedDropPath", "KeyedDropout", "KeyedLayer", "SegmentationLoss", "SyncBatchNorm",
    "balanced_class_weights", "build_model", "encoder_names", "gather_processes", "join_buffers", "key_dropout",
    "keyed_layers", "local_norms", "probe", "set_dropout", "smp", "soften", "sum_dtype", "synchronise",
    "synchronise_processes", "use_fast_layers", "weights_place",
]
