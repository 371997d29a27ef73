"""What happens before the first step."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from matchai import slices
from matchai.config import TrainConfig
from matchai.console import Display
from matchai.opening import read


def test_starts_at_one_time_prepare_the_slices_once(
    phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig().updated(data=phantom, image_size=32)
    make = slices._make
    made: list[None] = []

    def make_counted(*arguments: Any) -> None:
        made.append(None)
        make(*arguments)

    monkeypatch.setattr(slices, "_make", make_counted)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: read(config, tmp_path / "cache", Display(False)), range(3)))
    assert len(made) == 1
    assert [len(one.slices) for one in found] == [32, 32, 32]


def test_what_the_first_step_does_not_need_is_not_imported_before_it() -> None:
    script = "import sys, matchai.runner; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=True)
    loaded = set(done.stdout.split())
    assert "torch" in loaded
    assert not loaded & {"matplotlib", "jinja2", "optuna", "sqlalchemy", "sklearn", "tensorboard", "monai", "pandas"}
