"""A run's model as a file for other programs: ONNX, or weights for plain segmentation-models-pytorch; each checked."""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from matchai.data import mirrored, phantom_slices
from matchai.model import smp
from matchai.system import FailedError, InputError, need
from matchai.training import pack_weights

OPSET = 18  # what torch's exporter writes without converting, and onnxruntime reads since 1.14
ROUNDING = 1e-4  # of the largest logit: 100 times what torch and onnxruntime were seen to differ by
ONE_FILE = 2**31 - 1  # bytes that a protobuf may have

_Floats = NDArray[np.float32]

_SIDES = {"L": "left", "R": "right", "A": "front", "P": "back"}


class ExportError(FailedError):
    """The exported model is not the run's."""


@dataclass(frozen=True)
class Comparison:
    """An exported model beside the run's, on the same images.

    Attributes:
        max_difference: Largest difference of two logits.
        num_pixels: Pixels compared.
        num_other: Pixels in which another class has the largest logit; only where two are equal but for rounding.
    """

    max_difference: float
    num_pixels: int
    num_other: int

    def __str__(self) -> str:
        same = f"all {self.num_pixels:,}" if not self.num_other else f"all but {self.num_other} of {self.num_pixels:,}"
        ties = " (there two classes are equal but for rounding)" if self.num_other else ""
        return f"the largest difference of a logit is {self.max_difference:.1e}; the same class in {same} pixels{ties}"


def pack_onnx(model: nn.Module, about: dict[str, Any]) -> tuple[bytes, Comparison]:
    """Makes an ONNX file of a model, weights inside, and compares it with the model in onnxruntime.

    Its input `images` (B, in_channels, S, S) float32 and output `logits` (B, C, S, S) float32 take any B; its metadata
    entry `matchai` is a JSON text of what prediction needs, see `describe`.

    Args:
        model: In evaluation mode, on the CPU, in float32.
        about: What `matchai.prediction.inference.load_model` tells of it.

    Returns:
        The file, and the comparison on a phantom slice and on noise, in batches of one and three.

    Raises:
        InputError: If the extra `onnx` is missing, or the model is larger than an ONNX file may be.
        ExportError: If torch cannot export the model, or the exported one computes something else.
    """
    onnx, runtime, _ = (need(name, "onnx", "Writing ONNX") for name in ("onnx", "onnxruntime", "onnxscript"))
    size = sum(value.nbytes for value in model.state_dict().values())
    if size > ONE_FILE:
        raise InputError(
            f"The model has {size / 1e9:.1f} GB, more than the 2 GB that an ONNX file can hold: export it with "
            "--format safetensors."
        )
    images = sample(about)
    example = torch.from_numpy(np.repeat(images[:1], 2, axis=0))
    try:
        with warnings.catch_warnings(action="ignore"):  # of the exporter's own parts, to their authors
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
        assert program is not None
        file = program.model_proto
    except Exception as error:  # the exporter raises errors of many kinds, each with pages of traces
        raise ExportError(f"torch cannot export this model to ONNX: {str(error).splitlines()[0]}") from error
    _forget_sources(file)
    file.producer_name, file.producer_version = "matchai", metadata.version("matchai")
    entry = file.metadata_props.add()
    entry.key, entry.value = "matchai", json.dumps(about | describe(about))
    onnx.checker.check_model(file)
    content: bytes = file.SerializeToString()
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, compare(model, lambda batch: session.run(["logits"], {"images": batch})[0], images)


def pack_safetensors(model: nn.Module, about: dict[str, Any]) -> tuple[bytes, Comparison]:
    """Makes a safetensors file of a model's weights, and compares it with the model in plain smp.

    Args:
        model: In evaluation mode, on the CPU, in float32.
        about: What `matchai.prediction.inference.load_model` tells of it; it stands in the header as JSON under
            `matchai`, with `describe`.

    Raises:
        ExportError: If smp's own model does not take the weights, or computes something else.
    """
    with warnings.catch_warnings(action="ignore"):  # smp announces other names for some encoders
        plain: Any = smp.UnetPlusPlus(
            about["encoder"], encoder_weights=None, in_channels=about["in_channels"], classes=len(about["class_names"])
        )
    weights = model.state_dict()
    try:
        plain.load_state_dict(weights)
    except RuntimeError as error:
        raise ExportError(f"plain smp does not take these weights: {str(error).splitlines()[0]}") from error
    plain.eval()
    with torch.inference_mode():
        found = compare(model, lambda batch: np.asarray(plain(torch.from_numpy(batch))), sample(about))
    return pack_weights(weights, about | describe(about)), found


def describe(about: dict[str, Any]) -> dict[str, Any]:
    """Says in words and numbers how images are made for the model, and what its logits mean.

    Args:
        about: What `matchai.prediction.inference.load_model` tells of the model.

    Returns:
        `preprocessing` and `output`, lists of sentences, and `input_shape` and `output_shape`.
    """
    (low, high), size = about["hu_window"], about["image_size"]
    context, channels, names = about["context"], about["in_channels"], about["class_names"]
    down, across = (_SIDES[side] for side in about["orientation"])
    steps = [
        "take the axial slice in Hounsfield units (HU)",
        f"turn it so that its rows follow one another toward the patient's {down} and its columns toward the {across}",
        f"clip it to {low:g} to {high:g} HU",
        f"resize it to {size} x {size} pixels: area means where both sides shrink (OpenCV's INTER_AREA), else bilinear",
        f"subtract {about['mean_hu']!r} HU and divide by {about['std_hu']!r} HU",
    ]
    if context:
        steps.append(
            f"stack {channels} slices as channels, from the {context} before to the {context} after in the volume, "
            "mirrored at its ends (before slice 0 comes slice 1)"
        )
    classes = ", ".join(f"{number} {name}" for number, name in enumerate(names))
    return {
        "preprocessing": steps,
        "output": [
            f"logits of the classes {classes}; {about['background_class']!r} is the background",
            "softmax over axis 1 makes probabilities of them; resize these bilinearly to the slice's own size, with "
            "antialiasing where it is smaller, and each pixel's class is the most probable one",
        ],
        "input_shape": ["batch", channels, size, size],
        "output_shape": ["batch", len(names), size, size],
    }


def sample(about: dict[str, Any]) -> _Floats:
    """Images for a comparison, (4, in_channels, S, S): a volume of the synthetic phantom, and three of noise."""
    (low, high), size, channels = about["hu_window"], about["image_size"], about["in_channels"]
    volume = [np.clip(image, low, high) for image, _, _ in phantom_slices(8, size=size)]
    stack = np.stack([volume[3 + index] for index in mirrored(0, about["context"], 5)])
    standardised = ((stack - about["mean_hu"]) / about["std_hu"]).astype(np.float32)
    noise = np.random.default_rng(0).standard_normal((3, channels, size, size), np.float32)
    return np.concatenate((standardised[None], noise))


def compare(model: nn.Module, other: Callable[[_Floats], _Floats], images: _Floats) -> Comparison:
    """Compares two models' logits on images, the first alone, the others as one batch.

    Args:
        model: The run's.
        other: Takes images (B, in_channels, S, S) float32 to logits (B, C, S, S) float32.
        images: (N, in_channels, S, S) float32, N above 1.

    Raises:
        ExportError: If they differ by more than rounding.
    """
    batches = (images[:1], images[1:])
    with torch.inference_mode():
        first = np.concatenate([model(torch.from_numpy(batch)).numpy() for batch in batches])
    second = np.concatenate([other(batch) for batch in batches])
    difference = float(np.abs(first - second).max())
    bound = ROUNDING * float(np.abs(first).max())
    if not difference <= bound:  # nor is a difference that is not a number
        raise ExportError(
            f"The exported model differs from the run's by up to {difference:.1e} in a logit, where rounding explains "
            f"{bound:.1e}; nothing was written."
        )
    other_class = first.argmax(axis=1) != second.argmax(axis=1)
    return Comparison(difference, other_class.size, int(other_class.sum()))


def _forget_sources(file: Any) -> None:
    """Takes out what the exporter notes beside each node: places in this machine's source files."""
    graph = file.graph
    functions = [part for function in file.functions for part in (function, *function.node)]
    tensors = (*graph.value_info, *graph.input, *graph.output, *graph.initializer)
    for part in (graph, *graph.node, *tensors, *functions):
        del part.metadata_props[:]
        part.doc_string = ""
