"""The report of a run: its answer, its limits, its worst slices, and how to repeat it."""

import html
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matchai.data.dataset import OF_VOLUMES
from matchai.metrics.confusion import Counts
from matchai.runs.facts import read_facts
from matchai.runs.report_page import PAGE, render, write_page
from tests.kept import keep_run

GROUPS = [0, 0, 1, 1]
HOSTILE = "<script>alert(1)</script><b>'\"|`"


def good_counts() -> Counts:
    confusions = np.stack([np.diag([200, 100, 900, 2800])] * 4).astype(np.int64)
    confusions[:, 0, 2] = 20
    confusions[2, 1] = [70, 30, 0, 0]  # the worst: consolidation called ground glass
    return confusions


def page_of(folder: Path, confusions: Counts | None = None, **settings: Any) -> str:
    run = keep_run(folder / "a run", good_counts() if confusions is None else confusions, GROUPS, **settings)
    return render(read_facts(run), {})


def words(page: str) -> str:
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", page[page.index("<body>") :])))


def answer(page: str) -> tuple[str, str]:
    """Tone and sentence."""
    found = re.search(r'<p class="answer ([a-z]*)">(.*?)</p>', page)
    assert found is not None
    return found[1], html.unescape(found[2])


def rows(page: str, first: str) -> list[list[str]]:
    """The rows below the heading `first` of the table that begins with it."""
    for table in re.findall(r"<table>(.*?)</table>", page, re.DOTALL):
        cells = [
            re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)
            for row in re.findall(r"<tr.*?</tr>", table, re.DOTALL)
        ]
        if html.unescape(cells[0][0]) == first:
            return [[html.unescape(cell) for cell in row] for row in cells[1:]]
    return []


def test_the_answer_names_epoch_figures_interval_slices_groups_and_data(tmp_path: Path) -> None:
    tone, told = answer(page_of(tmp_path, data="/somewhere/slices"))
    assert tone == "plain"
    number = r"0\.\d{3} \((rough 95 % interval )?0\.\d{3}–[01]\.\d{3}\)"
    pattern = (
        rf"The best of 2 epochs is epoch 2: mean Dice {number}, lesion Dice {number}, pooled over 4 validation "
        r"slices in 2 groups of data set slices\."
    )
    assert re.fullmatch(pattern, told)


def test_the_phantom_is_said_to_be_no_patient(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert answer(page)[1].endswith("of the built-in synthetic phantom. That is no patient's data.")
    assert "the figures say nothing about patients" in words(page)


@pytest.mark.parametrize(("num_done", "was_chosen"), [(1, False), (2, True)])
def test_the_choice_of_an_epoch_flatters_where_there_is_one(num_done: int, was_chosen: bool, tmp_path: Path) -> None:
    assert ("flatter it" in words(page_of(tmp_path, num_done=num_done))) == was_chosen


@pytest.mark.parametrize(
    ("num_done", "start"),
    [(1, "Unfinished, 1 of 2 epochs; the best so far is epoch 1: mean"), (0, "No epoch is finished yet")],
)
def test_an_unfinished_run_says_so(num_done: int, start: str, tmp_path: Path) -> None:
    tone, told = answer(page_of(tmp_path, num_done=num_done))
    assert tone == "open"
    assert told.startswith(start)


@pytest.mark.parametrize(
    ("recorded", "told"),
    [
        ({"data": {"images_medseg.npy": ""}}, "found by likeness, which cannot tell patients"),
        ({"data": {"images_medseg.npy": "", "groups.npy": ""}}, "groups.npy says what a group is"),
        ({"notes": [f"9 slices in 2 groups, {OF_VOLUMES}."]}, "The split divides no volume"),
    ],
)
def test_where_the_groups_come_from_is_told(recorded: dict[str, Any], told: str, tmp_path: Path) -> None:
    assert told in words(page_of(tmp_path, data="slices", recorded=recorded))


def test_a_class_that_no_slice_shows_is_told(tmp_path: Path) -> None:
    confusions = good_counts()
    confusions[:, 1] = 0
    page = page_of(tmp_path, confusions)
    assert "No validation slice shows consolidation: its Dice is undefined" in words(page)
    assert rows(page, "class")[1][:2] == ["consolidation", "undefined"]


def test_an_interval_that_rests_on_a_part_of_the_resamples_is_told(tmp_path: Path) -> None:
    confusions = np.concatenate([good_counts(), good_counts()])
    confusions[4:, 1] = 0  # four of six groups do not show consolidation
    run = keep_run(tmp_path / "run", confusions, [0, 0, 1, 1, 2, 3, 4, 5])
    # a resample of six groups misses both others with a chance of (4 / 6) ** 6 = 9 %
    told = re.search(
        r"The interval of consolidation rests on (\d+) % of the resamples", words(render(read_facts(run), {}))
    )
    assert told is not None
    assert 89 <= int(told[1]) <= 93


def test_each_class_stands_with_its_figures_and_pixels(tmp_path: Path) -> None:
    cells = rows(page_of(tmp_path), "class")
    assert [row[0] for row in cells][:4] == ["ground glass", "consolidation", "lungs other", "background"]
    assert [row[0] for row in cells][4:] == ["mean of all classes", "mean of lesion classes", "any lesion"]
    # 220 ground glass pixels in each of four slices of 4,020
    assert cells[0][5:] == ["880 (5.47 %)", "4 of 4"]
    assert cells[0][4].startswith("0.909 (")  # recall: 200 of 220 in all
    assert cells[5][3:5] == ["–", "–"]


def test_the_worst_slices_come_first_with_the_reason(tmp_path: Path) -> None:
    cells = rows(page_of(tmp_path), "slice")
    assert [row[0] for row in cells] == ["6", "4", "5", "7"]
    assert cells[0][2].startswith("misses 70 % of 100 consolidation pixels, all of them called ground glass")
    assert cells[0][3:] == ["320", "300", "1"]


def test_a_lesion_found_where_there_is_none_is_told(tmp_path: Path) -> None:
    confusions = good_counts()
    confusions[1, :2], confusions[1, 2, 0] = 0, 412
    page = page_of(tmp_path, confusions)
    assert "1 validation slice without a lesion; in 1 of them one is found." in words(page)
    assert "finds 412 lesion pixels where there are none, all of them called ground glass" in words(page)


def test_the_commands_fit_the_run(tmp_path: Path) -> None:
    told = words(page_of(tmp_path))
    run = f"'{tmp_path}/a run"
    assert f"-m matchai.train --config {run}/config.yaml' --output OTHER" in told
    assert f"python -m matchai.predict {run}' INPUT --output DIR" in told


def test_settings_that_differ_stand_beside_preset_and_recipe(tmp_path: Path) -> None:
    differences = {row[0]: row[1:] for row in rows(page_of(tmp_path, preset="quick", max_lr=2e-3), "setting")}
    assert differences["image_size"] == ["64", "128", "384"]
    assert differences["max_lr"] == ["0.002", "0.002", "0.0005"]
    assert "weight_decay" not in differences


def test_no_name_becomes_markup(tmp_path: Path) -> None:
    names = [HOSTILE, "consolidation", "lungs other", "background"]
    recorded = {"data": {HOSTILE: HOSTILE}, "notes": [HOSTILE], "versions": {HOSTILE: HOSTILE}, "device": HOSTILE}
    page = page_of(tmp_path, class_names=names, lesion_classes=[HOSTILE], recorded=recorded)
    assert "<script" not in page
    assert "<b>" not in page
    assert HOSTILE in [row[0] for row in rows(page, "class")]


def test_files_versions_and_machine_are_told(tmp_path: Path) -> None:
    recorded = {"data": {"images_medseg.npy": "ab" * 32}, "versions": {"torch": "9.9"}, "precision": "bf16 (x)"}
    facts = dict(row for row in rows(page_of(tmp_path, recorded=recorded), "what") if len(row) == 2)
    assert facts["SHA-256 of images_medseg.npy"] == "ab" * 32
    assert facts["version of torch"] == "9.9"
    assert facts["precision"] == "bf16 (x)"
    assert facts["training speed"] == "4.0 slices a second (median epoch)"
    assert facts["waiting for data"] == "10.0 % of the training time (median epoch)"


def test_a_run_without_its_state_is_reported_without_intervals(tmp_path: Path) -> None:
    run = keep_run(tmp_path / "run", good_counts(), GROUPS, recorded={})
    shutil.rmtree(run / "last")
    page = render(read_facts(run), {})
    assert "there are no intervals" in words(page)
    assert "–0." not in answer(page)[1]
    assert rows(page, "slice") == []


def test_charts_are_drawn_for_the_page_and_the_pictures_in_the_folder_are_shown(tmp_path: Path) -> None:
    run = keep_run(tmp_path / "run", good_counts(), GROUPS)
    (run / "figures").mkdir()
    (run / "figures" / "worst.png").write_bytes(b"\x89PNG of a test")
    write_page(read_facts(run), run / PAGE)
    shown = re.findall(r'<img src="data:image/png;base64,[^"]*" alt="([^"]*)"', (run / PAGE).read_text())
    kinds = ["learning curves", "confusion matrix", "worst", "dice per class"]
    assert shown == [f"{kind} of run run" for kind in kinds]
    assert [path.name for path in (run / "figures").iterdir()] == ["worst.png"]
