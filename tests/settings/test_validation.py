"""What no run could take: every wrong setting is told by name."""

import math
from typing import Any

import pytest

from matchai.settings.config import LEAVES, PRESETS, TrainConfig
from matchai.settings.validation import check, parse_interval
from matchai.system.errors import InputError


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_without_a_problem(preset: str) -> None:
    assert check(TrainConfig().updated(preset=preset, **PRESETS[preset])) == []


@pytest.mark.parametrize("name", [name for name, (_, leaf) in LEAVES.items() if leaf.metadata])
def test_a_number_out_of_its_range_is_a_problem_that_names_it(name: str) -> None:
    limits = LEAVES[name][1].metadata
    outside = [limits["low"] - 1, limits["high"] + 1, limits["above"]]
    for value in (value for value in outside if math.isfinite(value)):
        problems = check(TrainConfig().updated_from({name: value}))
        assert any(problem.startswith(f"{name} is ") for problem in problems)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["max_lr", "sampler_weight", "focal_gamma", "val_fraction"])
def test_a_number_that_is_not_finite_is_a_problem(name: str, value: float) -> None:
    assert any(problem.startswith(f"{name} is ") for problem in check(TrainConfig().updated_from({name: value})))


@pytest.mark.parametrize(
    ("size", "nearest"), [(100, "96 and 128"), (500, "480 and 512"), (33, "32 and 64"), (385, "384 and 416")]
)
def test_an_image_size_between_multiples_of_32_is_told_with_its_neighbours(size: int, nearest: str) -> None:
    (problem,) = check(TrainConfig().updated(image_size=size))
    assert nearest in problem


@pytest.mark.parametrize(
    "settings",
    [
        {"background_class": "backgrund"},
        {"lesion_classes": ["ground glas"]},
        {"target_classes": ["consolidatoin"]},
    ],
    ids=str,
)
def test_a_misspelt_class_is_told_with_the_nearest(settings: dict[str, Any]) -> None:
    (problem,) = check(TrainConfig().updated_from(settings))
    assert next(iter(settings)) in problem
    assert "did you mean" in problem


@pytest.mark.parametrize("names", [[], ["a"], ["a", "a"], ["a", ""]], ids=str)
def test_class_names_must_be_two_or_more_different_ones(names: list[str]) -> None:
    assert any(p.startswith("class_names") for p in check(TrainConfig().updated_from({"class_names": names})))


@pytest.mark.parametrize("window", [(5, 5), (5, -5), (math.nan, 5), (-math.inf, 5)], ids=str)
def test_a_window_that_does_not_rise_is_a_problem(window: tuple[float, float]) -> None:
    assert any(p.startswith("hu_window") for p in check(TrainConfig().updated_from({"hu_window": window})))


@pytest.mark.parametrize("settings", [{"folds": 1}, {"fold": 1}, {"folds": 3, "fold": 3}], ids=str)
def test_folds_that_do_not_exist_are_a_problem(settings: dict[str, int]) -> None:
    assert check(TrainConfig().updated_from(settings))


def test_a_loss_of_nothing_is_a_problem() -> None:
    assert check(TrainConfig().updated(ce_weight=0, dice_weight=0, focal_weight=0))


def test_a_wrong_interval_is_a_problem() -> None:
    assert any("save_every" in p for p in check(TrainConfig().updated(save_every="soon")))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("60s", (60.0, math.inf)),
        ("5min", (300.0, math.inf)),
        ("0.5 min", (30.0, math.inf)),
        (" 1.5s ", (1.5, math.inf)),
        ("200", (math.inf, 200.0)),
    ],
)
def test_an_interval_is_seconds_minutes_or_steps(text: str, expected: tuple[float, float]) -> None:
    assert parse_interval(text) == expected


@pytest.mark.parametrize("text", ["", "0", "0s", "0.0min", "-5s", "5h", "1.5", "s", "5 s s", "1e3", "nan", "inf"])
def test_anything_else_is_no_interval(text: str) -> None:
    with pytest.raises(InputError, match="save_every"):
        parse_interval(text)


@pytest.mark.parametrize("rescale", [(0, 5), (math.nan, 0), (1, math.inf)], ids=str)
def test_a_rescale_that_makes_no_hu_is_a_problem(rescale: tuple[float, float]) -> None:
    assert any(p.startswith("rescale") for p in check(TrainConfig().updated_from({"rescale": rescale})))


def test_a_label_map_of_an_unknown_class_is_told_with_the_nearest() -> None:
    (problem,) = check(TrainConfig().updated(label_map=["0:backgroud"]))
    assert problem.startswith("label_map")
    assert "did you mean 'background'" in problem
