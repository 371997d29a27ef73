"""The GPU path on pretended GPUs: nothing in a step waits, nothing lies on two devices, losses are the CPU's."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from matchai import TrainConfig, run
from matchai.prediction.inference import Predictor
from matchai.runs import trainer
from matchai.runs.trainer import RunResult
from matchai.settings.config import PRESETS
from matchai.system import machine
from matchai.system.console import Display
from matchai.training import loop
from tests.pretended_gpu import Waits, pretended_gpu

QUIET = Display(is_main_process=False)
SMALL = {"image_size": 32, "epochs": 1, "batch_size": 4, "num_workers": 0, "mixed_precision": "no"}


def trained(phantom: Path, cache: Path, output: Path, **settings: Any) -> RunResult:
    config = TrainConfig().updated(
        **{**PRESETS["study"], **SMALL, "data": phantom, "cache": cache, "output": output, **settings}
    )
    return run(config, display=QUIET, draw_every=float("inf"))


@pytest.fixture
def steps() -> Iterator[list[dict[str, int]]]:
    """What each step would have waited for, of the runs of a test on a pretended GPU."""
    found: list[dict[str, int]] = []
    train_step = loop.train_step

    def watched(*args: Any, **kwargs: Any) -> Any:
        before = Waits(WAITS[-1])
        outcome = train_step(*args, **kwargs)
        found.append(dict(Waits(WAITS[-1]) - before))
        return outcome

    with mock.patch.object(loop, "train_step", watched):
        yield found


WAITS: list[Waits] = []


@pytest.fixture
def gpu() -> Iterator[Waits]:
    with pretended_gpu() as waits:
        WAITS.append(waits)
        yield waits
        WAITS.pop()


KINDS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"mixed_precision": "bf16"},
    "fp16": {"mixed_precision": "fp16"},
    "average": {"ema_decay": 0.9, "mixed_precision": "bf16"},
    "accumulate and clip": {"accumulate": 2, "clip_grad_norm": 1.0, "mixed_precision": "bf16"},
    "context and soft boundary": {"context": 1, "soft_boundary": 2},
    "drop path": {"encoder": "timm-efficientnet-b0", "mixed_precision": "bf16"},
    "dropout": {"encoder": "tu-mobilevitv2_050", "image_size": 64},
    "repeatable": {"deterministic": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_waits_for_the_gpu(
    phantom: Path, cache: Path, tmp_path: Path, gpu: Waits, steps: list[dict[str, int]], kind: str
) -> None:
    result = trained(phantom, cache, tmp_path / "run", **KINDS[kind])
    assert result.is_finished
    assert len(steps) > 2
    assert steps == [{}] * len(steps)


def test_a_read_in_a_step_would_be_seen(
    phantom: Path, cache: Path, tmp_path: Path, gpu: Waits, steps: list[dict[str, int]]
) -> None:
    update = loop._update

    def reads(training: Any, is_finite: Any, kept: Any) -> None:
        is_finite.item()
        update(training, is_finite, kept)

    with mock.patch.object(loop, "_update", reads):
        trained(phantom, cache, tmp_path / "run")
    assert all(step == {"_local_scalar_dense": 1} for step in steps)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "drop path"])
def test_the_first_loss_is_the_cpus_to_rounding(phantom: Path, cache: Path, tmp_path: Path, kind: str) -> None:
    """Later ones drift, as AdamW's first steps take the signs of gradients that are nearly 0."""
    # in half precision batch norms of four values round by per cents
    settings = KINDS[kind] | ({} if kind == "bf16" else {"mixed_precision": "no"})

    def first_loss(output: Path) -> float:
        losses: list[float] = []
        train_step = loop.train_step

        def watched(*args: Any, **kwargs: Any) -> Any:
            outcome = train_step(*args, **kwargs)
            losses.append(outcome.read()[0])
            return outcome

        with mock.patch.object(loop, "train_step", watched):
            trained(phantom, cache, output, **settings)
        return losses[0]

    on_cpu = first_loss(tmp_path / "cpu")
    with pretended_gpu():
        on_gpu = first_loss(tmp_path / "gpu")
    tolerance = 3e-3 if kind == "bf16" else 1e-5
    assert on_gpu == pytest.approx(on_cpu, rel=tolerance)


def test_a_validation_waits_once_for_its_loss_and_once_for_its_counts(
    phantom: Path, cache: Path, tmp_path: Path, gpu: Waits
) -> None:
    found = []
    validate = loop.validate

    def watched(*args: Any, **kwargs: Any) -> Any:
        before = Waits(gpu)
        result = validate(*args, **kwargs)
        found.append(dict(Waits(gpu) - before))
        return result

    with mock.patch.object(trainer, "validate", watched):
        trained(phantom, cache, tmp_path / "run", val_fraction=0.5, batch_size=2)
    assert found == [{"_local_scalar_dense": 1, "cpu": 1}]


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_a_stopped_run_resumes_to_the_same_losses(phantom: Path, cache: Path, tmp_path: Path, precision: str) -> None:
    with pretended_gpu():
        whole = trained(phantom, cache, tmp_path / "whole", mixed_precision=precision).history[-1]

        def stop(step: int, _: int) -> None:
            if step == 2:
                raise InterruptedError

        config = TrainConfig().updated(
            **{**PRESETS["study"], **SMALL, "data": phantom, "cache": cache, "output": tmp_path / "parts"},
            save_every="1",
        )
        with pytest.raises(InterruptedError):
            run(config.updated(mixed_precision=precision), display=QUIET, on_step=stop)
        parts = run(config.updated(mixed_precision=precision), display=QUIET).history[-1]
    assert (parts["train_loss"], parts["val_loss"]) == (whole["train_loss"], whole["val_loss"])


def test_a_step_that_is_not_finite_leaves_weights_and_statistics(
    phantom: Path, cache: Path, tmp_path: Path, gpu: Waits
) -> None:
    kept: list[Any] = []
    train_step = loop.train_step

    def spoiled(training: Any, epoch: int, num_draws: int, images: Any, *rest: Any) -> Any:
        state = {name: value.clone() for name, value in training.raw_model.state_dict().items()}
        if training.step == 1:
            images = images.clone()
            images[0, 0, 0, 0] = float("nan")
        outcome = train_step(training, epoch, num_draws, images, *rest)
        after = training.raw_model.state_dict()
        kept.append(all(torch.equal(state[name].cpu(), after[name].cpu()) for name in state))
        return outcome

    with mock.patch.object(loop, "train_step", spoiled):
        row = trained(phantom, cache, tmp_path / "run").history[-1]
    assert row["skipped_steps"] == 1
    assert kept[:3] == [False, True, False]


def test_prediction_on_a_gpu_is_the_cpus(phantom: Path, cache: Path, tmp_path: Path) -> None:
    trained(phantom, cache, tmp_path / "run")
    images = np.load(phantom / "images_medseg.npy")[:5, ..., 0].astype(np.float32)
    on_cpu = dict(Predictor([tmp_path / "run"], mixed_precision="no").probabilities(images.__getitem__, 5))
    with pretended_gpu():
        predictor = Predictor([tmp_path / "run"], mixed_precision="no")
        assert predictor.device.type == "cuda"
        on_gpu = dict(predictor.probabilities(images.__getitem__, 5))
    for index, probabilities in on_cpu.items():
        np.testing.assert_allclose(on_gpu[index], probabilities, atol=1e-5)


@pytest.mark.parametrize("is_repeatable", [False, True])
def test_the_choice_of_kernels_is_undone_after_a_run(
    phantom: Path, cache: Path, tmp_path: Path, gpu: Waits, is_repeatable: bool
) -> None:
    seen = []

    def look(_step: int, _total: int) -> None:
        seen.append((torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()))

    config = TrainConfig().updated(
        **{**PRESETS["study"], **SMALL, "data": phantom, "cache": cache, "output": tmp_path / "run"}
    )
    run(config.updated(deterministic=is_repeatable), display=QUIET, on_step=look)
    assert set(seen) == {(not is_repeatable, is_repeatable)}
    assert not torch.backends.cudnn.benchmark
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("capability", "architectures", "is_told"),
    [
        ((7, 0), ["sm_75", "sm_80", "sm_90"], True),
        ((6, 0), ["sm_75", "sm_80", "sm_90", "compute_90"], True),
        ((8, 6), ["sm_75", "sm_80", "sm_90"], False),
        ((8, 0), ["sm_75", "sm_86"], True),
        ((12, 0), ["sm_90", "compute_90"], False),
        ((9, 0), ["sm_90a"], False),
        ((7, 0), [], False),
    ],
)
def test_a_card_that_torch_has_no_code_for_is_told(
    capability: tuple[int, int], architectures: list[str], is_told: bool, gpu: Waits
) -> None:
    with (
        mock.patch.object(torch.cuda, "get_device_capability", return_value=capability),
        mock.patch.object(torch.cuda, "get_arch_list", return_value=architectures),
    ):
        told = machine.unsupported_gpu(0)
    assert (told is not None) == is_told
    if told:
        assert "Pretended GPU" in told
        assert "ACCELERATE_USE_CPU=1" in told


def trained_on(num_processes: int, **settings: Any) -> dict[str, Any]:
    """What the main one of several processes came to, each on a pretended GPU of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes), "LOCAL_RANK": "0"}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    alone = num_processes == 1
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.gpu_process", json.dumps(settings)],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | ({} if alone else group | {"RANK": str(rank)}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_processes)
    ]
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * num_processes, said
    result: dict[str, Any] = json.loads(said[0][0].splitlines()[-1])
    return result


@pytest.mark.parametrize("precision", [pytest.param("no", marks=pytest.mark.slow), "bf16"])
def test_two_gpus_of_which_one_has_no_slice_train_as_one_does_and_wait_for_nothing(
    phantom: Path, cache: Path, tmp_path: Path, precision: str
) -> None:
    """Of 24 slices in batches of 23 the last has one: torch's own norm sends two types then, and hangs."""
    settings = {"image_size": 64, "epochs": 1, "batch_size": 23, "num_workers": 0, "mixed_precision": precision}
    places = {"data": str(phantom), "cache": str(cache)}
    one = trained_on(1, **settings, **places, output=str(tmp_path / "one"), ema_decay=0.9)
    two = trained_on(2, **settings, **places, output=str(tmp_path / "two"), ema_decay=0.9)
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=2e-2 if precision == "bf16" else 1e-4)
    assert two["waits"] == {}
