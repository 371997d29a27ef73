"""What a run's folder tells, of runs new and old, finished and not."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from matchai.metrics import ANY_LESION, Counts
from matchai.runs.facts import ALL_CLASSES, LESION_CLASSES, rank_by_lesion_dice, read_facts
from matchai.system.errors import InputError
from tests.kept import keep_run

GROUPS = [0, 0, 1, 1, 2, 2]


def some_counts(seed: int = 0) -> Counts:
    confusions = np.random.default_rng(seed).integers(1, 200, (6, 4, 4))
    confusions[:, range(4), range(4)] += 500
    return confusions.astype(np.int64)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return keep_run(tmp_path / "run", some_counts(), GROUPS)


def test_the_figures_are_those_of_the_history(run: Path) -> None:
    facts = read_facts(run)
    best = json.loads((run / "history.jsonl").read_text().splitlines()[-1])
    assert facts.best == best
    assert [facts.score(name).value for name in facts.class_names] == best["dice_per_class"]
    assert facts.score(ALL_CLASSES).value == best["mean_dice"]
    assert facts.score(ALL_CLASSES, "IoU").value == best["mean_iou"]
    assert facts.score(LESION_CLASSES).value == best["lesion_dice"]


def test_any_lesion_takes_the_lesion_classes_for_one(run: Path) -> None:
    pooled = some_counts().sum(0)
    both, truth, pred = pooled[:2, :2].sum(), pooled[:2].sum(), pooled[:, :2].sum()
    facts = read_facts(run)
    assert facts.score(ANY_LESION).value == 2 * both / (truth + pred)
    assert facts.score(ANY_LESION, "precision").value == both / pred
    assert facts.score(ANY_LESION, "recall").value == both / truth


def test_every_interval_holds_its_figure_in_runs_of_like_groups(run: Path) -> None:
    for one in read_facts(run).class_scores:
        for metric, score in one.scores.items():
            if one.format(metric) != "–":
                assert score.low <= score.value <= score.high


def test_one_group_gives_no_interval(tmp_path: Path) -> None:
    facts = read_facts(keep_run(tmp_path / "run", some_counts(), [4] * 6))
    assert not facts.score(ALL_CLASSES).has_interval
    assert "(" not in facts.score(ALL_CLASSES).format()


def test_without_the_state_the_history_speaks(run: Path) -> None:
    before = read_facts(run)
    shutil.rmtree(run / "last")
    facts = read_facts(run)
    assert facts.confusions is None
    assert facts.best == before.best
    assert facts.score(LESION_CLASSES).value == before.score(LESION_CLASSES).value
    assert not facts.score(LESION_CLASSES).has_interval


def test_the_state_wins_over_a_history_that_a_kill_left_behind(run: Path) -> None:
    rows = (run / "history.jsonl").read_text().splitlines()
    (run / "history.jsonl").write_text(rows[0] + "\n")
    facts = read_facts(run)
    assert len(facts.history) == 2
    assert facts.is_finished


def test_a_run_of_an_older_version_is_read(run: Path) -> None:
    (run / "config.yaml").write_text("image_size: 64\nepochs: 2\nencoder: tu-test_resnet\n")
    row = json.loads((run / "history.jsonl").read_text().splitlines()[0])
    for name in ("iou_per_class", "mean_iou", "notebook_dice", "data_wait_share"):
        del row[name]
    (run / "history.jsonl").write_text(json.dumps(row) + "\n")
    shutil.rmtree(run / "last")
    facts = read_facts(run)
    assert facts.recorded == {}
    assert facts.best is None  # the weights are of the second epoch
    assert not facts.is_finished


def test_reading_changes_nothing_and_passes_a_damaged_state_over(run: Path) -> None:
    newest = run / "last" / "state-000002"
    shutil.copytree(run / "last" / "state-000001", newest)
    (newest / "state.json").write_text("torn")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert read_facts(run).confusions is not None
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        ("config.yaml", "holds no config.yaml, so it is no matchai run"),
        ("split.json", "has no split.json yet"),
        ("history.jsonl", "cannot be read as the JSON"),
        ("val", "the counts in last are of 6 slices"),
    ],
)
def test_a_folder_that_is_no_whole_run_is_refused(spoil: str, told: str, run: Path) -> None:
    if spoil == "val":
        split = json.loads((run / "split.json").read_text())
        (run / "split.json").write_text(json.dumps(split | {"val": [1]}))
    elif spoil == "history.jsonl":
        (run / spoil).write_text("{torn")
    else:
        (run / spoil).unlink()
    with pytest.raises(InputError, match=told):
        read_facts(run)


def test_slices_are_ranked_by_the_lesion_classes_that_they_show() -> None:
    confusions = np.stack([np.diag([10, 10, 10, 10])] * 4).astype(np.int64)
    confusions[0, 0] = [5, 0, 5, 0]  # ground glass half missed
    confusions[2, :2] = 0  # no lesion
    confusions[3, 0], confusions[3, 1] = [2, 0, 8, 0], 0  # mostly missed, and no consolidation
    ranked, dice = rank_by_lesion_dice(confusions, [0, 1])
    assert ranked == [3, 0, 1]
    assert dice[:2] == [(2 * 5 / 15 + 1) / 2, 1]
    assert np.isnan(dice[2])
    assert dice[3] == 2 * 2 / 12
