"""From runs and a data set with masks to what their predictions are worth: which slices, counts, distances, files."""

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from matchai.data import (
    DATASET_JSON,
    IMAGE_FOLDERS,
    THUMBNAIL,
    SliceSet,
    built_in_phantom,
    digest_sets,
    for_each_slice,
    format_value,
    group_slices,
    inspect_slice,
    open_sets,
    read_groups,
    refuse_unfit,
    resize,
    window,
)
from matchai.drawing import draw_confusion_matrix
from matchai.metrics import (
    MIN_GROUPS,
    Counts,
    Distances,
    ScoredVolume,
    Scores,
    as_csv,
    can_measure,
    confusion_counts,
    describe,
    slice_rows,
    surface_distances,
    volume_rows,
)
from matchai.prediction.holdout import Choice, choose_slices
from matchai.prediction.inference import Predictor
from matchai.settings import EvaluateSettings, InputSettings, TrainConfig, parsing
from matchai.system import (
    Display,
    FailedError,
    InputError,
    is_there,
    make_folder,
    need,
    plural,
    show_evaluation,
    sync_folder,
    write_whole,
)
from matchai.volumes import kind_of, turn

RESULT, SLICES, VOLUMES, PICTURE = "evaluation.json", "slices.csv", "volumes.csv", "confusion_matrix.png"
FILES = (RESULT, SLICES, VOLUMES, PICTURE)
OF_A_KIND: dict[str, Any] = {"orientation": "auto", "nifti_affine": "auto", "rescale": (1.0, 0.0), "label_map": ()}
"""Settings that say how one kind of files is read, as they are for another."""

Show = Callable[[str, int, int, str], None]
Labels = NDArray[np.uint8]
Ints = NDArray[np.int64]


def read_settings(run: Path) -> TrainConfig:
    """The settings of a run.

    Raises:
        InputError: If the folder is no run's.
    """
    path = run / "config.yaml"
    if not is_there(path):
        raise InputError(f"{run} holds no config.yaml, so it is no matchai run; give the folder that training wrote.")
    return TrainConfig().updated(**parsing.load(path))


def evaluate(settings: EvaluateSettings, display: Display | None = None) -> dict[str, Any]:
    """Judges what runs predict of a data set by its masks, and writes the result into a folder, replaced whole.

    Args:
        settings: Which runs and data, and what is measured.
        display: Where to say things; without it, the terminal.

    Returns:
        What `evaluation.json` holds.

    Raises:
        InputError: With every problem found, before anything is predicted or written.
        FailedError: If the result cannot be written; it was shown.
    """
    display = display or Display(is_main_process=True)
    settings.check()
    tolerance = settings.surface_tolerance if _measures_surfaces(settings, display) else None
    runs, output = settings.runs, settings.folder
    configs = [read_settings(run) for run in runs]
    config = configs[0].updated(**settings.of_the_data())
    check_output(output)
    predictor = Predictor(
        runs, is_mirrored=settings.tta, mixed_precision=settings.mixed_precision, batch_size=settings.batch_size
    )
    if predictor.class_names != list(config.input.class_names):
        raise InputError(
            f"The weights of {runs[0]} know the classes {', '.join(predictor.class_names)}, but its config.yaml names "
            f"{', '.join(config.input.class_names)}; undo the change there."
        )
    make_folder(output.parent)
    cache = config.input.cache or runs[0].parent / "cache"
    folder = settings.data or config.input.data or built_in_phantom(cache, config.input.phantom_slices)
    config = config if settings.data is None else _for_the_files(folder, config, settings, predictor, display)
    sets, digests = _open(folder, config.input, cache, output.parent)
    num_slices = sum(map(len, sets))
    choice = choose_slices(runs, digests, num_slices, settings.slices)
    display.say(f"slices: {choice.statement}")
    groups, volumes, note = _find_groups(folder, config.input, sets, choice, predictor, display.show)
    display.say(f"groups: {note}")
    _announce(display, choice, groups, num_slices)
    scores = _score(predictor, sets, choice, groups, volumes, tolerance, output.parent, display.show)
    display.close()
    members = zip(runs, predictor.abouts, strict=True)
    result = {
        "runs": [{"name": run.name, "epoch": about["epoch"]} for run, about in members],
        "is_synthetic": settings.data is None and config.input.data is None,
        "data": folder.name,
        "data_digests": digests,
        "groups": note,
        "slices": choice.name,
        "slices_in_words": choice.statement,
        "forward_passes": predictor.num_passes,
        "precision": predictor.precision,
        "matchai": metadata.version("matchai"),
        **describe(scores),
    }
    _write_or_show(output, result, scores, display)
    return result


def _announce(display: Display, choice: Choice, groups: Ints, num_slices: int) -> None:
    num_groups = len(np.unique(groups[choice.rows]))
    display.say(f"evaluated: {len(choice.rows)} of {num_slices} slices, in {plural(num_groups, 'group')}")
    if num_groups < MIN_GROUPS:
        display.warn("no interval can be told, as all slices are of one group.")


def _write_or_show(output: Path, result: dict[str, Any], scores: Scores, display: Display) -> None:
    """Writes all files; where that is impossible, what was computed is told at least."""
    try:
        _write(output, result, scores)
    except OSError as error:
        show_evaluation(result, display)
        raise FailedError(
            f"The figures above could not be written to {output} ({error.strerror or error}); make room there, or name "
            "another folder with --output."
        ) from None


def _measures_surfaces(settings: EvaluateSettings, display: Display) -> bool:
    """Whether surface distances are measured; says so where they are left out for want of MONAI.

    Raises:
        InputError: If they were asked for and cannot be measured.
    """
    if settings.surface == "yes":
        need("monai.metrics", "evaluate", "Measuring surface distances")
    elif settings.surface == "auto" and not can_measure():
        display.say('surface distances are left out, as they need MONAI: `pip install "matchai[evaluate]"`')
    return settings.surface == "yes" or (settings.surface == "auto" and can_measure())


def check_output(output: Path) -> None:
    """Refuses a folder that holds anything but an evaluation, as it would be replaced.

    Raises:
        InputError: If it does.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file; name a folder with --output.")
    if foreign := sorted({path.name for path in output.iterdir()} - set(FILES)) if output.exists() else []:
        raise InputError(
            f"{output} holds {foreign[0]}, which no evaluation wrote and none shall replace; name another folder with "
            "--output."
        )


def _open(
    folder: Path, settings: InputSettings, cache: Path, scratch: Path
) -> tuple[Sequence[SliceSet], dict[str, str]]:
    """The sets, and the hashes of their images under the names that runs record."""
    sets = open_sets(folder, settings, scratch)
    names = {one.image_path.name for one in sets}
    digests = digest_sets(folder, sets, cache).items()
    return sets, {name: digest for name, digest in digests if name in names or name.startswith(IMAGE_FOLDERS)}


def _for_the_files(
    folder: Path, config: TrainConfig, settings: EvaluateSettings, predictor: Predictor, display: Display
) -> TrainConfig:
    """The settings without what they say of how the run's own kind of files is read, where these are of another."""
    is_other = config.input.data is None or folder.resolve() != config.input.data.resolve()
    if is_other and settings.label_map is None and config.input.label_map and is_there(folder / DATASET_JSON):
        display.say(f"the numbers in the masks are those of {folder / DATASET_JSON}, not the run's --label-map.")
        config = config.updated(label_map=())
    plain, kind = config.updated(**(OF_A_KIND | settings.of_the_data())), predictor.abouts[0]["data_kind"]
    if plain == config or kind_of(open_sets(folder, plain.input, settings.folder.parent)[0].files[0]) == kind:
        return config
    display.say(f"the run's settings of how its files are read ({kind}) are not taken for files of another kind.")
    return plain


def _find_groups(
    folder: Path, settings: InputSettings, sets: Sequence[SliceSet], choice: Choice, predictor: Predictor, show: Show
) -> tuple[Ints, Ints, str]:
    """The group and the volume of every slice, and how they are known; looks at all slices that no run has seen.

    Raises:
        InputError: If slices or masks are such that training would refuse them.
    """
    known = read_groups(folder / settings.groups_name, sets)
    if choice.groups is not None and (predictor.context == 0 or all(one.is_volume for one in sets)):
        volumes = np.repeat(np.arange(len(sets)), [len(one) for one in sets])
        return choice.groups, volumes, "those of the run's split."
    thumbnails = _inspect(sets, predictor, show)
    groups, volumes, note = group_slices(thumbnails, sets, known, settings.groups_name, predictor.context)
    return (groups, volumes, note) if choice.groups is None else (choice.groups, volumes, "those of the run's split.")


def _inspect(sets: Sequence[SliceSet], predictor: Predictor, show: Show) -> NDArray[np.float32]:
    """Looks at every slice before any is predicted, as training does; thumbnails (N, 64, 64)."""
    hu_window, names = predictor.abouts[0]["hu_window"], predictor.class_names
    thumbnails = np.zeros((sum(map(len, sets)), THUMBNAIL, THUMBNAIL), np.float32)

    def inspect(row: int, number: int, index: int) -> dict[str, Any]:
        image, _, found = inspect_slice(sets[number], index, len(names), predictor.background_class, hu_window)
        if image is not None:
            thumbnails[row] = resize(window(image, hu_window), THUMBNAIL)
        return found

    found = for_each_slice(sets, inspect, lambda done, total: show("checking slices", done, total, ""))
    refuse_unfit(sets, found, hu_window, names, predictor.background_class)
    return thumbnails


def _score(
    predictor: Predictor,
    sets: Sequence[SliceSet],
    choice: Choice,
    groups: Ints,
    volumes: Ints,
    tolerance: float | None,
    scratch: Path,
    show: Show,
) -> Scores:
    """Predicts the chosen slices and counts."""
    places = np.array([(number, index) for number, one in enumerate(sets) for index in range(len(one))])
    num_classes, lesions = len(predictor.class_names), predictor.lesion_classes
    is_by_volume = all(one.is_volume and one.spacing is not None for one in sets)
    regions = [[c] for c in range(num_classes) if c != predictor.background_class] + [lesions]
    confusions: list[Counts] = []
    of_slices: list[list[tuple[float, float]]] = []
    of_volumes: list[list[tuple[float, float]]] = []
    scored: list[ScoredVolume] = []

    def measure(pred: Labels, truth: Labels, spacing: Sequence[float]) -> list[tuple[float, float]]:
        assert tolerance is not None
        return [surface_distances(_mask(pred, one), _mask(truth, one), spacing, tolerance) for one in regions]

    for number, one in enumerate(sets):
        mine = choice.rows[places[choice.rows, 0] == number]
        if not len(mine):
            continue
        first_row, spacing = len(confusions), one.spacing if is_by_volume else None
        is_measured = spacing is not None and tolerance is not None
        with _labels(scratch, (2, len(one), *one.shape)) if is_measured else nullcontext() as labels:
            for index, pred in _predict(predictor, one, volumes[places[:, 0] == number], places[mine, 1]):
                truth = _read_truth(one, index, predictor)
                confusions.append(_count(pred, truth, num_classes))
                if labels is not None:
                    labels[:, index] = pred, truth
                elif tolerance is not None:
                    of_slices.append(measure(pred, truth, (1.0, 1.0)))
                show("evaluating slices", len(confusions), len(choice.rows), "")
            if spacing is not None:
                scored.append(ScoredVolume(one.name, np.arange(first_row, len(confusions)), spacing))
            if labels is not None and spacing is not None:
                undefined = [(math.nan, math.nan)] * len(regions)
                is_whole = len(mine) == len(one)
                of_volumes.append(measure(labels[0], labels[1], spacing) if is_whole else undefined)
        one.close()

    return Scores(
        class_names=predictor.class_names,
        lesion_classes=lesions,
        background_class=predictor.background_class,
        sources=[sets[number].name for number in places[choice.rows, 0]],
        indices=places[choice.rows, 1],
        groups=groups[choice.rows],
        sides=[choice.sides[row] for row in choice.rows],
        confusions=np.stack(confusions),
        distances=_distances(of_slices, "px", tolerance),
        volumes=scored,
        volume_distances=_distances(of_volumes, "mm", tolerance),
    )


def _distances(values: list[list[tuple[float, float]]], unit: str, tolerance: float | None) -> Distances | None:
    if tolerance is None or not values:
        return None
    return Distances(np.array(values)[..., 0], np.array(values)[..., 1], unit, tolerance)


def _mask(labels: Labels, classes: Sequence[int]) -> NDArray[np.bool_]:
    """Where any of the classes is; numpy.isin needs eight times the memory."""
    mask: NDArray[np.bool_] = labels == classes[0]
    for c in classes[1:]:
        mask |= labels == c
    return mask


def _count(pred: Labels, truth: Labels, num_classes: int) -> Counts:
    """(C, C) counts of one slice."""
    batches = [torch.from_numpy(np.ascontiguousarray(one))[None] for one in (pred, truth)]
    return np.asarray(confusion_counts(batches[0], batches[1], num_classes)[0])


def _predict(predictor: Predictor, one: SliceSet, volumes: Ints, wanted: Ints) -> Iterator[tuple[int, Labels]]:
    """The class indices (H, W) of some slices of a set, as the set has them.

    Without context slices are predicted in full batches, whatever volumes they are of.
    """
    has_context = any(about["context"] for about in predictor.abouts)
    borders = np.flatnonzero(np.diff(volumes)) + 1 if has_context else np.array([], int)
    for members in np.split(np.arange(len(one)), borders):
        start = int(members[0])

        def read(index: int, start: int = start) -> NDArray[np.float32]:
            return turn(one.read_image(start + index), one.orientation, predictor.orientation)

        indices = (wanted[np.isin(wanted, members)] - start).tolist()
        for index, turned in predictor.probabilities(read, len(members), indices):
            pred = turned.argmax(0).astype(np.uint8)
            yield start + index, turn(pred, predictor.orientation, one.orientation)


def _read_truth(one: SliceSet, index: int, predictor: Predictor) -> Labels:
    target = one.read_target(index, len(predictor.class_names), predictor.background_class)
    if target.wrong_values:
        raise InputError(
            f"{one.mask_path} holds {format_value(target.wrong_values[0])} in slice {index}, but "
            f"{one.expected_values(predictor.class_names, predictor.background_class)}."
        )
    return target.labels


@contextmanager
def _labels(folder: Path, shape: tuple[int, ...]) -> Iterator[Labels]:
    """Room for labels on disk, not in memory, until the context ends."""
    with tempfile.TemporaryFile(dir=folder) as file:
        yield np.memmap(file, np.uint8, "w+", shape=shape)


def _write(output: Path, result: dict[str, Any], scores: Scores) -> None:
    """Writes all files into a folder beside, which then takes the place of an older one."""
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".evaluation-") as name:
        beside = Path(name) / "new"
        beside.mkdir()
        write_whole(beside / RESULT, json.dumps(result, indent=1, allow_nan=False))
        write_whole(beside / SLICES, as_csv(slice_rows(scores)))
        if scores.volumes:
            write_whole(beside / VOLUMES, as_csv(volume_rows(scores)))
        runs = " + ".join(one["name"] for one in result["runs"])
        title = f"Evaluation of {runs} on {result['data']}: {result['num_slices']} slices ({result['slices']})"
        draw_confusion_matrix(scores.confusions.sum(0), scores.class_names, beside / PICTURE, title=title)
        if output.exists():
            output.rename(Path(name) / "old")
        beside.rename(output)
    sync_folder(output.parent)
