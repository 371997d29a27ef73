"""Several processes: launched right or refused, one lost, all stopped, and the same run whatever happens."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from matchai.system import processes
from matchai.system.errors import InputError
from matchai.system.processes import check_launch
from tests.commands.test_train import history, wait_for_state, weights
from tests.conftest import small, train

EVERY_STEP = ("--save-every", "1")


@pytest.mark.parametrize(("world", "num_processes"), [(None, 1), ("", 1), ("1", 1), ("4", 4)])
def test_a_launch_that_joined_is_accepted(
    monkeypatch: pytest.MonkeyPatch, world: str | None, num_processes: int
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world is not None:
        monkeypatch.setenv("WORLD_SIZE", world)
    check_launch(num_processes)


def test_processes_that_each_believe_to_be_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes 2"):
        check_launch(1)


def test_the_command_that_is_told_is_that_of_the_table_where_it_was_started_by_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=SimpleNamespace(name="matchai.__main__")))
    monkeypatch.setattr(sys, "argv", ["matchai", "tune", "--trials", "5"])
    with pytest.raises(InputError, match=r"-m matchai\.tune`"):
        check_launch(1)


@pytest.mark.parametrize("flags", [["--cpu"], ["--multi_gpu", "--main_process_port", "0"]], ids=" ".join)
def test_a_launcher_that_silently_starts_single_processes_is_refused(
    flags: list[str], phantom: Path, cache: Path, tmp_path: Path
) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes", "2", *flags]
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    done = subprocess.run(
        [*launcher, "-m", "matchai.train", *small(phantom, cache, tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )
    assert done.returncode != 0
    assert "error: The launcher" in done.stderr
    assert "ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes" in done.stderr
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_group_that_cannot_be_formed_is_told_in_a_sentence(phantom: Path, cache: Path, tmp_path: Path) -> None:
    done = train(*small(phantom, cache, tmp_path / "run"), WORLD_SIZE="2", RANK="0", ACCELERATE_USE_CPU="1")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: The group of 2 processes could not be formed")


WRONG = {
    "ACCELERATE_USE_CPU": "maybe",
    "ACCELERATE_MIXED_PRECISION": "fp8",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_MEGATRON_LM": "true",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "perhaps",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "abc",
    "ACCELERATE_TORCH_DEVICE": "gpu7",
    "WORLD_SIZE": "two",
    "RANK": "1",
    "LOCAL_RANK": "x",
    "MASTER_PORT": "70000",
    "PMI_SIZE": "1.5",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_setting_of_the_launchers_is_one_problem_with_the_way_out(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, WRONG[name])
    with pytest.raises(InputError, match=f"{name} is {WRONG[name]}, but") as caught:
        check_launch()
    assert len(caught.value.problems) == 1


def test_settings_that_come_from_the_launcher_are_answered_with_the_command_that_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(processes, "is_set_by_launcher", lambda name: True)
    with pytest.raises(
        InputError, match=r"`accelerate launch --config_file accelerate_config\.yaml -m matchai\.train`"
    ):
        check_launch()


def test_what_accelerate_launch_exports_by_itself_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    exported = {"ACCELERATE_USE_CPU": "False", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
    exported |= {"ACCELERATE_DYNAMO_USE_FULLGRAPH": "False", "LOCAL_RANK": "0", "RANK": "0", "MASTER_PORT": "0"}
    for name, value in exported.items():
        monkeypatch.setenv(name, value)
    check_launch()


TRAIN_THEN_LAUNCH = """
from pathlib import Path
from accelerate import debug_launcher
from matchai.runs import run
from matchai.settings import TrainConfig

def train(folder):
    small = {"encoder": "tu-test_resnet", "encoder_weights": "none", "image_size": 32, "phantom_slices": 16}
    run(TrainConfig().updated(epochs=1, output=Path(folder), **small))

train("alone")
debug_launcher(train, ("together",), num_processes=2)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the launcher forks")
def test_a_notebooks_launcher_after_a_run_is_told_to_restart_the_kernel(tmp_path: Path) -> None:
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN_THEN_LAUNCH],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (tmp_path / "alone" / "best.safetensors").exists()
    assert "restart the kernel" in done.stderr
    assert not (tmp_path / "together").exists()


@contextmanager
def group(
    world: int, arguments: list[str], only_for_the_last: Sequence[str] = ()
) -> Iterator[list[subprocess.Popen[str]]]:
    """The processes of one run, without a launcher between; none outlives the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "matchai.train", *arguments, *(only_for_the_last if rank == world - 1 else ())],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()


def finish(world: int, arguments: list[str]) -> None:
    with group(world, arguments) as processes:
        said = [process.communicate(timeout=200) for process in processes]
        assert [process.returncode for process in processes] == [0] * world, said


@pytest.fixture(scope="module")
def finished(phantom: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of two processes."""
    output = tmp_path_factory.mktemp("two") / "run"
    finish(2, [*small(phantom, cache, output), *EVERY_STEP])
    return output


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "world", [pytest.param(2, marks=pytest.mark.slow), 3]
)  # from three on DDP reorders its buckets
def test_killed_processes_end_bit_for_bit_where_uninterrupted_ones_do(
    world: int, finished: Path, phantom: Path, cache: Path, tmp_path: Path
) -> None:
    if world == 2:
        reference = finished
    else:
        reference = tmp_path / "reference"
        finish(world, [*small(phantom, cache, reference), *EVERY_STEP])
    arguments = [*small(phantom, cache, tmp_path / "run"), *EVERY_STEP]
    for state, victims in ((2, [0]), (5, list(range(world)))):
        with group(world, arguments) as processes:
            wait_for_state(tmp_path / "run", state, processes[0])
            for rank in victims:
                processes[rank].kill()
            said = [process.communicate(timeout=60) for process in processes]
            survivors = [rank for rank in range(world) if rank not in victims]
            for rank in survivors:
                assert processes[rank].returncode == 1
                lines = [line for line in said[rank][1].splitlines() if line.startswith("error: ")]
                assert len(lines) == 1
                assert "lost another" in lines[0]
                assert "Traceback" not in said[rank][1]
    finish(world, arguments)
    assert history(tmp_path / "run") == history(reference)
    assert weights(tmp_path / "run") == weights(reference)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_kills_of_random_processes_at_random_moments_change_nothing(
    finished: Path, phantom: Path, cache: Path, tmp_path: Path
) -> None:
    generator = np.random.default_rng(1)
    # a kill before the group is formed leaves the other one waiting for it
    arguments = [*small(phantom, cache, tmp_path / "run"), *EVERY_STEP, "--collective-timeout", "20"]
    for _ in range(50):
        with group(2, arguments) as processes:
            time.sleep(generator.uniform(4, 14))
            processes[generator.integers(2)].kill()
            for process in processes:
                process.communicate(timeout=60)
    finish(2, arguments)
    assert history(tmp_path / "run") == history(finished)
    assert weights(tmp_path / "run") == weights(finished)


@pytest.mark.timeout(400)
def test_a_signal_to_one_process_stops_all_of_them_in_training_and_in_validation(
    finished: Path, phantom: Path, cache: Path, tmp_path: Path
) -> None:
    # 24 draws are 4 steps: after the fourth state of the first epoch comes its validation
    for number, state, rank in ((signal.SIGUSR1, 2, 1), (signal.SIGTERM, 4, 0)):
        run = tmp_path / number.name
        arguments = [*small(phantom, cache, run), *EVERY_STEP]
        with group(2, arguments) as processes:
            wait_for_state(run, state, processes[0])
            processes[rank].send_signal(number)
            began = time.monotonic()
            said = [process.communicate(timeout=60) for process in processes]
            assert time.monotonic() - began < 30  # ten seconds of work, on a machine that does other things too
            assert [process.returncode for process in processes] == [0, 0], said
            assert "resumes from there" in said[0][0]
        assert len(history(run)) < 2
        finish(2, arguments)
        assert history(run) == history(finished)
        assert weights(run)[0] == weights(finished)[0]


def test_processes_that_were_given_different_settings_are_refused(phantom: Path, cache: Path, tmp_path: Path) -> None:
    arguments = small(phantom, cache, tmp_path / "run")
    with group(2, arguments, ["--max-lr", "0.01"]) as processes:
        said = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert all("has max_lr 0.01, process 0 on" in text for text in said)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("stopped", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_does_not_answer_is_given_up_within_the_time_out(
    stopped: int, phantom: Path, cache: Path, tmp_path: Path
) -> None:
    arguments = [*small(phantom, cache, tmp_path / "run"), *EVERY_STEP, "--collective-timeout", "10"]
    with group(2, arguments) as processes:
        wait_for_state(tmp_path / "run", 2, processes[0])
        processes[stopped].send_signal(signal.SIGSTOP)
        _, said = processes[1 - stopped].communicate(timeout=60)
    assert processes[1 - stopped].returncode == 1
    assert "lost another" in said
    assert "Traceback" not in said


@pytest.mark.timeout(400)
def test_a_run_goes_on_with_another_number_of_processes(phantom: Path, cache: Path, tmp_path: Path) -> None:
    deterministic = [*EVERY_STEP, "--deterministic"]
    alone = train(*small(phantom, cache, tmp_path / "alone"), *deterministic)
    assert alone.returncode == 0, alone.stderr
    arguments = [*small(phantom, cache, tmp_path / "moved"), *deterministic]
    with group(2, arguments) as processes:
        wait_for_state(tmp_path / "moved", 3, processes[0])
    finish(3, arguments)
    # in this mode the same to the last bit, on two processes, then on three, as on one
    assert history(tmp_path / "moved") == history(tmp_path / "alone")
    assert weights(tmp_path / "moved") == weights(tmp_path / "alone")


def launched(output: Path) -> list[psutil.Process]:
    """The training processes of a run, by their rank."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if str(output) in line and "matchai.train" in line and "--nproc_per_node" not in line:
            found.append(process)
    return sorted(found, key=lambda process: int(process.environ().get("RANK", -1)))


@pytest.mark.timeout(400)
def test_under_torchrun_a_killed_process_is_started_again_and_the_run_ends_as_if_nothing_had_happened(
    finished: Path, phantom: Path, cache: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    flags = ["--nproc_per_node", "2", "--max-restarts", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command = [sys.executable, "-m", "torch.distributed.run", *flags, "-m", "matchai.train"]
    launcher = subprocess.Popen(
        [*command, *small(phantom, cache, output), *EVERY_STEP],
        env={**os.environ, "ACCELERATE_USE_CPU": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for_state(output, 3, launcher)
        launched(output)[1].kill()
        said = launcher.communicate(timeout=250)
    finally:
        launcher.kill()
    assert launcher.returncode == 0, said
    assert "Resuming" in said[0]
    assert history(output) == history(finished)
    assert weights(output)[0] == weights(finished)[0]


@pytest.mark.timeout(300)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process of its launcher's death")
def test_no_process_outlives_a_killed_launcher_and_the_next_run_waits_for_their_state(
    finished: Path, phantom: Path, cache: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    flags = ["--quiet", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "-m", "matchai.train"]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *flags, *small(phantom, cache, output), *EVERY_STEP],
        env={**os.environ, "ACCELERATE_USE_CPU": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for_state(output, 3, launcher)
    orphans = [process for process in launched(output) if process.pid != launcher.pid]
    launcher.kill()
    launcher.wait()
    finish(2, [*small(phantom, cache, output), *EVERY_STEP])
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in orphans)
    assert history(output) == history(finished)
