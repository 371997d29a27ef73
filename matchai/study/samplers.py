"""The search of a study: which settings a trial gets, and when a trial is given up.

A proposal is a pure function of (seed, trial number, finished and running trials): its search sampler is made again for
each trial and seeded by its number among the study's own trials, so a restarted study continues as if it had not
stopped, and no two workers draw alike. A pruner's verdict is a pure function of the trial's values and of the finished
trials.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from matchai.system import seed_sequence

STARTUP = 10  # finished trials, the recipe's among them, that a model wants to see
ATTEMPTS = 3  # proposals of a model before chance takes over; in a small space a model likes to repeat its best trial
DRAWS = 1000  # points drawn by chance before a proposal may repeat a row: a grid of 100 misses its last point never
COMPARED = 5  # finished trials that a verdict wants to see
WORSE_PART = 0.6  # of the trials; 0.5 costs 1 % more epochs
FALLEN_BEHIND = 0.3  # of the range between the best and the worst trial; the best three recorded stay within 0.04
COLLAPSED = 0.5  # of the range of all values; one-cycle curves were seen to rise again from 0.14 for 3 epochs
COLLAPSED_FOR = 0.1  # of the epochs, and 3 at least
_STREAM = 0x5EA7  # keeps the search's random words apart from those of the sampler, of augmentation and of drop path
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


def _tpe(seed: int) -> BaseSampler:
    return TPESampler(seed=seed, n_startup_trials=0, n_ei_candidates=24, multivariate=True, constant_liar=True)


class _OneThreadedGP(GPSampler):
    """Whose proposals have the same last bits whatever torch's threads; from 150 trials on those differ else."""

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        import torch  # noqa: PLC0415 seconds that the other models do not need

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return super().sample_relative(study, trial, search_space)
        finally:
            torch.set_num_threads(threads)


def _gp(seed: int) -> BaseSampler:
    return _OneThreadedGP(seed=seed, n_startup_trials=0, deterministic_objective=False)


# trial `number` is proposed by model number % len
_MODELS: dict[str, tuple[Callable[[int], BaseSampler], ...]] = {"gp-tpe": (_tpe, _gp), "tpe": (_tpe,), "random": ()}
SEARCH_SAMPLERS = tuple(_MODELS)
PRUNERS = ("one-cycle", "median", "none")


def propose(name: str, seed: int, study: Study, number: int, space: dict[str, BaseDistribution]) -> dict[str, Any]:
    """The settings of a trial whose row does not exist yet: all at once, and none that another row has.

    The study is only read. The global random states and torch's number of threads are left as they are.

    Args:
        name: One of `SEARCH_SAMPLERS`. "tpe" is the multivariate tree-structured Parzen estimator; "gp-tpe" leaves
            every other trial to a Gaussian process with expected improvement, which models a smooth hill with fewer
            trials, while the estimator bears noise and cliffs better; "random" is uniform. Until `STARTUP` trials
            have finished, all are uniform.
        seed: Of the study, not negative.
        study: With one objective. Of its rows of this space, those finished and running are learnt from; no settings of
            any, failed ones among them, are proposed again.
        number: Of the trial, among those of the study that count.
        space: What is searched, by setting; of any of Optuna's distributions.

    Returns:
        A value for every setting of the space, in the space's order. It repeats a row only where `DRAWS` draws found
        nothing new, as in a space with fewer points than the study has trials.

    Raises:
        ValueError: If there is no such search sampler.
    """
    if name not in _MODELS:
        raise ValueError(f"search sampler {name!r} is none of {', '.join(SEARCH_SAMPLERS)}.")
    rows = [row for row in study.get_trials(deepcopy=False) if row.distributions == space]
    taken = {_point(row.params, space) for row in rows}
    # sorted, so that the order of a file does not decide which setting gets which random word
    free = {setting: space[setting] for setting in sorted(space) if not space[setting].single()}
    fixed = {setting: _only_value(space[setting]) for setting in space if space[setting].single()}
    models = _MODELS[name]

    def draws() -> Iterator[dict[str, Any]]:
        known = [row for row in rows if row.state in FINISHED]
        running = [row for row in rows if row.state == TrialState.RUNNING]
        if models and free and len(known) >= STARTUP:
            model = models[number % len(models)]
            for attempt in range(ATTEMPTS):
                copy, trial = _copy(known, running, study.direction, free)
                yield model(_seed(seed, number, attempt)).sample_relative(copy, trial, free)
        chance = RandomSampler(seed=_seed(seed, number, ATTEMPTS))
        copy, trial = _copy([], [], study.direction, free)
        for _ in range(DRAWS):
            yield {key: chance.sample_independent(copy, trial, key, value) for key, value in free.items()}

    proposal: dict[str, Any] = {}
    with _quiet():
        for drawn in draws():
            proposal = {setting: (fixed | drawn)[setting] for setting in space}
            if _point(proposal, space) not in taken:
                break
    return proposal


def _seed(seed: int, number: int, attempt: int) -> int:
    return int(seed_sequence(_STREAM, seed, number, attempt).generate_state(1)[0])


def _only_value(distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[0]
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return distribution.low


def _point(params: dict[str, Any], space: dict[str, BaseDistribution]) -> tuple[float, ...]:
    """What two rows with the same settings share; steps are counted, as 0.1 + 0.2 is not 0.3."""
    point = []
    for setting, distribution in space.items():
        value = distribution.to_internal_repr(params[setting])
        if isinstance(distribution, FloatDistribution) and distribution.step is not None:
            value = round((value - distribution.low) / distribution.step)
        point.append(value)
    return tuple(point)


def _copy(
    known: list[FrozenTrial], running: list[FrozenTrial], direction: StudyDirection, space: dict[str, BaseDistribution]
) -> tuple[Study, FrozenTrial]:
    """A study in memory that holds what a model is to learn from, and the trial that asks.

    A model writes notes into its study, which here never reach the store.
    """
    copy = optuna.create_study(direction="maximize")
    for row, value in zip(known, _values(known, direction), strict=True):
        copy.add_trial(create_trial(value=value, params=_of(row, space), distributions=space))
    for row in running:
        copy.add_trial(create_trial(state=TrialState.RUNNING, params=_of(row, space), distributions=space))
    copy.add_trial(create_trial(state=TrialState.RUNNING))
    return copy, copy.get_trials(deepcopy=False)[-1]


def _of(row: FrozenTrial, space: dict[str, BaseDistribution]) -> dict[str, Any]:
    return {setting: row.params[setting] for setting in space}


def _values(rows: list[FrozenTrial], direction: StudyDirection) -> list[float]:
    """The values of finished trials as a model sees them: higher is better.

    A pruned trial counts with its best epoch, one that failed for its settings (attribute `reason`) as the worst.
    Below the median, distances shrink to logarithms: a few bad trials would stretch a Gaussian process's scale so far
    that it could not tell the good ones apart. The order stays, so nothing changes for an estimator of ranks.
    """
    sign = _sign(direction)
    found = np.array([-np.inf if row.user_attrs.get("reason") else _outcome(row, sign) for row in rows])
    is_known = np.isfinite(found)
    if not is_known.any():
        return [0.0] * len(rows)
    values = np.where(is_known, found, found[is_known].min())
    middle = np.median(values)
    # where most are equally good, by the distance of the others
    scale = (values.max() - middle) or (middle - values.min()) or 1.0
    below = np.maximum(middle - values, 0)
    return [float(value) for value in np.maximum(values, middle) - scale * np.log1p(below / scale)]


def _outcome(row: FrozenTrial, sign: float) -> float:
    if row.state == TrialState.COMPLETE and row.value is not None:
        return sign * row.value
    return _best(_curve(row, sign))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what Optuna says of studies in memory and of its speed, none of which the user can act on."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def make_pruner(name: str, epochs: int) -> BasePruner:
    """What gives trials up before their last epoch; the recipe's trial never.

    Steps are epochs, counted from 1.

    Args:
        name: One of `PRUNERS`. "one-cycle" is `OneCyclePruner`; "median" is Optuna's, from half-time on: it saves more
            epochs and now and then a winner; "none" prunes nothing.
        epochs: Of every trial.

    Raises:
        ValueError: If there is no such pruner, or there are no epochs.
    """
    if epochs < 1:
        raise ValueError(f"a trial of {epochs} epochs cannot be pruned; it must have 1 at least.")
    if name not in PRUNERS:
        raise ValueError(f"pruner {name!r} is none of {', '.join(PRUNERS)}.")
    if name == "none":
        return NopPruner()
    median = MedianPruner(COMPARED, half_time(epochs))
    return _SparingPruner(median if name == "median" else OneCyclePruner(epochs), epochs)


def half_time(epochs: int) -> int:
    """The first epoch after which at least half of them are done."""
    return -(-epochs // 2)


@dataclass
class _SparingPruner(BasePruner):
    """Another pruner, but never for the recipe, against which all is measured, nor after the last epoch."""

    pruner: BasePruner
    epochs: int

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        is_recipe = trial.number == 0 or bool(trial.user_attrs.get("is_recipe"))
        is_over = trial.last_step is None or trial.last_step >= self.epochs
        return not is_recipe and not is_over and self.pruner.prune(study, trial)


class OneCyclePruner(BasePruner):
    """Gives up what has fallen far behind once a one-cycle schedule is half over; before that, only what collapsed.

    Around the peak of the learning rate the curves of good settings cross, so a rank there tells nothing. From
    half-time on a trial has fallen behind if its best epoch so far puts it into the `WORSE_PART` of the trials that
    finished or were pruned, and below the best of them by more than `FALLEN_BEHIND` of the range from their worst to
    their best, each by its best epoch until then. Pruned trials count with what they had: among survivors alone, the
    bar would rise from trial to trial until it met the best. The share of the range spares what noise could put in
    any order.

    At any epoch a trial has collapsed if, in a tenth of its epochs on end and 3 at least, it lay below its own best by
    more than `COLLAPSED` of the range of all values of those trials, and below all of theirs at the same epoch; or if
    it reported nothing finite for so long.

    Args:
        epochs: Of every trial.
    """

    def __init__(self, epochs: int) -> None:
        self.half_time = half_time(epochs)
        self.collapse = max(3, math.ceil(COLLAPSED_FOR * epochs))

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether to give a trial up after its last reported epoch."""
        step = trial.last_step
        if step is None:
            return False
        sign = _sign(study.direction)
        others = study.get_trials(deepcopy=False, states=FINISHED)
        curves = [_curve(other, sign) for other in others if other.number != trial.number]
        own = _curve(trial, sign)
        last = sorted(trial.intermediate_values)[-self.collapse :]
        if len(last) == self.collapse and _has_collapsed(own, last, curves):
            return True
        return step >= self.half_time and _has_fallen_behind(own, step, curves)


def _has_fallen_behind(own: dict[int, float], step: int, curves: list[dict[int, float]]) -> bool:
    bests = [_best(curve, step) for curve in curves if min(curve, default=step + 1) <= step]
    if len(bests) < COMPARED:
        return False
    bar = max(bests) - FALLEN_BEHIND * (max(bests) - min(bests))
    return _best(own, step) < min(bar, float(np.quantile(bests, WORSE_PART)))


def _has_collapsed(own: dict[int, float], steps: list[int], curves: list[dict[int, float]]) -> bool:
    last = {step: own.get(step, -np.inf) for step in steps}
    if not any(step in own for step in steps):
        return True
    falls = [_best(own, step) - value for step, value in last.items()]
    if min(falls) <= 0:
        return False
    values = [value for curve in curves for value in curve.values()]
    peers = {step: [curve[step] for curve in curves if step in curve] for step in steps}
    return (
        min(len(found) for found in peers.values()) >= COMPARED
        and min(falls) > COLLAPSED * (max(values) - min(values))
        and all(value < min(peers[step]) for step, value in last.items())
    )


def _curve(trial: FrozenTrial, sign: float) -> dict[int, float]:
    """A trial's finite values by epoch, higher being better."""
    return {step: sign * value for step, value in trial.intermediate_values.items() if math.isfinite(value)}


def _best(curve: dict[int, float], step: float = np.inf) -> float:
    """The best value until an epoch, -inf if there is none."""
    return max((value for epoch, value in curve.items() if epoch <= step), default=-np.inf)


def _sign(direction: StudyDirection) -> float:
    return -1.0 if direction == StudyDirection.MINIMIZE else 1.0
