"""The winner by evidence: the best trials and the recipe, trained again on fresh seeds, and what follows from it."""

import dataclasses
import hashlib
import json
import math
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from matchai.settings import TrainConfig, parsing
from matchai.study.leases import retry_on_lost_lock
from matchai.study.plan import MIN_SEEDS, Plan
from matchai.study.report_page import write_report
from matchai.study.rows import describe_left_out
from matchai.study.significance import Verdict, judge
from matchai.study.trials import DONE, WAIT, Task, TrialTable
from matchai.system import StoreError, write_whole
from matchai.training import LAST


class Confirmation:
    """The confirming runs of a study; no rows of it: their results are attributes of the study.

    Args:
        table: Of the last stage, whose trials are finished.
    """

    def __init__(self, table: TrialTable) -> None:
        self.table, self.plan, self.store = table, table.plan, table.store
        recipe = table.recipe()
        best = table.ranking()[: self.plan.settings.confirm if len(table.seeds) >= MIN_SEEDS else 0]
        self.contenders: list[FrozenTrial] = [recipe, *best] if recipe and best else []
        self.runs = [(trial, seed) for seed in table.seeds for trial in self.contenders]

    @retry_on_lost_lock
    def next_task(self) -> Task | str:
        """Takes a run that is missing; `WAIT` while others run the rest, `DONE` when none is missing."""
        with self.store.locked(self.plan.name):
            results = self._results()
            missing = [(trial, seed) for trial, seed in self.runs if (trial.number, seed) not in results]
            for trial, seed in missing:
                key = f"{self.plan.name}-confirm-{trial.number:04d}-{seed}"
                if self.table.leases.take(key):
                    folder = self.plan.confirm_folder(trial.number, seed)
                    task = self.table.task_of(trial)
                    return dataclasses.replace(task, key=key, seed=seed, output=folder, is_confirmation=True)
        return WAIT if missing else DONE

    @retry_on_lost_lock
    def finish(self, task: Task, result: dict[str, Any]) -> None:
        """Keeps what a confirming run came to: its `value`, or None with a `reason`."""
        with self.store.locked(self.plan.name):
            self.store.set_attr(self.table.study, None, _attribute(task.number, task.seed), result)
            self.table.leases.drop(task.key)
            shutil.rmtree(task.output / LAST, ignore_errors=True)

    def progress(self) -> tuple[int, int]:
        """Confirming runs done, and their total."""
        return len(self._results()), len(self.runs)

    def verdict(self) -> Verdict | None:
        """What the confirming runs say; None while one is missing, or where there is nothing to confirm."""
        results = self._results()
        if not self.contenders or len(results) < len(self.runs):
            return None
        worst = -math.inf if self.plan.is_maximised else math.inf
        values: dict[int, list[float]] = {trial.number: [] for trial in self.contenders}
        for trial, seed in self.runs:
            value = results[trial.number, seed]["value"]
            values[trial.number].append(worst if value is None else value)
        return judge(values, self.contenders[0].number, self.table.seeds, is_maximised=self.plan.is_maximised)

    def _results(self) -> dict[tuple[int, int], dict[str, Any]]:
        attributes = self.table.study.user_attrs
        names = {(trial.number, seed): _attribute(trial.number, seed) for trial, seed in self.runs}
        return {run: attributes[name] for run, name in names.items() if name in attributes}


def _attribute(number: int, seed: int) -> str:
    return f"confirm {number} {seed}"


@retry_on_lost_lock
def conclude(tables: Sequence[TrialTable], say: Callable[[str], None]) -> dict[str, str | None]:
    """Writes the answer's settings and the report, unless they are there.

    Args:
        tables: The study's stages; the last one's trials are confirmed.
        say: Told what takes a while.

    Returns:
        `text`, the answer in a sentence; `best`, the file of its settings, and `command`, which trains it, or None.

    Raises:
        StoreError: If they cannot be written.
    """
    table = tables[-1]
    plan, store = table.plan, table.store
    with store.locked(f"{plan.name}-report"):
        verdict = Confirmation(table).verdict()
        trial, sentence = chosen(table, verdict), answer(table, verdict)
        has_answer = trial is not None and (verdict is not None or not plan.settings.confirm)
        best = best_file(plan, verdict) if has_answer else None
        command = train_command(best) if best else None
        trials = [(trial.number, trial.state.name, trial.value) for trial in table.trials()]
        digest = hashlib.sha256(json.dumps([trials, sentence, *_left_out(tables)]).encode()).hexdigest()
        done = {"digest": digest, "confirm": plan.settings.confirm}
        has_files = (plan.folder / "report.html").exists() and (best is None or best.exists())
        if not has_files or table.study.user_attrs.get("concluded") != done:
            say("drawing the report")
            try:
                if best and trial:
                    _write_best(best, table, trial, sentence)
                draw_report(tables, best)
            except OSError as error:
                raise StoreError(
                    f"The report in {plan.folder} cannot be written ({error.strerror}); the study is whole, and the "
                    "same command draws it."
                ) from error
            store.set_attr(table.study, None, "concluded", done)
    return {"text": sentence, "best": str(best) if best else None, "command": command}


def draw_report(tables: Sequence[TrialTable], best: Path | None) -> Path:
    """Writes report.html and its pictures; `best` is the file of the answer's settings, if there is one."""
    table = tables[-1]
    plan = table.plan
    notes = ["All figures are of the synthetic phantom, not of patients."] if table.about["is_synthetic"] else []
    if plan.settings.confirm:
        notes.append("Each fresh seed is another split into training and validation slices, too.")
    notes += _left_out(tables)
    return write_report(
        plan.folder,
        table.study,
        objective=plan.settings.objective,
        evidence=Confirmation(table).verdict(),
        is_confirming=bool(plan.settings.confirm),
        command=train_command(best) if best else "",
        best=best,
        notes=notes,
        screen=tables[0].study if len(tables) > 1 else None,
    )


def _left_out(tables: Sequence[TrialTable]) -> list[str]:
    """A sentence for each stage with trials that count as nothing."""
    found = {table.stage.name: table.others()[1] for table in tables}
    return [describe_left_out(name, left_out) for name, left_out in found.items() if left_out]


def best_file(plan: Plan, verdict: Verdict | None) -> Path:
    """Where the answer's settings go; best.yaml is for confirmed ones alone."""
    return plan.folder / ("best.yaml" if verdict else "best-unconfirmed.yaml")


def train_command(best: Path) -> str:
    """The command that trains the answer."""
    return f"accelerate launch --quiet -m matchai.train --config {shlex.quote(str(best))}"


def chosen(table: TrialTable, verdict: Verdict | None) -> FrozenTrial | None:
    """The trial whose settings are the answer; without confirmation the best one."""
    recipe = table.recipe()
    if verdict is not None:
        return next(trial for trial in Confirmation(table).contenders if trial.number == verdict.winner)
    best = table.ranking()[:1]
    if not best or recipe is None or recipe.value is None or recipe.user_attrs.get("reason"):
        return best[0] if best else recipe
    sign = 1 if table.plan.is_maximised else -1
    return best[0] if sign * (best[0].value or 0.0) > sign * recipe.value else recipe


def answer(table: TrialTable, verdict: Verdict | None) -> str:
    """What the study found, in one sentence."""
    settings, name = table.plan.settings, table.plan.settings.objective
    if verdict is not None:
        return _say(verdict, name)
    trial = chosen(table, None)
    if trial is None:
        return "No trial is finished yet."
    if not settings.confirm:
        return (
            f"Trial {trial.number} has the best {name}, {trial.value:.3f} on one seed, not confirmed: such a figure is "
            "declared too high, and the best few differ by less than their seeds do."
        )
    if not Confirmation(table).contenders:
        return "Only the recipe is finished, so there is nothing to compare it with; give more --trials."
    done, total = Confirmation(table).progress()
    return (
        f"The best so far is trial {trial.number} with {name} {trial.value:.3f}; {done} of {total} confirming runs are "
        "done."
    )


def _say(verdict: Verdict, name: str) -> str:
    top = verdict.challengers[0]
    interval = f"{verdict.confidence:.0%} interval {top.low:+.3f} to {top.high:+.3f}, {len(verdict.seeds)} fresh seeds"
    if verdict.is_difference and not math.isfinite(top.difference):
        return (
            f"Trial {top.number} is the answer with {top.mean:.3f} {name} on {len(verdict.seeds)} fresh seeds, as the "
            "recipe failed on one of them."
        )
    if verdict.is_difference:
        return (
            f"Trial {top.number} beats the recipe by {top.difference:.3f} {name} ({top.mean:.3f} against "
            f"{verdict.recipe.mean:.3f}; {interval})."
        )
    return (
        f"No difference: the best challenger, trial {top.number}, comes to {top.mean:.3f} {name}, the recipe to "
        f"{verdict.recipe.mean:.3f} (difference {top.difference:+.3f}, {interval}), so the recipe is the answer."
    )


def config_of(plan: Plan, settings: dict[str, Any], *, epochs: int, seed: int, output: Path) -> TrainConfig:
    """The settings of a run of the study."""
    loaders = {} if plan.num_workers is None else {"num_workers": plan.num_workers}
    return plan.config.updated(**{**settings, **loaders, "epochs": epochs, "seed": seed, "output": output})


def _write_best(path: Path, table: TrialTable, trial: FrozenTrial, sentence: str) -> None:
    plan = table.plan
    config = plan.config.updated(**table.settings_of(trial))
    paths = {"data": config.input.data, "cache": config.input.cache, "init": config.run.init}
    weights = Path(config.network.encoder_weights)
    weights = weights.resolve() if weights.is_file() else weights
    places = {name: path and path.resolve() for name, path in paths.items()}
    config = config.updated(**places, encoder_weights=str(weights))
    found = {"study": plan.name, "trial": trial.number, "answer": sentence, "store": table.store.shown}
    head = f"# Study {plan.name}: {sentence}\n# Train it: {train_command(path)}\noutput: runs/{plan.name}-best\n\n"
    write_whole(path, (head + parsing.dump(config, found)))
