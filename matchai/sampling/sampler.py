"""The weighted sampler: deals one stream of weighted draws to any number of processes, a pure function of the seed.

Usable without the rest of matchai, as the batch sampler of anyone's DataLoader:

>>> sampler = DistributedWeightedSampler([1.0, 3.0, 0.0], batch_size=2, seed=7)
>>> len(sampler), all(draw != 2 for batch in sampler for draw in batch)
(2, True)
"""

import copy
import math
import operator
import warnings
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import Sampler, default_collate, get_worker_info

from matchai.sampling.draws import BalancedDraws, DistinctDraws, IndependentDraws, check_shape


class Draw(int):
    """A slice's index that remembers which draw it is, so that randomness can be keyed by (seed, epoch, position).

    Attributes:
        epoch: The epoch of the draw.
        position: Its place t in the epoch's stream of draws, over all processes, from 0.

    >>> draw = Draw(2, epoch=1, position=40)
    >>> "abc"[draw], draw.epoch, draw.position
    ('c', 1, 40)
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
    """A batch sampler that deals one stream of weighted draws to any number of processes in global batches.

    Iterating yields one list a step: this process's share of the step's global batch, which may be empty. Draw t of an
    epoch is a pure function of (seed, epoch, t), so no process draws for another, and going on at any draw costs
    nothing. The state is three integers and holds for every number of processes and every batch size. A loader that
    prefetches is ahead of the loop that it feeds: there the loop knows what was consumed, `batch_size` draws a step.

    It deals by process itself: a DataLoader over it must not be sharded again, so do not pass it to Accelerate's
    `prepare`.

    Args:
        weights: (N,) non-negative numbers, not necessarily normalised; a memory-mapped array stays on disk.
        batch_size: Draws of one step over all processes.
        num_samples: Draws of one epoch, D (default: N; without replacement, the number of weights above 0).
        replacement: Whether draws are independent of each other, draw t taking item i with probability w_i / Σw. If
            not, each draw takes one of the items left, in proportion to their weights; an epoch then begins in O(N).
        balanced: Whether the counts of an epoch are those expected, D w_i / Σw, as nearly as whole numbers allow
            (see `matchai.sampling.draws.BalancedDraws`).
        seed: Non-negative integer.
        num_processes: Processes that share each step (default: those of the running process group, else 1).
        process_index: Which of them this is (default: the group's rank, else 0).
        accumulate: Micro-batches of a step. The list then holds this process's share of the first, followed by that
            of the second and so on (`micro_shares` tells the sizes), so that every micro-batch consists of the same
            draws on any number of processes.

    Raises:
        ValueError: For negative, non-finite or all-zero weights, a wrong shape, an index out of range, more draws than
            items without replacement, or draws that are to be balanced and without replacement at once.
        TypeError: If a number is not whole.

    Two processes share the batches of one:

    >>> settings = {"batch_size": 4, "num_samples": 8, "seed": 7}
    >>> list(DistributedWeightedSampler([1.0, 3.0, 0.0], **settings))
    [[1, 1, 0, 1], [1, 1, 1, 0]]
    >>> list(DistributedWeightedSampler([1.0, 3.0, 0.0], **settings, num_processes=2, process_index=1))
    [[0, 1], [1, 0]]
    """

    def __init__(
        self,
        weights: ArrayLike,
        batch_size: int,
        num_samples: int | None = None,
        *,
        replacement: bool = True,
        balanced: bool = False,
        seed: int = 0,
        num_processes: int | None = None,
        process_index: int | None = None,
        accumulate: int = 1,
    ) -> None:
        grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
        world, rank = (torch.distributed.get_world_size(), torch.distributed.get_rank()) if grouped else (1, 0)
        if isinstance(weights, Tensor):
            weights = weights.detach().cpu()
            weights = weights.float() if weights.dtype == torch.bfloat16 else weights  # which numpy does not have
        weights = check_shape(np.asanyarray(weights))
        self.batch_size, self.seed = _whole("batch_size", batch_size, 1), _whole("seed", seed, 0)
        self.num_processes = _whole("num_processes", world if num_processes is None else num_processes, 1)
        self.process_index = _whole("process_index", rank if process_index is None else process_index)
        if not 0 <= self.process_index < self.num_processes:
            raise ValueError(f"process_index is {self.process_index}, but must be 0 to {self.num_processes - 1}.")
        self.accumulate = _whole("accumulate", accumulate, 1)
        if balanced and not replacement:
            raise ValueError("balanced draws repeat an item as often as is expected: they need replacement=True.")
        self.draws: IndependentDraws | DistinctDraws | BalancedDraws
        if replacement:
            self.num_samples = _whole("num_samples", len(weights) if num_samples is None else num_samples, 1)
            self.draws = BalancedDraws(weights, self.num_samples) if balanced else IndependentDraws(weights)
        else:
            self.draws = DistinctDraws(weights)
            most = self.draws.num_items
            self.num_samples = _whole("num_samples", most if num_samples is None else num_samples, 1)
            if self.num_samples > most:
                raise ValueError(
                    f"num_samples is {self.num_samples}, but without replacement there are {most} draws at most, one "
                    "for every weight above 0."
                )
        self.epoch = 0
        self.consumed = 0
        self._is_used_up = False

    def __len__(self) -> int:
        """Steps of a whole epoch, the same on every process."""
        return math.ceil(self.num_samples / self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Goes to the start of another epoch; naming the current one changes nothing, so a loaded position stays."""
        epoch = _whole("epoch", epoch, 0)
        if epoch != self.epoch:
            self.epoch, self.consumed, self._is_used_up = epoch, 0, False

    def state_dict(self) -> dict[str, int]:
        """The position: `seed`, `epoch`, and `consumed`, the draws dealt so far over all processes."""
        return {"seed": self.seed, "epoch": self.epoch, "consumed": self.consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from a position, on whatever number of processes or batch size it was stored.

        Raises:
            ValueError: If `consumed` is not a count of this epoch's draws, or the state is no sampler's.
        """
        missing = [name for name in ("seed", "epoch", "consumed") if name not in state]
        if missing:
            raise ValueError(f"the state has no {missing[0]}, but a sampler's has seed, epoch and consumed.")
        seed, epoch, consumed = (_whole(name, state[name]) for name in ("seed", "epoch", "consumed"))
        if min(seed, epoch) < 0:
            raise ValueError(f"seed and epoch are {seed} and {epoch}, but must be at least 0.")
        if not 0 <= consumed <= self.num_samples:
            raise ValueError(f"consumed is {consumed}, but an epoch has {self.num_samples} draws.")
        self.seed, self.epoch, self.consumed, self._is_used_up = seed, epoch, consumed, False

    def __iter__(self) -> Iterator[list[int]]:
        """Yields this process's share of each remaining step as a list of `Draw`; a share may be empty."""
        if self.consumed >= self.num_samples:
            if not self._is_used_up:
                warnings.warn(f"Epoch {self.epoch} is used up; call set_epoch to continue.", stacklevel=2)
            self._is_used_up = True
        while self.consumed < self.num_samples:
            size = min(self.batch_size, self.num_samples - self.consumed)
            base = self.consumed
            self.consumed += size
            draws: list[int] = []
            for start, stop in micro_shares(size, self.accumulate, self.num_processes, self.process_index):
                items = self.draws.items(self.seed, self.epoch, base + start, stop - start).tolist()
                draws += [Draw(item, self.epoch, base + start + k) for k, item in enumerate(items)]
            yield draws


def _whole(name: str, value: Any, least: float = -math.inf) -> int:
    """A whole number of any integer type, as int."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}, but must be a whole number.") from None
    if number < least:
        raise ValueError(f"{name} is {number}, but must be at least {least}.")
    return number


def share(size: int, num_processes: int, process_index: int) -> tuple[int, int]:
    """The part (start, stop) of a batch that a process computes, as even as it goes: 6 on 4 is 2 + 2 + 1 + 1.

    >>> [share(6, num_processes=4, process_index=index) for index in range(4)]
    [(0, 2), (2, 4), (4, 5), (5, 6)]
    """
    each, rest = divmod(size, num_processes)
    start = process_index * each + min(process_index, rest)
    return start, start + each + (process_index < rest)


def micro_shares(size: int, accumulate: int, num_processes: int, process_index: int) -> list[tuple[int, int]]:
    """The parts (start, stop) of a batch that a process computes, one of each micro-batch of the whole batch.

    The batch is cut into `accumulate` micro-batches, as even as it goes and none of them empty, and each of these is
    shared by the processes.

    >>> micro_shares(6, accumulate=2, num_processes=2, process_index=1)
    [(2, 3), (5, 6)]
    """
    parts = []
    num_parts = min(accumulate, size)
    for number in range(num_parts):
        begin, end = share(size, num_parts, number)
        start, stop = share(end - begin, num_processes, process_index)
        parts.append((begin + start, begin + stop))
    return parts


class _Collate:
    """Makes a batch of items as torch's `default_collate` does; of no items, one of the same structure with B = 0.

    What an item looks like is told by `like`; without it, by the data set where a worker collates, else by the items
    that this process collated last.

    Args:
        items: The items, in the structures that `default_collate` takes; may be empty.
        like: An item, such as `dataset[0]`.

    Raises:
        ValueError: If there are no items, and nothing tells what one looks like.

    >>> images, labels = collate([], like=(torch.zeros(1, 32, 32), 3))
    >>> images.shape, labels.dtype
    (torch.Size([0, 1, 32, 32]), torch.int64)
    """

    def __init__(self) -> None:
        self.like: Any = None

    def __call__(self, items: Sequence[Any], like: Any = None) -> Any:
        """Makes the batch."""
        if items:
            self.like = items[-1]
            return default_collate(list(items))
        worker = get_worker_info()
        if like is None and worker is not None:
            like = worker.dataset[Draw(0, 0, 0)]
        like = self.like if like is None else like
        if like is None:
            raise ValueError(
                "an empty share came before any item: give one, collate_fn=functools.partial(collate, like=dataset[0])."
            )
        return _emptied(default_collate([like]))


collate = _Collate()
"""Collates a process's share of a step, which may be empty; for a DataLoader's `collate_fn`."""


def _emptied(batch: Any) -> Any:
    """The batch without its items: tensors (0, ...)."""
    if isinstance(batch, Tensor):
        return batch[:0].detach().clone()
    if isinstance(batch, MutableMapping):
        emptied = copy.copy(batch)
        emptied.update({name: _emptied(value) for name, value in batch.items()})
        return emptied
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(_emptied, batch))
    if isinstance(batch, list | tuple):
        # what is left of texts is a list of them, one an item
        return type(batch)(_emptied(value) for value in batch if not isinstance(value, str | bytes))
    return batch


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

    >>> slice_weights(np.array([[True, False], [True, True]]), target_classes=[1], sampler_weight=3)
    array([1., 3.])
    """
    is_target = presence[:, list(target_classes)].any(axis=1)
    return np.where(is_target, float(sampler_weight), 1.0)
