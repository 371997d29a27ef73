"""The prediction of one volume: mask, maps and panels, written, and what was found in each slice."""

import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from matchai.data import THUMBNAIL, find_groups, quantise, resize, window
from matchai.drawing import draw_panels
from matchai.prediction.inference import Predictor, ReadSlice, uncertainty
from matchai.prediction.summaries import affected_percent, affected_text
from matchai.system import InputError, file_name
from matchai.volumes import (
    UPRIGHT,
    ValueCounts,
    Volume,
    check_size,
    count_values,
    file_labels,
    implausible_values,
    raw_slice,
    turn,
)

NUM_PANELS = 6
NUM_INSPECTED = 16  # slices whose range of values is checked before any is predicted

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class SliceResult:
    """What was found in one slice.

    Attributes:
        pixels: (C,) pixels of each class.
        affected_percent: Pixels of lesions in percent of all that are not background; None where all are.
        uncertainty: Mean over the pixels of predicted lesions; None without them, or where it was not asked for.
    """

    pixels: NDArray[np.int64]
    affected_percent: float | None
    uncertainty: float | None


@dataclasses.dataclass(frozen=True)
class VolumeResult:
    """What was found in one volume, and where it was written.

    Attributes:
        volume: The volume.
        slices: One result a slice.
        pixels: (C,) pixels of each class.
        affected_percent: Pixels of lesions in percent of all that are not background; None where all are.
        files: What was written, by what it shows.
    """

    volume: Volume
    slices: list[SliceResult]
    pixels: NDArray[np.int64]
    affected_percent: float | None
    files: dict[str, Path]


def check_volume(volume: Volume, predictor: Predictor) -> list[str]:
    """Looks at some slices before any is predicted.

    Returns:
        What the user should know of their values, in sentences.

    Raises:
        InputError: If slices are too small, or their values are no HU.
    """
    check_size(volume.path, *volume.shape[1:])
    places = np.unique(np.linspace(0, volume.shape[0] - 1, NUM_INSPECTED).round().astype(int)).tolist()
    images = [_read_finite(volume, index) for index in places]
    notes: dict[str | None, None] = {}
    for hu_window in _hu_windows(predictor):
        values = ValueCounts.total(count_values(one, hu_window) for one in images)
        if problem := implausible_values(str(volume.path), values, hu_window, can_choose_window=False):
            raise InputError(problem)
        notes[values.padding_note()] = None
    for index, image in zip(places, images, strict=True):
        _refuse_raw(volume, index, image, predictor)
    return [note for note in notes if note is not None]


def _read_finite(volume: Volume, index: int) -> NDArray[np.float32]:
    image = volume.read(index)
    finite = np.isfinite(image)
    if not finite.all():
        row, column = np.unravel_index(int(np.argmin(finite)), image.shape)
        raise InputError(
            f"{volume.path} has {int((~finite).sum())} NaN or infinite pixels in slice {index}, the first at row "
            f"{row}, column {column}; replace them, by -1000 HU (air) say."
        )
    return image


def _hu_windows(predictor: Predictor) -> list[tuple[float, float]]:
    """The ranges that the models keep, each once."""
    return list(dict.fromkeys((low, high) for low, high in (about["hu_window"] for about in predictor.abouts)))


def _refuse_raw(volume: Volume, index: int, image: NDArray[np.float32], predictor: Predictor) -> None:
    if any(raw_slice(count_values(image, hu_window), hu_window) for hu_window in _hu_windows(predictor)):
        raise InputError(
            f"Slice {index} of {volume.path} looks like raw CT values without their offset, among others in HU; bring "
            "all to HU (value - 1024, as a rule)."
        )


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
        InputError: If a slice cannot be read, or holds values that are no numbers or no HU.
    """
    check_volume(volume, predictor)
    length, names = volume.shape[0], predictor.class_names
    results: list[SliceResult] = []
    with ExitStack() as stack:
        # on disk, not in memory: one byte a voxel, with maps two more for each
        mask_file = stack.enter_context(tempfile.TemporaryFile(dir=folder))
        shown = _names_of_maps(names if with_probabilities else []) + (["uncertainty"] if with_uncertainty else [])
        map_files = {what: stack.enter_context(tempfile.TemporaryFile(dir=folder)) for what in shown}
        for turned in _predict_each(volume, predictor):
            probs = turn(turned, predictor.orientation, volume.orientation)
            pred = probs.argmax(0).astype(np.uint8)
            doubt = uncertainty(probs) if with_uncertainty else None
            mask_file.write(pred.tobytes())
            maps = [*_in_steps(probs, pred)] if with_probabilities else []
            maps += [_in_steps(doubt[None])[0]] if doubt is not None else []
            for file, values in zip(map_files.values(), maps, strict=True):
                file.write(values.tobytes())
            results.append(_slice_result(pred, doubt, predictor))
            if each:
                each(pred)
            if progress:
                progress(len(results), length)
        mask = _mapped(mask_file, np.uint8, volume.shape)
        files = {"mask": volume.save_mask(folder, mask, file_labels(len(names), predictor.background_class))}
        for what, file in map_files.items():
            files[what] = volume.save_map(folder, _mapped(file, np.uint16, volume.shape), what)
        files["panels"] = folder / f"{volume.name}_panels.png"
        _draw(volume, mask, results, predictor, files["panels"])
    pixels = np.sum([one.pixels for one in results], axis=0)
    return VolumeResult(volume, results, pixels, _affected(pixels, predictor), files)


def _names_of_maps(class_names: Sequence[str]) -> list[str]:
    """What the files of the probabilities of some classes are called, each differently."""
    names: list[str] = []
    for name in class_names:
        names.append(file_name(f"probability_{name}", names))
    return names


def _slice_result(pred: NDArray[np.uint8], doubt: NDArray[np.float32] | None, predictor: Predictor) -> SliceResult:
    is_lesion = np.isin(pred, predictor.lesion_classes)
    mean_doubt = float(doubt[is_lesion].mean()) if doubt is not None and is_lesion.any() else None
    pixels = np.bincount(pred.ravel(), minlength=len(predictor.class_names))
    return SliceResult(pixels, _affected(pixels, predictor), mean_doubt)


def _affected(pixels: NDArray[np.int64], predictor: Predictor) -> float | None:
    return affected_percent(pixels, predictor.lesion_classes, predictor.background_class)


def _predict_each(volume: Volume, predictor: Predictor) -> Iterator[NDArray[np.float32]]:
    """The probabilities (C, H, W) of every slice, with neighbours of its own volume alone."""

    def read(index: int) -> NDArray[np.float32]:
        image = _read_finite(volume, index)
        _refuse_raw(volume, index, image, predictor)  # each one, as `check_volume` sees only some
        return turn(image, volume.orientation, predictor.orientation)

    for start, stop in _volumes_in(volume, predictor, read):
        for _, probs in predictor.probabilities(lambda index, start=start: read(start + index), stop - start):  # type: ignore[misc]
            yield probs


def _volumes_in(volume: Volume, predictor: Predictor, read: ReadSlice) -> list[tuple[int, int]]:
    """First and one past the last slice of each volume: found in the images, as in training, where nothing tells."""
    length = volume.shape[0]
    if predictor.context == 0 or volume.is_volume:
        return [(0, length)]
    hu_window = predictor.abouts[0]["hu_window"]
    thumbnails = np.stack([resize(window(read(index), hu_window), THUMBNAIL) for index in range(length)])
    numbers = find_groups(thumbnails, np.zeros(length, np.int64)).volumes
    borders = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), length]
    return list(itertools.pairwise(borders))


def _in_steps(values: NDArray[np.float32], pred: NDArray[np.uint8] | None = None) -> NDArray[np.uint16]:
    """Numbers (C, H, W) in 0..1 in steps of 1 / 65535; the class of `pred`, if given, leads where they tie."""
    steps = quantise(np.clip(values, 0, 1))
    if pred is not None:
        top = steps.max(0)
        is_tie = (steps == top).sum(0) > 1
        np.put_along_axis(steps, pred[None], (top + is_tie)[None], 0)
    return steps


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
    captions = [
        f"slice {row} of 0 to {len(results) - 1} · {affected_text(results[row].affected_percent)}" for row in rows
    ]
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
