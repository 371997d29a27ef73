"""Pictures of a study, each one PNG: history, learning curves, slices, parallel coordinates, importance.

They are as narrow as a column of text, so that a phone shows them readably. Only matplotlib's object interface is used,
as in `matchai.drawing.figures`; Optuna's own pictures go through pyplot's global state and warn of being experimental.
Texts that a caller can choose are rendered literally: a `$` starts no formula.
"""

import io
import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import optuna
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from matchai.drawing import GRID, INK, MUTED, PALETTE, PAPER, TRAIN_COLOR, VAL_COLOR
from matchai.study.rows import (
    Row,
    capitalise,
    find_best,
    find_importances,
    find_recipe,
    format_setting,
    is_maximised,
    label_objective,
    read_epochs,
    read_rows,
    read_settings,
)
from matchai.system import write_whole

WIDTH, DPI = 5.2, 200  # inches, 1,040 pixels: text of 9 points is as high as 8.6 CSS pixels on a phone 390 wide
TEXT_SIZE, SMALL_SIZE = 9.0, 8.0  # points
STEPS = [1, 2, 2.5, 5, 10]
NUM_TICKS = 5  # at most, on an axis half as wide as the picture
RECIPE: dict[str, Any] = {"color": TRAIN_COLOR, "marker": "D", "markersize": 6, "zorder": 6}
BEST: dict[str, Any] = {"color": VAL_COLOR, "marker": "*", "markersize": 12, "zorder": 7}
LOOKS: dict[str, dict[str, Any]] = {
    "complete": {"color": INK, "marker": "o", "markersize": 4.5, "markerfacecolor": "none"},
    "pruned": {"color": PALETTE[0], "marker": "v", "markersize": 5},
    "failed for its settings": {"color": PALETTE[7], "marker": "x", "markersize": 6, "markeredgewidth": 1.6},
    "failed for the machine": {"color": MUTED, "marker": "+", "markersize": 7, "markeredgewidth": 1.6},
    "off the scale": {"color": INK, "marker": "d", "markersize": 5},
}


def draw_study(folder: Path, study: optuna.Study, objective: str) -> dict[str, Path]:
    """Draws what can be drawn of a study so far.

    Args:
        folder: Where the PNGs go; made where it is missing.
        study: One objective; a running one may be drawn.
        objective: The history's key for it, as `mean_dice`.

    Returns:
        Name to PNG, of `history`, `learning_curves`, `slices`, `parallel_coordinates` and `importance` those for which
        there are enough trials.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, settings, maximised = read_rows(study), read_settings(study), is_maximised(study)
    label = label_objective(objective)
    figures = {
        "history": _draw_history(rows, label, maximised),
        "learning_curves": _draw_curves(rows, label, maximised, read_epochs(study)),
        "slices": _draw_slices(rows, settings, label, maximised),
        "parallel_coordinates": _draw_parallel(rows, settings, label, maximised),
        "importance": _draw_importance(study),
    }
    drawn = {}
    for name, figure in figures.items():
        if figure is not None:
            png = io.BytesIO()
            cast(Any, FigureCanvasAgg(figure)).print_png(png)  # matplotlib gives no types for it
            drawn[name] = folder / f"{name}.png"
            write_whole(drawn[name], png.getvalue())
    return drawn


def _page(title: str, height: float) -> Figure:
    """A figure with its title; `height` in inches."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor=PAPER, layout="constrained")
    cast(Any, figure.get_layout_engine()).set(w_pad=0.1, h_pad=0.08)  # inches
    text = "\n".join(textwrap.wrap(title, 52))
    figure.suptitle(text, x=0.02, ha="left", fontsize=10.5, weight="bold", color=INK, parse_math=False)
    return figure


def _dress(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(labelsize=SMALL_SIZE, colors=MUTED, length=0, pad=4)
    axes.yaxis.set_major_locator(MaxNLocator(NUM_TICKS, steps=STEPS))


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    kept = dict(zip(labels, handles, strict=True))
    figure.legend(
        kept.values(),
        kept.keys(),
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=TEXT_SIZE,
        labelcolor=INK,
    )


def _shown(rows: Iterable[Row]) -> list[float]:
    """The values that count: not those of trials that failed."""
    return [row.value for row in rows if row.kind in {"complete", "pruned"} and math.isfinite(row.value)]


def _limits(values: Iterable[float], maximised: bool) -> tuple[float, float]:
    """The range to show: all good values, and bad ones down to three quartile ranges below (Tukey's outer fence)."""
    finite = np.array(list(values))
    if not finite.size:
        return 0.0, 1.0
    lower, upper = np.quantile(finite, [0.25, 0.75])
    low, high, reach = float(finite.min()), float(finite.max()), 3 * float(upper - lower)
    if reach > 0 and maximised:
        low = max(low, float(lower) - reach)
    elif reach > 0:
        high = min(high, float(upper) + reach)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
    return low - room, high + room


def _mark(axes: Axes, places: Sequence[float], rows: Sequence[Row], best: Row | None, maximised: bool) -> None:
    """Marks every trial at its place on the x axis and its value; those without a value on the scale, at the edge."""
    low, high = axes.get_ylim()
    edge = 0.0 if maximised else 1.0  # of the axes: where the bad values are
    for kind, look in LOOKS.items():
        inside: list[tuple[float, float]] = []
        outside: list[tuple[float, float]] = []
        for place, row in zip(places, rows, strict=True):
            is_on_scale = low <= row.value <= high and row.kind in {"complete", "pruned"}
            is_far = math.isfinite(row.value) and row.kind in {"complete", "pruned"} and not is_on_scale
            shown = "off the scale" if is_far else row.kind
            if shown == kind and row is not best and not (row.is_recipe and is_on_scale):
                (inside if is_on_scale else outside).append((place, row.value))
        style = look | {"linestyle": "none", "label": kind, "clip_on": False, "zorder": 4}
        if inside:
            axes.plot(*zip(*inside, strict=True), **style)
        if outside:
            at_edge = [edge] * len(outside)
            axes.plot([place for place, _ in outside], at_edge, transform=axes.get_xaxis_transform(), **style)
    for place, row in zip(places, rows, strict=True):
        for is_it, look, label in ((row.is_recipe, RECIPE, "recipe"), (row is best, BEST, "best")):
            if is_it and low <= row.value <= high:
                axes.plot([place], [row.value], linestyle="none", label=label, clip_on=False, **look)


def _draw_history(rows: Sequence[Row], label: str, maximised: bool) -> Figure | None:
    rows = [row for row in rows if row.kind not in {"running", "waiting"}]
    if not rows:
        return None
    best, recipe = find_best(rows, maximised), find_recipe(rows)
    figure = _page(f"Every trial's {label}", 3.6)
    axes = figure.add_subplot()
    _dress(axes)
    axes.set_ylim(_limits(_shown(rows), maximised))
    complete = [row for row in rows if row.kind == "complete"]
    if complete:
        accumulate = np.maximum.accumulate if maximised else np.minimum.accumulate
        so_far = accumulate([row.value for row in complete])
        ends = [*(row.number for row in complete), rows[-1].number]
        axes.step(ends, [*so_far, so_far[-1]], where="post", color=VAL_COLOR, linewidth=1.4, label="best so far")
    if recipe is not None and recipe.kind == "complete":
        axes.axhline(recipe.value, color=TRAIN_COLOR, linewidth=1, linestyle=(0, (4, 3)), label="recipe's value")
    _mark(axes, [row.number for row in rows], rows, best, maximised)
    axes.set_xlabel("trial", fontsize=TEXT_SIZE, color=MUTED)
    axes.margins(x=0.03)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=STEPS, integer=True, min_n_ticks=1))
    _legend(figure, axes)
    return figure


def _draw_curves(rows: Sequence[Row], label: str, maximised: bool, epochs: int | None) -> Figure | None:
    rows = [row for row in rows if row.curve]
    if not rows:
        return None
    best = find_best(rows, maximised)
    figure = _page(f"{capitalise(label)} over the epochs, all trials", 3.6)
    axes = figure.add_subplot()
    _dress(axes)
    looks: dict[str, dict[str, Any]] = {
        "other trials": {"color": MUTED, "linewidth": 0.8, "alpha": 0.55, "zorder": 2},
        "pruned": {"color": PALETTE[0], "linewidth": 1.0, "alpha": 0.9, "zorder": 3},
        "recipe": {"color": TRAIN_COLOR, "linewidth": 2.0, "linestyle": (0, (4, 1.5)), "zorder": 5},
        "best": {"color": VAL_COLOR, "linewidth": 2.0, "zorder": 6},
    }
    for row in rows:
        name = "best" if row is best else "recipe" if row.is_recipe else row.kind
        look = looks.get(name, looks["other trials"])
        axes.plot(list(row.curve), list(row.curve.values()), label=name if name in looks else "other trials", **look)
        if row.kind == "pruned" or len(row.curve) == 1:
            axes.plot(*list(row.curve.items())[-1], marker="v" if row.kind == "pruned" else "o", markersize=4, **look)
    last = max(max(row.curve) for row in rows)
    # the first sixth is a climb that all share: it may run out of the picture, so that what differs is seen
    late = [value for row in rows for epoch, value in row.curve.items() if epoch >= last / 6]
    axes.set_ylim(_limits(late, maximised))
    if (epochs or last) > 1:
        half = (epochs or last) / 2
        axes.axvline(half, color=INK, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1, label="half-time")
    axes.set_xlabel("epoch", fontsize=TEXT_SIZE, color=MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=STEPS, integer=True, min_n_ticks=1))
    _legend(figure, axes)
    return figure


def _place(value: object, distribution: BaseDistribution) -> float:
    """Where a setting's value lies on its axis, from 0 to 1; NaN where there is none."""
    if isinstance(distribution, CategoricalDistribution):
        if not any(value == choice for choice in distribution.choices):
            return math.nan
        return (float(distribution.to_internal_repr(cast(Any, value))) + 0.5) / len(distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    low, high, at = float(distribution.low), float(distribution.high), float(value)
    if distribution.log and at > 0:
        low, high, at = math.log(low), math.log(high), math.log(at)
    return (at - low) / (high - low) if high > low else 0.5


def _ticks(distribution: BaseDistribution) -> list[tuple[float, str]]:
    """Places from 0 to 1 and labels for an axis."""
    values: list[Any]
    if isinstance(distribution, CategoricalDistribution):
        values = list(distribution.choices)
    else:
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        low, high = float(distribution.low), float(distribution.high)
        values = []
        if distribution.log:
            powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            for digits in ((1, 2, 5), (1, 5), (1,)):
                values = [float(f"{digit}e{power}") for power in powers for digit in digits]
                values = [value for value in values if low <= value <= high]
                if len(values) <= NUM_TICKS:
                    break
        elif high > low:
            locator = MaxNLocator(NUM_TICKS - 1, steps=STEPS, integer=isinstance(distribution, IntDistribution))
            values = [float(value) for value in locator.tick_values(low, high) if low <= value <= high]
        if len(values) < 2:
            values = sorted({low, high})
    step = math.ceil(len(values) / NUM_TICKS)
    return [(_place(value, distribution), _cut(format_setting(value), 14)) for value in values][::step]


def _draw_slices(
    rows: Sequence[Row], settings: dict[str, BaseDistribution], label: str, maximised: bool
) -> Figure | None:
    rows = [row for row in rows if row.kind not in {"running", "waiting", "failed for the machine"}]
    if not settings or not _shown(rows):
        return None
    best = find_best(rows, maximised)
    num_rows = math.ceil(len(settings) / 2)
    figure = _page(f"{capitalise(label)} over each setting", 0.8 + 1.75 * num_rows)
    limits = _limits(_shown(rows), maximised)
    panels = figure.subplots(num_rows, 2, sharey=True, squeeze=False).ravel()
    for axes, (name, distribution) in zip(panels, settings.items(), strict=False):
        _dress(axes)
        axes.set_ylim(limits)
        axes.set_xlim(-0.03, 1.03)
        places = [_place(row.settings.get(name), distribution) for row in rows]
        _mark(axes, places, rows, best, maximised)
        ticks = _ticks(distribution)
        axes.set_xticks([place for place, _ in ticks], [text for _, text in ticks], parse_math=False)
        suffix = " (log)" if getattr(distribution, "log", False) else ""
        axes.set_title(f"{_cut(name, 28)}{suffix}", fontsize=TEXT_SIZE, color=INK, loc="left", parse_math=False)
    for axes in panels[len(settings) :]:
        axes.set_visible(False)
    _legend(figure, panels[0])
    return figure


def _draw_parallel(
    rows: Sequence[Row], settings: dict[str, BaseDistribution], label: str, maximised: bool
) -> Figure | None:
    complete = [row for row in rows if row.kind == "complete"]
    if not settings or len(complete) < 2:
        return None
    best, recipe = find_best(rows, maximised), find_recipe(complete)
    low, high = _limits((row.value for row in complete), maximised)
    bottom = len(settings)
    figure = _page(f"Settings and {label} of the complete trials", 1.2 + 0.62 * (bottom + 1))
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set(xlim=(-0.02, 1.02), ylim=(bottom + 0.42, -0.5))

    def path(row: Row) -> list[tuple[float, float]]:
        places = [_place(row.settings.get(name), distribution) for name, distribution in settings.items()]
        return list(
            zip([*places, min(1.0, max(0.0, (row.value - low) / (high - low)))], range(bottom + 1), strict=True)
        )

    # The best are drawn last, and darkest: cividis is the same with and without red-green vision.
    ranked = sorted(complete, key=lambda row: row.value if maximised else -row.value)
    paths = [path(row) for row in ranked]
    good = np.array([way[-1][0] for way in paths])
    alpha = min(0.75, max(0.2, 40 / len(paths)))  # hundreds of lines would become one patch
    lines = LineCollection(paths, cmap="cividis_r", linewidths=0.9, alpha=alpha, zorder=2)
    lines.set_array(good if maximised else 1 - good)
    axes.add_collection(lines)
    axes.plot([], [], color="#0B2A5B", linewidth=1, label="the darker, the better")
    if recipe is not None:
        axes.plot(
            *zip(*path(recipe), strict=True), color=TRAIN_COLOR, linewidth=2, linestyle=(0, (4, 1.5)), label="recipe"
        )
    if best is not None:
        axes.plot(*zip(*path(best), strict=True), color=VAL_COLOR, linewidth=2, label="best")

    values = [
        float(value) for value in MaxNLocator(NUM_TICKS, steps=STEPS).tick_values(low, high) if low <= value <= high
    ]
    marks = [((value - low) / (high - low), f"{value:.4g}") for value in values]
    scales = [(name, _ticks(distribution)) for name, distribution in settings.items()]
    box = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
    style: dict[str, Any] = {"bbox": box, "parse_math": False, "zorder": 8}
    for row_number, (name, ticks) in enumerate([*scales, (label, marks)]):
        axes.axhline(row_number, color=MUTED, linewidth=1, zorder=3)
        axes.text(-0.01, row_number - 0.12, _cut(name, 40), fontsize=TEXT_SIZE, weight="bold", color=INK, **style)
        for place, text in ticks:
            axes.plot([place], [row_number], marker="|", color=MUTED, markersize=6, zorder=3)
            axes.text(place, row_number + 0.12, text, fontsize=SMALL_SIZE, color=MUTED, ha="center", va="top", **style)
    _legend(figure, axes)
    return figure


def _draw_importance(study: optuna.Study) -> Figure | None:
    shares = find_importances(study)
    if not shares:
        return None
    num_trials = sum(row.kind == "complete" for row in read_rows(study))
    title = f"Importance of the settings by fANOVA, resting on {num_trials} complete trials"
    figure = _page(title, 0.9 + 0.34 * len(shares))
    axes = figure.add_subplot()
    _dress(axes)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.barh(range(len(shares)), list(shares.values()), height=0.6, color=TRAIN_COLOR)
    axes.set_yticks(range(len(shares)), [_cut(name, 30) for name in shares], parse_math=False)
    axes.tick_params(axis="y", labelsize=TEXT_SIZE, labelcolor=INK)
    axes.set(ylim=(len(shares) - 0.4, -0.6), xlim=(0, 1.12 * max(shares.values())), xticks=[])
    for number, share in enumerate(shares.values()):
        axes.text(share, number, f" {share:.0%}", va="center", fontsize=TEXT_SIZE, color=INK)
    return figure


def _cut(text: str, length: int) -> str:
    """One line of at most `length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 1]}…"
