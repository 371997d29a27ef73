"""Single training steps on small models, in this process or, run as a program, in one of several."""

import copy
import dataclasses
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from matchai.data.dataset import Data, read_data
from matchai.model.dropout import key_dropout
from matchai.model.unetplusplus import build_model
from matchai.runs.setup import make_accelerator
from matchai.settings.config import TrainConfig
from matchai.system.errors import Problems
from matchai.training.build import build_training
from matchai.training.loop import Training, train_step, validate

SMALL = TrainConfig().updated(image_size=64, batch_size=6, epochs=2, mixed_precision="no", max_lr=1e-2)


class TinyNet(nn.Module):
    """No batch norm, so that micro-batches do not differ by their statistics."""

    def __init__(self, in_channels: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(in_channels, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


class Thresholds(TinyNet):
    """Predicts by the pixel's value alone, so alike in every batch."""

    def forward(self, images: Tensor) -> Tensor:
        steps = torch.cat([images < -0.5, images < 0, images < 0.5, images >= 0.5], dim=1)
        nothing = torch.stack([0 * parameter.sum() for parameter in self.parameters()]).sum()  # DDP waits for all
        return steps.to(images.dtype) + nothing


class NormedNet(TinyNet):
    """With batch norm and both kinds of dropout."""

    def __init__(self, in_channels: int = 1) -> None:
        super().__init__(in_channels)
        self.layers.insert(1, nn.BatchNorm2d(8))
        self.layers.insert(3, nn.Dropout2d(0.2))
        self.layers.insert(4, nn.Dropout(0.1))
        key_dropout(self)


def model_of(name: str, context: int = 0) -> nn.Module:
    """`tiny`, `normed`, `thresholds`, or the UNet++ with an encoder of that name; float64."""
    torch.manual_seed(0)
    in_channels = 2 * context + 1
    small = {"tiny": TinyNet, "normed": NormedNet, "thresholds": Thresholds}
    model = small[name](in_channels) if name in small else build_model(name, 4, in_channels=in_channels)
    return model.double()


def read_small(folder: Path, cache: Path) -> Data:
    settings = dataclasses.replace(SMALL.input, image_size=64, val_fraction=0.25)
    return read_data(folder, cache, settings, seed=0)


def training_of(model: nn.Module, data: Data, **settings: Any) -> Training:
    """The parts of a training on CPU, in the running process group if there is one."""
    AcceleratorState._reset_state()
    config = SMALL.updated(**settings)
    if "WORLD_SIZE" in os.environ:
        accelerator = make_accelerator(config, Path("runs"), Problems())[0]
    else:
        accelerator = Accelerator(cpu=True, mixed_precision="no")
    return build_training(config, accelerator, data, model, lambda: False)


def first_batch(training: Training) -> Any:
    """This process's share of the first step: images, target, positions."""
    training.sampler.load_state_dict({"seed": 0, "epoch": 1, "consumed": 0})
    images, target, positions = next(iter(training.loader))
    return images, target, positions.tolist()


def step(
    model: nn.Module, data: Data, split: Sequence[int] = (), poison: bool = False, **settings: Any
) -> dict[str, Any]:
    """What a step comes to: loss, whether it was done, AdamW's first moments and batch norm's statistics.

    Args:
        model: Trained in float64; not changed.
        data: The slices.
        split: How many slices each process computes, where not those that the sampler deals.
        poison: Puts a NaN into the last slice of the last process.
        settings: As of a TrainConfig.
    """
    training = training_of(copy.deepcopy(model).double(), data, **settings)
    training.loss.double()
    images, target, positions = first_batch(training)
    rank, world = training.accelerator.process_index, training.accelerator.num_processes
    if split:
        training.sampler.num_processes, training.sampler.process_index = 1, 0
        images, target, positions = first_batch(training)
        end = list(itertools.accumulate(split))[rank]
        part = slice(end - split[rank], end)
        images, target, positions = images[part], target[part], positions[part]
    if poison and rank == world - 1:
        images[-1, 0, 3, 3] = torch.nan
    num_draws = min(training.sampler.batch_size, training.sampler.num_samples)
    loss, is_done, _ = train_step(training, 1, num_draws, images.double(), target, positions).read()
    raw = training.raw_model
    moments = {
        name: training.optimizer.state[parameter]["exp_avg"]
        for name, parameter in raw.named_parameters()
        if is_done and parameter.requires_grad
    }
    return {"loss": loss, "is_done": is_done, "moments": moments, "state": dict(raw.state_dict())}


def validation(data: Data, **settings: Any) -> dict[str, Any]:
    """What a validation of the `thresholds` comes to, in float32."""
    training = training_of(model_of("thresholds").float(), data, **settings)
    loss, counts = validate(training, len(data.val), 4, lambda is_stopping: None)
    return {"loss": loss, "counts": torch.from_numpy(counts)}


def run_in_processes(
    world: int, cases: dict[str, dict[str, Any]], folder: Path, cache: Path, output: Path, timeout: float = 200
) -> list[dict[str, dict[str, Any]]]:
    """Computes cases of `step`, or of `validation` without a model, on gloo processes; returns each one's results."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.save(cases, output / "cases.pt")
    group = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    group |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.steps", str(folder), str(cache), str(output)],
            env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        said = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(said)
    return [torch.load(output / f"results-{rank}.pt") for rank in range(world)]


def main() -> None:
    """Computes the cases in the folder `output` as one process of a group."""
    folder, cache, output = map(Path, sys.argv[1:])
    cases: dict[str, dict[str, Any]] = torch.load(output / "cases.pt")
    data = read_small(folder, cache)
    results = {}
    for name, case in cases.items():
        model = case.pop("model", None)
        results[name] = (
            step(model_of(model, case.get("context", 0)), data, **case) if model else validation(data, **case)
        )
    torch.save(results, output / f"results-{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
