"""Which slices of a data set a run has not seen in training, and so may be judged by."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from matchai.settings import parsing
from matchai.system import InputError

UNSEEN, VALIDATION, TRAINING = "other data", "validation", "training"
"""What a run did with a slice."""


@dataclass(frozen=True)
class Choice:
    """Which slices are evaluated.

    Attributes:
        rows: Their places among all slices of the data.
        sides: (N,) of all slices, what the runs did with each.
        name: What slices they are, in two or three words.
        statement: The same in a sentence, with how far the figures can be trusted.
        groups: (N,) the groups of the run's own data; None for other data.
    """

    rows: NDArray[np.int64]
    sides: list[str]
    name: str
    statement: str
    groups: NDArray[np.int64] | None


def choose_slices(runs: Sequence[Path], image_digests: dict[str, str], num_slices: int, wanted: str) -> Choice:
    """Chooses the slices to evaluate; without a word, none that any of the runs was trained on.

    Args:
        runs: Folders of the runs.
        image_digests: SHA-256 of every image file, in order, under the names that runs record them by.
        num_slices: N, of all image files together.
        wanted: `auto`, `val`, `train` or `all`.

    Raises:
        InputError: If there are no such slices.
    """
    sides, groups, overlap = [UNSEEN] * num_slices, None, ""
    for run in runs:
        recorded = parsing.load_recorded(run / "config.yaml").get("data", {})
        known = [name for name, digest in image_digests.items() if digest in recorded.values()]
        split = _read_split(run)
        # the split counts slices over all files, in the order in which the run recorded them
        recorded_images = [(name, digest) for name, digest in recorded.items() if name in image_digests]
        if recorded_images != list(image_digests.items()) or len(split["groups"]) != num_slices:
            if known and wanted != "all":
                raise InputError(
                    f"{known[0]} is among the files that {run} was trained on, but the data is another as a whole, so "
                    "the run's split does not tell which slices it has seen: give the run's own data, or other data, "
                    "or --slices all, whose figures then flatter."
                )
            overlap = overlap or (known[0] if known else "")
            continue
        groups = np.asarray(split["groups"], np.int64)
        for row in split["val"]:
            sides[row] = VALIDATION if sides[row] == UNSEEN else sides[row]
        for row in split["train"]:
            sides[row] = TRAINING
    if wanted in ("val", "train") and groups is None:
        raise InputError(
            f"--slices {wanted} is for the data that the run was trained on, but this is other data; leave it out to "
            "evaluate all of it."
        )
    side = {"auto": UNSEEN if groups is None else VALIDATION, "val": VALIDATION, "train": TRAINING}.get(wanted)
    rows = np.array([row for row, one in enumerate(sides) if side in (one, None)], np.int64)
    if not len(rows):
        raise InputError(
            f"No slice of this data is {side} for all {len(runs)} runs, as each was trained on slices that another "
            "validates; evaluate them one by one, or on other data."
        )
    return Choice(rows, sides, *_describe(side, sides.count(TRAINING), overlap, len(runs)), groups)


def _read_split(run: Path) -> dict[str, list[int]]:
    try:
        split = json.loads((run / "split.json").read_text(encoding="utf-8"))
        return {name: split[name] for name in ("train", "val", "groups")}
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{run / 'split.json'} does not tell the run's split, so nobody knows which slices the run has seen; the "
            "same training command writes it again."
        ) from None


def _describe(side: str | None, num_trained: int, overlap: str, num_runs: int) -> tuple[str, str]:
    """Name and statement."""
    whose = "the run's own" if num_runs == 1 else "the runs' own"
    if side == VALIDATION:
        return (
            "validation slices",
            f"{whose} validation slices alone; its training slices are left out. Validation also chose the best epoch, "
            "which flatters a little.",
        )
    if side == TRAINING:
        return "TRAINING slices", f"{whose} TRAINING slices: these figures say nothing of new slices."
    if num_trained or overlap:
        which = f"{num_trained} of them TRAINING slices" if num_trained else f"TRAINING slices of {overlap} among them"
        return "TRAINING and other slices", f"all slices, {which}: these figures flatter."
    whose = "the run's" if num_runs == 1 else "the runs'"
    return (
        "other data",
        f"all slices; by their hashes the files are none of {whose} training, which tells nothing of copies, or of "
        "other slices of the same patients.",
    )
