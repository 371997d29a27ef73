"""Exported models: the same numbers in other programs, and files that tell how to use them."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from torch import nn

from matchai.data.phantom import phantom_slices
from matchai.model.unetplusplus import build_model
from matchai.prediction import export_formats
from matchai.prediction.export_formats import ExportError, compare, describe, pack_onnx, pack_safetensors, sample
from matchai.prediction.inference import Predictor

ABOUT: dict[str, Any] = {
    "class_names": ["ground glass", "consolidation", "lungs other", "background"],
    "background_class": "background",
    "lesion_classes": ["ground glass", "consolidation"],
    "hu_window": [-1500.0, 500.0],
    "mean_hu": -600.0,
    "std_hu": 450.0,
    "image_size": 64,
    "orientation": "LP",
    "rescale": [1.0, 0.0],
    "encoder": "tu-test_resnet",
    "context": 1,
    "in_channels": 3,
    "epoch": 2,
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build_model("tu-test_resnet", 4, in_channels=3).eval()


@pytest.fixture(scope="module")
def onnx_file(model: nn.Module) -> bytes:
    return pack_onnx(model, ABOUT)[0]


@pytest.fixture(scope="module")
def session(onnx_file: bytes) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_onnxruntime_gives_the_runs_logits_for_any_batch(
    batch_size: int, session: onnxruntime.InferenceSession, model: nn.Module
) -> None:
    images = sample(ABOUT)[:batch_size]
    with torch.inference_mode():
        expected = model(torch.from_numpy(images)).numpy()
    (logits,) = session.run(["logits"], {"images": images})
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_the_metadata_tell_how_images_are_made(session: onnxruntime.InferenceSession) -> None:
    told = json.loads(session.get_modelmeta().custom_metadata_map["matchai"])
    assert told | ABOUT == told
    assert told["input_shape"] == ["batch", 3, 64, 64]
    words = " ".join(told["preprocessing"])
    for part in ("-1500 to 500 HU", "64 x 64", "-600.0", "450.0", "toward the patient's left", "3 slices as channels"):
        assert part in words


def test_the_metadata_are_enough_for_the_masks_of_a_prediction(
    onnx_file: bytes, model: nn.Module, tmp_path: Path
) -> None:
    """By numpy, OpenCV and onnxruntime alone, as another program would."""
    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    told = json.loads(session.get_modelmeta().custom_metadata_map["matchai"])
    volume = np.stack([image for image, _, _ in phantom_slices(4, size=96)]).astype(np.float32)
    (low, high), size = told["hu_window"], told["input_shape"][-1]
    small = [cv2.resize(np.clip(one, low, high), (size, size), interpolation=cv2.INTER_AREA) for one in volume]
    ready = [((one - told["mean_hu"]) / told["std_hu"]).astype(np.float32) for one in small]
    around = [(1, 0, 1), (0, 1, 2), (1, 2, 3), (2, 3, 2)]  # one neighbour on each side, mirrored at the ends
    stacks = np.stack([[ready[index] for index in places] for places in around])
    scores = np.exp(session.run(["logits"], {"images": stacks})[0])
    scores /= scores.sum(axis=1, keepdims=True)
    masks = [np.argmax([cv2.resize(one, (96, 96)) for one in each], axis=0) for each in scores]
    (tmp_path / "best.safetensors").write_bytes(pack_safetensors(model, ABOUT)[0])
    predictor = Predictor([tmp_path], mixed_precision="no", device=torch.device("cpu"))
    predicted = [probs.argmax(0) for _, probs in predictor.probabilities(lambda index: volume[index], 4)]
    assert (np.stack(masks) != np.stack(predicted)).mean() < 1e-3  # where two classes are equal but for rounding


def test_the_file_names_no_folder_of_the_machine_that_made_it(onnx_file: bytes) -> None:
    for folder in (Path(export_formats.__file__).parent, Path(torch.__file__).parent, Path.home()):
        assert str(folder).encode() not in onnx_file


def test_plain_smp_takes_the_weights_and_gives_the_same_logits(model: nn.Module, tmp_path: Path) -> None:
    content, found = pack_safetensors(model, ABOUT)
    assert (found.max_difference, found.num_other, found.num_pixels) == (0, 0, 4 * 64 * 64)
    (tmp_path / "model.safetensors").write_bytes(content)
    with safe_open(tmp_path / "model.safetensors", "pt") as opened:
        assert json.loads(opened.metadata()["matchai"]) == ABOUT | describe(ABOUT)


def test_weights_that_plain_smp_does_not_take_are_no_export(model: nn.Module) -> None:
    with pytest.raises(ExportError, match="plain smp does not take these weights"):
        pack_safetensors(model, ABOUT | {"in_channels": 1, "context": 0})


def test_a_phantom_slice_has_its_neighbours_as_channels() -> None:
    middle = sample(ABOUT | {"context": 0, "in_channels": 1})[0, 0]
    slices = sample(ABOUT)[0]
    assert slices.shape == (3, 64, 64)
    assert not np.array_equal(slices[0], slices[1])
    np.testing.assert_array_equal(slices[1], middle)


@pytest.mark.parametrize("wrong", [1e-2, float("nan")])
def test_another_model_is_found_out(wrong: float, model: nn.Module) -> None:
    def other(images: Any) -> Any:
        with torch.inference_mode():
            logits = model(torch.from_numpy(images)).numpy()
        logits[0, 0, 0, 0] += wrong
        return logits

    with pytest.raises(ExportError, match="differs from the run's"):
        compare(model, other, sample(ABOUT))


def test_pixels_in_which_two_classes_are_equal_are_counted_and_told() -> None:
    images = np.zeros((2, 1, 4, 4), np.float32)
    tied = np.ones((2, 2, 4, 4), np.float32)

    def other(batch: Any) -> Any:
        logits = tied[: len(batch)].copy()
        logits[0, 1, 0, 0] += 1e-6
        return logits

    class Tied(nn.Module):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(tied[: len(batch)])

    found = compare(Tied(), other, images)
    assert (found.num_other, found.num_pixels) == (2, 32)
    assert "all but 2 of 32 pixels" in str(found)
