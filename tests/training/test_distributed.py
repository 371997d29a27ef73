"""One step on several gloo processes against the same step on one: same loss, same gradient, same statistics."""

from pathlib import Path
from typing import Any

import pytest
import torch

from matchai.data.dataset import Data
from matchai.metrics.confusion import dice_per_class
from tests.steps import model_of, read_small, run_in_processes, step, validation

RECIPE = "timm-efficientnet-b3"
SMALLEST = "tu-test_efficientnet"  # a UNet++ all the same, in a tenth of the time
CASES: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "3+3": {"model": SMALLEST},
        "4+2": {"model": SMALLEST, "split": [4, 2]},
        "5+1": {"model": SMALLEST, "split": [5, 1]},
        "6+0": {"model": SMALLEST, "split": [6, 0]},
        "recipe": {"model": RECIPE, "batch_size": 5},
        "dropout": {"model": "normed", "split": [5, 1]},
        "micro-batches": {"model": SMALLEST, "batch_size": 7, "accumulate": 3},
        "more micro-batches than slices": {"model": "normed", "batch_size": 25, "accumulate": 25},
        "tiny micro-batches": {"model": "tiny", "accumulate": 6},
        "own batch norm": {"model": "normed", "sync_batch_norm": False},
        "own batch norm, an empty share": {"model": SMALLEST, "sync_batch_norm": False, "split": [6, 0]},
        "own batch norm, an empty micro-batch": {
            "model": SMALLEST,
            "sync_batch_norm": False,
            "batch_size": 3,
            "accumulate": 3,
        },
        "context": {"model": SMALLEST, "context": 2},
        "soft boundary": {"model": SMALLEST, "soft_boundary": 2, "batch_size": 7, "accumulate": 2},
        "NaN": {"model": "normed", "poison": True},
        "validation": {"batch_size": 5},
        "deterministic": {"model": "normed", "deterministic": True},
        "deterministic with context": {"model": "normed", "deterministic": True, "context": 1, "soft_boundary": 2},
        "deterministic recipe": {"model": RECIPE, "deterministic": True, "batch_size": 5},
    },
    3: {
        "2+2+2": {"model": SMALLEST},
        "4+1+1": {"model": "normed", "split": [4, 1, 1]},
        "validation": {"batch_size": 3},
        "deterministic": {"model": "normed", "deterministic": True, "batch_size": 4},
        "deterministic with an empty share": {
            "model": "normed",
            "deterministic": True,
            "batch_size": 2,
            "split": [1, 1, 0],
        },
    },
}
EXACT = [(2, name) for name in ("3+3", "4+2", "5+1", "6+0", "recipe", "dropout", "micro-batches", "tiny micro-batches")]
EXACT += [(2, "more micro-batches than slices"), (2, "context"), (2, "soft boundary")]
EXACT += [(3, "2+2+2"), (3, "4+1+1")]


@pytest.fixture(scope="module")
def data(phantom: Path, cache: Path) -> Data:
    return read_small(phantom, cache)


@pytest.fixture(scope="module")
def together(
    data: Data, phantom: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, list[dict[str, dict[str, Any]]]]:
    """By number of processes, every process's results."""
    return {
        world: run_in_processes(world, cases, phantom, cache, tmp_path_factory.mktemp(f"{world}-processes"))
        for world, cases in CASES.items()
    }


def alone(world: int, name: str, data: Data) -> dict[str, Any]:
    case = dict(CASES[world][name])
    case.pop("split", None)
    return step(model_of(case.pop("model"), case.get("context", 0)), data, **case)


def relative_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    difference = torch.cat([(found[name] - value).flatten() for name, value in expected.items()])
    return float(difference.norm() / torch.cat([value.flatten() for value in expected.values()]).norm())


def floats(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if value.is_floating_point()}


@pytest.mark.parametrize(("world", "name"), EXACT)
def test_loss_gradient_and_statistics_are_those_of_one_process(
    world: int, name: str, together: dict[int, list[dict[str, dict[str, Any]]]], data: Data
) -> None:
    expected = alone(world, name, data)
    for results in together[world]:
        assert results[name]["loss"] == pytest.approx(expected["loss"], rel=1e-12)
        assert relative_error(results[name]["moments"], expected["moments"]) < 1e-10
        buffers = {key: value for key, value in floats(expected["state"]).items() if "running" in key}
        if buffers:
            assert relative_error(results[name]["state"], buffers) < 1e-12


@pytest.mark.parametrize("world", [2, 3])
def test_validation_counts_equal_predictions_alike_in_every_bit(
    world: int, together: dict[int, list[dict[str, dict[str, Any]]]], data: Data
) -> None:
    expected = validation(data, batch_size=6)
    dice = dice_per_class(expected["counts"].sum(0).numpy())
    for results in together[world]:
        assert torch.equal(results["validation"]["counts"], expected["counts"])
        assert (dice_per_class(results["validation"]["counts"].sum(0).numpy()) == dice).all()
        assert results["validation"]["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_without_synchronised_batch_norm_the_gradient_is_another(
    together: dict[int, list[dict[str, dict[str, Any]]]], data: Data
) -> None:
    expected = alone(2, "own batch norm", data)
    found = together[2][0]["own batch norm"]
    assert relative_error(found["moments"], expected["moments"]) > 1e-3


def test_without_synchronised_batch_norm_a_process_without_a_slice_adds_nothing(
    together: dict[int, list[dict[str, dict[str, Any]]]], data: Data
) -> None:
    name = "own batch norm, an empty share"
    expected = alone(2, name, data)
    for results in together[2]:
        assert results[name]["loss"] == pytest.approx(expected["loss"], rel=1e-12)
        assert relative_error(results[name]["moments"], expected["moments"]) < 1e-10


def test_without_a_slice_the_running_statistics_stay_as_they_were(
    together: dict[int, list[dict[str, dict[str, Any]]]],
) -> None:
    before = model_of(SMALLEST).state_dict()
    for name in ("own batch norm, an empty share", "own batch norm, an empty micro-batch"):
        found = together[2][1][name]
        assert found["is_done"]
        assert all(torch.equal(found["state"][key], before[key]) for key in before if "running" in key)


def test_a_nan_on_one_process_skips_the_step_on_all(together: dict[int, list[dict[str, dict[str, Any]]]]) -> None:
    before = model_of("normed").state_dict()
    for results in together[2]:
        assert not results["NaN"]["is_done"]
        for name, value in before.items():
            assert torch.equal(results["NaN"]["state"][name], value), name


@pytest.mark.parametrize(
    ("world", "name"),
    [
        (2, "deterministic"),
        (2, "deterministic with context"),
        (2, "deterministic recipe"),
        (3, "deterministic"),
        (3, "deterministic with an empty share"),
    ],
)
def test_in_deterministic_mode_every_bit_is_that_of_one_process(
    world: int, name: str, together: dict[int, list[dict[str, dict[str, Any]]]], data: Data
) -> None:
    threads = torch.get_num_threads()
    try:
        expected = alone(world, name, data)
    finally:
        torch.set_num_threads(threads)
    for results in together[world]:
        assert results[name]["loss"] == expected["loss"]
        for key, value in expected["state"].items():
            assert torch.equal(results[name]["state"][key], value), key


def test_deterministic_mode_computes_the_ordinary_step(data: Data) -> None:
    threads = torch.get_num_threads()
    try:
        slice_by_slice = step(model_of(SMALLEST), data, deterministic=True)
    finally:
        torch.set_num_threads(threads)
    ordinary = step(model_of(SMALLEST), data)
    assert slice_by_slice["loss"] == pytest.approx(ordinary["loss"], rel=1e-12)
    assert relative_error(slice_by_slice["moments"], ordinary["moments"]) < 1e-10
