"""The sizes of a step: what no model takes, and what the one at hand does not take."""

from functools import cache

import pytest
import torch
from torch import nn

from matchai.model.unetplusplus import build_model
from matchai.settings.config import TrainConfig
from matchai.training.build import build_model_of, step_problems

CPU = torch.device("cpu")
ATTENTION, POOLED_NORM = "tu-pvt_v2_b0", "tu-resnest14d"
SMALL = TrainConfig().updated(image_size=64, encoder_weights="none")


@cache
def built(encoder: str) -> nn.Module:
    return build_model(encoder, 4, image_size=64)


@pytest.mark.parametrize(
    ("encoder", "batch_size", "num_processes"),
    [("tu-test_resnet", 3, 2), (ATTENTION, 4, 2), (ATTENTION, 3, 1), (POOLED_NORM, 4, 1)],
)
def test_sizes_that_the_model_takes_are_no_problem(encoder: str, batch_size: int, num_processes: int) -> None:
    config = SMALL.updated(encoder=encoder, batch_size=batch_size)
    assert step_problems(config, 16, num_processes, CPU, built(encoder)) == []


def test_a_process_without_a_slice_is_refused_where_the_encoder_takes_no_empty_batch() -> None:
    config = SMALL.updated(encoder=ATTENTION, batch_size=3)
    (problem,) = step_problems(config, 16, 2, CPU, built(ATTENTION))
    assert "one of 2 processes has no slice" in problem
    assert "--batch-size 2" in problem


@pytest.mark.parametrize(("batch_size", "num_processes", "synchronised"), [(5, 1, True), (4, 4, False)])
def test_a_slice_alone_is_refused_where_batch_norm_sees_one_value_of_it(
    batch_size: int, num_processes: int, synchronised: bool
) -> None:
    config = SMALL.updated(encoder=POOLED_NORM, batch_size=batch_size, sync_batch_norm=synchronised)
    (problem,) = step_problems(config, 16, num_processes, CPU, built(POOLED_NORM))
    assert "batch norm cannot take in the encoder tu-resnest14d" in problem
    assert "--batch-size" in problem


def test_without_a_model_one_pixel_of_one_slice_is_refused() -> None:
    (problem,) = step_problems(SMALL.updated(image_size=32, batch_size=1), 16, 1, CPU)
    assert "--image-size 64 or --batch-size 2" in problem


def test_a_wrong_size_of_slices_is_left_to_the_check_of_the_settings() -> None:
    config = SMALL.updated(encoder="tu-test_resnet", image_size=100)
    assert isinstance(build_model_of(config, is_resuming=False), nn.Module)
