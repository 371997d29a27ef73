"""A study's store: many processes at once, locks, kills, refusals; on SQLite and on a real PostgreSQL alike."""

import contextlib
import importlib.util
import math
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna
import pytest
import sqlalchemy as sql
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from matchai.study import storage_url
from matchai.study.storage import Store, open_store
from matchai.study.storage_url import filesystem_of, parse_storage, secrets_of, shown_url
from matchai.system.errors import InputError, LockLostError, StoreError
from matchai.system.files import HostLocks
from tests.conftest import PASSWORD, connect_admin

SPACE: dict[str, optuna.distributions.BaseDistribution] = {"x": FloatDistribution(0, 1)}

# forks light processes that begin at one instant; a worker that raises leaves its traceback and its status
SCRIPT = """
import os, sys, time, traceback
from optuna.distributions import FloatDistribution
from matchai.study.storage import open_store

job, storage, number, total, folder = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]

def claims(me):
    store = open_store(storage)
    study = store.open_study("s", "maximize", {"matchai": {"epochs": 3}})
    while True:
        with store.locked("s"):
            rows = store.trials(study)
            if len(rows) >= total:
                return
            store.add_running(study, {"x": len(rows) / total}, {"x": FloatDistribution(0, 1)}, {"host": "h"})

def lock(me):
    store = open_store(storage)
    for _ in range(total):
        with store.locked("one"):
            with open(folder + "/owner", "w") as file:
                file.write(str(os.getpid()))
            time.sleep(0.002)
            if open(folder + "/owner").read() != str(os.getpid()):
                open(folder + "/broken", "w").close()
        time.sleep(0.001)

def writes(me):
    store = open_store(storage)
    study = store.open_study("s", "maximize", {})
    with store.locked("s"):
        trial = store.add_running(study, {"x": 0.5}, {"x": FloatDistribution(0, 1)}, {})
    with open(folder + f"/told.{trial}", "a", buffering=1) as told:
        for step in range(1, total):
            store.report(study, trial, step / total, step)
            told.write(f"{step}\\n")
            store.set_attr(study, trial, "seconds", step)

begin = time.time() + 0.1
children = []
for me in range(number):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            time.sleep(max(0, begin - time.time()))
            {"claims": claims, "lock": lock, "writes": writes}[job](me)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    children.append(child)
print(*children, flush=True)
codes = [os.waitpid(child, 0)[1] for child in children]
print(*codes)
"""


@contextlib.contextmanager
def workers(job: str, storage: str, number: int, total: int, folder: Path) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, job, storage, str(number), str(total), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def finish(process: "subprocess.Popen[str]") -> tuple[list[int], str]:
    out, err = process.communicate(timeout=100)
    return [int(code) for code in out.split("\n")[-2].split()], err


def kill_some(process: "subprocess.Popen[str]", count: int, seed: int, pause: float) -> None:
    assert process.stdout is not None
    victims = [int(child) for child in process.stdout.readline().split()]
    chance = random.Random(seed)
    for victim in chance.sample(victims, count):
        time.sleep(chance.uniform(pause / 3, pause))
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)


@pytest.fixture(params=["sqlite", "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new store, as --storage would name it."""
    if request.param == "sqlite":
        return str(tmp_path / "studies" / "matchai.db")
    return str(request.getfixturevalue("database"))


@pytest.fixture
def opened(storage: str) -> Iterator[Store]:
    found = open_store(storage)
    yield found
    found.close()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Store]:
    found = open_store(str(tmp_path / "matchai.db"))
    yield found
    found.close()


def plain(storage: str) -> str:
    return storage.replace("postgresql:", "postgresql+psycopg2:") if "://" in storage else f"sqlite:///{storage}"


def running(opened: Store) -> tuple[optuna.Study, int]:
    study = opened.open_study("s", "maximize", {"matchai": {"seed": 1}})
    return study, opened.add_running(study, {"x": 0.25}, SPACE, {"host": "h"})


# --- many processes


@pytest.mark.timeout(120)
@pytest.mark.parametrize("repetition", [*range(3), *(pytest.param(i, marks=pytest.mark.slow) for i in range(3, 20))])
def test_eight_starts_on_a_new_store_make_one_study_and_claim_its_total_once(
    storage: str, tmp_path: Path, repetition: int
) -> None:
    with workers("claims", storage, 8, 10, tmp_path) as process:
        codes, err = finish(process)
    assert codes == [0] * 8, err
    assert err == ""
    study = optuna.load_study(study_name="s", storage=plain(storage))
    assert [trial.number for trial in study.trials] == list(range(10))
    assert sorted(trial.params["x"] for trial in study.trials) == [i / 10 for i in range(10)]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 10))])
def test_killed_claimers_leave_no_row_half_written_and_the_total_exact(storage: str, tmp_path: Path, seed: int) -> None:
    with workers("claims", storage, 6, 40, tmp_path) as process:
        kill_some(process, 4, seed, 0.3)
        finish(process)
    with workers("claims", storage, 2, 40, tmp_path) as process:
        codes, err = finish(process)
    assert codes == [0, 0], err
    rows = optuna.load_study(study_name="s", storage=plain(storage)).trials
    assert [(row.number, row.params, row.user_attrs) for row in rows] == [
        (i, {"x": i / 40}, {"host": "h"}) for i in range(40)
    ]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 10))])
def test_a_lock_has_one_holder_and_ends_with_a_killed_one(storage: str, tmp_path: Path, seed: int) -> None:
    open_store(storage).close()
    with workers("lock", storage, 6, 25, tmp_path) as process:
        kill_some(process, 3, seed, 0.3)
        codes, err = finish(process)
    assert codes.count(0) >= 3, err
    assert not (tmp_path / "broken").exists()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 10))])
def test_killed_writers_leave_a_sound_file_with_all_that_was_acknowledged(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "matchai.db"
    with workers("writes", str(path), 4, 100_000, tmp_path) as process:
        kill_some(process, 4, seed, 0.6)
        finish(process)
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()
    rows = optuna.load_study(study_name="s", storage=plain(str(path))).trials
    told = {int(one.suffix[1:]): one.read_text().split() for one in tmp_path.glob("told.*")}
    assert any(told.values())
    for number, steps in told.items():
        assert set(map(int, steps)) <= set(rows[number].intermediate_values)


@pytest.mark.timeout(60)
def test_a_lock_excludes_threads_too(opened: Store) -> None:
    order = []

    def second() -> None:
        with opened.locked("s"):
            order.append("second")

    thread = threading.Thread(target=second)
    with opened.locked("s"):
        thread.start()
        time.sleep(0.3)
        order.append("first")
    thread.join(20)
    assert order == ["first", "second"]


@pytest.mark.timeout(60)
def test_locks_of_two_names_do_not_wait_for_each_other(opened: Store) -> None:
    with opened.locked("a"), opened.locked("b"):
        pass


def test_a_thread_that_takes_its_own_lock_again_is_told_instead_of_waiting_for_good(file: Store) -> None:
    with file.locked("s"), pytest.raises(RuntimeError, match="already"), file.locked("s"):
        pass


# --- a busy store


@contextlib.contextmanager
def held_for(path: str, seconds: float) -> Iterator[None]:
    begun = threading.Event()

    def hold() -> None:
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
        begun.set()
        time.sleep(seconds)
        connection.execute("COMMIT")
        connection.close()

    thread = threading.Thread(target=hold)
    thread.start()
    begun.wait()
    yield
    thread.join()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seconds", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_a_report_and_an_end_wait_for_a_held_lock_and_say_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr(storage_url, "SQLITE_WAIT", 0.1)
    monkeypatch.setattr("matchai.study.storage.SAY_AFTER", 0.5)
    said: list[str] = []
    opened = open_store(str(tmp_path / "matchai.db"), said.append)
    study, number = running(opened)
    with held_for(opened.shown, seconds):
        opened.report(study, number, 0.5, 1)
    with held_for(opened.shown, seconds):
        opened.finish(study, number, TrialState.COMPLETE, 0.75)
    trial = opened.trials(study)[number]
    assert (trial.intermediate_values, trial.value, trial.state) == ({1: 0.5}, 0.75, TrialState.COMPLETE)
    assert len(said) == 2
    assert all("is busy" in line for line in said)
    opened.close()


@pytest.mark.timeout(60)
def test_a_claim_waits_for_a_held_lock(file: Store) -> None:
    study, _ = running(file)
    with held_for(file.shown, 2), file.locked("s"):
        assert file.add_running(study, {"x": 0.5}, SPACE, {}) == 1
    assert len(file.trials(study)) == 2


@pytest.mark.timeout(60)
def test_a_store_that_stays_busy_ends_in_one_sentence(file: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    study, number = running(file)
    monkeypatch.setattr("matchai.study.storage.PATIENCE", 0.5)
    with held_for(file.shown, 2), pytest.raises(StoreError, match=r"^The store \S+ has been busy for \d+ s .*\.$"):
        file.report(study, number, 0.5, 1)


@pytest.mark.timeout(60)
def test_a_full_disk_is_told_at_once_and_not_waited_for(file: Store) -> None:
    study, number = running(file)
    engine = file._storage.engine
    sql.event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA max_page_count=1"))
    engine.dispose()
    begun = time.monotonic()
    with pytest.raises(StoreError, match="full"):
        file.set_attr(study, number, "versions", "x" * 10**6)
    assert time.monotonic() - begun < 5


@pytest.mark.timeout(60)
def test_a_claim_whose_commit_failed_after_all_was_written_is_not_made_twice(
    file: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, _ = running(file)
    dialect = file._storage.engine.dialect
    commit = dialect.do_commit
    failed: list[Exception] = []

    def fail(connection: Any) -> None:
        is_claim = connection.in_transaction and not failed
        commit(connection)
        if is_claim:
            error = sqlite3.OperationalError("database is locked")
            error.sqlite_errorcode = sqlite3.SQLITE_BUSY
            failed.append(error)
            raise error

    monkeypatch.setattr(dialect, "do_commit", fail)
    assert file.add_running(study, {"x": 0.1}, SPACE, {"host": "me", "shape": (1, 2)}) == 1
    assert len(failed) == 1
    assert [row.user_attrs["host"] for row in file.trials(study)] == ["h", "me"]


def enqueue(storage: str) -> None:
    """What another program leaves: a trial that waits, with more than its parameters."""
    waiting = optuna.trial.create_trial(
        state=TrialState.WAITING, params={"y": 0.5}, distributions={"y": SPACE["x"]}, intermediate_values={1: 9.0}
    )
    optuna.load_study(study_name="s", storage=plain(storage)).add_trial(waiting)


def claim() -> FrozenTrial:
    return optuna.trial.create_trial(
        state=TrialState.RUNNING, params={"x": 0.5}, distributions=SPACE, user_attrs={"host": "me"}
    )


def test_a_waiting_trial_becomes_what_it_is_claimed_as_and_nothing_else(opened: Store, storage: str) -> None:
    study, _ = running(opened)
    enqueue(storage)
    assert opened.take_waiting(study, 1, claim())
    (found,) = optuna.load_study(study_name="s", storage=plain(storage)).get_trials()[1:]
    assert (found.state, found.params, found.user_attrs) == (TrialState.RUNNING, {"x": 0.5}, {"host": "me"})
    assert found.datetime_start is not None
    assert found.intermediate_values == {}


def test_a_waiting_trial_that_another_program_took_is_not_claimed(opened: Store, storage: str) -> None:
    study, _ = running(opened)
    enqueue(storage)
    optuna.load_study(study_name="s", storage=plain(storage)).ask()
    assert not opened.take_waiting(study, 1, claim())
    assert opened.trials(study)[1].params == {"y": 0.5}


def test_a_number_is_given_once_though_rows_are_deleted(file: Store, tmp_path: Path) -> None:
    study, _ = running(file)
    assert file.add_running(study, {"x": 0.5}, SPACE, {"host": "h"}) == 1
    with sqlite3.connect(tmp_path / "matchai.db") as connection:
        connection.execute("DELETE FROM trials WHERE number = 0")
    assert [row.number for row in file.trials(study)] == [1]
    assert file.add_running(study, {"x": 0.75}, SPACE, {"host": "h"}) == 2


def test_a_row_has_nothing_of_a_deleted_one_whose_id_it_was_given(file: Store, tmp_path: Path) -> None:
    study, number = running(file)
    file.report(study, number, 9.0, 1)
    with sqlite3.connect(tmp_path / "matchai.db") as connection:
        connection.execute("DELETE FROM trials")  # what belongs to it stays
    assert file.add_running(study, {"x": 0.75}, SPACE, {"host": "h"}) == 0
    (row,) = file.trials(study)
    assert (row.params, row.intermediate_values) == ({"x": 0.75}, {})


def end_connections(url: str) -> None:
    name = url.rsplit("/", 1)[1]
    with connect_admin(url.rsplit("/", 1)[0]).connect() as connection:
        statement = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"
        connection.execute(sql.text(statement), {"name": name})


@pytest.mark.timeout(60)
def test_a_lost_connection_is_made_anew(database: str) -> None:
    opened = open_store(database)
    study, number = running(opened)
    end_connections(database)
    opened.report(study, number, 0.5, 1)
    end_connections(database)
    opened.finish(study, number, TrialState.COMPLETE, 0.5)
    end_connections(database)
    assert study.best_value == 0.5
    opened.close()


@pytest.mark.timeout(60)
def test_a_claim_whose_lock_was_lost_with_its_connection_writes_nothing(database: str) -> None:
    opened = open_store(database)
    study, _ = running(opened)
    with opened.locked("s"):
        end_connections(database)
        with pytest.raises(LockLostError, match="was lost"):
            opened.add_running(study, {"x": 0.5}, SPACE, {})
    assert len(opened.trials(study)) == 1
    with opened.locked("s"):
        assert opened.add_running(study, {"x": 0.5}, SPACE, {}) == 1
    opened.close()


# --- an ordinary Optuna study


def test_plain_optuna_reads_all_that_was_written(storage: str, opened: Store) -> None:
    study, number = running(opened)
    opened.report(study, number, 0.5, 1)
    opened.report(study, number, 0.75, 2)
    opened.set_attr(study, number, "best_epoch", 2)
    opened.set_attr(study, None, "note", ["a"])
    opened.finish(study, number, TrialState.COMPLETE, 0.75)
    found = optuna.load_study(study_name="s", storage=plain(storage))
    assert found.user_attrs == {"matchai": {"seed": 1}, "note": ["a"]}
    assert found.direction == optuna.study.StudyDirection.MAXIMIZE
    trial = found.best_trial
    assert (trial.params, trial.distributions, trial.value) == ({"x": 0.25}, SPACE, 0.75)
    assert trial.intermediate_values == {1: 0.5, 2: 0.75}
    assert trial.user_attrs == {"host": "h", "best_epoch": 2}
    assert trial.datetime_start is not None
    assert trial.datetime_complete is not None


def test_a_study_of_plain_optuna_is_opened_as_it_is(storage: str) -> None:
    made = optuna.create_study(study_name="s", storage=plain(storage) if "://" in storage else "sqlite:///:memory:")
    if "://" not in storage:
        Path(storage).parent.mkdir()
        made = optuna.create_study(study_name="s", storage=plain(storage))
    made.set_user_attr("owner", "me")
    opened = open_store(storage)
    study = opened.open_study("s", "maximize", {"matchai": 1})
    assert (study.direction, study.user_attrs) == (optuna.study.StudyDirection.MINIMIZE, {"owner": "me"})
    opened.close()


def test_a_study_is_there_with_its_attributes_or_not_at_all(file: Store) -> None:
    with pytest.raises(TypeError):
        file.open_study("s", "maximize", {"good": 1, "bad": object()})
    assert not file.has_study("s")
    assert file.open_study("s", "minimize", {"good": 1}).user_attrs == {"good": 1}


def test_trials_are_seen_as_others_left_them(opened: Store, storage: str) -> None:
    study, number = running(opened)
    assert opened.trials(study)[number].state == TrialState.RUNNING
    other = open_store(storage)
    theirs = other.open_study("s", "maximize", {})
    other.report(theirs, number, 0.5, 1)
    other.finish(theirs, number, TrialState.PRUNED, None)
    assert opened.trials(study)[number].state == TrialState.PRUNED
    assert opened.trials(study)[number].intermediate_values == {1: 0.5}
    other.close()


def test_a_step_that_is_there_stays_as_it_is(opened: Store) -> None:
    study, number = running(opened)
    opened.report(study, number, 0.5, 1)
    opened.report(study, number, 0.9, 1)
    assert opened.trials(study)[number].intermediate_values == {1: 0.5}


@pytest.mark.parametrize(
    ("state", "value"), [(TrialState.COMPLETE, 0.75), (TrialState.PRUNED, None), (TrialState.FAIL, None)]
)
def test_an_end_may_be_told_again_but_not_changed(opened: Store, state: TrialState, value: float | None) -> None:
    study, number = running(opened)
    opened.report(study, number, 0.5, 1)
    opened.finish(study, number, state, value)
    before = opened.trials(study)
    opened.finish(study, number, state, value)
    assert opened.trials(study) == before
    with pytest.raises(StoreError, match=f"has ended {state.name}"):
        opened.finish(study, number, TrialState.COMPLETE, 0.125)


@pytest.mark.parametrize("reported", [{}, {1: 0.5}, {1: 0.5, 3: 0.25}, {1: 0.5, 2: math.nan}])
def test_a_pruned_trial_takes_the_value_that_optuna_would_give_it(file: Store, reported: dict[int, float]) -> None:
    study, number = running(file)
    twin = optuna.create_study()
    trial = twin.ask()
    for step, value in reported.items():
        file.report(study, number, value, step)
        trial.report(value, step)
    file.finish(study, number, TrialState.PRUNED, None)
    twin.tell(trial, state=TrialState.PRUNED)
    assert file.trials(study)[number].values == twin.trials[0].values


@pytest.mark.parametrize(
    ("state", "value"),
    [(TrialState.COMPLETE, None), (TrialState.COMPLETE, math.nan), (TrialState.FAIL, 0.5), (TrialState.RUNNING, None)],
)
def test_an_end_whose_value_does_not_fit_is_refused(file: Store, state: TrialState, value: float | None) -> None:
    study, number = running(file)
    with pytest.raises(ValueError, match="cannot end"):
        file.finish(study, number, state, value)


def test_the_file_keeps_a_write_ahead_log_and_each_commit_is_synced(file: Store) -> None:
    connection = sqlite3.connect(file.shown)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()
    with file._storage.engine.connect() as ours:
        assert ours.scalar(sql.text("PRAGMA synchronous")) == 2


# --- what is refused


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(storage: str) -> str:
    with pytest.raises(InputError) as caught:
        open_store(storage)
    shown = "".join(traceback.format_exception(caught.value))
    assert PASSWORD not in shown
    assert quote(PASSWORD) not in shown
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def make_text(path: Path) -> None:
    path.write_text("no database, but longer than a header\n" * 9)


def make_foreign(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE photos (x)")


def make_store(path: Path) -> None:
    optuna.create_study(study_name="s", storage=f"sqlite:///{path}")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")


def make_other_version(path: Path) -> None:
    make_store(path)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v9.0.0.a'")


def make_ancient(path: Path) -> None:
    make_store(path)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DROP TABLE alembic_version")
        connection.execute("UPDATE version_info SET schema_version = 3")


def make_damaged(path: Path) -> None:
    make_store(path)
    content = bytearray(path.read_bytes())
    content[4096 * 2 : 4096 * 12] = bytes(range(256)) * 160
    path.write_bytes(content)


def make_torn(path: Path) -> None:
    make_store(path)
    path.write_bytes(path.read_bytes()[:10_000])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (make_text, "no SQLite database"),
        (make_foreign, "no store of Optuna's"),
        (make_other_version, "another version of Optuna"),
        (make_ancient, "another version of Optuna"),
        (make_damaged, "is damaged"),
        (make_torn, "is damaged"),
    ],
)
def test_a_file_that_is_no_sound_store_is_refused_and_nothing_is_changed(tmp_path: Path, make: Any, words: str) -> None:
    path = tmp_path / "x.db"
    make(path)
    before = snapshot(tmp_path)
    assert words in refused(str(path))
    assert snapshot(tmp_path) == before


def test_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.db").mkdir()
    assert "is a folder" in refused(str(tmp_path / "x.db"))


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    assert "cannot be written" in refused(str(tmp_path / "a file" / "x.db"))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write all files")
def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    make_store(tmp_path / "x.db")
    (tmp_path / "x.db").chmod(0o444)
    assert "cannot be read and written" in refused(str(tmp_path / "x.db"))


TABLE = """\
31 30 8:2 / {0}/far/near rw,relatime - xfs /dev/vdb rw
30 22 0:40 / {0}/far rw,relatime shared:2 - {1} host:/export rw
32 22 0:41 / {0}/a\\040space rw,relatime - nfs host:/export rw
33 22 0:42 / {0}/twice rw,relatime - nfs host:/export rw
34 22 0:43 / {0}/twice rw,relatime - tmpfs tmpfs rw
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/vda rw
"""


@pytest.fixture
def mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    table = tmp_path / "mountinfo"
    table.write_text(TABLE.format(tmp_path, "nfs4"))
    monkeypatch.setattr(storage_url, "MOUNTS", table)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("here.db", "ext4"),
        ("far/x.db", "nfs4"),
        ("far/deep/x.db", "nfs4"),
        ("far/near/x.db", "xfs"),
        ("farther/x.db", "ext4"),
        ("a space/x.db", "nfs"),
        ("twice/x.db", "tmpfs"),
    ],
)
def test_a_path_lies_on_the_longest_mount_above_it(mounts: Path, path: str, kind: str) -> None:
    assert filesystem_of(mounts / path) == kind


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "lustre", "ceph", "gpfs"])
def test_a_file_on_a_network_file_system_is_refused_with_the_ways_out(mounts: Path, kind: str) -> None:
    storage_url.MOUNTS.write_text(TABLE.format(mounts, kind))
    message = refused(str(mounts / "far" / "x.db"))
    assert kind in message
    assert "local disk" in message
    assert "--storage postgresql://" in message
    assert not (mounts / "far").exists()


def test_a_link_to_a_network_file_system_is_seen_through(mounts: Path) -> None:
    (mounts / "far").mkdir()
    (mounts / "link").symlink_to(mounts / "far")
    assert "network file system" in refused(str(mounts / "link" / "x.db"))


def test_a_share_of_a_virtual_machine_is_warned_of(mounts: Path) -> None:
    storage_url.MOUNTS.write_text(TABLE.format(mounts, "9p"))
    said: list[str] = []
    open_store(str(mounts / "far" / "x.db"), said.append).close()
    assert len(said) == 1
    assert "9p" in said[0]


@pytest.mark.parametrize(
    "storage",
    [
        "redis://localhost:6379/0",
        "journal.log",
        "journal:///tmp/x.log",
        "postgres://u@h/d",
        "postgresql+asyncpg://u@h/d",
        "oracle://u@h/d",
        "matchai",
        "",
        "two words://x",
    ],
)
def test_what_is_no_store_is_refused_with_what_is_taken(storage: str) -> None:
    message = refused(storage)
    assert "studies/matchai.db" in message
    assert "postgresql://" in message
    assert "mysql://" in message


@pytest.mark.parametrize("storage", ["sqlite://", "sqlite:///:memory:", "sqlite://studies/x.db", "sqlite:///file:x"])
def test_a_sqlite_url_without_a_file_is_refused(storage: str) -> None:
    assert "names no file" in refused(storage)


@pytest.mark.parametrize(
    "storage",
    [
        f"postgresql://u:{PASSWORD}@h:port/d",
        f"postgresql://u:{PASSWORD}@h",
        f"postgresql://u:a@{PASSWORD}:x/d",
        f"mysql://{PASSWORD}",
        f"postgresql://u:{PASSWORD}@/d",
    ],
)
def test_a_malformed_url_is_refused_with_its_form(storage: str) -> None:
    assert "user:password@host:port/database" in refused(storage)


@pytest.mark.parametrize("backend", ["postgresql", "mysql"])
def test_a_missing_driver_is_told_with_its_cure(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = refused(f"{backend}://u:{quote(PASSWORD)}@h/d")
    assert f'pip install "matchai[{backend}]"' in message


@pytest.mark.timeout(60)
@pytest.mark.parametrize("backend", ["postgresql+psycopg2", "mysql+pymysql"])
def test_a_server_that_is_not_there_is_refused(backend: str) -> None:
    module = backend.split("+")[1]
    pytest.importorskip(module)
    with socket.socket() as closed:  # bound, but it does not listen
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        message = refused(f"{backend}://u:{quote(PASSWORD)}@127.0.0.1:{port}/d")
    assert "cannot be opened" in message
    assert "server runs" in message


@pytest.mark.timeout(60)
def test_a_wrong_password_is_refused_and_no_password_is_shown(database: str) -> None:
    wrong = database.replace(quote(PASSWORD), "wrong-one")
    message = refused(wrong)
    assert "wrong-one" not in message
    assert "password" in message


@pytest.mark.timeout(60)
def test_a_database_that_is_not_there_is_refused(server: str) -> None:
    assert "does not exist" in refused(f"{server}/nowhere")


@pytest.mark.timeout(60)
def test_another_version_on_a_server_is_refused(database: str) -> None:
    optuna.create_study(study_name="s", storage=plain(database))
    engine = sql.create_engine(plain(database))
    with engine.begin() as connection:
        connection.execute(sql.text("UPDATE alembic_version SET version_num = 'v9.0.0.a'"))
    engine.dispose()
    assert "another version of Optuna" in refused(database)


@pytest.mark.timeout(60)
def test_an_open_store_shows_no_password(database: str) -> None:
    opened = open_store(f"{database}?passfile=/{PASSWORD}")
    assert parse_storage(opened.url).password == PASSWORD
    for text in (opened.shown, repr(opened), str(opened)):
        assert PASSWORD not in text
        assert quote(PASSWORD) not in text
        assert "127.0.0.1" in text
    opened.close()


@given(st.text("aB7@:/?#%{}&= é", min_size=4))
def test_no_password_survives_in_what_is_shown_and_none_is_lost(password: str) -> None:
    url = parse_storage(f"postgresql+psycopg2://user:{quote(password, safe='')}@host/db")
    assert secrets_of(url) == {password}
    assert shown_url(url) == "postgresql+psycopg2://user:***@host/db"
    assert parse_storage(url.render_as_string(hide_password=False)) == url


# --- holds


HOLDER = """
import sys, time
from pathlib import Path
from matchai.system.files import HostLocks
assert HostLocks(Path(sys.argv[1])).take("3")
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.timeout(60)
def test_a_hold_is_seen_by_others_and_ends_with_a_killed_process(tmp_path: Path) -> None:
    holds = HostLocks(tmp_path)
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert not holds.take("3")
        assert holds.take("4")
        holder.kill()
    assert holds.take("3")


def test_a_hold_is_taken_once_in_a_process_until_it_is_dropped(tmp_path: Path) -> None:
    assert HostLocks(tmp_path).take("3")
    assert not HostLocks(tmp_path).take("3")
    HostLocks(tmp_path).drop("3")
    assert HostLocks(tmp_path).take("3")


@pytest.mark.timeout(60)
def test_dropping_one_hold_keeps_the_others(tmp_path: Path) -> None:
    holds = HostLocks(tmp_path)
    assert holds.take("3")
    assert holds.take("4")
    holds.drop("4")
    other = subprocess.run([sys.executable, "-c", HOLDER, tmp_path], capture_output=True, text=True, check=False)
    assert "AssertionError" in other.stderr


@pytest.mark.timeout(60)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_neither_holds_nor_ends_what_its_parent_holds(tmp_path: Path) -> None:
    script = """
import os, sys
from pathlib import Path
from matchai.system.files import HostLocks
holds = HostLocks(Path(sys.argv[1]))
assert holds.take("3")
for _ in range(2):
    child = os.fork()
    if child == 0:
        os._exit(holds.take("3"))
    assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", script, tmp_path], check=True)


def test_a_hold_on_a_file_that_was_deleted_counts_no_more(tmp_path: Path) -> None:
    holds = HostLocks(tmp_path)
    assert holds.take("3")
    holds.path.unlink()
    assert holds.take("3")
