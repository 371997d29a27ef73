"""What no run could take, told before anything is done: every wrong setting in a sentence."""

import difflib
import math
import re

from matchai.settings.config import LEAVES, TrainConfig
from matchai.settings.label_map import parse_label_map
from matchai.system import InputError


def check(config: TrainConfig) -> list[str]:
    """Every setting that no run could take, one sentence each; an empty list where all is well."""
    problems = _check_ranges(config) + _check_classes(config) + _check_pixels(config)
    if config.loss.ce_weight + config.loss.dice_weight + config.loss.focal_weight == 0:
        problems.append("ce_weight, dice_weight and focal_weight are all 0, so there is nothing to learn from.")
    folds, fold = config.input.folds, config.input.fold
    if folds == 1:
        problems.append("folds is 1, but K-fold needs 2 or more (0: one split).")
    if fold and fold >= max(folds, 1):
        problems.append(
            f"fold is {fold}, but folds is {folds}, and folds count from 0: give --folds, or a lower --fold."
        )
    if config.input.image_size % 32:
        size = config.input.image_size
        near_sizes = sorted({min(max(32, near), 4096) for near in (size // 32 * 32, -(-size // 32) * 32)})
        problems.append(
            f"image_size is {size}, but the encoder halves it five times, so it must be a multiple of 32: "
            f"the nearest are {' and '.join(map(str, near_sizes))}."
        )
    try:
        parse_interval(config.machine.save_every)
    except InputError as error:
        problems.extend(error.problems)
    return problems


def _check_ranges(config: TrainConfig) -> list[str]:
    values = config.flat()
    problems = []
    for name, (_, leaf) in LEAVES.items():
        value, limits = values[name], leaf.metadata
        if (
            limits
            and value is not None
            and not (limits["low"] <= value <= limits["high"] and value > limits["above"] and math.isfinite(value))
        ):
            low = f"above {limits['above']:g}" if limits["above"] > -math.inf else f"at least {limits['low']:g}"
            high = f" and at most {limits['high']:g}" if limits["high"] < math.inf else ""
            problems.append(f"{name} is {value}, but must be {low}{high}.")
    return problems


def _check_classes(config: TrainConfig) -> list[str]:
    problems = []
    names = config.input.class_names
    if len(names) < 2 or len(set(names)) < len(names) or "" in names:
        problems.append(f"class_names are {list(names)}, but must be two or more different names in channel order.")
    if not config.input.lesion_classes:
        problems.append("lesion_classes is empty, so there would be no lesion Dice: name one class or more.")
    chosen = [("background_class", config.input.background_class)]
    chosen += [("lesion_classes", name) for name in config.input.lesion_classes]
    chosen += [("target_classes", name) for name in config.sampling.target_classes]
    for setting, name in chosen:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"the classes are {', '.join(names)}."
            problems.append(f"{setting} names {name!r}, which is no class: {hint}")
    try:
        parse_label_map(config.input.label_map, names)
    except InputError as error:
        problems.extend(error.problems)
    return problems


def _check_pixels(config: TrainConfig) -> list[str]:
    problems = []
    lowest, highest = config.input.hu_window
    if not (math.isfinite(lowest) and math.isfinite(highest) and lowest < highest):
        problems.append(f"hu_window is {lowest:g} to {highest:g}, but must rise from a lower to a higher value in HU.")
    slope, intercept = config.input.rescale
    if not (math.isfinite(slope) and math.isfinite(intercept) and slope):
        problems.append(
            f"rescale is {slope:g} {intercept:g}, but must be two finite numbers, the first not 0: "
            "HU = slope * number + intercept."
        )
    return problems


def parse_interval(text: str) -> tuple[float, float]:
    """Reads `save_every`: returns (seconds, steps), the one that is not asked for infinite.

    Raises:
        InputError: For anything but a positive number of steps, or of seconds (`s`) or minutes (`min`).
    """
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(s|min)|([0-9]{1,9})", text.strip())
    if found and float(found[1] or found[3]) > 0:
        seconds = {"s": 1.0, "min": 60.0}.get(found[2])
        return (float(found[1]) * seconds, math.inf) if seconds else (math.inf, float(found[3]))
    raise InputError(
        f"save_every is {text!r}, but must be a time such as 60s or 5min, or a number of steps such as 200."
    )
