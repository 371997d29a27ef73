"""What a study is, resolved before its first trial: recipe, space and stages, and how all that is recognised again."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
import torch
from optuna.trial import TrialState

from matchai.data import Data
from matchai.settings import (
    FREE,
    OBJECTIVES,
    StudySettings,
    TrainConfig,
    TuneConfig,
    check,
    check_study,
    refuse_restart,
)
from matchai.study.rows import read_enqueued
from matchai.study.space import Space, default_space, describe_entry, load_space
from matchai.study.storage import Store
from matchai.study.storage_url import parse_storage
from matchai.system import InputError, Problems, choose_precision, plural
from matchai.training import build_model_of, step_problems

NUM_SEEDS, MIN_SEEDS = 3, 2  # fresh seeds of a confirmation; on one, noise cannot be told from a difference
MOST_CHECKED = 10_000  # combinations of the sizes of a step


@dataclass(frozen=True)
class Stage:
    """A study in the store: the search, or what was promoted by a screening.

    Attributes:
        name: Its name in the store.
        epochs: Of its trials.
        folder: Under the study's, where its trials' folders lie.
        promotes: The screening whose best it trains; None where it searches itself.
    """

    name: str
    epochs: int
    folder: str
    promotes: "Stage | None" = None


@dataclass(frozen=True)
class Plan:
    """A study, resolved.

    Attributes:
        config: The recipe: what every trial has but for its searched settings.
        settings: The study's own settings.
        name: The study's name.
        folder: Its folder.
        space: What is searched.
        direction: `maximize` or `minimize`.
        stages: One, or a screening and what follows it.
        num_workers: Loader processes of a worker that shares a host with others; None for the setting's own.
    """

    config: TrainConfig
    settings: StudySettings
    name: str
    folder: Path
    space: Space
    direction: Literal["maximize", "minimize"]
    stages: tuple[Stage, ...]
    num_workers: int | None = None

    @property
    def is_maximised(self) -> bool:
        """Whether more of the objective is better."""
        return self.direction == "maximize"

    def total(self, stage: Stage) -> int:
        """The finished trials that a stage shall have.

        After a screening these are the recipe and the best of it: a fifth, or as many as are confirmed.
        """
        num_promoted = max(self.settings.confirm, math.ceil(self.settings.trials / 5))
        return 1 + num_promoted if stage.promotes else self.settings.trials

    def trial_folder(self, stage: Stage, number: int) -> Path:
        """The run folder of a trial."""
        return self.folder / stage.folder / f"{number:04d}"

    def confirm_folder(self, number: int, seed: int) -> Path:
        """The run folder of a confirming run."""
        return self.folder / "confirm" / f"trial-{number:04d}-seed-{seed}"

    def best_of(self, history: list[dict[str, Any]]) -> tuple[float, int] | None:
        """The value of a trial and its epoch: the best epoch's objective; None where no epoch has one."""
        sign = 1.0 if self.is_maximised else -1.0
        name = self.settings.objective
        found = [(row[name], row["epoch"]) for row in history if row[name] is not None]
        return max(found, key=lambda one: (sign * one[0], -one[1]), default=None)


def make_plan(tune: TuneConfig, fixed: Collection[str] = ()) -> Plan:
    """Resolves the settings of a study.

    Args:
        tune: All settings.
        fixed: Settings given by flags, which leave the space.

    Raises:
        InputError: With every problem found, before anything is written.
    """
    settings, space = tune.study, None
    refuse_restart(tune)
    config = TrainConfig(**{group.name: getattr(tune, group.name) for group in dataclasses.fields(TrainConfig)})
    name = settings.study_name or config.run.preset
    problems = Problems(check_study(settings) + check(config))
    with problems.collect():
        parse_storage(settings.storage)
    with problems.collect():
        space = load_space(settings.space or default_space(), config, fixed)
    if settings.screen_epochs >= config.optimisation.epochs:
        problems.append(
            f"screen_epochs is {settings.screen_epochs}, but must be fewer than the {config.optimisation.epochs} "
            "epochs of a full run: lower it, or raise --epochs."
        )
    if problems or space is None:
        raise InputError(*problems)
    folder = config.run.output or Path("studies") / name
    config = config.updated(cache=config.input.cache or folder.parent / "cache", output=None, config=None)
    stages: tuple[Stage, ...] = (Stage(name, config.optimisation.epochs, "trials"),)
    if settings.screen_epochs:
        screening = Stage(f"{name}-screen", settings.screen_epochs, "screen")
        stages = (screening, dataclasses.replace(stages[0], promotes=screening))
    return Plan(config, settings, name, folder, space, OBJECTIVES[settings.objective], stages)


def refused_values(plan: Plan, data: Data, num_processes: int, device: torch.device) -> list[str]:
    """The values of the space, and their combinations, that a run on this data would refuse, one sentence each."""
    problems: list[str] = []

    def values(name: str) -> list[Any]:
        entry = plan.space.entries.get(name, {})
        if "choices" in entry:
            return list(plan.space.choices[name].values())
        return list(range(entry["low"], entry["high"] + 1, entry.get("step", 1))) if entry else []

    def check_step(config: TrainConfig) -> None:
        Problems(step_problems(config, len(data.train), num_processes, device)).raise_any()

    checks: dict[tuple[str, ...], Callable[[TrainConfig], object]] = {
        ("batch_size", "accumulate", "image_size"): check_step,
        ("mixed_precision",): lambda config: choose_precision(config.optimisation.mixed_precision, device),
        ("encoder", "encoder_weights"): lambda config: build_model_of(config, is_resuming=False),
    }
    for names, check_it in checks.items():
        searched = [name for name in names if values(name)]
        combinations = itertools.product(*map(values, searched)) if searched else ()
        for combination in itertools.islice(combinations, MOST_CHECKED):
            chosen = dict(zip(searched, combination, strict=True))
            try:
                check_it(plan.config.updated(**chosen))
            except InputError as error:
                shown = describe_entry(chosen)
                problems += [f"The space's {shown} would be refused: {problem}" for problem in error.problems]
    return problems[:20]


def fresh_seeds(plan: Plan, read: Callable[[TrainConfig], Data]) -> list[int]:
    """The seeds of the confirmation, none of which a trial uses: the next ones whose split the data allows.

    Args:
        plan: The study.
        read: Reads the data as settings say, or raises InputError.
    """
    seeds: list[int] = []
    for number in range(1, 1000):
        seed = (plan.config.run.seed + number) % 2**63
        with contextlib.suppress(InputError):
            read(plan.config.updated(seed=seed))
            seeds.append(seed)
        if len(seeds) == NUM_SEEDS:
            break
    return seeds


def check_seeds(plan: Plan, seeds: Sequence[int]) -> None:
    """Refuses a study that could not be confirmed.

    Args:
        plan: The study.
        seeds: Its fresh seeds.

    Raises:
        InputError: If it is to be confirmed on fewer than `MIN_SEEDS`.
    """
    if plan.settings.confirm and len(seeds) < MIN_SEEDS:
        raise InputError(
            f"Study {plan.name} has {plural(len(seeds), 'fresh seed')} on which its data can be split, but to confirm "
            f"trials takes {MIN_SEEDS}: give --confirm 0, another --val-fraction, or more data."
        )


def describe(plan: Plan, stage: Stage, data: Data, seeds: Sequence[int]) -> dict[str, Any]:
    """What makes a stage this study and no other, and its fresh seeds; plain JSON values."""
    recipe = plan.config.updated(epochs=stage.epochs).flat()
    split = hashlib.sha256(json.dumps([data.train, data.val]).encode()).hexdigest()[:16]
    found = {
        "space": plan.space.entries,
        "objective": plan.settings.objective,
        "direction": plan.direction,
        "screen_epochs": plan.settings.screen_epochs if stage.promotes else 0,
        "recipe": {name: value for name, value in recipe.items() if name not in FREE},
        "data": data.digests,
        "fresh_seeds": list(seeds),
        "is_synthetic": plan.config.input.data is None,
        "split": split,
    }
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def about_study(store: Store, name: str) -> dict[str, Any]:
    """What a study of a store was made as; InputError if matchai did not make it."""
    found = store.open_study(name, "maximize", {}).user_attrs.get("matchai")
    if not (isinstance(found, dict) and {"objective", "direction", "fresh_seeds"} <= found.keys()):
        raise InputError(f"{store.shown} holds a study {name} that matchai did not make; name another --study-name.")
    about: dict[str, Any] = found
    return about


def is_known(store: Store, name: str) -> bool:
    """Whether the store holds a study of this name that matchai made, or took over."""
    return store.has_study(name) and "matchai" in store.open_study(name, "maximize", {}).user_attrs


def check_stored_study(plan: Plan, stage: Stage, store: Store, description: dict[str, Any]) -> None:
    """Refuses a study of the stage's name that is another one; one that is not there is well.

    So is one that matchai did not make, but for which somebody has enqueued a trial of the space: it is taken over.

    Raises:
        InputError: With every difference, and the way out.
    """
    if not store.has_study(stage.name):
        check_seeds(plan, description["fresh_seeds"])
        return
    study = store.open_study(stage.name, plan.direction, {})
    direction = " and ".join(one.name.lower() for one in study.directions)
    if not is_known(store, stage.name) and _has_enqueued(store, study, plan.space):
        if direction != plan.direction:
            raise InputError(
                f"{store.shown} holds a study {stage.name} whose direction is {direction}, but "
                f"{plan.settings.objective} needs {plan.direction}: create it so, or name another --study-name."
            )
        check_seeds(plan, description["fresh_seeds"])
        return
    found = about_study(store, stage.name)
    wrong = differences({**found, "direction": direction}, description)
    if wrong:
        raise InputError(
            f"{store.shown} holds another study {stage.name}: {'; '.join(wrong)}. Give the old settings, or name "
            "another --study-name."
        )
    check_seeds(plan, found["fresh_seeds"])


def _has_enqueued(store: Store, study: optuna.Study, space: Space) -> bool:
    for trial in store.trials(study):
        with contextlib.suppress(InputError):
            if trial.state == TrialState.WAITING and read_enqueued(trial, space):
                return True
    return False


def differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """How a study in the store differs from the one asked for, in words."""
    found = [
        f"{name} was {was.get(name)} and is {now[name]}"
        for name in ("objective", "direction", "screen_epochs")
        if was.get(name) != now[name]
    ]
    # a study of before a setting existed was made with what is its default now
    defaults = json.loads(json.dumps(TrainConfig().flat(), default=str))
    for part, missing in (("recipe", {name: defaults[name] for name in now["recipe"]}), ("space", {})):
        old, new = missing | was.get(part, {}), now[part]
        found += [
            f"the {part}'s {name} was {_shown(old, name)} and is {_shown(new, name)}"
            for name in dict.fromkeys([*new, *old])
            if old.get(name) != new.get(name)
        ]
    old, new = was.get("data", {}), now["data"]
    changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    found += [f"the content of {name} is another" for name in changed]
    if was.get("split") != now["split"] and not found:
        found.append("the split into training and validation slices is another")
    return found


def _shown(entries: dict[str, Any], name: str) -> str:
    entry = entries.get(name, "not there")
    return describe_entry(entry) if isinstance(entry, dict) else str(entry)
