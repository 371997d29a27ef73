"""`python -m matchai.doctor [--data DIR]`: says whether a training with these flags would start, and what to fix."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from matchai.preflight import Finding, check_extras, check_launcher, check_loading, check_packages, check_torch
from matchai.settings import RunSettings, TrainConfig
from matchai.system import run_command

DESCRIPTION = (
    "Checks, line by line, whether training with these flags would start on this machine and this data, and says what "
    "to fix. It accepts every flag of matchai.train; only --output differs: it is the folder for pictures of the data. "
    "Exit status: 0 if training would start, 1 if not."
)


@dataclass(frozen=True)
class DoctorRun(RunSettings):
    """What would run."""

    output: Path | None = None
    """Folder for pictures of the data (default: doctor). Nothing else is written."""


@dataclass(frozen=True)
class DoctorConfig(TrainConfig):
    """All settings of the training to check."""

    run: DoctorRun = DoctorRun()


def main(argv: list[str] | None = None, prog: str = "python -m matchai.doctor") -> int:
    """Checks; returns the exit status: 0 training would start, 1 it would not, 2 wrong flags, 130 Ctrl-C."""
    try:
        from matchai.settings import parse  # noqa: PLC0415 what it imports may be missing
    except ImportError as error:
        fault = Finding("problem", f"Flags cannot be read: {error}", "`pip install --force-reinstall tyro pyyaml`")
        return _tell(iter((*check_packages(), fault)))
    words = sys.argv[1:] if argv is None else argv
    return run_command(
        lambda: _tell(_check(parse(words, DESCRIPTION, prog, DoctorConfig))), left="Nothing but pictures was written."
    )


def _check(config: DoctorConfig) -> Iterator[Finding]:
    yield from check_packages()
    fit = check_torch()
    yield fit
    loading = check_loading() if fit.status != "problem" else fit
    if loading.status == "problem":
        yield from () if loading is fit else (loading,)
        yield from check_launcher(0)
        yield Finding("warning", "Devices, encoder and data are not examined", "fix the packages first")
        return
    yield loading
    yield check_extras()
    from matchai.preflight import check_training  # noqa: PLC0415 needs torch, which the checks above may find broken

    yield from check_training(config, config.run.output or Path("doctor"))


def _tell(findings: Iterator[Finding]) -> int:
    num_problems = 0
    for one in findings:
        print(one, flush=True)
        num_problems += one.status == "problem"
    if num_problems:
        print(f"Training would not start, or soon end: lines above that tell a problem: {num_problems}.")
        return 1
    print("Training would start.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
