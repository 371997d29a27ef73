"""Verdicts: a challenger beats the recipe only beyond the noise between seeds."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from matchai.study.significance import judge

SEEDS = (1, 2, 3)
rows = st.lists(st.floats(0, 1), min_size=3, max_size=3)


def test_a_clear_gain_is_declared_with_its_size() -> None:
    verdict = judge({0: [0.70, 0.71, 0.72], 4: [0.80, 0.811, 0.82], 7: [0.70, 0.712, 0.72]}, 0, SEEDS)
    assert verdict.winner == 4
    assert verdict.is_difference
    best = verdict.challengers[0]
    assert best.number == 4
    assert best.difference == pytest.approx(0.10033, abs=1e-4)
    assert best.low < 0.1 < best.high


def test_a_gain_within_the_noise_is_none_and_the_recipe_is_the_answer() -> None:
    verdict = judge({0: [0.70, 0.80, 0.72], 4: [0.82, 0.71, 0.80]}, 0, SEEDS)
    assert verdict.winner == 0
    assert not verdict.is_difference
    assert verdict.challengers[0].difference > 0


def test_the_interval_is_that_of_paired_differences_for_one_challenger() -> None:
    # with two configurations the blocks' residual is half of the variance of the differences: Student's paired interval
    recipe, other = np.array([0.70, 0.74, 0.71]), np.array([0.74, 0.80, 0.73])
    found = judge({0: list(recipe), 1: list(other)}, 0, SEEDS).challengers[0]
    interval = stats.ttest_rel(other, recipe).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_what_all_share_on_a_seed_is_no_noise() -> None:
    recipe, gain = np.array([0.2, 0.9, 0.5]), np.array([0.05, 0.051, 0.049])
    assert judge({0: list(recipe), 1: list(recipe + gain)}, 0, SEEDS).winner == 1


def test_less_is_better_of_a_minimised_objective() -> None:
    values = {0: [0.70, 0.71, 0.72], 4: [0.80, 0.811, 0.82], 7: [0.60, 0.611, 0.62]}
    verdict = judge(values, 0, SEEDS, is_maximised=False)
    assert verdict.winner == 7
    assert verdict.challengers[0].difference == pytest.approx(0.09967, abs=1e-4)
    assert verdict.challengers[0].mean == pytest.approx(0.61, abs=1e-3)
    assert verdict.challengers[-1].difference < 0


@pytest.mark.parametrize("num_challengers", [1, 3])
def test_identical_configurations_are_told_apart_in_at_most_a_twentieth_of_studies(num_challengers: int) -> None:
    generator = np.random.default_rng(0)
    declared = 0
    for _ in range(2000):
        seeds = generator.normal(0, 0.05, 3)  # what a seed does to all
        values = {number: list(0.8 + seeds + generator.normal(0, 0.009, 3)) for number in range(num_challengers + 1)}
        declared += judge(values, 0, SEEDS).is_difference
    # only the upper end of the two-sided intervals counts, so a fortieth at most; 4 standard errors of 2000 draws
    assert declared / 2000 < 0.025 + 4 * math.sqrt(0.025 * 0.975 / 2000)


def test_a_gain_of_five_standard_deviations_is_found_in_nine_of_ten_studies() -> None:
    generator = np.random.default_rng(1)
    found = 0
    for _ in range(500):
        values = {number: list(0.8 + generator.normal(0, 0.009, 3)) for number in range(4)}
        values[2] = [value + 0.045 for value in values[2]]
        found += judge(values, 0, SEEDS).winner == 2
    assert found / 500 > 0.9


@pytest.mark.parametrize("is_maximised", [True, False])
def test_a_challenger_that_failed_on_a_seed_cannot_win_and_hides_no_other(is_maximised: bool) -> None:
    worst = -math.inf if is_maximised else math.inf
    gain = 0.1 if is_maximised else -0.1
    recipe = [0.70, 0.71, 0.72]
    values = {0: recipe, 1: [0.99, worst, 0.99], 2: [value + gain for value in recipe]}
    verdict = judge(values, 0, SEEDS, is_maximised=is_maximised)
    assert verdict.winner == 2
    assert verdict.challengers[-1].number == 1


@pytest.mark.parametrize("is_maximised", [True, False])
def test_a_recipe_that_failed_on_a_seed_loses_to_the_best_challenger_that_did_not(is_maximised: bool) -> None:
    worst = -math.inf if is_maximised else math.inf
    values = {0: [0.9, worst, 0.9], 1: [0.6, 0.6, 0.6], 2: [0.5, 0.5, 0.5], 3: [0.9, 0.9, worst]}
    verdict = judge(values, 0, SEEDS, is_maximised=is_maximised)
    assert verdict.winner == (1 if is_maximised else 2)


def test_where_all_fail_the_recipe_is_the_answer() -> None:
    assert judge({0: [-math.inf] * 3, 1: [-math.inf] * 3}, 0, SEEDS).winner == 0


@given(st.dictionaries(st.integers(1, 9), rows, min_size=1, max_size=4), rows)
def test_a_winner_is_better_than_the_recipe_and_the_best_of_all(
    others: dict[int, list[float]], own: list[float]
) -> None:
    verdict = judge({0: own, **others}, 0, SEEDS)
    if verdict.is_difference:
        assert verdict.winner == verdict.challengers[0].number
        assert verdict.challengers[0].mean > verdict.recipe.mean
    means = [one.mean for one in verdict.challengers]
    assert means == sorted(means, reverse=True)


@pytest.mark.parametrize("values", [{0: [0.5], 1: [0.6]}, {0: [0.5, 0.6, 0.7], 1: [0.6, 0.7]}])
def test_values_that_do_not_belong_to_the_seeds_are_refused(values: dict[int, list[float]]) -> None:
    with pytest.raises(ValueError, match="one value for each"):
        judge(values, 0, SEEDS[: len(values[0])])
