"""What happens before the first step."""

import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator

from matchai.data import prepared
from matchai.native import library
from matchai.runs.setup import announce_run, make_record, read
from matchai.settings.config import TrainConfig
from matchai.system.console import Display


def test_starts_at_one_time_prepare_the_slices_once(
    phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig().updated(data=phantom, image_size=32)
    make = prepared._make
    made: list[None] = []

    def make_counted(*arguments: Any) -> None:
        made.append(None)
        make(*arguments)

    monkeypatch.setattr(prepared, "_make", make_counted)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: read(config, tmp_path / "cache", Display(False)), range(3)))
    assert len(made) == 1
    assert [len(one.slices) for one in found] == [32, 32, 32]


def test_what_the_first_step_does_not_need_is_not_imported_before_it() -> None:
    script = "import sys, matchai.runs.trainer; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=True)
    loaded = set(done.stdout.split())
    assert "torch" in loaded
    assert not loaded & {"matplotlib", "jinja2", "optuna", "sqlalchemy", "sklearn", "tensorboard", "monai", "pandas"}


def machine(device: str) -> Accelerator:
    """What is asked of an accelerator."""
    return cast(Accelerator, SimpleNamespace(device=torch.device(device), num_processes=1))


@pytest.mark.parametrize(
    ("device", "has_kernels", "is_told"), [("cpu", False, True), ("cpu", True, False), ("cuda", False, False)]
)
def test_that_a_cpu_has_no_kernels_is_told_in_one_sentence(
    device: str,
    has_kernels: bool,
    is_told: bool,
    phantom: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = TrainConfig().updated(data=phantom, image_size=32)
    monkeypatch.setattr(library, "load", lambda: (object() if has_kernels else None, "there is no C++ compiler c"))
    said = io.StringIO()
    announce_run(Display(True, said), machine(device), config, read(config, cache, Display(False)), "no")
    words = " ".join(said.getvalue().split())
    assert words.count("without matchai's own kernels for CPUs, as there is no C++ compiler c: ") == is_told
    assert ("apt install g++" in words) == is_told


@pytest.mark.parametrize(("device", "recorded"), [("cpu", "compiled by c"), ("cuda", "torch's")])
def test_the_record_of_a_run_holds_how_its_kernels_were_made(
    device: str, recorded: str, phantom: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig().updated(data=phantom, image_size=32)
    monkeypatch.setattr(library, "load", lambda: (object(), "compiled by c"))
    assert make_record(machine(device), read(config, cache, Display(False)), "no")["kernels"] == recorded
