"""Devices, disks and threads, as a training would use them."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from matchai.native import library
from matchai.preflight import hardware
from matchai.preflight.hardware import check_devices, check_disk, check_kernels, check_shared_memory, check_threads

NAMES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MALLOC_ARENA_MAX")


def have_free(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))


@pytest.mark.parametrize(("free", "status"), [(1e11, "ok"), (4e9, "warning"), (2e9, "problem")])
def test_a_disk_must_have_room_for_what_will_be_written(
    free: float, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have_free(monkeypatch, free)
    found = check_disk(tmp_path / "not" / "yet", "--cache", need=3e9)
    assert found.status == status
    assert not (tmp_path / "not").exists()
    assert ("--cache" in found.remedy) == (status != "ok")


def test_a_folder_that_would_lie_in_a_file_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert check_disk(tmp_path / "file" / "run", "--output").status == "problem"


@pytest.mark.parametrize(("workers", "free", "status"), [(0, 0, "ok"), (8, 64e6, "problem"), (8, 1e9, "ok")])
def test_workers_need_shared_memory(workers: int, free: float, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    have_free(monkeypatch, free)
    found = check_shared_memory(workers, 6, 1, 384)
    assert found.status == status
    assert ("--num-workers 0" in found.remedy) == (status == "problem")


@pytest.mark.parametrize(
    ("device", "settings", "status"),
    [
        ("cpu", {}, "ok"),
        ("cpu", {"OMP_NUM_THREADS": "4"}, "ok"),
        ("cpu", {"OMP_NUM_THREADS": "1"}, "warning"),
        ("cuda", {"OMP_NUM_THREADS": "1"}, "ok"),
        ("cuda", {"OMP_NUM_THREADS": "64"}, "warning"),
        ("cpu", {"OMP_WAIT_POLICY": "PASSIVE"}, "warning"),
        ("cpu", {"MALLOC_ARENA_MAX": "2"}, "ok"),
    ],
)
def test_thread_settings_that_slow_training_down_are_told(
    device: str, settings: dict[str, str], status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    found = check_threads(device, 4)
    assert found.status == status
    assert all(f"{name}={value}" in found.text for name, value in settings.items())


def test_kernels_that_are_there_are_told_with_their_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", lambda: (object(), "compiled by c"))
    found = check_kernels()
    assert (found.status, found.text) == ("ok", "Kernels for the CPU: compiled by c")


def test_kernels_that_cannot_be_had_are_a_warning_with_the_reason_and_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(library, "load", lambda: (None, "there is no C++ compiler c"))
    found = check_kernels()
    assert found.status == "warning"
    assert "none, as there is no C++ compiler c" in found.text
    assert "apt install g++" in found.remedy


@pytest.mark.parametrize(("quota", "status"), [("150000 100000", "warning"), ("max 100000", "ok")])
def test_cores_that_the_container_does_not_grant_are_told(
    quota: str, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "_control", lambda name: [quota] if name == "cpu.max" else [])
    monkeypatch.setattr(hardware, "num_cores", lambda: 8)
    (cpu,) = [one for one in check_devices(torch.device("cpu")) if one.text.startswith("CPU")]
    assert cpu.status == status
    assert ("OMP_NUM_THREADS=1" in cpu.remedy) == (status == "warning")


def test_memory_that_the_container_does_not_grant_counts_as_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"memory.max": ["3000000000\n"], "memory.current": ["1000000000\n"]}
    monkeypatch.setattr(hardware, "_control", lambda name: limits.get(name, []))
    (memory,) = [one for one in check_devices(torch.device("cpu")) if one.text.startswith("Memory")]
    assert (memory.status, memory.text) == ("warning", "Memory: 2.0 GB free")


@pytest.mark.parametrize(("free", "status"), [(70e9, "ok"), (8e9, "warning")])
def test_a_gpu_that_another_process_fills_is_a_warning(
    free: float, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="H", major=9, minor=0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 80e9))
    gpu = check_devices(torch.device("cuda"))[0]
    assert gpu.status == status
    assert gpu.text == f"GPU 0: H, {free / 1e9:.1f} of 80.0 GB free, native bf16"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_told_with_its_memory() -> None:
    assert any(one.text.startswith("GPU 0: ") and "GB free" in one.text for one in check_devices(torch.device("cuda")))
