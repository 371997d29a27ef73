"""From runs and inputs that a user names to a folder of results: opened and checked, predicted, written, told."""

import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from matchai.prediction.inference import Predictor
from matchai.prediction.summaries import Submission, affected_text, describe_volume, write_label_table, write_summaries
from matchai.prediction.volume_prediction import VolumeResult, check_volume, predict_volume
from matchai.settings import PredictSettings
from matchai.system import Display, InputError, Problems, is_there, make_folder, plural
from matchai.training import BEST
from matchai.volumes import TrainedOn, Volume, file_labels, kind_of, open_volume

LONGEST_NAME = 150  # bytes; a file's name may have 255, and holds what a map shows, too


def predict(settings: PredictSettings, display: Display | None = None) -> list[str]:
    """Predicts inputs with the mean of runs and writes everything into a folder.

    Args:
        settings: What is predicted, and how; a run among its paths is a folder with best weights, or a file of them.
        display: Where to say things; without it, the terminal.

    Returns:
        What kept single inputs from being predicted, a sentence each; the others are done.

    Raises:
        InputError: For what is wrong at the start, before anything is predicted.
    """
    display = display or Display(is_main_process=True)
    runs = [path for number, path in enumerate(settings.paths) if number == 0 or _is_run(path)]
    inputs = [path for number, path in enumerate(settings.paths) if number > 0 and not _is_run(path)]
    _check_settings(settings, inputs)
    predictor = Predictor(
        runs,
        is_mirrored=settings.tta or settings.uncertainty,
        mixed_precision=settings.mixed_precision,
        batch_size=settings.batch_size,
    )
    make_folder(settings.output)
    volumes = _open_all(inputs, predictor, settings)
    _announce(volumes, runs, predictor, display)
    kaggle = Submission(volumes, predictor.lesion_classes) if settings.submission else None
    with closing(display):  # gives the terminal its cursor back, however this ends
        results, problems = _predict_all(volumes, predictor, settings, kaggle, display)
    try:
        _write(settings.output, predictor, runs, results)
        if kaggle and settings.submission and not problems:
            kaggle.write(settings.submission)
    except OSError as error:  # what was found is told at least
        problems.append(f"Not all could be written ({_where(error)}); make room, and predict again.")
    _say(display, predictor, results, settings.output)
    return problems


def _announce(volumes: Sequence[Volume], runs: Sequence[Path], predictor: Predictor, display: Display) -> None:
    """Says what will be predicted, with what, and what should be known of it."""
    for name, note in ((volume.name, note) for volume in volumes for note in volume.notes):
        display.say(f"{name}: {note}")
    for run, about in zip(runs, predictor.abouts, strict=True):
        if about["synthetic"]:
            display.warn(f"{run} has learnt from the synthetic phantom alone, and says nothing of patients.")
    num_slices, passes = sum(volume.shape[0] for volume in volumes), "passes" if predictor.num_passes > 1 else "pass"
    display.say(
        f"predicting {num_slices} slices of {plural(len(volumes), 'input')} by {predictor.num_passes} {passes}; "
        f"{predictor.device}, precision {predictor.precision}"
    )


def _predict_all(
    volumes: Sequence[Volume],
    predictor: Predictor,
    settings: PredictSettings,
    kaggle: Submission | None,
    display: Display,
) -> tuple[list[VolumeResult], list[str]]:
    """The results, and what kept the other volumes from having one."""
    results: list[VolumeResult] = []
    problems = Problems()
    total, begun = sum(volume.shape[0] for volume in volumes), 0

    def show(done: int, _: int) -> None:
        display.show("predicting", begun + done, total)

    for volume in volumes:
        try:
            with problems.collect(), closing(volume):
                result = predict_volume(
                    volume,
                    predictor,
                    _folder_of(volume, volumes, settings.output),
                    with_probabilities=settings.probabilities,
                    with_uncertainty=settings.uncertainty,
                    each=kaggle.add if kaggle else None,
                    progress=show,
                )
                results.append(result)
        except OSError as error:
            problems.append(f"{volume.path} was not predicted to its end ({_where(error)}).")
        begun += volume.shape[0]
    return results, problems


def _where(error: OSError) -> str:
    """What the system refused, and where if it tells."""
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{error.strerror or error}"


def _open_all(inputs: Sequence[Path], predictor: Predictor, settings: PredictSettings) -> list[Volume]:
    """Opens and looks at every input; raises InputError with the problems of all."""
    kinds = {TrainedOn(one["data_kind"], one["orientation"], tuple(one["rescale"])) for one in predictor.abouts}
    volumes: list[Volume] = []
    problems = Problems()
    for path in inputs:
        with problems.collect():
            mine = [trained_on for trained_on in kinds if trained_on.kind == kind_of(path)]
            if len(mine) > 1 and settings.rescale is None:
                raise InputError(
                    f"{path} could be HU by any of {_listed(mine)}, as the runs were trained on such files by "
                    "different ones; give the right one as --rescale SLOPE INTERCEPT."
                )
            volume = open_volume(
                path,
                predictor.orientation,
                orientation=settings.orientation,
                rescale=settings.rescale,
                trained_on=mine[0] if mine else None,
                scratch=settings.output,
                series=settings.series,
                nifti_affine=settings.nifti_affine,
            )
            if len(os.fsencode(volume.name)) > LONGEST_NAME:
                raise InputError(
                    f"{path} has a name of {len(os.fsencode(volume.name))} bytes, too long for the names of results "
                    f"made of it; the most is {LONGEST_NAME}: rename it, or give a link to it."
                )
            notes = check_volume(volume, predictor)
            volume.notes = [*volume.notes, *notes]
            volumes.append(volume)
            if len(inputs) > 1:
                volume.close()  # what is unpacked on disk, all together, may be large
    problems.raise_any()
    return volumes


def _is_run(path: Path) -> bool:
    return path.suffix == ".safetensors" or is_there(path / BEST)


def _listed(trained_on: Sequence[TrainedOn]) -> str:
    return ", ".join(f"{slope:g} {intercept:g}" for slope, intercept in sorted(one.rescale for one in trained_on))


def _check_settings(settings: PredictSettings, inputs: Sequence[Path]) -> None:
    output, submission, rescale = settings.output, settings.submission, settings.rescale
    if not inputs:
        raise InputError(
            "No input was given; after the run name a .npy array, a NIfTI file, or a folder of DICOM or picture files."
        )
    if settings.batch_size is not None and settings.batch_size < 1:
        raise InputError(f"batch_size is {settings.batch_size}, but must be at least 1.")
    if rescale is not None and not (np.isfinite(rescale).all() and rescale[0]):
        raise InputError(f"rescale is {rescale[0]:g} {rescale[1]:g}, but needs a slope other than 0 and an intercept.")
    kinds = sorted({kind_of(path) for path in inputs})
    if rescale is not None and len(kinds) > 1:
        raise InputError(
            f"--rescale is for inputs of one kind, but these are of {len(kinds)} ({', '.join(kinds)}): predict each "
            "kind by a command of its own."
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} is there already and not empty; name another folder with --output.")
    if submission is not None and submission.exists():
        raise InputError(f"{submission} is there already; name another file with --submission.")
    if submission is not None and submission.parent != output and not submission.absolute().parent.is_dir():
        raise InputError(f"The folder of {submission} does not exist; make it, or name another with --submission.")


def _folder_of(volume: Volume, volumes: Sequence[Volume], output: Path) -> Path:
    """The output folder, or one of its own in it for an input that shares its name with another."""
    if [one.name for one in volumes].count(volume.name) == 1:
        return output
    folder = output / str(next(number for number, one in enumerate(volumes, 1) if one is volume))
    folder.mkdir(exist_ok=True)
    return folder


def _write(output: Path, predictor: Predictor, runs: Sequence[Path], results: Sequence[VolumeResult]) -> None:
    names, labels = predictor.class_names, file_labels(len(predictor.class_names), predictor.background_class)
    about = {
        "runs": [
            {"path": str(run), "epoch": about["epoch"], "mean_dice": about["mean_dice"]}
            for run, about in zip(runs, predictor.abouts, strict=True)
        ],
        "passes": predictor.num_passes,
        "precision": predictor.precision,
        "class_indices_in_npy": {name: index for index, name in enumerate(names)},
        "numbers_in_other_masks": dict(zip(names, labels, strict=True)),
        "slices": "counted from 0; in NIfTI and DICOM volumes from the lowest up",
        "percent_of_lung_affected": "lesion pixels of all that are not background",
        "use": "Research only; uncertainty is a flag for review, no estimate of the error.",
    }
    inputs, slices = [], []
    for result in results:
        volume = result.volume
        doubts = [one.uncertainty for one in result.slices if one.uncertainty is not None]
        mean_doubt = float(np.mean(doubts)) if doubts else None
        files = {what: str(path.relative_to(output)) for what, path in result.files.items()}
        more = {"mean_uncertainty_of_lesions": mean_doubt, "notes": list(volume.notes), "files": files}
        inputs.append(describe_volume(volume, result.pixels, names, result.affected_percent) | more)
        for index, one in enumerate(result.slices):
            pixels = {f"{name} pixels": int(count) for name, count in zip(names, one.pixels, strict=True)}
            found = {"percent_of_lung_affected": one.affected_percent, "mean_uncertainty_of_lesions": one.uncertainty}
            slices.append({"input": str(volume.path), "slice": index, **pixels, **found})
    write_label_table(output / "labels.txt", names, predictor.background_class)
    write_summaries(output, about, inputs, slices)


def _say(display: Display, predictor: Predictor, results: Sequence[VolumeResult], output: Path) -> None:
    for result in results:
        found, names = affected_text(result.affected_percent), predictor.class_names
        if (ml := result.volume.voxel_ml) is not None:
            lesions = (f"{names[c]} {result.pixels[c] * ml:,.1f} mL" for c in predictor.lesion_classes)
            found = f"{found}: {', '.join(lesions)}"
        display.say(f"{result.volume.name}: {found}")
    if results:
        display.say(f"Masks, panels and numbers: {output}. For research only.")
