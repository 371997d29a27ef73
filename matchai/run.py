"""A training run: builds every part from a `TrainConfig`, drives the epochs, keeps everything, goes on where it was."""

import json
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradScalerKwargs,
    ProjectConfiguration,
    broadcast_object_list,
)

from matchai import checkpoint, machine, parsing
from matchai.build import build_training
from matchai.config import FREE, LEAVES, TrainConfig, check, parse_interval
from matchai.console import Display, epoch_line
from matchai.data import Data, built_in_phantom, read_data
from matchai.errors import InputError
from matchai.files import write_whole
from matchai.loop import Tally, Training, epoch_row, train_epoch, validate
from matchai.metrics import Counts, summarise
from matchai.report import draw_figures
from matchai.resume import collect, restore

DRAW_EVERY = 30.0  # seconds between drawings of the figures, half a second each

OnEpoch = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Attributes:
        output: Its folder.
        history: One row an epoch, as in history.jsonl.
        best_epoch: The epoch whose weights were kept; None before the first validation.
        best_mean_dice: Its mean Dice.
        is_finished: Whether all epochs are done.
        stopped_by: The signal that ended it early, or None.
    """

    output: Path
    history: list[dict[str, Any]]
    best_epoch: int | None
    best_mean_dice: float | None
    is_finished: bool
    stopped_by: signal.Signals | None


class _StoppedError(Exception):
    """The processes have agreed to stop, and the state is saved."""


class _StopSignal:
    """Remembers the first stop signal; the second one acts at once. The handler only sets a field."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        wanted = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
        self._before = {number: signal.signal(number, self._handle) for number in wanted}
        try:
            yield
        finally:
            self._restore()

    def _handle(self, number: int, frame: Any) -> None:
        self.received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def run(config: TrainConfig, on_epoch: OnEpoch | None = None) -> RunResult:
    """Trains, or goes on with, the run in the output folder.

    Args:
        config: All settings.
        on_epoch: Called on every process after each epoch with its history row; an exception ends the run, which
            stays resumable.

    Raises:
        InputError: For whatever is wrong with settings, data or output folder, before the first step.
        DivergedError: If the loss stays non-finite; the last good state is kept.
    """
    machine.keep_heap()
    problems = check(config)
    cuda = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        accelerator, reason = _accelerator(config, problems)
        display = Display(accelerator.is_main_process)
        stack.callback(display.close)
        output = config.run.output or Path("runs") / config.run.preset
        cache = config.input.cache or output.parent / "cache"
        _on_main(accelerator, lambda: _open_output(output, config, problems, stack))
        data = _data(accelerator, config, cache, problems, display)
        training, weights_problems = build_training(accelerator, config, data, _stop := _StopSignal())
        if problems + weights_problems:
            raise InputError(*dict.fromkeys(problems + weights_problems))
        return _Run(config, accelerator, display, output, data, training, _stop, on_epoch, reason).go()
