"""Studies in seconds: the real command, store and worker over a run that only pretends to train."""

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import socket
import sys
import time
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna

import matchai.study.confirmation
import matchai.study.leases
import matchai.study.worker
from matchai.runs.trainer import RunResult
from matchai.settings.config import TrainConfig
from matchai.system.files import write_whole
from matchai.system.processes import any_process, decide, is_main_process
from matchai.training.checkpoint import BEST, LAST, lock_folder
from matchai.training.loop import DivergedError
from matchai.tune import main

PAUSE = 0.005  # seconds of an epoch


def curve(config: TrainConfig) -> list[float]:
    """The mean Dice of every epoch, a function of the settings alone."""
    settings = config.flat()
    place = math.log10(settings["max_lr"]) + 2.7
    top = 0.85 - 0.1 * place**2 - 0.3 * (settings["dice_weight"] - 0.4) ** 2 - 0.01 * abs(settings["focal_gamma"] - 2)
    key = repr([settings[name] for name in ("max_lr", "dice_weight", "focal_gamma", "sampler_weight", "seed")])
    noise = hashlib.sha256(key.encode()).digest()
    epochs = settings["epochs"]
    return [
        top * (1 - math.exp(-4 * epoch / epochs)) + 0.002 * noise[epoch % 32] / 256 for epoch in range(1, epochs + 1)
    ]


def pretend(
    config: TrainConfig,
    on_epoch: Callable[[dict[str, Any]], None],
    *,
    on_step: Callable[[int, int], None],
    stop: Any,
    display: Any,
    draw_every: float,
) -> RunResult:
    """As `matchai.run`: keeps a state, tells its epochs again when it goes on, and stops when asked to."""
    output = config.run.output
    assert output is not None
    output.mkdir(parents=True, exist_ok=True)
    is_main = is_main_process()
    with lock_folder(output) if is_main else contextlib.nullcontext():
        (output / LAST).mkdir(exist_ok=True)
        state = output / LAST / "state.json"
        history: list[dict[str, Any]] = decide(lambda: json.loads(state.read_text()) if state.exists() else [])
        for row in history:
            on_epoch(row)
        values = curve(config)
        for epoch in range(len(history) + 1, len(values) + 1):
            time.sleep(PAUSE)
            on_step(epoch, len(values))
            if any_process(stop.received is not None):
                break
            row = {"epoch": epoch, "mean_dice": values[epoch - 1], "lesion_dice": None, "val_loss": 1 / epoch}
            history.append({**row, "seconds": 1.0})
            if is_main:
                write_whole(state, json.dumps(history).encode())
                write_whole(output / BEST, b"weights")
                with (output / "epochs.log").open("a") as file:
                    file.write(f"{epoch}\n")
            on_epoch(history[-1])
        return RunResult(output, history, None, None, len(history) == len(values), stop.received)


def diverge(config: TrainConfig, *args: Any, **kwargs: Any) -> RunResult:
    """A run that diverges above a learning rate."""
    if config.optimisation.max_lr > 1e-3:
        raise DivergedError("not finite")
    return pretend(config, *args, **kwargs)


def study(argv: list[str], run: Callable[..., RunResult] = pretend) -> int:
    """The command, over a pretended run, in this process."""
    with (
        unittest.mock.patch.object(matchai.study.worker, "run", run),
        unittest.mock.patch.object(matchai.study.confirmation, "write_report", note_report),
    ):
        return main(argv)


def note_report(folder: Path, *_: Any, **__: Any) -> Path:
    """In place of the report, whose pictures take a second; `tests/test_tune.py` has real ones."""
    write_whole(folder / "report.html", b"a report")
    return folder / "report.html"


def flags(folder: Path, data: Path, cache: Path, *more: str) -> list[str]:
    """Flags of a study of seconds in a folder."""
    return [
        *("--preset", "study", "--data", str(data), "--cache", str(cache), "--image-size", "64"),
        *("--encoder", "tu-test_efficientnet", "--epochs", "6", "--storage", str(folder / "store.db")),
        *("--output", str(folder / "study"), "--confirm", "0", *more),
    ]


def rows(place: Path | str, name: str = "study") -> list[optuna.trial.FrozenTrial]:
    """What a plain Optuna program reads from the store: of a folder's, or by its URL."""
    url = (
        place.replace("postgresql:", "postgresql+psycopg2:")
        if isinstance(place, str)
        else f"sqlite:///{place}/store.db"
    )
    return optuna.load_study(study_name=name, storage=url).get_trials()


def table(place: Path | str, name: str = "study") -> list[Any]:
    """All of a study that must not depend on where and when it ran."""
    return [
        [row.number, row.state.name, row.values, row.params, row.distributions, row.intermediate_values]
        + [row.user_attrs.get(key) for key in ("dice_weight", "best_epoch", "reason", "is_recipe")]
        for row in rows(place, name)
    ]


def _forked(argv: list[str], seconds: float, run: Callable[..., RunResult], environment: dict[str, str]) -> None:
    global PAUSE  # noqa: PLW0603 a process of its own
    PAUSE = seconds
    os.environ |= environment
    if "LEASE" in environment:
        matchai.study.leases.LEASE, matchai.study.leases.RENEW_EVERY = float(environment["LEASE"]), 0.1
    if "TOLD" in environment:
        with Path(environment["TOLD"]).open("w", buffering=1) as sys.stderr:
            raise SystemExit(study(argv, run))
    raise SystemExit(study(argv, run))


def start(argv: list[str], seconds: float = PAUSE, run: Callable[..., RunResult] = pretend, **environment: str) -> Any:
    """Starts the command in a process of its own, forked from one that has imported everything.

    Args:
        argv: Its flags.
        seconds: Of an epoch.
        run: What it runs.
        **environment: What it finds there; TOLD names a file for its errors, LEASE is one in seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.pretending"])
    process = context.Process(target=_forked, args=(argv, seconds, run, environment))
    process.start()
    return process


def start_group(argv: list[str], world: int, told: Path, run: Callable[..., RunResult] = pretend) -> list[Any]:
    """Starts the command on several gloo processes, whose errors go to `told`/RANK."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told.mkdir(exist_ok=True)
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "1"}
    return [
        start(argv, PAUSE, run, **shared, RANK=str(rank), LOCAL_RANK=str(rank), TOLD=str(told / str(rank)))
        for rank in range(world)
    ]


def end(process: Any, seconds: float = 60) -> int:
    """Waits for a process; returns its status."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"the study did not end within {seconds} s")
    assert process.exitcode is not None
    return int(process.exitcode)
