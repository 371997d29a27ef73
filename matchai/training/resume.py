"""What a run keeps between two instants: gathered into a state, and put back."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from matchai.training.checkpoint import State
from matchai.training.loop import Training
from matchai.training.meters import EpochMeter


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        history: One row for every finished epoch.
        meter: The figures of the epoch under way.
        best_epoch: The epoch of the best mean Dice.
        best_mean_dice: The best mean Dice.
        best: Its weights, a safetensors file.
        best_confusions: (N, C, C) int64, its counts of every validation slice.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    meter: EpochMeter = field(default_factory=EpochMeter)
    best_epoch: int | None = None
    best_mean_dice: float | None = None
    best: bytes | None = None
    best_confusions: Tensor | None = None


def collect(training: Training, progress: Progress) -> State:
    """Everything that going on needs, as tensors and JSON."""
    raw = training.raw_model
    tensors = {f"model.{name}": tensor for name, tensor in raw.state_dict().items()}
    for name, parameter in _trained(raw):
        for key, value in training.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    if training.ema:
        tensors |= {f"ema.{name}": tensor for name, tensor in training.ema.state_dict().items()}
    if progress.best_confusions is not None:
        tensors["best_confusions"] = progress.best_confusions
    group = training.optimizer.param_groups[0]
    scaler = training.accelerator.scaler
    record = {
        "step": training.step,
        "skipped_in_row": training.skipped_in_row,
        "history": progress.history,
        "tally": asdict(progress.meter),
        "best_epoch": progress.best_epoch,
        "best_mean_dice": progress.best_mean_dice,
        "lr": float(group["lr"]),
        "betas": list(group["betas"]),
        "scheduler": training.scheduler.last_epoch,
        "scaler": scaler.state_dict() if scaler else None,
    }
    return State(tensors, record, progress.best)


def restore(training: Training, state: State) -> Progress:
    """Puts a collected state back; returns how far the run had come."""
    raw, tensors, record = training.raw_model, state.tensors, state.record
    raw.load_state_dict(_under("model.", tensors))
    if training.ema:
        training.ema.load_state_dict(_under("ema.", tensors))
    optimizer = training.optimizer
    stored = {key: _under(f"optimizer.{key}.", tensors) for key in ("step", "exp_avg", "exp_avg_sq")}
    for name, parameter in _trained(raw):
        moments = {key: values[name] for key, values in stored.items() if name in values}
        # moments in the parameter's own memory layout: the fused kernels pair them up by address
        optimizer.state[parameter] = {
            key: value.to(parameter.device) if key == "step" else torch.empty_like(parameter).copy_(value)
            for key, value in moments.items()
        }
    group = optimizer.param_groups[0]
    group["lr"], group["betas"] = record["lr"], tuple(record["betas"])
    last = record["scheduler"]
    training.scheduler.load_state_dict({"last_epoch": last, "_step_count": last + 1, "_last_lr": [record["lr"]]})
    if training.accelerator.scaler and record["scaler"]:
        training.accelerator.scaler.load_state_dict(record["scaler"])
    training.step, training.skipped_in_row = record["step"], record["skipped_in_row"]
    return Progress(
        history=record["history"],
        meter=EpochMeter(**record["tally"]),
        best_epoch=record["best_epoch"],
        best_mean_dice=record["best_mean_dice"],
        best=state.best,
        best_confusions=tensors.get("best_confusions"),
    )


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
