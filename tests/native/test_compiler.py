"""How the compiled kernels come to be: compiled once, kept, compiled anew where they must be, or done without."""

import contextlib
import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from matchai.native import compiler, library

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernels are for Linux alone"),
    pytest.mark.timeout(100),
]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler g++")

build = library.load.__wrapped__  # as the first call of a process, whatever was called before

SCRIPT = """
import pathlib, sys
from matchai.native import compiler, library
compiler.SOURCES = pathlib.Path(sys.argv[1])
found, how = library.load()
print(found is not None, how)
"""


@pytest.fixture(autouse=True)
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources of all functions, which do nothing and are compiled in no time; and an empty cache, `tmp_path`/cache."""
    folder = tmp_path / "sources"
    folder.mkdir()
    functions = "".join(f"void {name}() {{}}\n" for name in library._SIGNATURES)
    (folder / "all.cpp").write_text(f'extern "C" {{\n{functions}}}\n')
    monkeypatch.setattr(compiler, "SOURCES", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return folder


@pytest.fixture
def gxx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that is g++ and writes down what it compiles, see `num_compiled`."""
    return become(tmp_path, monkeypatch, 'exec g++ "$@"')


def become(folder: Path, monkeypatch: pytest.MonkeyPatch, work: str, version: str = "echo 1.0") -> Path:
    """Makes a compiler of two shell commands, and the environment's choice."""
    path = folder / "compiler"
    log = folder / "compiled"
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then {version}; exit; fi\necho >> "{log}"\n{work}\n')
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    return path


def num_compiled(folder: Path) -> int:
    log = folder / "compiled"
    return len(log.read_text().splitlines()) if log.exists() else 0


def kept(folder: Path) -> list[Path]:
    """All files of a cache."""
    return sorted(path for path in (folder / "cache").rglob("*") if path.is_file())


def test_without_a_compiler_there_are_no_kernels_and_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build() == (None, "there is no C++ compiler no-such-compiler")


@pytest.mark.parametrize(
    ("work", "said"),
    [
        ("echo 'In file a:' >&2; echo 'error: no room' >&2; echo more >&2; exit 1", r"\(error: no room\)"),
        ("exit 3", "status 3"),
        ("echo >&2; exit 3", "status 3"),
        ("printf 'error: \\344\\n' >&2; exit 1", "error: \N{REPLACEMENT CHARACTER}"),
        ("exit 0", "cannot open shared object file"),
        ("kill -9 $$", "status -9"),
    ],
    ids=["with a message", "silently", "with an empty line", "with no UTF-8", "to write a file", "killed"],
)
def test_a_compiler_that_fails_is_done_without_and_what_it_said_is_told(
    work: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    become(tmp_path, monkeypatch, work)
    found, how = build()
    assert found is None
    assert how.startswith(f"{tmp_path / 'compiler'} failed (")
    assert re.search(said, how)
    assert "\n" not in how
    assert not kept(tmp_path)


@pytest.mark.parametrize(
    ("work", "version"), [("exec sleep 60", "echo 1.0"), ("exit 1", "exec sleep 60")], ids=["compiling", "its version"]
)
def test_a_compiler_that_hangs_is_done_without(
    work: str, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    become(tmp_path, monkeypatch, work, version)
    monkeypatch.setattr(compiler, "PATIENCE", 0.3)
    found, how = build()
    assert found is None
    assert "did not end within 0.3 s" in how


def test_a_compiler_that_cannot_tell_its_version_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    become(tmp_path, monkeypatch, 'exec g++ "$@"', version="echo 'no licence' >&2; exit 1")
    assert build() == (None, f"{tmp_path / 'compiler'} failed (no licence)")


@needs_compiler
def test_kernels_are_compiled_once_and_kept_in_the_cache_that_the_environment_names(tmp_path: Path, gxx: Path) -> None:
    for _ in range(3):
        assert build()[0] is not None
    assert num_compiled(tmp_path) == 1
    (library,) = kept(tmp_path)
    assert library.parent == tmp_path / "cache" / "matchai"


@needs_compiler
def test_without_the_environment_s_cache_they_are_kept_below_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert build()[0] is not None
    assert len(list((tmp_path / "home" / ".cache" / "matchai").glob("*.so"))) == 1


@needs_compiler
def test_a_process_asks_for_kernels_once(tmp_path: Path, gxx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", functools.cache(build))
    first = library.load()
    shutil.rmtree(tmp_path / "cache")
    assert library.load() is first
    assert num_compiled(tmp_path) == 1


@needs_compiler
def test_a_cache_that_cannot_be_written_costs_a_compilation_alone(tmp_path: Path, gxx: Path) -> None:
    (tmp_path / "cache").touch()
    for _ in range(2):
        assert build()[0] is not None
    assert num_compiled(tmp_path) == 2


@needs_compiler
def test_a_user_without_a_home_has_kernels_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_error() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", raise_error)
    assert build()[0] is not None


@needs_compiler
@pytest.mark.parametrize("content", [b"", b"no library", b"\x7fELF\x02\x01\x01" + bytes(4000)])
def test_a_damaged_library_is_compiled_anew(content: bytes, tmp_path: Path, gxx: Path) -> None:
    # damaged before this process first loads it: a loaded library is not read again
    library = compiler._folder() / f"kernels-{compiler._fingerprint([str(gxx)])}.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(content)
    assert build()[0] is not None
    assert num_compiled(tmp_path) == 1
    assert library.read_bytes() != content
    build()
    assert num_compiled(tmp_path) == 1


@needs_compiler
@pytest.mark.parametrize("changed", ["version", "sources", "options", "CPU"])
def test_what_decides_over_the_kernels_gives_them_another_name(
    changed: str, sources: Path, gxx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build()
    if changed == "version":
        become(tmp_path, monkeypatch, 'exec g++ "$@"', version="echo 2.0")
    elif changed == "sources":
        (sources / "vectors.h").write_text("// another\n")
    elif changed == "options":
        monkeypatch.setattr(compiler, "FLAGS", [*compiler.FLAGS, "-g"])
    else:
        monkeypatch.setattr(compiler, "_cpu", lambda: b"another")
    assert build()[0] is not None
    assert num_compiled(tmp_path) == len(kept(tmp_path)) == 2


@needs_compiler
def test_a_compiler_called_by_another_program_is_told_by_its_own_version(
    gxx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", f"env '{gxx}'")
    assert build()[1] == f"compiled by env {gxx}"
    become(tmp_path, monkeypatch, 'exec g++ "$@"', version="echo 2.0")
    monkeypatch.setenv("CXX", f"env '{gxx}'")
    assert build()[0] is not None
    assert num_compiled(tmp_path) == 2


@needs_compiler
def test_two_processes_that_compile_at_one_time_both_have_kernels(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # each waits until the other compiles, or 20 seconds
    both = f'[ $(wc -l < "{tmp_path / "compiled"}") -ge 2 ] && break'
    become(tmp_path, monkeypatch, f'for i in $(seq 200); do {both}; sleep 0.1; done\nexec g++ "$@"')
    command = [sys.executable, "-c", SCRIPT, str(sources)]
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ)))
            for _ in range(2)
        ]
        said = [process.communicate(timeout=80)[0] for process in started]
    assert said == [f"True compiled by {tmp_path / 'compiler'}\n"] * 2
    assert num_compiled(tmp_path) == 2
    assert len(kept(tmp_path)) == 1
    assert build()[0] is not None
    assert num_compiled(tmp_path) == 2


@needs_compiler
def test_a_library_without_a_kernel_is_done_without(sources: Path) -> None:
    whole = (sources / "all.cpp").read_text()
    (sources / "all.cpp").write_text(whole.replace("void join_maps() {}\n", ""))
    found, how = build()
    assert found is None
    assert re.match(r"the compiled library lacks a kernel \(.*join_maps", how)


@pytest.mark.parametrize(
    ("flags", "machine", "has_tiles"),
    [
        (b"flags\t\t: fpu avx512_bf16 amx_bf16 amx_tile", "x86_64", True),
        (b"flags\t\t: fpu avx512_bf16", "x86_64", False),
        (b"Features\t: fp asimd bf16", "aarch64", True),
    ],
)
def test_which_cpus_multiply_tiles_of_bf16(
    flags: bytes, machine: str, has_tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "_cpu", lambda: flags)
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert compiler.has_tiles.__wrapped__() is has_tiles


@needs_compiler
def test_other_systems_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert build() == (None, "the kernels are for Linux alone")


@pytest.mark.parametrize("wanted", ["g++ 'oops", 'g++ "'])
def test_a_compiler_s_name_that_is_no_command_is_a_reason_and_no_error(
    wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", wanted)
    found, reason = library.load.__wrapped__()
    assert found is None
    assert reason == f"the variable CXX, {wanted!r}, is no command (No closing quotation)"


def test_a_compiler_that_fails_without_a_word_is_a_reason_and_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gxx = tmp_path / "silent"
    gxx.write_text('#!/bin/sh\ncase "$*" in *--version*) echo 1;; *) echo " " >&2; exit 3;; esac\n')
    gxx.chmod(0o755)
    monkeypatch.setenv("CXX", str(gxx))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert library.load.__wrapped__() == (None, f"{gxx} failed (it ended with status 3 and said nothing)")
