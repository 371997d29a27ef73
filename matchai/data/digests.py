"""SHA-256 of whole files, remembered as long as the system says that a file is as it was."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from matchai.system import preparing_threads, write_whole

# Seconds that a file must have rested before its hash is remembered. The clock of a file system is coarse, and what is
# written through a memory map is stamped when the page is first touched, so a young file can change unseen; Linux
# writes such pages back after about 35 s, and stamps the next change of them again.
SETTLED = 60.0
MOST = 20_000  # files that a memory knows; such a memory takes 3 MB
LISTED = 100  # files whose hashes a run records one by one: a YAML file of thousands takes seconds to read


def fingerprint(paths: Sequence[Path], memory: Path | None = None, folder: Path | None = None) -> dict[str, str]:
    """SHA-256 of whole files, by name; about 1 GB a second and core.

    Args:
        paths: The files.
        folder: A folder above all files, under which they may have the same names: each then goes by its path in it.
        memory: A JSON file of earlier hashes. One holds as long as inode, size, time of modification and time of
            change of its file are the same; the last of these is the system's own, which no program can set back.

    Raises:
        OSError: If a file cannot be read. A memory that cannot be read or written, or is damaged, is done without.
    """
    # Windows does not tell when a file was changed
    known = _recall(memory) if memory is not None and os.name != "nt" else {}

    def digest(path: Path) -> tuple[str, list[int] | None]:
        with path.open("rb") as file:  # an open file's status is the server's own on network file systems
            before, began = _status(file.fileno()), time.time_ns()
            found = known.get(str(path.resolve()))
            if found is not None and found[1] == before:
                return found
            value = hashlib.file_digest(file, "sha256").hexdigest()
            is_settled = began - max(before[2:]) > SETTLED * 1e9 and _status(file.fileno()) == before
            return value, before if is_settled else None

    with ThreadPoolExecutor(preparing_threads()) as pool:
        found = dict(zip(paths, pool.map(digest, paths), strict=True))
    if memory is not None and os.name != "nt":
        _remember(memory, known, {str(path.resolve()): one for path, one in found.items() if one[1] is not None})
    names = {path: path.relative_to(folder).as_posix() if folder else path.name for path in paths}
    return {names[path]: value for path, (value, _) in found.items()}


def condense(digests: dict[str, str]) -> dict[str, str]:
    """One SHA-256 a folder in place of those of its files, where these are too many to be listed.

    Args:
        digests: By path, as `fingerprint` gives them with a folder.

    Returns:
        The same up to `LISTED` files; else by folder, over the lines "digest  path" of its files, sorted by path.
    """
    if len(digests) <= LISTED:
        return digests
    folders: dict[str, list[str]] = {}
    for path in sorted(digests):
        folders.setdefault(f"{path.rpartition('/')[0]}/", []).append(f"{digests[path]}  {path}\n")
    return {name: hashlib.sha256(os.fsencode("".join(lines))).hexdigest() for name, lines in folders.items()}


Known = dict[str, tuple[str, list[int] | None]]


def _status(descriptor: int) -> list[int]:
    status = os.fstat(descriptor)
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _recall(memory: Path) -> Known:
    """What the memory holds; nothing if its seal, a hash over it, is broken."""
    try:
        content = json.loads(memory.read_text(encoding="utf-8"))
        if content["seal"] != _seal(content["files"]):
            return {}
        return {path: (value, status) for path, (value, status) in content["files"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _remember(memory: Path, known: Known, found: Known) -> None:
    files = known | found
    if files == known:
        return
    files = dict(list(files.items())[-MOST:])
    with contextlib.suppress(OSError):  # the next start hashes again
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_whole(memory, json.dumps({"files": files, "seal": _seal(files)}))


def _seal(files: object) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
