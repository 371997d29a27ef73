"""The settings of a study itself, beside those of its runs; imports no torch, so that `--help` answers at once."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from matchai.settings.config import TrainConfig
from matchai.system import InputError

OBJECTIVES: dict[str, Literal["maximize", "minimize"]] = {
    "mean_dice": "maximize",
    "lesion_dice": "maximize",
    "mean_iou": "maximize",
    "notebook_dice": "maximize",
    "val_loss": "minimize",
    "train_loss": "minimize",
}
"""The scalars of the history that a study may optimise, and which way."""


@dataclass(frozen=True)
class StudySettings:
    """The study: how many trials, where they are stored, how they are chosen."""

    trials: int = 50
    """Number of finished trials (complete or pruned) that the study reaches in total, over all its starts."""
    workers: int = 1
    """Number of processes that run trials in parallel on this machine, each on its own GPU or its share of the
    cores."""
    storage: str = "studies/matchai.db"
    """Where trials are stored: a SQLite file, or a URL such as postgresql://user@host/name, which many hosts can
    share."""
    study_name: str | None = None
    """Name of the study in the storage (default: the name of the preset)."""
    space: Path | None = None
    """YAML file of the settings to search (default: studies/default.yaml)."""
    objective: str = "mean_dice"
    """The metric to optimise: mean_dice, lesion_dice, mean_iou, notebook_dice, val_loss or train_loss. The value of a
    trial is that of its best epoch."""
    confirm: int = 3
    """How many of the best trials are trained again, with the recipe, on 3 new seeds each. 0: none."""
    search_sampler: Literal["gp-tpe", "tpe", "random"] = "gp-tpe"
    """How settings are proposed: tpe (multivariate), gp-tpe (tpe and a Gaussian process in turn) or random."""
    pruner: Literal["one-cycle", "median", "none"] = "one-cycle"
    """How unpromising trials are stopped once half of their epochs are done: one-cycle allows for noise, median stops
    more of them, none stops none."""
    prune: bool = True
    """Stop unpromising trials early."""
    screen_epochs: int = 0
    """Search with complete runs of this few epochs, then train only the best fifth at full length. 0: no screening."""
    report: bool = False
    """Only draw the report of the study as it is now."""


@dataclass(frozen=True)
class TuneConfig(TrainConfig):
    """All settings of a study: its own and those of its runs."""

    study: StudySettings = field(default_factory=StudySettings)


def check_study(settings: StudySettings) -> list[str]:
    """Every setting of the study that none could take, one sentence each."""
    problems = []
    lowest: dict[str, int] = {"trials": 1, "workers": 1, "confirm": 0, "screen_epochs": 0}
    for name, low in lowest.items():
        value: Any = getattr(settings, name)
        if not low <= value <= 100_000 or not math.isfinite(value):
            problems.append(f"{name} is {value}, but must be at least {low} and at most 100000.")
    if settings.objective not in OBJECTIVES:
        problems.append(
            f"objective is {settings.objective!r}, which is no scalar of the history: choose one of "
            f"{', '.join(OBJECTIVES)}."
        )
    if settings.study_name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", settings.study_name):
        problems.append(
            f"study_name is {settings.study_name!r}, but must be a name of letters, digits, dots, dashes and "
            "underlines, as it names a folder too."
        )
    return problems


def refuse_restart(config: TrainConfig) -> None:
    """Refuses --restart, which would throw trials away.

    Raises:
        InputError: If it was given.
    """
    if config.run.restart:
        raise InputError(
            "--restart is not taken here: a study always resumes; for a new one name another --study-name."
        )
