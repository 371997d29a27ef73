"""Measures a training step on several processes against the same on one: `python benchmarks/distributed.py`.

Prints two Markdown tables, how exact the step is and what it costs, and writes every measurement as JSON. On CPUs, with
gloo; for Linux, as the memory is read from /proc. The data are the built-in phantom, the weights random.
"""

import argparse
import copy
import dataclasses
import gc
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import shlex
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from sampler import Record, cpu_model, spread, three_figures, total_memory, versions
from torch import Tensor

from matchai.data.dataset import Data, read_data
from matchai.data.phantom import write_phantom
from matchai.model.unetplusplus import build_model
from matchai.runs.setup import make_accelerator
from matchai.settings.config import TrainConfig
from matchai.system.errors import Problems
from matchai.system.files import write_whole
from matchai.system.machine import keep_heap, num_cores, num_local_processes, set_threads
from matchai.system.processes import leave_group
from matchai.system.thread_waits import choose_waiting
from matchai.training.build import build_training
from matchai.training.loop import Training, train_step

BATCH_SIZE = 6
NUM_SLICES, VAL_FRACTION = 32, 0.25
NUM_PERMUTATIONS = 5
# float32's own error against float64 was seen to differ 25-fold from one batch to the next, so one says little
NUM_BATCHES = 3
WARM_UP = 2  # steps, in which kernels are compiled and the heap grows
TIME_LIMIT = 900.0  # seconds after which a group of processes is killed
FLOAT64_LIMIT = 1e-10
FLOAT32_LIMIT = 2.0  # times the error that permuting the batch makes


@dataclasses.dataclass(frozen=True)
class Case:
    """What a group of processes measures: the first step's gradient, or the seconds of several steps.

    Attributes:
        encoder: Of the UNet++.
        size: Pixels a side.
        num_processes: W.
        precision: `float64`, `float32`, or `auto` for the mixed precision that the product would choose.
        sync_batch_norm: As the setting.
        is_exact: Whether the loss is the global batch's; else each process takes its own share's, as DDP alone does.
        deterministic: As the setting.
        permutation: Seed of the order in which the batch is computed; 0 leaves it as it is.
        num_steps: Steps that are timed; 0 for the gradient.
    """

    encoder: str
    size: int
    num_processes: int
    precision: str = "float32"
    sync_batch_norm: bool = True
    is_exact: bool = True
    deterministic: bool = False
    permutation: int = 0
    num_steps: int = 0

    @property
    def label(self) -> str:
        """Its row in a table."""
        parts = [self.precision] if not self.num_steps else []
        if self.deterministic:
            parts.append("`--deterministic`")
        elif self.num_processes > 1:
            parts.append("synchronised batch norm" if self.sync_batch_norm else "`--no-sync-batch-norm`")
        if not self.is_exact:
            parts.append("each share's own loss")
        shares = f" ({' + '.join([str(BATCH_SIZE // self.num_processes)] * self.num_processes)})"
        parts.append(f"W = {self.num_processes}{shares if self.num_processes > 1 else ''}")
        if self.permutation:
            parts.append("batch permuted")
        return ", ".join(parts)

    @property
    def reference(self) -> str:
        """Name of the same step's gradient on one process."""
        return f"{self.precision}{'-deterministic' * self.deterministic}"


def gradient_cases(encoder: str, size: int) -> list[Case]:
    cases = [Case(encoder, size, world, "float64") for world in (1, 2, 3)]
    cases += [Case(encoder, size, world) for world in (1, 2, 3)]
    cases += [Case(encoder, size, 1, permutation=seed) for seed in range(1, 1 + NUM_PERMUTATIONS)]
    cases += [Case(encoder, size, 2, sync_batch_norm=False)]
    return cases + [Case(encoder, size, world, deterministic=True) for world in (1, 2, 3)]


def cost_cases(encoder: str, size: int, num_steps: int) -> list[Case]:
    step = Case(encoder, size, 1, "auto", num_steps=num_steps)
    return [
        step,
        dataclasses.replace(step, num_processes=2),
        dataclasses.replace(step, num_processes=2, sync_batch_norm=False),
        dataclasses.replace(step, num_processes=2, sync_batch_norm=False, is_exact=False),
        dataclasses.replace(step, deterministic=True),
        dataclasses.replace(step, num_processes=2, deterministic=True),
    ]


def main() -> None:
    options = parse(sys.argv[1:])
    choose_waiting()  # as the commands do; the server's processes load torch anew
    # turned into an exit that passes through every `finally`, so that no worker is left behind
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    timed = list(itertools.product(options.encoders, options.timed))
    costs = [case for place in timed for case in cost_cases(*place, options.steps)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = {*options.sizes, *options.timed}
        write_phantom(folder / "data", NUM_SLICES, size=max(128, *sizes))
        for size in sizes:
            read(folder, size)  # fills the cache, for all processes
        exactness: list[Record] = []
        for encoder, size in itertools.product(options.encoders, options.sizes):
            cases = gradient_cases(encoder, size)
            # one process first, which leaves the gradients that the others compare theirs with
            found = [record for world in (1, 2, 3) for record in run_group(world, cases, folder)]
            order = [case.label for case in cases]
            exactness += sorted(found, key=lambda record: order.index(record["label"]))
            for path in folder.glob("*.pt"):
                path.unlink()
        # rounds outermost, so that a busy spell of the machine falls on all variants alike
        cost = [
            {"round": number, **record}
            for number in range(options.rounds)
            for world in (1, 2)
            for record in run_group(world, costs, folder)
        ]
    about: Record = {
        "command": shlex.join(["python", "benchmarks/distributed.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_model(), "cores": num_cores(), "memory_gb": round(total_memory() / 1e9, 1)},
        "versions": versions(["numpy", "torch", "accelerate", "segmentation-models-pytorch", "timm", "matchai"]),
        "batch_size": BATCH_SIZE,
        "checks": checks(exactness),
    }
    head = json.dumps(about, indent=1).removesuffix("\n}")
    for name, records in (("exactness", exactness), ("cost", cost)):
        lines = ",\n".join(f"  {json.dumps(record)}" for record in records)
        head += f',\n "{name}": [\n{lines}\n ]'
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(options.output, f"{head}\n}}\n".encode())
    print(report(about, exactness, cost, options))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measures a training step on several processes against one.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128], help="pixels of the gradients")
    parser.add_argument("--timed", type=int, nargs="+", default=[128, 384], help="pixels of the timed steps")
    parser.add_argument("--encoders", nargs="+", default=["timm-efficientnet-b3", "resnet18"], help="of the UNet++")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of every variant in a round")
    parser.add_argument("--rounds", type=int, default=2, help="rounds over all timed variants")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "distributed.json")
    options = parser.parse_args(arguments)
    if any(size < 64 or size % 32 for size in options.sizes + options.timed) or min(options.steps, options.rounds) < 1:
        parser.error("sizes must be multiples of 32 from 64 on, steps and rounds at least 1.")
    return options


def run_group(world: int, cases: Sequence[Case], folder: Path) -> list[Record]:
    """Measures those cases that are for `world` processes, in a gloo group of that many.

    The processes are forked from a server that has done nothing but import, which spares each the seconds of it.

    Returns:
        A record for each case: of the process whose gradient is farthest off, or the first process's seconds,
        with the CPU-seconds of all processes.

    Raises:
        RuntimeError: If a process fails, or the group takes longer than `TIME_LIMIT`; the others are killed.
    """
    mine = [case for case in cases if case.num_processes == world]
    environment = {}
    if world > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        # as torchrun tells it; Accelerate would take each process to be its host's only one
        environment |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    context = multiprocessing.get_context("forkserver")
    processes = []
    deadline = time.monotonic() + TIME_LIMIT
    try:
        for rank in range(world):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
            process = context.Process(target=work, args=(rank, mine, folder, environment | place), daemon=True)
            process.start()
            processes.append(process)
        while (codes := [process.exitcode for process in processes]) != [0] * world:
            if any(codes) or time.monotonic() > deadline:
                raise RuntimeError(f"A group of {world} processes failed; exit codes {codes}, None for a killed one.")
            multiprocessing.connection.wait([one.sentinel for one in processes if one.exitcode is None], timeout=1)
    finally:
        for process in processes:
            process.kill()
            process.join()
    found = [json.loads((folder / f"records-{rank}.json").read_text(encoding="utf-8")) for rank in range(world)]
    together = []
    for records in zip(*found, strict=True):
        chosen = max(records, key=lambda record: max(record.get("errors", [0])))
        if "cpu_seconds" in chosen:
            chosen["cpu_seconds"] = [
                sum(one) for one in zip(*(record["cpu_seconds"] for record in records), strict=True)
            ]
        together.append(chosen)
    return together


def work(rank: int, cases: Sequence[Case], folder: Path, environment: dict[str, str]) -> None:
    """Measures cases as one process of a group, and writes their records into the folder."""
    os.environ.update(environment)
    keep_heap()
    records = []
    for case in cases:
        training = build(case, folder)
        record: Record = {"label": case.label, **dataclasses.asdict(case), "threads": torch.get_num_threads()}
        record["mixed_precision"] = training.accelerator.mixed_precision
        if case.num_steps:
            batch = batch_of(case, training, 1)
            timed = [timed_step(training, batch) for _ in range(WARM_UP + case.num_steps)][WARM_UP:]
            record["seconds"], record["cpu_seconds"] = (
                [float(one) for one in times] for times in zip(*timed, strict=True)
            )
        else:
            found = first_moments(case, training)
            if case.num_processes == 1 and not case.permutation:
                torch.save(found, folder / f"{case.reference}.pt")
            expected = torch.load(folder / f"{case.reference}.pt")
            record["errors"] = [relative_error(*pair) for pair in zip(found, expected, strict=True)]
            # how far rounding to float32 leads by itself
            exact = torch.load(folder / "float64.pt", mmap=True)
            record["float64_errors"] = [relative_error(*pair) for pair in zip(found, exact, strict=True)]
        records.append(record)
        if rank == 0:
            print(json.dumps(record), file=sys.stderr)
        # DistributedDataParallel refers to itself: gone before the next model comes
        del training
        gc.collect()
    (folder / f"records-{rank}.json").write_text(json.dumps(records), encoding="utf-8")
    leave_group()


def read(folder: Path, size: int) -> Data:
    settings = dataclasses.replace(TrainConfig().input, sets=("medseg",), image_size=size, val_fraction=VAL_FRACTION)
    return read_data(folder / "data", folder / "cache", settings, seed=0)


def build(case: Case, folder: Path) -> Training:
    """The parts of a training as the product builds them."""
    config = TrainConfig().updated(
        image_size=case.size,
        batch_size=BATCH_SIZE,
        mixed_precision="auto" if case.precision == "auto" else "no",
        sync_batch_norm=case.sync_batch_norm,
        deterministic=case.deterministic,
    )
    problems = Problems()
    accelerator, _ = make_accelerator(config, folder, problems)
    problems.raise_any()
    # anew for every case, as deterministic ones leave one thread
    set_threads(num_local_processes(accelerator.num_processes))
    model = build_model(case.encoder, len(config.input.class_names))
    if case.precision == "float64":
        model.double()
    training = build_training(config, accelerator, read(folder, case.size), model, lambda: False)
    if case.precision == "float64":
        training.loss.double()
    if not case.is_exact:
        training.accelerator.reduce = lambda tensor, *_: tensor
    training.model.train()
    return training


def batch_of(case: Case, training: Training, epoch: int) -> tuple[Tensor, Tensor, list[int]]:
    """This process's share of an epoch's first batch: images, target, positions."""
    training.sampler.load_state_dict({"seed": 0, "epoch": epoch, "consumed": 0})
    images, target, places = next(iter(training.loader))
    positions: list[int] = places.tolist()
    if case.precision == "float64":
        images = images.double()
    if case.permutation:
        order = np.random.default_rng(case.permutation).permutation(len(positions)).tolist()
        images, target, positions = images[order], target[order], [positions[place] for place in order]
    return images, target, positions


def first_moments(case: Case, training: Training) -> list[Tensor]:
    """AdamW's first moments after one step on each of several batches: a tenth of its gradient, all in a row."""
    begin = copy.deepcopy(training.raw_model.state_dict())
    found = []
    for epoch in range(1, 1 + NUM_BATCHES):
        _, is_done, _ = train_step(training, epoch, BATCH_SIZE, *batch_of(case, training, epoch)).read()
        if not is_done:
            raise RuntimeError("the step was skipped, as its gradient is not finite.")
        state = training.optimizer.state
        found.append(torch.cat([state[parameter]["exp_avg"].flatten() for parameter in training.parameters]))
        state.clear()
        training.raw_model.load_state_dict(begin)
    return found


def timed_step(training: Training, batch: tuple[Tensor, Tensor, list[int]]) -> tuple[float, float]:
    """Seconds of a step, by the clock and of this process's threads together."""
    start, start_cpu = time.perf_counter(), time.process_time()
    train_step(training, 1, BATCH_SIZE, *batch)
    return time.perf_counter() - start, time.process_time() - start_cpu


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def checks(exactness: Sequence[Record]) -> list[Record]:
    """What must hold of the errors: what is claimed, the largest number found, where, and whether it holds."""
    float64: dict[str, float] = {}
    float32: dict[str, float] = {}
    deterministic: dict[str, float] = {}
    for record in exactness:
        where = f"{record['encoder']} at {record['size']} px, W = {record['num_processes']}"
        if record["num_processes"] == 1 or not record["sync_batch_norm"]:
            continue
        if record["precision"] == "float64":
            float64[where] = max(record["errors"])
        elif record["deterministic"]:
            deterministic[where] = max(record["errors"])
        else:
            float32[where] = statistics.median(record["errors"]) / statistics.median(permuted(exactness, record))
    claims: list[tuple[str, dict[str, float], Callable[[float], bool]]] = [
        (f"Float64 errors are below {FLOAT64_LIMIT:g}", float64, lambda found: found < FLOAT64_LIMIT),
        (
            f"Float32 errors are at most {FLOAT32_LIMIT:g} times those of permuting the batch, by their medians",
            float32,
            lambda found: found <= FLOAT32_LIMIT,
        ),
        ("Errors with `--deterministic` are 0", deterministic, lambda found: found == 0),
    ]
    results = []
    for claim, values, holds in claims:
        worst = max(values, key=lambda where: values[where])
        results.append({"claim": claim, "largest": values[worst], "where": worst, "holds": holds(values[worst])})
    return results


def permuted(exactness: Sequence[Record], like: Record) -> list[float]:
    """The errors that permuting the batch on one process makes, in the model and at the size of a record."""
    return [
        error
        for record in exactness
        if record["permutation"] and (record["encoder"], record["size"]) == (like["encoder"], like["size"])
        for error in record["errors"]
    ]


def report(about: Record, exactness: Sequence[Record], cost: Sequence[Record], options: argparse.Namespace) -> str:
    """The two tables in Markdown, with what one must know to read them."""
    machine, encoders = about["machine"], options.encoders
    places = [(encoder, size) for encoder in encoders for size in options.sizes]
    lines = [
        f"One training step of {BATCH_SIZE} slices on W processes against the same step on one: relative error of the "
        "gradient, ‖g - g₁‖ / ‖g₁‖ over all parameters. Random weights, the built-in phantom.",
        "",
        f"| step | {' | '.join(f'{encoder}, {size} px' for encoder, size in places)} |",
        f"|---|{'---|' * len(places)}",
    ]
    for label in labels(record for record in exactness if record["num_processes"] > 1 or record["permutation"]):
        lines.append(error_row(label, "errors", exactness, label, places))
    single = Case("", 0, 1).label
    lines.append(error_row(f"{single}, against float64", "float64_errors", exactness, single, places))
    precisions = " and ".join(sorted({record["mixed_precision"] for record in cost}))
    timed = list(itertools.product(encoders, options.timed))
    heads = [f"{encoder}, {size} px | ratio | CPU-seconds | ratio" for encoder, size in timed]
    lines += [
        "",
        *(f"- {verdict(check)}" for check in about["checks"]),
        f"- {NUM_BATCHES} batches: median (largest). Batch permuted: the same slices in {NUM_PERMUTATIONS} other "
        "orders, on one process.",
        "",
        f"A training step of {BATCH_SIZE} slices, mixed precision {precisions}, data loading left out: median of "
        f"{options.rounds} rounds of {options.steps} steps (smallest–largest), and its ratio to W = 1; CPU-seconds of "
        "all processes and threads.",
        "",
        f"| step | threads a process | {' | '.join(heads)} |",
        f"|---|---|{'---|---|---|---|' * len(timed)}",
    ]
    order = [case.label for case in cost_cases(encoders[0], 0, 1)]
    for label in sorted(labels(cost), key=order.index):
        cells = []
        for place in timed:
            wall, cpu, alone, alone_cpu = (
                [second for record in cost if matches(record, place, row) for second in record[kind]]
                for row in (label, order[0])
                for kind in ("seconds", "cpu_seconds")
            )
            median, median_cpu = statistics.median(wall), statistics.median(cpu)
            cells += [
                spread(wall),
                three_figures(median / statistics.median(alone)),
                three_figures(median_cpu),
                three_figures(median_cpu / statistics.median(alone_cpu)),
            ]
        own = next(record for record in cost if record["label"] == label)
        threads = str(own["threads"]) if not own["deterministic"] else "one a slice"
        lines.append(f"| {label} | {threads} | {' | '.join(cells)} |")
    lines += [
        "",
        f"- Gloo on one host; {machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB; "
        + ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        + f"; {about['date']}; `{about['command']}`.",
    ]
    return "\n".join(lines)


def labels(records: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(record["label"] for record in records))


def matches(record: Record, place: tuple[str, int], label: str) -> bool:
    return (record["encoder"], record["size"], record["label"]) == (*place, label)


def error_row(name: str, kind: str, exactness: Sequence[Record], label: str, places: Sequence[tuple[str, int]]) -> str:
    """A row of the first table: the median and the largest of all errors of a kind, for every model and size."""
    cells = []
    for place in places:
        errors = [error for one in exactness if matches(one, place, label) for error in one[kind]]
        typical, largest = (f"{error:.1e}" if error else "0" for error in (statistics.median(errors), max(errors)))
        cells.append(f"{typical} ({largest})" if largest != "0" else "0")
    return f"| {name} | {' | '.join(cells)} |"


def verdict(check: Record) -> str:
    answer = "holds" if check["holds"] else "**DOES NOT HOLD**"
    return f"{check['claim']}: {answer}; the largest is {check['largest']:.2g} ({check['where']})."


if __name__ == "__main__":
    os.environ["ACCELERATE_USE_CPU"] = "true"
    # by name, as Python before 3.13 passes over `__main__` here
    multiprocessing.get_context("forkserver").set_forkserver_preload(["matchai.training.build", "matchai.runs.setup"])
    main()
