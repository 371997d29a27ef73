"""Folders of weights as a run keeps them, made without training."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from matchai.metrics.confusion import Counts, summarise
from matchai.model.unetplusplus import build_model
from matchai.settings.config import TrainConfig
from matchai.settings.parsing import dump
from matchai.training.checkpoint import BEST, State, pack_weights, save_state
from matchai.training.meters import EpochMeter, epoch_row

NAMES = ["ground glass", "consolidation", "lungs other", "background"]


def keep_weights(folder: Path, *, seed: int = 0, without: tuple[str, ...] = (), **about: Any) -> Path:
    """Writes best.safetensors of a small random network; `about` changes what its header tells."""
    told = describe(**about)
    model = build_model(told["encoder"], len(told["class_names"]), in_channels=told["in_channels"], seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in told.items() if name not in without}
    (folder / BEST).write_bytes(pack_weights(model.state_dict(), kept))
    return folder


def describe(**about: Any) -> dict[str, Any]:
    """What a header of best.safetensors tells."""
    return {
        "class_names": NAMES,
        "background_class": "background",
        "lesion_classes": ["ground glass", "consolidation"],
        "hu_window": [-1500.0, 500.0],
        "mean_hu": -600.0,
        "std_hu": 400.0,
        "image_size": 64,
        "data_kind": "npy",
        "orientation": "LP",
        "rescale": [1.0, 0.0],
        "encoder": "tu-test_resnet",
        "context": 0,
        "in_channels": 1,
        "epoch": 3,
        "mean_dice": 0.5,
        "synthetic": False,
        "matchai": "0.1.0",
    } | about


def keep_run(
    folder: Path,
    confusions: Counts,
    groups: Sequence[int],
    *,
    num_done: int = 2,
    weights: bytes | None = None,
    recorded: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """Writes the folder of a run as training leaves it, pictures aside.

    Args:
        folder: The run's.
        confusions: (N, C, C) counts of the validation slices at every epoch; the last is the best.
        groups: The group of each of them; before them stand as many training slices of group -1.
        num_done: Finished epochs.
        weights: best.safetensors; a header without weights where it is None.
        recorded: What the run recorded of itself.
        **settings: Of 2 epochs without others.
    """
    config = TrainConfig().updated(**{"epochs": 2, "image_size": 64, "encoder": "tu-test_resnet", **settings})
    names = list(config.input.class_names)
    lesions = [names.index(name) for name in config.input.lesion_classes]
    folder.mkdir(parents=True)
    told = {"data": {"images_medseg.npy": "0" * 64}, "versions": {"torch": "2.0"}} if recorded is None else recorded
    (folder / "config.yaml").write_text(dump(config, told), encoding="utf-8")
    num = len(groups)
    split = {"seed": 0, "folds": 0, "fold": 0, "train": list(range(num)), "val": list(range(num, 2 * num))}
    (folder / "split.json").write_text(json.dumps(split | {"groups": [-1] * num + list(groups)}))
    meter = EpochMeter(consumed=8, loss_sum=8.0, num_draws=8, seconds=2.0, waited=0.2, lr=1e-3)
    metrics = summarise(confusions, lesions, 6)
    history = [epoch_row(epoch, meter, 0.5, metrics, 3.0) for epoch in range(1, num_done + 1)]
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
    if num_done:
        if weights is None:
            weights = pack_weights({"none": torch.zeros(1)}, describe(epoch=num_done, class_names=names))
        record = {"history": history, "best_epoch": num_done}
        save_state(folder, State({"best_confusions": torch.from_numpy(confusions)}, record, weights))
    return folder
