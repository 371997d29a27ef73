"""Best weights and the resumable state: whole or absent, verified by hash, never a pickle."""

import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import safetensors.torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from matchai.system import InputError, is_there, launcher, lock_bytes, printable, sync_file, sync_folder, write_whole

BEST = "best.safetensors"
LAST = "last"
PARENT = ", started by process "  # in the lock, after who holds it
PATIENCE = 60.0  # seconds for an orphan to finish its step, or its validation batch, and to save
KEPT = 2  # states; the one before the newest is the way out if the newest is damaged
_STATE, _RECORD = "state.safetensors", "state.json"


@dataclass(frozen=True)
class State:
    """A resumable state.

    Attributes:
        tensors: Every tensor by name.
        record: Everything else, JSON.
        best: The best weights so far, a complete safetensors file, or None.

    >>> import torch
    >>> State({"model.bias": torch.zeros(4)}, {"step": 7}, best=None).record["step"]
    7
    """

    tensors: dict[str, Tensor]
    record: dict[str, Any]
    best: bytes | None


def pack_weights(weights: dict[str, Tensor], about: dict[str, Any]) -> bytes:
    """A safetensors file of weights whose header says under `matchai` what prediction needs, as JSON.

    >>> import torch
    >>> safetensors.torch.load(pack_weights({"bias": torch.zeros(2)}, {"class_names": ["lesion", "other"]}))
    {'bias': tensor([0., 0.])}
    """
    plain = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    return safetensors.torch.save(plain, {"matchai": json.dumps(about, sort_keys=True)})


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads the weights that a run kept, and what its header says of them.

    Args:
        path: A run's folder, or a `best.safetensors` file.

    Returns:
        The weights by name, on the CPU, and the header: `class_names`, `hu_window` and what else prediction needs.

    Raises:
        InputError: If there are none, or the file is not matchai's.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "best.safetensors"
    ...     _ = file.write_bytes(pack_weights({"bias": torch.zeros(2)}, {"class_names": ["lesion", "other"]}))
    ...     load_weights(file)
    ({'bias': tensor([0., 0.])}, {'class_names': ['lesion', 'other']})
    """
    return _load(path, has_weights=True)


def _load(path: Path, *, has_weights: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not is_there(path):
        raise InputError(f"{path} does not exist; give the folder of a matchai run, or its {BEST}.")
    file = path / BEST if path.is_dir() else path
    is_there(file)  # a folder that cannot be entered is told by its own name
    try:
        with _open_tensors(file, "pt") as opened:
            about = json.loads((opened.metadata() or {})["matchai"])
            return {name: opened.get_tensor(name) for name in opened.keys() if has_weights}, about  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        reason = "is no file of weights that a run kept"
        if isinstance(error, FileNotFoundError | PermissionError):
            reason = (
                "does not exist" if isinstance(error, FileNotFoundError) else "cannot be read; check its permissions"
            )
        raise InputError(f"{file} {reason}; give the folder of a matchai run, or its {BEST}.") from None


@contextlib.contextmanager
def _open_tensors(path: Path, framework: str) -> Iterator[Any]:
    """A safetensors file; under a name that is no UTF-8, which safetensors does not take, by its descriptor."""
    with path.open("rb") as file:
        is_plain = printable(str(path)) == str(path)
        with safe_open(path if is_plain else f"/dev/fd/{file.fileno()}", framework) as opened:
            yield opened


def load_about(path: Path) -> dict[str, Any]:
    """What the header of the weights that a run kept says of them, without the weights.

    Args:
        path: A run's folder, or a `best.safetensors` file.

    Raises:
        InputError: As `load_weights`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (Path(folder) / "best.safetensors").write_bytes(pack_weights({}, {"class_names": ["lesion", "other"]}))
    ...     load_about(Path(folder))
    {'class_names': ['lesion', 'other']}
    """
    return _load(path, has_weights=False)[1]


def save_state(folder: Path, state: State) -> None:
    """Commits a state under `folder`/last and keeps the one before; a crash at any instant leaves a good one.

    The state is written into a folder beside, each file synced, its record with their hashes last, and becomes
    visible by one rename. Then the best weights are published as `folder`/best.safetensors.

    Args:
        folder: The run's, which must exist.
        state: The state.

    Raises:
        OSError: If it cannot be written; the states before it are still there.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_state(Path(folder), State({"bias": torch.zeros(2)}, {"step": 7}, best=None))
    ...     load_state(Path(folder))
    State(tensors={'bias': tensor([0., 0.])}, record={'step': 7}, best=None)
    """
    last = folder / LAST
    last.mkdir(exist_ok=True)
    names = _names(last)
    number = int(names[-1].removeprefix("state-")) + 1 if names else 1
    beside = last / f".state-{number:06d}.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        _write_state(beside, state)
    except OSError:
        shutil.rmtree(beside, ignore_errors=True)  # a full disk needs the room
        raise
    beside.rename(last / f"state-{number:06d}")
    sync_folder(last)
    if state.best is not None:
        publish_best(folder, state.best)
    for name in names[: 1 - KEPT]:
        shutil.rmtree((last / name).rename(last / f".{name}.old"), ignore_errors=True)


def _write_state(beside: Path, state: State) -> None:
    """Writes a state into a folder, its record with the hashes of all files last, and syncs it."""
    beside.mkdir()
    _write_tensors(beside / _STATE, state.tensors)
    if state.best is not None:
        (beside / BEST).write_bytes(state.best)
    files = list(beside.iterdir())
    with ThreadPoolExecutor() as pool:  # the disk and the hashes need the interpreter as little as each other
        synced = pool.map(sync_file, files)
        hashes = dict(zip([file.name for file in files], pool.map(_digest, files), strict=True))
        list(synced)  # raises what one of them has raised
    record = json.dumps({"hashes": hashes, "record": state.record})
    write_whole(beside / _RECORD, f"{record}\n{hashlib.sha256(record.encode()).hexdigest()}\n".encode())
    sync_folder(beside)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes tensors from where they lie: packed in memory first, they would be a training's largest need of it."""
    try:
        safetensors.torch.save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error)) from None
    path.chmod(path.parent.stat().st_mode & 0o666)  # as any new file: safetensors leaves it to the owner alone


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish_best(folder: Path, best: bytes) -> None:
    """Makes `best` the run's best.safetensors, unless it is that already."""
    path = folder / BEST
    if not (path.is_file() and path.read_bytes() == best):
        write_whole(path, best)


def load_state(folder: Path) -> State | None:
    """The newest complete state of a run; a torn or altered one is passed over with a warning. None where none is.

    Raises:
        InputError: If states are there, but none of them is whole.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     load_state(Path(folder)) is None
    True
    """
    last = folder / LAST
    names = _names(last) if last.is_dir() else []
    damaged: list[str] = []
    for name in reversed(names):
        try:
            state = _read_state(last / name)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            warnings.warn(f"{last / name} is damaged ({error}); the state before it is taken.", stacklevel=2)
            damaged.append(name)
            continue
        for one in damaged:  # out of the way, so that they never count as one of the states kept
            with contextlib.suppress(OSError):
                (last / one).rename(last / f".{one}.damaged")
        return state
    if names:
        raise InputError(f"No state in {last} is whole; start over with --restart, which moves the old run aside.")
    return None


def peek(folder: Path, name: str) -> tuple[dict[str, Any], NDArray[Any] | None] | None:
    """The record of a run's newest state and one of its tensors, for who looks on: moves nothing, loads no more.

    Args:
        folder: The run's; its run may be under way.
        name: Of the tensor.

    Returns:
        The record, and the tensor or None where the state has none of that name; None without a readable state.
    """
    last = folder / LAST
    for state in reversed(_names(last) if last.is_dir() else []):
        try:
            record = _read_record(last / state)["record"]
            with _open_tensors(last / state / _STATE, "np") as opened:
                has_it = name in opened.keys()  # noqa: SIM118 no mapping
                return record, opened.get_tensor(name) if has_it else None
        except (OSError, ValueError, KeyError, SafetensorError):
            continue  # damaged, or given up for a newer one just now
    return None


def _read_record(folder: Path) -> dict[str, Any]:
    text, digest = (folder / _RECORD).read_text(encoding="utf-8").splitlines()
    if hashlib.sha256(text.encode()).hexdigest() != digest:
        raise ValueError(f"{_RECORD} was altered")
    stored: dict[str, Any] = json.loads(text)
    return stored


def _read_state(folder: Path) -> State:
    stored = _read_record(folder)
    contents = {}
    for name in (_STATE, BEST):
        if name in stored["hashes"]:
            contents[name] = (folder / name).read_bytes()
            if hashlib.sha256(contents[name]).hexdigest() != stored["hashes"][name]:
                raise ValueError(f"{name} was altered or is incomplete")
    return State(safetensors.torch.load(contents[_STATE]), stored["record"], contents.get(BEST))


def _names(last: Path) -> list[str]:
    names = [path.name for path in last.iterdir() if re.fullmatch(r"state-[0-9]+", path.name)]
    return sorted(names, key=lambda name: int(name.removeprefix("state-")))


@contextlib.contextmanager
def lock_folder(folder: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Holds a run's folder for this process; the system lets go of it when the process ends, however it ends.

    A holder that ends with its launcher, which was killed, is saving and about to end, so it is waited for.

    Args:
        folder: The folder.
        say: Told that it waits.

    Raises:
        InputError: If another process holds it.
    """
    with (folder / "run.lock").open("a+") as file:
        until = None
        while not _is_locked_by(file):
            file.seek(0)
            holder, _, parent = file.read().partition(PARENT)
            if holder.endswith(f" on {socket.gethostname()}") and parent.isdecimal() and not _is_alive(int(parent)):
                if until is None:
                    until = time.monotonic() + PATIENCE
                    say(f"waiting for {holder}, whose launcher is gone, to save and end")
                if time.monotonic() < until:
                    time.sleep(0.2)
                    continue
            raise InputError(
                f"{folder} is in use by {holder or 'another process'}; wait for it, stop it, or name another folder "
                "with --output."
            )
        file.truncate(0)
        ends_with_parent = launcher() is not None or multiprocessing.parent_process() is not None
        parent = f"{PARENT}{os.getppid()}" if ends_with_parent else ""
        file.write(f"process {os.getpid()} on {socket.gethostname()}{parent}")
        file.flush()
        yield


def is_free(folder: Path) -> bool:
    """Whether no process holds a run's folder; one that is not there is free."""
    try:
        with lock_folder(folder):
            return True
    except FileNotFoundError:
        return True
    except InputError:
        return False


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def _is_locked_by(file: IO[str]) -> bool:
    with contextlib.suppress(OSError):
        lock_bytes(file.fileno())
        return True
    return False
