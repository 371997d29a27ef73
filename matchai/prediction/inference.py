"""Prediction with the networks that runs kept: from slices in HU to class probabilities at the slices' own size."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from matchai.data import STEPS, mirrored, quantise, resize, window
from matchai.model import build_model, use_fast_layers
from matchai.system import HALF_DTYPES, InputError, choose_precision, keep_heap, set_threads
from matchai.training import load_weights

# of weights that do not tell it yet
OLDER: dict[str, Any] = {"orientation": "LP", "rescale": [1.0, 0.0], "data_kind": "npy", "context": 0, "in_channels": 1}
ALIKE = ("class_names", "background_class", "lesion_classes", "orientation")  # what an ensemble must agree on

ReadSlice = Callable[[int], NDArray[np.float32]]


def load_model(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network that a run kept, ready to predict, and what its file tells of it.

    Args:
        path: A run's folder, or its best.safetensors.

    Returns:
        A model that takes standardised images (B, in_channels, S, S) to logits (B, C, S, S), on the CPU, and the
        description that `matchai.runs.setup.describe_weights` made.

    Raises:
        InputError: If there are no weights, or they are not of the network that their file describes.
    """
    weights, about = load_weights(path)
    about = OLDER | about
    model = build_model(
        about["encoder"], len(about["class_names"]), in_channels=about["in_channels"], image_size=about["image_size"]
    )
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        raise InputError(
            f"The weights of {path} do not fit the {about['encoder']} that they are described as; train the run again, "
            "or take another."
        ) from None
    return model.eval(), about


@dataclass(frozen=True)
class _Member:
    """One network of an ensemble, and what its slices go through: window, size, standardisation, neighbours."""

    model: nn.Module
    hu_window: tuple[float, float]
    image_size: int
    mean: float
    std: float
    context: int

    def prepare(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        """A slice (H, W) in HU as training prepared its own: windowed, resized, rounded to steps, standardised."""
        windowed = window(image, self.hu_window)
        resized = windowed if windowed.shape == (self.image_size,) * 2 else resize(windowed, self.image_size)
        values = quantise(resized).astype(np.float32) * np.float32(1 / STEPS)
        return (values - np.float32(self.mean)) / np.float32(self.std + 1e-8)


class Predictor:
    """Predicts slices with one run, or with the mean of several runs' probabilities.

    Args:
        runs: Folders of runs, or files of their best weights.
        is_mirrored: Also predicts each slice mirrored left to right, and takes the mean of both passes.
        mixed_precision: `auto`, `no`, `bf16` or `fp16` (`matchai.system.machine.choose_precision`).
        batch_size: Slices of one forward pass; None for 8 on a CPU, 16 on a GPU.
        device: Where to; None for the GPU where there is one.

    Attributes:
        abouts: What each run's file of weights tells.
        class_names: The C classes.
        background_class: Index of the background.
        lesion_classes: Indices of the lesion classes.
        orientation: How the networks want their slices to lie (`matchai.settings.config`).
        device: Where it computes.
        precision: In which precision, and why.
        context: Neighbours on each side that a slice is predicted with, the most of all runs.
        num_passes: Forward passes that each probability is a mean of.

    Raises:
        InputError: If a run has no weights, or runs differ in classes or orientation.
    """

    def __init__(
        self,
        runs: Sequence[Path],
        *,
        is_mirrored: bool = False,
        mixed_precision: str = "auto",
        batch_size: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        precision, reason = choose_precision(mixed_precision, self.device)
        self.precision = f"{precision} ({reason})"
        self._dtype = HALF_DTYPES.get(precision)
        self._batch_size = batch_size or (8 if self.device.type == "cpu" else 16)
        self._is_mirrored = is_mirrored
        keep_heap()
        set_threads(1)
        self.abouts: list[dict[str, Any]] = []
        self._members = [self._load(run) for run in runs]
        first = self.abouts[0]
        for (run, about), name in itertools.product(zip(runs, self.abouts, strict=True), ALIKE):
            if about[name] != first[name]:
                raise InputError(
                    f"{run} has {name} {about[name]}, but {runs[0]} has {first[name]}: runs that predict together must "
                    "agree on it."
                )
        self.class_names: list[str] = first["class_names"]
        self.background_class = self.class_names.index(first["background_class"])
        self.lesion_classes = [self.class_names.index(name) for name in first["lesion_classes"]]
        self.orientation: str = first["orientation"]
        self.context = max(member.context for member in self._members)
        self.num_passes = len(runs) * (2 if is_mirrored else 1)
        self._mirror = -2 if self.orientation[0] in "LR" else -1  # the axis from the patient's one side to the other

    def _load(self, run: Path) -> _Member:
        model, about = load_model(run)
        self.abouts.append(about)
        model = model.to(self.device).to(memory_format=torch.channels_last)
        use_fast_layers(model, self.device)
        low, high = about["hu_window"]
        mean, std = (about["mean_hu"] - low) / (high - low), about["std_hu"] / (high - low)
        return _Member(model, (low, high), about["image_size"], mean, std, about["context"])

    def probabilities(
        self, read: ReadSlice, length: int, indices: Sequence[int] | None = None
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Predicts slices of one volume; memory does not grow with their number.

        Args:
            read: Gives slice 0 to `length` - 1 of the volume, (H, W) float32 in HU, all of one size, in `orientation`;
                called from a thread.
            length: Slices of the volume, which are each other's context.
            indices: Which slices to predict, rising; None for all.

        Yields:
            The index of each slice, and its (C, H, W) float32 probabilities, which add up to 1 for every pixel.
        """
        wanted = range(length) if indices is None else indices
        batches = [wanted[start : start + self._batch_size] for start in range(0, len(wanted), self._batch_size)]
        with ThreadPoolExecutor(1) as pool:  # reads the next batch while this one is computed
            loading = [pool.submit(self._load_batch, read, length, batch) for batch in batches[:1]]
            for number, batch in enumerate(batches):
                size, inputs = loading.pop().result()
                loading += [pool.submit(self._load_batch, read, length, one) for one in batches[number + 1 :][:1]]
                yield from zip(batch, self._predict(inputs, size), strict=True)

    def _load_batch(self, read: ReadSlice, length: int, batch: Sequence[int]) -> tuple[tuple[int, int], list[Tensor]]:
        """The slices' own size, and for each member its images (B, in_channels, S, S)."""
        around = {index: mirrored(index, self.context, length) for index in batch}
        slices = {index: read(index) for index in sorted({one for places in around.values() for one in places})}
        images = []
        for member in self._members:
            ready = {index: member.prepare(image) for index, image in slices.items()}
            own = slice(self.context - member.context, self.context + member.context + 1)
            images.append(torch.from_numpy(np.stack([[ready[k] for k in around[index][own]] for index in batch])))
        height, width = slices[batch[0]].shape
        return (height, width), images

    @torch.inference_mode()
    def _predict(self, inputs: list[Tensor], size: tuple[int, int]) -> NDArray[np.float32]:
        """The mean probabilities (B, C, H, W) of all members and passes."""
        total: Tensor | None = None
        for member, images in zip(self._members, inputs, strict=True):
            on_device = images.to(self.device, non_blocking=True).to(memory_format=torch.channels_last)
            probs = self._forward(member.model, on_device)
            if self._is_mirrored:
                probs = probs + self._forward(member.model, on_device.flip(self._mirror)).flip(self._mirror)
            if probs.shape[2:] != size:
                # antialiased where the slice is smaller than the network's input; weights of each pixel add up to 1
                probs = F.interpolate(probs, size, mode="bilinear", antialias=True)
            total = probs if total is None else total + probs
        assert total is not None
        return np.asarray((total / self.num_passes).cpu().contiguous())

    def _forward(self, model: nn.Module, images: Tensor) -> Tensor:
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not None):
            logits: Tensor = model(images)
        return logits.float().softmax(1)


def uncertainty(probabilities: NDArray[np.float32]) -> NDArray[np.float32]:
    """The entropy of mean probabilities as a share of the greatest, 0 to 1: a flag for review, no estimate of error.

    Of probabilities that are a mean over test-time passes, as in Wang et al. (2019, Neurocomputing 338, 34-45).

    Args:
        probabilities: (C, H, W), which add up to 1 for every pixel.

    Returns:
        (H, W) float32.
    """
    logs = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))
    entropy: NDArray[np.float32] = -(probabilities * logs).sum(0) / np.float32(np.log(len(probabilities)))
    return np.clip(entropy, 0, 1)
