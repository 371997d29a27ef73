"""An evaluation counts what training counted, on slices that the run has not seen, and writes all or nothing."""

import csv
import errno
import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import nibabel as nib
import numpy as np
import pytest
import yaml

from matchai import TrainConfig, run
from matchai.data.phantom import write_phantom
from matchai.evaluate import main
from matchai.metrics.surface_distance import surface_distances
from matchai.prediction import evaluation
from matchai.prediction.evaluation import evaluate
from matchai.settings.command_settings import EvaluateSettings
from matchai.settings.config import PRESETS
from matchai.system.errors import FailedError, InputError

SPACING = (5.0, 0.8, 0.7)


@pytest.fixture(scope="module")
def kept(phantom: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "run", data=phantom, cache=cache, folds=2)


def trained(output: Path, **settings: Any) -> Path:
    """A run of seconds on slices of its own size."""
    small = {**PRESETS["study"], "output": output, "epochs": 2, "mixed_precision": "no"}
    run(TrainConfig().updated(**{**small, **settings}))
    return output


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data that the run does not know, of another size: 16 slices in 2 volumes."""
    folder = tmp_path_factory.mktemp("others")
    write_phantom(folder, 16, size=80, seed=5)
    return folder


@pytest.fixture(scope="module")
def as_nifti(others: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in NIfTI files."""
    folder = tmp_path_factory.mktemp("nifti")
    images, masks = (np.load(others / f"{what}_medseg.npy") for what in ("images", "masks"))
    groups, affine = np.load(others / "groups.npy"), np.diag([-SPACING[1], -SPACING[2], SPACING[0], 1.0])
    numbers = np.array([1, 2, 3, 0], np.uint8)[masks.argmax(-1)]
    for what, arrays in (("images", images[..., 0].astype(np.float32)), ("masks", numbers)):
        (folder / what).mkdir()
        for group in np.unique(groups):
            volume = arrays[groups == group].transpose(1, 2, 0)
            nib.save(nib.Nifti1Image(volume, affine), folder / what / f"v{group}.nii.gz")
    return folder


def judged(kept: Path, output: Path, data: Path | None = None, **options: Any) -> dict[str, Any]:
    asked = {"mixed_precision": "no", "surface": "no"} | options
    return evaluate(EvaluateSettings((kept,), data, output, **asked))


def pooled(result: dict[str, Any], name: str = "dice") -> list[float]:
    return [figures[f"{name}_pooled_over_pixels"]["value"] for figures in result["classes"].values()]


def test_how_a_run_read_its_files_is_not_taken_for_files_of_another_kind(
    kept: Path, others: Path, as_nifti: Path, tmp_path: Path
) -> None:
    """By the run's settings its arrays need an offset, and class 0 of them is 3 in other files."""
    run = tmp_path / "run"
    shutil.copytree(kept, run)
    text = (run / "config.yaml").read_text()
    told = yaml.safe_load(text) | {"rescale": [1.0, -300.0], "label_map": ["0:background", "3:ground glass"]}
    (run / "config.yaml").write_text(yaml.safe_dump(told))
    expected = pooled(judged(kept, tmp_path / "arrays", others))
    assert pooled(judged(run, tmp_path / "volumes", as_nifti)) == expected
    # where the user states them, they count
    assert pooled(judged(run, tmp_path / "stated", as_nifti, rescale=(1.0, -300.0))) != expected


def best_row(kept: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (kept / "history.jsonl").read_text().splitlines()]
    return max(rows, key=lambda row: row["mean_dice"])


def test_pooled_dice_on_validation_slices_is_that_of_the_best_epoch(kept: Path, tmp_path: Path) -> None:
    best = best_row(kept)
    result = judged(kept, tmp_path / "out")
    assert result["slices"] == "validation slices"
    assert pooled(result) == best["dice_per_class"]
    means = result["means_over_classes"]
    assert means["mean_dice_pooled_over_pixels"]["value"] == best["mean_dice"]
    assert means["lesion_dice_pooled_over_pixels"]["value"] == best["lesion_dice"]


def test_neighbours_are_those_of_the_training(phantom: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("images_medseg.npy", "masks_medseg.npy"):  # without groups: volumes are found by likeness
        (tmp_path / "data" / name).symlink_to(phantom / name)
    kept = trained(tmp_path / "run", data=tmp_path / "data", cache=cache, context=1)
    assert pooled(judged(kept, tmp_path / "out")) == best_row(kept)["dice_per_class"]


def test_the_table_of_slices_lists_the_validation_slices(kept: Path, phantom: Path, tmp_path: Path) -> None:
    judged(kept, tmp_path / "out", surface="yes")
    rows = list(csv.DictReader((tmp_path / "out/slices.csv").open()))
    split = json.loads((kept / "split.json").read_text())
    assert [int(row["index"]) for row in rows] == split["val"]
    assert {row["side"] for row in rows} == {"validation"}
    masks = np.load(phantom / "masks_medseg.npy")
    true = [masks[int(row["index"]), ..., 0].sum() for row in rows]
    assert [int(row["ground_glass_true_pixels"]) for row in rows] == true
    assert {row["any_lesion_nsd_2_px"] for row in rows} - {""}


@pytest.fixture(scope="module")
def in_nifti(kept: Path, as_nifti: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    output = tmp_path_factory.mktemp("evaluated") / "out"
    return judged(kept, output, as_nifti, surface="yes"), output


def test_nifti_files_give_the_counts_of_the_arrays_they_were_made_of(
    kept: Path, others: Path, in_nifti: tuple[Any, Path], tmp_path: Path
) -> None:
    by_array = judged(kept, tmp_path / "out", others)
    assert by_array["slices"] == in_nifti[0]["slices"] == "other data"
    assert by_array["confusion"] == in_nifti[0]["confusion"]
    assert by_array["num_groups"] == in_nifti[0]["num_groups"] == 2


def test_volumes_are_measured_in_millimetres(in_nifti: tuple[Any, Path]) -> None:
    result, output = in_nifti
    rows = list(csv.DictReader((output / "volumes.csv").open()))
    assert [row["volume"] for row in rows] == ["v0", "v1"]
    assert float(rows[0]["slice_spacing_mm"]) == 5
    distances = [float(row["lungs_other_hd95_mm"]) for row in rows]
    found = result["classes"]["lungs other"]["hd95_mm_mean_over_volumes"]
    assert found["value"] == pytest.approx(np.mean(distances))
    assert "hd95_px_mean_over_images" not in result["any_lesion"]


def test_distances_of_a_volume_are_those_of_its_masks(
    kept: Path, as_nifti: Path, in_nifti: tuple[Any, Path], tmp_path: Path
) -> None:
    assert main_predict(kept, as_nifti / "images/v0.nii.gz", tmp_path / "pred") == 0
    pred, truth = (
        np.asarray(nib.load(path).dataobj).transpose(2, 0, 1)
        for path in (tmp_path / "pred/v0_mask.nii.gz", as_nifti / "masks/v0.nii.gz")
    )
    expected = surface_distances(pred == 3, truth == 3, SPACING, 2.0)
    row = next(csv.DictReader((in_nifti[1] / "volumes.csv").open()))
    assert (float(row["lungs_other_hd95_mm"]), float(row["lungs_other_nsd_2_mm"])) == pytest.approx(expected, rel=1e-6)


def main_predict(kept: Path, path: Path, output: Path) -> int:
    from matchai.predict import main

    return main([str(kept), str(path), "--output", str(output), "--mixed-precision", "no"])


def test_an_evaluation_is_replaced_whole(kept: Path, others: Path, in_nifti: tuple[Any, Path], tmp_path: Path) -> None:
    judged(kept, tmp_path / "out", others)
    (tmp_path / "out/volumes.csv").write_text("of an older one")
    judged(kept, tmp_path / "out", others)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("evaluation.json", "slices.csv", "confusion_matrix.png")
    }
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_other_things_is_left_alone(kept: Path, others: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(InputError, match=r"thesis\.txt"):
        judged(kept, tmp_path, others)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_mask_with_a_strange_number_is_refused_before_anything_is_written(kept: Path, tmp_path: Path) -> None:
    write_phantom(tmp_path / "data", 8, size=64)
    masks = np.load(tmp_path / "data/masks_medseg.npy").argmax(-1)
    masks[3, 5, 5] = 9
    np.save(tmp_path / "data/masks_medseg.npy", masks)
    with pytest.raises(InputError, match="9 in slice 3"):
        judged(kept, tmp_path / "out", tmp_path / "data")
    assert not (tmp_path / "out").exists()


def test_the_command_prints_figures_that_say_what_they_are(
    kept: Path, others: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(kept), str(kept), "--data", str(others), "--output", str(tmp_path / "out"), "--tta"]
    assert main([*command, "--surface", "no"]) == 0
    said = capsys.readouterr().out
    assert "Pooled over pixels (other data)" in said
    assert "Mean over images (other data)" in said
    assert "bootstrap over 2 groups" in said
    assert json.loads((tmp_path / "out/evaluation.json").read_text())["forward_passes"] == 4


def test_a_place_that_cannot_be_written_is_refused_at_the_start(kept: Path, others: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--output"):
        judged(kept, tmp_path / "file/out", others)


def test_figures_that_cannot_be_written_are_shown(
    kept: Path, others: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "_write", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(FailedError, match=r"could not be written to .* \(No space left on device\)"):
        judged(kept, tmp_path / "out", others)
    assert "Pooled over pixels: mean Dice" in capsys.readouterr().out
