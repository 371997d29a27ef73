"""Compiles the C++ sources in `matchai/native/cpp/` on the machine that they run on, once, and keeps the library."""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from matchai.system import write_whole

FLAGS = ["-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC"]
SOURCES = Path(__file__).parent / "cpp"
PATIENCE = 120  # seconds; the compiler takes seven here


def load_library() -> tuple[ctypes.CDLL | None, str]:
    """The library, compiled if this machine has not yet done so, and how it was; or None and the reason."""
    if not sys.platform.startswith("linux"):
        return None, "the kernels are for Linux alone"
    wanted = os.environ.get("CXX", "")
    try:
        compiler = shlex.split(wanted) or ["g++"]
    except ValueError as error:
        return None, f"the variable CXX, {wanted!r}, is no command ({error})"
    if shutil.which(compiler[0]) is None:
        return None, f"there is no C++ compiler {compiler[0] or repr(wanted)}"
    try:
        return _build(compiler), f"compiled by {shlex.join(compiler)}"
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"{compiler[0]} failed ({_cause(error)[:200]})"


def _cause(error: Exception) -> str:
    """A line that tells why; those of `subprocess` would begin with the whole command."""
    if isinstance(error, subprocess.TimeoutExpired):
        return f"it did not end within {PATIENCE:g} s"
    if not isinstance(error, subprocess.CalledProcessError):
        return str(error)
    lines = [line.strip() for line in error.stderr.decode(errors="replace").splitlines() if line.strip()]
    silent = f"it ended with status {error.returncode} and said nothing"
    return next((line for line in lines if "error" in line), lines[0] if lines else silent)


def _build(compiler: list[str]) -> ctypes.CDLL:
    """The library, from the user's cache or compiled again, and kept there if it can be."""
    kept = _folder() / f"kernels-{_fingerprint(compiler)}.so"
    with contextlib.suppress(OSError):
        return ctypes.CDLL(str(kept))
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / kept.name
        sources = [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
        _output_of([*compiler, *FLAGS, *sources, "-o", str(made)])
        with contextlib.suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_whole(kept, made.read_bytes())
            return ctypes.CDLL(str(kept))  # first: nothing can be loaded from a folder of temporary files without exec
        return ctypes.CDLL(str(made))


def _output_of(command: list[str]) -> bytes:
    return subprocess.run(command, capture_output=True, check=True, timeout=PATIENCE, stdin=subprocess.DEVNULL).stdout


def _folder() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "matchai"
    except RuntimeError:
        return Path(os.devnull)  # a user without a home, as in a container: below a file nothing can be kept


def _fingerprint(compiler: list[str]) -> str:
    """Of all that decides what the kernels are: the sources, the compiler and its options, the CPU."""
    # of the whole command: the first word may be one that calls the compiler, as ccache does
    version = _output_of([*compiler, "--version"])
    parts = [path.read_bytes() for path in sorted(SOURCES.iterdir())]
    parts += [shlex.join([*compiler, *FLAGS]).encode(), version, platform.machine().encode(), _cpu()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


@functools.cache
def has_tiles() -> bool:
    """Whether the CPU multiplies tiles of bfloat16, which gives several times as many products a second as floats.

    Intel's AMX does, which older versions of torch do not tell of; Arm's CPUs are taken to, as none was measured.
    """
    return platform.machine() != "x86_64" or b" amx_bf16" in _cpu()


def _cpu() -> bytes:
    """The CPU's model and abilities, as Linux lists them: a home folder may be shared by machines that differ."""
    lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    names = (b"model name", b"flags", b"Features", b"CPU part")
    return b"\n".join(sorted({line for line in lines if line.startswith(names)}))
