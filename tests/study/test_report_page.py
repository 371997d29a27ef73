"""A study's report: the sentence at its head, its tables, and what it says of its limits."""

import html
import math
import re
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.trial import FrozenTrial, TrialState

from matchai.study import report_page
from matchai.study.report_page import write_report
from matchai.study.significance import Verdict, judge
from tests.studies import make_free_trial, make_study, make_trial

pytestmark = pytest.mark.timeout(60)
HOSTILE = "<script>alert(1)</script><b>'\""


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the pictures, which take a second."""
    monkeypatch.setattr(report_page, "draw_study", lambda *_: {})


def report(folder: Path, study: optuna.Study, evidence: Verdict | None = None, **replaced: Any) -> str:
    arguments: dict[str, Any] = {
        "objective": "mean_dice",
        "evidence": evidence,
        "is_confirming": True,
        "command": "python -m matchai.train --config best.yaml",
        "best": folder / "best.yaml",
        "notes": [],
    }
    path = write_report(folder, study, **arguments | replaced)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def words(page: str) -> str:
    """The page's text."""
    body = page[page.index("<body>") :]
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", body)))


def answer(page: str) -> str:
    found = re.search(r'<p class="answer [a-z]*">(.*?)</p>', page)
    assert found is not None
    return html.unescape(found[1])


def tables(page: str) -> dict[str, list[list[str]]]:
    """The rows of each table, its head first, by the first heading."""
    found = {}
    for table in re.findall(r"<table>(.*?)</table>", page, re.DOTALL):
        rows = [
            re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)
            for row in re.findall(r"<tr.*?</tr>", table, re.DOTALL)
        ]
        found[rows[0][0]] = [[html.unescape(cell) for cell in row] for row in rows]
    return found


def four_trials(direction: str = "maximize") -> optuna.Study:
    return make_study(*(make_trial(number, 0.8 + number / 100) for number in range(4)), direction=direction)


def verdict(challenger: Sequence[float], *, is_maximised: bool = True) -> Verdict:
    return judge({0: [0.80, 0.81, 0.82], 3: challenger}, 0, [11, 12, 13], is_maximised=is_maximised)


@pytest.mark.usefixtures("undrawn")
def test_a_difference_is_told_with_its_interval(tmp_path: Path) -> None:
    # 0.031 above the recipe on each seed but for 0, 0.003, -0.003: the noise's variance is 9e-6 / 2 on 2 degrees of
    # freedom, Student's 97.5 % quantile there 4.303, so half the interval 4.303 · √(2 · 4.5e-6 / 3) = 0.0075
    page = report(tmp_path, four_trials(), verdict([0.831, 0.844, 0.848]))
    assert answer(page) == "Trial 3 beats the recipe by 0.031 mean Dice (95 % interval 0.024 to 0.038, 3 fresh seeds)."
    assert "differences below 0.007 cannot be told from the noise" in words(page)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("challenger", "told"), [([0.83, 0.80, 0.81], "0.003 better"), ([0.81, 0.80, 0.79], "0.010 worse")]
)
def test_no_difference_leaves_the_recipe_as_the_answer(challenger: list[float], told: str, tmp_path: Path) -> None:
    found = answer(report(tmp_path, four_trials(), verdict(challenger)))
    assert found.startswith(
        f"No difference: the recipe stays the answer; the best challenger, trial 3, is {told} in mean"
    )


@pytest.mark.usefixtures("undrawn")
def test_a_lower_loss_is_better(tmp_path: Path) -> None:
    evidence = verdict([0.70, 0.71, 0.72], is_maximised=False)
    page = report(tmp_path, four_trials("minimize"), evidence, objective="val_loss")
    assert answer(page).startswith("Trial 3 beats the recipe by 0.100 validation loss (95 % interval 0.1")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("is_confirming", "start"), [(True, "Not confirmed yet: trial 3"), (False, "Unconfirmed, one seed: trial 3")]
)
def test_without_evidence_nothing_is_claimed(is_confirming: bool, start: str, tmp_path: Path) -> None:
    page = report(tmp_path, four_trials(), is_confirming=is_confirming)
    assert answer(page) == f"{start} leads with 0.830 mean Dice, 0.030 better than the recipe."
    assert ("declared too high" in words(page)) != is_confirming


@pytest.mark.usefixtures("undrawn")
def test_a_leading_recipe_is_told(tmp_path: Path) -> None:
    page = report(tmp_path, four_trials("minimize"))
    assert answer(page) == "Not confirmed yet: the recipe itself leads with 0.800 mean Dice."


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "trials",
    [
        [],
        [make_trial(0, None, TrialState.RUNNING)],
        [make_trial(0, 0.0, reason="non-finite loss"), make_trial(1, math.inf)],
    ],
    ids=["none", "running", "failed"],
)
def test_a_study_without_results_says_so(trials: list[FrozenTrial], tmp_path: Path) -> None:
    assert answer(report(tmp_path, make_study(*trials))).startswith("No trial is complete yet")


@pytest.mark.usefixtures("undrawn")
def test_a_recipe_that_failed_is_not_compared_with(tmp_path: Path) -> None:
    study = make_study(make_trial(0, 0.0, reason="non-finite loss"), make_trial(1, 0.7))
    assert answer(report(tmp_path, study)).endswith("and the recipe has no value to compare it with.")


@pytest.mark.usefixtures("undrawn")
def test_recipe_and_challengers_stand_side_by_side(tmp_path: Path) -> None:
    page = report(tmp_path, four_trials(), verdict([0.84, 0.85, 0.86]))
    head, recipe, challenger = tables(page)["configuration"]
    assert head == ["configuration", "mean", "sd", "difference", "interval", "says", "seed 11", "seed 12", "seed 13"]
    assert recipe == ["recipe (trial 0)", "0.8100", "0.0100", "", "", "", "0.8000", "0.8100", "0.8200"]
    assert challenger[:4] == ["trial 3", "0.8500", "0.0100", "+0.0400"]
    assert challenger[5] == "better: the answer"


@pytest.mark.usefixtures("undrawn")
def test_a_challenger_that_diverged_has_no_interval(tmp_path: Path) -> None:
    page = report(tmp_path, four_trials(), verdict([0.84, math.nan, 0.86]))
    assert tables(page)["configuration"][2] == [
        *("trial 3", "–", "–", "–", "unknown", "failed on a seed", "0.8400", "–", "0.8600"),
    ]
    assert "nan" not in words(page).split()


@pytest.mark.usefixtures("undrawn")
def test_a_recipe_that_failed_on_a_fresh_seed_is_no_answer(tmp_path: Path) -> None:
    evidence = judge({0: [0.8, -math.inf, 0.8], 3: [0.7, 0.7, 0.7]}, 0, (11, 12, 13))
    page = report(tmp_path, four_trials(), evidence)
    assert answer(page) == "Trial 3 is the answer, as the recipe failed on a fresh seed."
    assert tables(page)["configuration"][1][5] == "failed on a seed"
    assert not {"inf", "-inf", "nan"} & set(words(page).split())


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("challenger", [[0.84, 0.85, 0.86], [0.80, 0.82, 0.81]], ids=["better", "equal"])
def test_the_settings_stand_beside_the_recipes(challenger: list[float], tmp_path: Path) -> None:
    rows = tables(report(tmp_path, four_trials(), verdict(challenger)))["setting"]
    assert rows  # the later table of the space has the same first heading
    page = report(tmp_path, four_trials(), verdict(challenger))
    first = page[page.index("<h2>Settings</h2>") : page.index("<h2>How to train it</h2>")]
    head, *lines = tables(first)["setting"]
    assert head == ["setting", "recipe", "trial 3"]
    assert [line[:2] for line in lines] == [
        *(["ce_weight", "0.25"], ["dice_weight", "0.5"], ["focal_weight", "0.25"]),
        *(["focal_gamma", "2.5"], ["sampler_weight", "3"], ["max_lr", "5e-4"]),
    ]


@pytest.mark.usefixtures("undrawn")
def test_the_space_is_told_with_range_and_scale(tmp_path: Path) -> None:
    page = report(tmp_path, four_trials())
    assert tables(page[page.index("<h2>What was searched</h2>") :])["setting"] == [
        ["setting", "range", "scale"],
        ["ce_weight", "0 to 1", "shares that add up to 1, uniform"],
        ["dice_weight", "0 to 1", "shares that add up to 1, uniform"],
        ["focal_weight", "0 to 1", "shares that add up to 1, uniform"],
        ["focal_gamma", "0 to 5", "linear"],
        ["sampler_weight", "1 to 10", "log"],
        ["max_lr", "5e-5 to 5e-3", "log"],
    ]


@pytest.mark.usefixtures("undrawn")
def test_other_spaces_are_told_too(tmp_path: Path) -> None:
    space: dict[str, optuna.distributions.BaseDistribution] = {
        "size": optuna.distributions.IntDistribution(128, 512, step=64),
        "depth": optuna.distributions.IntDistribution(1, 8),
        "encoder": optuna.distributions.CategoricalDistribution(["b0", "b3"]),
    }
    page = report(tmp_path, make_study(make_free_trial(0.5, {"size": 128, "depth": 2, "encoder": "b3"}, space)))
    assert tables(page[page.index("<h2>What was searched</h2>") :])["setting"][1:] == [
        ["size", "128 to 512", "linear, in steps of 64, whole numbers"],
        ["depth", "1 to 8", "linear, whole numbers"],
        ["encoder", "b0, b3", "choice"],
    ]


@pytest.mark.usefixtures("undrawn")
def test_every_trial_is_counted_and_listed_the_best_first(tmp_path: Path) -> None:
    trials = [
        make_trial(0, 0.8, versions={"torch": "2.13"}),
        make_trial(1, 0.7, TrialState.PRUNED),
        make_trial(2, 0.85),
        make_trial(3, None, TrialState.FAIL, reason="disk full"),
        make_trial(4, None, TrialState.RUNNING),
        make_trial(5, 0.0, reason="non-finite loss"),
    ]
    page = report(tmp_path, make_study(*trials))
    told = "6 trials: 2 complete, 1 pruned, 1 failed for their settings, 1 failed for the machine, 1 running."
    assert told in words(page)
    head, *rows = tables(page)["trial"]
    assert [row[:3] for row in rows] == [
        ["2", "complete, best", "0.8500"],
        ["0", "complete, recipe", "0.8000"],
        ["1", "pruned", "0.7000"],
        ["5", "failed for its settings", "0.0000"],
        ["3", "failed for the machine", "–"],
        ["4", "running", "0.5000"],
    ]
    assert head[-2:] == ["seconds", "reason"]
    assert [row[-1] for row in rows] == ["", "", "", "non-finite loss", "disk full", ""]


@pytest.mark.usefixtures("undrawn")
def test_an_unfinished_trial_shows_the_best_epoch_of_its_curve(tmp_path: Path) -> None:
    trial = make_trial(0, None, TrialState.RUNNING)
    trial.user_attrs = {}
    trial.intermediate_values = {1: 0.5, 2: 0.7, 3: 0.6}
    for direction, epoch in (("maximize", "2"), ("minimize", "1")):
        assert tables(report(tmp_path, make_study(trial, direction=direction)))["trial"][1][3] == epoch


@pytest.mark.usefixtures("undrawn")
def test_the_page_says_how_to_train_what_it_rests_on_and_its_limits(tmp_path: Path) -> None:
    trials = [make_trial(number, 0.8, versions={"torch": f"2.{number}"}, host="here") for number in range(2)]
    page = report(tmp_path, make_study(*trials), notes=["This is the phantom."])
    text = words(page)
    for told in ("python -m matchai.train --config best.yaml", "best.yaml, beside this page", "This is the phantom."):
        assert told in text
    assert "flatters it slightly" in text
    facts = dict(tables(page)["what"][1:])
    assert facts == {"epochs": "8", "seed": "7", "preset": "study", "version of torch": "2.0, 2.1", "host": "here"}


@pytest.mark.usefixtures("undrawn")
def test_settings_in_another_folder_are_told_with_it(tmp_path: Path) -> None:
    assert "elsewhere/best.yaml" in words(report(tmp_path, four_trials(), best=Path("elsewhere/best.yaml")))
    assert "no answer yet" in words(report(tmp_path, four_trials(), best=None))


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("command", "num_boxes"), [("train it", 1), ("", 0)])
def test_a_study_without_an_answer_shows_no_empty_command(command: str, num_boxes: int, tmp_path: Path) -> None:
    assert report(tmp_path, four_trials(), command=command, best=None).count("<pre>") == num_boxes


@pytest.mark.usefixtures("undrawn")
def test_values_of_a_screening_stand_apart(tmp_path: Path) -> None:
    screen = make_study(make_trial(0, 0.99), make_trial(1, 0.98))
    page = report(tmp_path, four_trials(), screen=screen)
    before, after = page.split("<h2>Screening with short cycles</h2>")
    assert "0.9900" in after
    assert "0.9900" not in before
    assert "never compared" in words("<body>" + after)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just(HOSTILE),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)


@given(json_values, json_values)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.usefixtures("undrawn")
def test_nothing_in_the_store_can_break_the_page(tmp_path: Path, one: Any, other: Any) -> None:
    names = ("ce_weight", "best_epoch", "seconds", "versions", "git_revision", "host", "run")
    study = make_study(
        make_trial(0, 0.8), make_trial(1, 0.7, **dict.fromkeys(names, one)), make_trial(2, 0.0, reason=other)
    )
    study.set_user_attr("matchai", one if isinstance(one, dict) else {"epochs": one, "data": other, HOSTILE: one})
    page = report(tmp_path, study, notes=[HOSTILE], command=HOSTILE, screen=study)
    assert "<script" not in page
    assert "<b>" not in page


def test_a_report_of_a_store_opens_alone_and_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    store = tmp_path / "study.db"
    trials = [make_trial(number, 0.8 + 0.01 * math.sin(number)) for number in range(12)]
    study = make_study(*trials, make_trial(12, 0.0, reason=HOSTILE), storage=f"sqlite:///{store}")

    def content() -> list[str]:
        with sqlite3.connect(store) as connection:
            return list(connection.iterdump())

    before = content()
    folder = tmp_path / "new" / "folder"
    page = report(folder, study)
    assert content() == before
    assert sorted(path.name for path in folder.iterdir()) == ["figures", "report.html"]
    assert page.count('<img src="data:image/png;base64,') == len(list((folder / "figures").iterdir())) == 5
    assert HOSTILE not in page
    assert html.escape("<script>") in page
