"""The report of a study: what won, by how much over the recipe and over noise, and how to train it, on one page."""

import functools
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from matchai.drawing import Answer, Code, Picture, Piece, Points, Section, Table, Text, render_page
from matchai.study.figures import draw_study
from matchai.study.rows import SHARES, Row, StudyFacts, capitalise, format_number, format_setting
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
KINDS = ("complete", "pruned", "failed for its settings", "failed for the machine", "running", "waiting")


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
    facts, figures = StudyFacts(study, objective), folder / "figures"
    rows = facts.rows
    sections = [
        Section("", _answer(facts, evidence, is_confirming)),
        *([Section("Recipe and challengers on fresh seeds", _compare(facts, evidence))] if evidence else []),
        Section("Settings", _settings(facts, evidence)),
        Section("How to train it", _training(folder, command, best)),
        Section("How the trials went", [Text(_count(rows)), *_pictures(figures, study, objective)]),
        Section("What was searched", _space(facts)),
        Section("All trials", [_trials(facts)]),
        Section("What the value is, and its limits", [Points([*_limits(facts, evidence), *notes])]),
    ]
    if screen is not None:
        screened = StudyFacts(screen, objective)
        pieces = _screening(screened, _pictures(figures / "screen", screen, objective))
        sections.append(Section("Screening with short cycles", pieces))
        rows = [*rows, *screened.rows]
    fixed = [*_flatten(facts.searched, ()), *_provenance(rows)]
    sections.append(Section("Fixed settings, data and versions", [Table(["what", "value"], fixed)], is_folded=True))

    direction = "more" if facts.is_maximised else "less"
    subtitle = f"{facts.objective}, {direction} is better · {len(facts.rows)} trials{_hours(facts.rows)}"
    page = render_page(f"Study {study.study_name}", subtitle, sections)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.html"
    write_whole(path, page)
    return path


def _answer(facts: StudyFacts, evidence: Verdict | None, is_confirming: bool) -> list[Piece]:
    """The headline, and below it what it rests on."""
    if evidence is not None:
        return _confirmed(facts, evidence)
    best, recipe = facts.best, facts.recipe
    if best is None:
        return [Answer("No trial is complete yet: there is nothing to compare.", "open")]
    digits = facts.digits - 1
    value = f"{format_number(best.value, digits)} {facts.objective}"
    if best is recipe:
        lead = f"the recipe itself leads with {value}"
    elif recipe is None or recipe.kind != "complete":
        lead = f"trial {best.number} leads with {value}, and the recipe has no value to compare it with"
    else:
        gain = format_number(abs(best.value - recipe.value), digits)
        lead = f"trial {best.number} leads with {value}, {gain} better than the recipe"
    if is_confirming:
        state = "Not confirmed yet"
        note = "This is one seed. Whether it holds is said once the best and the recipe are trained on fresh seeds."
    else:
        state = "Unconfirmed, one seed"
        note = "Figures of this kind are declared too high: the best of many trials is in part the luckiest one."
    return [Answer(f"{state}: {lead}.", "open"), Text(note)]


def _confirmed(facts: StudyFacts, evidence: Verdict) -> list[Piece]:
    write = functools.partial(format_number, digits=facts.digits - 1)

    def interval(one: Contender) -> str:
        is_known = math.isfinite(one.low) and math.isfinite(one.high)
        ends = f"{evidence.confidence * 100:g} % interval {write(one.low)} to {write(one.high)}"
        return f"{ends if is_known else 'no interval'}, {len(evidence.seeds)} fresh seeds"

    if evidence.is_difference:
        winner = next(one for one in evidence.challengers if one.number == evidence.winner)
        says = f"beats the recipe by {write(winner.difference)} {facts.objective} ({interval(winner)})"
        says = says if math.isfinite(winner.difference) else "is the answer, as the recipe failed on a fresh seed"
        pieces: list[Piece] = [Answer(f"Trial {winner.number} {says}.", "good")]
    elif evidence.challengers:
        nearest = evidence.challengers[0]
        side = "better" if nearest.difference >= 0 else "worse"
        gain = f"{write(abs(nearest.difference))} {side} in {facts.objective}"
        detail = f"the best challenger, trial {nearest.number}, is {gain} ({interval(nearest)})"
        pieces = [Answer(f"No difference: the recipe stays the answer; {detail}.")]
    else:
        pieces = [Answer("The recipe stays the answer: there was no challenger.")]
    halves = [(one.high - one.low) / 2 for one in evidence.challengers if math.isfinite(one.high - one.low)]
    if halves:
        half = write(halves[0])
        pieces.append(Text(f"With these seeds, differences below {half} cannot be told from the noise between seeds."))
    return pieces


def _compare(facts: StudyFacts, evidence: Verdict) -> list[Piece]:
    write = functools.partial(format_number, digits=facts.digits)
    lines = []
    contenders = [evidence.recipe, *evidence.challengers]
    for one in contenders:
        is_recipe, is_answer = one is evidence.recipe, one.number == evidence.winner
        if not math.isfinite(one.mean):
            says = "failed on a seed"
        elif is_recipe:
            says = "the answer" if is_answer else ""
        else:
            says = "better" if one.low > 0 else "worse" if one.high < 0 else "no difference shown"
            says = "better: the answer" if is_answer else says
        name = f"recipe (trial {one.number})" if is_recipe else f"trial {one.number}"
        ends = (write(one.low, sign="+"), write(one.high, sign="+"))
        interval = " to ".join(ends) if "–" not in ends else "unknown"
        difference = ["", ""] if is_recipe else [write(one.difference, sign="+"), interval]
        lines.append([name, write(one.mean), write(one.sd), *difference, says, *map(write, one.values)])
    caption = (
        f"{facts.objective} on the same fresh seeds for all, none of them used in the search. sd: between seeds. The "
        f"intervals of the difference to the recipe hold all together with {evidence.confidence * 100:g} %; positive "
        "is better."
    )
    columns = ("configuration", "mean", "sd", "difference", "interval", "says")
    head = [*columns, *(f"seed {seed}" for seed in evidence.seeds)]
    marked = [place for place, one in enumerate(contenders) if one.number == evidence.winner]
    return [Table(head, lines, marked=marked, caption=capitalise(caption))]


def _settings(facts: StudyFacts, evidence: Verdict | None) -> list[Piece]:
    """The settings of the best beside the recipe's."""
    recipe, best = facts.recipe, facts.best
    if evidence is not None and evidence.challengers:
        number = evidence.winner if evidence.is_difference else evidence.challengers[0].number
        best = next((row for row in facts.rows if row.number == number), None)
    columns = [("recipe", recipe)] if recipe is not None else []
    if best is not None and best is not recipe:
        columns.append((f"trial {best.number}", best))
    if not columns or not facts.settings:
        return [Text("There are no settings to show yet.")]
    lines = [[name, *(format_setting(row.settings.get(name)) for _, row in columns)] for name in facts.settings]
    return [Table(["setting", *(name for name, _ in columns)], lines)]


def _training(folder: Path, command: str, best: Path | None) -> list[Piece]:
    pieces: list[Piece] = [Code(command)] if command else []
    if best is None:
        return [*pieces, Text("There is no answer yet, so its settings are not written to a file.")]
    place = f"{best.name}, beside this page" if best.parent == folder else str(best)
    return [*pieces, Text(f"The settings are in {place}.")]


def _pictures(folder: Path, study: optuna.Study, objective: str) -> list[Piece]:
    return [
        Picture(path.read_bytes(), f"{name.replace('_', ' ')} of study {study.study_name}", CAPTIONS[name])
        for name, path in draw_study(folder, study, objective).items()
    ]


def _space(facts: StudyFacts) -> list[Piece]:
    is_simplex = all(name in facts.settings for name in SHARES)
    lines = []
    for name, distribution in facts.settings.items():
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
    preset, seed = facts.searched.get("preset"), facts.searched.get("seed")
    same = {"preset": preset, "epochs a trial:": facts.epochs, "seed of the study:": seed}
    told = [f"{words} {value}" for words, value in same.items() if value is not None]
    pieces: list[Piece] = [Table(["setting", "range", "scale"], lines)] if lines else [Text("No trial has begun yet.")]
    return [*pieces, Text(f"In all trials: {', '.join(told)}.")] if told else pieces


def _count(rows: Sequence[Row]) -> str:
    counts = Counter(row.kind for row in rows)
    shown = [kind for kind in KINDS if counts[kind] or kind in {"complete", "pruned"}]
    listed = ", ".join(f"{counts[kind]} {kind}" for kind in shown).replace("for its settings", "for their settings")
    return f"{len(rows)} trials: {listed}."


def _hours(rows: Sequence[Row]) -> str:
    """The time that the trials took together, for the subtitle; empty where none is known."""
    seconds = sum(_number(row.attributes.get("seconds")) or 0.0 for row in rows)
    if not 0 < seconds < math.inf:
        return ""
    return f" · {seconds / 3600:.1f} h of training" if seconds >= 3600 else f" · {seconds / 60:.1f} min of training"


def _trials(facts: StudyFacts) -> Piece:
    if not facts.rows:
        return Text("There is none yet.")
    has_reason = any(map(_reason, facts.rows))
    head = ["trial", "state", "value", "best epoch", *facts.settings, "seconds", *(["reason"] if has_reason else [])]
    lines = []
    rows = sorted(
        facts.rows, key=lambda row: (KINDS.index(row.kind), -facts.sign * row.value if row.kind == "complete" else 0)
    )
    for row in rows:
        roles = [role for role, is_it in (("recipe", row.is_recipe), ("best", row is facts.best)) if is_it]
        state, value = ", ".join([row.kind, *roles]), format_number(row.value, facts.digits)
        settings = (format_setting(row.settings.get(name)) for name in facts.settings)
        seconds = format_number(_number(row.attributes.get("seconds")), 0)
        line = [str(row.number), state, value, _best_epoch(row, facts.sign), *settings, seconds, _reason(row)]
        lines.append(line[: len(head)])
    marked = [place for place, row in enumerate(rows) if row is facts.best or row.is_recipe]
    caption = (
        "Complete trials first, the best on top. The value of a pruned or running trial is its best epoch's so far."
    )
    return Table(head, lines, marked, caption)


def _reason(row: Row) -> str:
    """Why a trial failed: for its settings, or the last error of the machine."""
    errors = row.attributes.get("errors") if row.kind == "failed for the machine" else None
    last = errors[-1][1:] if isinstance(errors, list) and errors and isinstance(errors[-1], list) else []
    return str(row.attributes.get("reason") or " ".join(map(str, last)))


def _best_epoch(row: Row, sign: int) -> str:
    """As its attribute says, or as its curve does where it has not ended."""
    best = row.attributes.get("best_epoch")
    if "best_epoch" not in row.attributes and row.kind in {"pruned", "running"} and row.curve:
        best = max(row.curve, key=lambda epoch: sign * row.curve[epoch])
    return "–" if best is None else str(best)


def _limits(facts: StudyFacts, evidence: Verdict | None) -> Iterator[str]:
    highest = "highest" if facts.is_maximised else "lowest"
    yield (
        f"The value of a trial is the {highest} {facts.objective} of its epochs, on the validation slices. Choosing "
        "the best epoch on the slices that it is judged by flatters it slightly."
    )
    yield "Each trial is one training with one seed; among the best, the seed may decide more than the settings."
    if evidence is not None:
        yield (
            "Recipe and challengers are compared on the validation slices that the search used: what is confirmed "
            "holds against the noise between seeds, not for other patients."
        )


def _screening(screened: StudyFacts, pictures: list[Piece]) -> list[Piece]:
    cycle = "" if screened.epochs is None else f" of {screened.epochs} epochs"
    told = (
        f"Before the full trainings, study {screened.study.study_name} searched with complete short cycles{cycle}; the "
        f"best of it went on to full length above. {_count(screened.rows)} Values of the two studies are never "
        "compared."
    )
    return [Text(told), *pictures, _trials(screened)]


def _provenance(rows: Sequence[Row]) -> Iterator[list[str]]:
    """What the trials say of where and with what they ran; several values where they differ."""
    found: dict[str, dict[str, None]] = {}  # by name its values, each once and in their order
    for row in rows:
        versions = row.attributes.get("versions")
        told = {f"version of {name}": value for name, value in versions.items()} if isinstance(versions, dict) else {}
        told |= {"git revision": row.attributes.get("git_revision"), "host": row.attributes.get("host")}
        for name, value in told.items():
            if value is not None:
                found.setdefault(name, {})[str(value)] = None
    for name, values in sorted(found.items()):
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
