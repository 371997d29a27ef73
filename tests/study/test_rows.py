"""What is shown of a study: kinds of trials, settings, the best, importances."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import TrialState

from matchai.study.rows import (
    MIN_IMPORTANCE,
    find_best,
    find_importances,
    find_recipe,
    format_setting,
    label_objective,
    read_epochs,
    read_rows,
    read_settings,
)
from tests.studies import EPOCHS, make_free_trial, make_study, make_trial

AXES: dict[str, BaseDistribution] = {name: FloatDistribution(0, 1) for name in ("a", "b")}


def test_every_state_has_its_kind() -> None:
    study = make_study(
        make_trial(0, 0.8),
        make_trial(1, 0.7, TrialState.PRUNED),
        make_trial(2, None, TrialState.FAIL, reason="disk full"),
        make_trial(3, None, TrialState.RUNNING),
        make_trial(4, 0.0, reason="non-finite loss"),
        make_trial(5, math.inf),
    )
    failed = "failed for its settings"
    assert [row.kind for row in read_rows(study)] == [
        *("complete", "pruned", "failed for the machine", "running", failed, failed),
    ]


@pytest.mark.parametrize(("direction", "best"), [("maximize", 0.6), ("minimize", 0.075)])
def test_an_unfinished_trial_is_worth_its_best_epoch(direction: str, best: float) -> None:
    study = make_study(make_trial(1, 0.6, TrialState.PRUNED), direction=direction)
    assert read_rows(study)[0].value == pytest.approx(best)


def test_the_shares_of_the_loss_stand_for_the_parameters_behind() -> None:
    study = make_study(make_trial(0, 0.8))
    names = ["ce_weight", "dice_weight", "focal_weight", "focal_gamma", "sampler_weight", "max_lr"]
    assert list(read_settings(study)) == names
    row = read_rows(study)[0]
    assert list(row.settings) == names
    # the recipe: 1 - √0.25, half of the rest, the rest
    assert [row.settings[name] for name in names[:3]] == pytest.approx([0.25, 0.5, 0.25])


def test_a_space_without_the_simplex_is_shown_as_it_is() -> None:
    study = make_study(make_free_trial(0.5, {"a": 0.5, "b": 1.0}, AXES))
    assert read_settings(study) == AXES
    assert read_rows(study)[0].settings == {"a": 0.5, "b": 1.0}


@pytest.mark.parametrize(("direction", "best"), [("maximize", 2), ("minimize", 1)])
def test_the_best_is_the_first_of_the_best_complete_trials(direction: str, best: int) -> None:
    values = [0.5, 0.4, 0.6, 0.6, 0.4]
    trials = [make_trial(number, value) for number, value in enumerate(values)]
    trials += [make_trial(5, 0.9, TrialState.PRUNED), make_trial(6, 0.0, reason="a"), make_trial(7, math.inf)]
    trials += [make_trial(8, 0.1, TrialState.PRUNED), make_trial(9, -math.inf)]
    found = find_best(read_rows(make_study(*trials, direction=direction)), direction == "maximize")
    assert found is not None
    assert found.number == best


def test_a_study_without_complete_trials_has_no_best() -> None:
    assert find_best(read_rows(make_study(make_trial(1, 0.0, reason="a"))), True) is None


@pytest.mark.parametrize("mark", [1, "yes", None, False])
def test_only_true_marks_the_recipe(mark: object) -> None:
    study = make_study(make_trial(1, 0.5, is_recipe=mark), make_trial(2, 0.5, is_recipe=True))
    found = find_recipe(read_rows(study))
    assert found is not None
    assert found.number == 1  # the second row: rows are numbered as they are added


def test_a_recipe_that_failed_for_the_machine_is_replaced() -> None:
    trials = [make_trial(0, None, TrialState.FAIL), make_trial(1, 0.5), make_trial(0, 0.7)]
    found = find_recipe(read_rows(make_study(*trials)))
    assert found is not None
    assert found.value == 0.7
    found = find_recipe(read_rows(make_study(*trials[:2])))
    assert found is not None
    assert found.kind == "failed for the machine"


@given(st.floats(1e-12, 1e12) | st.floats(-1e12, -1e-12) | st.just(0.0))
def test_a_setting_is_written_in_four_digits(value: float) -> None:
    assert float(format_setting(value)) == pytest.approx(value, rel=5.1e-4)
    assert len(format_setting(value)) <= len("-1.234e-12")


@pytest.mark.parametrize(
    ("value", "text"),
    [(5e-4, "5e-4"), (0.25, "0.25"), (3.0, "3"), (7, "7"), ("a b", "a b"), (None, "–"), (True, "True")],
)
def test_a_setting_is_written_as_one_types_it(value: object, text: str) -> None:
    assert format_setting(value) == text


def test_the_epochs_are_told_by_the_study_or_by_its_trials() -> None:
    study = make_study(make_trial(0, 0.5, epochs=3))
    assert read_epochs(study) == EPOCHS
    study.set_user_attr("matchai", {})
    assert read_epochs(study) == 3
    for odd in ("many", None, -1, [2]):
        study = make_study(make_trial(0, 0.5, epochs=odd))
        study.set_user_attr("matchai", odd)
        assert read_epochs(study) is None


def test_an_objective_has_words() -> None:
    assert [label_objective("mean_dice"), label_objective("my_own_key")] == ["mean Dice", "my own key"]


def grid(num_trials: int, weight: float) -> list[tuple[float, float, float]]:
    """Points of the unit square and their value, in which `a` weighs 1 and `b` weighs `weight`."""
    points = [(number / num_trials, number * 0.618 % 1) for number in range(num_trials)]
    return [(a, b, a + weight * b) for a, b in points]


@pytest.mark.parametrize(("weight", "first"), [(0.2, "a"), (5.0, "b")])
def test_the_setting_that_moves_the_value_most_is_the_most_important(weight: float, first: str) -> None:
    study = make_study(*(make_free_trial(value, {"a": a, "b": b}, AXES) for a, b, value in grid(20, weight)))
    shares = find_importances(study)
    assert next(iter(shares)) == first
    assert shares[first] > 0.7
    assert sum(shares.values()) == pytest.approx(1)


def test_importances_leave_out_trials_that_failed_for_their_settings() -> None:
    trials = [make_free_trial(value, {"a": a, "b": b}, AXES) for a, b, value in grid(20, 0.2)]
    shares = find_importances(make_study(*trials))
    for number in range(5):
        failed = make_free_trial(-1000.0, {"a": 0.5, "b": number / 4}, AXES)
        failed.set_user_attr("reason", "non-finite loss")
        trials.append(failed)
    assert find_importances(make_study(*trials)) == shares


def test_importances_add_up_the_mix_of_the_losses() -> None:
    study = make_study(*(make_trial(number, 0.5 + number / 100) for number in range(MIN_IMPORTANCE)))
    assert set(find_importances(study)) == {"loss mix", "focal_gamma", "sampler_weight", "max_lr"}


@pytest.mark.parametrize("num_trials", [0, 1, MIN_IMPORTANCE - 1])
def test_too_few_trials_have_no_importances(num_trials: int) -> None:
    assert find_importances(make_study(*(make_trial(number, number / 20) for number in range(num_trials)))) == {}


def test_equal_values_have_no_importances() -> None:
    assert find_importances(make_study(*(make_trial(number, 0.5) for number in range(MIN_IMPORTANCE)))) == {}


def test_one_setting_alone_has_no_importance() -> None:
    trials = [make_free_trial(number / 20, {"a": number / 20}, {"a": FloatDistribution(0, 1)}) for number in range(20)]
    assert find_importances(make_study(*trials)) == {}
