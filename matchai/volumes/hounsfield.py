"""Whether numbers can be Hounsfield units."""

import math


def implausible_range(
    what: str, low: float, high: float, hu_window: tuple[float, float], *, can_choose_window: bool = True
) -> str | None:
    """Tells why numbers are no HU in the window that is kept, or None where they may be.

    Args:
        what: What holds them, the begin of the sentence, such as a path.
        low: The smallest.
        high: The largest.
        hu_window: The range that is kept.
        can_choose_window: Whether the user may state another, as in training.

    Returns:
        A sentence with what was found, what was expected and how to mend it.
    """
    span = f"{what} holds values from {low:g} to {high:g}"
    if low == high:
        return f"{what} is constant: every pixel is {low:g}, so there is nothing to see."
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


def _offset(high: float) -> int | None:
    """What is usually taken from raw CT values to make HU; `high` is soft tissue or bone then, up to 4000 HU."""
    return next((offset for offset in (1024, 32768) if -24 <= high - offset <= 3976), None)
