"""The resumable state: whole or absent, verified, never a pickle; and a folder that one process holds."""

import json
import os
import resource
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch

from matchai.system.errors import InputError
from matchai.training.checkpoint import (
    BEST,
    LAST,
    PARENT,
    State,
    load_state,
    load_weights,
    lock_folder,
    pack_weights,
    save_state,
)

HOLDER = """
import sys, time
from pathlib import Path
from matchai.training.checkpoint import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def state(number: int) -> State:
    tensors = {"model.weight": torch.full((3, 2), float(number)), "step": torch.tensor(number)}
    best = pack_weights({"weight": torch.full((2,), float(number))}, {"epoch": number})
    return State(tensors, {"epoch": number, "history": [0.5, None, "ä\u2028\n"]}, best)


def numbers(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / LAST).iterdir())


def found(folder: Path) -> int:
    loaded = load_state(folder)
    assert loaded is not None
    return int(loaded.record["epoch"])


def alter(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 0b0100_0000
    path.write_bytes(content)


@pytest.mark.parametrize("with_best", [True, False])
def test_what_was_saved_is_loaded(tmp_path: Path, with_best: bool) -> None:
    saved = State(state(1).tensors, state(1).record, state(1).best if with_best else None)
    save_state(tmp_path, saved)
    loaded = load_state(tmp_path)
    assert loaded is not None
    assert loaded.tensors.keys() == saved.tensors.keys()
    for name, tensor in saved.tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name], tensor)
    assert loaded.record == saved.record
    assert loaded.best == saved.best


def test_no_state_is_none(tmp_path: Path) -> None:
    assert load_state(tmp_path) is None
    (tmp_path / LAST).mkdir()
    assert load_state(tmp_path) is None


def test_the_newest_is_loaded_and_two_are_kept(tmp_path: Path) -> None:
    for number in range(12):
        save_state(tmp_path, state(number))
    assert found(tmp_path) == 11
    assert numbers(tmp_path) == ["state-000011", "state-000012"]


@pytest.mark.parametrize("place", [0, 0.1, 0.5, 0.9, 1])
@pytest.mark.parametrize("name", ["state.safetensors", "state.json", BEST])
def test_an_altered_byte_in_the_newest_gives_the_one_before(tmp_path: Path, name: str, place: float) -> None:
    for number in (1, 2):
        save_state(tmp_path, state(number))
    alter(tmp_path / LAST / "state-000002" / name, place)
    with pytest.warns(UserWarning, match="state-000002 is damaged"):
        assert found(tmp_path) == 1


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", BEST])
@pytest.mark.parametrize("is_lost", [False, True])
def test_a_lost_or_cut_file_in_the_newest_gives_the_one_before(tmp_path: Path, name: str, is_lost: bool) -> None:
    for number in (1, 2, 3):
        save_state(tmp_path, state(number))
    path = tmp_path / LAST / "state-000003" / name
    content = path.read_bytes()
    path.unlink()
    if not is_lost:
        path.write_bytes(content[:-5])
    with pytest.warns(UserWarning, match="damaged"):
        assert found(tmp_path) == 2


def test_a_damaged_state_does_not_count_as_one_of_the_two_kept(tmp_path: Path) -> None:
    for number in (1, 2):
        save_state(tmp_path, state(number))
    alter(tmp_path / LAST / "state-000002" / "state.safetensors", 0.9)
    with pytest.warns(UserWarning, match="damaged"):
        load_state(tmp_path)
    save_state(tmp_path, state(3))
    newest = sorted(path for path in (tmp_path / LAST).iterdir() if path.name.startswith("state-"))[-1]
    alter(newest / "state.safetensors", 0.9)
    with pytest.warns(UserWarning, match="damaged"):
        assert found(tmp_path) == 1


def test_only_damaged_states_are_refused(tmp_path: Path) -> None:
    for number in (1, 2):
        save_state(tmp_path, state(number))
        alter(tmp_path / LAST / f"state-{number:06d}" / "state.safetensors", 0.9)
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(InputError, match="--restart"):
        load_state(tmp_path)


def test_what_a_killed_save_left_is_ignored_and_does_not_hinder_the_next(tmp_path: Path) -> None:
    save_state(tmp_path, state(1))
    torn = tmp_path / LAST / ".state-000002.tmp"
    torn.mkdir()
    (torn / "state.safetensors").write_bytes(b"half")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found(tmp_path) == 1
        save_state(tmp_path, state(2))
        assert found(tmp_path) == 2
    assert not torn.exists()


def test_a_state_that_cannot_be_written_is_an_error_that_says_why_and_leaves_the_one_before(tmp_path: Path) -> None:
    save_state(tmp_path, state(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # as a full disk would, it ends the writing midway
    try:
        with pytest.raises(OSError, match="too large"):
            save_state(tmp_path, State({"weight": torch.zeros(1000)}, {"epoch": 2}, None))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert found(tmp_path) == 1


def test_all_files_of_a_state_can_be_read_by_the_same_people(tmp_path: Path) -> None:
    save_state(tmp_path, state(1))
    assert len({path.stat().st_mode for path in (tmp_path / LAST / "state-000001").iterdir()}) == 1


def test_the_best_weights_are_published(tmp_path: Path) -> None:
    for number in (1, 2):
        save_state(tmp_path, state(number))
        assert (tmp_path / BEST).read_bytes() == state(number).best


def test_a_state_without_best_weights_leaves_those_published(tmp_path: Path) -> None:
    save_state(tmp_path, state(1))
    save_state(tmp_path, State(state(2).tensors, {"epoch": 2}, None))
    assert (tmp_path / BEST).read_bytes() == state(1).best


def test_no_file_of_a_state_is_a_pickle(tmp_path: Path) -> None:
    save_state(tmp_path, state(1))
    for path in (tmp_path / LAST / "state-000001").iterdir():
        if path.suffix == ".json":
            json.loads(path.read_text().splitlines()[0])
        else:
            safetensors.torch.load_file(path)


@pytest.mark.parametrize("as_folder", [True, False])
def test_load_weights_gives_the_weights_and_what_is_said_of_them(tmp_path: Path, as_folder: bool) -> None:
    about = {"mean": 0.25, "class_names": ["a", "ü"], "nested": {"x": None}}
    weights = {"w": torch.arange(6.0).view(2, 3).T, "n": torch.tensor(3)}
    (tmp_path / BEST).write_bytes(pack_weights(weights, about))
    loaded, said = load_weights(tmp_path if as_folder else tmp_path / BEST)
    assert said == about
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_load_weights_refuses_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_weights(tmp_path)


@pytest.mark.parametrize("kind", ["foreign", "cut", "text", "empty"])
def test_load_weights_refuses_what_no_run_kept(tmp_path: Path, kind: str) -> None:
    content = {
        "foreign": safetensors.torch.save({"w": torch.ones(1)}),
        "cut": pack_weights({"w": torch.ones(100)}, {})[:-9],
        "text": b"weights",
        "empty": b"",
    }[kind]
    (tmp_path / BEST).write_bytes(content)
    with pytest.raises(InputError, match="no file of weights"):
        load_weights(tmp_path)


def hold(folder: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", HOLDER, str(folder)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_folder_is_held_by_one_process_and_free_when_it_is_killed(tmp_path: Path) -> None:
    holder = hold(tmp_path)
    try:
        with pytest.raises(InputError, match=f"in use by process {holder.pid} on"), lock_folder(tmp_path):
            pass
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()
    with lock_folder(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / "run.lock").read_text()


def test_a_folder_can_be_held_again_after_it_was_let_go(tmp_path: Path) -> None:
    for _ in range(2):
        with lock_folder(tmp_path):
            pass


@pytest.mark.parametrize("is_launched", [False, True])
def test_only_a_launchers_end_makes_a_run_one_that_is_about_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_launched: bool
) -> None:
    """A shell that has gone says nothing of the runs that it started."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if is_launched:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with lock_folder(tmp_path):
        assert (PARENT in (tmp_path / "run.lock").read_text()) == is_launched
