"""The settings of a study itself, beside those of its runs; imports no torch, so that `--help` answers at once."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from matchai.settings.config import TrainConfig
from matchai.system.errors import InputError

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
    """The study: how many trials, where they are kept, how they are chosen."""

    trials: int = 50
    """Finished trials that the study shall have in all (complete or pruned), however often it is started."""
    workers: int = 1
    """Processes that run trials side by side on this machine, each on its own GPU or its share of the cores."""
    storage: str = "studies/matchai.db"
    """The store: a SQLite file, or an URL such as postgresql://user@host/name, which many hosts may share."""
    study_name: str | None = None
    """The study's name in the store (default: the preset's)."""
    space: Path | None = None
    """YAML file of the settings to search (default: studies/default.yaml)."""
    objective: str = "mean_dice"
    """The scalar of the history to optimise; a trial's value is that of its best epoch."""
    confirm: int = 3
    """How many of the best are trained again, with the recipe, on 3 fresh seeds each (0: none)."""
    search_sampler: Literal["gp-tpe", "tpe", "random"] = "gp-tpe"
    """What proposes settings: tpe (multivariate), gp-tpe (which leaves every other trial to a Gaussian process), or
    random."""
    pruner: Literal["one-cycle", "median", "none"] = "one-cycle"
    """What ends hopeless trials from half-time on: one-cycle with a margin for noise, median boldly, none never."""
    prune: bool = True
    """Whether trials may be ended early at all."""
    screen_epochs: int = 0
    """Search with complete runs of so few epochs, and train only the best fifth at full length (0: no screening)."""
    report: bool = False
    """Only draw the report of the study as it stands."""


@dataclass(frozen=True)
class TuneConfig(TrainConfig):
    """All settings of a study: its own, and those of its runs."""

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
            "--restart is not taken here: a study always goes on; for a new one name another --study-name."
        )
