"""The search: proposals that restarts and workers cannot change or repeat, and a pruner that keeps the winners."""

import itertools
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner, MedianPruner
from optuna.storages import RDBStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

from matchai.study.samplers import PRUNERS, SEARCH_SAMPLERS, STARTUP, half_time, make_pruner, propose
from tests.conftest import assert_global_randomness_is_untouched

ROOT = Path(__file__).parents[2]
CURVES = ROOT.parent / "shared/data/onecycle_curves.jsonl"
SPACE: dict[str, BaseDistribution] = {
    "loss_mix_1": FloatDistribution(0, 1),
    "focal_gamma": FloatDistribution(0, 5),
    "max_lr": FloatDistribution(5e-5, 5e-3, log=True),
}
SMALL: dict[str, BaseDistribution] = {
    "batch_size": IntDistribution(2, 4),
    "optimizer": CategoricalDistribution(["adamw", "sgd"]),
    "dropout": FloatDistribution(0.1, 0.3, step=0.1),
    "epochs": IntDistribution(7, 7),
}
MODELS = [name for name in SEARCH_SAMPLERS if name != "random"]
EVERY_SAMPLER = pytest.mark.parametrize("name", SEARCH_SAMPLERS)
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)
Direction = Literal["maximize", "minimize"]
COMPLETE, PRUNED, FAIL, RUNNING = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def score(params: dict[str, Any]) -> float:
    """Best at 0.3, 2 and 5e-4."""
    rate = math.log10(params["max_lr"] / 5e-4)
    loss = (params["loss_mix_1"] - 0.3) ** 2 + 0.02 * (params["focal_gamma"] - 2) ** 2 + 0.2 * rate**2
    return 0.9 - float(loss)


def add(
    study: Study, params: dict[str, Any], state: TrialState = COMPLETE, space: Any = None, **fields: Any
) -> dict[str, Any]:
    study.add_trial(create_trial(state=state, params=params, distributions=SPACE if space is None else space, **fields))
    return params


def studied(num_trials: int, seed: int = 3, name: str = "random", **options: Any) -> Study:
    """A study of finished trials, numbered from 0."""
    study = optuna.create_study(**({"direction": "maximize"} | options))
    for number in range(num_trials):
        params = propose(name, seed, study, number, SPACE)
        add(study, params, value=score(params))
    return study


def rows_of(study: Study) -> str:
    rows = [(row.number, row.state.name, row.params, row.value, row.system_attrs) for row in study.get_trials()]
    return json.dumps(rows)


@EVERY_SAMPLER
@pytest.mark.timeout(60)
def test_a_proposal_is_the_same_whenever_and_wherever_it_is_made(name: str) -> None:
    first, second = studied(STARTUP + 2), studied(STARTUP + 2)
    for study in (first, second):
        add(study, {"loss_mix_1": 0.5, "focal_gamma": 1.0, "max_lr": 1e-3}, state=RUNNING)
    proposal = propose(name, 0, first, STARTUP + 3, SPACE)
    propose(name, 1, second, STARTUP + 7, SPACE)
    assert propose(name, 0, second, STARTUP + 3, SPACE) == proposal


@EVERY_SAMPLER
@pytest.mark.parametrize("num_trials", [0, STARTUP + 2])
@pytest.mark.timeout(60)
def test_another_seed_or_number_makes_another_proposal(name: str, num_trials: int) -> None:
    study = studied(num_trials)
    made = [propose(name, seed, study, number, SPACE) for seed, number in [(0, 20), (1, 20), (0, 21), (1 << 32, 20)]]
    assert len({json.dumps(one) for one in made}) == 4


@EVERY_SAMPLER
@pytest.mark.timeout(60)
def test_the_order_of_the_space_decides_nothing(name: str) -> None:
    study = studied(STARTUP + 2)
    backwards = dict(reversed(SPACE.items()))
    assert propose(name, 0, study, 20, backwards) == propose(name, 0, study, 20, SPACE)
    assert list(propose(name, 0, study, 20, backwards)) == list(backwards)


@EVERY_SAMPLER
@pytest.mark.timeout(60)
def test_the_global_random_states_are_left_alone(name: str) -> None:
    study = studied(STARTUP + 2)
    add(study, {"loss_mix_1": 0.5, "focal_gamma": 1.0, "max_lr": 1e-3}, state=RUNNING)
    assert_global_randomness_is_untouched(lambda: propose(name, 0, study, STARTUP + 3, SPACE))


@EVERY_MODEL
@pytest.mark.timeout(60)
def test_torch_keeps_its_number_of_threads_and_decides_nothing_by_it(name: str) -> None:
    study, before, made = studied(STARTUP + 2), torch.get_num_threads(), []
    try:
        for threads in (2, 1):
            torch.set_num_threads(threads)
            made.append(propose(name, 0, study, STARTUP + 3, SPACE))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert made[0] == made[1]


@pytest.mark.timeout(60)
def test_the_tree_structured_estimator_imports_no_torch() -> None:
    script = f"""
import sys, optuna
from matchai.study.samplers import propose
space = {{"x": optuna.distributions.FloatDistribution(0, 1)}}
study = optuna.create_study()
for number in range({STARTUP + 2}):
    params = propose("tpe", 0, study, number, space)
    study.add_trial(optuna.trial.create_trial(params=params, distributions=space, value=params["x"]))
sys.exit("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@EVERY_MODEL
@pytest.mark.timeout(60)
def test_the_study_is_only_read(name: str) -> None:
    study = studied(STARTUP + 2)
    add(study, {"loss_mix_1": 0.5, "focal_gamma": 1.0, "max_lr": 1e-3}, state=RUNNING)
    before = rows_of(study)
    propose(name, 0, study, STARTUP + 3, SPACE)
    assert rows_of(study) == before


@EVERY_SAMPLER
@pytest.mark.timeout(60)
def test_optuna_says_as_much_after_a_proposal_as_before(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    study = studied(STARTUP + 2)
    optuna.logging.set_verbosity(optuna.logging.INFO)
    capfd.readouterr()
    propose(name, 0, study, STARTUP + 3, SPACE)
    assert capfd.readouterr().err == ""
    assert optuna.logging.get_verbosity() == optuna.logging.INFO


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a study of `STARTUP` finished trials."""
    path = tmp_path_factory.mktemp("store") / "study.db"
    study = optuna.create_study(storage=RDBStorage(f"sqlite:///{path}"), study_name="s", direction="maximize")
    study.add_trials(studied(STARTUP).get_trials())
    return path


def finish_study(path: Path, num_trials: int, is_killed: bool) -> str:
    """Brings a study to so many trials, one after the other; killed after each step, it begins anew with the next.

    A step reads the store, and then finishes the running row, or writes the next one.
    """
    study = optuna.load_study(storage=RDBStorage(f"sqlite:///{path}"), study_name="s")
    while True:
        rows = study.get_trials()
        if rows[-1].state == RUNNING:
            study.tell(rows[-1].number, score(rows[-1].params))
        elif len(rows) == num_trials:
            return rows_of(study)
        else:
            params = propose(MODELS[0], 5, study, len(rows), SPACE)
            if is_killed:
                assert propose(MODELS[0], 5, study, len(rows), SPACE) == params
            add(study, params, state=RUNNING)
        if is_killed:
            study = optuna.load_study(storage=RDBStorage(f"sqlite:///{path}"), study_name="s")


@pytest.mark.timeout(120)
def test_a_study_killed_after_every_step_ends_with_the_same_table(store: Path, tmp_path: Path) -> None:
    tables = []
    for is_killed in (False, True):
        path = Path(shutil.copy(store, tmp_path / f"{is_killed}.db"))
        tables.append(finish_study(path, STARTUP + 3, is_killed))
    assert tables[0] == tables[1]


@EVERY_SAMPLER
@pytest.mark.timeout(120)
def test_no_two_of_eight_workers_get_the_same_settings_whatever_the_restarts(name: str) -> None:
    generator = np.random.default_rng(1)
    study = optuna.create_study(direction="maximize")
    busy: list[int] = []
    while len(study.get_trials(deepcopy=False)) < 26:
        number = len(study.get_trials(deepcopy=False))
        event = generator.random()
        if len(busy) < 8 and event < 0.6:
            # a worker that dies with its proposal unwritten leaves the number to the next one
            propose(name, 0, study, number, SPACE)
            add(study, propose(name, 0, study, number, SPACE), state=RUNNING)
            busy.append(number)
        elif busy:
            done = busy.pop(int(generator.integers(len(busy))))
            study.tell(done, state=FAIL) if event > 0.9 else study.tell(done, score(study.trials[done].params))
    assert len({json.dumps(row.params) for row in study.get_trials()}) == 26


@EVERY_SAMPLER
@pytest.mark.timeout(120)
def test_a_small_space_is_used_up_before_anything_repeats(name: str) -> None:
    study = optuna.create_study(direction="maximize")
    points = list(itertools.product((2, 3, 4), ("adamw", "sgd"), (0.1, 0.2, 0.3)))
    for number in range(len(points) + 2):
        params = propose(name, 0, study, number, SMALL)
        json.dumps(params)
        state = FAIL if number % 5 == 4 else COMPLETE
        value = None if state == FAIL else params["batch_size"] + params["dropout"]
        add(study, params, state=state, space=SMALL, value=value)
    rows = [row.params for row in study.get_trials()]
    assert all(row["epochs"] == 7 for row in rows)
    drawn = [(row["batch_size"], row["optimizer"], round(row["dropout"], 6)) for row in rows]
    assert sorted(drawn[: len(points)]) == points
    assert set(drawn[len(points) :]) <= set(points)


@EVERY_SAMPLER
@pytest.mark.timeout(60)
def test_a_space_without_a_choice_has_one_point(name: str) -> None:
    study = optuna.create_study()
    space: dict[str, BaseDistribution] = {"a": IntDistribution(3, 3), "b": CategoricalDistribution(["x"])}
    for number in range(STARTUP + 2):
        assert add(study, propose(name, 0, study, number, space), space=space, value=0.0) == {"a": 3, "b": "x"}


DISTRIBUTIONS = st.one_of(
    st.tuples(st.floats(-5, 5), st.floats(0.1, 5)).map(lambda pair: FloatDistribution(pair[0], sum(pair))),
    st.tuples(st.floats(1e-6, 1), st.floats(2, 100)).map(lambda pair: FloatDistribution(*pair, log=True)),
    st.tuples(st.integers(-3, 3), st.integers(1, 4)).map(
        lambda pair: FloatDistribution(pair[0], pair[0] + 0.25 * pair[1], step=0.25)
    ),
    st.tuples(st.integers(1, 4), st.integers(0, 4)).map(lambda pair: IntDistribution(pair[0], sum(pair))),
    st.tuples(st.integers(1, 4), st.integers(1, 40)).map(lambda pair: IntDistribution(pair[0], sum(pair), log=True)),
    st.lists(st.sampled_from(["a", "b", 1, 2.5, None, True]), min_size=1, max_size=4, unique_by=repr).map(
        CategoricalDistribution
    ),
)


@EVERY_MODEL
@pytest.mark.timeout(120)
@settings(max_examples=8, deadline=None)
@given(space=st.dictionaries(st.sampled_from("abcd"), DISTRIBUTIONS, min_size=1), seed=st.integers(0, 1 << 40))
def test_a_proposal_lies_in_its_space_whatever_the_space(
    name: str, space: dict[str, BaseDistribution], seed: int
) -> None:
    study = optuna.create_study(direction="maximize")
    for number in range(STARTUP + 2):
        params = propose(name, seed, study, number, space)
        # Optuna refuses a row that lies outside of its distributions
        add(study, params, space=space, value=float(number % 3))
        assert json.loads(json.dumps(params)) == params


@EVERY_MODEL
@pytest.mark.timeout(60)
def test_a_minimised_objective_is_searched_like_its_negative_maximised(name: str) -> None:
    up, down = studied(STARTUP + 2), studied(0, direction="minimize")
    for row in up.get_trials():
        add(down, row.params, value=-score(row.params))
    assert propose(name, 0, down, STARTUP + 3, SPACE) == propose(name, 0, up, STARTUP + 3, SPACE)


@EVERY_MODEL
@pytest.mark.parametrize("direction", ["maximize", "minimize"])
@pytest.mark.timeout(60)
def test_settings_that_failed_count_as_the_worst_whatever_value_they_were_given(
    name: str, direction: Direction
) -> None:
    worst = -9.0 if direction == "maximize" else 9.0
    made = []
    for value, attributes in [(0.0, {"reason": "not finite"}), (worst, {"reason": "not finite"})]:
        study = studied(STARTUP, direction=direction)
        add(study, {"loss_mix_1": 0.5, "focal_gamma": 1.0, "max_lr": 4e-3}, value=value, user_attrs=attributes)
        made.append(propose(name, 0, study, STARTUP + 1, SPACE))
    assert made[0] == made[1]


@EVERY_MODEL
@pytest.mark.timeout(60)
def test_a_pruned_trial_teaches_its_best_epoch(name: str) -> None:
    params = {"loss_mix_1": 0.5, "focal_gamma": 1.0, "max_lr": 4e-3}
    pruned, complete = studied(STARTUP), studied(STARTUP)
    add(pruned, params, state=PRUNED, intermediate_values={1: 0.5, 2: 0.7, 3: math.nan, 4: 0.6})
    add(complete, params, value=0.7)
    assert propose(name, 0, pruned, STARTUP + 1, SPACE) == propose(name, 0, complete, STARTUP + 1, SPACE)


@EVERY_MODEL
@pytest.mark.timeout(60)
def test_trials_that_other_workers_run_change_the_proposal(name: str) -> None:
    alone, beside = studied(STARTUP + 2), studied(STARTUP + 2)
    add(beside, propose(name, 0, alone, STARTUP + 3, SPACE), state=RUNNING)
    assert propose(name, 0, beside, STARTUP + 3, SPACE) != propose(name, 0, alone, STARTUP + 3, SPACE)


@EVERY_MODEL
@pytest.mark.parametrize("values", [[0.5] * 12, [0.5] * 11 + [-1e3], [0.5, *[-1e30] * 11]])
@pytest.mark.filterwarnings("error")
@pytest.mark.timeout(60)
def test_a_study_of_equal_or_of_far_values_still_goes_on(name: str, values: list[float]) -> None:
    study = optuna.create_study(direction="maximize")
    for number, value in enumerate(values):
        add(study, propose(name, 0, study, number, SPACE), value=value)
    assert propose(name, 0, study, 13, SPACE).keys() == SPACE.keys()


@EVERY_MODEL
@pytest.mark.timeout(120)
def test_a_model_finds_better_settings_than_chance_does(name: str) -> None:
    lost = {
        one: [0.9 - studied(STARTUP + 8, seed=seed, name=one).best_value for seed in range(3)]
        for one in (name, "random")
    }
    assert sum(lost[name]) < 0.6 * sum(lost["random"])


@pytest.mark.parametrize(
    "call", [lambda: propose("cma", 0, optuna.create_study(), 0, SPACE), lambda: make_pruner("asha", 60)]
)
def test_an_unknown_name_is_answered_with_the_known_ones(call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"'(cma|asha)' is none of .*(tpe|one-cycle)"):
        call()


def crossing_curves(num_configs: int, seed: int, num_epochs: int = 60) -> NDArray[np.float64]:
    """One-cycle curves, (configurations, epochs): the better the end, the deeper the dip at the peak of the rate."""
    generator = np.random.default_rng(seed)
    time = np.linspace(0, 1, num_epochs)
    # a third is good and close together, as in real studies; the others trail off
    final = np.where(
        np.arange(num_configs) % 3 == 0,
        generator.uniform(0.85, 0.89, num_configs),
        generator.uniform(0.4, 0.8, num_configs),
    )
    dip = np.clip(final - 0.6, 0, None) * generator.uniform(0.3, 1.0, num_configs)
    rise = 1 - np.exp(-time[None] / generator.uniform(0.04, 0.1, num_configs)[:, None])
    peak = np.exp(-(((time - 0.3) / 0.09) ** 2))
    noise = generator.normal(0, 0.006, (num_configs, num_epochs))
    curves: NDArray[np.float64] = np.clip(final[:, None] * rise - dip[:, None] * peak + noise, 0, 1)
    return curves


def replay(pruner: BasePruner, curves: NDArray[np.float64], order: Sequence[int]) -> list[int]:
    """Epochs that each configuration was trained for, by configuration."""
    study = optuna.create_study(direction="maximize")
    trained = [0] * len(curves)
    for config in order:
        reported: dict[int, float] = {}
        row = running(study, reported, is_recipe=config == 0)
        is_pruned = False
        while len(reported) < curves.shape[1] and not is_pruned:
            reported[len(reported) + 1] = float(curves[config, len(reported)])
            row.intermediate_values = reported
            is_pruned = pruner.prune(study, row)
        trained[config] = len(reported)
        study.add_trial(finished(reported, state=PRUNED if is_pruned else COMPLETE))
    return trained


def running(study: Study, values: dict[int, float], is_recipe: bool = False) -> FrozenTrial:
    row = create_trial(state=RUNNING, intermediate_values=values, user_attrs={"is_recipe": True} if is_recipe else {})
    row.number = len(study.get_trials(deepcopy=False))
    return row


def finished(values: dict[int, float], state: TrialState = COMPLETE) -> FrozenTrial:
    return create_trial(state=state, value=max(values.values(), default=0.0), intermediate_values=values)


def pruned_at(pruner: BasePruner, study: Study, values: Sequence[float]) -> int | None:
    """The epoch after which a curve is given up."""
    for epoch in range(1, len(values) + 1):
        if pruner.prune(study, running(study, dict(enumerate(values[:epoch], 1)))):
            return epoch
    return None


def study_of(curves: NDArray[np.float64], direction: Direction = "maximize") -> Study:
    study = optuna.create_study(direction=direction)
    for curve in curves:
        study.add_trial(finished(dict(enumerate(curve.tolist(), 1))))
    return study


@pytest.mark.timeout(60)
def test_the_best_of_curves_that_cross_are_kept_where_optunas_default_loses_them() -> None:
    lost = {"one-cycle": 0, "default": 0}
    shares = []
    for seed in range(6):
        curves = crossing_curves(30, seed)
        best = np.argsort(-curves.max(axis=1))[:3]
        order = [int(config) for config in np.random.default_rng(seed).permutation(30)]
        for name, pruner in {"one-cycle": make_pruner("one-cycle", 60), "default": MedianPruner()}.items():
            trained = np.array(replay(pruner, curves, order))
            lost[name] += int((trained[best] < 60).sum())
            if name == "one-cycle":
                shares.append(trained.mean() / 60)
                assert trained.min() >= 30
    assert lost["one-cycle"] == 0
    assert lost["default"] > 0
    assert np.mean(shares) < 0.85


@pytest.mark.timeout(120)
def test_recorded_curves_cost_at_most_83_percent_of_their_epochs_and_keep_their_best_three() -> None:
    if not CURVES.exists():
        pytest.skip("the recorded curves are not here")
    rows = [json.loads(line) for line in CURVES.read_text(encoding="utf-8").splitlines()]
    curves = np.zeros((40, 2, 60))
    for row in rows:
        curves[row["config"], row["seed"]] = row["mean_dice"]
    best = np.argsort(-curves.max(axis=2).mean(axis=1))[:3]
    shares = []
    for number in range(12):
        order = [int(config) for config in np.random.default_rng(number).permutation(40)]
        for seed in range(2):
            trained = np.array(replay(make_pruner("one-cycle", 60), curves[:, seed], order))
            assert (trained[best] == 60).all()
            assert trained.min() >= 30
            shares.append(trained.mean() / 60)
    assert np.mean(shares) <= 0.83


def test_a_trial_that_collapses_is_given_up_before_half_time_and_one_that_dips_is_not() -> None:
    study = study_of(crossing_curves(8, 0))
    pruner = make_pruner("one-cycle", 60)
    healthy = crossing_curves(9, 1)[0]
    assert pruned_at(pruner, study, healthy[:29].tolist()) is None
    assert pruned_at(pruner, study, [*healthy[:10], *[0.02] * 19]) == 16
    assert pruned_at(pruner, study, [*healthy[:10], *[0.02] * 5, *healthy[15:29]]) is None
    assert pruned_at(pruner, study, [*healthy[:10], *[math.nan] * 19]) == 16


def test_a_trial_far_behind_is_given_up_at_half_time_and_a_close_one_never() -> None:
    good = np.linspace(0.3, 0.9, 60)
    study = study_of(np.stack([good - 0.05 * place for place in range(8)]))
    pruner = make_pruner("one-cycle", 60)
    assert pruned_at(pruner, study, (good - 0.3).tolist()) == 30
    assert pruned_at(pruner, study, (good - 0.08).tolist()) is None


def test_pruned_trials_keep_the_bar_from_rising() -> None:
    good, poor = np.linspace(0.3, 0.9, 60), np.linspace(0.1, 0.5, 60)
    survivors = study_of(np.stack([good - 0.01 * place for place in range(8)]))
    everyone = study_of(np.stack([good - 0.01 * place for place in range(8)]))
    for _ in range(8):
        everyone.add_trial(finished(dict(enumerate(poor[:30].tolist(), 1)), state=PRUNED))
    pruner, middling = make_pruner("one-cycle", 60), (good - 0.06).tolist()
    assert pruned_at(pruner, survivors, middling) == 30
    assert pruned_at(pruner, everyone, middling) is None


@pytest.mark.parametrize("name", [name for name in PRUNERS if name != "none"])
def test_the_recipe_is_never_given_up(name: str) -> None:
    study = study_of(crossing_curves(12, 0))
    hopeless = dict.fromkeys(range(1, 41), 0.01)
    pruner = make_pruner(name, 60)
    assert pruner.prune(study, running(study, hopeless))
    assert not pruner.prune(study, running(study, hopeless, is_recipe=True))
    first = running(study, hopeless)
    first.number = 0
    assert not pruner.prune(study, first)


def test_without_a_pruner_nothing_is_given_up() -> None:
    study = study_of(crossing_curves(12, 0))
    assert pruned_at(make_pruner("none", 60), study, [0.01] * 60) is None


ANY_CURVE = st.dictionaries(st.integers(1, 6), st.one_of(st.floats(-1e3, 1e3), st.sampled_from([math.nan, math.inf])))


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.timeout(60)
@settings(max_examples=60, deadline=None)
@given(
    epochs=st.integers(1, 6),
    own=ANY_CURVE,
    others=st.lists(ANY_CURVE, max_size=9),
    direction=st.sampled_from(["maximize", "minimize"]),
)
def test_every_curve_is_judged_and_none_after_its_last_epoch(
    name: str, epochs: int, own: dict[int, float], others: list[dict[int, float]], direction: Direction
) -> None:
    study = optuna.create_study(direction=direction)
    for number, other in enumerate(others):
        state = PRUNED if number % 3 == 2 else COMPLETE
        study.add_trial(create_trial(state=state, value=0.0, intermediate_values=other))
    own = {epoch: value for epoch, value in own.items() if epoch <= epochs}
    row = running(study, own)
    row.number = 99
    verdict = make_pruner(name, epochs).prune(study, row)
    assert verdict is False or 1 <= max(own) < epochs


@pytest.mark.timeout(60)
@settings(max_examples=60, deadline=None)
@given(own=ANY_CURVE, others=st.lists(ANY_CURVE, min_size=5, max_size=9), data=st.data())
def test_a_loss_is_judged_like_its_negative_and_in_any_order_of_its_reports(
    own: dict[int, float], others: list[dict[int, float]], data: st.DataObject
) -> None:
    verdicts = set()
    for sign in (1, -1):
        study = optuna.create_study(direction="maximize" if sign > 0 else "minimize")
        for other in others:
            values = {epoch: sign * value for epoch, value in other.items()}
            study.add_trial(create_trial(value=0.0, intermediate_values=values))
        for epochs in (list(own), data.draw(st.permutations(list(own)))):
            row = running(study, {epoch: sign * own[epoch] for epoch in epochs})
            verdicts.add(make_pruner("one-cycle", 8).prune(study, row))
    assert len(verdicts) == 1


@pytest.mark.parametrize(("epochs", "expected"), [(1, 1), (2, 1), (3, 2), (6, 3), (7, 4), (60, 30)])
def test_half_time_has_at_least_half_of_the_epochs_behind_it(epochs: int, expected: int) -> None:
    assert half_time(epochs) == expected


def test_a_trial_without_epochs_has_no_pruner() -> None:
    with pytest.raises(ValueError, match="0 epochs"):
        make_pruner("one-cycle", 0)


@pytest.mark.timeout(200)
def test_the_benchmark_of_the_study_tabulates_and_stores_regrets_and_replays(tmp_path: Path) -> None:
    curves = tmp_path / "curves.jsonl"
    rows = [
        {"config": config, "seed": 0, "mean_dice": curve.tolist()}
        for config, curve in enumerate(crossing_curves(12, 0, num_epochs=12))
    ]
    curves.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    flags = ["--regret", "--instances", "1", "--kinds", "plain", "--replay", str(curves), "--orders", "2"]
    done = subprocess.run(
        [sys.executable, "benchmarks/tune.py", *flags, "--output", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    regrets = json.loads((tmp_path / "tune_regret.json").read_text(encoding="utf-8"))["measurements"]
    names = {one["search"] for one in regrets}
    assert {"random", "Optuna 4.x default", "Optuna 5.0 default", *(f"matchai, {name}" for name in MODELS)} == names
    assert all(f"| plain | {name} |" in done.stdout for name in names)
    assert all(0 <= one["regret"][-1] <= 0.86 for one in regrets)
    replays = json.loads((tmp_path / "tune_replay.json").read_text(encoding="utf-8"))["measurements"]
    assert {one["pruner"]: one["share"] for one in replays if one["pruner"] == "none"} == {"none": 1.0}
    assert all(one["pruned"] == 0 or one["earliest"] >= 6 for one in replays)
