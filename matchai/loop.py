"""The training loop: a step, an epoch of steps, a validation pass."""

import contextlib
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from matchai.dropout import set_dropout
from matchai.keys import seed_sequence
from matchai.lockstep import Lockstep
from matchai.losses import SegmentationLoss
from matchai.metrics import Counts, confusion_counts
from matchai.sampling import DistributedWeightedSampler, micro_shares

MAX_SKIPPED = 10  # steps in a row without a finite gradient before the run ends
_STREAM = 0xD20  # keeps these random numbers apart from all others


class DivergedError(RuntimeError):
    """The loss or the gradient was not finite for `MAX_SKIPPED` steps in a row."""


@dataclass
class Tally:
    """What an epoch has added up so far; stored with the state, so that an interrupted epoch's figures are whole.

    Attributes:
        consumed: Draws of the epoch that were used, over all processes.
        loss_sum: Sum over steps of loss times draws.
        num_draws: The draws behind it.
        skipped: Steps skipped in this epoch.
        seconds: Time spent in the steps.
        waited: Of it, time spent waiting for data.
        lr: Learning rate of the last step.
    """

    consumed: int = 0
    loss_sum: float = 0.0
    num_draws: int = 0
    skipped: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    lr: float = 0.0


@dataclass
class Training:
    """The parts that a step needs, and where it stands.

    Attributes:
        accelerator: Devices, precision, processes.
        model: As prepared by the accelerator.
        loss: The loss.
        optimizer: As prepared by the accelerator.
        scheduler: Stepped once a step; not prepared, as Accelerate would step it once a process.
        sampler: Deals the draws.
        loader: Loads them, a process's share of a step at a time.
        val_loader: This process's validation slices.
        num_val_batches: Batches of the process that has most of them.
        lockstep: Computes gradients slice by slice where their bits must not depend on the processes, else None.
        ema: Moving average of the weights, or None.
        seed: Seed of the run.
        clip_grad_norm: Largest gradient norm; 0 for none.
        is_asked_to_stop: Whether a signal came.
        step: Optimiser steps done or skipped.
        skipped_in_row: Steps skipped since the last good one.
    """

    accelerator: Accelerator
    model: nn.Module
    loss: SegmentationLoss
    optimizer: Any
    scheduler: OneCycleLR
    sampler: DistributedWeightedSampler
    loader: DataLoader[Any]
    val_loader: DataLoader[Any]
    num_val_batches: int
    lockstep: Lockstep | None
    ema: AveragedModel | None
    seed: int
    clip_grad_norm: float
    is_asked_to_stop: Callable[[], bool]
    step: int = 0
    skipped_in_row: int = 0
    parameters: list[nn.Parameter] = field(init=False)
    buffers: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.buffers = list(self.model.buffers())

    @property
    def raw_model(self) -> nn.Module:
        """The model without the accelerator's wrapping."""
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        return model

    @property
    def validated_model(self) -> nn.Module:
        """The model that is validated and kept: the moving average where there is one."""
        return self.ema.module if self.ema else self.raw_model


def train_epoch(training: Training, epoch: int, tally: Tally, after_step: Callable[[bool], None]) -> None:
    """Runs the steps of an epoch that `tally` does not count yet.

    Args:
        training: The parts.
        epoch: From 1.
        tally: Updated after every step.
        after_step: Called after every step, with whether all processes have agreed to stop; may raise to leave.

    Raises:
        DivergedError: After `MAX_SKIPPED` skipped steps in a row.
    """
    sampler = training.sampler
    if tally.consumed >= sampler.num_samples:
        return
    sampler.load_state_dict({"seed": training.seed, "epoch": epoch, "consumed": tally.consumed})
    training.model.train()
    last = time.perf_counter()
    for images, target, positions in training.loader:
        waited = time.perf_counter() - last
        num_draws = min(sampler.batch_size, sampler.num_samples - tally.consumed)
        tally.lr = float(training.scheduler.get_last_lr()[0])
        loss, is_done, is_stopping = train_step(training, epoch, num_draws, images, target, positions.tolist())
        training.scheduler.step()
        training.step += 1
        training.skipped_in_row = 0 if is_done else training.skipped_in_row + 1
        tally.consumed += num_draws
        if is_done:
            tally.loss_sum += loss * num_draws
            tally.num_draws += num_draws
        else:
            tally.skipped += 1
        now = time.perf_counter()
        tally.seconds += now - last
        tally.waited += waited
        last = now
        if training.skipped_in_row >= MAX_SKIPPED:
            raise DivergedError(
                f"The loss or its gradient was not finite in {MAX_SKIPPED} steps in a row, up to step {training.step} "
                f"(epoch {epoch}); no weights were changed by them. Try a lower --max-lr, --clip-grad-norm 1, or "
                "--mixed-precision no."
            )
        after_step(is_stopping)


def train_step(
    training: Training, epoch: int, num_draws: int, images: Tensor, target: Tensor, positions: list[int]
) -> tuple[float, bool, bool]:
    """One optimiser step on this process's share of a global batch.

    Args:
        training: The parts.
        epoch: The epoch.
        num_draws: Slices of the global batch.
        images: (B, 1, S, S) this process's share; B may be 0.
        target: (B, S, S).
        positions: (B,) places of the draws in the epoch.

    Returns:
        The loss of the global batch, whether the weights were updated (a non-finite loss or gradient skips the step
        on all processes), and whether all processes agree to stop.
    """
    accelerator = training.accelerator
    kept_buffers = [buffer.clone() for buffer in training.buffers]
    _seed_torch(training.seed, epoch, positions)
    images, target = _to_device(images, accelerator.device), target.to(accelerator.device, non_blocking=True)
    if training.lockstep:
        value = training.lockstep.gradient(
            training.loss,
            images,
            target,
            positions,
            num_draws=num_draws,
            seed=training.seed,
            epoch=epoch,
            autocast=accelerator.autocast,
        )
        is_stopping = agree_to_stop(training)
    else:
        value, is_stopping = _gradient(training, epoch, num_draws, images, target, positions, kept_buffers)
    accelerator.unscale_gradients(training.optimizer)
    grads = [p.grad for p in training.parameters if p.grad is not None]
    norm = get_total_norm(grads)
    if training.clip_grad_norm:
        clip_grads_with_norm_(training.parameters, training.clip_grad_norm, norm)
    loss_value, is_finite = float(value), bool(torch.isfinite(value) & torch.isfinite(norm))
    if is_finite or accelerator.scaler is not None:
        training.optimizer.step()  # the scaler of fp16 skips by itself, and lowers its scale
    if is_finite and training.ema:
        training.ema.update_parameters(training.raw_model)
    if not is_finite:
        _restore(training.buffers, kept_buffers)
    training.optimizer.zero_grad(set_to_none=True)
    return loss_value, is_finite, is_stopping


def _gradient(
    training: Training,
    epoch: int,
    num_draws: int,
    images: Tensor,
    target: Tensor,
    positions: list[int],
    kept_buffers: list[Tensor],
) -> tuple[Tensor, bool]:
    """Accumulates the gradient of the whole batch's loss, whatever processes and micro-batches it is spread over.

    The sums behind the loss are added up first, and every part then goes backward through its own sums. Batch norm
    sees a micro-batch at a time; with several, a forward pass without gradient comes first, after which the buffers are
    put back to `kept_buffers`.

    Returns:
        The loss of the global batch, and whether all processes agree to stop.
    """
    accelerator, loss, sampler = training.accelerator, training.loss, training.sampler
    shares = micro_shares(num_draws, sampler.accumulate, accelerator.num_processes, accelerator.process_index)
    ends = [0, *itertools.accumulate(stop - start for start, stop in shares[:-1]), len(images)]
    parts = [(images[a:b], target[a:b], positions[a:b]) for a, b in itertools.pairwise(ends)]

    def forward(part_images: Tensor, part_target: Tensor, part_positions: list[int]) -> Tensor:
        set_dropout(training.model, training.seed, epoch, part_positions)
        with accelerator.autocast():
            logits = training.model(part_images)
        return loss.sums(logits, part_target)

    if len(parts) == 1:
        sums = [forward(*parts[0])]
        local = sums[0].detach()
    else:
        sums = []
        with torch.no_grad():
            local = torch.stack([forward(*part) for part in parts]).sum(0)
        _restore(training.buffers, kept_buffers)
    stop = local.new_tensor([float(training.is_asked_to_stop())])
    total = accelerator.reduce(torch.cat((local, stop)), "sum")
    value, slopes = loss.value_and_slopes(total[:-1])
    for number, part in enumerate(parts):
        # DDP averages gradients over the processes, so each hands in num_processes times its part of the sum
        is_last = number == len(parts) - 1
        with contextlib.nullcontext() if is_last else accelerator.no_sync(training.model):
            part_sums = sums[number] if sums else forward(*part)
            accelerator.backward((slopes * part_sums).sum() * accelerator.num_processes)
    return value, bool(total[-1] > 0)


def agree_to_stop(training: Training) -> bool:
    """Whether any process was asked to stop; all of them must ask together."""
    asked = training.is_asked_to_stop()
    if training.accelerator.num_processes == 1:
        return asked
    flag = torch.tensor(float(asked), device=training.accelerator.device)
    return bool(training.accelerator.reduce(flag, "sum") > 0)


def validate(
    training: Training, num_slices: int, num_classes: int, after_batch: Callable[[bool], None]
) -> tuple[float, Counts]:
    """Counts the whole validation set, every slice once, on whatever number of processes.

    Args:
        training: The parts; `val_loader` yields this process's slices with their places in the validation set.
        num_slices: Slices of the validation set, N.
        num_classes: C.
        after_batch: Called after every batch, with whether all processes have agreed to stop; may raise to leave.

    Returns:
        The loss of the whole set, from sums divided once, and (N, C, C) confusion counts of every slice.
    """
    accelerator, device = training.accelerator, training.accelerator.device
    model = training.validated_model.eval()
    if accelerator.num_processes > 1:
        # where batch norm is not synchronised, each process has its own statistics: the main one's are kept and saved
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)
    counts = torch.zeros(num_slices, num_classes, num_classes, dtype=torch.int64, device=device)
    # a row for each batch: where each slice is a batch, the order of adding up does not depend on the processes
    sums = torch.zeros(num_slices, 4 + 3 * num_classes, dtype=torch.float64, device=device)
    batches = iter(training.val_loader)
    with torch.no_grad():
        for _ in range(training.num_val_batches):
            for images, labels, positions in itertools.islice(batches, 1):
                target = labels.to(device, non_blocking=True)
                with accelerator.autocast():
                    logits = model(_to_device(images, device))
                sums[positions[0]] = training.loss.sums(logits, target).double()
                counts[positions] = confusion_counts(logits.argmax(1), target, num_classes)
            after_batch(agree_to_stop(training))
    sums, counts = accelerator.reduce(sums, "sum"), accelerator.reduce(counts, "sum")
    return float(training.loss.value(sums.sum(0))), counts.cpu().numpy()


def predict(training: Training, images: Tensor) -> Tensor:
    """The class indices (B, S, S) of standardised images (B, 1, S, S), by the model that is validated."""
    model = training.validated_model.eval()
    with torch.no_grad(), training.accelerator.autocast():
        logits: Tensor = model(_to_device(images, training.accelerator.device))
    return logits.argmax(1).cpu()


def _to_device(images: Tensor, device: torch.device) -> Tensor:
    return images.to(device, non_blocking=True).to(memory_format=torch.channels_last)


def _seed_torch(seed: int, epoch: int, positions: list[int]) -> None:
    """Seeds what a model may draw from torch's own generator (none of smp's does), so that a resumed run repeats it."""
    key = seed_sequence(_STREAM, seed, epoch, *positions[:1])
    torch.manual_seed(int(key.generate_state(1, np.uint64)[0]))


def _restore(buffers: list[Tensor], kept: list[Tensor]) -> None:
    with torch.no_grad():
        for buffer, value in zip(buffers, kept, strict=True):
            buffer.copy_(value)


def epoch_row(epoch: int, tally: Tally, val_loss: float, metrics: dict[str, Any], seconds: float) -> dict[str, Any]:
    """One row of the history, in plain JSON values; NaN becomes None."""
    row = {
        "epoch": epoch,
        "train_loss": tally.loss_sum / tally.num_draws if tally.num_draws else math.nan,
        "val_loss": val_loss,
        **metrics,
        "lr": tally.lr,
        "skipped_steps": tally.skipped,
        "images_per_second": tally.consumed / tally.seconds if tally.seconds else math.nan,
        "data_wait_share": tally.waited / tally.seconds if tally.seconds else math.nan,
        "seconds": seconds,
    }
    return {name: _plain(value) for name, value in row.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
