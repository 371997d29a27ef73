"""Pictures of a data set: the histogram of its values, and slices beside their masks, each one PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from matchai.drawing import DPI, INK, MUTED, PAPER, TRAIN_COLOR, class_colors, fill_panel, save_figure

PANEL = 1.9  # inches
ROOM = 0.3  # inches, below a panel for its caption


def draw_histogram(counts: NDArray[np.int64], hu_window: tuple[float, float], path: Path, *, title: str) -> None:
    """Draws how many pixels have which value.

    Args:
        counts: (B,) pixels in B equal steps of the window.
        hu_window: Lowest and highest HU.
        path: The PNG to write; its folder must exist.
        title: Plain text.
    """
    figure = Figure(figsize=(8, 3), dpi=DPI, facecolor=PAPER, layout="constrained")
    axes = figure.add_subplot()
    percent = counts / max(int(counts.sum()), 1) * 100
    axes.stairs(percent, np.linspace(*hu_window, len(counts) + 1), fill=True, color=TRAIN_COLOR)
    axes.set_title(title, loc="left", fontsize=9, color=INK, parse_math=False)
    axes.set_xlabel("HU", fontsize=8, color=MUTED)
    axes.set_ylabel("% of the pixels", fontsize=8, color=MUTED)
    axes.tick_params(labelsize=8, colors=MUTED)
    axes.spines[["right", "top"]].set_visible(False)
    axes.margins(x=0)
    save_figure(figure, path)


def draw_slices(
    images: NDArray[np.float32],
    targets: NDArray[np.uint8],
    captions: Sequence[str],
    class_names: Sequence[str],
    background_class: int,
    path: Path,
    *,
    title: str,
) -> None:
    """Draws slices, two a row, each beside itself under its mask.

    Args:
        images: (K, H, W) from 0 to 1.
        targets: (K, H, W) class indices.
        captions: K lines of plain text.
        class_names: C names.
        background_class: The class that is not coloured.
        path: The PNG to write; its folder must exist.
        title: Plain text.
    """
    num_rows = (len(images) + 1) // 2
    width, head = 4 * PANEL + 0.5, 0.75
    height = head + num_rows * (PANEL + ROOM) + 0.1
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=PAPER)
    colors = dict(enumerate(class_colors(len(class_names), background_class)))
    del colors[background_class]
    plain: dict[str, Any] = {"va": "center", "parse_math": False}
    figure.text(0.1 / width, 1 - 0.2 / height, title, fontsize=10, color=INK, weight="bold", **plain)
    keys = [Patch(color=color, label=" " + class_names[index]) for index, color in colors.items()]
    place = (0, 1 - 0.48 / height)
    legend = figure.legend(handles=keys, loc="center left", bbox_to_anchor=place, ncols=8, fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    for number, (image, target, caption) in enumerate(zip(images, targets, captions, strict=True)):
        row, side = divmod(number, 2)
        bottom = 1 - (head + row * (PANEL + ROOM) + PANEL) / height
        left = 0.1 + side * (2 * PANEL + 0.25)
        for column, labels in enumerate((np.full_like(target, background_class), target)):
            corner = (left + column * (PANEL + 0.05)) / width
            axes = figure.add_axes((corner, bottom, PANEL / width, PANEL / height))
            fill_panel(axes, image.astype(np.float64), labels, colors)
        figure.text(left / width, bottom - 0.13 / height, caption, fontsize=7.5, color=MUTED, **plain)
    save_figure(figure, path)
