"""Pictures of a training: curves, confusion, and slices beside their ground truth and prediction, each one PNG.

Only matplotlib's object interface is used, never pyplot, so that drawing touches no global state and several threads
may draw at once. Every text that a caller can choose is rendered literally: a `$` starts no formula.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.ticker import MaxNLocator

from matchai.drawing.layout import (
    DPI,
    GAP,
    GRID,
    INK,
    LEADING,
    MARGIN,
    MUTED,
    PAPER,
    TEXT_SIZE,
    WIDTH,
    Entry,
    FigurePage,
    text_height,
)

# After Okabe and Ito's palette (Color Universal Design, 2008), its orange lightened, its vermillion darkened and its
# blues spread, so that the first three stand at CIE L* 77, 48 and 60 and the background at 25: they also differ in a
# grey print. The last two are not theirs. In simulated deuteranopia any two of the ten are 17 CIELAB units apart.
PALETTE = ("#F0B428", "#CC4415", "#3A96D9", "#CC79A7", "#009E73", "#0B4F8A", "#F2EE9B", "#6A1FB0", "#A8DCC0")
BACKGROUND_COLOR = "#3B3B3B"
TRAIN_COLOR, VAL_COLOR, LESION_COLOR = "#3A96D9", "#CC4415", "#009E73"

TICK_ROOM = 0.5  # inches left of a chart: enough for "1.25e-4"
OVERLAY = 0.3  # opacity of a class over the CT: vessels stay visible through it
RING = {"color": INK, "linestyle": "none", "marker": "o", "markersize": 7, "markerfacecolor": "none"}
STEPS = [1, 2, 5, 10]  # ticks at 10, 20, 30 rather than at 6, 12, 18

Floats = npt.NDArray[np.float64]
History = Sequence[Mapping[str, Any]]


def style_chart(axes: Axes, steps: Sequence[float]) -> None:
    """Leaves of a chart's frame the x axis alone, and puts light lines at up to five `steps` behind its curves."""
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(labelsize=8, colors=MUTED, length=0, pad=4)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=steps))


def class_colors(num_classes: int, background_class: int | None) -> list[str]:
    """Chooses a colour for every class, told apart with and without colour vision.

    Args:
        num_classes: C.
        background_class: Index of the class that gets the neutral dark grey; None if there is none.

    Returns:
        C colours as `#rrggbb`. Classes beyond the palette's nine get equal steps of viridis.
    """
    num_others = num_classes - (background_class is not None)
    num_extra = max(0, num_others - len(PALETTE))
    extra = [to_hex(color) for color in colormaps["viridis"](np.linspace(0.0, 0.95, num_extra))]
    colors = [*PALETTE, *extra][:num_others]
    if background_class is not None:
        colors.insert(background_class, BACKGROUND_COLOR)
    return colors


def draw_learning_curves(history: History, path: Path, *, title: str) -> None:
    """Draws the losses, the mean and lesion Dice and the learning rate over the epochs.

    Args:
        history: One row an epoch: `epoch` (from 1), and `train_loss`, `val_loss`, `mean_dice`, `lesion_dice` and `lr`,
            each a float, or None where it is undefined, which leaves a gap. The best `mean_dice` is marked.
        path: The PNG to write; its folder must exist.
        title: Plain text; wrapped if it is long.
    """
    keys = ("train_loss", "val_loss", "mean_dice", "lesion_dice", "lr")
    train_loss, val_loss, mean_dice, lesion_dice, lr = (_finite([row[key] for row in history]) for key in keys)
    best = int(np.nanargmax(mean_dice)) if np.isfinite(mean_dice).any() else None
    ring = [] if best is None else [(f"best mean {mean_dice[best]:.3f} at epoch {history[best]['epoch']}", RING)]

    page = FigurePage(title)
    losses = [("train", train_loss, TRAIN_COLOR), ("validation", val_loss, VAL_COLOR)]
    loss = _chart(page, history, "Loss", losses, height=1.9)
    page.y += 0.2
    dices = [("mean over classes", mean_dice, INK), ("lesion", lesion_dice, LESION_COLOR)]
    dice = _chart(page, history, "Validation Dice", dices, height=1.9, top=1, more=ring)
    page.y += 0.2
    rate = _chart(page, history, "Learning rate", [("", lr, MUTED)], height=0.8)
    highest = float(np.nanmax(lr, initial=0))
    label = np.format_float_scientific(highest, precision=2, trim="-", exp_digits=1)
    rate.set_yticks([0, highest] if highest else [0], ["0", label] if highest else ["0"])

    for axes in (loss, dice):
        axes.tick_params(labelbottom=False)
    if best is not None:
        for axes in (loss, dice, rate):
            axes.axvline(history[best]["epoch"], color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
        dice.plot([history[best]["epoch"]], [mean_dice[best]], clip_on=False, zorder=4, **cast(Any, RING))
    _finish_epochs(page, path)


def draw_dice_per_class(
    history: History, class_names: Sequence[str], path: Path, *, title: str, background_class: int | None = None
) -> None:
    """Draws the validation Dice of every class over the epochs.

    Args:
        history: One row an epoch: `epoch` (from 1), `dice_per_class` with C floats, None where undefined (a gap).
        class_names: C names.
        path: The PNG to write; its folder must exist.
        title: Plain text; wrapped if it is long.
        background_class: The class drawn in grey, as in `class_colors`.
    """
    num_classes = len(class_names)
    columns = _finite([row["dice_per_class"] for row in history]).reshape(-1, num_classes).T
    page = FigurePage(title)
    curves = list(zip(class_names, columns, class_colors(num_classes, background_class), strict=True))
    _chart(page, history, "Validation Dice", curves, height=2.6, top=1)
    _finish_epochs(page, path)


def draw_confusion_matrix(
    confusion: npt.NDArray[np.int64], class_names: Sequence[str], path: Path, *, title: str
) -> None:
    """Draws pixel counts by true and predicted class, each cell with its share of the row.

    Args:
        confusion: (C, C) int64 counts, rows the truth, columns the prediction. A row without pixels shows no shares.
        class_names: C names.
        path: The PNG to write; its folder must exist.
        title: Plain text; wrapped if it is long.
    """
    num_classes = len(class_names)
    counts = [[f"{int(count):,}" for count in row] for row in confusion]
    totals = confusion.sum(axis=1, keepdims=True)
    shares = confusion / np.maximum(totals, 1)

    page = FigurePage(title)
    left, tall = MARGIN + 1.3, 0.62
    widest = max(page.measure(text, 7.5) for row in counts for text in row)
    wide = max(widest + 0.16, (WIDTH - MARGIN - left) / max(num_classes, 3))
    page.width = max(WIDTH, left + num_classes * wide + MARGIN)

    page.paragraph("rows: truth · columns: prediction · shares of the row, and pixels", TEXT_SIZE, color=MUTED)
    heads = [page.wrap(name, wide - 0.1, TEXT_SIZE) for name in class_names]
    page.y += 0.14 + max(text_height(lines, TEXT_SIZE) for lines in heads)
    axes = page.axes(left, num_classes * wide, num_classes * tall)
    # Blues up to 1.15, not 1: the map's darkest end is nearly black.
    axes.pcolormesh(shares, cmap="Blues", vmin=0, vmax=1.15, edgecolors=PAPER, linewidth=1.5)
    axes.invert_yaxis()
    axes.set_axis_off()
    for row, name in enumerate(class_names):
        middle = page.y + (row + 0.5) * tall
        lines = page.wrap(name, left - MARGIN - 0.12, TEXT_SIZE)
        size = min(TEXT_SIZE, tall * 72 / LEADING / len(lines))
        page.write(left - 0.1, middle - text_height(lines, size) / 2, lines, size, ha="right")
        for column in range(num_classes):
            x, share = left + (column + 0.5) * wide, shares[row, column]
            color = PAPER if share > 0.7 else INK  # the one with more contrast
            weight = "bold" if row == column else "normal"
            percent = f"{share:.1%}" if totals[row, 0] else "–"
            page.write(x, middle - 0.17, [percent], 10, ha="center", color=color, weight=weight)
            page.write(x, middle + 0.04, [counts[row][column]], 7.5, ha="center", color=color, alpha=0.8)
    for column, lines in enumerate(heads):
        top = page.y - 0.06 - text_height(lines, TEXT_SIZE)
        page.write(left + (column + 0.5) * wide, top, lines, TEXT_SIZE, ha="center")
    page.y += num_classes * tall
    page.save(path)


def draw_panels(
    images: npt.NDArray[np.floating[Any]],
    targets: npt.NDArray[np.integer[Any]] | None,
    preds: npt.NDArray[np.integer[Any]],
    captions: Sequence[str],
    class_names: Sequence[str],
    background_class: int,
    hu_window: tuple[float, float],
    path: Path,
    *,
    title: str,
) -> None:
    """Draws slices, a row each: the CT alone, under its ground truth if there is one, and under the prediction.

    Args:
        images: (K, H, W) floats in HU; K from 1 to 8 reads well. A pixel that is not a number is drawn black.
        targets: (K, H, W) class indices of the annotation; None where there is none.
        preds: (K, H, W) class indices of the prediction.
        captions: K lines of plain text, one below each row.
        class_names: C names. The outline of an earlier class lies over that of a later one.
        background_class: The class that is not coloured.
        hu_window: Lowest and highest HU of the grey scale, black and white.
        path: The PNG to write; its folder must exist.
        title: Plain text; wrapped if it is long.
    """
    page = FigurePage(title)
    low, high = hu_window
    colors = dict(enumerate(class_colors(len(class_names), background_class)))
    del colors[background_class]
    square = {"linestyle": "none", "marker": "s", "markersize": 9}
    keys = {k: {"markerfacecolor": (*to_rgb(color), 0.6), "markeredgecolor": color} for k, color in colors.items()}
    page.legend([(class_names[index], square | key) for index, key in keys.items()])

    window = f"window {low:g} to {high:g} HU".replace("-", "−")
    columns = {f"CT, {window}": np.full_like(preds, background_class), "ground truth": targets, "prediction": preds}
    shown = {head: labels for head, labels in columns.items() if labels is not None}
    width = (page.width - 2 * MARGIN - (len(shown) - 1) * GAP) / len(shown)
    height = round(width * DPI * images.shape[1] / images.shape[2]) / DPI
    lefts = [MARGIN + column * (width + GAP) for column in range(len(shown))]
    for left, head in zip(lefts, shown, strict=True):
        page.write(left, page.y, [head], TEXT_SIZE, color=MUTED)
    page.y += text_height([""], TEXT_SIZE) + 0.02
    for image, caption, *row in zip(images, captions, *shown.values(), strict=True):
        grey = np.clip((np.nan_to_num(image.astype(np.float64), nan=low) - low) / (high - low), 0, 1)
        for left, labels in zip(lefts, row, strict=True):
            fill_panel(page.axes(left, width, height), grey, labels, colors)
        page.y += height + 0.05
        page.paragraph(caption, TEXT_SIZE)
        page.y += 0.12
    page.y -= 0.12
    page.save(path)


def fill_panel(axes: Axes, grey: Floats, labels: npt.NDArray[np.integer[Any]], colors: dict[int, str]) -> None:
    """Shows a slice, (H, W) from 0 to 1, with the classes of `labels` (H, W) that have a colour tinted and outlined."""
    picture = np.repeat(grey[..., None], 3, axis=2)
    for index, color in reversed(colors.items()):
        inside = np.equal(labels, index)
        picture[inside] = (1 - OVERLAY) * picture[inside] + OVERLAY * np.array(to_rgb(color))
        if 0 < np.count_nonzero(inside) < inside.size:  # older matplotlib warns of a line it cannot draw
            axes.contour(inside, levels=[0.5], colors=[color], linewidths=0.9)
    axes.imshow(np.round(picture * 255).astype(np.uint8), aspect="auto")
    axes.set_axis_off()


def _finite(values: Sequence[Any]) -> Floats:
    """Returns numbers as an array, NaN where one is None or infinite."""
    array = np.array(values, dtype=np.float64)  # None becomes NaN
    return np.where(np.isfinite(array), array, np.nan)


def _chart(
    page: FigurePage,
    history: History,
    heading: str,
    curves: Sequence[tuple[str, Floats, str]],
    *,
    height: float,
    top: float | None = None,
    more: Sequence[Entry] = (),
) -> Axes:
    """Adds axes with curves over the epochs, from 0 to `top` or a little above the highest value, and their legend.

    A value between two gaps, which no line could show, gets a dot; so does every value of a short history.

    Args:
        page: The page to add to.
        history: For its `epoch`.
        heading: Title of the axes.
        curves: Label (empty for none in the legend), one value an epoch, colour.
        height: Of the axes, in inches.
        top: Highest value shown. A Dice goes to 1, so that two runs' pictures can be compared.
        more: Further entries of the legend.
    """
    page.legend([(heading, {}), *((label, {"color": color}) for label, _, color in curves if label), *more])
    left = MARGIN + TICK_ROOM
    axes = page.axes(left, page.width - left - MARGIN, height)
    page.y += height
    style_chart(axes, STEPS)

    epochs = np.array([row["epoch"] for row in history], dtype=np.float64)
    for _, values, color in curves:
        gap = np.isnan(np.concatenate(([np.nan], values, [np.nan])))
        dots = (gap[:-2] & gap[2:]) | (len(epochs) <= 10)
        axes.plot(epochs, values, ".-", color=color, linewidth=1.6, markersize=7, markevery=dots, clip_on=False)
    shown = np.stack([values for _, values, _ in curves])
    axes.set_ylim(0, top or 1.05 * float(np.nanmax(shown, initial=0)) or 1)
    if np.isnan(shown).all():
        axes.text(0.5, 0.5, "undefined in every epoch", transform=axes.transAxes, ha="center", color=MUTED, fontsize=8)
    first, last = (epochs.min(), epochs.max()) if epochs.size else (1, 1)
    room = 0.5 if first == last else 0.015 * (last - first)
    axes.set_xlim(first - room, last + room)
    axes.xaxis.set_major_locator(MaxNLocator(10, steps=STEPS, integer=True, min_n_ticks=1))
    return axes


def _finish_epochs(page: FigurePage, path: Path) -> None:
    """Names the epochs' axis, below the tick labels of the last chart, and writes the page."""
    page.write((page.width + TICK_ROOM) / 2, page.y + 0.22, ["epoch"], 8, ha="center", color=MUTED)
    page.y += 0.36
    page.save(path)
