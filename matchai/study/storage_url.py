"""The database under a study's store: what `--storage` may name, what is refused, its locks, and rows of its tables.

Of what Optuna does not publish, its tables and their version are used here; the rest stands in `matchai.study.storage`.
"""

import hashlib
import importlib.util
import json
import os
import re
import sqlite3
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy as sql
from alembic.script import ScriptDirectory
from optuna.distributions import distribution_to_json
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from matchai.system import InputError

MOUNTS = Path("/proc/self/mountinfo")
TAKEN = "a file (studies/matchai.db, or sqlite:///studies/matchai.db), postgresql://… or mysql://…"
# backends, their drivers in the order in which they are looked for, and the drivers' modules
DRIVERS = {
    "sqlite": {"pysqlite": "sqlite3"},
    "postgresql": {"psycopg2": "psycopg2", "psycopg": "psycopg"},
    "mysql": {"pymysql": "pymysql", "mysqldb": "MySQLdb"},
}
# file systems whose locks or shared memory do not hold between hosts
_DISTRIBUTED = "afs beegfs ceph coda fhgfs fuse.ceph fuse.glusterfs glusterfs gpfs lustre orangefs panfs pvfs2 wekafs"
_REMOTE = "cifs fuse.gcsfuse fuse.rclone fuse.s3fs fuse.sshfs ncpfs nfs nfs4 smb2 smb3 smbfs"
NETWORK = {*_DISTRIBUTED.split(), *_REMOTE.split()}
# those that a virtual machine shares with its host: some keep their word, some do not
SHARED = {"9p", "vboxsf", "virtiofs"}
KEEPALIVE = {"idle": 30, "interval": 10, "count": 3}  # seconds; a dead host is found out after a minute
SQLITE_WAIT = 1.0  # seconds that SQLite waits for a lock by itself, before the wait is the store's
_SQLITE_READ_ONLY, _SQLITE_NO_DATABASE = 8, 26
_TABLES = set(models.BaseModel.metadata.tables)
_SERVER_URL = "--storage postgresql://user@host/database"


def parse_storage(storage: str) -> sql.URL:
    """The URL that `--storage` names, with a driver that is installed.

    Args:
        storage: A path that ends in `.db`, or a URL.

    Raises:
        InputError: If it is neither, or the driver is missing; no password stands in the sentence.
    """
    scheme, slashes, _ = storage.partition("://")
    if not slashes:
        if storage.endswith(".db") and "@" not in storage:
            return sql.URL.create("sqlite", database=storage)
        name = storage if re.fullmatch(r"[\w./\\ -]+", storage) else "as it is written"
        raise InputError(f"--storage {name} names no store; give {TAKEN}.")
    if not re.fullmatch(r"[\w+.-]+", scheme):
        raise InputError(f"--storage is no URL; give {TAKEN}.")
    backend, _, driver = scheme.partition("+")
    if backend not in DRIVERS or driver not in {"", *DRIVERS[backend]}:
        raise InputError(f"--storage {scheme}://… is no store that matchai takes; give {TAKEN}.")
    try:
        url = sql.make_url(storage)
    except (ArgumentError, ValueError):
        url = sql.URL.create(scheme)
    if backend == "sqlite":
        if url.host or url.query or not url.database or url.database.startswith((":memory:", "file:")):
            raise InputError(f"--storage {scheme}://… names no file; write sqlite:///, then its path.")
        return url
    if not (url.host or "host" in url.query) or not url.database:
        raise InputError(
            f"--storage {scheme}://… is malformed; its form is {scheme}://user:password@host:port/database, with "
            "special characters of the password as %XX."
        )
    for name, module in DRIVERS[backend].items():
        if driver in {"", name} and importlib.util.find_spec(module):
            return url.set(drivername=f"{backend}+{name}")
    raise InputError(f'--storage {scheme}://… needs a driver that is missing; pip install "matchai[{backend}]".')


def secrets_of(url: sql.URL) -> set[str]:
    """The passwords in a URL."""
    found = {str(value) for key, value in url.query.items() if "pass" in key.lower()}
    return found | {url.password} if url.password else found


def shown_url(url: sql.URL) -> str:
    """A URL for people: a file's path, or a server's URL without its passwords."""
    if url.get_backend_name() == "sqlite":
        return str(url.database)
    query = {key: "***" if "pass" in key.lower() else value for key, value in url.query.items()}
    return url.set(query=query).render_as_string(hide_password=True)


def connect_args(url: sql.URL) -> dict[str, Any]:
    """What the driver is told so that it waits shortly and finds out that the other side is dead."""
    backend = url.get_backend_name()
    if backend == "sqlite":
        return {"timeout": SQLITE_WAIT}
    found: dict[str, Any] = {"connect_timeout": 10}
    if backend == "postgresql":
        found |= {f"keepalives_{key}": value for key, value in KEEPALIVE.items()} | {"tcp_user_timeout": 60_000}
    else:
        found |= {"read_timeout": 60, "write_timeout": 60}
    return {key: value for key, value in found.items() if key not in url.query}


def set_up(connection: Any, _: Any) -> None:
    """Sets what a new connection of a driver's needs; a listener of SQLAlchemy's event `connect`."""
    cursor = connection.cursor()
    if isinstance(connection, sqlite3.Connection):
        cursor.execute("PRAGMA synchronous=FULL")
    elif "psycopg" in type(connection).__module__:
        for key, value in KEEPALIVE.items():  # the server's side, by which the locks of a dead host go
            cursor.execute(f"SET tcp_keepalives_{key} = {value}")
        connection.commit()
    cursor.close()


def set_wal_mode(engine: sql.Engine) -> None:
    """Gives a file a write-ahead log, which it remembers: readers and the writer do not wait for each other then."""
    with engine.connect() as connection:
        connection.execute(sql.text("PRAGMA journal_mode=WAL"))


def cause_of(error: BaseException) -> BaseException:
    """The database's own error, from under those of SQLAlchemy and Optuna."""
    while True:
        below = (error.orig if isinstance(error, DBAPIError) else None) or error.__cause__
        if below is None:
            return error
        error = below


def reason_of(error: BaseException, url: sql.URL) -> str:
    """What the database itself says, without secrets."""
    cause = cause_of(error)
    words = cause.args[-1] if cause.args and isinstance(cause.args[0], int) else cause  # MySQL has a number first
    text = " ".join(str(words).split())
    for secret in secrets_of(url):
        text = text.replace(secret, "***")
    return text.rstrip(".")


def filesystem_of(path: Path) -> str:
    """The kind of the file system that `path` lies on or would lie on, as Linux names it; "" where none is told."""
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return ""
    real, best, kind = path.resolve(), -1, ""
    for line in lines:
        before, _, after = line.partition(" - ")
        point = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), before.split()[4]))
        if real.is_relative_to(point) and len(point.parts) >= best:  # of two at one place the later hides the other
            best, kind = len(point.parts), after.split()[0]
    return kind


def check_place(file: Path, say: Callable[[str], None]) -> None:
    """Refuses a path where no SQLite store can be, and says where one may not be safe.

    Raises:
        InputError: If it is a folder, cannot be written, or lies on a network file system.
    """
    if file.is_dir():
        raise InputError(f"{file} is a folder; name a file in it, such as {file / 'matchai.db'}.")
    kind = filesystem_of(file)
    if kind in NETWORK or str(file).startswith(("\\\\", "//")):
        raise InputError(
            f"{file} lies on a network file system ({kind or 'a share'}), where SQLite loses data; name a path on a "
            f"local disk, or a server with {_SERVER_URL}."
        )
    if kind in SHARED:
        say(f"{file} lies on {kind}, whose locks may not hold; a local disk, or {_SERVER_URL}, is safe")
    if file.exists() and not os.access(file, os.R_OK | os.W_OK):
        raise InputError(
            f"{file} cannot be read and written; change its permissions, or name another file with --storage."
        )


def check_file(file: Path, *, is_sole: bool) -> None:
    """Refuses a file that is no sound store of this version of Optuna, and leaves it as it is.

    Args:
        file: The SQLite file; absent or empty, it is none yet.
        is_sole: That no store of this process has it open: closing it here would end that store's locks.

    Raises:
        InputError: If it is damaged, no database, no store, or one of another version.
        sqlalchemy.exc.DBAPIError: If it is busy.
    """
    real = file.resolve()
    if not real.exists() or real.stat().st_size == 0:
        return
    # a write-ahead log that nobody has open would be made again, and stay, if the file were opened in the usual way
    is_idle = is_sole and _has_log_mode(real) and not Path(f"{real}-wal").exists()
    try:
        _check_database(file, "immutable=1" if is_idle else "mode=ro")
    except DBAPIError as error:
        code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF
        if code == _SQLITE_READ_ONLY:  # a killed writer left a journal, which only who may write can roll back
            _check_database(file, "mode=rw")
        elif code == _SQLITE_NO_DATABASE:
            raise InputError(f"{file} is no SQLite database; name another file with --storage.") from None
        elif is_waiting(error):
            raise
        else:
            raise _damaged(file, error.orig) from None


def _has_log_mode(file: Path) -> bool:
    with file.open("rb") as opened:  # byte 18 of the file format: 1 rollback journal, 2 write-ahead log
        return opened.read(19)[18:] == b"\2"


def _check_database(file: Path, mode: str) -> None:
    uri = f"{file.resolve().as_uri()}?{mode}"
    engine = sql.create_engine("sqlite://", creator=lambda: sqlite3.connect(uri, uri=True, timeout=SQLITE_WAIT))
    try:
        with engine.connect() as connection:
            found = connection.scalar(sql.text("PRAGMA quick_check(1)"))
            if found != "ok":
                raise _damaged(file, found)
            check_tables(connection, str(file), is_file=True)
    finally:
        engine.dispose()


def _damaged(file: Path, found: object) -> InputError:
    return InputError(
        f"{file} is damaged ({' '.join(str(found).split())}); keep a copy, and try `sqlite3 {file} .recover`, or name "
        "another file with --storage."
    )


def check_tables(connection: sql.Connection, shown: str, *, is_file: bool) -> None:
    """Refuses a database whose tables are not those of the installed Optuna; none, or a part of them, may be made.

    Args:
        connection: To the database; nothing is written.
        shown: Its name for people.
        is_file: Whether tables of others show that it is not meant.

    Raises:
        InputError: If they are not.
    """
    tables = set(sql.inspect(connection).get_table_names())
    if is_file and not tables <= _TABLES | {"alembic_version"} and not {"studies", "trials", "version_info"} <= tables:
        raise InputError(f"{shown} is a database but no store of Optuna's; name another file with --storage.")
    version = schema = None
    if "alembic_version" in tables:
        version = connection.scalar(sql.text("SELECT version_num FROM alembic_version"))
    if "version_info" in tables:
        schema = connection.scalar(sql.text("SELECT schema_version FROM version_info"))
    scripts = ScriptDirectory(str(Path(models.__file__).parent / "alembic"))
    is_other = schema not in {None, models.SCHEMA_VERSION} if version is None else version != scripts.get_current_head()
    if is_other:
        raise InputError(
            f"{shown} is a store of another version of Optuna ({version or schema}) than the installed "
            f"{optuna.__version__} reads; copy it, then `optuna storage upgrade --storage URL`, or name another store."
        )


def check_server(engine: sql.Engine, url: sql.URL) -> None:
    """Refuses a server that cannot be used, but for reasons that pass.

    Raises:
        InputError: If it cannot be reached, or its tables are others.
        SQLAlchemyError: If it has no room now, or is starting.
    """
    try:
        with engine.connect() as connection:
            check_tables(connection, shown_url(url), is_file=False)
    except SQLAlchemyError as error:
        reason = reason_of(error, url)
        if any(words in reason for words in ("too many", "Too many", "starting up", "shutting down")):
            raise
        raise InputError(
            f"The store {shown_url(url)} cannot be opened ({reason}); see that the server runs and can be reached from "
            "here, and that user, password and database are right."
        ) from None


def try_lock(connection: sql.Connection, url: sql.URL, name: str) -> bool:
    """Takes a lock of a server's by its name, if it is free; it ends with the connection."""
    digest = hashlib.sha256(f"{url.database}/{name}".encode())
    is_postgresql = url.get_backend_name() == "postgresql"
    statement = "SELECT pg_try_advisory_lock(:key)" if is_postgresql else "SELECT GET_LOCK(:key, 0)"
    key = int.from_bytes(digest.digest()[:8], "big", signed=True) if is_postgresql else digest.hexdigest()[:60]
    return bool(connection.scalar(sql.text(statement), {"key": key}))


# SQLITE_BUSY, SQLITE_LOCKED, SQLITE_PROTOCOL (a race for the write-ahead log)
_SQLITE_WAITS = {5, 6, 15}
# serialization, deadlock, lock time-out, too many connections, server going down or coming up
_POSTGRESQL_WAITS = {"40001", "40P01", "55P03", "53300", "57P01", "57P02", "57P03"}
# too many connections, shutting down, lock time-out, deadlock, no connection, gone away, lost
_MYSQL_WAITS = {1040, 1053, 1205, 1213, 2002, 2003, 2006, 2013, 2055}


def is_waiting(error: BaseException) -> bool:
    """Whether a database's error will pass: a lock, a deadlock, a connection that was lost or cannot be made now."""
    cause = cause_of(error)
    if isinstance(cause, sqlite3.Error):
        return getattr(cause, "sqlite_errorcode", 0) & 0xFF in _SQLITE_WAITS
    state = getattr(cause, "pgcode", None) or getattr(cause, "sqlstate", None)
    if state:
        return str(state) in _POSTGRESQL_WAITS or str(state).startswith("08")
    number = cause.args[0] if cause.args else None
    if isinstance(number, int):
        return number in _MYSQL_WAITS or number == 0  # 0: PyMySQL's word for a connection that was closed
    return type(cause).__name__ in {"OperationalError", "InterfaceError"}  # without a code: no connection


def write_row(session: Any, row: Any, trial: FrozenTrial) -> None:
    """Gives a row the start, parameters and user attributes of a trial, and nothing else.

    Optuna itself would hold the parameters against the first row with such names, whosever that is. What is removed
    was there already: an enqueued trial's, or that of a deleted row whose id SQLite has given again.
    """
    about = {"trial_id": row.trial_id}
    for part in (models.TrialParamModel, models.TrialUserAttributeModel, models.TrialIntermediateValueModel):
        session.query(part).filter_by(**about).delete()
    row.datetime_start = trial.datetime_start
    for name, distribution in trial.distributions.items():
        value, text = distribution.to_internal_repr(trial.params[name]), distribution_to_json(distribution)
        session.add(models.TrialParamModel(**about, param_name=name, param_value=value, distribution_json=text))
    for key, attribute in trial.user_attrs.items():
        session.add(models.TrialUserAttributeModel(**about, key=key, value_json=json.dumps(attribute)))


def take_row(session: Any, trial_id: int, trial: FrozenTrial) -> bool:
    """Makes a WAITING row what a RUNNING trial is; returns whether it did, as others may have taken it first."""
    row = session.query(models.TrialModel).filter_by(trial_id=trial_id)
    if not row.filter_by(state=TrialState.WAITING).update({"state": TrialState.RUNNING}):
        return False
    write_row(session, row.one(), trial)
    return True


def is_same(row: FrozenTrial, trial: FrozenTrial) -> bool:
    """Whether a row is what was to be added; MySQL keeps whole seconds of the time."""
    if row.datetime_start is None or trial.datetime_start is None:  # an enqueued one
        return False
    is_same_time = abs(row.datetime_start - trial.datetime_start) < timedelta(seconds=1)
    # as JSON, in which a tuple comes back as a list
    added, kept = (json.dumps([one.params, one.user_attrs], sort_keys=True, default=float) for one in (trial, row))
    return is_same_time and added == kept
