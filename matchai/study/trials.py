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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from matchai.runs import versions
from matchai.study.leases import Leases, LostLeaseError, LostTrialError, retry_on_lost_lock
from matchai.study.plan import Plan, Stage, about_study, check_stored_study, is_known
from matchai.study.rows import select_own, sort_others
from matchai.study.samplers import FINISHED, make_pruner, propose
from matchai.study.storage import Store
from matchai.system import InputError, StoreError, write_whole
from matchai.training import BEST, LAST

MAX_ERRORS = 3  # of one trial without a new epoch in between, then it fails and is replaced
KEPT = 3  # weights of the best trials, or as many as are confirmed
RESULTS = {"is_recipe", "reason", "errors", "best_epoch", "seconds"}  # attributes that no enqueued trial brings along


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

    Of the study's trials only those count that matchai made and ended (`select_own`): `study` shows no others, and so
    all that count, rank, propose, prune or draw trials see no others. An enqueued trial becomes such a trial when it is
    taken.

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
            made = store.open_study(stage.name, plan.direction, {"matchai": identity | description})
            with store.locked(stage.name):
                check_stored_study(plan, stage, store, description)  # another process may have been faster
                if not is_known(store, stage.name):
                    store.set_attr(made, None, "matchai", identity | description)
        self.about = about_study(store, stage.name)
        self.study = store.view(
            store.open_study(stage.name, plan.direction, {}), lambda trials: select_own(trials, self.about["id"])
        )
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

    @retry_on_lost_lock
    def next_task(self, ranking: list[FrozenTrial] | None = None) -> Task | str:
        """Takes a trial: one whose worker is gone, else a new one; else `WAIT`, or `DONE`.

        Args:
            ranking: The best trials of the screening, if these are to be trained.
        """
        with self.store.locked(self.stage.name):
            trials = self.trials()
            running = [trial for trial in trials if trial.state == TrialState.RUNNING]
            for trial in running:
                if self.leases.take(self._key(trial.number)):
                    return self.task_of(trial)
            finished = sum(trial.state in FINISHED for trial in trials)
            if finished + len(running) >= self.plan.total(self.stage):
                return WAIT if running else DONE
            is_recipe = not any(trial.user_attrs.get("is_recipe") for trial in trials if trial.state != TrialState.FAIL)
            waiting = {} if is_recipe else self.others()[0]
            number: int | None
            if is_recipe:
                number = self._add(self.plan.space.params(self.plan.config), is_recipe=True)
            elif waiting:
                number = self._take(*next(iter(waiting.items())))
            elif ranking is not None:
                tried = [trial.params for trial in trials]
                params = next((trial.params for trial in ranking if trial.params not in tried), {})
                if not params:
                    return WAIT if running else DONE
                number = self._add(params)
            else:
                number = self._add(self._propose())
            if number is None or not self.leases.begin(self._key(number)):
                return WAIT
            return self.task_of(self._trial(number))

    def _propose(self) -> dict[str, Any]:
        """Parameters for the next trial; seeded by its number among those that count, so that no others matter."""
        name, seed = self.plan.settings.search_sampler, self.plan.config.run.seed
        return propose(name, seed, self.study, len(self.trials()), self.plan.space.distributions)

    def _add(self, params: dict[str, Any], *, is_recipe: bool = False) -> int:
        """Adds a trial; returns its number."""
        number = 1 + max((trial.number for trial in self.store.trials(self.study)), default=-1)
        attributes = self._attributes(number, params, is_recipe=is_recipe)
        added = self.store.add_running(self.study, params, self.plan.space.distributions, attributes)
        if added != number:  # another program was faster
            self.store.set_attr(self.study, added, "run", str(self.plan.trial_folder(self.stage, added)))
        return added

    def _take(self, number: int, given: dict[str, Any]) -> int | None:
        """Takes an enqueued trial, with the parameters given and others proposed; None if another program took it."""
        space = self.plan.space
        params = given if len(given) == len(space.distributions) else self._propose() | given
        brought = {name: value for name, value in self._trial(number).user_attrs.items() if name not in RESULTS}
        attributes = brought | self._attributes(number, params)
        trial = create_trial(
            state=TrialState.RUNNING, params=params, distributions=space.distributions, user_attrs=attributes
        )
        return number if self.store.take_waiting(self.study, number, trial) else None

    def _attributes(self, number: int, params: dict[str, Any], *, is_recipe: bool = False) -> dict[str, Any]:
        space = self.plan.space
        return {
            **space.attributes(self.plan.config.flat() if is_recipe else space.settings(params)),
            **({"is_recipe": True} if is_recipe else {}),
            "seed": self.plan.config.run.seed,
            "epochs": self.stage.epochs,
            "study_id": self.about["id"],
            "run": str(self.plan.trial_folder(self.stage, number)),
            "host": socket.gethostname(),
            "git_revision": git_revision(),
            "versions": {**versions(), "optuna": optuna.__version__},
        }

    def report(self, task: Task, row: dict[str, Any]) -> bool:
        """Tells the row of an epoch, whose state is saved; returns whether the trial is hopeless.

        Raises:
            LostLeaseError: If another worker has taken it over, or another program has ended it.
        """
        value = row[self.plan.settings.objective]
        with self._writing(task):
            if value is not None:
                self.store.report(self.study, task.number, value, row["epoch"])
        return bool(self.pruner.prune(self.study, self._trial(task.number)))

    @retry_on_lost_lock
    def finish(self, task: Task, state: TrialState, value: float | None, attributes: dict[str, Any]) -> None:
        """Tells how a trial ended, and lets go of it.

        Raises:
            LostLeaseError: If another worker has taken it over, or another program has ended it.
        """
        with self.store.locked(self.stage.name):
            with self._writing(task):
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

        Raises:
            LostLeaseError: If another worker has taken it over, or another program has ended it.
        """
        with self.store.locked(self.stage.name):
            with self._writing(task):
                errors = [*self._trial(task.number).user_attrs.get("errors", []), [epochs, message]][-MAX_ERRORS:]
                self.store.set_attr(self.study, task.number, "errors", errors)
                has_failed = len(errors) == MAX_ERRORS and len({epoch for epoch, _ in errors}) == 1
                if has_failed:
                    self.store.finish(self.study, task.number, TrialState.FAIL, None)
            self.leases.drop(task.key)
            return has_failed

    def trials(self) -> list[FrozenTrial]:
        """The trials that count, by number; not to be altered."""
        return self.study.get_trials(deepcopy=False)

    def others(self) -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
        """The other trials: by number the parameters of enqueued ones, and why each of the rest counts as nothing."""
        space = self.plan.space if self.plan.space.entries == self.about["space"] else None  # of a report, any space
        return sort_others(self.store.trials(self.study), self.trials(), space)

    def counts(self) -> dict[str, Any]:
        """How far the stage is, for people: trials of each kind, the best and the recipe, seconds of a trial."""
        trials = self.trials()
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
            for trial in self.trials()
            if trial.state == TrialState.COMPLETE
            and not (trial.user_attrs.get("reason") or trial.user_attrs.get("is_recipe"))
        ]
        return sorted(complete, key=lambda trial: (sign * float(trial.value or 0.0), trial.number))

    def recipe(self) -> FrozenTrial | None:
        """The recipe's trial, once it is finished."""
        found = (trial for trial in self.trials() if trial.user_attrs.get("is_recipe"))
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

    @contextlib.contextmanager
    def _writing(self, task: Task) -> Iterator[None]:
        """To be held while a trial is written to, which another program may end at any moment."""
        self._check(task)
        try:
            yield
        except (UpdateFinishedTrialError, KeyError, StoreError):
            self._check(task)
            raise

    def _check(self, task: Task) -> None:
        if not self.leases.is_mine(task.key):
            raise LostLeaseError("left to another worker, which has taken it over")
        state = self._trial(task.number).state
        if state != TrialState.RUNNING:
            raise LostTrialError(self._lost(task.number, f"told {state.name}"))

    def _trial(self, number: int) -> FrozenTrial:
        found = [trial for trial in self.store.trials(self.study) if trial.number == number]
        if not found:
            raise LostTrialError(self._lost(number, "deleted"))
        return found[0]

    def _lost(self, number: int, how: str) -> str:
        return (
            f"Trial {number} of study {self.stage.name} was {how} by another program while it was trained: it counts "
            "as nothing, and another trial takes its place."
        )

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
                write_whole(mark, f"{self.about['id']}\n")
            elif mark.read_text(encoding="utf-8").strip() != self.about["id"]:
                raise InputError(
                    f"{folder} holds the trials of another study than {self.stage.name} in {self.store.shown}; name "
                    "another folder with --output, or move the old one away."
                )
        except OSError as error:
            raise InputError(
                f"The study's folder {folder} cannot be written ({error.strerror}); name another with --output."
            ) from None


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
