"""Several workers on one host: long-lived processes, each with its GPU or share of the cores, and one who watches."""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from matchai.study.plan import Plan
from matchai.study.worker import Worker
from matchai.system import (
    FailedError,
    InputError,
    StopSignal,
    StudyDisplay,
    end_with_parent,
    is_lost_process,
    leave_group,
    lost_process_message,
    num_cores,
)

MAX_DEATHS = 3  # of one worker without an epoch in between; it is started again before that
BROKEN, MISTAKE, STOPPED = 1, 2, 3  # what `work` returns beside 0
PATIENCE = 60.0  # seconds for a worker that was asked to stop to finish its step, and to save


@dataclass
class _Slot:
    """A place for a worker."""

    number: int
    process: Any = None
    inbox: Connection | None = None
    deaths: int = 0
    is_ready: bool = False
    is_over: bool = False
    keys: set[str] = field(default_factory=set)
    epochs: dict[str, int] = field(default_factory=dict)


def work(plan: Plan, tell: Callable[[dict[str, Any]], None], stop: StopSignal | None = None) -> int:
    """Works as one worker of the study; what is wrong is told.

    Args:
        plan: The study.
        tell: Hears what happens.
        stop: Hears of signals; without it, one is made.

    Returns:
        0 when the study is done, else `BROKEN`, `MISTAKE` or `STOPPED`.
    """
    try:
        return 0 if Worker(plan, tell, stop or StopSignal()).work() else STOPPED
    except InputError as error:
        for problem in error.problems:
            tell({"kind": "error", "text": problem})
        return MISTAKE
    except FailedError as error:
        tell({"kind": "error", "text": str(error)})
        return BROKEN
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        tell({"kind": "error", "text": lost_process_message()})
        return BROKEN
    finally:
        leave_group()


def supervise(plan: Plan, display: StudyDisplay, stop: StopSignal) -> int:
    """Runs `plan.settings.workers` workers until the study is done; returns the exit status that it deserves.

    The first one prepares the data and opens the study before the others start. A worker that was killed is started
    again; its trial is meanwhile adopted by the others.
    """
    gpus = _gpus()
    if gpus and plan.config.machine.num_workers is None:
        loaders = max(0, min(8, num_cores() // plan.settings.workers - 1))
        plan = dataclasses.replace(plan, num_workers=loaders)
    seats = [_Slot(number) for number in range(plan.settings.workers)]
    statuses: list[int] = []
    asked_at = None
    try:
        with stop.listening():
            while True:
                if stop.received is None and not {BROKEN, MISTAKE} & set(statuses):
                    waiting = (seat for seat in seats if seat.process is None and not seat.is_over)
                    for seat in [one for one in waiting if one.number == 0 or seats[0].is_ready]:
                        _start(plan, seat, gpus)
                elif stop.received is not None and asked_at is None:
                    asked_at = time.monotonic()
                    display.say(f"stopping {len(seats)} workers; all trials stay resumable")
                    _signal(seats, signal.SIGTERM)
                elif asked_at is not None and time.monotonic() - asked_at > PATIENCE:
                    _signal(seats, signal.SIGKILL)
                if not any(seat.process for seat in seats):
                    return 0 if display.answer else max(statuses, default=0)
                _listen(seats, display)
                statuses += [status for seat in seats if (status := _reap(seat, display, asked_at is not None))]
    finally:
        _signal(seats, signal.SIGKILL)


def _start(plan: Plan, seat: _Slot, gpus: list[str]) -> None:
    context = multiprocessing.get_context("spawn")
    inbox, outbox = context.Pipe(duplex=False)
    seat.process = context.Process(target=_work, args=(plan, seat.number, outbox), name=f"matchai worker {seat.number}")
    with _environment(plan.settings.workers, seat.number, gpus):
        seat.process.start()
    outbox.close()
    seat.inbox = inbox


def _listen(seats: list[_Slot], display: StudyDisplay) -> None:
    """Hears what workers tell for a moment; a word that a killed one left half said is dropped with its pipe."""
    inboxes = {seat.inbox: seat for seat in seats if seat.inbox}
    for inbox in wait(list(inboxes), timeout=0.2):
        assert isinstance(inbox, Connection)
        seat = inboxes[inbox]
        try:
            event = inbox.recv()
        except (EOFError, OSError, ValueError):
            seat.inbox = None
            continue
        if event["kind"] == "ready":
            seat.is_ready = True
        elif event["kind"] == "begin":
            seat.keys.add(event["key"])
        elif event["kind"] == "epoch" and event["epoch"] > seat.epochs.get(event["key"], 0):
            # a run that goes on tells its old epochs again
            seat.epochs[event["key"]], seat.deaths = event["epoch"], 0
        display.hear(event)


def _reap(seat: _Slot, display: StudyDisplay, is_stopping: bool) -> int:
    """Takes leave of a worker that has ended; returns the status that the study deserves for it."""
    if seat.process is None or seat.process.is_alive() or seat.inbox is not None:
        return 0
    seat.process.join()
    code, seat.process = seat.process.exitcode, None
    display.forget(sorted(seat.keys))
    seat.keys.clear()
    if code >= 0 or is_stopping:  # it has said itself what is wrong
        seat.is_over = True
        return 0 if is_stopping else int(code)
    seat.deaths += 1
    how = f"by {signal.Signals(-code).name}"
    if seat.deaths >= MAX_DEATHS:
        seat.is_over = True
        display.say(f"worker {seat.number} ended {how} {MAX_DEATHS} times without an epoch in between; it is given up")
        return 1
    display.say(f"worker {seat.number} ended {how}; another takes its place, and its trial goes on")
    return 0


def _signal(seats: list[_Slot], number: int) -> None:
    for seat in seats:
        if seat.process is not None and seat.process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(seat.process.pid, number)


@contextlib.contextmanager
def _environment(num_workers: int, number: int, gpus: list[str]) -> Iterator[None]:
    """What a worker's environment says of its share of the machine, set while it is started."""
    share: dict[str, str] = {}
    if gpus:
        share["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    if "OMP_NUM_THREADS" not in os.environ:
        share["OMP_NUM_THREADS"] = str(max(1, num_cores() // num_workers))
    before = {name: os.environ.get(name) for name in share}
    os.environ.update(share)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _gpus() -> list[str]:
    """The GPUs that may be used, as CUDA_VISIBLE_DEVICES names them, found without loading CUDA."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [one.strip() for one in chosen.split(",") if one.strip() and one.strip() != "-1"]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(place) for place, line in enumerate(filter(lambda line: line.startswith("GPU "), listed.splitlines()))]


def _work(plan: Plan, number: int, outbox: Connection) -> None:
    """The life of a worker process."""
    end_with_parent(signal.SIGTERM)
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():  # it had died before it could be watched
        sys.exit(0)
    # a terminal's Ctrl-C reaches the whole group; the one who watches passes it on
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def tell(event: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            outbox.send(event)

    sys.exit(work(plan, tell))
