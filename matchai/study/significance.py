"""Whether a challenger is better than the recipe: both trained again on the same fresh seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95  # of all intervals together


@dataclass(frozen=True)
class Contender:
    """What one configuration came to on the fresh seeds.

    Attributes:
        number: Its trial.
        values: The objective on each seed, in the seeds' order.
        mean: Their mean.
        sd: Their standard deviation over the seeds (n - 1); NaN for one seed.
        difference: Its mean minus the recipe's; positive is better, whichever way the objective goes; infinite where
            one of the two failed on a seed.
        low: Lower end of the interval for that difference.
        high: Upper end.
    """

    number: int
    values: tuple[float, ...]
    mean: float
    sd: float
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Verdict:
    """What the confirmation says.

    Attributes:
        recipe: The recipe; its difference is 0.
        challengers: The others, the best mean first.
        winner: The trial whose settings are the answer: the best challenger's, or the recipe's where its interval does
            not lie above 0.
        seeds: The fresh seeds.
        confidence: With which all intervals hold together.
    """

    recipe: Contender
    challengers: tuple[Contender, ...]
    winner: int
    seeds: tuple[int, ...]
    confidence: float = CONFIDENCE

    @property
    def is_difference(self) -> bool:
        """Whether a challenger is better than the recipe beyond the noise between seeds."""
        return self.winner != self.recipe.number


def judge(
    values: Mapping[int, Sequence[float]], recipe: int, seeds: Sequence[int], *, is_maximised: bool = True
) -> Verdict:
    """Compares every challenger with the recipe.

    The values form a randomised complete block design, with seeds as the blocks: what is left of a value after its
    configuration's mean and its seed's mean are taken away is noise, whose variance is pooled over all configurations,
    with (k - 1)(n - 1) degrees of freedom for k configurations and n seeds (Montgomery, Design and Analysis of
    Experiments, section 4.1). The intervals are Student's with Bonferroni's correction, so that all of them hold
    together, and the best of several challengers is not declared by luck. A value that is not finite is a run that
    failed: a challenger with one is left out of the pool and cannot win, and a recipe with one loses to the best
    challenger without.

    Args:
        values: For each trial the objective on each seed; the recipe's among them.
        recipe: The recipe's trial.
        seeds: The seeds, two or more.
        is_maximised: Whether more is better.

    Raises:
        ValueError: For fewer than two seeds, or values that do not belong to them.
    """
    if len(seeds) < 2 or any(len(row) != len(seeds) for row in values.values()):
        raise ValueError(f"every trial needs one value for each of two or more seeds, not {dict(values)}")
    sign = 1.0 if is_maximised else -1.0
    rows = {number: sign * np.asarray(row, float) for number, row in values.items()}
    means = {number: float(row.mean()) if np.isfinite(row).all() else -math.inf for number, row in rows.items()}
    pool = [number for number, mean in means.items() if number == recipe or mean > -math.inf]
    half = math.inf
    if len(pool) > 1 and means[recipe] > -math.inf:
        table = np.stack([rows[number] for number in pool])
        residual = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean()
        freedom = (len(pool) - 1) * (len(seeds) - 1)
        quantile = float(stats.t.ppf(1 - (1 - CONFIDENCE) / 2 / (len(pool) - 1), freedom))
        half = quantile * math.sqrt(2 * float((residual**2).sum()) / freedom / len(seeds))

    def contender(number: int) -> Contender:
        mean, has_failed = means[number], means[number] == -math.inf
        difference = 0.0 if number == recipe else -math.inf if has_failed else mean - means[recipe]
        margin = 0.0 if number == recipe or math.isinf(difference) else half
        ends = difference - margin, difference + margin
        sd = math.nan if has_failed else float(rows[number].std(ddof=1))
        return Contender(number, tuple(map(float, values[number])), sign * mean, sd, difference, *ends)

    challengers = (contender(number) for number in values if number != recipe)
    ranked = sorted(challengers, key=lambda one: (-sign * one.mean, one.number))
    winner = next((one.number for one in ranked if one.number in pool and one.low > 0), recipe)
    return Verdict(contender(recipe), tuple(ranked), winner, tuple(seeds))
