"""Small data sets in the Kaggle layout, and the command line run as a user runs it."""

import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matchai.phantom import write_phantom

# set before any test imports torch: spinning threads of several processes would starve each other
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 slices of 64 x 64 in 4 volumes."""
    folder = tmp_path_factory.mktemp("phantom")
    write_phantom(folder, 32, size=64)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of 16 slices of 64 x 64 that a test may spoil: plausible HU, all four classes in every slice."""
    folder = tmp_path / "data"
    folder.mkdir()
    generator = np.random.default_rng(0)
    images = generator.uniform(-1000, 400, (16, 64, 64, 1)).astype(np.float32)
    labels = generator.integers(0, 4, (16, 64, 64))
    labels[:, :40] = 3
    np.save(folder / "images_medseg.npy", images)
    np.save(folder / "masks_medseg.npy", labels[..., None] == np.arange(4))
    np.save(folder / "groups.npy", np.arange(16))
    return folder


def assert_global_randomness_is_untouched(work: Callable[[], Any]) -> None:
    """Asserts that `work` comes to the same whatever the global random states are, and leaves them as they were."""
    import torch

    results = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 the global state is what is tested
        torch.manual_seed(seed)
        before = (random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().tolist())  # noqa: NPY002
        results.append(work())
        after = (random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().tolist())  # noqa: NPY002
        assert before == after
    assert results[0] == results[1]


def small(data: Path, cache: Path, output: Path) -> list[str]:
    """Flags of a run of seconds."""
    return [
        *("--preset", "quick", "--image-size", "64", "--encoder", "tu-test_efficientnet", "--epochs", "2"),
        *("--data", str(data), "--cache", str(cache), "--output", str(output)),
    ]


def train(*arguments: str, timeout: float = 200, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m matchai.train` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "matchai.train", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, **environment},
    )
