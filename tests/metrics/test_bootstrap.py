"""Bootstrap intervals: what a loop over explicit resamples finds, and they cover what they say they cover."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom

from matchai.metrics.bootstrap import Bootstrap
from matchai.metrics.confusion import dice_per_class, mean_along

GROUPS = np.repeat([7, 3, 12, 5], [3, 1, 4, 2])


def some_confusions(num_slices: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(1, 50, (num_slices, 3, 3))


def explicit_resamples(bootstrap: Bootstrap, groups: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The slices of each resample, one by one."""
    names = np.unique(groups)
    return [
        np.concatenate([np.flatnonzero(groups == name) for name, k in zip(names, row, strict=True) for _ in range(k)])
        for row in bootstrap.weights
    ]


def test_pooled_intervals_are_those_of_explicit_resamples() -> None:
    confusions, bootstrap = some_confusions(len(GROUPS)), Bootstrap(GROUPS, num_resamples=200)
    figures = [dice_per_class(confusions[chosen].sum(0)) for chosen in explicit_resamples(bootstrap, GROUPS)]
    interval = bootstrap.of_counts(confusions, dice_per_class)
    assert np.allclose([interval.low, interval.high], np.quantile(figures, [0.025, 0.975], axis=0), rtol=0, atol=1e-12)


def test_intervals_of_means_are_those_of_explicit_resamples() -> None:
    values = np.random.default_rng(1).random((len(GROUPS), 2))
    values[3:8, 1] = np.nan
    bootstrap = Bootstrap(GROUPS, num_resamples=200, level=0.8)
    figures = np.array([mean_along(values[chosen], 0) for chosen in explicit_resamples(bootstrap, GROUPS)])
    interval = bootstrap.of_means(values)
    assert np.allclose([interval.low, interval.high], np.nanquantile(figures, [0.1, 0.9], axis=0), rtol=0, atol=1e-12)
    assert interval.undefined.tolist() == np.isnan(figures).mean(axis=0).tolist()


def test_the_order_and_the_names_of_groups_change_nothing_else() -> None:
    confusions = some_confusions(len(GROUPS))
    order = np.random.default_rng(2).permutation(len(GROUPS))
    plain = Bootstrap(GROUPS).of_counts(confusions, dice_per_class)
    other = Bootstrap(GROUPS[order] * 10 + 1).of_counts(confusions[order], dice_per_class)
    assert np.array_equal(plain, other)


def test_one_group_has_no_interval() -> None:
    bootstrap = Bootstrap(np.zeros(5, int))
    interval = bootstrap.of_counts(some_confusions(5), dice_per_class)
    assert np.isnan([interval.low, interval.high]).all()


def test_a_class_that_one_group_alone_shows_has_no_interval() -> None:
    confusions = some_confusions(len(GROUPS))
    confusions[GROUPS != 7, 1] = 0
    interval = Bootstrap(GROUPS).of_counts(confusions, dice_per_class)
    assert np.isnan(interval.low).tolist() == np.isnan(interval.high).tolist() == [False, True, False]
    assert interval.undefined[1] == pytest.approx((1 - 1 / 4) ** 4, abs=0.05)


def test_alike_groups_have_an_interval_of_no_width() -> None:
    confusions = np.tile(some_confusions(1), (6, 1, 1))
    interval = Bootstrap(np.arange(6)).of_counts(confusions, dice_per_class)
    expected = dice_per_class(confusions[0])
    assert np.allclose([interval.low, interval.high], [expected, expected], rtol=0, atol=1e-12)


def test_a_narrower_level_lies_within() -> None:
    confusions = some_confusions(len(GROUPS))
    wide = Bootstrap(GROUPS).of_counts(confusions, dice_per_class)
    narrow = Bootstrap(GROUPS, level=0.5).of_counts(confusions, dice_per_class)
    assert (wide.low <= narrow.low).all()
    assert (narrow.high <= wide.high).all()


def test_intervals_cover_the_mean_of_whole_groups_as_often_as_they_say() -> None:
    """Slices of a group are alike, so slices drawn one by one would cover far too seldom; groups are drawn."""
    rng, trials, level = np.random.default_rng(3), 300, 0.9
    groups = np.repeat(np.arange(40), 5)
    covered = covered_by_slices = 0
    for _ in range(trials):
        values = rng.normal(size=40)[groups] + 0.1 * rng.normal(size=len(groups))
        one = Bootstrap(groups, num_resamples=400, level=level).of_means(values)
        covered += bool(one.low <= 0 <= one.high)
        wrong = Bootstrap(np.arange(len(groups)), num_resamples=400, level=level).of_means(values)
        covered_by_slices += bool(wrong.low <= 0 <= wrong.high)
    # a percentile interval of 40 groups covers 1 to 2 points less than it says
    low, high = binom.interval(0.9999, trials, level - 0.015)
    assert low <= covered <= high
    assert covered_by_slices < low
