"""The notebook's training step with matchai's measures added one at a time: `benchmarks/train.py --waterfall`.

Run as a script, it times one variant's steps on fixed tensors, in a process of its own: some measures are a process's.
"""

import dataclasses
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from clock import RECORD, Clock, Job, cpu_seconds, peak_memory
from peers import DTYPES, MAX_LR, WEIGHT_DECAY, RecipeLoss, ResizedSlices, make_model
from sampler import Record, shortened, spread, three_figures
from torch import Tensor, nn
from torch.utils.data import default_collate

from matchai.model import cpu_layers, joined_layers
from matchai.model.losses import SegmentationLoss
from matchai.native import library
from matchai.system.machine import choose_precision, keep_heap
from matchai.system.thread_waits import choose_waiting

WARM_UP = 2  # steps, in which kernels are compiled and the heap grows
BEGINNING = "notebook, fp32"


class Setup:
    """A step's parts in the notebook's way, which the measures change."""

    def __init__(self, job: Job) -> None:
        self.job = job
        slices = ResizedSlices(job, job.train[: job.batch_size], is_training=False)
        images, target = default_collate([slices[number] for number in range(len(slices))])
        self.images: Tensor = images.to(job.device)
        self.target: Tensor = target.to(job.device)
        self.model = make_model(job)
        self.loss: nn.Module = RecipeLoss(job.class_weights).to(torch.device(job.device))
        self.precision = "no"
        self.is_fused = False

    def build_step(self) -> Callable[[], float]:
        """The step that the parts make."""
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=MAX_LR / 25, weight_decay=WEIGHT_DECAY, fused=self.is_fused
        )
        scaler = torch.amp.GradScaler(self.job.device, enabled=self.precision == "fp16")
        self.model.train()

        def step() -> float:
            with torch.autocast(self.job.device, DTYPES.get(self.precision), enabled=self.precision in DTYPES):
                loss: Tensor = self.loss(self.model(self.images), self.target)
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            return loss.item()

        return step


def use_channels_last(setup: Setup) -> None:
    setup.model.to(memory_format=torch.channels_last)
    setup.images = setup.images.to(memory_format=torch.channels_last)


def use_autocast(setup: Setup) -> None:
    setup.precision = choose_precision("auto", torch.device(setup.job.device))[0]


def use_one_loss(setup: Setup) -> None:
    setup.loss = SegmentationLoss(torch.tensor(setup.job.class_weights)).to(setup.job.device)


def use_fused_adamw(setup: Setup) -> None:
    setup.is_fused = True


def forbid_compiling(_: Setup) -> None:
    library.load = lambda: (None, "the benchmark leaves them out")  # type: ignore[assignment]


def change_model(change: Callable[[nn.Module], None]) -> Callable[[Setup], None]:
    """A measure that is a function of the model alone."""
    return lambda setup: change(setup.model)


@dataclasses.dataclass(frozen=True)
class Measure:
    """What makes a step faster.

    Attributes:
        name: Its row in the table.
        apply: Changes a step's parts, or the process.
        is_alone: Whether it is one of layout, memory, threads and kernels alone.
        is_surrounding: Whether it is what matchai's command sets for torch to read when it loads.
    """

    name: str
    apply: Callable[[Setup], None] = lambda _: None
    is_alone: bool = True
    is_surrounding: bool = False


# a new measure is a line here; the table shows it in its place
MEASURES = [
    Measure("channels_last", use_channels_last),
    Measure("mixed precision", use_autocast, is_alone=False),
    Measure("the loss in one pass", use_one_loss, is_alone=False),
    Measure("fused AdamW", use_fused_adamw, is_alone=False),
    Measure("heap kept", lambda _: keep_heap()),
    Measure("short waits of threads", is_surrounding=True),
    Measure("join_silu", change_model(joined_layers.join_silu)),
    Measure("split_depthwise", change_model(cpu_layers.split_depthwise)),
    Measure("use_winograd", change_model(cpu_layers.use_winograd)),
    Measure("multiply_pixels", change_model(cpu_layers.multiply_pixels)),
    Measure("pool_by_rows", change_model(joined_layers.pool_by_rows)),
    Measure("join_skips", change_model(joined_layers.join_skips)),
    Measure("join_norms", change_model(cpu_layers.join_norms)),
]


def variants() -> dict[str, list[Measure]]:
    """The rows: the notebook's step, each measure on top of those above it, and what is left of them in fp32."""
    rows: dict[str, list[Measure]] = {BEGINNING: []}
    for number, measure in enumerate(MEASURES, 1):
        rows[f"+ {measure.name}"] = MEASURES[:number]
    rows["all but the compiled kernels"] = [Measure("torch's operations alone", forbid_compiling), *MEASURES]
    rows["fp32, all but mixed precision"] = [one for one in MEASURES if one.name != "mixed precision"]
    rows["fp32, with the notebook's loss and AdamW"] = [one for one in MEASURES if one.is_alone]
    return rows


def own_environment() -> dict[str, str]:
    """What matchai's command changes in its environment before torch is loaded."""
    before = dict(os.environ)
    try:
        choose_waiting()
        return {name: value for name, value in os.environ.items() if before.get(name) != value}
    finally:
        os.environ.clear()
        os.environ.update(before)


def report(records: Sequence[Record], sizes: Sequence[int]) -> list[str]:
    """The table in Markdown."""
    lines = [
        "| px | step | wall | times the notebook's | times the row above | CPU-seconds | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in sizes:
        medians: list[float] = []
        for label in variants():
            own = [one for one in records if (one["contender"], one["size"]) == (label, size)]
            if not own:
                continue
            failures = [one["error"] for one in own if "error" in one]
            if failures:
                lines.append(f"| {size} | {label} | {shortened(failures[0])} | – | – | – | – |")
                continue
            seconds = [statistics.median(one["seconds"]) for one in own]
            medians.append(statistics.median(seconds))
            above = three_figures(medians[-2] / medians[-1]) + "×" if label.startswith("+") and medians[1:] else "–"
            cpu = statistics.median(one["cpu_s"] for one in own)
            memory = statistics.median(one["memory_mb"] for one in own) / 1000
            lines.append(
                f"| {size} | {label} | {spread(seconds)} | {three_figures(medians[0] / medians[-1])}× | {above} "
                f"| {three_figures(cpu)} | {memory:.2f} GB |"
            )
    return lines


def main(path: Path, label: str, num_steps: int) -> None:
    """Times the steps of a variant."""
    warnings.filterwarnings("ignore", "`timm-` encoders are deprecated", DeprecationWarning)
    job = Job.load(path)
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    setup = Setup(job)
    for measure in variants()[label]:
        measure.apply(setup)
    step = setup.build_step()
    losses = [step() for _ in range(WARM_UP)]
    seconds = []
    clock, cpu = Clock(job.device), cpu_seconds()
    for _ in range(num_steps):
        begin = time.perf_counter()
        losses.append(step())
        clock.mark("done")
        seconds.append(clock.marks["done"][0] - begin)
    memory = torch.cuda.max_memory_allocated() if job.device == "cuda" else peak_memory()
    record = {
        "seconds": seconds,
        "cpu_s": (cpu_seconds() - cpu) / num_steps,
        "memory_mb": memory / 1e6,
        "losses": losses,
    }
    (Path(job.output) / RECORD).write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
