"""Files that are whole or absent (write beside, flush, fsync, rename), and locks that end with their process."""

import contextlib
import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from matchai.system.errors import InputError

PATIENCE = 2.0  # seconds; to read what is prepared takes less

_OPENED: dict[tuple[int, str], tuple[int, set[str]]] = {}  # by process and lock file: descriptor, names held
_OPENING = threading.Lock()


def write_whole(path: Path, content: bytes | Callable[[BinaryIO], None]) -> None:
    """Writes a file so that a reader, or a crash at any instant, sees the old content or the new, never a part.

    Args:
        path: The file; its folder must exist.
        content: The bytes, or a function that writes them to the open binary file it is given.

    Raises:
        OSError: If the file cannot be written; what stood at `path` stays as it was.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


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
