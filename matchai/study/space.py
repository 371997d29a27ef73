"""The search space: which settings a study searches, read from YAML and held against the settings themselves."""

import difflib
import math
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from matchai.settings import FREE, LEAVES, TrainConfig, check, load_mapping
from matchai.system import InputError, Problems

# settings that say what is measured, on what and for how long, so that trials could not be compared
_MEASURE = {"seed", "init", "epochs", "sets", "images_name", "masks_name", "groups_name", "class_names"} | {
    *("background_class", "lesion_classes", "val_fraction", "folds", "fold", "phantom_slices")
}
NOT_SEARCHED = {*FREE, *_MEASURE}
MOST_CHECKED = 10_000  # whole numbers of a range that are held against the setting one by one


@dataclass(frozen=True)
class Space:
    """What a study searches.

    Attributes:
        entries: As in the file, with every default filled in; plain JSON values.
        distributions: Optuna's, one for each parameter.
        simplexes: For each mixture the settings that are its shares.
        choices: For each parameter of choices the setting's value behind each label.
    """

    entries: dict[str, dict[str, Any]]
    distributions: dict[str, BaseDistribution]
    simplexes: dict[str, tuple[str, ...]]
    choices: dict[str, dict[Any, Any]]

    def settings(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The searched settings of a trial, under their names."""
        found: dict[str, Any] = {}
        for name in self.entries:
            if name in self.simplexes:
                names = self.simplexes[name]
                found |= zip(names, shares([params[one] for one in _parameters(name, len(names))]), strict=True)
            else:
                found[name] = self.choices[name][params[name]] if name in self.choices else params[name]
        return found

    def check_params(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters of a trial that somebody else chose, some or all, as the space has them.

        Raises:
            InputError: For names that are not in the space, and for values outside of it or of another type.
        """
        params: dict[str, Any] = {}
        problems = Problems(
            f"there is no parameter {name!r} in the space ({', '.join(self.distributions)})"
            for name in given
            if name not in self.distributions
        )
        for name in (name for name in self.distributions if name in given):
            with problems.collect():
                params[name] = _inside(name, given[name], self.distributions[name])
        problems.raise_any()
        return params

    def attributes(self, settings: Mapping[str, Any]) -> dict[str, float]:
        """The shares among a trial's settings, which are no parameters of their own."""
        return {name: settings[name] for names in self.simplexes.values() for name in names}

    def params(self, config: TrainConfig) -> dict[str, Any]:
        """The parameters of given settings: where the recipe lies in the space.

        Raises:
            InputError: If they lie outside of it.
        """
        values, problems = config.flat(), Problems()
        params: dict[str, Any] = {}
        for name in self.entries:
            if name in self.simplexes:
                names = self.simplexes[name]
                found = [float(values[one]) for one in names]
                if abs(sum(found) - 1) > 1e-9:
                    given = ", ".join(f"{one} {value:g}" for one, value in zip(names, found, strict=True))
                    problems.append(
                        f"The recipe's {given} sum to {sum(found):g}, but the space has them sum to 1: divide each by "
                        "that sum, or fix all of them by flags, which takes them out of the space."
                    )
                    continue
                params |= zip(_parameters(name, len(names)), _positions(found), strict=True)
                continue
            labels = [label for label, value in self.choices.get(name, {}).items() if value == values[name]]
            params[name] = labels[0] if labels else values[name]
            if not labels and (name in self.choices or not _is_inside(values[name], self.entries[name])):
                problems.append(
                    f"The recipe's {name} is {values[name]}, which is not in the space "
                    f"({describe_entry(self.entries[name])}), and the recipe is the first trial: widen the space, or "
                    "fix the setting by its flag."
                )
        problems.raise_any()
        return params


def shares(params: list[float]) -> list[float]:
    """A point of the simplex, uniform where the parameters are uniform and independent on [0, 1].

    Breaks a stick: of what is left of it the next of k remaining shares takes 1 - u^(1/(k - 1)), the last but one u
    itself (Devroye, Non-Uniform Random Variate Generation, 1986, chapter V.2).

    Args:
        params: One fewer than there are shares.

    Returns:
        Shares of 0 or more that sum to 1.
    """
    rest, found = 1.0, []
    for number, u in enumerate(params):
        left = len(params) - number
        share = rest * (1 - u ** (1 / left) if left > 1 else u)
        found.append(share)
        rest = max(rest - share, 0.0)
    return [*found, rest]


def _positions(found: list[float]) -> list[float]:
    """The parameters whose `shares` are these."""
    rest, params = 1.0, []
    for number, share in enumerate(found[:-1]):
        left = len(found) - 1 - number
        part = min(max(share / rest, 0.0), 1.0) if rest > 1e-12 else 0.5
        params.append((1 - part) ** left if left > 1 else part)
        rest -= share
    return params


def default_space() -> Path:
    """The file of the default space: in the source tree, or where an installation puts it.

    Raises:
        InputError: If it is in neither.
    """
    source = Path(__file__).parents[2]
    for folder in (source, Path(sys.prefix) / "share" / "matchai"):
        if (folder / "studies" / "default.yaml").is_file():
            return folder / "studies" / "default.yaml"
    raise InputError(f"studies/default.yaml is not in {source}; name a search space with --space FILE.")


def load_space(path: Path, config: TrainConfig, fixed: Collection[str] = ()) -> Space:
    """Reads a search space and holds every value of it against the settings.

    Args:
        path: The YAML file.
        config: The recipe, into which a trial's settings are put.
        fixed: Settings given by flags, which leave the space; shares of a mixture only all together.

    Raises:
        InputError: With every problem found.
    """
    space, problems = Space({}, {}, {}, {}), Problems()
    searched: list[str] = []
    for name, entry in load_mapping(path, "--space", "settings to search").items():
        try:
            if isinstance(entry, dict) and set(entry) == {"simplex"}:
                names = _simplex(str(name), entry["simplex"])
                searched += names
                chosen = [one for one in names if one in fixed]
                if chosen and len(chosen) < len(names):
                    missing = " and ".join(f"--{one.replace('_', '-')}" for one in names if one not in fixed)
                    problems.append(
                        f"--{chosen[0].replace('_', '-')} fixes one share of the searched mixture {name}: give "
                        f"{missing} too, or none of them."
                    )
                elif not chosen:
                    space.simplexes[name], space.entries[name] = names, {"simplex": list(names)}
                    unit_interval = FloatDistribution(0.0, 1.0)
                    space.distributions.update(dict.fromkeys(_parameters(name, len(names)), unit_interval))
                continue
            _check_name(name)
            searched.append(name)
            distribution, values = _distribution(name, entry, config)
            if name in fixed:
                continue
            space.distributions[name], space.entries[name] = distribution, _plain(distribution)
            if isinstance(distribution, CategoricalDistribution):
                space.choices[name] = dict(zip(distribution.choices, values, strict=True))
        except InputError as error:
            problems += [f"{path}, {name}: {problem}" for problem in error.problems]
    problems += [f"{path}: {name} is searched twice." for name in sorted(set(searched)) if searched.count(name) > 1]
    if not problems and not space.entries:
        problems.append(f"{path} leaves nothing to search beside the flags; drop a flag, or give another --space.")
    problems.raise_any()
    space.params(config)
    return space


def _parameters(name: str, num_shares: int) -> list[str]:
    return [f"{name}_{number}" for number in range(1, num_shares)]


def _simplex(name: str, found: Any) -> tuple[str, ...]:
    if name in LEAVES:
        raise InputError("a mixture needs a name of its own, and this is a setting's; rename it.")
    if not isinstance(found, list) or len(found) < 2 or len(set(map(str, found))) < len(found):
        raise InputError(f"a simplex is a list of two or more different settings, not {found!r}.")
    for one in found:
        _check_name(one)
        if LEAVES[one][1].type is not float:
            raise InputError(f"{one} is no number that could be a share of a mixture.")
    return tuple(found)


def _check_name(name: Any) -> None:
    if name not in LEAVES:
        near = difflib.get_close_matches(str(name), LEAVES, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else "python -m matchai.tune --help-all lists all settings."
        raise InputError(f"there is no setting {name!r}: {hint}")
    if name in NOT_SEARCHED:
        raise InputError(
            "this setting cannot be searched, as trials with different ones are not comparable; give it by its flag."
        )


def _distribution(name: str, entry: Any, config: TrainConfig) -> tuple[BaseDistribution, list[Any]]:
    """The distribution of one setting, and of choices the values behind the labels."""
    form = "{low: …, high: …}, with log: true or step: … if wanted, or {choices: […]}"
    if not isinstance(entry, dict) or not (
        set(entry) == {"choices"} or {"low", "high"} <= set(entry) <= {"low", "high", "log", "step"}
    ):
        raise InputError(f"found {entry!r}, but a setting to search is {form}.")
    if "choices" in entry:
        found = entry["choices"]
        if not isinstance(found, list) or len(found) < 2:
            raise InputError(f"choices are a list of two or more values, not {found!r}.")
        values = [_accepted(name, value, config) for value in found]
        labels = [", ".join(map(str, value)) if isinstance(value, tuple) else value for value in values]
        labels = [label if label is None or isinstance(label, bool | int | float) else str(label) for label in labels]
        if len(set(map(str, labels))) < len(labels):
            raise InputError("a choice is given twice.")
        return CategoricalDistribution(labels), values
    kind = LEAVES[name][1].type
    if kind is not float and kind not in (int, int | None):
        raise InputError("low and high are for numbers; give {choices: […]}.")
    if not isinstance(entry.get("log", False), bool):
        raise InputError(f"log is {entry['log']!r}, but must be true or false.")
    is_log = entry.get("log", False)
    low, high = (_accepted(name, entry[end], config) for end in ("low", "high"))
    step = None if entry.get("step") is None else _number(entry["step"], kind)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InputError(f"low is {low} and high {high}, but a range must rise.")
    if is_log and (low <= 0 or step is not None):
        raise InputError("a logarithmic range begins above 0 and has no step.")
    if step is not None and not 0 < step <= high - low:
        raise InputError(f"step is {step}, but must be above 0 and fit into the range.")
    if kind is float:
        high = high if step is None else low + step * math.floor((high - low) / step + 1e-9)
        return FloatDistribution(low, high, log=is_log, step=step), []
    step = step or 1
    high = low + (high - low) // step * step
    inside = range(low, high + 1, step)
    for value in inside if len(inside) <= MOST_CHECKED else ():
        _accepted(name, value, config)
    return IntDistribution(low, high, log=is_log, step=1 if is_log else step), []


def _plain(distribution: BaseDistribution) -> dict[str, Any]:
    if isinstance(distribution, CategoricalDistribution):
        return {"choices": list(distribution.choices)}
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    step = None if distribution.step in (None, 1) and isinstance(distribution, IntDistribution) else distribution.step
    entry = {"low": distribution.low, "high": distribution.high}
    return entry | ({"log": True} if distribution.log else {}) | ({} if step is None else {"step": step})


def _is_inside(value: Any, entry: Mapping[str, Any]) -> bool:
    if value is None or not entry["low"] <= value <= entry["high"]:
        return False
    steps = (value - entry["low"]) / entry["step"] if "step" in entry else 0.0
    return bool(abs(steps - round(steps)) < 1e-9)


def _inside(name: str, value: Any, distribution: BaseDistribution) -> Any:
    """A parameter's value as its distribution has it; InputError where that does not hold it."""
    entry, is_number = _plain(distribution), isinstance(value, int | float) and not isinstance(value, bool)
    found: list[Any] = []
    if isinstance(distribution, CategoricalDistribution):  # True equals 1, but is another choice
        choices = (choice for choice in distribution.choices if isinstance(choice, bool) == isinstance(value, bool))
        found = [choice for choice in choices if choice == value]
    elif (
        is_number
        and math.isfinite(value)
        and _is_inside(value, {"step": 1} | entry if _is_whole(distribution) else entry)
    ):
        found = [round(value) if _is_whole(distribution) else float(value)]
    if not found:
        raise InputError(f"{name} is {value!r}, which is not in the space ({describe_entry(entry)})")
    return found[0]


def _is_whole(distribution: BaseDistribution) -> bool:
    return isinstance(distribution, IntDistribution)


def _number(value: Any, kind: Any) -> Any:
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value) if kind is float else int(value)
    except (TypeError, ValueError):
        raise InputError(f"step is {value!r}, but must be a number.") from None


def _accepted(name: str, value: Any, config: TrainConfig) -> Any:
    """The value as the setting takes it; InputError where the setting refuses it."""
    changed = config.updated_from({name: value})
    before = check(config)
    Problems(problem for problem in check(changed) if problem not in before).raise_any()
    return changed.flat()[name]


def describe_entry(entry: Mapping[str, Any]) -> str:
    """Names and values of an entry of the space, or of settings, for people."""
    return ", ".join(f"{key} {value}" for key, value in entry.items())
