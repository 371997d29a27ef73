"""A run from Python, as in a notebook."""

from pathlib import Path
from typing import Any

import torch

from matchai import TrainConfig, run
from matchai.config import PRESETS


def config(data: Path, cache: Path, output: Path, **settings: Any) -> TrainConfig:
    small = {"image_size": 64, "encoder": "tu-test_efficientnet", "epochs": 1, "mixed_precision": "no"}
    place = {"data": data, "cache": cache, "output": output}
    return TrainConfig().updated(**{**PRESETS["quick"], **small, **place, **settings})


def test_a_run_tells_each_epoch_and_leaves_the_global_random_state(phantom: Path, cache: Path, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    told: list[int] = []
    result = run(config(phantom, cache, tmp_path / "run"), on_epoch=lambda row: told.append(row["epoch"]))
    assert told == [1]
    assert result.is_finished
    assert result.best_epoch == 1
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_folds_validate_every_slice_once(phantom: Path, cache: Path, tmp_path: Path) -> None:
    import json

    seen: list[int] = []
    for fold in range(2):
        output = tmp_path / f"fold{fold}"
        run(config(phantom, cache, output, folds=2, fold=fold))
        seen += json.loads((output / "split.json").read_text())["val"]
    assert sorted(seen) == list(range(32))


def test_options_of_training_run_together(phantom: Path, cache: Path, tmp_path: Path) -> None:
    settings = {"ema_decay": 0.9, "clip_grad_norm": 1.0, "accumulate": 2, "tracker": ["tensorboard"]}
    result = run(config(phantom, cache, tmp_path / "run", **settings))
    assert result.is_finished
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))
