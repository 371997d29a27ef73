from pathlib import Path

import numpy as np
import pytest

from matchai.inference import Predictor
from matchai.prediction import predict_volume
from matchai.volumes import open_array_volume
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
