"""The distributed weighted sampler: one stream of weighted draws, dealt to any number of processes."""

from typing import TYPE_CHECKING

from matchai.system.lazy import lazy_exports

if TYPE_CHECKING:
    from matchai.sampling.draws import BalancedDraws, DistinctDraws, IndependentDraws
    from matchai.sampling.sampler import DistributedWeightedSampler, Draw, collate, micro_shares, share, slice_weights
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = [
    "BalancedDraws", "DistinctDraws", "DistributedWeightedSampler", "Draw", "IndependentDraws", "collate",
    "micro_shares", "share", "slice_weights",
]
