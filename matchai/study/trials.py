"""The table of a study: trials are claimed, adopted, told and tidied up so that a kill at any instant loses nothing.

Only the main process of a worker has a table. All that must not happen twice happens under the study's lock; what is
written to disk first is the run's state, then the row, so that whatever a killed worker left undone is done again, with
the same outcome, by the next one that adopts its trial.
"""

import contextlib
import functools
import os
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from matchai.runs import versions
from matchai.study.leases import Leases, LostLeaseError, retry_on_lost_lock
from matchai.study.plan import Plan, Stage, differences
from matchai.study.samplers import FINISHED, make_pruner, propose
from matchai.study.storage import Store
from matchai.system import InputError, write_whole
from matchai.training import BEST, LAST

MAX_ERRORS = 3  # of one trial without a new epoch in between, then it fails and is replaced
KEPT = 3  # weights of the best trials, or as many as are confirmed


@dataclass(frozen=True)
class Task:
    """A run that a worker has claimed.

    Attributes:
        key: Of the claim.
        stage: Name of the stage.
        number: The trial.
        settings: The searched settings; empty for the recipe.
        epochs: How many.
        seed: Of the run.
        output: Its folder.
        is_confirmation: Whether it confirms a trial, and is none itself.
    """

    key: str
    stage: str
    number: int
    settings: dict[str, Any]
    epochs: int
    seed: int
    output: Path
    is_confirmation: bool = False


WAIT = "wait"  # for what others are running
DONE = "done"


class TrialTable:
    """A stage of a study, as one worker sees it.

    Args:
        plan: The study.
        stage: Of it.
        store: Opened.
        description: What makes it this study, as `plan.describe` has it; without one the study must be there, and is
            only looked at.

    Raises:
        InputError: If the store, or the folder, holds another study under this name.
    """

    def __init__(self, plan: Plan, stage: Stage, store: Store, description: dict[str, Any] | None = None) -> None:
        self.plan, self.stage, self.store = plan, stage, store
        if description is not None:
            identity = {"id": uuid.uuid4().hex, "preset": plan.config.run.preset, "seed": plan.config.run.seed}
            store.open_study(stage.name, plan.direction, {"matchai": identity | description})
            check_study(plan, stage, store, description)  # another process may have been faster
        self.study = store.open_study(stage.name, plan.direction, {})
        self.about = self.about_study(store, stage.name)
        self.seeds: list[int] = self.about["fresh_seeds"]
        if store.path:
            self.leases = Leases(store, self.study, store.path.parent, f"{store.path.name}.trials")
        else:
            user = os.getuid() if hasattr(os, "getuid") else 0
            folder = Path(tempfile.gettempdir()) / f"matchai-{user}-{self.about['id']}"
            folder.mkdir(parents=True, exist_ok=True)
            self.leases = Leases(store, self.study, folder, "trials")
        name = plan.settings.pruner if plan.settings.prune and len(plan.stages) == 1 else "none"
        self.pruner = make_pruner(name, stage.epochs)
        if description is not None:
            with store.locked(stage.name):
                self._own_folder()
                self.tidy()

    @staticmethod
    def about_study(store: Store, name: str) -> dict[str, Any]:
        """What a study of a store was made as; InputError if matchai did not make it."""
        found: dict[str, Any] | None = store.open_study(name, "maximize", {}).user_attrs.get("matchai")
        if found is None:
            raise InputError(
                f"{store.shown} holds a study {name} that matchai did not make; name another --study-name."
            )
        return found

    @retry_on_lost_lock
    def next_task(self, ranking: list[FrozenTrial] | None = None) -> Task | str:
        """Takes a trial: one whose worker is gone, else a new one; else `WAIT`, or `DONE`.

        Args:
            ranking: The best trials of the screening, if these are to be trained.
        """
        with self.store.locked(self.stage.name):
            trials = self.store.trials(self.study)
            running = [trial for trial in trials if trial.state == TrialState.RUNNING]
            for trial in running:
                if self.leases.take(self._key(trial.number)):
                    return self.task_of(trial)
            finished = sum(trial.state in FINISHED for trial in trials)
            if finished + len(running) >= self.plan.total(self.stage):
                return WAIT if running else DONE
            settings, seed = self.plan.settings, self.plan.config.run.seed
            space, number = self.plan.space, len(trials)
            is_recipe = not any(trial.user_attrs.get("is_recipe") for trial in trials if trial.state != TrialState.FAIL)
            if is_recipe:
                params = space.params(self.plan.config)
            elif ranking is not None:
                tried = [trial.params for trial in trials]
                params = next((trial.params for trial in ranking if trial.params not in tried), {})
                if not params:
                    return WAIT if running else DONE
            else:
                params = propose(settings.search_sampler, seed, self.study, number, space.distributions)
            attributes: dict[str, Any] = {
                **space.attributes(self.plan.config.flat() if is_recipe else space.settings(params)),
                **({"is_recipe": True} if is_recipe else {}),
                "seed": seed,
                "epochs": self.stage.epochs,
                "run": str(self.plan.trial_folder(self.stage, number)),
                "host": socket.gethostname(),
                "git_revision": git_revision(),
                "versions": {**versions(), "optuna": optuna.__version__},
            }
            added = self.store.add_running(self.study, params, space.distributions, attributes)
            return self.task_of(self._trial(added)) if self.leases.begin(self._key(added)) else WAIT

    def report(self, task: Task, row: dict[str, Any]) -> bool:
        """Tells the row of an epoch, whose state is saved; returns whether the trial is hopeless.

        Raises:
            LostLeaseError: If another worker has taken it over.
        """
        self._check_lease(task)
        value = row[self.plan.settings.objective]
        if value is not None:
            self.store.report(self.study, task.number, value, row["epoch"])
        return bool(self.pruner.prune(self.study, self._trial(task.number)))

    @retry_on_lost_lock
    def finish(self, task: Task, state: TrialState, value: float | None, attributes: dict[str, Any]) -> None:
        """Tells how a trial ended, and lets go of it.

        Raises:
            LostLeaseError: If another worker has taken it over.
        """
        with self.store.locked(self.stage.name):
            self._check_lease(task)
            stale = {"reason": None} if self._trial(task.number).user_attrs.get("reason") else {}
            for name, attribute in (stale | attributes).items():
                self.store.set_attr(self.study, task.number, name, attribute)
            self.store.finish(self.study, task.number, state, value)
            self.leases.drop(task.key)
            self.tidy()

    @retry_on_lost_lock
    def note_error(self, task: Task, message: str, epochs: int) -> bool:
        """Keeps an error of the machine with the trial, which has come to an epoch; the third there makes it fail.

        Returns:
            Whether it has failed.
        """
        with self.store.locked(self.stage.name):
            if not self.leases.is_mine(task.key):
                return False
            errors = [*self._trial(task.number).user_attrs.get("errors", []), [epochs, message]][-MAX_ERRORS:]
            self.store.set_attr(self.study, task.number, "errors", errors)
            has_failed = len(errors) == MAX_ERRORS and len({epoch for epoch, _ in errors}) == 1
            if has_failed:
                self.store.finish(self.study, task.number, TrialState.FAIL, None)
            self.leases.drop(task.key)
            return has_failed

    def counts(self) -> dict[str, Any]:
        """How far the stage is, for people: trials of each kind, the best and the recipe, seconds of a trial."""
        trials = self.store.trials(self.study)
        count = Counter(trial.state for trial in trials)
        best, recipe = self.ranking()[:1], self.recipe()
        seconds = [trial.user_attrs["seconds"] for trial in trials if "seconds" in trial.user_attrs]
        return {
            "stage": self.stage.name,
            "total": self.plan.total(self.stage),
            "complete": count[TrialState.COMPLETE],
            "pruned": count[TrialState.PRUNED],
            "failed": count[TrialState.FAIL],
            "running": count[TrialState.RUNNING],
            "best": (best[0].number, best[0].value) if best else None,
            "recipe": recipe.value if recipe else None,
            "seconds": sum(seconds) / len(seconds) if seconds else None,
        }

    def ranking(self) -> list[FrozenTrial]:
        """The complete trials but the recipe, the best first; of equal ones the earlier.

        Those that failed for their settings are none.
        """
        sign = -1.0 if self.plan.is_maximised else 1.0
        complete = [
            trial
            for trial in self.store.trials(self.study)
            if trial.state == TrialState.COMPLETE
            and not (trial.user_attrs.get("reason") or trial.user_attrs.get("is_recipe"))
        ]
        return sorted(complete, key=lambda trial: (sign * float(trial.value or 0.0), trial.number))

    def recipe(self) -> FrozenTrial | None:
        """The recipe's trial, once it is finished."""
        found = (trial for trial in self.store.trials(self.study) if trial.user_attrs.get("is_recipe"))
        return next((trial for trial in found if trial.state in FINISHED), None)

    def settings_of(self, trial: FrozenTrial) -> dict[str, Any]:
        """The searched settings of a trial; none for the recipe, whose settings are the plan's own, to the last bit."""
        return {} if trial.user_attrs.get("is_recipe") else self.plan.space.settings(trial.params)

    def tidy(self) -> None:
        """Removes the resumable states of finished trials, and all weights but those of the best few and the recipe."""
        trials = self.store.trials(self.study)
        kept = {trial.number for trial in self.ranking()[: max(KEPT, self.plan.settings.confirm)]}
        for trial in trials:
            folder = self.plan.trial_folder(self.stage, trial.number)
            if trial.state.is_finished():
                shutil.rmtree(folder / LAST, ignore_errors=True)
                for left in folder.glob(".*.tmp"):  # of a killed process
                    left.unlink(missing_ok=True)
                if trial.number not in kept and not trial.user_attrs.get("is_recipe"):
                    with contextlib.suppress(OSError):
                        (folder / BEST).unlink(missing_ok=True)

    def task_of(self, trial: FrozenTrial) -> Task:
        """The run of a trial."""
        key, folder = self._key(trial.number), self.plan.trial_folder(self.stage, trial.number)
        epochs, seed = self.stage.epochs, self.plan.config.run.seed
        return Task(key, self.stage.name, trial.number, self.settings_of(trial), epochs, seed, folder)

    def _check_lease(self, task: Task) -> None:
        if not self.leases.is_mine(task.key):
            raise LostLeaseError(f"trial {task.number} was taken over by another worker.")

    def _trial(self, number: int) -> FrozenTrial:
        return self.store.trials(self.study)[number]

    def _key(self, number: int) -> str:
        return f"{self.stage.name}-{number:04d}"

    def _own_folder(self) -> None:
        """Marks the study's folder as this study's; InputError if it is another's."""
        folder = self.plan.folder / self.stage.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mark = folder / "study.txt"
            if not mark.exists():
                if any(path.is_dir() for path in folder.iterdir()):
                    raise InputError(
                        f"{folder} holds runs that are not of study {self.stage.name} in {self.store.shown}; name "
                        "another folder with --output, or another --study-name."
                    )
                write_whole(mark, f"{self.about['id']}\n".encode())
            elif mark.read_text(encoding="utf-8").strip() != self.about["id"]:
                raise InputError(
                    f"{folder} holds the trials of another study than {self.stage.name} in {self.store.shown}; name "
                    "another folder with --output, or move the old one away."
                )
        except OSError as error:
            raise InputError(
                f"The study's folder {folder} cannot be written ({error.strerror}); name another with --output."
            ) from None


def check_study(plan: Plan, stage: Stage, store: Store, description: dict[str, Any]) -> None:
    """Refuses a study of the stage's name that is another one; one that is not there is well.

    Raises:
        InputError: With every difference, and the way out.
    """
    if not store.has_study(stage.name):
        return
    found = TrialTable.about_study(store, stage.name)
    direction = store.open_study(stage.name, plan.direction, {}).direction.name.lower()
    wrong = differences({**found, "direction": direction}, description)
    if wrong:
        raise InputError(
            f"{store.shown} holds another study {stage.name}: {'; '.join(wrong)}. Give the old settings, or name "
            "another --study-name."
        )


@functools.cache
def git_revision() -> str | None:
    """The commit of matchai's source tree, with `+` where files differ from it; None outside of one."""

    def git(*arguments: str) -> str:
        asked = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not of a tree that matchai is only installed in
        return git("describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*") or None
    except (OSError, subprocess.SubprocessError):
        return None
