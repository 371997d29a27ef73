"""The pictures of a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from matchai.data import STEPS, Data
from matchai.drawing import draw_confusion_matrix, draw_dice_per_class, draw_learning_curves, draw_panels
from matchai.metrics import Counts
from matchai.runs.facts import rank_by_lesion_dice
from matchai.settings import TrainConfig
from matchai.training import dataset_of
from matchai.volumes import UPRIGHT, turn

NUM_TYPICAL, NUM_WORST = 3, 3


def draw_figures(
    folder: Path,
    history: list[dict[str, Any]],
    confusions: Counts,
    data: Data,
    config: TrainConfig,
    predict: Callable[[Tensor], Tensor],
    *,
    epoch: int | None,
) -> None:
    """Draws learning curves, Dice per class, the confusion matrix, and panels of typical and of the worst slices.

    Slices are drawn upright, however they lie in their files.

    Args:
        folder: Where the PNGs go.
        history: The rows so far.
        confusions: (N, C, C) counts of every validation slice, in the order of `data.val`.
        data: The slices.
        config: The run's settings.
        predict: Takes standardised images (B, 2 · context + 1, S, S) to class indices (B, S, S).
        epoch: The epoch that the counts and predictions are of.
    """
    draw_charts(folder, history, confusions, config, epoch=epoch)
    settings = config.input
    names, background = list(settings.class_names), settings.background_index
    ranked, dice = rank_by_lesion_dice(confusions, settings.lesion_indices)
    middle = max(0, len(ranked) // 2 - NUM_TYPICAL // 2)
    choices = {"panels": ranked[middle : middle + NUM_TYPICAL], "worst": ranked[:NUM_WORST]}
    dataset = dataset_of(config, data, data.val)
    for name, rows in choices.items():
        if not rows:
            continue
        items = [dataset[row] for row in rows]
        preds = predict(torch.stack([item[0] for item in items])).numpy()
        low, high = data.slices.hu_window
        images = np.stack([data.slices.images[data.val[row]] for row in rows]) * ((high - low) / STEPS) + low
        targets = np.stack([item[1].numpy() for item in items])
        images, targets, preds = (turn(one, data.orientation, UPRIGHT) for one in (images, targets, preds))
        kind = "Typical validation slices" if name == "panels" else "The worst validation slices by lesion Dice"
        title = f"{kind} at epoch {epoch}: {_source(config)}"
        captions = [f"slice {data.val[row]} · lesion Dice of this slice {dice[row]:.2f}" for row in rows]
        path, window = folder / f"{name}.png", settings.hu_window
        draw_panels(images, targets, preds, captions, names, background, window, path, title=title)


def draw_charts(
    folder: Path, history: list[dict[str, Any]], confusions: Counts | None, config: TrainConfig, *, epoch: int | None
) -> None:
    """Draws what needs no slices: learning curves, Dice per class and the confusion matrix.

    Args:
        folder: Where the PNGs go; made where it is missing.
        history: The rows so far.
        confusions: (N, C, C) counts of every validation slice; None for no matrix.
        config: The run's settings.
        epoch: The epoch that the counts are of.
    """
    folder.mkdir(exist_ok=True)
    names = list(config.input.class_names)
    about = _source(config) + ("" if confusions is None else f", {len(confusions)} validation slices")
    draw_learning_curves(history, folder / "learning_curves.png", title=f"Learning curves: {about}")
    title = f"Dice per class, pooled over pixels: {about}"
    background = config.input.background_index
    draw_dice_per_class(history, names, folder / "dice_per_class.png", title=title, background_class=background)
    if confusions is not None:
        title = f"Confusion matrix at epoch {epoch}: {about}"
        draw_confusion_matrix(confusions.sum(0), names, folder / "confusion_matrix.png", title=title)


def _source(config: TrainConfig) -> str:
    return "built-in synthetic phantom" if config.input.data is None else config.input.data.name
