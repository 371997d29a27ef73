"""What a run came to and what its figures do not say, in sentences, for its report and its model card."""

from collections.abc import Iterator, Sequence

import numpy as np

from matchai.metrics import MAX_UNDEFINED
from matchai.runs.facts import ALL_CLASSES, LESION_CLASSES, RunFacts
from matchai.system import plural

FEW_SLICES, FEW_GROUPS = 50, 10


def limits(facts: RunFacts) -> Iterator[str]:
    """What keeps the figures from meaning more than they do, in sentences."""
    settings, num_groups, num_slices = facts.config.input, facts.num_val_groups, len(facts.val)
    if facts.is_synthetic:
        yield "The slices are the built-in synthetic phantom: the figures say nothing about patients."
    elif facts.grouping == "found":
        yield (
            "The split divides no group, but the groups were found by likeness, which cannot tell patients: one "
            "patient may be on both sides, and the figures may be too good."
        )
    elif facts.grouping == "volumes":
        yield (
            "The split divides no volume; where a patient has several, they may be on both sides, and the figures may "
            "be too good. A groups file that names the patients prevents it."
        )
    else:
        yield f"The split divides no group; {settings.groups_name} says what a group is."
    if len(facts.history) > 1:
        yield (
            f"The same validation slices chose the best of {plural(len(facts.history), 'epoch')}, so the figures "
            "flatter it. Slices that took no part tell more: python -m matchai.evaluate."
        )
    easy = [name for name in facts.class_names if name not in settings.lesion_classes]
    yield (
        f"The mean Dice counts {enumerate_names(easy)} too, which are easy; the lesion Dice is the mean over "
        f"{enumerate_names(settings.lesion_classes)}. "
        "Both are pooled: the pixels of all slices are added up before dividing, so large lesions weigh more."
    )
    if facts.confusions is not None and num_groups < 2:
        yield "There is no interval, as all validation slices are of one group: more groups give one."
    elif num_groups < FEW_GROUPS:
        yield (
            f"{plural(num_groups, 'group')} in the validation are few: an interval from them is rough, and rather too "
            "narrow."
        )
    if num_slices < FEW_SLICES:
        yield f"{plural(num_slices, 'validation slice')} are few: a single one moves the figures."
    for one in facts.class_scores[: len(facts.class_names)]:
        if np.isnan(one.scores["Dice"].value):
            yield (
                f"No validation slice shows {one.name}: its Dice is undefined and left out of the means, which says "
                "nothing of how well it is found."
            )
        elif one.num_slices is not None and one.num_slices < min(10, num_slices / 2):
            yield f"Only {plural(one.num_slices, 'validation slice')} show{'s' * (one.num_slices == 1)} {one.name}."
        left_out = one.scores["Dice"].undefined
        if one.scores["Dice"].has_interval and left_out > MAX_UNDEFINED:
            yield (
                f"The interval of {one.name} rests on {100 * (1 - left_out):.0f} % of the resamples: in the others no "
                "group shows it."
            )
    yield (
        f"It is one run with one seed, measured at {settings.image_size} × {settings.image_size} pixels, not at the "
        "size of the files; scanners, hospitals and diseases that the data does not hold are untried. For research "
        "only, not for the care of patients."
    )


def format_result(facts: RunFacts) -> str:
    """The figures in one sentence without its first word: "mean Dice 0.8 (...), lesion Dice ..."."""
    mean, lesion = facts.score(ALL_CLASSES), facts.score(LESION_CLASSES)
    confidence = f"{'rough ' * (facts.num_val_groups < FEW_GROUPS)}95 % interval "
    means = f"mean Dice {mean.format(confidence)}, lesion Dice {lesion.format()}"
    groups = f" in {plural(facts.num_val_groups, 'group')}"
    return f"{means}, pooled over {plural(len(facts.val), 'validation slice')}{groups} of {facts.source}"


def enumerate_names(names: Sequence[str]) -> str:
    """The names as in a sentence: "a, b and c"."""
    return " and ".join([*([", ".join(names[:-1])] if len(names) > 1 else []), *names[-1:]]) or "no class"
