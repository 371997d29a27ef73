import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from matchai.prediction.pipeline import predict
from matchai.settings.command_settings import PredictSettings
from matchai.system.errors import InputError
from tests.kept import NAMES, keep_weights

Ints = NDArray[np.uint8]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return keep_weights(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def volume() -> NDArray[np.float32]:
    """3 slices of 64 x 48 with values like those of a CT."""
    return np.random.default_rng(2).uniform(-1000, 400, (3, 64, 48)).astype(np.float32)


def saved(folder: Path, name: str, array: NDArray[Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / name, array)
    return folder / name


def predicted(paths: tuple[Path, ...], output: Path, **options: Any) -> list[str]:
    return predict(PredictSettings(paths, output, **options))


def mask_of(run: Path, path: Path, output: Path, **options: Any) -> Ints:
    assert predicted((run, path), output, mixed_precision="no", **options) == []
    mask: Ints = np.load(output / f"{path.stem}_mask.npy")
    return mask


def test_the_summary_counts_the_pixels_of_the_mask(tmp_path: Path, run: Path, volume: NDArray[np.float32]) -> None:
    mask = mask_of(run, saved(tmp_path, "scan.npy", volume), tmp_path / "out")
    told = json.loads((tmp_path / "out" / "summary.json").read_text())["inputs"][0]
    counts = {name: found["pixels"] for name, found in told["classes"].items()}
    assert counts == {name: int((mask == index).sum()) for index, name in enumerate(NAMES)}
    lung = sum(counts.values()) - counts["background"]
    assert math.isclose(
        told["percent_of_lung_affected"], 100 * (counts["ground glass"] + counts["consolidation"]) / lung
    )
    assert told["classes"]["consolidation"]["ml"] is None  # a .npy array tells no spacing


def test_slices_that_lie_otherwise_get_the_same_mask_where_the_user_says_so(
    tmp_path: Path, run: Path, volume: NDArray[np.float32]
) -> None:
    as_trained = mask_of(run, saved(tmp_path / "a", "scan.npy", volume), tmp_path / "out-a")
    upright = saved(tmp_path / "b", "scan.npy", volume.swapaxes(1, 2).copy())
    assert np.array_equal(mask_of(run, upright, tmp_path / "out-b", orientation="PL"), as_trained.swapaxes(1, 2))


def test_numbers_that_are_no_hu_get_the_same_mask_once_they_are_made_hu(
    tmp_path: Path, run: Path, volume: NDArray[np.float32]
) -> None:
    whole = volume.round()
    as_hu = mask_of(run, saved(tmp_path / "a", "scan.npy", whole), tmp_path / "out-a")
    raw = saved(tmp_path / "b", "scan.npy", (whole + 1024).astype(np.uint16))
    assert np.array_equal(mask_of(run, raw, tmp_path / "out-b", rescale=(1, -1024)), as_hu)


def test_maps_of_probability_peak_where_the_mask_says(tmp_path: Path, run: Path, volume: NDArray[np.float32]) -> None:
    mask = mask_of(run, saved(tmp_path, "scan.npy", volume), tmp_path / "out", probabilities=True)
    maps = np.stack([np.load(tmp_path / "out" / f"scan_probability_{name.replace(' ', '_')}.npy") for name in NAMES])
    chosen = np.take_along_axis(maps, mask[None].astype(int), 0)[0]
    assert (chosen >= maps.max(0)).all()
    assert np.abs(maps.astype(np.float64).sum(0) - 1).max() < 4 * 2**-12


def test_a_slice_tells_the_mean_uncertainty_of_its_predicted_lesions(
    tmp_path: Path, run: Path, volume: NDArray[np.float32]
) -> None:
    path = saved(tmp_path, "scan.npy", volume)
    mask = mask_of(run, path, tmp_path / "out", uncertainty=True, tta=True)
    doubt = np.load(tmp_path / "out" / "scan_uncertainty.npy").astype(np.float64)
    rows = (tmp_path / "out" / "slices.csv").read_text().splitlines()
    told = [float(row.split(",")[-1]) for row in rows[1:]]
    assert np.allclose(told, [doubt[k][mask[k] < 2].mean() for k in range(3)], atol=1e-3)


def test_two_inputs_of_one_name_do_not_overwrite_each_other(
    tmp_path: Path, run: Path, volume: NDArray[np.float32]
) -> None:
    paths = [saved(tmp_path / name, "scan.npy", volume[:count]) for name, count in (("a", 1), ("b", 2))]
    assert predicted((run, *paths), tmp_path / "out") == []
    told = json.loads((tmp_path / "out" / "summary.json").read_text())["inputs"]
    assert [len(np.load(tmp_path / "out" / one["files"]["mask"])) for one in told] == [1, 2]


def test_a_slice_that_is_found_broken_on_the_way_leaves_the_other_inputs_done(
    tmp_path: Path, run: Path, volume: NDArray[np.float32]
) -> None:
    many = np.repeat(volume[:1], 40, axis=0)
    many[6, 7, 9] = np.nan  # not among the slices that are looked at first
    paths = [saved(tmp_path, "broken.npy", many), saved(tmp_path, "good.npy", volume)]
    problems = predicted((run, *paths), tmp_path / "out")
    assert len(problems) == 1
    assert "broken.npy has 1 NaN or infinite pixels in slice 6, the first at row 7, column 9" in problems[0]
    assert (tmp_path / "out" / "good_mask.npy").exists()
    assert not list((tmp_path / "out").glob("broken*"))


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (np.random.default_rng(0).integers(0, 256, (2, 64, 64)), "8-bit grey values, not HU"),
        (np.full((2, 64, 64), -1000.0), "is constant"),
        (np.random.default_rng(0).uniform(-1000, 400, (2, 16, 64)), "at least 32x32 are needed"),
    ],
)
def test_an_input_that_is_no_ct_is_refused_before_anything_is_written(
    tmp_path: Path, run: Path, array: NDArray[Any], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        predicted((run, saved(tmp_path, "scan.npy", array)), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_a_folder_of_earlier_results_is_left_alone(tmp_path: Path, run: Path, volume: NDArray[np.float32]) -> None:
    path = saved(tmp_path, "scan.npy", volume)
    saved(tmp_path / "out", "mine.npy", volume)
    with pytest.raises(InputError, match="not empty; name another folder with --output"):
        predicted((run, path), tmp_path / "out")
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["mine.npy"]


def test_several_runs_predict_together(tmp_path: Path, volume: NDArray[np.float32]) -> None:
    runs = [keep_weights(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    path = saved(tmp_path, "scan.npy", volume)
    assert predicted((*runs, path), tmp_path / "out") == []
    told = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [one["path"] for one in told["runs"]] == [str(run) for run in runs]
    assert told["passes"] == 2


def test_a_rescale_for_inputs_of_several_kinds_is_refused(
    tmp_path: Path, run: Path, volume: NDArray[np.float32]
) -> None:
    paths = [saved(tmp_path, "scan.npy", volume), tmp_path / "scan.nii"]
    with pytest.raises(InputError, match=r"these are of 2 \(nifti, npy\)"):
        predicted((run, *paths), tmp_path / "out", rescale=(1, -1024))


def test_runs_that_make_hu_in_other_ways_need_the_users_word(tmp_path: Path, volume: NDArray[np.float32]) -> None:
    runs = [keep_weights(tmp_path / str(offset), rescale=[1.0, float(offset)]) for offset in (0, -24)]
    path = saved(tmp_path, "scan.npy", volume)
    with pytest.raises(InputError, match="could be HU by any of 1 -24, 1 0"):
        predicted((*runs, path), tmp_path / "out")
    assert predicted((*runs, path), tmp_path / "out", rescale=(1, 0)) == []
