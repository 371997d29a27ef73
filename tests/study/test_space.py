"""Search spaces: read, held against the settings, and turned into a trial's settings and back."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from matchai.settings.config import PRESETS, TrainConfig
from matchai.study.space import Space, default_space, load_space, shares
from matchai.system.errors import InputError

unit = st.floats(0, 1)


def space_of(entries: Any, tmp_path: Path, *, fixed: tuple[str, ...] = (), **recipe: Any) -> Space:
    file = tmp_path / "space.yaml"
    file.write_text(yaml.safe_dump(entries) if not isinstance(entries, str) else entries)
    return load_space(file, TrainConfig().updated(**recipe), fixed)


def problem_of(entries: Any, tmp_path: Path, *, fixed: tuple[str, ...] = (), **recipe: Any) -> str:
    with pytest.raises(InputError) as caught:
        space_of(entries, tmp_path, fixed=fixed, **recipe)
    return str(caught.value)


@given(st.lists(unit, min_size=1, max_size=5))
def test_shares_lie_on_the_simplex(params: list[float]) -> None:
    found = shares(params)
    assert len(found) == len(params) + 1
    assert min(found) >= 0
    assert abs(sum(found) - 1) <= 1e-12


@pytest.mark.parametrize("num_shares", [2, 3, 4])
def test_shares_of_an_even_grid_are_uniform_on_the_simplex(num_shares: int) -> None:
    # of a uniform point each share is above t with chance (1 - t)^(k - 1), whichever share it is
    grid = [(number + 0.5) / 40 for number in range(40)]
    points: list[list[float]] = [[]]
    for _ in range(num_shares - 1):
        points = [[*point, u] for point in points for u in grid]
    found = [shares(point) for point in points]
    for place in range(num_shares):
        for t in (0.2, 0.5, 0.8):
            part = sum(one[place] > t for one in found) / len(found)
            assert abs(part - (1 - t) ** (num_shares - 1)) < 0.03


def test_the_dice_share_is_one_minus_a_root_and_the_ce_share_a_part_of_the_rest() -> None:
    dice, ce, focal = shares([0.49, 0.25])
    assert dice == pytest.approx(1 - 0.7)
    assert ce == pytest.approx(0.7 * 0.25)
    assert focal == pytest.approx(0.7 * 0.75)


@given(unit, unit)
def test_the_parameters_of_settings_lead_back_to_them(first: float, second: float) -> None:
    space = load_space(default_space(), TrainConfig())
    params = {"loss_mix_1": first, "loss_mix_2": second, "focal_gamma": 1.0, "sampler_weight": 2.0, "max_lr": 1e-3}
    settings = space.settings(params)
    again = space.settings(space.params(TrainConfig().updated(**settings)))
    assert all(abs(again[name] - settings[name]) < 1e-9 for name in settings)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_lies_in_the_default_space(preset: str) -> None:
    config = TrainConfig().updated(**PRESETS[preset])
    space = load_space(default_space(), config)
    assert space.settings(space.params(config)) == pytest.approx({name: config.flat()[name] for name in SEARCHED})


SEARCHED = ("dice_weight", "ce_weight", "focal_weight", "focal_gamma", "sampler_weight", "max_lr")


def test_the_default_space_searches_the_loss_the_sampler_and_the_learning_rate() -> None:
    space = load_space(default_space(), TrainConfig())
    assert set(space.settings(space.params(TrainConfig()))) == set(SEARCHED)
    assert len(space.distributions) == 5
    assert space.entries["sampler_weight"]["log"]
    assert space.entries["max_lr"]["log"]


def test_a_flag_takes_its_setting_out_of_the_space() -> None:
    space = load_space(default_space(), TrainConfig(), ["max_lr", "epochs"])
    assert "max_lr" not in space.distributions
    assert "focal_gamma" in space.distributions


def test_all_loss_weights_together_leave_the_space_and_one_alone_is_refused() -> None:
    weights = ["ce_weight", "dice_weight", "focal_weight"]
    assert not load_space(default_space(), TrainConfig(), weights).simplexes
    with pytest.raises(InputError, match="--dice-weight and --focal-weight too, or none"):
        load_space(default_space(), TrainConfig(), weights[:1])


def test_flags_that_leave_nothing_to_search_are_refused(tmp_path: Path) -> None:
    entries = {"max_lr": {"low": 1e-4, "high": 1e-3}}
    assert "nothing to search" in problem_of(entries, tmp_path, fixed=("max_lr",))


def test_whole_numbers_steps_and_choices_are_taken(tmp_path: Path) -> None:
    entries = {
        "batch_size": {"low": 2, "high": 8, "step": 2},
        "image_size": {"choices": [256, 384]},
        "encoder": {"choices": ["resnet18", "timm-efficientnet-b3"]},
        "target_classes": {"choices": [["consolidation"], ["consolidation", "ground glass"]]},
        "weight_decay": {"low": "1e-5", "high": "1e-2", "log": True},
    }
    space = space_of(entries, tmp_path)
    params = space.params(TrainConfig())
    assert space.settings(params)["target_classes"] == ("consolidation",)
    assert space.settings({**params, "target_classes": "consolidation, ground glass"})["target_classes"] == (
        "consolidation",
        "ground glass",
    )
    assert space.entries["weight_decay"] == {"low": 1e-5, "high": 1e-2, "log": True}


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"max_lrr": {"low": 1e-4, "high": 1e-3}}, "did you mean max_lr?"),
        ({"seed": {"low": 0, "high": 9}}, "cannot be searched"),
        ({"epochs": {"low": 1, "high": 9}}, "cannot be searched"),
        ({"output": {"choices": ["a", "b"]}}, "cannot be searched"),
        ({"max_lr": {"low": 1e-3, "high": 1e-4}}, "a range must rise"),
        ({"max_lr": {"low": 1e-3, "high": 1e-3}}, "a range must rise"),
        ({"focal_gamma": {"low": 0, "high": 5, "log": True}}, "begins above 0"),
        ({"focal_gamma": {"low": 0, "high": 500}}, "at most 100"),
        ({"max_lr": {"low": 0, "high": 1e-3}}, "above 0"),
        ({"max_lr": {"low": 1e-4, "high": ".inf"}}, "max_lr"),
        ({"max_lr": {"low": "fast", "high": 1}}, "must be a number"),
        ({"max_lr": {"low": 1e-4}}, "{low: …, high: …}"),
        ({"max_lr": 3}, "{low: …, high: …}"),
        ({"max_lr": {"low": 1e-4, "high": 1e-3, "lgo": True}}, "{low: …, high: …}"),
        ({"max_lr": {"low": 1e-4, "high": 1e-3, "log": "yes please"}}, "true or false"),
        ({"max_lr": {"low": 1e-4, "high": 1e-3, "step": 1}}, "fit into the range"),
        ({"max_lr": {"low": 1e-4, "high": 1e-3, "step": "wide"}}, "must be a number"),
        ({"image_size": {"low": 256, "high": 400}}, "multiple of 32"),
        ({"image_size": {"choices": [384, 100]}}, "multiple of 32"),
        ({"encoder": {"low": 1, "high": 2}}, "low and high are for numbers"),
        ({"mixed_precision": {"choices": ["auto", "fp17"]}}, "must be one of"),
        ({"batch_size": {"choices": [6]}}, "two or more values"),
        ({"batch_size": {"choices": [6, 6]}}, "given twice"),
        ({"mix": {"simplex": ["dice_weight"]}}, "two or more different settings"),
        ({"mix": {"simplex": ["dice_weight", "batch_size"]}}, "no number that could be a share"),
        ({"max_lr": {"simplex": ["dice_weight", "ce_weight"]}}, "a name of its own"),
        ({"mix": {"simplex": ["dice_weight", "ce_weigth"]}}, "did you mean ce_weight?"),
        (
            {"mix": {"simplex": ["dice_weight", "ce_weight"]}, "ce_weight": {"low": 0, "high": 1}},
            "ce_weight is searched twice",
        ),
        ({}, "nothing to search"),
        ("- a list", "mapping"),
        ("max_lr: {low: 1, low: 2}", "given twice"),
    ],
)
def test_a_bad_space_is_told_before_the_first_trial(entries: Any, words: str, tmp_path: Path) -> None:
    assert words in problem_of(entries, tmp_path)


def test_every_problem_of_a_space_is_told_at_once(tmp_path: Path) -> None:
    said = problem_of({"max_lrr": {"low": 1, "high": 2}, "focal_gamma": {"low": 5, "high": 1}}, tmp_path)
    assert "max_lrr" in said
    assert "focal_gamma" in said


def test_a_recipe_outside_of_the_space_is_refused(tmp_path: Path) -> None:
    entries = {"max_lr": {"low": 1e-4, "high": 1e-3}}
    assert "widen the space" in problem_of(entries, tmp_path, max_lr=0.1)
    mix = {"mix": {"simplex": ["dice_weight", "ce_weight", "focal_weight"]}}
    assert "sum to 1.5" in problem_of(mix, tmp_path, dice_weight=1.0)


def test_a_missing_space_is_told_with_its_flag(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="check --space"):
        load_space(tmp_path / "none.yaml", TrainConfig())


MIXED: dict[str, Any] = {
    "max_lr": {"low": 1e-4, "high": 1e-2, "log": True},
    "horizontal_flip": {"low": 0.0, "high": 0.5, "step": 0.125},
    "batch_size": {"low": 2, "high": 8, "step": 2},
    "ema_decay": {"choices": [0.0, 0.9]},
    "sync_batch_norm": {"choices": [True, False]},
}


@pytest.mark.parametrize(
    ("params", "taken"),
    [
        ({}, {}),
        ({"max_lr": 1e-2}, {"max_lr": 0.01}),
        ({"batch_size": 4.0, "ema_decay": 0}, {"batch_size": 4, "ema_decay": 0.0}),
        ({"horizontal_flip": 0.25, "sync_batch_norm": False}, {"horizontal_flip": 0.25, "sync_batch_norm": False}),
    ],
)
def test_some_parameters_of_a_trial_are_taken_as_the_space_has_them(params: Any, taken: Any, tmp_path: Path) -> None:
    found = space_of(MIXED, tmp_path).check_params(params)
    assert found == pytest.approx(taken)
    assert {name: type(value) for name, value in found.items()} == {name: type(value) for name, value in taken.items()}


@pytest.mark.parametrize(
    "params",
    [
        *({"max_lr": value} for value in (1.0, 0, float("nan"), float("inf"), "1e-3", True, None, [1e-3])),
        *({"batch_size": value} for value in (3, 2.5, 10, True, "4")),
        *({"horizontal_flip": 0.3}, {"ema_decay": 0.5}, {"ema_decay": False}, {"sync_batch_norm": 1}),
    ],
)
def test_a_parameter_outside_of_the_space_is_refused_with_what_is_inside(params: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{next(iter(params))} is .* not in the space"):
        space_of(MIXED, tmp_path).check_params(params)


def test_a_parameter_that_the_space_has_not_is_refused_with_those_it_has(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no parameter 'nothing' in the space \(batch_size, ema_decay,"):
        space_of(MIXED, tmp_path).check_params({"nothing": 1})
