from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from matchai.prediction.inference import Predictor, load_model, uncertainty
from matchai.system.errors import InputError
from tests.kept import keep_weights

Floats = NDArray[np.float32]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return keep_weights(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def volume() -> Floats:
    """5 slices of 64 x 64."""
    return np.random.default_rng(1).uniform(-1000, 400, (5, 64, 64)).astype(np.float32)


def predict(runs: list[Path], volume: Floats, indices: list[int] | None = None, **options: Any) -> Floats:
    predictor = Predictor(runs, mixed_precision="no", **options)
    found = list(predictor.probabilities(lambda index: volume[index], len(volume), indices))
    assert [index for index, _ in found] == (indices or list(range(len(volume))))
    return np.stack([probs for _, probs in found])


@pytest.mark.parametrize("size", [(64, 64), (512, 512), (40, 100)])
def test_probabilities_have_the_slices_size_and_add_up_to_1(run: Path, size: tuple[int, int]) -> None:
    probs = predict([run], np.random.default_rng(0).uniform(-1000, 400, (1, *size)).astype(np.float32))
    assert probs.shape == (1, 4, *size)
    assert np.abs(probs.sum(1) - 1).max() < 1e-5


def test_they_are_the_softmax_of_the_plain_network_on_standardised_slices(run: Path, volume: Floats) -> None:
    model, about = load_model(run)
    steps = np.rint((volume + 1500) / 2000 * 65535) / 65535
    images = (steps * 2000 - 1500 - about["mean_hu"]) / about["std_hu"]
    with torch.no_grad():
        expected = model(torch.from_numpy(images).float()[:, None]).softmax(1).numpy()
    assert np.abs(predict([run], volume) - expected).max() < 1e-4


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_the_batch_size_changes_nothing_but_rounding(run: Path, volume: Floats, batch_size: int) -> None:
    assert np.abs(predict([run], volume, batch_size=batch_size) - predict([run], volume, batch_size=5)).max() < 1e-5


def test_chosen_slices_are_predicted_as_among_all(run: Path, volume: Floats) -> None:
    assert np.abs(predict([run], volume, [1, 4]) - predict([run], volume)[[1, 4]]).max() < 1e-5


@pytest.mark.parametrize(("orientation", "axis"), [("LP", -2), ("PR", -1)])
def test_with_mirrored_passes_a_mirrored_patient_gets_the_mirrored_prediction(
    tmp_path: Path, volume: Floats, orientation: str, axis: int
) -> None:
    run = keep_weights(tmp_path, orientation=orientation)
    straight = predict([run], volume, is_mirrored=True)
    mirrored = predict([run], np.flip(volume, axis).copy(), is_mirrored=True)
    assert np.abs(np.flip(mirrored, axis) - straight).max() < 1e-5


def test_an_ensemble_is_the_mean_of_its_members_whatever_their_sizes(tmp_path: Path, volume: Floats) -> None:
    runs = [keep_weights(tmp_path / "a", seed=1), keep_weights(tmp_path / "b", seed=2, image_size=96, mean_hu=-500.0)]
    alone = [predict([run], volume) for run in runs]
    assert np.abs(predict(runs, volume) - np.mean(alone, axis=0)).max() < 1e-5


def test_neighbours_are_channels_and_mirrored_at_the_ends(tmp_path: Path, volume: Floats) -> None:
    run = keep_weights(tmp_path, context=1, in_channels=3)
    model, _ = load_model(run)
    steps = np.rint((volume + 1500) / 2000 * 65535) / 65535
    images = (steps * 2000 - 1500 + 600) / 400
    stacks = np.stack([images[[1, 0, 1]], images[[1, 2, 3]], images[[3, 4, 3]]])
    with torch.no_grad():
        expected = model(torch.from_numpy(stacks).float()).softmax(1).numpy()
    assert np.abs(predict([run], volume, [0, 2, 4]) - expected).max() < 1e-4


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("class_names", ["consolidation", "ground glass", "lungs other", "background"]),
        ("lesion_classes", ["consolidation"]),
        ("orientation", "PL"),
    ],
)
def test_runs_that_differ_in_what_they_mean_are_refused_together(tmp_path: Path, name: str, value: Any) -> None:
    runs = [keep_weights(tmp_path / "a"), keep_weights(tmp_path / "b", **{name: value})]
    with pytest.raises(InputError, match=f"has {name}"):
        Predictor(runs)


def test_weights_from_before_orientation_and_context_are_taken_as_the_kaggle_arrays(
    tmp_path: Path, run: Path, volume: Floats
) -> None:
    old = keep_weights(tmp_path, without=("orientation", "rescale", "context"))
    assert Predictor([old]).orientation == "LP"
    assert np.array_equal(predict([old], volume), predict([run], volume))


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    run = keep_weights(tmp_path)
    content = (run / "best.safetensors").read_bytes()
    (run / "best.safetensors").write_bytes(content.replace(b"tu-test_resnet", b"tu-test_vit_xx"[:14]))
    with pytest.raises(InputError):
        load_model(run)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; give the folder of a matchai run"):
        Predictor([tmp_path])


def test_uncertainty_is_0_for_certain_pixels_and_1_for_even_odds() -> None:
    probs = np.zeros((4, 1, 2), np.float32)
    probs[2, 0, 0] = 1
    probs[:, 0, 1] = 0.25
    assert np.abs(uncertainty(probs) - [[0, 1]]).max() < 1e-6


def test_uncertainty_of_two_equally_likely_classes_of_four_is_one_half() -> None:
    probs = np.array([0.5, 0.5, 0, 0], np.float32).reshape(4, 1, 1)
    assert abs(float(uncertainty(probs)[0, 0]) - 0.5) < 1e-6
