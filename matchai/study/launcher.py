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
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env

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
        plan = dataclasses.replace(plan, num_workers=max(0, min(8, num_cores() // plan.settings.workers - 1)))
    slots = [_Slot(number) for number in range(plan.settings.workers)]
    statuses: list[int] = []
    stopping_since = None
    try:
        with stop.listening():
            while True:
                if stop.received is None and not {BROKEN, MISTAKE} & set(statuses):
                    for slot in slots if slots[0].is_ready else slots[:1]:
                        if slot.process is None and not slot.is_over:
                            _start(plan, slot, gpus)
                elif stop.received is not None and stopping_since is None:
                    stopping_since = time.monotonic()
                    display.say(f"stopping {len(slots)} workers; all trials stay resumable")
                    _signal(slots, signal.SIGTERM)
                elif stopping_since is not None and time.monotonic() - stopping_since > PATIENCE:
                    _signal(slots, signal.SIGKILL)
                if not any(slot.process for slot in slots):
                    return 0 if display.answer else max(statuses, default=0)
                _listen(slots, display)
                statuses += [status for slot in slots if (status := _reap(slot, display, stopping_since is not None))]
    finally:
        _signal(slots, signal.SIGKILL)


def _start(plan: Plan, slot: _Slot, gpus: list[str]) -> None:
    context = multiprocessing.get_context("spawn")
    slot.inbox, outbox = context.Pipe(duplex=False)
    slot.process = context.Process(target=_work, args=(plan, slot.number, outbox), name=f"matchai worker {slot.number}")
    with _environment(plan.settings.workers, slot.number, gpus), _without_interrupts():
        slot.process.start()
    outbox.close()


def _listen(slots: list[_Slot], display: StudyDisplay) -> None:
    """Hears what workers tell for a moment; a word that a killed one left half said is dropped with its pipe."""
    inboxes = {slot.inbox: slot for slot in slots if slot.inbox}
    for inbox in wait(list(inboxes), timeout=0.2):
        assert isinstance(inbox, Connection)
        slot = inboxes[inbox]
        try:
            event = inbox.recv()
        except (EOFError, OSError, ValueError):
            slot.inbox = None
            continue
        if event["kind"] == "ready":
            slot.is_ready = True
        elif event["kind"] == "begin":
            slot.keys.add(event["key"])
        elif event["kind"] == "epoch" and event["epoch"] > slot.epochs.get(event["key"], 0):
            # a resumed run tells its old epochs again
            slot.epochs[event["key"]], slot.deaths = event["epoch"], 0
        display.hear(event)


def _reap(slot: _Slot, display: StudyDisplay, is_stopping: bool) -> int:
    """Takes leave of a worker that has ended; returns the status that the study deserves for it."""
    if slot.process is None or slot.process.is_alive() or slot.inbox is not None:
        return 0
    slot.process.join()
    code, slot.process = slot.process.exitcode, None
    display.forget(sorted(slot.keys))
    slot.keys.clear()
    if code >= 0 or is_stopping:  # it has said itself what is wrong
        slot.is_over = True
        return 0 if is_stopping else int(code)
    slot.deaths += 1
    how = f"by {signal.Signals(-code).name}"
    if slot.deaths >= MAX_DEATHS:
        slot.is_over = True
        display.say(f"worker {slot.number} ended {how} {MAX_DEATHS} times without an epoch in between; it is given up")
        return 1
    display.say(f"worker {slot.number} ended {how}; another takes its place, and its trial resumes")
    return 0


def _signal(slots: list[_Slot], number: int) -> None:
    for slot in slots:
        if slot.process is not None and slot.process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(slot.process.pid, number)


@contextlib.contextmanager
def _environment(num_workers: int, number: int, gpus: list[str]) -> Iterator[None]:
    """What a worker's environment says of its share of the machine, set while it is started."""
    share: dict[str, str] = {}
    if gpus:
        share["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    if "OMP_NUM_THREADS" not in os.environ:
        share["OMP_NUM_THREADS"] = str(max(1, num_cores() // num_workers))
    before = {name: os.environ[name] for name in share if name in os.environ}
    os.environ.update(share)
    try:
        yield
    finally:
        for name in share:
            del os.environ[name]
        os.environ.update(before)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Holds Ctrl-C back while a worker is started, which never hears it: it would die amid its imports."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    resource_tracker.ensure_running()  # started with the first process, it would let Ctrl-C through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _gpus() -> list[str]:
    """The GPUs that may be used, as CUDA_VISIBLE_DEVICES names them, found without loading CUDA."""
    if parse_flag_from_env("ACCELERATE_USE_CPU") or torch.version.cuda is None:
        return []
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [one.strip() for one in chosen.split(",") if one.strip() and one.strip() != "-1"]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(place) for place in range(sum(line.startswith("GPU ") for line in listed.splitlines()))]


def _work(plan: Plan, number: int, outbox: Connection) -> None:
    """The life of a worker process."""
    end_with_parent(signal.SIGTERM)
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():  # it had died before it could be watched
        sys.exit(0)
    # a terminal's Ctrl-C reaches the whole group; the one who watches passes it on
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def tell(event: dict[str, Any]) -> None:
        if number and event.get("is_common"):  # the first worker says it
            return
        with contextlib.suppress(OSError):
            outbox.send(event)

    sys.exit(work(plan, tell))
