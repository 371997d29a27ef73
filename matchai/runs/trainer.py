"""A training run: builds every part from a `TrainConfig`, drives the epochs, keeps everything, resumes."""

import functools
import json
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from matchai.metrics import Counts, summarise
from matchai.runs.input_bound import InputBoundMonitor
from matchai.runs.setup import Setup, describe_weights, on_main_first, set_up
from matchai.settings import TrainConfig, parse_interval
from matchai.system import (
    Display,
    InputError,
    StopSignal,
    best_line,
    check_agreement,
    end_with_launcher,
    epoch_line,
    machine,
    watching_peers,
    write_whole,
)
from matchai.training import (
    EpochMeter,
    Progress,
    Training,
    build_training,
    checkpoint,
    collect,
    count_step,
    end_workers,
    epoch_row,
    predict,
    restore,
    train_epoch,
    validate,
)

DRAW_EVERY = 30.0  # seconds between drawings of the figures, a second each

OnEpoch = Callable[[dict[str, Any]], None]
OnStep = Callable[[int, int], None]


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


def run(
    config: TrainConfig,
    on_epoch: OnEpoch | None = None,
    *,
    on_step: OnStep | None = None,
    stop: StopSignal | None = None,
    display: Display | None = None,
    draw_every: float = DRAW_EVERY,
) -> RunResult:
    """Trains, or resumes, the run in the output folder.

    Args:
        config: All settings.
        on_epoch: Called on every process with the history row of each epoch: after it, once its state is saved, and
            when a run resumes first for all epochs that it has behind it, so that no row is missed whenever a process
            was killed. An exception ends the run, which stays resumable.
        on_step: Called on every process after each step, and each batch of a validation pass, with the steps done and
            their total.
        stop: What hears of signals, where the caller listens already.
        display: Where to say things; without it, the terminal.
        draw_every: Seconds between drawings of the figures, infinite for none but the last.

    Raises:
        InputError: For whatever is wrong with settings, data or output folder, before the first step.
        DivergedError: If the loss stays non-finite; the last good state is kept.

    >>> small = {"encoder": "tu-test_resnet", "encoder_weights": "none", "image_size": 32, "phantom_slices": 16}
    >>> result = run(TrainConfig().updated(epochs=1, **small), display=Display(is_main_process=False))
    >>> result.is_finished, result.best_epoch, sorted(path.name for path in result.output.glob("*.safetensors"))
    (True, 1, ['best.safetensors'])
    """
    end_with_launcher()
    machine.keep_heap()
    output = config.run.output or Path("runs") / config.run.preset
    cuda = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        setup = set_up(config, output, display, stack)
        if setup.accelerator.device.type == "cuda":
            stack.enter_context(machine.gpu_kernels(is_repeatable=config.run.deterministic))
            stack.enter_context(watching_peers(config.machine.collective_timeout))
        listener = stop or StopSignal()
        training = build_training(
            config, setup.accelerator, setup.data, setup.model, lambda: listener.received is not None
        )
        stack.callback(end_workers, training)
        return Trainer(config, setup, output, training, listener, on_epoch, on_step, draw_every).fit()


@dataclass(eq=False)
class Trainer:
    """A run on its way: what is kept from epoch to epoch.

    Args:
        config: All settings.
        setup: Processes, data and where to say things.
        output: The run's folder.
        training: The parts of the loop.
        stop: Hears of signals.
        on_epoch: See `run`.
        on_step: See `run`.
        draw_every: See `run`.
    """

    config: TrainConfig
    setup: Setup
    output: Path
    training: Training
    stop: StopSignal
    on_epoch: OnEpoch | None
    on_step: OnStep | None
    draw_every: float

    def __post_init__(self) -> None:
        self.accelerator, self.display, self.data = self.setup.accelerator, self.setup.display, self.setup.data
        self.names = list(self.config.input.class_names)
        self.progress = Progress()
        self.every_seconds, self.every_steps = parse_interval(self.config.machine.save_every)
        self.saved_at, self.saved_step = time.monotonic(), 0
        self.drawn_at, self.shown_at = -self.draw_every, 0.0
        self.unsaved: str | None = None  # why the newest state, or what is published of it, is not on the disk
        num_local = machine.num_local_processes(self.accelerator.num_processes)
        self.input_bound = InputBoundMonitor(self.training.loader.num_workers, num_local)

    def fit(self) -> RunResult:
        """Trains to the last epoch, from where the run was."""
        is_resumed = self._resume()
        epochs = self.config.optimisation.epochs
        if self.accelerator.is_main_process:
            self._publish()
        if self.on_epoch:
            for row in self.progress.history:
                self.on_epoch(row)
        if len(self.progress.history) >= epochs:
            self.display.say(f"{self.output} is finished ({epochs} epochs); there is nothing to do.")
            if self.accelerator.is_main_process and not self._figures_are_final():
                self._draw(final=True)
            return self._result()
        if is_resumed:
            done = self.progress.meter.consumed
            self.display.say(
                f"Resuming {self.output} at epoch {len(self.progress.history) + 1} of {epochs}, draw {done}."
            )
        if self.config.machine.tracker:
            self.accelerator.init_trackers("matchai")
        try:
            with self.stop.listening():
                for epoch in range(len(self.progress.history) + 1, epochs + 1):
                    self._epoch(epoch)
                self._check_saved()
                if self.accelerator.is_main_process:
                    self._draw(final=True)
        except _StoppedError:
            self._check_saved()
        self.display.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self._say_how_it_ended()
        return self._result()

    def _resume(self) -> bool:
        """Goes to where the run was; returns whether it had begun."""
        state = on_main_first(lambda: checkpoint.load_state(self.output))
        step = state.record["step"] if state else None
        check_agreement({"a state of step": step}, f"all hosts must see the same {self.output}.")
        if state is not None:
            self.progress = restore(self.training, state)
            self.saved_step = self.training.step
        return state is not None

    def _epoch(self, epoch: int) -> None:
        meter = self.progress.meter
        train_epoch(self.training, epoch, meter, lambda is_stopping: self._after_step(epoch, is_stopping))
        began = time.perf_counter()
        val_loss, confusions = validate(self.training, len(self.data.val), len(self.names), self._after_batch)
        metrics = summarise(confusions, self.config.input.lesion_indices, self.config.sampling.batch_size)
        row = epoch_row(epoch, meter, val_loss, metrics, meter.seconds + time.perf_counter() - began)
        best = self.progress.best_mean_dice
        is_best = best is None or (row["mean_dice"] is not None and row["mean_dice"] > best)
        self.progress.history.append(row)
        self.progress.meter = EpochMeter()
        if is_best:
            self.progress.best_epoch, self.progress.best_mean_dice = epoch, row["mean_dice"]
            self.progress.best_confusions = torch.from_numpy(confusions)
            weights = self.training.validated_model.state_dict()
            self.progress.best = checkpoint.pack_weights(weights, describe_weights(self.config, self.data, row))
        self._save()
        if self.accelerator.is_main_process:
            self._publish()
        self.display.close()
        # what is told is kept: whoever reads the line may stop the run at once
        line = epoch_line(row, self.config.optimisation.epochs, self.names, is_best)
        self.display.say(line if self.unsaved is None else f"{line} · not saved")
        if advice := self.input_bound.after_epoch(meter.seconds, meter.waited):
            self.display.warn(advice)
        is_due = time.monotonic() - self.drawn_at > self.draw_every and epoch < self.config.optimisation.epochs
        if is_due and self.accelerator.is_main_process:
            self._draw(final=False, confusions=confusions)
        self.accelerator.log({name: value for name, value in row.items() if isinstance(value, int | float)}, step=epoch)
        if self.on_epoch:
            self.on_epoch(row)

    def _after_step(self, epoch: int, is_stopping: bool) -> None:
        meter, training = self.progress.meter, self.training
        self.input_bound.after_step(meter.seconds, meter.waited)
        self._after_batch(is_stopping)
        if time.monotonic() - self.shown_at > 0.1:
            self.shown_at = time.monotonic()
            loss = f"loss {meter.loss_sum / meter.num_draws:.3f} · " if meter.num_draws else ""
            detail = f"{loss}{meter.consumed / max(meter.seconds, 1e-9):.1f} images/s"
            label = f"epoch {epoch}/{self.config.optimisation.epochs}"
            self.display.show(label, training.step, training.scheduler.total_steps, detail)
        is_due = (
            time.monotonic() - self.saved_at >= self.every_seconds
            or training.step - self.saved_step >= self.every_steps
        )
        if is_due:
            self._save()

    def _after_batch(self, is_stopping: bool) -> None:
        if self.on_step:
            self.on_step(self.training.step, self.training.scheduler.total_steps)
        if is_stopping:
            self._save()
            raise _StoppedError

    def _save(self) -> None:
        count_step(self.training, self.progress.meter, self.training.outcome)
        if self.accelerator.is_main_process:
            self.unsaved = None
            try:
                checkpoint.save_state(self.output, collect(self.training, self.progress))
            except OSError as error:
                self.unsaved = error.strerror
                self.display.warn(f"the state could not be saved ({error.strerror}); the one before it is kept.")
        self.saved_at, self.saved_step = time.monotonic(), self.training.step

    def _check_saved(self) -> None:
        if self.unsaved is not None:
            raise InputError(
                f"The training has come to step {self.training.step}, but {self.output} does not hold all of it "
                f"({self.unsaved}); make room there and give the same command again, which resumes from the last state "
                "that was saved."
            )

    def _publish(self) -> None:
        """Makes history.jsonl and best.safetensors those of the state, whatever a killed process left."""
        lines = "".join(json.dumps(row) + "\n" for row in self.progress.history)
        try:
            write_whole(self.output / "history.jsonl", lines)
            if self.progress.best is not None:
                checkpoint.publish_best(self.output, self.progress.best)
        except OSError as error:
            self.unsaved = error.strerror
            self.display.warn(f"the history could not be written ({error.strerror}); the next start writes it again.")

    def _draw(self, *, final: bool, confusions: Counts | None = None) -> None:
        """Draws the figures, of the best weights at the end, of the current ones on the way."""
        # matplotlib takes half a second to import, which the first step need not wait for
        from matchai.runs.figures import draw_figures  # noqa: PLC0415

        model = self.training.validated_model
        if final:
            assert self.progress.best_confusions is not None
            confusions = self.progress.best_confusions.numpy()
            model.load_state_dict(checkpoint.load_weights(self.output)[0])
        assert confusions is not None
        folder, history = self.output / "figures", self.progress.history
        epoch = self.progress.best_epoch if final else len(history)
        predict_batch = functools.partial(predict, self.training)
        try:
            draw_figures(folder, history, confusions, self.data, self.config, predict_batch, epoch=epoch)
        except OSError as error:
            self.display.warn(f"the figures could not be written ({error.strerror}).")
        if final:
            self._report()
        self.drawn_at = time.monotonic()

    def _report(self) -> None:
        """Makes the report and the model card from what the folder holds now."""
        from matchai.runs.facts import read_facts  # noqa: PLC0415
        from matchai.runs.model_card import CARD, write_card  # noqa: PLC0415
        from matchai.runs.report_page import PAGE, write_page  # noqa: PLC0415

        try:
            facts = read_facts(self.output)
            write_page(facts, self.output / PAGE, redraw=False)
            write_card(facts, self.output / CARD)
        except InputError as error:
            self.display.warn(str(error))
        except OSError as error:
            self.display.warn(f"the report could not be written ({error.strerror}).")

    def _figures_are_final(self) -> bool:
        """Whether figures and report are younger than the last state; not so if a kill came before they were made."""
        report = self.output / "report.html"
        drawn = [path.stat().st_mtime for path in [*(self.output / "figures").glob("*.png"), report] if path.exists()]
        kept = [path.stat().st_mtime for path in (self.output / checkpoint.LAST).glob("state-*")]
        return len(drawn) > 1 and report.exists() and min(drawn) >= max(kept)

    def _say_how_it_ended(self) -> None:
        history, epochs = self.progress.history, self.config.optimisation.epochs
        if len(history) < epochs:
            reason = f"by {self.stop.received.name}" if self.stop.received else "as another process was asked to,"
            self.display.say(
                f"Stopped {reason} at step {self.training.step}, all saved in {self.output}; "
                "the same command resumes from there."
            )
            return
        best = history[(self.progress.best_epoch or 1) - 1]
        is_phantom = self.config.input.data is None
        self.display.say(best_line(best, self.names, len(self.data.val), is_phantom=is_phantom))
        self.display.say(f"Report: {self.output / 'report.html'}. Best weights: {self.output / checkpoint.BEST}.")

    def _result(self) -> RunResult:
        progress = self.progress
        is_finished = len(progress.history) >= self.config.optimisation.epochs
        best = progress.best_epoch, progress.best_mean_dice
        return RunResult(self.output, progress.history, *best, is_finished, self.stop.received)
