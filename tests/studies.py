"""Studies made up for the tests, with curves and attributes as a real one has them."""

import math
import warnings
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

SPACE: dict[str, BaseDistribution] = {
    "loss_mix_1": FloatDistribution(0, 1),
    "loss_mix_2": FloatDistribution(0, 1),
    "focal_gamma": FloatDistribution(0, 5),
    "sampler_weight": FloatDistribution(1, 10, log=True),
    "max_lr": FloatDistribution(5e-5, 5e-3, log=True),
}
RECIPE = {"loss_mix_1": 0.25, "loss_mix_2": 0.5, "focal_gamma": 2.5, "sampler_weight": 3.0, "max_lr": 5e-4}
EPOCHS = 8


def make_trial(
    number: int, value: float | None, state: TrialState = TrialState.COMPLETE, **attributes: Any
) -> FrozenTrial:
    """A row with settings drawn from its number, the recipe's for 0, and a curve that climbs to its value."""
    generator = np.random.default_rng(number)
    low, high = np.log([5e-5, 5e-3])
    params = {
        "loss_mix_1": float(generator.random()),
        "loss_mix_2": float(generator.random()),
        "focal_gamma": float(generator.uniform(0, 5)),
        "sampler_weight": float(np.exp(generator.uniform(0, np.log(10)))),
        "max_lr": float(np.exp(generator.uniform(low, high))),
    }
    if number == 0:
        params = dict(RECIPE)
        attributes = {"is_recipe": True} | attributes
    dice = 1 - math.sqrt(params["loss_mix_1"])
    ce = (1 - dice) * params["loss_mix_2"]
    shares = {"ce_weight": ce, "dice_weight": dice, "focal_weight": 1 - dice - ce}
    top = value if value is not None and math.isfinite(value) else 0.5
    curve = {epoch: top * epoch / EPOCHS for epoch in range(1, EPOCHS + 1)}
    return create_trial(
        state=state,
        value=value,
        params=params,
        distributions=SPACE,
        user_attrs=shares | {"best_epoch": EPOCHS, "seconds": 60.0} | attributes,
        intermediate_values=curve,
    )


def make_study(*trials: FrozenTrial, direction: str = "maximize", storage: str | None = None) -> optuna.Study:
    """A study of these rows, in memory unless it is given a storage."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    way = optuna.study.StudyDirection[direction.upper()]
    study = optuna.create_study(direction=way, storage=storage, study_name="made up")
    study.set_user_attr("matchai", {"space": {"max_lr": [5e-5, 5e-3]}, "epochs": EPOCHS, "seed": 7, "preset": "study"})
    study.add_trials(trials)
    return study


def make_free_trial(value: float, params: dict[str, Any], space: dict[str, BaseDistribution]) -> FrozenTrial:
    """A complete row of another space; Optuna warns of choices that are lists."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return create_trial(value=value, params=params, distributions=space)
