"""The training loop: a step, an epoch of steps, a validation pass.

No step waits for the device: what it came to is copied to the host aside, and read when the next one is under way.
"""

import contextlib
import hashlib
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from matchai.metrics import Counts, confusion_counts
from matchai.model import JoinedForward, KeyedLayer, SegmentationLoss, local_norms, set_dropout, sum_dtype
from matchai.sampling import DistributedWeightedSampler, micro_shares
from matchai.system import HALF_DTYPES, FailedError
from matchai.training.averaging import AveragedWeights
from matchai.training.deterministic import DeterministicGradient
from matchai.training.meters import EpochMeter, StepOutcome, timed_event

MAX_SKIPPED = 10  # steps in a row without a finite gradient before the run ends
CAST_GROUPS = 8  # of layers, whose gradients other processes get while those before them are computed
ASK_EVERY = 8  # batches of a validation on a GPU, between two questions whether to stop
_STREAM = 0xD20  # keeps these random numbers apart from all others


class DivergedError(FailedError):
    """The loss or the gradient was not finite for `MAX_SKIPPED` steps in a row."""


@dataclass
class Training:
    """The parts that a step needs, and where it stands.

    Attributes:
        accelerator: Devices, precision, processes.
        model: As prepared by the accelerator.
        buffers: Its buffers, joined by `matchai.model.normalisation.join_buffers`.
        keyed_layers: Its dropouts and drop paths.
        loss: The loss.
        val_loss: The loss of the validation, whose labels are never softened.
        optimizer: Not prepared, as Accelerate's wrapping takes longer than a small step's own bookkeeping; fused, so
            that it can leave out a step by itself.
        scheduler: Stepped once a step; not prepared, as Accelerate would step it once a process.
        sampler: Deals the draws.
        loader: Loads them, a process's share of a step at a time.
        val_loader: This process's validation slices.
        num_val_batches: Batches of the process that has most of them.
        deterministic: Computes gradients slice by slice where their bits must not depend on the processes, else None.
        ema: Moving average of the weights, or None.
        seed: Seed of the run.
        clip_grad_norm: Largest gradient norm; 0 for none.
        is_asked_to_stop: Whether a signal came.
        step: Optimiser steps done or skipped.
        skipped_in_row: Steps skipped since the last good one.
        outcome: Of the last step, until the epoch ends.
        parameters: Those that are trained.
        dtype: In which most maps are computed.
        joined: What is done for all layers at once; None on a CPU, where it gains nothing.
        local_norms: On several processes, the batch norms that are not synchronised.
    """

    accelerator: Accelerator
    model: nn.Module
    buffers: list[Tensor]
    keyed_layers: list[KeyedLayer]
    loss: SegmentationLoss
    val_loss: SegmentationLoss
    optimizer: torch.optim.AdamW
    scheduler: OneCycleLR
    sampler: DistributedWeightedSampler
    loader: DataLoader[Any]
    val_loader: DataLoader[Any]
    num_val_batches: int
    deterministic: DeterministicGradient | None
    ema: AveragedWeights | None
    seed: int
    clip_grad_norm: float
    is_asked_to_stop: Callable[[], bool]
    step: int = 0
    skipped_in_row: int = 0
    outcome: StepOutcome | None = None
    parameters: list[nn.Parameter] = field(init=False)
    dtype: torch.dtype = field(init=False)
    joined: JoinedForward | None = field(init=False)
    local_norms: list[nn.Module] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        half = HALF_DTYPES.get(self.accelerator.mixed_precision)
        self.dtype, self.joined = half or torch.float32, None
        if self.accelerator.device.type != "cpu":
            groups = 1 if self.accelerator.num_processes == 1 else CAST_GROUPS
            self.joined = JoinedForward(self.raw_model, self.buffers, half, groups)
        self.local_norms = [*local_norms(self.model)] if self.accelerator.num_processes > 1 else []

    def joined_forward(self) -> contextlib.AbstractContextManager[None]:
        """The context of a forward pass in training."""
        return contextlib.nullcontext() if self.joined is None else self.joined.running()

    @property
    def raw_model(self) -> nn.Module:
        """The model without the accelerator's wrapping."""
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        return model

    @property
    def validated_model(self) -> nn.Module:
        """The model that is validated and kept: the moving average where there is one."""
        return self.ema.module if self.ema else self.raw_model


def train_epoch(training: Training, epoch: int, meter: EpochMeter, after_step: Callable[[bool], None]) -> None:
    """Runs the steps of an epoch that `meter` does not count yet.

    Args:
        training: The parts.
        epoch: From 1.
        meter: Updated after every step; the loss of the last one comes with the next, or with `count_step`.
        after_step: Called after every step, with whether all processes have agreed to stop; may raise to leave.

    Raises:
        DivergedError: After `MAX_SKIPPED` skipped steps in a row.
    """
    sampler = training.sampler
    if meter.consumed >= sampler.num_samples:
        return
    sampler.load_state_dict({"seed": training.seed, "epoch": epoch, "consumed": meter.consumed})
    training.model.train()
    last = time.perf_counter()
    for images, target, positions in training.loader:
        waited = time.perf_counter() - last
        num_draws = min(sampler.batch_size, sampler.num_samples - meter.consumed)
        meter.lr = float(training.scheduler.get_last_lr()[0])
        outcome = train_step(training, epoch, num_draws, images, target, positions.tolist())
        training.scheduler.step()
        training.step += 1
        meter.consumed += num_draws
        is_stopping = count_step(training, meter, training.outcome)  # of the step before
        outcome.note_waiting(waited, training.outcome)
        training.outcome = outcome
        now = time.perf_counter()
        meter.seconds += now - last
        last = now
        # several processes must leave after the same step, so what they agreed on counts a step later on all of them
        alone = training.accelerator.num_processes == 1
        after_step(training.is_asked_to_stop() if alone else is_stopping)
    count_step(training, meter, training.outcome)
    training.outcome = None


def count_step(training: Training, meter: EpochMeter, outcome: StepOutcome | None) -> bool:
    """Adds what a step came to, once, and waits for it where it is under way; returns whether all agreed to stop.

    Raises:
        DivergedError: If it was the last of `MAX_SKIPPED` skipped steps in a row.
    """
    if outcome is None:
        return False
    loss, is_done, is_stopping = outcome.read()
    if not outcome.is_counted:
        outcome.is_counted = True
        meter.waited += outcome.waited()
        training.skipped_in_row = 0 if is_done else training.skipped_in_row + 1
        if is_done:
            meter.loss_sum += loss * outcome.num_draws
            meter.num_draws += outcome.num_draws
        else:
            meter.skipped += 1
    if training.skipped_in_row >= MAX_SKIPPED:
        raise DivergedError(
            f"The loss or its gradient was not finite in {MAX_SKIPPED} steps in a row, up to step {training.step}; no "
            "weights were changed by them. Try a lower --max-lr, --clip-grad-norm 1, or --mixed-precision no."
        )
    return is_stopping


def train_step(
    training: Training, epoch: int, num_draws: int, images: Tensor, target: Tensor, positions: list[int]
) -> StepOutcome:
    """One optimiser step on this process's share of a global batch; a non-finite one is skipped on all processes.

    Args:
        training: The parts.
        epoch: The epoch.
        num_draws: Slices of the global batch.
        images: (B, 2 · context + 1, S, S) this process's share; B may be 0.
        target: (B, S, S).
        positions: (B,) places of the draws in the epoch.
    """
    accelerator, optimizer = training.accelerator, training.optimizer
    begin = timed_event(accelerator.device)
    kept_buffers = [buffer.clone() for buffer in training.buffers]
    _seed_torch(training.seed, epoch, positions, accelerator.device)
    images, target = _to_device(images, accelerator.device), target.to(accelerator.device, non_blocking=True)
    if training.deterministic:
        value = training.deterministic.gradient(images, target, positions, num_draws=num_draws, epoch=epoch)
        num_asked = _num_asked_to_stop(training)
    else:
        value, num_asked = _gradient(training, epoch, num_draws, images, target, positions, kept_buffers)
    if accelerator.scaler is not None:
        accelerator.scaler.unscale_(optimizer)
    grads = [p.grad for p in training.parameters if p.grad is not None]
    if training.clip_grad_norm:
        clip_grads_with_norm_(training.parameters, training.clip_grad_norm, get_total_norm(grads))
    is_finite = torch.isfinite(value) & _are_finite(training, grads)
    _update(training, is_finite, kept_buffers)
    if training.ema:
        training.ema.update(training.raw_model, training.buffers)
    optimizer.zero_grad(set_to_none=True)
    exact = sum_dtype(value.device)
    return StepOutcome(torch.stack((value.to(exact), is_finite.to(exact), num_asked.to(exact))), num_draws, begin)


def _update(training: Training, is_finite: Tensor, kept_buffers: list[Tensor]) -> None:
    """Changes the weights if loss and gradient are finite, else nothing: batch norm's statistics are put back."""
    scaler, optimizer = training.accelerator.scaler, training.optimizer
    if scaler is not None:
        scaler.step(optimizer)  # skips by itself, and lowers its scale
        scaler.update()
    elif not is_finite.is_cpu:
        # as a gradient scaler does: the fused kernel reads it on the device, and leaves weights and moments alone
        optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif is_finite:  # nothing to wait for on a CPU
        optimizer.step()
    if not is_finite.is_cpu or not is_finite:
        for buffer, kept in zip(training.buffers, kept_buffers, strict=True):
            buffer.copy_(torch.where(is_finite, buffer, kept))


def _are_finite(training: Training, grads: list[Tensor]) -> Tensor:
    """Whether all gradients are finite, a scalar on their device."""
    scaler = training.accelerator.scaler
    if scaler is not None:  # it has looked at them already
        (found,) = scaler._found_inf_per_device(training.optimizer).values()
        return torch.eq(found.view(()), 0)
    found = torch.zeros(1, device=grads[0].device)
    # a gradient scaler's kernel, here with a scale of 1: one pass, in half the time of a norm
    torch._amp_foreach_non_finite_check_and_unscale_(grads, found, torch.ones_like(found))
    return found[0] == 0


def _gradient(
    training: Training,
    epoch: int,
    num_draws: int,
    images: Tensor,
    target: Tensor,
    positions: list[int],
    kept_buffers: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """Accumulates the gradient of the whole batch's loss, whatever processes and micro-batches it is spread over.

    The sums behind the loss are added up first, and every part then goes backward through its own sums. Batch norm
    sees a micro-batch at a time; with several, a forward pass without gradient comes first, after which the buffers are
    put back to `kept_buffers`.

    Returns:
        The loss of the global batch, and how many processes were asked to stop.
    """
    accelerator, loss, sampler = training.accelerator, training.loss, training.sampler
    shares = micro_shares(num_draws, sampler.accumulate, accelerator.num_processes, accelerator.process_index)
    ends = [0, *itertools.accumulate(stop - start for start, stop in shares[:-1]), len(images)]
    parts = [(images[a:b], target[a:b], positions[a:b]) for a, b in itertools.pairwise(ends)]

    def forward(part_images: Tensor, part_target: Tensor, part_positions: list[int]) -> Tensor:
        set_dropout(training.keyed_layers, training.seed, epoch, part_positions, images.device, training.dtype)
        for norm in training.local_norms:
            norm.training = len(part_images) > 0  # no slice has no statistics, and must not move the running ones
        with training.joined_forward(), accelerator.autocast():
            logits = training.model(part_images)
        return loss.sums(logits, part_target)

    if len(parts) == 1:
        sums = [forward(*parts[0])]
        local = sums[0].detach()
    else:
        sums = []
        with torch.no_grad():
            local = torch.stack([forward(*part) for part in parts]).sum(0)
        for buffer, kept in zip(training.buffers, kept_buffers, strict=True):
            buffer.copy_(kept)
    asked = torch.full((1,), float(training.is_asked_to_stop()), dtype=local.dtype, device=local.device)
    total = torch.cat((local, asked))
    if accelerator.num_processes > 1:
        total = accelerator.reduce(total, "sum")
    value, slopes = loss.value_and_slopes(total[:-1])
    # DDP averages gradients over the processes, so each hands in num_processes times its part of the sum
    grads = slopes * accelerator.num_processes
    if accelerator.scaler is not None:
        grads = accelerator.scaler.scale(grads)
    for number, part in enumerate(parts):
        is_last = number == len(parts) - 1
        with contextlib.nullcontext() if is_last else accelerator.no_sync(training.model):
            part_sums = sums[number] if sums else forward(*part)
            torch.autograd.backward(part_sums, grads)
    return value, total[-1]


def _num_asked_to_stop(training: Training) -> Tensor:
    """How many processes were asked to stop; all of them must ask together."""
    flag = torch.tensor(float(training.is_asked_to_stop()), device=training.accelerator.device)
    num_asked: Tensor = training.accelerator.reduce(flag, "sum")
    return num_asked


def agree_to_stop(training: Training) -> bool:
    """Whether any process was asked to stop; all of them must ask together."""
    if training.accelerator.num_processes == 1:
        return training.is_asked_to_stop()
    return bool(_num_asked_to_stop(training) > 0)


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
        for buffer in training.ema.buffers if training.ema else training.buffers:
            torch.distributed.broadcast(buffer, 0)
    counts = torch.zeros(num_slices, num_classes, num_classes, dtype=torch.int64, device=device)
    # a row for each batch: where each slice is a batch, the order of adding up does not depend on the processes
    sums = torch.zeros(num_slices, 4 + 3 * num_classes, dtype=sum_dtype(device), device=device)
    batches = iter(training.val_loader)
    with torch.no_grad():
        for number in range(training.num_val_batches):
            for images, labels, positions in itertools.islice(batches, 1):
                target = labels.to(device, non_blocking=True)
                with accelerator.autocast():
                    logits = model(_to_device(images, device))
                sums[int(positions[0])] = training.val_loss.sums(logits, target).to(sums.dtype)
                places = positions.to(device, non_blocking=True)
                counts.index_copy_(0, places, confusion_counts(logits.argmax(1), target, num_classes))
            # to agree waits for the device
            is_due = device.type == "cpu" or number % ASK_EVERY == ASK_EVERY - 1
            after_batch(agree_to_stop(training) if is_due or accelerator.num_processes == 1 else False)
    sums, counts = accelerator.reduce(sums, "sum"), accelerator.reduce(counts, "sum")
    value = training.val_loss.value(sums.sum(0))
    return float(value), counts.cpu().numpy()


def predict(training: Training, images: Tensor) -> Tensor:
    """The class indices (B, S, S) of standardised images (B, 2 · context + 1, S, S), by the model that is validated."""
    model = training.validated_model.eval()
    with torch.no_grad(), training.accelerator.autocast():
        logits: Tensor = model(_to_device(images, training.accelerator.device))
    return logits.argmax(1).cpu()


def _to_device(images: Tensor, device: torch.device) -> Tensor:
    return images.to(device, non_blocking=True).to(memory_format=torch.channels_last)


def _seed_torch(seed: int, epoch: int, positions: list[int], device: torch.device) -> None:
    """Seeds torch's own generators, from which a model may draw (none of smp's does), so that resuming repeats it."""
    # a hash, and not torch.manual_seed, which formats a traceback for GPUs that are not there: 0.01 ms instead of 0.6
    name = f"{_STREAM}/{seed}/{epoch}/{positions[:1]}"
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1
    torch.default_generator.manual_seed(key)
    if device.type == "cuda":
        torch.cuda.manual_seed(key)
