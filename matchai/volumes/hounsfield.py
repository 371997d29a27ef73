"""Whether numbers can be Hounsfield units, and which of them are padding that no scanner measured."""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

AIR = -1000.0
"""Air in HU, which padding is taken for."""

PADDING = -1500.0
"""HU below which there is no matter. Scanners fill what lies outside their circle with -2000, -2048 or -3024; noise in
air stays above -1300."""

_BIN = 64  # numbers in a bin of a histogram
_REACH = 4096  # the histogram spans -4096 to 4096, with one more bin at either end for what lies beyond
_POPULATED = 0.001  # share of the pixels from which on a bin counts; the blur around padding fills its bins with less
_APART = 4  # bins without pixels that tell padding from the body of the histogram
_LOW_AIR, _HIGH_AIR = -1100.0, -900.0
_DENSE, _MOST_DENSE = 600.0, 0.1  # HU of bone, whose share is below this; raw values of any tissue lie near 1050
_MOST_HU = 32767.0  # scanners with an extended scale reach 30710
_BONE, _MOST_METAL = 1500.0, 0.01  # HU that bone stays below, and the share of pixels that metal does


@dataclass(frozen=True)
class ValueCounts:
    """What numbers some pixels hold.

    Attributes:
        low: The smallest.
        high: The largest.
        kept_low: The smallest that is no padding, infinite where all are.
        num_high: Pixels of the largest.
        num_padding: Pixels below `PADDING`, or below the window where it begins lower.
        counts: (130,) int64, pixels in bins 64 wide from -4096 to 4096, and beyond either end.
    """

    low: float
    high: float
    kept_low: float
    num_high: int
    num_padding: int
    counts: NDArray[np.int64]

    @staticmethod
    def total(parts: "Iterable[ValueCounts]") -> "ValueCounts":
        """The numbers of several images."""
        return functools.reduce(ValueCounts.__add__, parts)

    def __add__(self, other: "ValueCounts") -> "ValueCounts":
        low, high, kept = min(self.low, other.low), max(self.high, other.high), min(self.kept_low, other.kept_low)
        num_high = sum(one.num_high for one in (self, other) if one.high == high)
        padding = self.num_padding + other.num_padding
        return ValueCounts(low, high, kept, num_high, padding, self.counts + other.counts)

    def padding_note(self) -> str | None:
        """A sentence about the padding; None where there is none."""
        if not self.num_padding:
            return None
        return (
            f"{_percent(self.num_padding / self.counts.sum())} of the pixels lie below {PADDING:g} HU (down to "
            f"{self.low:g}), as scanners fill what is outside their circle; they are taken as air ({AIR:g} HU)."
        )


def count_values(image: NDArray[Any], hu_window: tuple[float, float]) -> ValueCounts:
    """Counts the numbers of an image.

    Args:
        image: Pixels of any shape, finite.
        hu_window: The range that is kept.
    """
    places = np.clip(np.floor_divide(image, _BIN) + (_REACH // _BIN + 1), 0, 2 * _REACH // _BIN + 1)
    counts = np.bincount(places.ravel().astype(np.int64), minlength=2 * _REACH // _BIN + 2)
    is_kept = image >= min(PADDING, hu_window[0])
    low, high, num_kept = float(image.min()), float(image.max()), int(is_kept.sum())
    kept_low = low if num_kept == image.size else float(np.min(image, where=is_kept, initial=math.inf))
    return ValueCounts(low, high, kept_low, int((image == high).sum()), image.size - num_kept, counts)


def replace_padding(image: NDArray[np.float32], hu_window: tuple[float, float]) -> NDArray[np.float32]:
    """Pixels in HU with air in place of padding; the same array where there is none.

    Args:
        image: (..., H, W) in HU.
        hu_window: The range that is kept; what lies in it is no padding.
    """
    is_padding = image < min(PADDING, hu_window[0])
    return np.where(is_padding, np.float32(AIR), image) if is_padding.any() else image


def implausible_values(
    what: str, values: ValueCounts, hu_window: tuple[float, float], *, can_choose_window: bool = True
) -> str | None:
    """Tells why numbers are no HU in the window that is kept, or None where they may be.

    What decides is the body of the histogram: padding far below it says nothing of the other numbers.

    Args:
        what: What holds them, the begin of the sentence, such as a path.
        values: What they are.
        hu_window: The range that is kept.
        can_choose_window: Whether the user may state another, as in training.

    Returns:
        A sentence with what was found, what was expected and how to mend it.
    """
    span = f"{what} holds values from {values.low:g} to {values.high:g}"
    if values.low == values.high:
        return f"{what} is constant: every pixel is {values.low:g}, so there is nothing to see."
    low, high, first, counts = *_body(values), values.counts
    if low > values.low:
        share = max(values.num_padding, counts[:first].sum()) / counts.sum()
        is_air = values.low >= _LOW_AIR and low - _BIN > _HIGH_AIR and hu_window[0] < _HIGH_AIR
        if is_air and low < 0 and _is_tissue(counts[first:], first):
            return None
        span += f" ({_percent(share)} of the pixels are below {low:g}, apart from the others, as padding is)"
    if problem := _explain_range(span, float(low), float(high), hu_window, can_choose_window):
        return problem
    return _explain_high(what, values, hu_window)


def raw_slice(values: ValueCounts, hu_window: tuple[float, float]) -> bool:
    """Whether one slice looks like raw CT values without their offset, which may hide among slices in HU."""
    low, _, first = _body(values)
    return hu_window[0] <= -500 and low >= 0 and not _is_tissue(values.counts[first:], first)


def _explain_high(what: str, values: ValueCounts, hu_window: tuple[float, float]) -> str | None:
    """Tells of padding above: no patient's pixels in such number are above any bone, or hold one very high number."""
    total = values.counts.sum()
    share_beyond, share_high = values.counts[-1] / total, values.num_high / total
    is_beyond = values.high > _MOST_HU or share_beyond > _MOST_METAL
    if values.high <= hu_window[1] or not (is_beyond or (values.high > _BONE and share_high > _MOST_METAL)):
        return None
    return (
        f"{what} holds values up to {values.high:g} ({_percent(max(share_beyond, share_high))} of the pixels), as no "
        f"patient does: padding that is not declared as such, or damage. Set these pixels to {AIR:g} HU (air)."
    )


def _body(values: ValueCounts) -> tuple[float, float, int]:
    """The lowest and the highest number of the histogram's body, and its first bin."""
    counts, low, high = values.counts.copy(), values.low, values.high
    first = 0
    if values.num_padding and math.isfinite(values.kept_low):  # what becomes air says nothing of the others
        low, first = values.kept_low, max(0, int(values.kept_low // _BIN) + _REACH // _BIN + 1)
        counts[:first] = 0
    begin, end = _apart(counts)
    if begin > first and low < (begin - 1) * _BIN - _REACH:
        low, first = (begin - 1) * _BIN - _REACH, begin
    if end < len(counts) - 1:
        high = min(high, end * _BIN - _REACH)
    return float(low), float(high), first


def _apart(counts: NDArray[np.int64]) -> tuple[int, int]:
    """The first and the last bin of what is not apart, without bins of a few pixels below."""
    populated = np.flatnonzero(counts >= max(1.0, _POPULATED * counts.sum()))
    first, last = 0, len(counts) - 1
    if len(populated) and counts[: populated[0]].sum() < _MOST_METAL * counts.sum():  # a few pixels say nothing
        first = int(populated[0])
    if len(populated) > 1:
        # padding is one number, which a change of unit or lossy packing spreads a little
        end = next((k for k in range(1, min(3, len(populated))) if populated[k] - populated[k - 1] > _APART), 0)
        first, populated = (int(populated[end]) if end else first), populated[end:]
    while len(populated) > 1 and populated[-1] == len(counts) - 1 and populated[-1] - populated[-2] > _APART:
        populated = populated[:-1]
        last = int(populated[-1])
    return first, last


def _is_tissue(counts: NDArray[np.int64], first: int) -> bool:
    """Whether a body of bins from number `first` on can be tissue alone, with air of one number around it."""
    above = counts[max(0, int(_DENSE + _REACH) // _BIN + 1 - first) :].sum()
    return bool(above < _MOST_DENSE * counts.sum())


def _explain_range(
    span: str, low: float, high: float, hu_window: tuple[float, float], can_choose_window: bool
) -> str | None:
    window = f"the window of {hu_window[0]:g} to {hu_window[1]:g} HU"
    is_outside = high <= hu_window[0] or low >= hu_window[1]
    is_narrow = high - low < (hu_window[1] - hu_window[0]) / 4
    has_no_lung = hu_window[0] <= -500 < low
    if not (is_outside or is_narrow or has_no_lung):
        return None
    if low >= 0 and (offset := _offset(high)):
        return (
            f"{span}, which look like raw CT values without their offset (lung lies near -850 HU): {window} would lose "
            f"them. If HU is the value - {offset}, give --rescale 1 -{offset}; else --rescale SLOPE INTERCEPT."
        )
    if is_outside:
        return f"{span}, all outside {window}; make HU of them with --rescale SLOPE INTERCEPT" + (
            ", or state the range to keep with --hu-window LOW HIGH." if can_choose_window else "."
        )
    kinds = {1.5: "an image scaled to 0..1", 255: "8-bit grey values", math.inf: "16-bit grey values"}
    positive = next(kind for most, kind in kinds.items() if high <= most)
    kind = f"{positive}, not HU" if low >= 0 else "values that are no Hounsfield units"
    return (
        f"{span}, which look like {kind} (lung lies near -850): {window} would lose them. Make HU of them with "
        "--rescale SLOPE INTERCEPT (HU = SLOPE * number + INTERCEPT)"
        + (f", or state the range to keep with --hu-window {low:g} {high:g}." if can_choose_window else ".")
    )


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else "below 0.1 %"


def _offset(high: float) -> int | None:
    """What is usually taken from raw CT values to make HU; `high` is soft tissue or bone then, up to 4000 HU."""
    return next((offset for offset in (1024, 32768) if -24 <= high - offset <= 3976), None)
