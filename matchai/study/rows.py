"""Which trials of a study count, and what is shown of them: all is read from the store, and trusted in nothing."""

import copy
import math
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from matchai.study.space import Space
from matchai.system import InputError

MIXES = ("loss_mix_1", "loss_mix_2")  # the parameters behind the three shares of the loss
SHARES = ("ce_weight", "dice_weight", "focal_weight")
LABELS = {"mean_dice": "mean Dice", "lesion_dice": "lesion Dice", "val_loss": "validation loss"}
MARKS = {"run", "host", "seed", "epochs", "versions"}  # attributes that a trial is made with
T = TypeVar("T")
MIN_IMPORTANCE = 10  # complete trials; a forest on fewer tells nothing


class StudyView(optuna.Study):
    """A study of whose trials only some are seen, by all that read a study's trials.

    Args:
        name: Of the study.
        storage: Optuna's, which holds it.
        read: Returns the trials that are seen, of the study that it is given.
    """

    def __init__(self, name: str, storage: BaseStorage, read: Callable[[optuna.Study], list[FrozenTrial]]) -> None:
        super().__init__(name, storage)
        self._read = read

    def get_trials(self, deepcopy: bool = True, states: Container[TrialState] | None = None) -> list[FrozenTrial]:
        """The trials that are seen, by number; as Optuna's."""
        found = [trial for trial in self._read(self) if states is None or trial.state in states]
        return copy.deepcopy(found) if deepcopy else found


def select_own(trials: Iterable[FrozenTrial], study_id: str) -> list[FrozenTrial]:
    """The trials that matchai made, and ended if they have ended; all others count as nothing.

    matchai makes a trial in one transaction with its `MARKS` and the study's id (`study_id`, which version 0.1.0 did
    not write) among its attributes, and writes its `seconds` before it ends it. So a trial that another program added
    has no such marks, a copied one has another study's id or the folder of an earlier trial, and one that another
    program ended has no seconds.

    Args:
        trials: Of the study, by number.
        study_id: The `id` that matchai gave the study.
    """
    own: dict[str, FrozenTrial] = {}
    for trial in trials:
        about = trial.user_attrs
        is_ended = trial.state in {TrialState.COMPLETE, TrialState.PRUNED}
        is_own = about.keys() >= MARKS and about.get("study_id", study_id) == study_id
        if is_own and trial.state != TrialState.WAITING and ("seconds" in about or not is_ended):
            own.setdefault(str(about["run"]), trial)
    return list(own.values())


def sort_others(
    trials: Iterable[FrozenTrial], own: Iterable[FrozenTrial], space: Space | None
) -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
    """What the trials of a study are that do not count.

    Args:
        trials: All of them.
        own: Those that count.
        space: What is searched; without it, nothing is said of enqueued trials.

    Returns:
        The parameters of enqueued trials that can be trained, and why each of the rest counts as nothing, by number.
    """
    waiting: dict[int, dict[str, Any]] = {}
    left_out: dict[int, str] = {}
    numbers = {trial.number for trial in own}
    for trial in (trial for trial in trials if trial.number not in numbers):
        if trial.state != TrialState.WAITING:
            left_out[trial.number] = f"is {trial.state.name}"
        elif space is not None:
            try:
                waiting[trial.number] = read_enqueued(trial, space)
            except InputError as error:
                left_out[trial.number] = f"waits, but {' and '.join(error.problems)}"
    return waiting, left_out


def read_enqueued(trial: FrozenTrial, space: Space) -> dict[str, Any]:
    """The parameters that an enqueued trial is to have, all or some of the space's.

    Raises:
        InputError: If they do not fit the space.
    """
    fixed = trial.system_attrs.get("fixed_params")
    return space.check_params({**trial.params, **(fixed if isinstance(fixed, dict) else {})})


def describe_left_out(name: str, left_out: Mapping[int, str]) -> str:
    """The sentence on a study's trials that count as nothing, by number with the reason."""
    # those that wait to be trained are somebody's, and are told first
    ordered = sorted(left_out.items(), key=lambda item: ("wait" not in item[1], item[0]))
    shown = [f"trial {number} {why}" for number, why in ordered[:10]]
    more = f"; and {len(left_out) - 10} more" if len(left_out) > 10 else ""
    return (
        f"Study {name} holds trials that count as nothing, as matchai did not make or end them: "
        f"{'; '.join(shown)}{more}."
    )


@dataclass(frozen=True)
class Row:
    """What is shown of a trial.

    Attributes:
        number: Of the trial.
        kind: "complete", "pruned", "running", "waiting", "failed for the machine", or "failed for its settings": told
            complete with a reason, or with a value that is not finite.
        value: The trial's value where it is complete; the best epoch so far where it is pruned or running; else NaN.
        settings: What was set, by the setting's name: the shares of the loss rather than the parameters behind them.
        curve: The objective by epoch, finite values alone.
        is_recipe: Whether these are the recipe's settings.
        attributes: The trial's user attributes: untrusted.
    """

    number: int
    kind: str
    value: float
    settings: dict[str, Any]
    curve: dict[int, float]
    is_recipe: bool
    attributes: dict[str, Any]

    @property
    def counts(self) -> bool:
        """Whether it has a value to compare: it is complete, or pruned after an epoch."""
        return self.kind in {"complete", "pruned"} and math.isfinite(self.value)


class StudyFacts:
    """What pictures and report show of a study.

    Attributes:
        study: The study.
        objective: Words for it.
        is_maximised: Whether more of it is better.
        sign: 1 where more is better, else -1.
        rows: Of all trials, in the order of their numbers.
        settings: What was searched, and over what.
        best: The best complete trial; None where none is complete.
        recipe: The recipe's trial; None where there is none yet.
        searched: What the study says of itself.
        epochs: Of a trial; None where neither study nor trials tell.
        digits: Decimals that show four figures of the usual value: 4 for a Dice.
    """

    def __init__(self, study: optuna.Study, objective: str) -> None:
        self.study, self.objective = study, label_objective(objective)
        self.is_maximised = is_maximised(study)
        self.sign = 1 if self.is_maximised else -1
        self.rows, self.settings = read_rows(study), read_settings(study)
        self.searched, self.epochs = read_searched(study), read_epochs(study)
        self.best, self.recipe = find_best(self.rows, self.is_maximised), find_recipe(self.rows)
        sizes = sorted(abs(row.value) for row in self.rows if row.kind == "complete" and row.value)
        self.digits = min(12, max(1, 3 - math.floor(math.log10(sizes[len(sizes) // 2])))) if sizes else 4


def read_rows(study: optuna.Study) -> list[Row]:
    """Reads what is shown of every trial, in the order of their numbers."""
    trials = sorted(study.get_trials(deepcopy=False), key=lambda trial: trial.number)
    return [_read_row(trial, is_maximised(study)) for trial in trials]


def _read_row(trial: FrozenTrial, maximised: bool) -> Row:
    kind = {TrialState.FAIL: "failed for the machine"}.get(trial.state, trial.state.name.lower())
    curve = {step: value for step, value in sorted(trial.intermediate_values.items()) if math.isfinite(value)}
    value = math.nan
    if trial.state == TrialState.COMPLETE:
        value = math.nan if trial.value is None else float(trial.value)
        if trial.user_attrs.get("reason") or not math.isfinite(value):
            kind = "failed for its settings"
    elif trial.state != TrialState.FAIL and curve:
        value = max(curve.values()) if maximised else min(curve.values())
    settings = _with_shares(trial.params, {name: trial.user_attrs.get(name) for name in SHARES})
    is_recipe = trial.user_attrs.get("is_recipe") is True
    return Row(trial.number, kind, value, settings, curve, is_recipe, trial.user_attrs)


def _with_shares(found: dict[str, T], shares: dict[str, T]) -> dict[str, T]:
    """What is known by the settings' names: the shares of the loss first, in place of the parameters behind them."""
    if not all(name in found for name in MIXES):
        return found
    return shares | {name: value for name, value in found.items() if name not in MIXES}


def is_maximised(study: optuna.Study) -> bool:
    """Whether more of the objective is better."""
    return study.direction == optuna.study.StudyDirection.MAXIMIZE


def find_best(rows: Iterable[Row], maximised: bool) -> Row | None:
    """The complete trial with the best value, the first of equals; None where none is complete."""
    complete = [row for row in rows if row.kind == "complete"]
    sign = 1 if maximised else -1
    return max(complete, key=lambda row: (sign * row.value, -row.number), default=None)


def find_recipe(rows: Iterable[Row]) -> Row | None:
    """The recipe's row, rather one that did not fail for the machine, as such rows are replaced; None for none."""
    recipes = [row for row in rows if row.is_recipe]
    return next((row for row in recipes if row.kind != "failed for the machine"), recipes[0] if recipes else None)


def read_settings(study: optuna.Study) -> dict[str, BaseDistribution]:
    """Reads which settings were searched, and over what: the shares of the loss in place of the parameters behind."""
    found: dict[str, BaseDistribution] = {}
    for trial in study.get_trials(deepcopy=False):
        found = trial.distributions | found
    return _with_shares(found, dict.fromkeys(SHARES, FloatDistribution(0, 1)))


def read_epochs(study: optuna.Study) -> int | None:
    """How many epochs a trial has, as the study or else its trials tell; None where neither does."""
    found = [read_searched(study).get("epochs"), *(row.attributes.get("epochs") for row in read_rows(study))]
    return next((epochs for epochs in found if isinstance(epochs, int) and epochs > 0), None)


def read_searched(study: optuna.Study) -> dict[str, Any]:
    """What the study says of itself; empty where it says nothing."""
    found = study.user_attrs.get("matchai")
    return found if isinstance(found, dict) else {}


def label_objective(objective: str) -> str:
    """Words for a key of the history: "mean Dice" for `mean_dice`."""
    return LABELS.get(objective, objective.replace("_", " "))


def capitalise(text: str) -> str:
    """The text with its first letter large, and the others as they are."""
    return text[:1].upper() + text[1:]


def format_setting(value: object) -> str:
    """A setting's value in four digits: 0.0005 is "5e-4"; "–" where there is none."""
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    if 0 < abs(value) < 0.01:
        return np.format_float_scientific(value, precision=3, trim="-", exp_digits=1)
    return f"{value:.4g}"


def format_number(value: float | None, digits: int, sign: str = "-") -> str:
    """A number with a true minus sign; "–" where there is none, or it is not finite."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}".replace("-", "−")


def find_importances(study: optuna.Study) -> dict[str, float]:
    """How much of the objective's variance each setting explains alone, by fANOVA (Hutter, Hoos and Leyton-Brown 2014).

    Only complete trials count, those that failed for their settings left out. The two parameters behind the shares of
    the loss are added up as "loss mix".

    Returns:
        Name to share, all of them together 1, the greatest first; empty for fewer than `MIN_IMPORTANCE` such trials,
        for equal values, and where there are not two settings to compare.
    """
    values = {row.number: row.value for row in read_rows(study) if row.kind == "complete"}
    if len(values) < MIN_IMPORTANCE or len(set(values.values())) == 1:
        return {}
    evaluator = FanovaImportanceEvaluator(seed=0)
    # a target that is not finite leaves a trial out
    shares = get_param_importances(study, evaluator=evaluator, target=lambda trial: values.get(trial.number, math.nan))
    mix = [name for name in MIXES if name in shares]
    merged = {name: share for name, share in shares.items() if name not in mix}
    if mix:
        merged["loss mix"] = sum(shares[name] for name in mix)
    return dict(sorted(merged.items(), key=lambda item: (-item[1], item[0]))) if len(merged) > 1 else {}
