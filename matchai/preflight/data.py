"""What a data set holds: values, classes, groups, slices that are on both sides of a split."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from matchai.data import ArraySet, Data, SliceSet, find_groups
from matchai.preflight.software import Finding
from matchai.system import plural, preparing_threads
from matchai.volumes import format_shape

NUM_BINS = 50
NUM_OPENED = 10  # sets whose values are counted: a compressed volume takes a second to open
NUM_READ = 100  # slices whose values are counted, evenly over these sets
NUM_NAMED = 10
NUM_SHOWN = 8
INDENT = " " * 9
_BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Values:
    """The values of pixels.

    Attributes:
        low: The lowest.
        high: The highest.
        counts: (NUM_BINS,) int64, pixels in equal steps of the window.
        below: Pixels below the window.
        above: Pixels above it.
        num_slices: Slices that were read.
    """

    low: float
    high: float
    counts: NDArray[np.int64]
    below: int
    above: int
    num_slices: int

    @property
    def num_pixels(self) -> int:
        """Pixels counted."""
        return int(self.counts.sum()) + self.below + self.above

    def bars(self) -> str:
        """The histogram as a line of text, a letter a step; its tallest bar is the most frequent step."""
        heights = np.ceil(self.counts / max(int(self.counts.max()), 1) * (len(_BARS) - 1)).astype(int)
        return "".join(_BARS[height] for height in heights)


def count_values(sets: Sequence[SliceSet], hu_window: tuple[float, float]) -> Values:
    """Counts the values of at most `NUM_READ` slices, evenly spread over at most `NUM_OPENED` sets.

    Args:
        sets: The opened sets; they are closed.
        hu_window: The range of the histogram.
    """
    chosen = [sets[number] for number in _spread(len(sets), NUM_OPENED)]
    places = [(one, index) for one in chosen for index in range(len(one))]

    def count(place: int) -> tuple[float, float, NDArray[np.int64], int, int]:
        one, index = places[place]
        image = one.read_image(index)
        counts, _ = np.histogram(image, NUM_BINS, hu_window)
        below, above = int((image < hu_window[0]).sum()), int((image > hu_window[1]).sum())
        return float(image.min()), float(image.max()), counts.astype(np.int64), below, above

    read = _spread(len(places), NUM_READ)
    with ThreadPoolExecutor(preparing_threads()) as pool:
        lows, highs, counts, below, above = zip(*pool.map(count, read), strict=True)
    for one in chosen:
        one.close()
    return Values(min(lows), max(highs), np.sum(counts, axis=0), sum(below), sum(above), len(read))


def check_values(values: Values, hu_window: tuple[float, float]) -> Finding:
    """The range of the values, with a histogram in letters below."""
    low, high = hu_window
    below, above = (f"{count / values.num_pixels:.1%}" for count in (values.below, values.above))
    text = (
        f"Values: {values.low:g} to {values.high:g} HU in {plural(values.num_slices, 'slice')}; {below} of the pixels "
        f"lie below the window and {above} above it. Between {low:g} and {high:g} HU:"
    )
    return Finding("ok", text, lines=[f"{INDENT}|{values.bars()}|"])


def class_table(data: Data, class_names: Sequence[str]) -> list[str]:
    """Lines of a table: each class, its pixels at training size, their share, and the slices that show it."""
    pixels = np.asarray(data.slices.pixels)
    presence, totals = pixels > 0, pixels.sum(axis=0)
    width = max(len("class"), *map(len, class_names))
    lines = [
        f"{INDENT}{'class':<{width}}  {'pixels':>15}  {'share':>7}  {'training slices':>15}  {'validation slices':>17}"
    ]
    for c, name in enumerate(class_names):
        in_train, in_val = (int(presence[side, c].sum()) for side in (data.train, data.val))
        share = totals[c] / totals.sum()
        lines.append(f"{INDENT}{name:<{width}}  {totals[c]:>15,}  {share:>7.2%}  {in_train:>15,}  {in_val:>17,}")
    return lines


def check_split(data: Data) -> list[Finding]:
    """Groups and their sides; look-alikes that are on both sides of the split, which equal slices never are."""
    sides = [np.unique(data.groups[side]) for side in (data.train, data.val)]
    train_groups = f"{len(data.train)} training slices in {plural(len(sides[0]), 'group')}"
    text = f"Split: {train_groups}, {len(data.val)} validation slices in {len(sides[1])}"
    remedy = "the figures have no interval; give groups.npy if these are several patients, or another --seed"
    split = Finding("warning", text, remedy) if len(sides[1]) < 2 else Finding("ok", text)
    alike = find_groups(data.slices.thumbnails, np.asarray(data.slices.sets)).groups
    torn = np.intersect1d(alike[data.train], alike[data.val])
    if len(torn):
        look_alikes = f"{np.isin(alike, torn).sum()} slices in {plural(len(torn), 'set')} of neighbours"
        text = f"Look-alikes: {look_alikes} or near-duplicates are on both sides of the split"
        remedy = "check groups.npy: slices of one patient or volume must have one group"
        return [split, Finding("warning", text, remedy)]
    return [split, Finding("ok", "Duplicates: no slice, and none that looks alike, is on both sides of the split")]


def check_sampler(
    presence: NDArray[np.bool_], target_classes: Sequence[int], names: Sequence[str], sampler_weight: float
) -> Finding:
    """What the weighted draw changes.

    Args:
        presence: (N, C) bool, whether class c appears in training slice n.
        target_classes: Indices of the classes that make a slice a target.
        names: Their names.
        sampler_weight: How many times as often a target slice is drawn as another.
    """
    share = float(presence[:, list(target_classes)].any(axis=1).mean())
    drawn = share * sampler_weight / (share * sampler_weight + 1 - share)
    text = f"Sampler: {share:.0%} of the training slices show {' or '.join(names)}; of the draws {drawn:.0%} will"
    if share in (0.0, 1.0) and sampler_weight != 1:
        return Finding("warning", f"{text}, as without weights", "choose other --target-classes")
    return Finding("ok", text)


def choose_slices(data: Data, lesion_classes: Sequence[int]) -> list[int]:
    """At most `NUM_SHOWN` slices over all groups, of each the one with most lesion, in order."""
    lesion = np.asarray(data.slices.pixels)[:, list(lesion_classes)].sum(axis=1)
    groups = np.unique(data.groups)
    chosen = [groups[number] for number in _spread(len(groups), NUM_SHOWN)]
    best = [max(np.flatnonzero(data.groups == group), key=lambda index: lesion[index]) for group in chosen]
    rest = [index for index in np.argsort(-lesion, kind="stable") if index not in best]
    return sorted(int(index) for index in [*best, *rest][:NUM_SHOWN])


def _spread(length: int, most: int) -> list[int]:
    """At most so many numbers below `length`, evenly spread, with the first and the last."""
    return sorted(set(np.linspace(0, length - 1, min(most, length)).round().astype(int).tolist()))


def describe_sets(sets: Sequence[SliceSet]) -> Finding:
    """How many slices there are, with a line a set: its slices, their size, and how they are stored."""
    lines = []
    for one in sets[:NUM_NAMED]:
        height, width = one.shape
        kind = f", {one.images.dtype} images, {one.masks.dtype} masks" if isinstance(one, ArraySet) else ""
        grid = f", {format_shape(one.spacing, 'g')} mm" if one.spacing else ""
        lines.append(f"{INDENT}{one.name}: {plural(len(one), 'slice')} of {height} x {width} pixels{kind}{grid}")
    if sets[NUM_NAMED:]:
        lines.append(f"{INDENT}and {len(sets) - NUM_NAMED} more")
    return Finding("ok", f"Data: {plural(sum(map(len, sets)), 'slice')} in {plural(len(sets), 'set')}:", lines=lines)
