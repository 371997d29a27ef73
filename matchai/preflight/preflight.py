"""A training that is thought of, looked at on this machine and its data: what would stop it, or harm it."""

import os
import tempfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from matchai.data import STEPS, Data, bytes_per_slice, open_sets
from matchai.preflight.data import (
    check_sampler,
    check_split,
    check_values,
    choose_slices,
    class_table,
    count_values,
    describe_sets,
)
from matchai.preflight.hardware import (
    check_devices,
    check_disk,
    check_kernels,
    check_shared_memory,
    check_threads,
    choose_device,
)
from matchai.preflight.software import Finding, check_encoder, check_launcher, check_trackers
from matchai.runs import read
from matchai.settings import TrainConfig, check
from matchai.system import Display, InputError, Problems, check_launch, choose_precision, default_workers, num_cores
from matchai.training import build_model_of, step_problems
from matchai.volumes import UPRIGHT, turn

HISTOGRAM, PANELS = "histogram.png", "slices.png"
PREPARING = ".preparing-"  # what a killed examination leaves behind begins so


def check_training(config: TrainConfig, pictures: Path) -> Iterator[Finding]:
    """Examines what a training by these settings needs, from the settings over the machine to the data.

    Args:
        config: All settings; `output` is not looked at.
        pictures: Folder of the pictures of the data; nothing is written elsewhere, and nothing without data.

    Yields:
        Each finding as soon as it is known.
    """
    wrong = check(config)
    yield from _problems(wrong)
    launch = Problems()
    with launch.collect():
        check_launch()
    yield from _problems(launch)
    device = choose_device()
    yield from check_devices(device)
    try:
        precision, reason = choose_precision(config.optimisation.mixed_precision, device)
        yield Finding("ok", f"Precision: {precision} ({reason})")
    except InputError as error:
        yield from _problems(error.problems)
    if device.type == "cpu":
        yield check_kernels()
    yield check_threads(device.type, num_cores())
    yield from check_launcher(torch.cuda.device_count())
    yield from check_trackers(config.machine.tracker)
    workers = default_workers(device, 1) if config.machine.num_workers is None else config.machine.num_workers
    channels, size = 2 * config.network.context + 1, config.input.image_size
    yield check_shared_memory(workers, config.sampling.batch_size, channels, size)
    model: list[nn.Module] = []
    weights = str(config.run.init or config.network.encoder_weights)
    yield check_encoder(config.network.encoder, weights, lambda weights: model.append(_build(config, weights)))
    num_slices = config.input.phantom_slices
    if config.input.data is None:
        yield Finding("ok", "Data: none named, so training takes the built-in synthetic phantom")
    elif wrong:
        yield Finding("warning", "The data are not examined", "fix the settings first")
    else:
        try:
            data = yield from _check_data(config, device, model[0] if model else None, pictures)
            num_slices = len(data.slices)
        except InputError as error:
            yield from _problems(error.problems)
    yield check_disk(config.input.cache or Path("runs") / "cache", "--cache", num_slices * bytes_per_slice(size))
    yield check_disk(Path("runs"), "--output")


def _build(config: TrainConfig, encoder_weights: str) -> nn.Module:
    changes = {} if config.run.init else {"encoder_weights": encoder_weights}
    return build_model_of(config.updated(**changes), is_resuming=False)


def _check_data(
    config: TrainConfig, device: torch.device, model: nn.Module | None, pictures: Path
) -> Generator[Finding, None, Data]:
    """Reads the data as training would; returns them, or raises InputError with its problems."""
    settings, names = config.input, config.input.class_names
    assert settings.data is not None
    _make_picture_folder(pictures)
    # the slices are prepared as training does it, but for this once
    with tempfile.TemporaryDirectory(dir=pictures, prefix=PREPARING) as cache:
        with closing(Display(True)) as display:
            data = read(config, Path(cache), display)
        sets = open_sets(settings.data, settings, Path(cache))
        yield describe_sets(sets)
        yield from (Finding("ok", f"Note: {note}") for note in data.notes)
        values = count_values(sets, settings.hu_window)
        yield check_values(values, settings.hu_window)
        yield Finding("ok", "Classes, at training size:", lines=class_table(data, names))
        yield from check_split(data)
        sampling, presence = config.sampling, data.presence()[data.train]
        targets = [names.index(name) for name in sampling.target_classes]
        yield check_sampler(presence, targets, sampling.target_classes, sampling.sampler_weight)
        yield from _problems(step_problems(config, len(data.train), 1, device, model))
        _draw(config, data, values.counts, pictures)
    yield Finding("ok", f"Pictures: {pictures / HISTOGRAM} and {pictures / PANELS}")
    return data


def _problems(sentences: Sequence[str]) -> Iterator[Finding]:
    """Findings in the words in which training would refuse to start; the sentences hold their remedies."""
    return (Finding("problem", sentence) for sentence in sentences)


def _make_picture_folder(folder: Path) -> None:
    """Makes the folder of the pictures, or finds it with nothing else in it; raises InputError otherwise."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir() if not path.name.startswith(PREPARING)}
        others = sorted(names - {HISTOGRAM, PANELS})
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "no permission")
    except OSError as error:
        raise InputError(
            f"The folder {folder} for the pictures cannot be written ({error.strerror}); name another with --output."
        ) from None
    if others:
        raise InputError(
            f"The folder {folder} holds {others[0]}, so it is no folder of pictures of the data; name another, not "
            "the run's, with --output."
        )


def _draw(config: TrainConfig, data: Data, counts: NDArray[np.int64], folder: Path) -> None:
    # matplotlib takes half a second to import
    from matchai.preflight.figures import draw_histogram, draw_slices  # noqa: PLC0415

    settings, names = config.input, list(config.input.class_names)
    source = settings.data.resolve().name if settings.data else ""
    draw_histogram(counts, settings.hu_window, folder / HISTOGRAM, title=f"{source}: values within the window")
    rows = choose_slices(data, settings.lesion_indices)
    sides = dict.fromkeys(data.train, "training") | dict.fromkeys(data.val, "validation")
    draw_slices(
        turn(data.slices.images[rows].astype(np.float32) / STEPS, data.orientation, UPRIGHT),
        turn(data.slices.targets[rows], data.orientation, UPRIGHT),
        [f"slice {row}, group {data.groups[row]}, {sides[row]}" for row in rows],
        names,
        settings.background_index,
        folder / PANELS,
        title=f"{source}: slices and masks; the patient's front must be at the top, the left side at the right",
    )
