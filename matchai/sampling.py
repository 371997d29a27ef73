"""The weighted sampler: which slice is the t-th draw of an epoch, as a pure function of (seed, epoch, t).

Usable without the rest of matchai, as the batch sampler of anyone's DataLoader:

>>> sampler = DistributedWeightedSampler([1.0, 3.0, 0.0], batch_size=2, seed=7)
>>> len(sampler), all(draw != 2 for batch in sampler for draw in batch)
(2, True)
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch.distributed
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Sampler

BLOCK = 64  # weights a block: the table of N = 10^8 then takes 12.5 MB, and a draw reads one cache line or four
_STREAM = 0x5A3B  # keeps the sampler's random words apart from those of augmentation and drop path


class Draw(int):
    """A slice's index that remembers which draw it is, so that randomness can be keyed by (seed, epoch, position).

    Attributes:
        epoch: The epoch of the draw.
        position: Its place t in the epoch's stream of draws, over all processes, from 0.
    """

    epoch: int
    position: int

    def __new__(cls, index: int, epoch: int, position: int) -> "Draw":
        """Makes slice `index` the draw at `position` of `epoch`."""
        draw = super().__new__(cls, index)
        draw.epoch, draw.position = epoch, position
        return draw

    def __reduce__(self) -> tuple[Any, ...]:
        return Draw, (int(self), self.epoch, self.position)


class DistributedWeightedSampler(Sampler[list[int]]):
    """Deals one stream of weighted draws, with replacement, to any number of processes in global batches.

    Draw t takes slice i with probability w_i / Σw. The words behind it come from the counter-based generator
    Philox 4x64 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with the key made of (seed,
    epoch) and the counter t, so no process draws for another, and going on at any draw costs nothing. Its state is
    three integers and holds for every number of processes and every batch size.

    Args:
        weights: (N,) non-negative numbers, not necessarily normalised; a memory-mapped array stays on disk.
        batch_size: Draws of one step over all processes.
        num_samples: Draws of one epoch, D (default: N).
        seed: Non-negative integer.
        num_processes: Processes that share each step (default: those of the running process group, else 1).
        process_index: Which of them this is (default: the group's rank, else 0).

    Raises:
        ValueError: For negative, non-finite or all-zero weights, a wrong shape, or an index out of range.
    """

    def __init__(
        self,
        weights: ArrayLike,
        batch_size: int,
        num_samples: int | None = None,
        *,
        seed: int = 0,
        num_processes: int | None = None,
        process_index: int | None = None,
    ) -> None:
        grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
        if num_processes is None:
            running = torch.distributed.get_world_size() if grouped else 1
        self.num_processes = running if num_processes is None else num_processes
        if process_index is None:
            process_index = torch.distributed.get_rank() if grouped and num_processes is None else 0
        self.process_index = process_index
        self.weights = np.asanyarray(weights)
        self._block_ends = np.cumsum(_block_sums(self.weights))
        self.batch_size = batch_size
        self.num_samples = len(self.weights) if num_samples is None else num_samples
        self.seed = seed
        self.epoch = 0
        self.consumed = 0
        for name, value, low in (
            ("batch_size", batch_size, 1),
            ("num_samples", self.num_samples, 1),
            ("num_processes", self.num_processes, 1),
            ("seed", seed, 0),
        ):
            if value < low:
                raise ValueError(f"{name} is {value}, but must be at least {low}.")
        if not 0 <= process_index < self.num_processes:
            raise ValueError(f"process_index is {process_index}, but must be 0 to {self.num_processes - 1}.")
        self._spent = False

    def __len__(self) -> int:
        """Steps of a whole epoch, the same on every process."""
        return math.ceil(self.num_samples / self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Goes to the start of another epoch; naming the current one changes nothing, so a loaded position stays."""
        if epoch != self.epoch:
            self.epoch, self.consumed, self._spent = epoch, 0, False

    def state_dict(self) -> dict[str, int]:
        """The position: `seed`, `epoch`, and `consumed`, the draws dealt so far over all processes."""
        return {"seed": self.seed, "epoch": self.epoch, "consumed": self.consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from a position, on whatever number of processes or batch size it was stored.

        Raises:
            ValueError: If `consumed` is not a count of this epoch's draws.
        """
        if not 0 <= state["consumed"] <= self.num_samples:
            raise ValueError(f"consumed is {state['consumed']}, but an epoch has {self.num_samples} draws.")
        self.seed, self.epoch, self.consumed = state["seed"], state["epoch"], state["consumed"]
        self._spent = False

    def __iter__(self) -> Iterator[list[int]]:
        """Yields this process's share of each remaining step as a list of `Draw`; a share may be empty."""
        if self.consumed >= self.num_samples:
            if not self._spent:
                warnings.warn(f"Epoch {self.epoch} is used up; call set_epoch to go on.", stacklevel=2)
            self._spent = True
        while self.consumed < self.num_samples:
            size = min(self.batch_size, self.num_samples - self.consumed)
            start, stop = share(size, self.num_processes, self.process_index)
            first = self.consumed + start
            indices = self._draw(first, stop - start)
            self.consumed += size
            yield [Draw(int(index), self.epoch, first + k) for k, index in enumerate(indices)]

    def _draw(self, first: int, count: int) -> NDArray[np.int64]:
        """The slices of draws `first` to `first + count`: a block by its sum, then a slice within the block."""
        key = np.random.SeedSequence((_STREAM, self.seed, self.epoch)).generate_state(2, np.uint64)
        words = np.random.Philox(key=key, counter=first).random_raw(4 * count).reshape(count, 4)
        # 53 bits make a uniform double in [0, 1), so uniform * sum < sum: an item past the last is never met
        uniform = (words[:, :2] >> np.uint64(11)) * 2.0**-53
        block = np.searchsorted(self._block_ends, uniform[:, 0] * self._block_ends[-1], side="right")
        places = block[:, None] * BLOCK + np.arange(BLOCK)
        inside = places < len(self.weights)
        weights = np.where(inside, self.weights[np.where(inside, places, 0)], 0).astype(np.float64)
        ends = np.cumsum(weights, axis=1)
        within = (ends <= (uniform[:, 1] * ends[:, -1])[:, None]).sum(axis=1)
        return np.asarray(block * BLOCK + within, dtype=np.int64)


def share(size: int, num_processes: int, process_index: int) -> tuple[int, int]:
    """The part (start, stop) of a batch that a process computes, as even as it goes: 6 on 4 is 2 + 2 + 1 + 1."""
    each, rest = divmod(size, num_processes)
    start = process_index * each + min(process_index, rest)
    return start, start + each + (process_index < rest)


def slice_weights(
    presence: NDArray[np.bool_], target_classes: Sequence[int], sampler_weight: float
) -> NDArray[np.float64]:
    """Weights of the draw: `sampler_weight` for a slice that shows a target class, 1 for another.

    Args:
        presence: (N, C) bool, whether class c appears in slice n.
        target_classes: Indices of the classes that make a slice a target.
        sampler_weight: How many times as often a target slice is drawn as another.

    Returns:
        (N,) float64.
    """
    is_target = presence[:, list(target_classes)].any(axis=1)
    return np.where(is_target, float(sampler_weight), 1.0)


def _block_sums(weights: NDArray[Any]) -> NDArray[np.float64]:
    """(ceil(N / BLOCK),) float64 sums, read 2^20 weights (8 MB) at a time.

    Raises:
        ValueError: If the weights are no weights.
    """
    if weights.ndim != 1 or len(weights) == 0 or weights.dtype.kind not in "fiub":
        raise ValueError(f"weights are {weights.dtype} of shape {weights.shape}, but must be numbers of shape (N,).")
    sums = np.zeros(-(-len(weights) // BLOCK))
    for start in range(0, len(weights), 1 << 20):
        piece = weights[start : start + (1 << 20)].astype(np.float64)
        if not (np.isfinite(piece).all() and (piece >= 0).all()):
            bad = int(np.flatnonzero(~(np.isfinite(piece) & (piece >= 0)))[0])
            raise ValueError(f"weight {start + bad} is {piece[bad]}, but weights must be finite and not negative.")
        piece = np.pad(piece, (0, -len(piece) % BLOCK)).reshape(-1, BLOCK).sum(axis=1)
        sums[start // BLOCK : start // BLOCK + len(piece)] = piece
    if not np.isfinite(sums.sum()):
        raise ValueError("the weights add up to infinity; scale them down.")
    if 0 < sums.sum() < np.finfo(np.float64).tiny:
        raise ValueError("the weights add up to less than a double can divide; scale them up.")
    if not sums.any():
        raise ValueError("all weights are 0, so there is nothing to draw.")
    return sums
