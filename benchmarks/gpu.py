"""What a GPU computes and how fast, in one command: `python benchmarks/gpu.py --output gpu.json` (below 8 minutes).

`--correct` compares with the CPU; `--speed` times steps of ways to train in turns, in one process. Without either flag
it does both. `--device cpu --quick` tries the script itself where there is no GPU.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from matchai import TrainConfig, run
from matchai.data import write_phantom
from matchai.model import build_model
from matchai.prediction import Predictor
from matchai.settings.config import PRESETS
from matchai.system import Display
from matchai.training import loop

CLASSES = 4
Step = Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is computed."""

    encoder: str
    image_size: int
    batch_size: int
    num_slices: int
    num_timed: int


FULL, QUICK = Size("timm-efficientnet-b3", 384, 6, 80, 20), Size("tu-test_resnet", 64, 4, 24, 2)


@contextlib.contextmanager
def on(device: str) -> Iterator[None]:
    """Accelerate takes the CPU, or the GPU where there is one."""
    from accelerate import PartialState  # noqa: PLC0415 after the arguments are known

    PartialState._reset_state()
    with mock.patch.dict("os.environ", {"ACCELERATE_USE_CPU": "1" if device == "cpu" else "0"}):
        yield
    PartialState._reset_state()


def losses_of(device: str, folder: Path, data: Path, size: Size, num_steps: int = 10, **settings: Any) -> list[float]:
    """The losses of a run's first steps."""
    found: list[float] = []
    train_step = loop.train_step

    def watched(*args: Any, **kwargs: Any) -> Any:
        outcome = train_step(*args, **kwargs)
        found.append(outcome.read()[0])
        if len(found) >= num_steps:
            raise InterruptedError
        return outcome

    small = {"image_size": 64, "encoder": "tu-test_resnet", "batch_size": 4, "num_workers": 0, "epochs": 4}
    places = {"data": data, "cache": folder / "cache", "output": Path(tempfile.mkdtemp(dir=folder))}
    config = TrainConfig().updated(**{**PRESETS["study"], **small, **places, "clip_grad_norm": 1.0, **settings})
    with on(device), mock.patch.object(loop, "train_step", watched), contextlib.suppress(InterruptedError):
        run(config, display=Display(is_main_process=False))
    return found


def correct(device: str, folder: Path, size: Size) -> dict[str, Any]:
    """What a device computes, against the CPU."""
    data = folder / "data"
    data.mkdir()
    write_phantom(data, size.num_slices, size=64)
    result: dict[str, Any] = {}
    exact = losses_of("cpu", folder, data, size, mixed_precision="no")
    kinds: dict[str, dict[str, Any]] = {
        "fp32": {"mixed_precision": "no"},
        "bf16": {"mixed_precision": "bf16"},
        "ema": {"mixed_precision": "no", "ema_decay": 0.9},
        "accumulate": {"mixed_precision": "no", "accumulate": 2},
        "deterministic": {"mixed_precision": "no", "deterministic": True},
    }
    if device != "cpu":
        kinds["fp16"] = {"mixed_precision": "fp16"}
    for name, settings in kinds.items():
        first, again = (losses_of(device, folder, data, size, **settings) for _ in range(2))
        result[name] = {
            "losses": first,
            "largest_difference_to_cpu_fp32": float(np.abs(np.subtract(first, exact)).max()),
            "is_repeated_bit_by_bit": first == again,
        }
    result["prediction"] = {"largest_difference_to_cpu": _difference_of_predictions(device, folder, data)}
    return result


def _difference_of_predictions(device: str, folder: Path, data: Path) -> float:
    small = {"image_size": 64, "encoder": "tu-test_resnet", "batch_size": 4, "num_workers": 0, "epochs": 1}
    places = {"data": data, "cache": folder / "cache", "output": folder / "kept"}
    with on("cpu"):
        run(TrainConfig().updated(**{**PRESETS["study"], **small, **places}), display=Display(is_main_process=False))
    images = np.load(data / "images_medseg.npy")[:8, ..., 0].astype(np.float32)
    found = [
        dict(
            Predictor([folder / "kept"], mixed_precision="no", device=torch.device(one)).probabilities(
                images.__getitem__, len(images)
            )
        )
        for one in ("cpu", device)
    ]
    return max(float(np.abs(found[0][index] - found[1][index]).max()) for index in found[0])


def ways(device: str, folder: Path, size: Size) -> dict[str, Callable[[], contextlib.AbstractContextManager[Step]]]:
    """Ways to train, by name: each gives a step to be timed."""
    return {
        "matchai": lambda: _matchai(device, folder, size),
        "plain PyTorch, bf16": lambda: contextlib.nullcontext(_plain(device, size, torch.bfloat16)),
        "plain PyTorch, fp16 with a scaler (the notebook's)": lambda: contextlib.nullcontext(
            _plain(device, size, torch.float16 if device != "cpu" else torch.bfloat16)
        ),
    }


@contextlib.contextmanager
def _matchai(device: str, folder: Path, size: Size) -> Iterator[Step]:
    """Matchai's own step, taken out of a run on its way."""
    held: dict[str, Any] = {}

    def keep(training: Any, epoch: int, num_draws: int, images: Tensor, target: Tensor, positions: list[int]) -> Any:
        held.update(training=training, rest=(epoch, num_draws, images, target, positions))
        raise InterruptedError

    train_step = loop.train_step
    config = TrainConfig().updated(
        encoder=size.encoder,
        encoder_weights="none",
        image_size=size.image_size,
        batch_size=size.batch_size,
        epochs=1,
        phantom_slices=size.num_slices,
        num_workers=0,
        mixed_precision="bf16",
        cache=folder / "cache",
        output=Path(tempfile.mkdtemp(dir=folder)),
    )
    with on(device), mock.patch.object(loop, "train_step", keep), contextlib.suppress(InterruptedError):
        run(config, display=Display(is_main_process=False))

    def step() -> None:
        train_step(held["training"], *held["rest"])

    yield step


def _plain(device: str, size: Size, dtype: torch.dtype) -> Step:
    model: nn.Module = copy.deepcopy(build_model(size.encoder, CLASSES)).to(device).train()
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), fused=device != "cpu")
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    images = torch.randn(size.batch_size, 1, size.image_size, size.image_size, device=device)
    target = torch.randint(CLASSES, (size.batch_size, size.image_size, size.image_size), device=device)

    def step() -> None:
        from matchai.model import set_dropout  # noqa: PLC0415 not timed
        from matchai.model.dropout import keyed_layers  # noqa: PLC0415

        set_dropout(keyed_layers(model), 0, 1, list(range(size.batch_size)), device, dtype)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype):
            loss = nn.functional.cross_entropy(model(images.to(memory_format=torch.channels_last)).float(), target)
        torch.autograd.backward(scaler.scale(loss))
        scaler.step(optimizer)
        scaler.update()

    return step


def speed(device: str, folder: Path, size: Size) -> dict[str, Any]:
    """Slices a second of each way, in turns, with the peak of memory."""
    result: dict[str, Any] = {}

    def synchronise() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    with contextlib.ExitStack() as stack:
        steps = {name: stack.enter_context(make()) for name, make in ways(device, folder, size).items()}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for name, step in steps.items():
            for _ in range(3):  # buffers, and the search for kernels
                step()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                step()
                result.setdefault("peak_memory_gb", {})[name] = torch.cuda.max_memory_allocated() / 1e9
        for _ in range(3):
            for name, step in steps.items():
                synchronise()
                began = time.perf_counter()
                for _ in range(size.num_timed):
                    step()
                synchronise()
                seconds[name].append((time.perf_counter() - began) / size.num_timed)
    result["slices_a_second"] = {name: [size.batch_size / one for one in found] for name, found in seconds.items()}
    result["median_step_ms"] = {name: 1000 * statistics.median(found) for name, found in seconds.items()}
    return result


def main(argv: list[str] | None = None) -> int:
    """Measures as the command line says; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--correct", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    asked = parser.parse_args(argv)
    size, both = QUICK if asked.quick else FULL, not (asked.correct or asked.speed)
    card = torch.cuda.get_device_name() if asked.device == "cuda" else platform.processor() or "CPU"
    result: dict[str, Any] = {"device": card, "torch": torch.__version__, "size": dataclasses.asdict(size)}
    with tempfile.TemporaryDirectory() as name:
        if asked.correct or both:
            result["correct"] = correct(asked.device, Path(name), size)
        if asked.speed or both:
            result["speed"] = speed(asked.device, Path(name), size)
    asked.output.write_text(json.dumps(result, indent=1))
    print(f"Wrote {asked.output}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
