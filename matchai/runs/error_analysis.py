"""Why a slice scores badly, in words, from the counts of its own pixels."""

from collections.abc import Sequence

import numpy as np

from matchai.metrics import Counts, collapse, dice_per_class

SMALL = 0.005  # share of the slice's pixels below which a few wrong pixels decide the Dice
MINOR = 0.15  # share of the lost Dice below which a fault is left out
MOST_FAULTS = 3


def explain(confusion: Counts, class_names: Sequence[str], lesion_classes: Sequence[int]) -> str:
    """Says what costs a slice its lesion Dice, the costliest first, and whether the lesion is small.

    What a class loses to 1 is shared out between its missed and its falsely found pixels as their numbers are.

    Args:
        confusion: (C, C) counts of one slice, truth in rows.
        class_names: C names.
        lesion_classes: Indices of the classes that are lesions.

    Returns:
        Words such as "misses 62 % of 1,830 consolidation pixels, most of them called ground glass", without a full
        stop.
    """
    truth, num_pixels = confusion.sum(1), confusion.sum()
    shown = [c for c in lesion_classes if truth[c]]
    if not shown:
        return _explain_without_lesion(confusion, class_names, lesion_classes)
    dice = dice_per_class(confusion)
    wrong = confusion - np.diag(np.diagonal(confusion))
    faults: list[tuple[float, str, tuple[int, int]]] = []  # what it costs, in words, the cell most of it stands in
    for c in shown:
        missed, false = wrong[c].sum(), wrong[:, c].sum()
        cost = (1 - dice[c]) / max(missed + false, 1)
        if missed:
            name, destination = class_names[c], int(wrong[c].argmax())
            number = f"all {_pixels(truth[c], name)}" if missed == truth[c] else _share(missed, truth[c], name)
            words = f"misses {number}, {_mostly(wrong[c])} called {class_names[destination]}"
            faults.append((cost * missed, words, (c, destination)))
        if false:
            origin = int(wrong[:, c].argmax())
            words = f"takes {_pixels(false)} for {class_names[c]}, {_mostly(wrong[:, c])} {class_names[origin]}"
            faults.append((cost * false, words, (origin, c)))
    total = sum(cost for cost, _, _ in faults)
    told: dict[tuple[int, int], str] = {}
    for cost, words, cell in sorted(faults, key=lambda fault: -fault[0])[:MOST_FAULTS]:
        if cost >= MINOR * total:
            told.setdefault(cell, words)
    for c in (c for c in lesion_classes if not truth[c]):  # costs no Dice, as such a class has none here
        false, origin = wrong[:, c].sum(), int(wrong[:, c].argmax())
        if false and (not told or false >= MINOR * truth[shown].sum()):
            words = f"finds {_pixels(false, class_names[c])} where there are none, {_mostly(wrong[:, c])}"
            told.setdefault((origin, c), f"{words} {class_names[origin]}")
    reasons = [*told.values()] or ["every lesion pixel is right"]
    if truth[shown].sum() < SMALL * num_pixels:
        reasons.append(f"small lesion: {_pixels(truth[shown].sum())}")
    elif few := [_pixels(truth[c], class_names[c]) for c in shown if truth[c] < SMALL * num_pixels]:
        # a miss has told the number already
        few = [words for words in few if not any(words in reason for reason in reasons)]
        reasons += [f"only {' and '.join(few)}"] if few else []
    return "; ".join(reasons)


def _explain_without_lesion(confusion: Counts, class_names: Sequence[str], lesion_classes: Sequence[int]) -> str:
    found = confusion.sum(0)[list(lesion_classes)]
    if not found.sum():
        return "shows no lesion, and none is found"
    name = class_names[lesion_classes[int(found.argmax())]]
    return f"finds {_pixels(found.sum(), 'lesion')} where there are none, {_mostly(found)} called {name}"


def false_lesion(confusions: Counts, lesion_classes: Sequence[int]) -> Counts:
    """Counts the lesion pixels found in slices that show no lesion.

    Args:
        confusions: (N, C, C) counts of each slice.
        lesion_classes: Indices of the classes that are lesions.

    Returns:
        (N,) int64; 0 for a slice that shows one.
    """
    any_lesion = collapse(confusions, lesion_classes)
    return np.where(any_lesion[:, 0].sum(-1) == 0, any_lesion[:, 1, 0], 0)


def _mostly(numbers: Counts) -> str:
    share = numbers.max() / numbers.sum()
    return "all of them" if share == 1 else "most of them" if share > 0.5 else "the largest part of them"


def _pixels(number: int, kind: str = "") -> str:
    return f"{number:,} {kind}{' ' if kind else ''}pixel{'' if number == 1 else 's'}"


def _share(part: int, whole: int, kind: str) -> str:
    """A percentage that says neither 0 nor 100 for what is neither."""
    return f"{min(99, max(1, round(100 * part / whole)))} % of {_pixels(whole, kind)}"
