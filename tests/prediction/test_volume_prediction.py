from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from matchai.data.phantom import write_phantom
from matchai.prediction.inference import Predictor
from matchai.prediction.volume_prediction import predict_volume
from matchai.system import InputError
from matchai.volumes.volume import open_array_volume
from tests.kept import NAMES, keep_weights


def test_maps_peak_at_the_class_of_the_mask_even_where_rounding_makes_them_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "scan.npy", np.random.default_rng(0).uniform(-1000, 400, (1, 32, 32)))
    predictor = Predictor([keep_weights(tmp_path / "run")], mixed_precision="no")
    probs = np.zeros((4, 32, 32), np.float32)
    probs[0], probs[2] = 0.4999999, 0.5000001  # nearer to each other than a step of the map
    monkeypatch.setattr(predictor, "probabilities", lambda read, length: [(0, probs)])
    volume = open_array_volume(tmp_path / "scan.npy", "LP", (1, 0))
    files = predict_volume(volume, predictor, tmp_path, with_probabilities=True).files
    maps = np.stack([np.load(files[f"probability_{name.replace(' ', '_')}"]) for name in NAMES])
    assert (np.load(files["mask"]) == 2).all()
    assert (maps.argmax(0) == 2).all()


def test_neighbours_never_come_from_another_volume_of_the_same_array(tmp_path: Path) -> None:
    write_phantom(tmp_path, 16, size=64)  # two volumes of eight slices
    images = np.load(tmp_path / "images_medseg.npy")
    predictor = Predictor(
        [keep_weights(tmp_path / "run", context=1, in_channels=3)], mixed_precision="no", batch_size=8
    )

    def mask_of(name: str, slices: NDArray[Any]) -> NDArray[np.uint8]:
        np.save(tmp_path / name, slices)
        volume = open_array_volume(tmp_path / name, "LP", (1, 0))
        mask: NDArray[np.uint8] = np.load(predict_volume(volume, predictor, tmp_path).files["mask"])
        return mask

    apart = [mask_of("first.npy", images[:8]), mask_of("second.npy", images[8:])]
    assert np.array_equal(mask_of("both.npy", images), np.concatenate(apart))


@pytest.mark.parametrize("number", [0, 1])  # of 40 slices every third, from the first on, is looked at beforehand
def test_one_raw_slice_among_slices_in_hu_is_refused_wherever_it_lies(tmp_path: Path, number: int) -> None:
    images = np.random.default_rng(0).uniform(-1000, 400, (40, 32, 32))
    images[number] += 1024
    np.save(tmp_path / "scan.npy", images)
    predictor = Predictor([keep_weights(tmp_path / "run")], mixed_precision="no")
    volume = open_array_volume(tmp_path / "scan.npy", "LP", (1, 0))
    with pytest.raises(InputError, match=rf"Slice {number} of .*scan\.npy looks like raw CT values"):
        predict_volume(volume, predictor, tmp_path)
    assert not list(tmp_path.glob("*mask*"))
