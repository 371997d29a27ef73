"""A step whose bits do not depend on how many processes share it: every slice alone, every sum in the slices' order.

Kernels round differently for batches of different sizes and for different numbers of threads, and sums differ with
their order. So each slice of the global batch runs alone on a thread of its own with one core, through a copy of the
model that shares the parameters. The slices meet at every batch norm, where the statistics of all slices of the batch,
on all processes, are merged in the slices' order; their gradients are added up in that order too.
"""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from matchai.model import SegmentationLoss, gather_processes, keyed_layers, set_dropout, synchronise
from matchai.sampling import share


class DeterministicGradient:
    """Computes the gradient of a global batch, bit for bit the same on any number of processes of like CPUs.

    It needs `torch.set_num_threads(1)`; parallel are the slices.

    Args:
        model: Trained on a CPU; its parameters and buffers are used, not its modules.
        batch_size: Slices of the largest global batch.
        num_processes: Processes that share a batch as `matchai.sampling.sampler.share` says.
        process_index: Which of them this is.
        loss: The loss.
        seed: Seed of the run.
        autocast: Makes the context of the forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_size: int,
        num_processes: int,
        process_index: int,
        *,
        loss: SegmentationLoss,
        seed: int,
        autocast: Callable[[], Any],
    ) -> None:
        self.loss, self.seed, self.autocast = loss, seed, autocast
        self.num_processes, self.process_index = num_processes, process_index
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.sizes = [parameter.numel() for parameter in self.parameters]
        self.exchange = _Exchange(num_processes)
        largest = max(1, share(batch_size, num_processes, 0)[1])
        self.copies = []
        for number in range(largest):
            shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
            one = copy.deepcopy(model, shared)
            synchronise(one, self.exchange.gather_of(number), is_updating=number == 0)
            self.copies.append(one)
        self.keyed = [keyed_layers(one) for one in self.copies]
        # told to each thread, as some kernels ask OpenMP before torch has passed its own number on
        self.pool = ThreadPoolExecutor(largest, "slice", lambda: torch.set_num_threads(1))

    def gradient(self, images: Tensor, target: Tensor, positions: list[int], *, num_draws: int, epoch: int) -> Tensor:
        """Sets every parameter's `grad` to that of the global batch's loss.

        Args:
            images: (B, 2 · context + 1, S, S) this process's share; B may be 0.
            target: (B, S, S).
            positions: (B,) places of the draws in the epoch.
            num_draws: Slices of the global batch.
            epoch: The epoch.

        Returns:
            The loss of the global batch, a scalar.
        """
        bounds = [share(num_draws, self.num_processes, process) for process in range(self.num_processes)]
        # a process without a share takes part with a batch of no slices, as its batch norms must meet the others
        num_parts = max(1, len(images))
        self.exchange.open([stop - start for start, stop in bounds], num_parts)

        def compute(number: int) -> tuple[Tensor, Tensor]:
            try:
                model = self.copies[number].train()
                part = slice(number, number + 1)
                set_dropout(self.keyed[number], self.seed, epoch, positions[part])
                with self.autocast():
                    logits = model(images[part])
                sums = self.loss.sums(logits, target[part])
                total = self.exchange.gather_of(number)(sums.detach().double()).sum(0)
                value, slopes = self.loss.value_and_slopes(total.to(sums.dtype))
                grads = torch.autograd.grad((slopes * sums).sum(), self.parameters)
                return value, torch.cat([grad.flatten() for grad in grads])
            except BaseException as error:
                self.exchange.fail(error)
                raise

        results = list(self.pool.map(compute, range(num_parts)))
        flat = self._added_up([flat for _, flat in results])
        for parameter, grad in zip(self.parameters, torch.split(flat, self.sizes), strict=True):
            parameter.grad = torch.empty_like(parameter).copy_(grad.view(parameter.shape))
        return results[0][0]

    def _added_up(self, flats: list[Tensor]) -> Tensor:
        """The sum of all slices' gradients, in the slices' order: a chain through the processes, then a broadcast."""
        total = torch.zeros_like(flats[0])
        last = self.num_processes - 1
        if self.process_index > 0:
            dist.recv(total, self.process_index - 1)
        for flat in flats:
            total += flat
        if self.process_index < last:
            dist.send(total, self.process_index + 1)
        if last:
            dist.broadcast(total, last)
        return total


class _Exchange:
    """Where the slices of a batch exchange vectors: each waits until all have come, and gets all in their order."""

    def __init__(self, num_processes: int) -> None:
        self.num_processes = num_processes

    def open(self, sizes: list[int], num_parts: int) -> None:
        """Makes ready for a batch of which every process has `sizes` slices, and this one `num_parts` threads."""
        self.sizes = sizes
        self.vectors = [torch.empty(0)] * num_parts
        self.failure: BaseException | None = None
        self.barrier = threading.Barrier(num_parts, self._exchange)

    def fail(self, error: BaseException) -> None:
        """Lets every waiting slice go, with the error of the one that failed."""
        self.failure = self.failure or error
        self.barrier.abort()

    def gather_of(self, slice_number: int) -> Callable[[Tensor], Tensor]:
        """The exchange as the slice on one thread uses it: (n,) to (slices of the batch, n)."""

        def gather(vector: Tensor) -> Tensor:
            self.vectors[slice_number] = vector
            try:
                self.barrier.wait()
            except threading.BrokenBarrierError as error:
                raise self.failure or error from None
            return self.result

        return gather

    def _exchange(self) -> None:
        try:
            self.result = self._exchanged(torch.stack(self.vectors))
        except BaseException as error:
            self.failure = error  # before the barrier lets the others go
            raise

    def _exchanged(self, own: Tensor) -> Tensor:
        if self.num_processes == 1:
            return own
        # gathered at the size of the largest share
        padded = torch.zeros(max(1, *self.sizes), own.shape[1], dtype=own.dtype)
        padded[: len(own)] = own
        parts = gather_processes(padded.flatten()).view(self.num_processes, *padded.shape)
        return torch.cat([part[:size] for part, size in zip(parts, self.sizes, strict=True)])
