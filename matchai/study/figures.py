"""Pictures of a study, each one PNG: history, learning curves, slices, parallel coordinates, importance.

They are as narrow as a column of text, so that a phone shows them readably. Only matplotlib's object interface is used,
as in `matchai.drawing.figures`; Optuna's own pictures go through pyplot's global state and warn of being experimental.
Texts that a caller can choose are rendered literally: a `$` starts no formula.
"""

import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import optuna
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from matchai.drawing import INK, MUTED, PALETTE, PAPER, TRAIN_COLOR, VAL_COLOR, save_figure, style_chart
from matchai.study.rows import Row, StudyFacts, capitalise, find_importances, format_setting

WIDTH, DPI = 5.2, 200  # inches, 1,040 pixels: text of 9 points is as high as 8.6 CSS pixels on a phone 390 wide
TEXT_SIZE, SMALL_SIZE = 9.0, 8.0  # points
STEPS = [1, 2, 2.5, 5, 10]
NUM_TICKS = 5  # at most, on an axis half as wide as the picture
RECIPE: dict[str, Any] = {"color": TRAIN_COLOR, "marker": "D", "markersize": 6, "zorder": 6}
BEST: dict[str, Any] = {"color": VAL_COLOR, "marker": "*", "markersize": 12, "zorder": 7}
RECIPE_LINE: dict[str, Any] = {"color": TRAIN_COLOR, "linewidth": 2.0, "linestyle": (0, (4, 1.5))}
BEST_LINE: dict[str, Any] = {"color": VAL_COLOR, "linewidth": 2.0}
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
    facts = StudyFacts(study, objective)
    figures = {
        "history": _draw_history(facts),
        "learning_curves": _draw_curves(facts),
        "slices": _draw_slices(facts),
        "parallel_coordinates": _draw_parallel(facts),
        "importance": _draw_importance(facts),
    }
    drawn = {}
    for name, figure in figures.items():
        if figure is not None:
            drawn[name] = folder / f"{name}.png"
            save_figure(figure, drawn[name])
    return drawn


def _page(title: str, height: float) -> Figure:
    """A figure with its title; `height` in inches."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor=PAPER, layout="constrained")
    cast(Any, figure.get_layout_engine()).set(w_pad=0.1, h_pad=0.08)  # inches
    text = "\n".join(textwrap.wrap(title, 52))
    figure.suptitle(text, x=0.02, ha="left", fontsize=10.5, weight="bold", color=INK, parse_math=False)
    return figure


def _chart(title: str, height: float, x_label: str = "") -> tuple[Figure, Axes]:
    """A figure of one chart; `x_label` names the whole numbers on its x axis."""
    figure = _page(title, height)
    axes = figure.add_subplot()
    style_chart(axes, STEPS)
    if x_label:
        axes.set_xlabel(x_label, fontsize=TEXT_SIZE, color=MUTED)
        axes.xaxis.set_major_locator(MaxNLocator(8, steps=STEPS, integer=True, min_n_ticks=1))
    return figure, axes


def _with_legend(figure: Figure, axes: Axes) -> Figure:
    """The figure, with what the axes label told below them."""
    handles, labels = axes.get_legend_handles_labels()
    kept = dict(zip(labels, handles, strict=True))
    style: dict[str, Any] = {"frameon": False, "fontsize": TEXT_SIZE, "labelcolor": INK}
    figure.legend(kept.values(), kept.keys(), loc="outside lower center", ncols=2, **style)
    return figure


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


def _mark(axes: Axes, places: Sequence[float], rows: Sequence[Row], facts: StudyFacts) -> None:
    """Marks every trial at its place on the x axis and its value; those without a value on the scale, at the edge."""
    low, high = axes.get_ylim()
    edge = 0.0 if facts.is_maximised else 1.0  # of the axes: where the bad values are
    inside: dict[str, list[tuple[float, float]]] = {kind: [] for kind in LOOKS}
    outside: dict[str, list[float]] = {kind: [] for kind in LOOKS}
    for place, row in zip(places, rows, strict=True):
        is_on_scale = row.counts and low <= row.value <= high
        if not is_on_scale and row is not facts.best:
            outside["off the scale" if row.counts else row.kind].append(place)
        elif row is not facts.best and not row.is_recipe:
            inside[row.kind].append((place, row.value))
    for kind, look in LOOKS.items():
        style = look | {"linestyle": "none", "label": kind, "clip_on": False, "zorder": 4}
        if inside[kind]:
            axes.plot(*zip(*inside[kind], strict=True), **style)
        if outside[kind]:
            axes.plot(outside[kind], [edge] * len(outside[kind]), transform=axes.get_xaxis_transform(), **style)
    for place, row in zip(places, rows, strict=True):
        for is_it, look, label in ((row.is_recipe, RECIPE, "recipe"), (row is facts.best, BEST, "best")):
            if is_it and low <= row.value <= high:
                axes.plot([place], [row.value], linestyle="none", label=label, clip_on=False, **look)


def _draw_history(facts: StudyFacts) -> Figure | None:
    rows = [row for row in facts.rows if row.kind not in {"running", "waiting"}]
    if not rows:
        return None
    figure, axes = _chart(f"Every trial's {facts.objective}", 3.6, "trial")
    axes.set_ylim(_limits((row.value for row in rows if row.counts), facts.is_maximised))
    complete = [row for row in rows if row.kind == "complete"]
    if complete:
        so_far = facts.sign * np.maximum.accumulate([facts.sign * row.value for row in complete])
        ends = [*(row.number for row in complete), rows[-1].number]
        axes.step(ends, [*so_far, so_far[-1]], where="post", color=VAL_COLOR, linewidth=1.4, label="best so far")
    if facts.recipe in complete:
        axes.axhline(facts.recipe.value, color=TRAIN_COLOR, linewidth=1, linestyle=(0, (4, 3)), label="recipe's value")
    _mark(axes, [row.number for row in rows], rows, facts)
    axes.margins(x=0.03)
    return _with_legend(figure, axes)


def _draw_curves(facts: StudyFacts) -> Figure | None:
    rows = [row for row in facts.rows if row.curve]
    if not rows:
        return None
    figure, axes = _chart(f"{capitalise(facts.objective)} over the epochs, all trials", 3.6, "epoch")
    looks: dict[str, dict[str, Any]] = {
        "other trials": {"color": MUTED, "linewidth": 0.8, "alpha": 0.55, "zorder": 2},
        "pruned": {"color": PALETTE[0], "linewidth": 1.0, "alpha": 0.9, "zorder": 3},
        "recipe": RECIPE_LINE | {"zorder": 5},
        "best": BEST_LINE | {"zorder": 6},
    }
    for row in rows:
        name = "best" if row is facts.best else "recipe" if row.is_recipe else row.kind
        name = name if name in looks else "other trials"
        axes.plot(list(row.curve), list(row.curve.values()), label=name, **looks[name])
        if row.kind == "pruned" or len(row.curve) == 1:
            marker = "v" if row.kind == "pruned" else "o"
            axes.plot(*list(row.curve.items())[-1], marker=marker, markersize=4, **looks[name])
    last = max(max(row.curve) for row in rows)
    # the first sixth is a climb that all share: it may run out of the picture, so that what differs is seen
    late = [value for row in rows for epoch, value in row.curve.items() if epoch >= last / 6]
    axes.set_ylim(_limits(late, facts.is_maximised))
    epochs = facts.epochs or last
    if epochs > 1:
        axes.axvline(epochs / 2, color=INK, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1, label="half-time")
    return _with_legend(figure, axes)


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
    values: list[Any] = []
    if isinstance(distribution, CategoricalDistribution):
        values = list(distribution.choices)
    else:
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        low, high = float(distribution.low), float(distribution.high)
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


def _draw_slices(facts: StudyFacts) -> Figure | None:
    rows = [row for row in facts.rows if row.kind not in {"running", "waiting", "failed for the machine"}]
    values = [row.value for row in rows if row.counts]
    if not facts.settings or not values:
        return None
    num_rows = math.ceil(len(facts.settings) / 2)
    figure = _page(f"{capitalise(facts.objective)} over each setting", 0.8 + 1.75 * num_rows)
    limits = _limits(values, facts.is_maximised)
    panels = figure.subplots(num_rows, 2, sharey=True, squeeze=False).ravel()
    for axes, (name, distribution) in zip(panels, facts.settings.items(), strict=False):
        style_chart(axes, STEPS)
        axes.set_ylim(limits)
        axes.set_xlim(-0.03, 1.03)
        places = [_place(row.settings.get(name), distribution) for row in rows]
        _mark(axes, places, rows, facts)
        axes.set_xticks(*zip(*_ticks(distribution), strict=True), parse_math=False)
        suffix = " (log)" if getattr(distribution, "log", False) else ""
        axes.set_title(f"{_cut(name, 28)}{suffix}", fontsize=TEXT_SIZE, color=INK, loc="left", parse_math=False)
    for axes in panels[len(facts.settings) :]:
        axes.set_visible(False)
    return _with_legend(figure, panels[0])


def _draw_parallel(facts: StudyFacts) -> Figure | None:
    complete = [row for row in facts.rows if row.kind == "complete"]
    if not facts.settings or len(complete) < 2:
        return None
    low, high = _limits((row.value for row in complete), facts.is_maximised)
    bottom = len(facts.settings)
    figure = _page(f"Settings and {facts.objective} of the complete trials", 1.2 + 0.62 * (bottom + 1))
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set(xlim=(-0.02, 1.02), ylim=(bottom + 0.42, -0.5))

    def path(row: Row) -> list[tuple[float, float]]:
        places = [_place(row.settings.get(name), distribution) for name, distribution in facts.settings.items()]
        places.append(min(1.0, max(0.0, (row.value - low) / (high - low))))
        return list(zip(places, range(bottom + 1), strict=True))

    # The best are drawn last, and darkest: cividis is the same with and without red-green vision.
    paths = [path(row) for row in sorted(complete, key=lambda row: facts.sign * row.value)]
    good = np.array([way[-1][0] for way in paths])
    alpha = min(0.75, max(0.2, 40 / len(paths)))  # hundreds of lines would become one patch
    lines = LineCollection(paths, cmap="cividis_r", linewidths=0.9, alpha=alpha, zorder=2)
    lines.set_array(good if facts.is_maximised else 1 - good)
    axes.add_collection(lines)
    axes.plot([], [], color="#0B2A5B", linewidth=1, label="the darker, the better")
    if facts.recipe in complete:
        axes.plot(*zip(*path(facts.recipe), strict=True), label="recipe", **RECIPE_LINE)
    if facts.best is not None:
        axes.plot(*zip(*path(facts.best), strict=True), label="best", **BEST_LINE)

    values = MaxNLocator(NUM_TICKS, steps=STEPS).tick_values(low, high)
    marks = [((value - low) / (high - low), f"{value:.4g}") for value in values if low <= value <= high]
    scales = [(name, _ticks(distribution)) for name, distribution in facts.settings.items()]
    box = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
    style: dict[str, Any] = {"bbox": box, "parse_math": False, "zorder": 8}
    for row_number, (name, ticks) in enumerate([*scales, (facts.objective, marks)]):
        axes.axhline(row_number, color=MUTED, linewidth=1, zorder=3)
        axes.text(-0.01, row_number - 0.12, _cut(name, 40), fontsize=TEXT_SIZE, weight="bold", color=INK, **style)
        for place, text in ticks:
            axes.plot([place], [row_number], marker="|", color=MUTED, markersize=6, zorder=3)
            axes.text(place, row_number + 0.12, text, fontsize=SMALL_SIZE, color=MUTED, ha="center", va="top", **style)
    return _with_legend(figure, axes)


def _draw_importance(facts: StudyFacts) -> Figure | None:
    shares = find_importances(facts.study)
    if not shares:
        return None
    num_trials = sum(row.kind == "complete" for row in facts.rows)
    title = f"Importance of the settings by fANOVA, resting on {num_trials} complete trials"
    figure, axes = _chart(title, 0.9 + 0.34 * len(shares))
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
