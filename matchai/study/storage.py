"""A study's store, opened by any number of processes at once, with the patience and the locks that Optuna lacks.

What is written are ordinary Optuna rows. Optuna's own way to them crashes when several processes open a new SQLite
file, gives up after five seconds at a lock, and claims a trial in several transactions; so this room, and no other,
uses what Optuna (5.0) does not publish: `_CachedStorage`, `_create_scoped_session`, the tables in `_rdb.models`,
`RDBStorage.engine`, `.scoped_session`, `._get_trials`, `._get_best_trial_id` and `._get_prepared_new_trial`,
`Study._study_id`, `FrozenTrial._trial_id`, and the storage's methods by these ids.
"""

import contextlib
import json
import math
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import optuna
import sqlalchemy as sql
from optuna.distributions import BaseDistribution
from optuna.storages import RDBStorage, _CachedStorage
from optuna.storages._rdb import models
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from matchai.study import storage_url
from matchai.study.rows import StudyView
from matchai.system import HostLocks, InputError, LockLostError, StoppedError, StoreError

PATIENCE = 900.0  # seconds that a call waits for a busy store, or for a server that went away
SAY_AFTER = 5.0  # seconds of waiting that are not worth a word
T = TypeVar("T")
Direction = Literal["maximize", "minimize"]


def open_store(storage: str, say: Callable[[str], None] = print, *, may_create: bool = True) -> "Store":
    """Opens a store of studies, and creates it where there is none, if it may.

    Args:
        storage: A path that ends in `.db`, or a URL of SQLite, PostgreSQL or MySQL as SQLAlchemy has them.
        say: Told once per wait that the store is busy.
        may_create: Whether a file that is not there is made.

    Raises:
        InputError: If it cannot be a store, or is one that cannot be used; nothing was changed then.
        StoreError: If it stays busy.
    """
    if optuna.logging.get_verbosity() < optuna.logging.WARNING:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
    store = Store(storage_url.parse_storage(storage), say)
    if store.path and not may_create and not store.path.exists():
        raise InputError(f"There is no store {store.path}; see --storage, or run the study first.")
    store._open()
    return store


class Store:
    """What `open_store` opens; its calls wait while the store is busy, and may be repeated after any failure.

    A finished trial cannot be altered: Optuna's `UpdateFinishedTrialError` says so. Not for use across a fork.

    Attributes:
        url: With the password, for processes that shall open it too.
        shown: Without it, for people.
        path: The file of SQLite, else None.
        is_server: Whether other hosts may share it.
        say: As of `open_store`.
        should_stop: Asked while the store is waited for.
    """

    def __init__(self, url: sql.URL, say: Callable[[str], None]) -> None:
        self.url = url.render_as_string(hide_password=False)
        self.is_server = url.get_backend_name() != "sqlite"
        self.say = say
        self.should_stop: Callable[[], bool] = lambda: False
        self._url = url
        self.shown = storage_url.shown_url(url)
        self.path = None if self.is_server else Path(str(url.database))
        self._held: dict[tuple[int, str], sql.Connection | None] = {}  # by thread and name

    def __repr__(self) -> str:
        return f"Store({self.shown})"

    def _open(self) -> None:
        if self.is_server:
            options: dict[str, Any] = {"poolclass": sql.NullPool, "isolation_level": "AUTOCOMMIT"}
            self._locks = sql.create_engine(self._url, connect_args=storage_url.connect_args(self._url), **options)
            sql.event.listen(self._locks, "connect", storage_url.set_up)
            self._with_retries(lambda: storage_url.check_server(self._locks, self._url))
        else:
            file = Path(str(self._url.database))
            storage_url.check_place(file, self.say)
            real = file.resolve()
            self._host_locks = HostLocks(real.parent, f"{real.name}.lock")
            try:
                if not self._host_locks.path.exists():
                    self._with_retries(lambda: storage_url.check_file(file, is_sole=True))
            except InputError:
                if not self._host_locks.path.exists():  # else the tables are being made: looked at again under the lock
                    raise
            try:
                real.parent.mkdir(parents=True, exist_ok=True)
                self._host_locks.take("a try")
                self._host_locks.drop("a try")
            except OSError as error:
                raise InputError(
                    f"{file} cannot be written ({error.strerror}); name another file with --storage."
                ) from None
        with self.locked("the tables"):
            if not self.is_server:
                self._with_retries(lambda: storage_url.check_file(file, is_sole=False))
            try:
                self._storage = self._with_retries(lambda: _RetryingStorage(self))
                if not self.is_server:
                    self._with_retries(lambda: storage_url.set_wal_mode(self._storage.engine))
            except StoreError as error:
                raise InputError(f"{error} See that it can be written, or name another with --storage.") from None
        self._cached = _CachedStorage(self._storage)

    def close(self) -> None:
        """Closes the connections; locks that are still held stay."""
        self._storage.remove_session()
        self._storage.engine.dispose()

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Holds a lock of the store's by its name, alone among all threads, processes and, on a server, hosts.

        The system lets go of it when the process dies, the server when the connection does.

        Raises:
            RuntimeError: If this thread holds it already.
        """
        key = threading.get_ident(), name
        if key in self._held:
            raise RuntimeError(f"this thread holds the lock {name!r} already")
        since, pause, is_told = time.monotonic(), 0.01, False
        waiting: list[sql.Connection] = []
        try:
            while not self._with_retries(lambda: self._take(name, waiting)):
                if not is_told and time.monotonic() - since > SAY_AFTER:
                    is_told = True
                    self.say(f"another process works at {name} in the store {self.shown}; waiting for it")
                self._pause(pause)
                pause = min(2 * pause, 0.2)
            self._held[key] = waiting[0] if waiting else None
            yield
        finally:
            if self._held.pop(key, self) is None:
                self._host_locks.drop(name)
            for connection in waiting:  # its end is the lock's end
                with contextlib.suppress(SQLAlchemyError):
                    connection.close()

    def _take(self, name: str, waiting: list[sql.Connection]) -> bool:
        if not self.is_server:
            return self._host_locks.take(name)
        if not waiting:
            waiting.append(self._locks.connect())
        try:
            return storage_url.try_lock(waiting[0], self._url, name)
        except SQLAlchemyError:
            with contextlib.suppress(SQLAlchemyError):
                waiting.pop().close()
            raise

    def _check_locks(self) -> None:
        for (thread, name), connection in list(self._held.items()):
            if thread == threading.get_ident() and connection is not None:
                try:
                    connection.scalar(sql.text("SELECT 1"))
                except SQLAlchemyError as error:
                    raise LockLostError(
                        f"The lock {name} of the store {self.shown} was lost with its connection "
                        f"({self._reason(error)}); nothing was decided."
                    ) from error

    def has_study(self, name: str) -> bool:
        """Whether there is a study of this name."""
        with contextlib.suppress(KeyError):
            self._storage.get_study_id_from_name(name)
            return True
        return False

    def open_study(self, name: str, direction: Direction, attrs: dict[str, Any]) -> optuna.Study:
        """The study of a name, as it is; created in one transaction with direction and user attributes if absent.

        Its reads, a search sampler's among them, are as patient as the store's.
        """

        def create() -> None:
            if self.has_study(name):
                return
            with contextlib.suppress(IntegrityError), self._session() as session:  # another process was faster
                way = models.StudyDirectionModel(objective=0, direction=StudyDirection[direction.upper()])
                row = models.StudyModel(study_name=name, directions=[way])
                session.add(row)
                session.flush()
                for key, value in attrs.items():
                    text = json.dumps(value)
                    session.add(models.StudyUserAttributeModel(study_id=row.study_id, key=key, value_json=text))

        self._with_retries(create)
        return self._with_retries(lambda: optuna.load_study(study_name=name, storage=self._cached))

    def trials(self, study: optuna.Study) -> list[FrozenTrial]:
        """All trials of a study as they are now, by number; shared with the study, so not to be altered."""

        def read() -> list[FrozenTrial]:
            found = self._cached.get_all_trials(study._study_id, deepcopy=False)
            with self._session() as session:
                number = session.query(models.TrialModel).filter_by(study_id=study._study_id).count()
            if number < len(found):  # rows were deleted, which Optuna's cache keeps
                _CachedStorage.__init__(self._cached, self._storage)
                found = self._cached.get_all_trials(study._study_id, deepcopy=False)
            return found

        try:
            return self._with_retries(read)
        except KeyError:
            raise StoreError(
                f"Study {study.study_name} was deleted from {self.shown} while it ran; the same command with another "
                "--output begins it anew."
            ) from None

    def view(self, study: optuna.Study, select: Callable[[list[FrozenTrial]], list[FrozenTrial]]) -> optuna.Study:
        """The study, of whose trials only those are seen that `select` leaves."""
        return self._with_retries(
            lambda: StudyView(study.study_name, self._cached, lambda one: select(self.trials(one)))
        )

    def add_running(
        self,
        study: optuna.Study,
        params: dict[str, Any],
        distributions: dict[str, BaseDistribution],
        attrs: dict[str, Any],
    ) -> int:
        """Adds a RUNNING trial with parameters and user attributes in one transaction, and returns its number.

        To be called under the study's lock. When a commit fails with its outcome unknown, the row is looked for
        before the commit is repeated.

        Raises:
            LockLostError: If a lock of this thread's was lost before anything was written.
        """
        trial = create_trial(state=TrialState.RUNNING, params=params, distributions=distributions, user_attrs=attrs)
        known: list[int] = []

        def add() -> int:
            rows = self.trials(study)
            for row in rows[known[0] :] if known else []:
                if storage_url.is_same(row, trial):
                    return row.number
            known[:] = known or [len(rows)]
            self._check_locks()
            with self._session() as session:
                models.StudyModel.find_or_raise_by_id(study._study_id, session, for_update=True)
                row = self._storage._get_prepared_new_trial(study._study_id, None, session)
                # Optuna counts rows, which gives a number twice once a row was deleted
                row.number = max([int(row.number), *(1 + one.number for one in rows)])
                storage_url.write_row(session, row, trial)
                session.flush()
                return int(row.number)

        return self._with_retries(add)

    def take_waiting(self, study: optuna.Study, number: int, trial: FrozenTrial) -> bool:
        """Makes a WAITING trial a RUNNING one, with the parameters and user attributes of `trial`, in one transaction.

        To be called under the study's lock. Returns whether it did: another program may have taken the trial.

        Raises:
            LockLostError: If a lock of this thread's was lost before anything was written.
        """

        def take() -> bool:
            self._check_locks()
            found = self._trial(study, number)
            if found.state != TrialState.WAITING:
                return storage_url.is_same(found, trial)  # a commit of before, with its outcome unknown
            with self._session() as session:
                return storage_url.take_row(session, found._trial_id, trial)

        return self._with_retries(take)

    def report(self, study: optuna.Study, number: int, value: float, step: int) -> None:
        """Writes a trial's objective at a step; one that is there already stays as it is."""

        def write() -> None:
            trial = self._trial(study, number)
            if step not in trial.intermediate_values:
                self._storage.set_trial_intermediate_value(trial._trial_id, step, float(value))

        self._with_retries(write)

    def set_attr(self, study: optuna.Study, number: int | None, key: str, value: Any) -> None:
        """Writes a user attribute of a trial, or of the study itself if `number` is None; `value` as of JSON.

        Raises:
            LockLostError: If a lock of this thread's was lost; nothing was written.
        """

        def write() -> None:
            self._check_locks()
            if number is None:
                self._storage.set_study_user_attr(study._study_id, key, value)
            else:
                self._storage.set_trial_user_attr(self._trial(study, number)._trial_id, key, value)

        self._with_retries(write)

    def finish(self, study: optuna.Study, number: int, state: TrialState, value: float | None) -> None:
        """Ends a trial; done already with the same state and value, it stays as it is.

        Args:
            study: The study.
            number: The trial.
            state: COMPLETE, PRUNED or FAIL.
            value: Of a COMPLETE trial, not NaN; else None. A PRUNED one takes its last reported value, if not NaN.

        Raises:
            ValueError: If state and value do not fit each other.
            StoreError: If it has ended otherwise.
        """
        if not state.is_finished() or (value is None or math.isnan(value)) == (state == TrialState.COMPLETE):
            raise ValueError(f"a trial cannot end {state.name} with the value {value}")

        def write() -> None:
            trial, last = self._trial(study, number), value
            if state == TrialState.PRUNED and trial.last_step is not None:
                last = trial.intermediate_values[trial.last_step]
            values = None if last is None or math.isnan(last) else [float(last)]
            if not trial.state.is_finished():
                self._storage.set_trial_state_values(trial._trial_id, state, values)
            elif (trial.state, trial.values) != (state, values):
                raise StoreError(
                    f"Trial {number} of {study.study_name} in {self.shown} has ended {trial.state.name} with "
                    f"{trial.values} already, and cannot end {state.name} with {values}."
                )

        self._with_retries(write)

    def _trial(self, study: optuna.Study, number: int) -> FrozenTrial:
        return self._storage.get_trial(self._cached.get_trial_id_from_study_id_trial_number(study._study_id, number))

    def _session(self) -> contextlib.AbstractContextManager[Any]:
        return _create_scoped_session(self._storage.scoped_session)

    def _with_retries(self, action: Callable[[], T]) -> T:
        since, pause, is_told = time.monotonic(), 0.05, False
        while True:
            try:
                return action()
            except (SQLAlchemyError, sqlite3.Error, optuna.exceptions.StorageInternalError) as error:
                waited = time.monotonic() - since
                if not storage_url.is_waiting(error):
                    raise StoreError(f"The store {self.shown} failed ({self._reason(error)}).") from error
                if waited > PATIENCE:
                    raise StoreError(
                        f"The store {self.shown} has been busy for {waited:.0f} s ({self._reason(error)})."
                    ) from error
                if waited > SAY_AFTER and not is_told:
                    is_told = True
                    self.say(f"the store {self.shown} is busy ({self._reason(error)}); waiting for it")
            self._pause(pause)
            pause = min(2 * pause, 2.0)

    def _pause(self, seconds: float) -> None:
        if self.should_stop():
            raise StoppedError(f"Waiting for the store {self.shown} was given up; nothing is lost.")
        time.sleep(seconds)

    def _reason(self, error: BaseException) -> str:
        return storage_url.reason_of(error, self._url)


class _RetryingStorage(RDBStorage):
    """Optuna's storage whose reads wait as the store does, so that what a search sampler reads does too."""

    def __init__(self, store: Store) -> None:
        self._store = store
        arguments = {"connect_args": storage_url.connect_args(store._url), "pool_pre_ping": store.is_server}
        # braces are Optuna's own
        super().__init__(store.url.replace("{", "{{").replace("}", "}}"), arguments)
        sql.event.listen(self.engine, "connect", storage_url.set_up)
        self.engine.dispose()  # the connections made before that

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name.startswith("get_") or name in {"_get_trials", "_get_best_trial_id"}:
            return lambda *args, **kwargs: self._store._with_retries(lambda: found(*args, **kwargs))
        return found
