"""matchai's epoch in a process of its own, timed through its callbacks; started by `benchmarks/train.py`."""

import contextlib
import sys
from pathlib import Path
from typing import Any

from clock import Clock, Job

from matchai.settings.config import TrainConfig
from matchai.system.thread_waits import choose_waiting


class FinishedError(Exception):
    """All that was to be timed is timed."""


def main(path: Path, precision: str) -> None:
    """Times the second epoch of a run; the marks of the first are overwritten."""
    # as the command does, before torch is loaded
    choose_waiting()
    from matchai.runs.trainer import run  # noqa: PLC0415

    job = Job.load(path)
    clock = Clock(job.device)
    calls = 0

    def after_step(_: int, __: int) -> None:
        nonlocal calls
        calls += 1
        if calls == job.steps:
            clock.mark("trained")
        elif calls == job.steps + job.val_batches:
            clock.mark("validated")

    def after_epoch(row: dict[str, Any]) -> None:
        nonlocal calls
        calls = 0
        clock.mark("begin" if row["epoch"] == 1 else "saved")
        if row["epoch"] == 2:
            raise FinishedError

    config = TrainConfig().updated(
        **job.settings, output=f"{job.output}/run", encoder_weights="none", epochs=2, mixed_precision=precision
    )
    with contextlib.suppress(FinishedError):
        run(config, after_epoch, on_step=after_step)
    clock.save(job)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
