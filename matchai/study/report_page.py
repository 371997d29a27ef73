"""The report of a study: what won, by how much over the recipe and over noise, and how to train it, on one page."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from matchai.drawing import Answer, Code, Picture, Piece, Points, Section, Table, Text, render_page
from matchai.study.figures import draw_study
from matchai.study.rows import (
    SHARES,
    Row,
    capitalise,
    find_best,
    find_recipe,
    format_setting,
    is_maximised,
    label_objective,
    read_epochs,
    read_rows,
    read_searched,
    read_settings,
)
from matchai.study.significance import Contender, Verdict
from matchai.system import write_whole

CAPTIONS = {
    "history": "Each mark is a trial; those that failed, or are far off, stand at the edge.",
    "learning_curves": "A trial's value is the best point of its curve.",
    "slices": "Each mark is a trial. What looks like one setting's effect may be that of another that moved with it.",
    "parallel_coordinates": "Each line is a complete trial, from its settings down to its value.",
    "importance": "The share of the variance between trials that each setting explains alone. At few trials this is "
    "rough: in 12 simulated studies of 50 trials each, fANOVA named the truly most important setting in 9.",
}
KINDS = {
    "complete": "complete",
    "pruned": "pruned",
    "failed for its settings": "failed for their settings",
    "failed for the machine": "failed for the machine",
    "running": "running",
    "waiting": "waiting",
}


def write_report(
    folder: Path,
    study: optuna.Study,
    *,
    objective: str,
    evidence: Verdict | None,
    is_confirming: bool,
    command: str,
    best: Path | None,
    notes: Sequence[str],
    screen: optuna.Study | None = None,
) -> Path:
    """Writes `report.html`, whole, and its pictures as PNG under `figures/`.

    Args:
        folder: The study's; made where it is missing.
        study: Finished or running. What its store holds is taken for untrusted text.
        objective: The history's key, as `mean_dice`.
        evidence: What the confirmation says; None where there is none, or none yet.
        is_confirming: Whether a confirmation is to come, which tells "not yet" from "never" where there is no evidence.
        command: The shell command that trains the answer; empty where there is none.
        best: The file with the answer's settings, where it is written.
        notes: Sentences for the limits, as "This is the synthetic phantom, not patients."
        screen: The study of short cycles that went before.

    Returns:
        The path of the page.
    """
    rows, maximised, label = read_rows(study), is_maximised(study), label_objective(objective)
    searched = read_searched(study)
    sections = [
        Section("", _answer(rows, maximised, label, evidence, is_confirming)),
        *([Section("Recipe and challengers on fresh seeds", _compare(rows, evidence, label))] if evidence else []),
        Section("Settings", _settings(rows, read_settings(study), maximised, evidence)),
        Section("How to train it", _training(folder, command, best)),
        Section("How the trials went", [Text(_count(rows)), *_pictures(folder / "figures", study, objective)]),
        Section("What was searched", _space(study, searched)),
        Section("All trials", [_trials(rows, read_settings(study), maximised)]),
        Section("What the value is, and its limits", [Points([*_limits(label, maximised, evidence), *notes])]),
    ]
    if screen is not None:
        sections.append(
            Section("Screening with short cycles", _screening(folder / "figures" / "screen", screen, objective))
        )
    facts = [*_flatten(searched, ()), *_provenance([*rows, *(read_rows(screen) if screen else [])])]
    sections.append(Section("Fixed settings, data and versions", [Table(["what", "value"], facts)], is_folded=True))

    direction = "more" if maximised else "less"
    subtitle = f"{label}, {direction} is better · {len(rows)} trials{_hours(rows)}"
    page = render_page(f"Study {study.study_name}", subtitle, sections)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.html"
    write_whole(path, page.encode())
    return path


def _answer(
    rows: Sequence[Row], maximised: bool, label: str, evidence: Verdict | None, is_confirming: bool
) -> list[Piece]:
    """The headline, and below it what it rests on."""
    if evidence is not None:
        return _confirmed(rows, label, evidence)
    best, recipe = find_best(rows, maximised), find_recipe(rows)
    if best is None:
        return [Answer("No trial is complete yet: there is nothing to compare.", "open")]
    digits = _digits(rows) - 1
    value = f"{_write(best.value, digits)} {label}"
    if best is recipe:
        lead = f"the recipe itself leads with {value}"
    elif recipe is None or recipe.kind != "complete":
        lead = f"trial {best.number} leads with {value}, and the recipe has no value to compare it with"
    else:
        gain = _write(abs(best.value - recipe.value), digits)
        lead = f"trial {best.number} leads with {value}, {gain} better than the recipe"
    if is_confirming:
        return [
            Answer(f"Not confirmed yet: {lead}.", "open"),
            Text("This is one seed. Whether it holds is said once the best and the recipe are trained on fresh seeds."),
        ]
    return [
        Answer(f"Unconfirmed, one seed: {lead}.", "open"),
        Text("Figures of this kind are declared too high: the best of many trials is in part the luckiest one."),
    ]


def _confirmed(rows: Sequence[Row], label: str, evidence: Verdict) -> list[Piece]:
    digits, seeds = _digits(rows) - 1, f"{len(evidence.seeds)} fresh seeds"
    confidence = f"{evidence.confidence * 100:g} %"

    def interval(one: Contender) -> str:
        if not (math.isfinite(one.low) and math.isfinite(one.high)):
            return f"no interval, {seeds}"
        return f"{confidence} interval {_write(one.low, digits)} to {_write(one.high, digits)}, {seeds}"

    if evidence.is_difference:
        winner = next(one for one in evidence.challengers if one.number == evidence.winner)
        gain = f"{_write(winner.difference, digits)} {label}"
        says = f"beats the recipe by {gain} ({interval(winner)})"
        says = says if math.isfinite(winner.difference) else "is the answer, as the recipe failed on a fresh seed"
        pieces: list[Piece] = [Answer(f"Trial {winner.number} {says}.", "good")]
    elif evidence.challengers:
        nearest = evidence.challengers[0]
        side = "better" if nearest.difference >= 0 else "worse"
        gain = f"{_write(abs(nearest.difference), digits)} {side} in {label}"
        detail = f"the best challenger, trial {nearest.number}, is {gain} ({interval(nearest)})"
        pieces = [Answer(f"No difference: the recipe stays the answer; {detail}.")]
    else:
        pieces = [Answer("The recipe stays the answer: there was no challenger.")]
    halves = [(one.high - one.low) / 2 for one in evidence.challengers if math.isfinite(one.high - one.low)]
    if halves:
        half = _write(halves[0], digits)
        pieces.append(Text(f"With these seeds, differences below {half} cannot be told from the noise between seeds."))
    return pieces


def _compare(rows: Sequence[Row], evidence: Verdict, label: str) -> list[Piece]:
    digits = _digits(rows)

    def line(one: Contender, name: str, says: str) -> list[str]:
        is_recipe = one is evidence.recipe
        ends = (_write(one.low, digits, sign="+"), _write(one.high, digits, sign="+"))
        return [
            name,
            _write(one.mean, digits),
            _write(one.sd, digits),
            "" if is_recipe else _write(one.difference, digits, sign="+"),
            "" if is_recipe else " to ".join(ends) if "–" not in ends else "unknown",
            says,
            *(_write(value, digits) for value in one.values),
        ]

    has_failed = not math.isfinite(evidence.recipe.mean)
    says = "failed on a seed" if has_failed else "" if evidence.is_difference else "the answer"
    lines = [line(evidence.recipe, f"recipe (trial {evidence.recipe.number})", says)]
    for one in evidence.challengers:
        says = "better" if one.low > 0 else "worse" if one.high < 0 else "no difference shown"
        says = says if math.isfinite(one.mean) else "failed on a seed"
        lines.append(line(one, f"trial {one.number}", "better: the answer" if one.number == evidence.winner else says))
    numbers = [evidence.recipe.number, *(one.number for one in evidence.challengers)]
    caption = (
        f"{label} on the same fresh seeds for all, none of them used in the search. sd: between seeds. The intervals "
        f"of the difference to the recipe hold all together with {evidence.confidence * 100:g} %; positive is better."
    )
    columns = ("configuration", "mean", "sd", "difference", "interval", "says")
    head = [*columns, *(f"seed {seed}" for seed in evidence.seeds)]
    return [Table(head, lines, marked=[numbers.index(evidence.winner)], caption=capitalise(caption))]


def _settings(
    rows: Sequence[Row], settings: Mapping[str, BaseDistribution], maximised: bool, evidence: Verdict | None
) -> list[Piece]:
    """The settings of the best beside the recipe's."""
    recipe, best = find_recipe(rows), find_best(rows, maximised)
    if evidence is not None and evidence.challengers:
        number = evidence.winner if evidence.is_difference else evidence.challengers[0].number
        best = next((row for row in rows if row.number == number), None)
    columns = [("recipe", recipe)] if recipe is not None else []
    if best is not None and best is not recipe:
        columns.append((f"trial {best.number}", best))
    if not columns or not settings:
        return [Text("There are no settings to show yet.")]
    lines = [[name, *(format_setting(row.settings.get(name)) for _, row in columns)] for name in settings]
    return [Table(["setting", *(name for name, _ in columns)], lines)]


def _training(folder: Path, command: str, best: Path | None) -> list[Piece]:
    pieces: list[Piece] = [Code(command)] if command else []
    if best is None:
        return [*pieces, Text("There is no answer yet, so its settings are not written to a file.")]
    place = f"{best.name}, beside this page" if best.parent == folder else str(best)
    return [*pieces, Text(f"The settings are in {place}.")]


def _pictures(folder: Path, study: optuna.Study, objective: str) -> list[Piece]:
    drawn = draw_study(folder, study, objective)
    return [
        Picture(path.read_bytes(), f"{name.replace('_', ' ')} of study {study.study_name}", CAPTIONS[name])
        for name, path in drawn.items()
    ]


def _space(study: optuna.Study, searched: Mapping[str, Any]) -> list[Piece]:
    settings = read_settings(study)
    is_simplex = all(name in settings for name in SHARES)
    lines = []
    for name, distribution in settings.items():
        if isinstance(distribution, CategoricalDistribution):
            reach, scale = ", ".join(format_setting(choice) for choice in distribution.choices), "choice"
        else:
            assert isinstance(distribution, FloatDistribution | IntDistribution)
            reach = f"{format_setting(distribution.low)} to {format_setting(distribution.high)}"
            scale = "log" if distribution.log else "linear"
            if distribution.step not in {None, 1}:
                scale += f", in steps of {format_setting(distribution.step)}"
            if isinstance(distribution, IntDistribution):
                scale += ", whole numbers"
        lines.append([name, reach, "shares that add up to 1, uniform" if is_simplex and name in SHARES else scale])
    facts = {
        "preset": searched.get("preset"),
        "epochs a trial:": read_epochs(study),
        "seed of the study:": searched.get("seed"),
    }
    told = [f"{words} {value}" for words, value in facts.items() if value is not None]
    pieces: list[Piece] = [Table(["setting", "range", "scale"], lines)] if lines else [Text("No trial has begun yet.")]
    return [*pieces, Text(f"In all trials: {', '.join(told)}.")] if told else pieces


def _count(rows: Sequence[Row]) -> str:
    counts = Counter(row.kind for row in rows)
    told = [
        f"{counts[kind]} {words}" for kind, words in KINDS.items() if counts[kind] or kind in {"complete", "pruned"}
    ]
    return f"{len(rows)} trials: {', '.join(told)}."


def _hours(rows: Sequence[Row]) -> str:
    """The time that the trials took together, for the subtitle; empty where none is known."""
    seconds = sum(_number(row.attributes.get("seconds")) or 0.0 for row in rows)
    if not 0 < seconds < math.inf:
        return ""
    return f" · {seconds / 3600:.1f} h of training" if seconds >= 3600 else f" · {seconds / 60:.1f} min of training"


def _trials(rows: Sequence[Row], settings: Mapping[str, BaseDistribution], maximised: bool) -> Piece:
    if not rows:
        return Text("There is none yet.")
    digits, best = _digits(rows), find_best(rows, maximised)
    has_reason = any(_reason(row) for row in rows)
    head = ["trial", "state", "value", "best epoch", *settings, "seconds", *(["reason"] if has_reason else [])]
    lines = []
    sign = -1 if maximised else 1
    order = list(KINDS)
    rows = sorted(rows, key=lambda row: (order.index(row.kind), sign * row.value if row.kind == "complete" else 0))
    for row in rows:
        seconds = _number(row.attributes.get("seconds"))
        roles = [role for role, is_it in (("recipe", row.is_recipe), ("best", row is best)) if is_it]
        lines.append(
            [
                str(row.number),
                ", ".join([row.kind, *roles]),
                _write(row.value, digits),
                _best_epoch(row, maximised),
                *(format_setting(row.settings.get(name)) for name in settings),
                "–" if seconds is None else f"{seconds:.0f}",
                *([_reason(row)] if has_reason else []),
            ]
        )
    marked = [place for place, row in enumerate(rows) if row is best or row.is_recipe]
    caption = (
        "Complete trials first, the best on top. The value of a pruned or running trial is its best epoch's so far."
    )
    return Table(head, lines, marked, caption)


def _reason(row: Row) -> str:
    """Why a trial failed: for its settings, or the last error of the machine."""
    errors = row.attributes.get("errors") if row.kind == "failed for the machine" else None
    last = errors[-1][1:] if isinstance(errors, list) and errors and isinstance(errors[-1], list) else []
    return _plain(row.attributes.get("reason") or " ".join(map(str, last)), "")


def _best_epoch(row: Row, maximised: bool) -> str:
    """As its attribute says, or as its curve does where it has not ended."""
    if "best_epoch" in row.attributes or row.kind not in {"pruned", "running"} or not row.curve:
        return _plain(row.attributes.get("best_epoch"))
    return str((max if maximised else min)(row.curve, key=lambda epoch: row.curve[epoch]))


def _limits(label: str, maximised: bool, evidence: Verdict | None) -> Iterator[str]:
    highest = "highest" if maximised else "lowest"
    yield (
        f"The value of a trial is the {highest} {label} of its epochs, on the validation slices. Choosing the best "
        "epoch on the slices that it is judged by flatters it slightly."
    )
    yield "Each trial is one training with one seed; among the best, the seed may decide more than the settings."
    if evidence is not None:
        yield (
            "Recipe and challengers are compared on the validation slices that the search used: what is confirmed "
            "holds against the noise between seeds, not for other patients."
        )


def _screening(folder: Path, screen: optuna.Study, objective: str) -> list[Piece]:
    rows = read_rows(screen)
    epochs = read_epochs(screen)
    cycle = f" of {epochs} epochs" if epochs is not None else ""
    told = (
        f"Before the full trainings, study {screen.study_name} searched with complete short cycles{cycle}; the best "
        f"of it went on to full length above. {_count(rows)} Values of the two studies are never compared."
    )
    trials = _trials(rows, read_settings(screen), is_maximised(screen))
    return [Text(told), *_pictures(folder, screen, objective), trials]


def _provenance(rows: Sequence[Row]) -> Iterator[list[str]]:
    """What the trials say of where and with what they ran; several values where they differ."""
    found: dict[str, list[str]] = {}
    for row in rows:
        versions = row.attributes.get("versions")
        facts = {f"version of {name}": value for name, value in versions.items()} if isinstance(versions, dict) else {}
        facts |= {"git revision": row.attributes.get("git_revision"), "host": row.attributes.get("host")}
        for name, value in facts.items():
            values = found.setdefault(name, [])
            if value is not None and str(value) not in values:
                values.append(str(value))
    for name, values in sorted(found.items()):
        if values:
            yield [name, ", ".join(values)]


def _flatten(value: object, path: tuple[str, ...]) -> Iterator[list[str]]:
    """Rows of name and value for what was searched; the space has a table of its own."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if path or key != "space":
                yield from _flatten(inner, (*path, str(key)))
    else:
        yield [" · ".join(path), value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)]


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _plain(value: object, absent: str = "–") -> str:
    return absent if value is None else str(value)


def _digits(rows: Sequence[Row]) -> int:
    """Decimals that show four figures of the usual value: 4 for a Dice."""
    sizes = sorted(abs(row.value) for row in rows if row.kind == "complete" and row.value)
    return min(12, max(1, 3 - math.floor(math.log10(sizes[len(sizes) // 2])))) if sizes else 4


def _write(value: float, digits: int, sign: str = "-") -> str:
    """A number with a true minus sign; "–" where it is not finite."""
    if not math.isfinite(value):
        return "–"
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}".replace("-", "−")
