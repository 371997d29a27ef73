"""Folders of weights as a run keeps them, made without training."""

from pathlib import Path
from typing import Any

from matchai.checkpoint import BEST, pack_weights
from matchai.model import build_model

NAMES = ["ground glass", "consolidation", "lungs other", "background"]


def keep_weights(folder: Path, *, seed: int = 0, without: tuple[str, ...] = (), **about: Any) -> Path:
    """Writes best.safetensors of a small random network; `about` changes what its header tells."""
    told: dict[str, Any] = {
        "class_names": NAMES,
        "background_class": "background",
        "lesion_classes": ["ground glass", "consolidation"],
        "hu_window": [-1500.0, 500.0],
        "mean_hu": -600.0,
        "std_hu": 400.0,
        "image_size": 64,
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
    model = build_model(told["encoder"], len(told["class_names"]), in_channels=told["in_channels"], seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in told.items() if name not in without}
    (folder / BEST).write_bytes(pack_weights(model.state_dict(), kept))
    return folder
