"""matchai's own time a step over a plain loop with the same measures; `benchmarks/train.py --overhead` starts it.

Run as a script, it alternates epochs of both in one process: `matchai.training.loop.train_epoch`, and a loop over the
same loader with a copy of the same model, the same loss, optimiser and schedule, that counts and checks nothing.
"""

import copy
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from clock import RECORD, Clock, Job, cpu_seconds
from sampler import Record, shortened
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from matchai.model.dropout import keyed_layers, set_dropout
from matchai.runs.setup import make_accelerator, read
from matchai.settings.config import TrainConfig
from matchai.system.console import Display
from matchai.system.errors import Problems
from matchai.system.machine import keep_heap, set_threads
from matchai.training.build import build_model_of, build_training
from matchai.training.loop import Training, train_epoch
from matchai.training.meters import EpochMeter

TINY = ("two convolutions", 64)  # model, size: all that is fixed in a step, and little else
NUM_PAIRS, NUM_TINY_PAIRS = 4, 400  # of epochs, a round
WARM_UP = 1  # pairs
EPOCHS = 1_000_000  # of the schedule, which must not end


def main(path: Path, num_pairs: int) -> None:
    """Alternates the two, and writes the seconds of a step in each epoch of each."""
    job = Job.load(path)
    training = build(job)
    model = copy.deepcopy(training.raw_model)
    # once: a plain loop leaves the masks of its drop path to a generator, which costs next to nothing
    set_dropout(keyed_layers(model), 0, 0, list(range(job.batch_size)), job.device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-4, weight_decay=1e-4, fused=True)
    scheduler = OneCycleLR(optimizer, 5e-4, total_steps=EPOCHS * job.steps)
    autocast, device = training.accelerator.autocast, training.accelerator.device

    def plain(epoch: int) -> None:
        training.sampler.load_state_dict({"seed": 0, "epoch": epoch, "consumed": 0})
        model.train()
        for images, labels, _ in training.loader:
            batch = images.to(device, non_blocking=True).to(memory_format=torch.channels_last)
            target = labels.to(device, non_blocking=True)
            with autocast():
                logits = model(batch)
            training.loss(logits, target).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            scheduler.step()

    def ours(epoch: int) -> None:
        train_epoch(training, epoch, EpochMeter(), lambda _: None)

    clock = Clock(job.device)
    loops = {"matchai": ours, "plain": plain}
    seconds: dict[str, list[float]] = defaultdict(list)
    for number in range(WARM_UP + num_pairs):
        # in turns, so that being second costs or gains both the same
        for name in sorted(loops, reverse=number % 2 == 1):
            begin, begin_cpu = time.perf_counter(), cpu_seconds()
            loops[name](number + 1)
            clock.mark("done")
            end, end_cpu = clock.marks["done"]
            seconds[name].append((end - begin) / job.steps)
            seconds[f"{name}_cpu"].append((end_cpu - begin_cpu) / job.steps)
    record = {name: values[WARM_UP:] for name, values in seconds.items()}
    (Path(job.output) / RECORD).write_text(json.dumps(record), encoding="utf-8")


def build(job: Job) -> Training:
    """The parts of a training as the product builds them."""
    keep_heap()
    is_tiny = job.encoder == TINY[0]
    settings = job.settings | ({"encoder": TrainConfig().network.encoder} if is_tiny else {})
    config = TrainConfig().updated(**settings, encoder_weights="none", epochs=EPOCHS)
    problems = Problems()
    accelerator, _ = make_accelerator(config, Path(job.output), problems)
    problems.raise_any()
    set_threads(1)
    data = read(config, Path(job.cache), Display(False))
    model = two_convolutions() if is_tiny else build_model_of(config, is_resuming=False)
    return build_training(config, accelerator, data, model, lambda: False)


def two_convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))


def report(records: Sequence[Record]) -> list[str]:
    """The table in Markdown."""
    lines = [
        "| model | px | time | matchai, ms a step | plain loop, ms a step | difference (quartiles) | of the plain |",
        "|---|---|---|---|---|---|---|",
    ]
    for encoder, size in dict.fromkeys((one["encoder"], one["size"]) for one in records):
        own = [one for one in records if (one["encoder"], one["size"]) == (encoder, size)]
        failures = [one["error"] for one in own if "error" in one]
        if failures:
            lines.append(f"| {encoder} | {size} | {shortened(failures[0])} | – | – | – | – |")
            continue
        for label, suffix in (("wall", ""), ("CPU", "_cpu")):
            ours, plain = (
                [1000 * second for one in own for second in one[name + suffix]] for name in ("matchai", "plain")
            )
            low, middle, high = statistics.quantiles((a - b for a, b in zip(ours, plain, strict=True)), n=4)
            typical = statistics.median(plain)
            lines.append(
                f"| {encoder} | {size} | {label} | {statistics.median(ours):.2f} | {typical:.2f} "
                f"| {middle:+.2f} ({low:+.2f} to {high:+.2f}) | {middle / typical:+.1%} |"
            )
    return lines


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
