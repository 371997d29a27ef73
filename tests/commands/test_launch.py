"""The scripts of launch/, run as a user runs them: on two hosts that are network namespaces, and in a job of Slurm."""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from tests.conftest import small

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh"))

linux_only = pytest.mark.skipif(not shutil.which("ip"), reason="the scripts for several hosts need ip")


class Host(NamedTuple):
    """A network namespace, and its one address beside the loopback's."""

    namespace: str
    address: str


def environment(**variables: str) -> dict[str, str]:
    """A user's: torchrun on the path, CPUs only, and nothing that names an interface."""
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_SOCKET_IFNAME")}
    kept.pop("LOCAL_ADDR", None)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "PATH": path, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", **variables}


def start(command: list[str], log: Path, **variables: str) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(command, env=environment(**variables), stdout=file, stderr=subprocess.STDOUT)


def epochs_in(output: Path) -> list[int]:
    file = output / "history.jsonl"
    return [json.loads(line)["epoch"] for line in file.read_text().splitlines()] if file.exists() else []


def wait_for_epoch(output: Path, process: subprocess.Popen[bytes]) -> None:
    """Returns once the run has its first epoch, or has ended."""
    until = time.monotonic() + 60
    while not epochs_in(output) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)


def kill_all_on(host: Host) -> None:
    listed = subprocess.run(["ip", "netns", "pids", host.namespace], capture_output=True, check=False)
    for pid in listed.stdout.split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach one another and nothing else."""
    name = f"matchai-{secrets.token_hex(4)}"  # two test runs may be at it at once
    pair = Host(f"{name}-0", "10.207.0.1"), Host(f"{name}-1", "10.207.0.2")

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=30)

    try:
        try:
            for host in pair:
                ip("netns", "add", host.namespace)
            peer = ("peer", "name", "link1", "netns", pair[1].namespace)
            ip("-n", pair[0].namespace, "link", "add", "link0", "type", "veth", *peer)
            for host, link in zip(pair, ("link0", "link1"), strict=True):
                ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", link)
                ip("-n", host.namespace, "link", "set", "lo", "up")
                ip("-n", host.namespace, "link", "set", link, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"joined network namespaces cannot be made here: {error}")
        yield pair
    finally:
        for host in pair:
            with suppress(OSError, subprocess.SubprocessError):
                kill_all_on(host)  # a namespace lives on as long as a process in it
                ip("netns", "delete", host.namespace)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_parses_and_says_what_it_is_for(script: str) -> None:
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)
    head = re.match(r"#!/usr/bin/env bash\n((?:#.*\n)+)", (LAUNCH / script).read_text(encoding="utf-8"))
    assert head
    assert re.findall(r"^# (For|On|How long|Usage)\b", head[1], re.MULTILINE) == ["For", "On", "How long", "Usage"]
    assert os.access(LAUNCH / script, os.X_OK)


def start_on(host: Host, arguments: list[str], log: Path, **variables: str) -> subprocess.Popen[bytes]:
    """Starts the same script with the same settings, as on every host."""
    settings = {"NUM_HOSTS": "2", "PROCESSES_PER_HOST": "1", "RENDEZVOUS": "10.207.0.1:29500", **variables}
    command = ["ip", "netns", "exec", host.namespace, str(LAUNCH / "multi_node.sh"), *arguments]
    return start(command, log, **settings)


@linux_only
@pytest.mark.timeout(150)
def test_two_hosts_train_one_run(hosts: tuple[Host, Host], phantom: Path, cache: Path, tmp_path: Path) -> None:
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    arguments = small(phantom, cache, tmp_path / "run")
    processes = [start_on(host, arguments, log) for host, log in zip(hosts, logs, strict=True)]
    try:
        statuses = [process.wait(timeout=120) for process in processes]
    finally:
        said = "".join(log.read_text() for log in logs)
        print(said)
    assert statuses == [0, 0]
    assert epochs_in(tmp_path / "run") == [1, 2]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["recorded"]["num_processes"] == 2
    assert said.count("epoch 1/2") == 1
    assert "10.207.0.1 on link0" in said
    assert "10.207.0.2 on link1" in said


@linux_only
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_training_goes_on_by_itself_when_a_lost_host_comes_back(
    hosts: tuple[Host, Host], phantom: Path, cache: Path, tmp_path: Path
) -> None:
    arguments = [*small(phantom, cache, tmp_path / "run"), "--epochs", "8"]
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    stays, lost = (start_on(host, arguments, log, MAX_RESTARTS="3") for host, log in zip(hosts, logs, strict=True))
    wait_for_epoch(tmp_path / "run", stays)
    kill_all_on(hosts[1])
    lost.wait(timeout=30)
    back = start_on(hosts[1], arguments, tmp_path / "back.log", MAX_RESTARTS="3")
    try:
        assert back.wait(timeout=180) == 0
        assert stays.wait(timeout=60) == 0
    finally:
        print(logs[0].read_text(), (tmp_path / "back.log").read_text())
    assert "Resuming" in logs[0].read_text() + (tmp_path / "back.log").read_text()
    assert epochs_in(tmp_path / "run") == list(range(1, 9))


@linux_only
@pytest.mark.timeout(200)
def test_a_slurm_job_that_is_given_notice_saves_and_is_queued_again_and_goes_on(
    phantom: Path, cache: Path, tmp_path: Path
) -> None:
    # stand-ins for a cluster of one node: srun hands signals on to its task, which a task in its place gets by itself
    stand_ins = {
        "srun": 'exec "$@"',
        "scontrol": f'case $1 in show) echo localhost ;; requeue) echo "$2" >>{tmp_path}/requeued ;; esac',
    }
    for name, does in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_GPUS_PER_NODE": "cpu:2",
    }
    job |= {"SLURM_SUBMIT_DIR": str(LAUNCH.parent), "PATH": f"{tmp_path}{os.pathsep}{environment()['PATH']}"}
    shutil.copy(LAUNCH / "slurm.sh", tmp_path / "slurm_script")  # Slurm runs a copy
    # no state but that of an epoch's end and that of the notice
    command = [
        "bash",
        str(tmp_path / "slurm_script"),
        *small(phantom, cache, tmp_path / "run"),
        "--save-every",
        "60min",
    ]
    command += ["--epochs", "8"]

    log = tmp_path / "log"
    process = start(command, log, **job)
    wait_for_epoch(tmp_path / "run", process)
    process.send_signal(signal.SIGUSR1)
    process.wait(timeout=60)
    said = log.read_text()
    print(said)
    assert "Stopped by SIGUSR1" in said
    assert (tmp_path / "requeued").read_text() == "7\n"
    assert 0 < len(epochs_in(tmp_path / "run")) < 8

    assert start(command, log, **job).wait(timeout=120) == 0
    assert "Resuming" in log.read_text()
    assert epochs_in(tmp_path / "run") == list(range(1, 9))
    assert (tmp_path / "requeued").read_text() == "7\n"


@linux_only
def test_a_worker_of_a_slurm_array_that_is_given_notice_hears_sigterm_and_its_task_is_queued_again(
    tmp_path: Path,
) -> None:
    stand_ins = {
        "scontrol": f'echo "$*" >>{tmp_path}/requeued',
        "python": f'echo "$*" >{tmp_path}/started\ntrap "echo saved; exit 0" TERM\nwhile :; do sleep 0.05; done',
    }
    for name, does in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    job |= {"SLURM_SUBMIT_DIR": str(LAUNCH.parent), "PATH": f"{tmp_path}{os.pathsep}{environment()['PATH']}"}
    process = start(["bash", str(LAUNCH / "slurm.sh"), "tune", "--trials", "2"], tmp_path / "log", **job)
    until = time.monotonic() + 30
    while not (tmp_path / "started").exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.3)  # its trap is set in the line after
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=30) == 0
    assert (tmp_path / "started").read_text() == "-m matchai.tune --trials 2\n"
    assert (tmp_path / "log").read_text() == "saved\n"
    assert (tmp_path / "requeued").read_text() == "requeue 7_3\n"
