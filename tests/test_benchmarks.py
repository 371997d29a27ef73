"""The benchmarks run and report; their figures are nobody's test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def printed_by(benchmark: str, *flags: str) -> str:
    """What a benchmark prints that ends well."""
    done = subprocess.run(
        [sys.executable, f"benchmarks/{benchmark}.py", *flags],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_sampler_benchmark_tabulates_and_stores_every_measurement(tmp_path: Path) -> None:
    output = tmp_path / "results" / "sampler.json"
    printed = printed_by("sampler", "--sizes", "1000", "--repeats", "1", "--output", str(output))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if "| 1,000 |" in line]
    assert {"matchai", "torch", "accelerate"} <= {row[1] for row in rows}
    measurements = json.loads(output.read_text(encoding="utf-8"))["measurements"]
    assert len(measurements) == 2 * len(rows)
    for one in measurements:
        assert "error" not in one
        assert one["first_s"] > 0
        assert one["memory_mb"] >= 0
        assert one["kind"] == "resume" or one["further"] == 14


def test_the_benchmark_of_several_processes_tabulates_and_stores_exactness_and_cost(tmp_path: Path) -> None:
    output = tmp_path / "results" / "distributed.json"
    flags = [
        "--encoders",
        "tu-test_efficientnet",
        "--sizes",
        "64",
        "--timed",
        "64",
        "96",
        "--steps",
        "1",
        "--rounds",
        "1",
    ]
    printed = printed_by("distributed", *flags, "--output", str(output))
    rows = [line for line in printed.splitlines() if line.startswith("| ") and "W = " in line]
    found = json.loads(output.read_text(encoding="utf-8"))
    several = [one for one in found["exactness"] if one["num_processes"] > 1]
    assert {one["label"] for one in several + found["cost"]} <= {row.split(" | ")[0].removeprefix("| ") for row in rows}
    double = {one["num_processes"]: max(one["errors"]) for one in several if one["precision"] == "float64"}
    assert set(double) == {2, 3}
    assert max(double.values()) < 1e-10
    assert {one["num_processes"]: max(one["errors"]) for one in several if one["deterministic"]} == {2: 0, 3: 0}
    assert [one["size"] for one in found["cost"] if one["num_processes"] == 1] == [64, 64, 96, 96]
    assert len(found["cost"]) == 12
    assert all("tu-test_efficientnet, 96 px" in line for line in printed.splitlines() if "threads a process" in line)
    assert all(min(one["seconds"]) > 0 for one in found["cost"])


def test_the_training_benchmark_tabulates_and_stores_every_loop(tmp_path: Path) -> None:
    output = tmp_path / "results" / "train.json"
    flags = ["--encoder", "tu-test_resnet", "--size", "64", "--rounds", "1", "--slices", "12", "--threads", "1"]
    printed = printed_by("train", *flags, "--contenders", "notebook", "matchai", "--output", str(output))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if "| 64 |" in line]
    assert {(row[1], row[2]) for row in rows} == {
        (what, loop) for what in ("training", "validation") for loop in ("notebook", "matchai")
    }
    found = json.loads(output.read_text(encoding="utf-8"))
    assert {"command", "date", "machine", "versions", "missing"} <= found.keys()
    assert {one["contender"] for one in found["measurements"]} == {"notebook", "matchai"}
    for one in found["measurements"]:
        assert "error" not in one
        assert min(one["train_s"], one["train_cpu_s"], one["val_s"], one["val_cpu_s"], one["memory_mb"]) > 0


def test_the_benchmark_of_gpus_times_its_ways_on_a_cpu_too(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    printed_by("gpu", "--device", "cpu", "--quick", "--speed", "--output", str(output))
    result = json.loads(output.read_text(encoding="utf-8"))
    assert {"matchai", "plain PyTorch, bf16"} <= result["speed"]["slices_a_second"].keys()


@pytest.mark.slow
def test_the_benchmark_of_gpus_compares_with_the_cpu(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    printed_by("gpu", "--device", "cpu", "--quick", "--correct", "--output", str(output))
    exact = json.loads(output.read_text(encoding="utf-8"))["correct"]["fp32"]
    assert exact["largest_difference_to_cpu_fp32"] == 0
    assert exact["is_repeated_bit_by_bit"]
    assert len(exact["losses"]) == 10
