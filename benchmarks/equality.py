"""Whether matchai's measures leave the loss curve where it was: `python benchmarks/equality.py`.

Trains the built-in phantom from the same seeds with and without them, and prints two Markdown tables: how far the
curves are apart, step by step and epoch by epoch, and the final Dice beside its spread over seeds. For CPUs.
"""

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from sampler import Record, cpu_model, versions
from torch import Tensor

import matchai.native.library
import matchai.training.build
import matchai.training.loop
from matchai.model.normalisation import join_buffers
from matchai.runs.trainer import run
from matchai.settings.config import TrainConfig
from matchai.system.console import Display
from matchai.system.files import write_whole
from matchai.system.machine import num_cores
from matchai.training.meters import StepOutcome

PACKAGES = ("torch", "segmentation-models-pytorch", "timm", "accelerate", "numpy", "matchai")
EXACT_STEPS = 5  # before rounding has grown, as it does in any training: by 10 to 100 every ten steps here


def without_kernels(stack: ExitStack) -> None:
    """The layers and the loss by torch's operations, as smp and timm make them."""
    stack.enter_context(mock.patch.object(matchai.training.build, "use_fast_layers"))
    stack.enter_context(
        mock.patch.object(matchai.native.library, "load", return_value=(None, "the benchmark leaves them out"))
    )


def contiguous(stack: ExitStack) -> None:
    """Images and weights in contiguous memory, the layers as they are made."""
    without_kernels(stack)

    def joined(model: torch.nn.Module) -> list[Tensor]:
        return join_buffers(model.to(memory_format=torch.contiguous_format))

    stack.enter_context(mock.patch.object(matchai.training.build, "join_buffers", joined))
    stack.enter_context(
        mock.patch.object(matchai.training.loop, "_to_device", lambda images, device: images.contiguous())
    )


def as_it_is(stack: ExitStack) -> None:
    """Nothing changed."""


VARIANTS: dict[str, tuple[str, Callable[[ExitStack], None]]] = {
    "fp32": ("no", as_it_is),
    "fp32, layers of the libraries": ("no", without_kernels),
    "fp32, layers of the libraries, contiguous": ("no", contiguous),
    "bf16": ("bf16", as_it_is),
}
ONLY_FIRST_SEED = ("fp32, layers of the libraries", "fp32, layers of the libraries, contiguous")


def train(name: str, seed: int, options: argparse.Namespace, folder: Path) -> Record:
    """The losses of all steps and the rows of the history of one run."""
    precision, change = VARIANTS[name]
    config = TrainConfig().updated(
        encoder=options.encoder,
        encoder_weights="none",
        image_size=options.size,
        phantom_slices=options.slices,
        epochs=options.epochs,
        seed=seed,
        max_lr=2e-3,
        mixed_precision=precision,
        output=folder / f"{name}-{seed}",
        cache=folder / "cache",
    )
    outcomes: list[StepOutcome] = []
    counted = matchai.training.loop.train_step

    def note(*parts: Any) -> StepOutcome:
        outcomes.append(counted(*parts))
        return outcomes[-1]

    with ExitStack() as stack:
        change(stack)
        stack.enter_context(mock.patch.object(matchai.training.loop, "train_step", note))
        result = run(config, display=Display(False), draw_every=float("inf"))
    return {
        "variant": name,
        "seed": seed,
        "losses": [outcome.read()[0] for outcome in outcomes],
        "history": result.history,
    }


def report(records: list[Record], epochs: int) -> list[str]:
    """Both tables in Markdown."""
    found = {(one["variant"], one["seed"]): one for one in records}
    seeds = sorted({one["seed"] for one in records})
    base = found["fp32", seeds[0]]
    lines = [
        f"| beside fp32, seed {seeds[0]} | largest relative difference of the loss, first {EXACT_STEPS} steps "
        f"| of the mean loss of an epoch | of the last epoch |",
        "|---|---|---|---|",
    ]
    others = [(name, seeds[0]) for name in VARIANTS if name != "fp32"] + [("fp32", seed) for seed in seeds[1:]]
    for name, seed in others:
        one = found[name, seed]
        steps = [abs(a / b - 1) for a, b in zip(one["losses"], base["losses"], strict=True)]
        rows = [
            abs(a["train_loss"] / b["train_loss"] - 1) for a, b in zip(one["history"], base["history"], strict=True)
        ]
        label = name if seed == seeds[0] else f"{name}, seed {seed}"
        lines.append(f"| {label} | {max(steps[:EXACT_STEPS]):.1e} | {max(rows):.1e} | {rows[-1]:.1e} |")
    lines += [
        "",
        f"| after {epochs} epochs | mean Dice by seed | median (spread) | lesion Dice by seed | median (spread) |",
        "|---|---|---|---|---|",
    ]
    for name in ("fp32", "bf16"):
        cells = []
        for metric in ("mean_dice", "lesion_dice"):
            values = [found[name, seed]["history"][-1][metric] for seed in seeds]
            typical = statistics.median(values)
            cells += [
                ", ".join(f"{one:.4f}" for one in values),
                f"{typical:.4f} ({min(values):.4f} to {max(values):.4f})",
            ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for metric in ("mean_dice", "lesion_dice"):
        pairs = [[found[name, seed]["history"][-1][metric] for name in ("fp32", "bf16")] for seed in seeds]
        deviation = statistics.stdev(first for first, _ in pairs)
        differences = ", ".join(f"{second - first:+.4f}" for first, second in pairs)
        lines.append(
            f"\n{metric}: bf16 less fp32 by seed {differences}; over seeds, fp32's standard deviation {deviation:.4f}."
        )
    return lines


def main() -> None:
    """Trains all, prints the tables, and writes every measurement."""
    parser = argparse.ArgumentParser(description="Compares loss curves and Dice with and without matchai's measures.")
    parser.add_argument("--encoder", default="timm-efficientnet-b0")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--slices", type=int, default=80, help="of the phantom")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "equality.json")
    options = parser.parse_args()
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for name in VARIANTS:
            for seed in range(1 if name in ONLY_FIRST_SEED else options.seeds):
                records.append(train(name, seed, options, Path(folder)))
                print(f"{name}, seed {seed}: loss {records[-1]['history'][-1]['train_loss']:.4f}", file=sys.stderr)
    lines = report(records, options.epochs)
    print("\n".join(lines))
    about = {
        "command": shlex.join(["python", "benchmarks/equality.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_model(), "cores": num_cores(), "threads": torch.get_num_threads()},
        "versions": versions(PACKAGES),
    }
    write_whole(options.output, json.dumps({**about, "table": lines, "records": records}, indent=1).encode())


if __name__ == "__main__":
    main()
