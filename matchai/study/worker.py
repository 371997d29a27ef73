"""A worker of a study: claims a trial, runs it, tells it, until the study has all it shall have and is confirmed."""

import contextlib
import functools
import gc
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from optuna.trial import TrialState

from matchai.runs import on_main_first, read, run
from matchai.study.confirmation import Confirmation, conclude, config_of
from matchai.study.leases import LostLeaseError, LostTrialError
from matchai.study.plan import Plan, check_stored_study, describe, fresh_seeds, is_known, refused_values
from matchai.study.rows import describe_left_out
from matchai.study.storage import open_store
from matchai.study.trials import DONE, Task, TrialTable
from matchai.system import (
    Display,
    FailedError,
    InputError,
    Problems,
    StoppedError,
    StopSignal,
    StoreError,
    any_process,
    check_agreement,
    check_launch,
    choose_precision,
    decide,
    end_with_launcher,
    is_lost_process,
    is_out_of_memory,
    is_sticky,
    join_group,
    lost_process_message,
    num_processes,
    share_error,
)
from matchai.training import DivergedError, build_model_of, is_free, step_problems

POLL = 0.5  # seconds between two looks at what others are running
TELL_EVERY = 0.2  # seconds between two words about a trial's steps
MAX_ERRORS_IN_ROW = 5  # of a worker, without a new epoch in between: the machine is broken, not the trial
MAX_FAILED_IN_ROW = 2  # trials, without one that ended in between
MAX_MEMORY_ERRORS_IN_ROW = 3  # then somebody else has the memory, or the recipe needs more than there is

Tell = Callable[[dict[str, Any]], None]


class BrokenError(FailedError):
    """The study cannot continue here; everything is resumable."""


class _HopelessError(Exception):
    """The pruner ends the trial, on all processes."""


@dataclass(frozen=True)
class _End:
    """How a run of the study ended: as what it is told, or left as it is (no state) for the reason in `words`."""

    state: TrialState | None
    value: float | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    words: str = ""


class Worker:
    """One worker: one process, or all processes of a launch.

    Args:
        plan: The study.
        tell: Hears what happens, on the main process alone: dicts with a `kind`.
        stop: Hears of signals.
    """

    def __init__(self, plan: Plan, tell: Tell, stop: StopSignal) -> None:
        self.plan, self.stop, self.tell = plan, stop, tell
        self.tables: list[TrialTable] = []
        self.errors_in_row = self.failed_in_row = self.memory_errors_in_row = 0
        self.epochs, self.seconds, self.told_at = 0, 0.0, 0.0
        self.seen: dict[str, int] = {}
        self.named: set[tuple[str, int]] = set()  # trials of which it was said that they count as nothing, or wait

    def work(self) -> bool:
        """Works until the study is done, which is then concluded and true, or until a signal comes.

        Raises:
            InputError: For what is wrong with the data, the store or the folder.
            BrokenError: After too many errors in a row, or where one process of several has failed.
            StoreError: If the store can neither be read nor written any more.
        """
        with ExitStack() as stack:
            self._open(stack)
            stack.enter_context(self.stop.listening())  # before that, signals end the process, and nothing is lost
            gc.freeze()  # what was imported stays: a collection after each run then takes 1 ms instead of 260
            stack.callback(gc.unfreeze)  # else some packages complain of leaks when Python ends
            with contextlib.suppress(StoppedError):
                while not any_process(self.stop.received is not None):
                    task = decide(self._next)
                    if task == DONE:
                        self.tell({"kind": "answer", **decide(lambda: conclude(self.tables, self._mention))})
                        return True
                    if isinstance(task, Task):
                        self._perform(task)
                    else:
                        time.sleep(POLL)
        return False

    def _open(self, stack: ExitStack) -> None:
        """Reads the data, sees that recipe and space can be trained on it, and opens every stage in the store."""
        plan = self.plan
        end_with_launcher()
        state = join_group(plan.config.machine.collective_timeout)
        check_launch(state.num_processes)
        if not state.is_main_process:
            self.tell = lambda event: None
        display = Display(state.is_main_process)
        stack.callback(display.close)
        cache = plan.config.input.cache
        assert cache is not None
        data = on_main_first(lambda: read(plan.config, cache, display))
        display.close()
        on_main_first(lambda: build_model_of(plan.config, is_resuming=False))  # fetches pretrained weights once
        problems = Problems(step_problems(plan.config, len(data.train), state.num_processes, state.device))
        choose_precision(plan.config.optimisation.mixed_precision, state.device)
        problems += refused_values(plan, data, state.num_processes, state.device)
        problems.raise_any()
        check_agreement(data.digests, "all of them must read the same slices.")

        def open_tables() -> None:
            store = open_store(plan.settings.storage, self._mention)
            stack.callback(store.close)
            store.should_stop = lambda: self.stop.received is not None
            # a study that is there has its seeds; to find them reads the data once for each
            is_new = not all(is_known(store, stage.name) for stage in plan.stages)
            seeds = fresh_seeds(plan, lambda config: read(config, cache, display)) if is_new else []
            descriptions = {stage.name: describe(plan, stage, data, seeds) for stage in plan.stages}
            for stage in plan.stages:  # all, before any is made
                check_stored_study(plan, stage, store, descriptions[stage.name])
            self.tables = [TrialTable(plan, stage, store, descriptions[stage.name]) for stage in plan.stages]

        decide(open_tables)
        self.tell({"kind": "ready"})

    def _next(self) -> Task | str:
        """What to do now: a trial of the first stage that is not done, a confirming run, `WAIT`, or `DONE`."""
        for place, table in enumerate(self.tables):
            ranking = self.tables[place - 1].ranking() if table.stage.promotes else None
            task = table.next_task(ranking)
            self._name_others(table, is_done=task == DONE)
            if task != DONE:
                self._tell_counts(table)
                return task
        self._tell_counts(self.tables[-1])
        return Confirmation(self.tables[-1]).next_task()

    def _perform(self, task: Task) -> None:
        """Runs a trial or a confirming run to its end, whatever that is; leaves it resumable if a signal comes."""
        if not decide(lambda: is_free(task.output)):
            # of a process that has lost its claim but not its life: stopped, or on a host that does not answer
            if self.tables:
                self._table(task).leases.avoid(task.key)
            return
        self._say(task, "begin", title=_title(task), epochs=task.epochs)
        self.epochs, self.seconds = 0, 0.0
        words = "stopped by an error"
        try:
            words = self._end(task, self._run(task))
        except LostTrialError as error:
            words = "given up"
            self._name_lost(task, error)
        except LostLeaseError as error:
            words = str(error)
        finally:
            if self.tables:
                self._table(task).leases.drop(task.key)
            self._say(task, "end", title=_title(task), outcome=words)
            gc.collect()  # a run's loader, model and optimiser refer to each other
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _run(self, task: Task) -> _End:
        """Runs it; how it ended."""
        config = config_of(self.plan, task.settings, epochs=task.epochs, seed=task.seed, output=task.output)
        try:
            with self._log(task) as display:
                on_epoch = functools.partial(self._after_epoch, task)
                on_step = functools.partial(self._after_step, task)
                result = run(config, on_epoch, on_step=on_step, stop=self.stop, display=display, draw_every=math.inf)
        except _HopelessError:
            return _End(TrialState.PRUNED)
        except DivergedError as error:
            return self._failed(f"diverged: {error}")
        except (LostLeaseError, StoreError):
            raise
        except Exception as error:
            # whatever a run may raise: what is wrong with the settings counts, what is wrong with the machine does not
            return self._survive(task, error)
        best = self.plan.best_of(result.history)
        if not result.is_finished:
            return _End(None, words="stopped, resumable")
        if best is None:
            return self._failed(f"{self.plan.settings.objective} was undefined in every epoch")
        return _End(TrialState.COMPLETE, best[0], {"best_epoch": best[1]})

    def _failed(self, reason: str) -> _End:
        """A failure of the settings: the worst value there is, with its reason, so that the search learns from it."""
        return _End(TrialState.COMPLETE, 0.0 if self.plan.is_maximised else math.inf, {"reason": reason})

    def _end(self, task: Task, how: _End) -> str:
        """Tells how a run of the study ended, unless it is left as it is; returns it in words."""
        if how.state is None:
            return how.words
        state, value, reason = how.state, how.value, how.attributes.get("reason")
        attributes = {**how.attributes, "seconds": self.seconds}

        def tell() -> None:
            if task.is_confirmation:
                Confirmation(self.tables[-1]).finish(task, {**attributes, "value": None if reason else value})
            else:
                self._table(task).finish(task, state, value, attributes)
            self._tell_counts(self._table(task))

        decide(tell)
        self.errors_in_row = self.failed_in_row = 0
        self.memory_errors_in_row = self.memory_errors_in_row if reason else 0
        figure = "" if value is None else f", {self.plan.settings.objective} {value:.4f}"
        return state.name.lower() + figure + (f" ({reason})" if reason else "")

    def _survive(self, task: Task, error: Exception) -> _End:
        """After an error in a run: out of memory is the settings' fault, all else the machine's; a kill is nobody's.

        Raises:
            BrokenError: After too many in a row, or where several processes have lost each other over it.
        """
        is_group, lost = num_processes() > 1, lost_process_message() if is_lost_process(error) else ""
        cause = share_error(error)
        if lost and cause is error:
            raise BrokenError(lost)
        words = " ".join(str(cause).split())[:600]
        reason = words if isinstance(cause, InputError) else f"{type(cause).__name__}: {words}"
        how = _End(None, words=f"stopped by an error, resumable: {reason}")
        if is_out_of_memory(cause):
            self.memory_errors_in_row += 1
            if self.memory_errors_in_row >= MAX_MEMORY_ERRORS_IN_ROW:
                raise BrokenError(
                    f"Trial after trial is out of memory, the last {_title(task)} ({reason}): free some, or give a "
                    "smaller --batch-size, --image-size or --encoder to another --study-name; the same command resumes."
                )
            how = self._failed(f"out of memory: {reason}")
            if is_group and self.tables:
                self._end(task, how)
        else:
            self.errors_in_row += 1
            is_trial = self.tables and not task.is_confirmation
            try:
                if is_trial and self._table(task).note_error(task, reason, self.epochs):
                    self.failed_in_row += 1
                    how = _End(None, words=f"failed after three errors, to be replaced: {reason}")
            except LostLeaseError as lost:
                if not is_group:
                    raise
                how = _End(None, words=str(lost))  # all processes end below
        if is_sticky(cause) and multiprocessing.parent_process() is not None:
            self._say(task, "end", title=_title(task), outcome=how.words or "stopped by an error")
            os.kill(os.getpid(), signal.SIGKILL)  # the one who watches starts another, for which the GPU works again
        if is_sticky(cause):
            raise BrokenError(f"The GPU takes no more work of this process ({reason}); the same command resumes.")
        if is_group:
            raise BrokenError(f"{_title(task)} ended all processes ({reason}); the same command resumes from there.")
        if self.errors_in_row >= MAX_ERRORS_IN_ROW or self.failed_in_row >= MAX_FAILED_IN_ROW:
            raise BrokenError(
                f"Too many errors in a row, the last in {_title(task)} ({reason}): fix that, and the same command "
                "resumes."
            )
        return how

    def _after_epoch(self, task: Task, row: dict[str, Any]) -> None:
        value = row[self.plan.settings.objective]
        self._say(task, "epoch", epoch=row["epoch"], value=value)
        self.epochs, self.seconds = row["epoch"], self.seconds + row["seconds"]
        if row["epoch"] > self.seen.get(task.key, 0):  # a resumed run tells its old epochs again
            self.seen[task.key], self.errors_in_row = row["epoch"], 0
        if not task.is_confirmation and decide(lambda: self._table(task).report(task, row)):
            raise _HopelessError

    def _after_step(self, task: Task, step: int, total: int) -> None:
        if time.monotonic() - self.told_at > TELL_EVERY and self.tables:
            self.told_at = time.monotonic()
            self._say(task, "step", step=step, total=total)
            with contextlib.suppress(StoreError):  # the next report says so, on all processes
                self._table(task).leases.renew(task.key, step)

    def _table(self, task: Task) -> TrialTable:
        return next(table for table in self.tables if table.stage.name == task.stage)

    def _mention(self, text: str) -> None:
        self.tell({"kind": "say", "text": text})

    def _name_others(self, table: TrialTable, *, is_done: bool) -> None:
        """Says once which trials of the study count as nothing, and which wait in vain."""
        name, total = table.stage.name, table.plan.total(table.stage)
        waiting, left_out = table.others()
        left_out = {number: why for number, why in left_out.items() if (name, number) not in self.named}
        late = [number for number in waiting if is_done and (name, number) not in self.named]
        self.named |= {(name, number) for number in [*left_out, *late]}
        told = [describe_left_out(name, left_out)] if left_out else []
        if late:
            told.append(
                f"Study {name} has all its {total} trials, so what was enqueued waits "
                f"({', '.join(f'trial {number}' for number in late)}): give more --trials."
            )
        for text in told:
            self.tell({"kind": "say", "text": text, "is_common": True})

    def _name_lost(self, task: Task, error: LostTrialError) -> None:
        """Says that another program has ended a trial, unless it is said of all such trials."""
        is_common = bool(self.tables) and task.number in self._table(task).others()[1]
        self.named |= {(task.stage, task.number)} if is_common else set()
        self.tell({"kind": "say", "text": str(error), "is_common": is_common})

    def _say(self, task: Task, kind: str, **about: Any) -> None:
        self.tell({"kind": kind, "key": task.key, **about})

    def _tell_counts(self, table: TrialTable) -> None:
        done, total = Confirmation(self.tables[-1]).progress()
        self.tell({"kind": "counts", **table.counts(), "confirmed": done, "to_confirm": total})

    @contextlib.contextmanager
    def _log(self, task: Task) -> Iterator[Display]:
        """Where a run says what it would say on the terminal: a file beside its folder."""
        if not self.tables:
            yield Display(False)
            return
        task.output.parent.mkdir(parents=True, exist_ok=True)
        with task.output.with_suffix(".log").open("a", encoding="utf-8") as file:
            yield Display(True, file)


def _title(task: Task) -> str:
    return f"trial {task.number}, fresh seed {task.seed}" if task.is_confirmation else f"trial {task.number}"
