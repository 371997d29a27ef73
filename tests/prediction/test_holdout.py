"""No slice that a run was trained on is judged without a word."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from matchai.prediction.holdout import choose_slices
from matchai.system.errors import InputError

IMAGES = {"images_medseg.npy": "aa", "images_radiopedia.npy": "bb"}
RECORDED = {"images_medseg.npy": "aa", "masks_medseg.npy": "m", "images_radiopedia.npy": "bb", "groups.npy": "g"}


def kept_run(folder: Path, val: tuple[int, ...] = (1, 4), recorded: dict[str, str] | None = None) -> Path:
    """What a run of six slices leaves of its split."""
    folder.mkdir()
    told = {"recorded": {"data": RECORDED if recorded is None else recorded}}
    (folder / "config.yaml").write_text(yaml.safe_dump(told, sort_keys=False))
    train = [row for row in range(6) if row not in val]
    split = {"train": train, "val": list(val), "groups": [0, 0, 1, 1, 2, 2]}
    (folder / "split.json").write_text(json.dumps(split))
    return folder


def test_of_its_own_data_only_the_validation_slices_are_chosen(tmp_path: Path) -> None:
    choice = choose_slices([kept_run(tmp_path / "run")], IMAGES, 6, "auto")
    assert choice.rows.tolist() == [1, 4]
    assert choice.name == "validation slices"
    assert choice.groups is not None
    assert choice.groups.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(("wanted", "rows"), [("train", [0, 2, 3, 5]), ("all", [0, 1, 2, 3, 4, 5])])
def test_training_slices_are_called_so(tmp_path: Path, wanted: str, rows: list[int]) -> None:
    choice = choose_slices([kept_run(tmp_path / "run")], IMAGES, 6, wanted)
    assert choice.rows.tolist() == rows
    assert "TRAINING" in choice.name
    assert "TRAINING" in choice.statement
    assert [row for row, side in enumerate(choice.sides) if side == "training"] == [0, 2, 3, 5]


def test_other_data_is_chosen_whole(tmp_path: Path) -> None:
    choice = choose_slices([kept_run(tmp_path / "run")], {"images_medseg.npy": "cc"}, 9, "auto")
    assert choice.rows.tolist() == list(range(9))
    assert choice.name == "other data"
    assert "by their hashes" in choice.statement  # which a copy in another format has not
    assert choice.groups is None


@pytest.mark.parametrize("wanted", ["val", "train"])
def test_other_data_has_no_sides(tmp_path: Path, wanted: str) -> None:
    with pytest.raises(InputError, match="other data"):
        choose_slices([kept_run(tmp_path / "run")], {"images_medseg.npy": "cc"}, 9, wanted)


@pytest.mark.parametrize(
    ("images", "num_slices"),
    [
        ({"images_medseg.npy": "aa"}, 3),
        ({**IMAGES, "images_more.npy": "cc"}, 9),
        (dict(reversed(IMAGES.items())), 6),
        ({"renamed.npy": "aa", "images_radiopedia.npy": "bb"}, 6),
    ],
    ids=["a part", "with more", "in another order", "renamed"],
)
def test_files_of_the_training_among_others_are_refused(
    tmp_path: Path, images: dict[str, str], num_slices: int
) -> None:
    with pytest.raises(InputError, match="was trained on"):
        choose_slices([kept_run(tmp_path / "run")], images, num_slices, "auto")


def test_files_of_the_training_among_others_are_told_where_all_slices_are_asked_for(tmp_path: Path) -> None:
    choice = choose_slices([kept_run(tmp_path / "run")], {"images_medseg.npy": "aa"}, 3, "all")
    assert "TRAINING" in choice.name
    assert "images_medseg.npy" in choice.statement


def test_other_masks_of_the_same_images_keep_the_split(tmp_path: Path) -> None:
    run = kept_run(tmp_path / "run", recorded=RECORDED | {"masks_medseg.npy": "others"})
    assert choose_slices([run], IMAGES, 6, "auto").rows.tolist() == [1, 4]


def test_of_several_runs_no_slice_counts_that_one_was_trained_on(tmp_path: Path) -> None:
    runs = [kept_run(tmp_path / "a", val=(1, 4)), kept_run(tmp_path / "b", val=(4, 5))]
    assert choose_slices(runs, IMAGES, 6, "auto").rows.tolist() == [4]


def test_folds_together_have_no_unseen_slice(tmp_path: Path) -> None:
    runs = [kept_run(tmp_path / "a", val=(0, 1, 2)), kept_run(tmp_path / "b", val=(3, 4, 5))]
    with pytest.raises(InputError, match="one by one"):
        choose_slices(runs, IMAGES, 6, "auto")


@pytest.mark.parametrize("content", [None, "{", '{"train": [], "val": []}'])
def test_a_run_without_its_split_is_refused(tmp_path: Path, content: Any) -> None:
    run = kept_run(tmp_path / "run")
    (run / "split.json").unlink()
    if content is not None:
        (run / "split.json").write_text(content)
    with pytest.raises(InputError, match="split"):
        choose_slices([run], IMAGES, 6, "auto")
