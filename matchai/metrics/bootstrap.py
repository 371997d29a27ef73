"""How far a figure may move with the patients at hand: percentile bootstrap over groups (Efron 1979).

Slices of one group (a patient, a volume) are alike, so it is groups that are drawn again, with replacement, never
slices. As every figure follows from sums of counts, a resample is no more than a whole-number weight for each group:
2000 of them cost one matrix product.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from matchai.metrics.confusion import Counts, divide
from matchai.system import seed_sequence

Number = TypeVar("Number", np.int64, np.float64)

NUM_RESAMPLES = 2000
MIN_GROUPS = 2
MAX_UNDEFINED = 0.05
"""The share of resamples without a value above which an interval is told to rest on a part of them."""


class Interval(NamedTuple):
    """Bounds of a figure, or of K figures; NaN where there is no interval.

    Attributes:
        low: () or (K,) float64.
        high: Likewise.
        undefined: The share of the resamples that had no value, as a class was absent; they are left out.
    """

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    undefined: NDArray[np.float64]


class Bootstrap:
    """The resamples of a set of slices; all figures share them, so that they can be compared.

    A figure has no interval (NaN) where fewer than two groups have a value of it: one group tells nothing of others.

    Args:
        groups: (N,) the group of each slice, any whole numbers.
        num_resamples: How often the groups are drawn again.
        seed: Keys the draws; the same numbers come whatever was drawn before.
        level: The share of the resamples between the bounds.

    Attributes:
        num_groups: Number of groups, G.
        weights: (R, G) int64, how often each group is in each resample; a row sums to G.

    >>> of_two_patients = Bootstrap(groups=[0, 0, 1, 1]).of_means(np.array([0.5, 0.6, 0.8, 0.9]))
    >>> round(of_two_patients.low.item(), 2), round(of_two_patients.high.item(), 2)
    (0.55, 0.85)
    """

    def __init__(
        self, groups: ArrayLike, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0, level: float = 0.95
    ) -> None:
        names, self._group = np.unique(np.asarray(groups), return_inverse=True)
        self.num_groups, self.level = len(names), level
        rng = np.random.default_rng(seed_sequence(seed, self.num_groups, num_resamples))
        share = np.full(self.num_groups, 1 / max(self.num_groups, 1))
        self.weights: NDArray[np.int64] = rng.multinomial(self.num_groups, share, size=num_resamples)

    def of_counts(self, confusions: Counts, statistic: Callable[[Counts], NDArray[np.float64]]) -> Interval:
        """The interval of a figure that is pooled over pixels.

        Args:
            confusions: (N, C, C) counts of each slice.
            statistic: From counts (..., C, C) to (...) or (..., K), NaN where undefined, as those of
                `matchai.metrics.confusion` are.
        """
        sums = self.sum_groups(confusions.reshape(len(confusions), -1))
        pooled = (self.weights @ sums).reshape(-1, *confusions.shape[1:])
        is_defined = ~np.isnan(statistic(sums.reshape(-1, *confusions.shape[1:])))
        return self._interval(statistic(pooled), is_defined)

    def of_means(self, values: NDArray[np.float64]) -> Interval:
        """The interval of a mean over images.

        Args:
            values: (N,) or (N, K), a figure of each slice, NaN where undefined: those are left out of the mean.
        """
        is_known = ~np.isnan(values)
        sums, numbers = self.sum_groups(np.where(is_known, values, 0)), self.sum_groups(is_known.astype(np.int64))
        return self._interval(divide(self.weights @ sums, self.weights @ numbers), numbers > 0)

    def sum_groups(self, values: NDArray[Number]) -> NDArray[Number]:
        """Adds up what is counted in the slices of each group, (N, ...) to (G, ...), in the order of their numbers."""
        sums = np.zeros((self.num_groups, *values.shape[1:]), values.dtype)
        np.add.at(sums, self._group, values)
        return sums

    def _interval(self, resampled: NDArray[np.float64], is_defined: NDArray[np.bool_]) -> Interval:
        undefined = np.isnan(resampled).mean(axis=0)
        has_interval = (is_defined.sum(axis=0) >= MIN_GROUPS) & (undefined < 1)
        tail = (1 - self.level) / 2
        known = np.where(has_interval, resampled, 0)  # numpy would warn of a column without a number
        low, high = np.nanquantile(known, [tail, 1 - tail], axis=0)
        return Interval(np.where(has_interval, low, np.nan), np.where(has_interval, high, np.nan), undefined)
