"""Measures slices a second through a checkpoint, by several ways: `python benchmarks/predict.py`.

Prints one Markdown table and writes every measurement as JSON. Each measurement has a process of its own, in turns.
Without --checkpoint the weights are random, with batch norm's statistics of the phantom; without --data the slices are
of the built-in phantom. For Linux, as memory is read from /proc.
"""

import argparse
import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from clock import Job
from peers import ResizedSlices, make_model
from sampler import Record, shortened, three_figures
from torch import nn
from torch.utils.data import DataLoader
from train import (
    HERE,
    about_this,
    chosen,
    end_with_children,
    footnotes,
    measure,
    prepare,
    quietness,
    spread,
    store,
    take_turns,
)
from waterfall import own_environment

from matchai.settings.config import TrainConfig
from matchai.system.machine import num_cores
from matchai.training.checkpoint import load_weights, pack_weights

LABELS = {
    "notebook": "notebook: fp32, a slice at a time",
    "batches": "fp32, channels_last, batches",
    "matchai": "matchai: mixed precision, channels_last, kernels, batches",
    "onnx": "ONNX Runtime, fp32, batches",
}
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime")}


def main() -> None:
    options = parse(sys.argv[1:])
    end_with_children()
    missing = [name for name in LABELS if not all(map(importlib.util.find_spec, NEEDS.get(name, ())))]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = options.checkpoint
        if checkpoint is None:
            checkpoint = folder / "best.safetensors"
            write_random(checkpoint, prepare(folder, options.size[0], options))
        jobs = {size: prepare(folder, size, options) for size in options.size}
        surroundings = own_environment()

        def measure_way(way: str, job: Job, place: Path) -> Record:
            environment = surroundings if way == "matchai" else {}
            return measure(("ways.py", way, str(checkpoint.absolute())), job, place, options, **environment)

        records = take_turns([way for way in LABELS if way not in missing], jobs, options, measure_way)
    about = about_this(options, "predict") | {"missing": [LABELS[way] for way in missing]}
    store(options.output or HERE / "results" / f"predict_{options.device}.json", about, records)
    print(report(about, records, options))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measures slices a second through a checkpoint.")
    parser.add_argument("--checkpoint", type=Path, help="a run's folder or best.safetensors (default: random weights)")
    parser.add_argument("--size", type=int, action="append", help="pixels; may be repeated (default: the checkpoint's)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds over all ways")
    parser.add_argument("--threads", type=int, default=num_cores(), help="of torch, and OMP_NUM_THREADS")
    parser.add_argument("--batch-size", type=int, default=6)
    parser.add_argument("--encoder", default="timm-efficientnet-b3", help="of the UNet++, without --checkpoint")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--data", type=Path, help="a folder in the Kaggle layout (default: the built-in phantom)")
    parser.add_argument("--slices", type=int, default=36, help="of the phantom")
    parser.add_argument("--time-limit", type=float, default=900, help="seconds after which a process is killed")
    parser.add_argument("--output", type=Path, help="JSON file (default: in benchmarks/results)")
    options = parser.parse_args(arguments)
    sizes = [TrainConfig().input.image_size]
    if options.checkpoint:
        about = load_weights(options.checkpoint)[1]
        options.encoder, sizes = about["encoder"], [about["image_size"]]
    options.size = options.size or sizes
    if any(size < 64 or size % 32 for size in options.size) or min(options.rounds, options.threads) < 1:
        parser.error("sizes must be multiples of 32 from 64 on, rounds and threads at least 1.")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device.")
    return options


def write_random(path: Path, job: Job) -> None:
    """A checkpoint of random weights, with batch norm's statistics of the slices: without, activations would vanish."""
    torch.manual_seed(0)
    model = make_model(job)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches
    with torch.no_grad():
        for images, _ in DataLoader(ResizedSlices(job, job.val, is_training=False), job.batch_size, drop_last=True):
            model(images.to(job.device))
    names = list(TrainConfig().input.class_names)
    about = {"encoder": job.encoder, "class_names": names, "in_channels": 1, "image_size": job.size}
    path.write_bytes(pack_weights(model.state_dict(), about))


def report(about: Record, records: Sequence[Record], options: argparse.Namespace) -> str:
    """The table in Markdown, with what one must know to read it."""
    lines = [
        f"Prediction by a UNet++ with {options.encoder}, batches of {options.batch_size}, {options.threads} threads, "
        f"{options.device}. Medians of {options.rounds} processes (smallest–largest), each of which times its second "
        "pass over slices that are prepared and in memory, up to class indices on the host.",
        "",
        "| px | way | slices a second | times the notebook's | CPU-seconds a slice | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for size in options.size:
        reference = [one["slices"] / one["seconds"] for one in chosen(records, "notebook", size) if "error" not in one]
        for way, label in LABELS.items():
            own = chosen(records, way, size)
            failures = [one["error"] for one in own if "error" in one]
            if failures:
                lines.append(f"| {size} | {label} | {shortened(failures[0])} | – | – | – |")
            elif own:
                speeds = [one["slices"] / one["seconds"] for one in own]
                ratio = three_figures(statistics.median(speeds) / statistics.median(reference)) if reference else "–"
                kind = "device_memory_mb" if options.device == "cuda" else "memory_mb"
                memory = statistics.median(one[kind] for one in own) / 1000
                costs = [one["cpu_s"] / one["slices"] for one in own]
                lines.append(f"| {size} | {label} | {spread(speeds)} | {ratio}× | {spread(costs)} | {memory:.2f} GB |")
    return "\n".join([*lines, "", quietness(records), *footnotes(about)])


if __name__ == "__main__":
    main()
