"""What steps come to, added up over an epoch, and its row of the history."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class EpochMeter:
    """What an epoch has added up so far; stored with the state, so that an interrupted epoch's figures are whole.

    Attributes:
        consumed: Draws of the epoch that were used, over all processes.
        loss_sum: Sum over steps of loss times draws.
        num_draws: The draws behind it.
        skipped: Steps skipped in this epoch.
        seconds: Time spent in the steps.
        waited: Of it, time that the device spent waiting for data.
        lr: Learning rate of the last step.
    """

    consumed: int = 0
    loss_sum: float = 0.0
    num_draws: int = 0
    skipped: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    lr: float = 0.0


class StepOutcome:
    """What a step came to, on its way from the device.

    Args:
        values: (3,) loss of the global batch, whether it and its gradient were finite, how many processes were asked
            to stop.
        num_draws: Slices of the global batch.
        begin: The event on the device at which the step began; None on a CPU.
    """

    def __init__(self, values: Tensor, num_draws: int, begin: Any = None) -> None:
        self.num_draws = num_draws
        self.is_counted = False
        self._values, self._arrival, self._begin = values, None, begin
        self._waited, self._before = 0.0, None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrival = timed_event(values.device)

    def note_waiting(self, seconds: float, before: "StepOutcome | None") -> None:
        """Notes how long the host waited for the step's data, and the step before, in whose time that cost nothing."""
        self._waited, self._before = seconds, None if before is None else before._arrival

    def waited(self) -> float:
        """Seconds that the device waited for the step's data; after `read`."""
        if self._begin is None or self._before is None:
            return self._waited
        return min(self._waited, self._before.elapsed_time(self._begin) / 1000)

    def read(self) -> tuple[float, bool, bool]:
        """The loss, whether the weights were updated, whether all processes agree to stop; waits for the step."""
        if self._arrival is not None:
            self._arrival.synchronize()
        loss, is_done, num_asked = self._values.tolist()
        return loss, bool(is_done), num_asked > 0


def timed_event(device: torch.device) -> Any:
    """An event on a GPU, now; None on any other device."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def epoch_row(
    epoch: int, meter: EpochMeter, val_loss: float, metrics: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """One row of the history, in plain JSON values; NaN becomes None."""
    row = {
        "epoch": epoch,
        "train_loss": meter.loss_sum / meter.num_draws if meter.num_draws else math.nan,
        "val_loss": val_loss,
        **metrics,
        "lr": meter.lr,
        "skipped_steps": meter.skipped,
        "images_per_second": meter.consumed / meter.seconds if meter.seconds else math.nan,
        "data_wait_share": meter.waited / meter.seconds if meter.seconds else math.nan,
        "seconds": seconds,
    }
    return {name: _plain(value) for name, value in row.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
