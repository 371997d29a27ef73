"""Predictions written as their users want them: masks in the inputs' own geometry, maps, panels, numbers."""

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from matchai.checkpoint import BEST
from matchai.console import Display
from matchai.errors import InputError
from matchai.figures import draw_panels
from matchai.hounsfield import implausible_range
from matchai.inference import Predictor, uncertainty
from matchai.inputs import Usual, kind_of, open_volume
from matchai.summaries import Submission, affected_percent, describe_volume, write_label_table, write_summaries
from matchai.volumes import STEPS, UPRIGHT, Volume, file_labels, turn

LEAST = 32  # pixels of height and width
NUM_PANELS = 6
NUM_LOOKED_AT = 16  # slices whose range of values is checked before any is predicted

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class SliceResult:
    """What was found in one slice.

    Attributes:
        pixels: (C,) pixels of each class.
        uncertainty: Mean over the pixels of predicted lesions; None without them, or where it was not asked for.
    """

    pixels: NDArray[np.int64]
    uncertainty: float | None


@dataclasses.dataclass(frozen=True)
class VolumeResult:
    """What was found in one volume, and where it was written.

    Attributes:
        volume: The volume.
        slices: One result a slice.
        files: What was written, by what it shows.
    """

    volume: Volume
    slices: list[SliceResult]
    files: dict[str, Path]

    @property
    def pixels(self) -> NDArray[np.int64]:
        """(C,) pixels of each class."""
        total: NDArray[np.int64] = np.sum([one.pixels for one in self.slices], axis=0)
        return total


def check_volume(volume: Volume, hu_windows: Sequence[tuple[float, float]]) -> None:
    """Looks at some slices before any is predicted.

    Raises:
        InputError: If slices are too small, or their values are no HU.
    """
    length, height, width = volume.shape
    if min(height, width) < LEAST:
        raise InputError(
            f"{volume.path} has slices of {height}x{width} pixels, but at least {LEAST}x{LEAST} are needed."
        )
    places = np.unique(np.linspace(0, length - 1, NUM_LOOKED_AT).round().astype(int)).tolist()
    looked_at = [_finite(volume, index) for index in places]
    low, high = min(float(one.min()) for one in looked_at), max(float(one.max()) for one in looked_at)
    for hu_window in hu_windows:
        problem = implausible_range(str(volume.path), low, high, hu_window)
        if problem:
            raise InputError(problem)


def _finite(volume: Volume, index: int) -> NDArray[np.float32]:
    image = volume.read(index)
    finite = np.isfinite(image)
    if not finite.all():
        row, column = np.unravel_index(int(np.argmin(finite)), image.shape)
        raise InputError(
            f"{volume.path} has {int((~finite).sum())} NaN or infinite pixels in slice {index}, the first at row "
            f"{row}, column {column}; replace them, by -1000 HU (air) say."
        )
    return image


def predict_volume(
    volume: Volume,
    predictor: Predictor,
    folder: Path,
    *,
    with_probabilities: bool = False,
    with_uncertainty: bool = False,
    each: Callable[[NDArray[np.uint8]], None] | None = None,
    progress: Progress | None = None,
) -> VolumeResult:
    """Predicts a volume slice by slice and writes its mask, panels and maps; each file is whole or absent.

    Args:
        volume: The volume.
        predictor: Predicts.
        folder: Where to; it exists.
        with_probabilities: Also write a map of the probability of each class.
        with_uncertainty: Also write a map of the uncertainty.
        each: Given the class indices (H, W) of each slice, in order.
        progress: Told (slices done, slices in all).

    Raises:
        InputError: If a slice cannot be read, or holds values that are no numbers.
    """
    check_volume(volume, [about["hu_window"] for about in predictor.abouts])
    length, height, width = volume.shape
    names = predictor.class_names

    def read(index: int) -> NDArray[np.float32]:
        return turn(_finite(volume, index), volume.orientation, predictor.orientation)

    results: list[SliceResult] = []
    with ExitStack() as stack:
        # on disk, not in memory: one byte a voxel, with maps two more for each
        mask_file = stack.enter_context(tempfile.TemporaryFile(dir=folder))
        shown = [f"probability_{name.replace(' ', '_')}" for name in names] if with_probabilities else []
        shown += ["uncertainty"] if with_uncertainty else []
        map_files = {what: stack.enter_context(tempfile.TemporaryFile(dir=folder)) for what in shown}
        for _, turned in predictor.probabilities(read, length):
            probs = turn(turned, predictor.orientation, volume.orientation)
            pred = probs.argmax(0).astype(np.uint8)
            pixels = np.bincount(pred.ravel(), minlength=len(names))
            mask_file.write(pred.tobytes())
            doubt = uncertainty(probs) if with_uncertainty else None
            maps = [*probs] if with_probabilities else []
            maps += [doubt] if doubt is not None else []
            for file, values in zip(map_files.values(), maps, strict=True):
                file.write(np.rint(np.clip(values, 0, 1) * STEPS).astype(np.uint16).tobytes())
            is_lesion = np.isin(pred, predictor.lesion_classes)
            mean_doubt = float(doubt[is_lesion].mean()) if doubt is not None and is_lesion.any() else None
            results.append(SliceResult(pixels, mean_doubt))
            if each:
                each(pred)
            if progress:
                progress(len(results), length)
        mask = _mapped(mask_file, np.uint8, (length, height, width))
        files = {"mask": volume.save_mask(folder, mask, file_labels(len(names), predictor.background_class))}
        for what, file in map_files.items():
            files[what] = volume.save_map(folder, _mapped(file, np.uint16, (length, height, width)), what)
        files["panels"] = folder / f"{volume.name}_panels.png"
        _draw(volume, mask, results, predictor, files["panels"])
    return VolumeResult(volume, results, files)


def _mapped(file: BinaryIO, kind: type[np.generic], shape: tuple[int, ...]) -> NDArray[Any]:
    file.flush()
    return np.memmap(file, kind, "r", shape=shape)


def _draw(
    volume: Volume, mask: NDArray[np.uint8], results: Sequence[SliceResult], predictor: Predictor, path: Path
) -> None:
    """Panels of the slice with the most lesion, and of others spread evenly over those that show one (or over all)."""
    lesions = np.array([int(one.pixels[predictor.lesion_classes].sum()) for one in results])
    candidates = np.flatnonzero(lesions) if lesions.any() else np.arange(len(results))
    spread = candidates[np.linspace(0, len(candidates) - 1, NUM_PANELS).round().astype(int)]
    rows = np.unique([*spread[:-1], int(lesions.argmax())] if lesions.any() else spread).tolist()
    captions = []
    for row in rows:
        share = affected_percent(results[row].pixels, predictor.lesion_classes, predictor.background_class)
        found = "no lung found" if share is None else f"{share:.1f} % of the lung affected"
        captions.append(f"slice {row} of 0 to {len(results) - 1} · {found}")
    draw_panels(
        np.stack([turn(volume.read(row), volume.orientation, UPRIGHT) for row in rows]),
        None,
        np.stack([turn(mask[row], volume.orientation, UPRIGHT) for row in rows]),
        captions,
        predictor.class_names,
        predictor.background_class,
        tuple(predictor.abouts[0]["hu_window"]),
        path,
        title=f"Prediction: {volume.name}, {len(results)} slices",
    )


def predict(
    paths: Sequence[Path],
    output: Path,
    *,
    with_probabilities: bool = False,
    is_mirrored: bool = False,
    with_uncertainty: bool = False,
    submission: Path | None = None,
    rescale: tuple[float, float] | None = None,
    orientation: str | None = None,
    series: str | None = None,
    batch_size: int | None = None,
    mixed_precision: str = "auto",
    display: Display | None = None,
) -> list[str]:
    """Predicts inputs with the mean of runs and writes everything into a folder.

    Args:
        paths: Runs and inputs; a run is a folder with best weights, or a file of them.
        output: The folder, new or empty.
        with_probabilities: Also write a map of every class's probability.
        is_mirrored: Predict each slice mirrored left to right, too.
        with_uncertainty: Also write a map of the uncertainty.
        submission: File of the Kaggle competition's CSV; None for none.
        rescale: Slope and intercept that make HU of the inputs' numbers, where the user gives them.
        orientation: How the slices of arrays and pictures lie, where the user gives it.
        series: Number of the DICOM series to take.
        batch_size: Slices of one forward pass.
        mixed_precision: As in `Predictor`.
        display: Where to say things; without it, the terminal.

    Returns:
        What kept single inputs from being predicted, a sentence each; the others are done.

    Raises:
        InputError: For what is wrong at the start, before anything is predicted.
    """
    display = display or Display(is_main_process=True)
    runs = [path for number, path in enumerate(paths) if number == 0 or _is_run(path)]
    inputs = [path for number, path in enumerate(paths) if number > 0 and not _is_run(path)]
    _check_asked(inputs, output, submission, rescale)
    predictor = Predictor(runs, is_mirrored=is_mirrored, mixed_precision=mixed_precision, batch_size=batch_size)
    output.mkdir(parents=True, exist_ok=True)
    volumes = _open_all(inputs, predictor, orientation=orientation, rescale=rescale, scratch=output, series=series)
    problems: list[str] = []
    kaggle = Submission(volumes, predictor.lesion_classes) if submission else None
    for volume in volumes:
        for note in volume.notes:
            display.say(f"{volume.name}: {note}")
    for run, about in zip(runs, predictor.abouts, strict=True):
        if about["synthetic"]:
            display.warn(f"{run} has learnt from the synthetic phantom alone, and says nothing of patients.")
    display.say(
        f"predicting {sum(volume.shape[0] for volume in volumes)} slices of {len(volumes)} input"
        f"{'s' if len(volumes) > 1 else ''} by {predictor.num_passes} pass{'es' if predictor.num_passes > 1 else ''}; "
        f"{predictor.device}, precision {predictor.precision}"
    )
    results = []
    total = sum(volume.shape[0] for volume in volumes)
    begun = 0

    def show(done: int, _: int) -> None:
        display.show("predicting", begun + done, total)

    for volume in volumes:
        folder = _folder_of(volume, volumes, output)
        try:
            results.append(
                predict_volume(
                    volume,
                    predictor,
                    folder,
                    with_probabilities=with_probabilities,
                    with_uncertainty=with_uncertainty,
                    each=kaggle.add if kaggle else None,
                    progress=show,
                )
            )
        except InputError as error:
            problems += error.problems
        finally:
            volume.close()
        begun += volume.shape[0]
    display.close()
    _write(output, predictor, runs, results)
    if kaggle and submission and not problems:
        kaggle.write(submission)
    _say(display, predictor, results, output)
    return problems


def _open_all(
    inputs: Sequence[Path],
    predictor: Predictor,
    *,
    orientation: str | None,
    rescale: tuple[float, float] | None,
    scratch: Path,
    series: str | None,
) -> list[Volume]:
    """Opens and looks at every input; raises InputError with the problems of all."""
    first = predictor.abouts[0]
    usual = Usual(first["data_kind"], first["orientation"], tuple(first["rescale"]))
    volumes: list[Volume] = []
    problems: list[str] = []
    for path in inputs:
        try:
            volume = open_volume(
                path,
                predictor.orientation,
                orientation=orientation,
                rescale=rescale,
                usual=usual,
                scratch=scratch,
                series=series,
            )
            check_volume(volume, [about["hu_window"] for about in predictor.abouts])
            volumes.append(volume)
            if len(inputs) > 1:
                volume.close()  # what is unpacked on disk, all together, may be large
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(*problems)
    return volumes


def _is_run(path: Path) -> bool:
    return path.suffix == ".safetensors" or (path / BEST).is_file()


def _check_asked(
    inputs: Sequence[Path], output: Path, submission: Path | None, rescale: tuple[float, float] | None
) -> None:
    if not inputs:
        raise InputError(
            "No input was given; after the run name a .npy array, a NIfTI file, or a folder of DICOM or picture files."
        )
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
    if submission is not None and not submission.absolute().parent.is_dir():
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
        "percent_of_lung_affected": "lesion pixels of all that are not background",
        "use": "Research only; uncertainty is a flag for review, no estimate of the error.",
    }
    inputs, slices = [], []
    for result in results:
        volume = result.volume
        told = describe_volume(volume, result.pixels, names, predictor.lesion_classes, predictor.background_class)
        files = {what: str(path.relative_to(output)) for what, path in result.files.items()}
        doubts = [one.uncertainty for one in result.slices if one.uncertainty is not None]
        told["mean_uncertainty_of_lesions"] = float(np.mean(doubts)) if doubts else None
        inputs.append({**told, "notes": list(volume.notes), "files": files})
        for index, one in enumerate(result.slices):
            row: dict[str, Any] = {"input": str(volume.path), "slice": index}
            row |= {f"{name} pixels": int(count) for name, count in zip(names, one.pixels, strict=True)}
            row["percent_of_lung_affected"] = affected_percent(
                one.pixels, predictor.lesion_classes, predictor.background_class
            )
            slices.append({**row, "mean_uncertainty_of_lesions": one.uncertainty})
    write_label_table(output / "labels.txt", names, predictor.background_class)
    write_summaries(output, about, inputs, slices)


def _say(display: Display, predictor: Predictor, results: Sequence[VolumeResult], output: Path) -> None:
    for result in results:
        share = affected_percent(result.pixels, predictor.lesion_classes, predictor.background_class)
        found = "no lung found" if share is None else f"{share:.1f} % of the lung affected"
        ml = result.volume.voxel_ml
        if ml is not None:
            lesions = ", ".join(
                f"{predictor.class_names[c]} {result.pixels[c] * ml:,.1f} mL" for c in predictor.lesion_classes
            )
            found = f"{found}: {lesions}"
        display.say(f"{result.volume.name}: {found}")
    if results:
        display.say(f"Masks, panels and numbers: {output}. For research only.")
