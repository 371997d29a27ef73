import csv
from pathlib import Path

import numpy as np
import pytest

from matchai.prediction.summaries import Submission, affected_percent, write_label_table, write_table
from matchai.system.errors import InputError
from matchai.volumes.volume import ArrayVolume


def array_volume(*shape: int) -> ArrayVolume:
    return ArrayVolume(Path("scan.npy"), "LP", (1, 0), np.zeros(shape, np.float32))


def test_the_affected_percentage_is_lesion_among_all_that_is_not_background() -> None:
    assert affected_percent(np.array([10, 20, 70, 900]), [0, 1], 3) == 30
    assert affected_percent(np.array([0, 0, 0, 900]), [0, 1], 3) is None


def test_a_submission_is_the_c_order_ravel_of_both_lesion_masks(tmp_path: Path) -> None:
    preds = np.random.default_rng(0).integers(0, 4, (2, 512, 512)).astype(np.uint8)
    submission = Submission([array_volume(2, 512, 512, 1)], [0, 1])
    for pred in preds:
        submission.add(pred)
    submission.write(tmp_path / "submission.csv")
    lines = (tmp_path / "submission.csv").read_text().splitlines()
    assert lines[0] == "Id,Predicted"
    numbers = np.loadtxt(lines[1:], delimiter=",", dtype=np.int64)
    assert np.array_equal(numbers[:, 0], np.arange(2 * 512 * 512 * 2))
    assert np.array_equal(numbers[:, 1], np.stack([preds == 0, preds == 1], axis=-1).ravel())


@pytest.mark.parametrize("shapes", [[(2, 256, 512)], [(2, 512, 512), (2, 512, 512)]])
def test_a_submission_of_anything_but_one_array_of_512_pixels_is_refused(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(InputError, match="--submission takes one input of 512x512 slices"):
        Submission([array_volume(*shape) for shape in shapes], [0, 1])


def test_the_label_table_has_a_line_for_every_number_in_order(tmp_path: Path) -> None:
    write_label_table(tmp_path / "labels.txt", ["ground glass", 'a "b"', "background"], 2)
    lines = [line.split(maxsplit=7) for line in (tmp_path / "labels.txt").read_text().splitlines()[1:]]
    assert [(line[0], line[7]) for line in lines] == [
        ("0", '"background"'),
        ("1", '"ground glass"'),
        ("2", "\"a 'b'\""),
    ]


def test_a_table_has_an_empty_cell_where_there_is_no_value(tmp_path: Path) -> None:
    write_table(tmp_path / "table.csv", [{"a": 1, "b, c": None}, {"a": "x\ny", "d": 0.5}])
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{"a": "1", "b, c": "", "d": ""}, {"a": "x\ny", "b, c": "", "d": "0.5"}]
