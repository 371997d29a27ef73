"""What users import: typed for their type checker, documented, and with examples that run."""

import doctest
import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

USER = """
import functools
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from matchai import InputError, RunResult, TrainConfig, run
from matchai.checkpoint import load_weights
from matchai.losses import SegmentationLoss, balanced_class_weights
from matchai.metrics import confusion_counts, dice_per_class
from matchai.sampling import DistributedWeightedSampler, collate


def train(folder: str) -> RunResult | None:
    rows: list[float] = []
    try:
        config = TrainConfig().updated(data=folder, epochs=2)
        return run(config, on_epoch=lambda row: rows.append(row["mean_dice"]))
    except InputError as error:
        print(*error.problems)
        return None


def loop(epochs: int) -> float:
    dataset = TensorDataset(torch.arange(10))
    sampler = DistributedWeightedSampler([3.0] * 2 + [1.0] * 8, batch_size=4, seed=7)
    loader: DataLoader[tuple[torch.Tensor, ...]] = DataLoader(
        dataset, batch_sampler=sampler, collate_fn=functools.partial(collate, like=dataset[0])
    )
    loss = SegmentationLoss(balanced_class_weights(torch.tensor([46, 23, 200, 732])))
    for epoch in range(1, epochs + 1):
        sampler.set_epoch(epoch)
        for (batch,) in loader:
            print(batch.shape, sampler.state_dict()["epoch"])
    logits, target = torch.randn(2, 4, 32, 32, requires_grad=True), torch.zeros(2, 32, 32, dtype=torch.int64)
    loss(logits, target).backward()
    counts = confusion_counts(logits.argmax(1), target, num_classes=4)
    dice: list[float] = np.asarray(dice_per_class(counts.sum(0).numpy())).tolist()
    return sum(dice)


def read(folder: Path) -> list[str]:
    weights, about = load_weights(folder)
    names: list[str] = about["class_names"]
    return [*names, *weights]
"""

EXAMPLES = {
    "matchai": ["InputError", "TrainConfig", "run"],
    "matchai.checkpoint": ["State", "load_about", "load_state", "load_weights"],
    "matchai.losses": ["SegmentationLoss", "balanced_class_weights", "soften"],
    "matchai.metrics": [
        *("Bootstrap", "affected_share", "collapse", "confusion_counts", "dice_per_class", "iou_per_class"),
        *("notebook_dice", "precision_per_class", "recall_per_class", "summarise", "surface_distances"),
    ],
    "matchai.sampling": [
        *("BalancedDraws", "DistinctDraws", "DistributedWeightedSampler", "Draw", "IndependentDraws"),
        *("collate", "micro_shares", "share", "slice_weights"),
    ],
}
"""What users build on: each has an example; elsewhere a sentence is enough."""
MODULES = sorted(
    {f"matchai.{path.parent.name}" for path in (ROOT / "matchai").glob("*/__init__.py")}
    | {"matchai", "matchai.losses", "matchai.checkpoint"}
)


def public(module: str) -> dict[str, Any]:
    """The functions and classes that a module hands on."""
    found = importlib.import_module(module)
    values = {name: getattr(found, name) for name in found.__all__}
    return {name: value for name, value in values.items() if inspect.isfunction(value) or inspect.isclass(value)}


@pytest.mark.timeout(240)
def test_a_users_file_passes_strict_type_checking(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER)
    # silent: as for an installed package, only the user's own file is judged
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", str(tmp_path / "c")]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "user.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=220
    )
    assert done.stdout.startswith("Success"), done.stdout + done.stderr


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "matchai" / "py.typed").exists()


@pytest.mark.parametrize("module", MODULES)
def test_what_is_public_says_what_it_is_for(module: str) -> None:
    assert [name for name, value in public(module).items() if not (value.__doc__ or "").strip()] == []


@pytest.mark.parametrize("module", EXAMPLES)
def test_what_users_build_on_has_an_example(module: str) -> None:
    found = importlib.import_module(module)
    assert [name for name in EXAMPLES[module] if ">>>" not in str(getattr(found, name).__doc__)] == []


@pytest.mark.parametrize("module", MODULES)
def test_examples_give_what_they_say(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    finder, runner = doctest.DocTestFinder(recurse=True), doctest.DocTestRunner()
    for name, value in {"": importlib.import_module(module), **public(module)}.items():
        scope = vars(importlib.import_module(getattr(value, "__module__", module)))
        for test in finder.find(value, name or module, globs=dict(scope)):
            runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
