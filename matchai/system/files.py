"""Files that are whole or absent, folders listed without a silent gap, and locks that end with their process."""

import contextlib
import hashlib
import itertools
import os
import re
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from matchai.system.errors import InputError, Problems
from matchai.system.output import printable

IGNORED = ("__MACOSX", "@eaDir")
"""Folders that archives and file servers leave behind; no user made them."""

MAX_UNREACHED = 20  # problems of a folder that are told one by one

MAX_NAME = 60  # characters of up to 4 bytes, of the 255 bytes that a file's name may have

PATIENCE = 2.0  # seconds; to read what is prepared takes less

_OPENED: dict[tuple[int, str], tuple[int, set[str]]] = {}  # by process and lock file: descriptor, names held
_OPENING = threading.Lock()


def write_whole(path: Path, content: str | bytes | Callable[[BinaryIO], None]) -> None:
    """Writes a file so that a reader, or a crash at any instant, sees the old content or the new, never a part.

    Args:
        path: The file; its folder must exist.
        content: The text, written as UTF-8, or the bytes, or a function that writes them to the open file it is given.

    Raises:
        OSError: If the file cannot be written; what stood at `path` stays as it was.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(printable(content).encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


def file_name(text: str, taken: Collection[str] = ()) -> str:
    """A text as a part of a file's name on any system: letters, digits, `.`, `-` and `_`, told apart from others.

    Args:
        text: Any text.
        taken: Names that others have, which differ from the new one in more than case.

    >>> file_name("ground glass"), file_name("GGO/crazy paving"), file_name("a b", ["a_b"])
    ('ground_glass', 'GGO_crazy_paving', 'a_b_2')
    """
    name = re.sub(r"[^\w.-]", "_", printable(text))[:MAX_NAME].strip(".") or "_"
    others = {one.casefold() for one in taken}
    numbered = (name if number == 1 else f"{name}_{number}" for number in itertools.count(1))
    return next(one for one in numbered if one.casefold() not in others)


def format_size(num_bytes: float) -> str:
    """A number of bytes in words.

    >>> format_size(412_000), format_size(3.2e9), format_size(0)
    ('412.0 kB', '3.2 GB', '0 bytes')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:,.1f} {unit}"
    return f"{num_bytes:.0f} bytes"


def make_folder(folder: Path) -> None:
    """Makes a folder, and those above it, and tries whether it can be written; one that is there may be full.

    Raises:
        InputError: If it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}); name another folder with --output.") from None


def is_there(path: Path) -> bool:
    """Whether a file or folder stands at a path, links followed.

    Raises:
        InputError: If something is there that cannot be reached, as a link to nothing.
    """
    return _status(path) is not None


def list_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files and the folders in a folder, each by name; links are followed, hidden names do not count.

    What is found and cannot be opened is an error and never left out: else half a series would be taken for the whole.

    Raises:
        InputError: If the folder cannot be listed, or with the name of each thing in it that cannot be opened.
    """
    files: list[Path] = []
    folders: list[Path] = []
    problems = Problems()
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"The folder {folder} cannot be read ({error.strerror}); check its permissions.") from None
    for path in paths:
        if path.name.startswith(".") or path.name in IGNORED:
            continue
        with problems.collect():
            status = _status(path)
            if status is None:  # deleted since
                continue
            if stat.S_ISDIR(status.st_mode):
                folders.append(path)
                continue
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{path} is no file but a pipe, socket or device; take it out of the folder.")
            if not _is_allowed(path, os.R_OK):
                raise InputError(f"{path} cannot be read; check its permissions, or take it out of the folder.")
            files.append(path)
    if len(problems) > MAX_UNREACHED:
        problems[MAX_UNREACHED:] = [f"... and {len(problems) - MAX_UNREACHED} more in {folder} that cannot be opened."]
    problems.raise_any()
    return files, folders


def walk_files(folder: Path) -> Iterator[Path]:
    """The files of a folder, then those of the folders in it; a folder that several links lead to counts once.

    Raises:
        InputError: As for `list_folder`.
    """
    waiting, seen = [folder], set()
    while waiting:
        place = waiting.pop()
        status = _status(place)
        if status is None or (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        files, folders = list_folder(place)
        yield from files
        waiting += reversed(folders)


def _status(path: Path) -> os.stat_result | None:
    """What a path leads to; None if nothing stands there."""
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if not path.is_symlink():
            return None
    except OSError as error:
        closed = (one for one in reversed(path.absolute().parents) if not _is_allowed(one, os.X_OK))
        raise InputError(
            f"{next(closed, path)} cannot be opened ({error.strerror}); check its links and permissions."
        ) from None
    target = str(path.readlink())
    way = "get it with `git annex get` or `datalad get`" if "annex/objects" in target else "restore what it leads to"
    raise InputError(f"{path} is a link to {target}, which is not there; {way}, or delete the link.")


def _is_allowed(path: Path, mode: int) -> bool:
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def sync_file(path: Path) -> None:
    """Makes a file's content durable."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable; does nothing where a folder cannot be opened, as on Windows."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # some network file systems refuse to sync a folder; a rename itself is still atomic
        finally:
            os.close(descriptor)


class HostLocks:
    """Things of this host that one process at a time may hold, by name; the system lets go when the process ends.

    One file serves all names, a byte of it each. A hold is a record lock, which children of a fork do not inherit,
    and which closing *any* descriptor of the file would give up: so each process opens the file once, and for good.

    Args:
        folder: Where the file of locks stands or shall stand; a local file system.
        file: Its name.
    """

    def __init__(self, folder: Path, file: str = "holds.lock") -> None:
        self.path = folder.resolve() / file

    def take(self, name: str) -> bool:
        """Holds `name` until `drop` or the end of the process; False if anyone holds it, this process included.

        Raises:
            OSError: If the file of locks cannot be made, or its file system has no locks.
        """
        with _OPENING:
            descriptor, held = self._opened()
            if name in held:
                return False
            try:
                lock_bytes(descriptor, _place_of(name), 1)
            except (BlockingIOError, PermissionError):
                return False
            held.add(name)
            return True

    def drop(self, name: str) -> None:
        """Lets go of `name`; does nothing if this process does not hold it."""
        with _OPENING:
            descriptor, held = self._opened()
            if name in held:
                held.discard(name)
                lock_bytes(descriptor, _place_of(name), 1, let_go=True)

    def _opened(self) -> tuple[int, set[str]]:
        key = (os.getpid(), str(self.path))
        with contextlib.suppress(KeyError, FileNotFoundError):
            # a file that was deleted protects nothing any more
            if os.path.samestat(os.fstat(_OPENED[key][0]), self.path.stat()):
                return _OPENED[key]
        _OPENED[key] = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666), set()
        return _OPENED[key]


@contextlib.contextmanager
def alone(folder: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Lets one process at a time work in a folder; where it cannot be written, or has no locks, none waits.

    Args:
        folder: Made if it is not there.
        on_wait: Called once after `PATIENCE` seconds of waiting for another process.
    """
    locks = HostLocks(folder, "folder.lock")
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        while not locks.take("work"):
            if on_wait is not None and time.monotonic() - began >= PATIENCE:
                on_wait()
                on_wait = None
            time.sleep(0.1)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            locks.drop("work")


def _place_of(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


def lock_bytes(descriptor: int, start: int = 0, length: int = 0, *, let_go: bool = False) -> None:
    """Locks bytes of an open file for this process without waiting, or lets go of them.

    Args:
        descriptor: Of a file that is open for writing.
        start: The first byte; it may lie behind the end.
        length: How many; 0 for all from `start` on (on Windows for the first alone).
        let_go: Ends the lock.

    Raises:
        OSError: If another process holds one of them (EACCES or EAGAIN), or the file system has no locks.
    """
    try:
        import fcntl  # noqa: PLC0415 not on Windows
    except ImportError:
        import msvcrt  # noqa: PLC0415 only on Windows

        os.lseek(descriptor, start % 2**31, os.SEEK_SET)  # its positions have 31 bits
        mode = msvcrt.LK_UNLCK if let_go else msvcrt.LK_NBLCK  # type: ignore[attr-defined]
        msvcrt.locking(descriptor, mode, length or 1)  # type: ignore[attr-defined]
    else:
        # a record lock: unlike a flock it does not live on in forked loader workers
        fcntl.lockf(descriptor, fcntl.LOCK_UN if let_go else fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
