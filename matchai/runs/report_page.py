"""The report of a run: what it came to, within which limits, where it is bad and why, and how to repeat it."""

import shlex
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from matchai.drawing import Answer, Code, Picture, Piece, Points, Section, Table, Text, render_page
from matchai.metrics import ANY_LESION, NUM_RESAMPLES
from matchai.runs.error_analysis import explain, false_lesion
from matchai.runs.facts import ALL_CLASSES, LESION_CLASSES, METRICS, RunFacts, rank_by_lesion_dice
from matchai.runs.limits import format_result, limits
from matchai.settings import FREE, LEAVES, PLACE, TrainConfig
from matchai.system import plural, write_whole

PAGE = "report.html"
NUM_WORST = 8
PICTURE_WIDTH = 820  # CSS pixels


def write_page(facts: RunFacts, path: Path, *, redraw: bool = True) -> None:
    """Writes the report, whole; its folder must exist.

    Args:
        facts: Of the run.
        path: The HTML file.
        redraw: Draws what the history alone gives again for the page, as the pictures in the folder may be older.
    """
    write_whole(path, render(facts, read_pictures(facts, redraw=redraw)))


def read_pictures(facts: RunFacts, *, redraw: bool) -> dict[str, bytes]:
    """The run's pictures, PNGs by name; those that need no slices drawn again where that is asked for."""
    pictures = {path.stem: path.read_bytes() for path in sorted((facts.folder / "figures").glob("*.png"))}
    if redraw and facts.history:
        # matplotlib takes half a second to import
        from matchai.runs.figures import draw_charts  # noqa: PLC0415

        with tempfile.TemporaryDirectory() as beside:
            epoch = facts.best["epoch"] if facts.best else None
            draw_charts(Path(beside), facts.history, facts.confusions, facts.config, epoch=epoch)
            pictures |= {path.stem: path.read_bytes() for path in Path(beside).glob("*.png")}
    return pictures


def render(facts: RunFacts, pictures: Mapping[str, bytes]) -> str:
    """Makes the page.

    Args:
        facts: Of the run.
        pictures: PNGs by the names that `matchai.runs.figures` gives them; those that are missing are left out.

    Returns:
        The whole HTML text.
    """
    epoch = f"at epoch {facts.best['epoch']}" if facts.best else ""
    sections = [
        Section("", [_answer(facts), *([Text(_reading(facts))] if facts.best else [])]),
        Section("What the figures are, and their limits", [Points([*limits(facts)])]),
        Section("Learning curves", _picture(facts, pictures, "learning_curves")),
        Section(f"Each class {epoch}", [*_classes(facts), *_picture(facts, pictures, "confusion_matrix")]),
        Section("Typical slices", _picture(facts, pictures, "panels")),
        Section(f"The worst slices {epoch}, and why", _worst(facts, pictures)),
        Section("How to use it", [Text("For research only; the limits stand above."), Code(_usage(facts))]),
        Section("How to repeat it", _repetition(facts)),
        Section("Settings that differ", _differences(facts)),
        Section("Dice of each class by epoch", _picture(facts, pictures, "dice_per_class"), is_folded=True),
        Section("All epochs", _epochs(facts), is_folded=True),
        Section("All settings", [_settings(facts.config)], is_folded=True),
        Section("Data, versions, machine and times", [Table(["what", "value"], _provenance(facts))], is_folded=True),
    ]
    size = facts.config.input.image_size
    subtitle = (
        f"UNet++ with {facts.config.network.encoder} · {size} × {size} pixels · {facts.source} · "
        f"{len(facts.train)} training and {len(facts.val)} validation slices"
    )
    return render_page(f"Run {facts.name}", subtitle, [section for section in sections if section.pieces])


def _answer(facts: RunFacts) -> Answer:
    epochs = facts.config.optimisation.epochs
    if facts.best is None:
        return Answer("No epoch is finished yet: there is nothing to report.", "open")
    note = " That is no patient's data." if facts.is_synthetic else ""
    epoch, result = facts.best["epoch"], format_result(facts)
    if not facts.is_finished:
        done = f"Unfinished, {len(facts.history)} of {plural(epochs, 'epoch')}"
        return Answer(f"{done}; the best so far is epoch {epoch}: {result}.{note}", "open")
    return Answer(f"The best of {plural(epochs, 'epoch')} is epoch {epoch}: {result}.{note}")


def _reading(facts: RunFacts) -> str:
    any_lesion = facts.score(ANY_LESION)
    told = f"Any lesion against the rest: Dice {any_lesion.format()}. " if not np.isnan(any_lesion.value) else ""
    if facts.confusions is None:
        return (
            told
            + "The counts of each slice are not in the folder (last/), so there are no intervals, no precision and "
            "recall, and no worst slices."
        )
    if not facts.score(ALL_CLASSES).has_interval:
        return told + "Where no interval is told, fewer than two groups have a value of the figure."
    return (
        f"{told}In brackets the 95 % interval by a bootstrap over groups ({NUM_RESAMPLES:,} resamples): how far the "
        "figure would move with other groups of the same kind, not with other seeds or other scanners."
    )


def _classes(facts: RunFacts) -> list[Piece]:
    if not facts.class_scores:
        return []
    num_all = 0 if facts.confusions is None else int(facts.confusions.sum())
    head = ["class", *METRICS, "true pixels", "in slices"][: 3 if facts.confusions is None else None]
    lines = []
    for one in facts.class_scores:
        size = ["–", "–"]
        if one.num_pixels is not None and num_all:
            share = one.num_pixels / num_all
            size = [f"{one.num_pixels:,} ({100 * share:.2f} %)", f"{one.num_slices} of {len(facts.val)}"]
        lines.append([one.name, *map(one.format, METRICS), *size][: len(head)])
    caption = (
        "Pooled over the pixels of all validation slices, in brackets the 95 % interval. Recall: the share of the true "
        "pixels that was found; precision: the share of the found pixels that is true. A class without a true pixel "
        "has no Dice, IoU and recall, one that is never predicted no precision. Marked: the lesions."
    )
    lesions = [place for place, line in enumerate(lines) if line[0] in (LESION_CLASSES, ANY_LESION)]
    return [Table(head, lines, marked=lesions, caption=caption)]


def _worst(facts: RunFacts, pictures: Mapping[str, bytes]) -> list[Piece]:
    picture = _picture(facts, pictures, "worst")
    if facts.confusions is None:
        return picture
    confusions, lesions, groups = facts.confusions, facts.config.input.lesion_indices, facts.val_groups
    ranked, dice = rank_by_lesion_dice(confusions, lesions)
    truth, pred = (confusions.sum(axis)[:, lesions].sum(1) for axis in (2, 1))

    def why(row: int) -> str:
        return explain(confusions[row], facts.class_names, lesions)

    lines = []
    for row in ranked[:NUM_WORST]:
        sizes = f"{truth[row]:,}", f"{pred[row]:,}"
        lines.append([str(facts.val[row]), f"{dice[row]:.2f}", why(row), *sizes, str(groups[row])])
    head = ["slice", "Dice", "why", "true lesion", "found lesion", "group"]
    caption = (
        "Dice: the lesion Dice of this slice alone, the mean over the lesion classes that it shows. Slices are "
        "numbered from 0 in the order of the data; lesions are in pixels. The reasons follow from the slice's counts, "
        "what costs most Dice first."
    )
    table = Table(head, lines, caption=caption) if lines else Text("No validation slice shows a lesion.")
    pieces: list[Piece] = [table]
    false = false_lesion(confusions, lesions)
    num_healthy = int((truth == 0).sum())
    if num_healthy:
        order = sorted(np.flatnonzero(false).tolist(), key=lambda row: -int(false[row]))
        found = [[str(facts.val[row]), str(groups[row]), why(row)] for row in order[:NUM_WORST]]
        told = f"{plural(num_healthy, 'validation slice')} without a lesion; in {len(order)} of them one is found."
        pieces += [Text(told), *([Table(["slice", "group", "what"], found)] if found else [])]
    return [*pieces, *picture]


def _picture(facts: RunFacts, pictures: Mapping[str, bytes], name: str) -> list[Piece]:
    captions = {
        "learning_curves": "The best mean Dice picks the epoch whose weights are kept.",
        "dice_per_class": "A gap: no true pixel of the class, so that its Dice is undefined.",
        "confusion_matrix": "Of the true pixels in a row, the share that was given to each class.",
        "panels": "Slices from the middle of the ranks by lesion Dice.",
        "worst": "The first ranks.",
    }
    if name not in pictures:
        return []
    late = name in ("panels", "worst") and not facts.is_finished
    caption = captions[name] + (" Drawn on the way, at the epoch that its title says." if late else "")
    description = f"{name.replace('_', ' ')} of run {facts.name}"
    return [Picture(pictures[name], description, caption, PICTURE_WIDTH)]


def _usage(facts: RunFacts) -> str:
    run = shlex.quote(str(facts.folder))
    return "\n".join(
        [
            "# masks of .npy arrays, NIfTI files, DICOM folders or pictures, in the input's own geometry",
            f"python -m matchai.predict {run} INPUT --output DIR",
            "# judge it on slices that took no part",
            f"python -m matchai.evaluate {run} --data DIR",
            "# a file to deploy",
            f"python -m matchai.export {run} --format onnx",
        ]
    )


def _repetition(facts: RunFacts) -> list[Piece]:
    settings = shlex.quote(str(facts.folder / "config.yaml"))
    words = (
        "The same settings, slices and order. Where the data lies elsewhere, add --data DIR; the files must have the "
        "hashes below. On another machine the figures differ by rounding, which training magnifies."
    )
    return [Code(f"accelerate launch --quiet -m matchai.train --config {settings} --output OTHER"), Text(words)]


def _differences(facts: RunFacts) -> list[Piece]:
    now, preset, recipe = facts.config.flat(), facts.preset.flat(), TrainConfig().flat()
    name = facts.config.run.preset
    columns = [("this run", now), *([(f"preset {name}", preset)] if name != "recipe" else []), ("recipe", recipe)]
    names = [key for key in LEAVES if key not in FREE and any(now[key] != other[key] for _, other in columns)]
    if not names:
        return [Text("None: these are the recipe's settings.")]
    marked = [place for place, key in enumerate(names) if name != "recipe" and now[key] != preset[key]]
    caption = "Marked: differs from the preset too." if marked else ""
    lines = [[key, *(_value(values[key]) for _, values in columns)] for key in names]
    return [Table(["setting", *(head for head, _ in columns)], lines, marked=marked, caption=caption)]


def _settings(config: TrainConfig) -> Table:
    lines = [[key, _value(value), LEAVES[key][0]] for key, value in config.flat().items() if key not in PLACE]
    return Table(["setting", "value", "group"], lines)


def _epochs(facts: RunFacts) -> list[Piece]:
    columns = ("train_loss", "val_loss", "mean_dice", "lesion_dice", "lr", "images_per_second", "seconds")
    decimals = {"lr": ".3g", "images_per_second": ".1f", "seconds": ".1f"}
    lines = [
        [str(row["epoch"]), *(_number(row.get(name), decimals.get(name, ".4f")) for name in columns)]
        for row in facts.history
    ]
    best = [place for place, row in enumerate(facts.history) if row is facts.best]
    head = ["epoch", *(name.replace("_", " ") for name in columns)]
    return [Table(head, lines, marked=best, caption="Marked: the best mean Dice.")] if lines else []


def _provenance(facts: RunFacts) -> list[list[str]]:
    recorded, settings = facts.recorded, facts.config.input
    split = f"one, {100 * settings.val_fraction:g} % for validation"
    if settings.folds:
        split = f"{settings.folds} folds, fold {settings.fold}"
    lines = [
        ["slices", f"{len(facts.train)} for training, {len(facts.val)} for validation"],
        ["groups", f"{len(set(facts.groups))}, of them {facts.num_val_groups} in the validation"],
        ["split", f"{split}, by whole groups, seed {facts.config.run.seed}"],
    ]
    if facts.about:
        mean, std = facts.about["mean_hu"], facts.about["std_hu"]
        lines.append(["mean and standard deviation", f"{mean:.1f} and {std:.1f} HU"])
    lines += [["note on the data", note] for note in recorded.get("notes", [])]
    lines += [[f"SHA-256 of {name}", digest] for name, digest in recorded.get("data", {}).items()]
    named = {"device": "device", "precision": "precision", "num_processes": "processes"}
    lines += [[words, str(recorded[key])] for key, words in named.items() if key in recorded]
    lines += [[f"version of {name}", str(version)] for name, version in recorded.get("versions", {}).items()]
    if facts.history:
        seconds = _known(facts.history, "seconds")
        lines.append(["time of all epochs", f"{sum(seconds) / 60:.1f} min, {plural(len(facts.history), 'epoch')}"])
        rate, wait = _known(facts.history, "images_per_second"), _known(facts.history, "data_wait_share")
        if rate:
            lines.append(["training speed", f"{np.median(rate):.1f} slices a second (median epoch)"])
        if wait:
            lines.append(["waiting for data", f"{100 * np.median(wait):.1f} % of the training time (median epoch)"])
        skipped = int(sum(_known(facts.history, "skipped_steps")))
        lines.append(["steps skipped, as the loss or gradient was not finite", str(skipped)])
    return lines


def _known(history: Iterable[Mapping[str, Any]], name: str) -> list[float]:
    return [float(row[name]) for row in history if row.get(name) is not None]


def _number(value: Any, digits: str) -> str:
    return "–" if value is None else f"{value:{digits}}"


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
