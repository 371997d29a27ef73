"""Measures training, matchai's and that of what a user would run instead: `python benchmarks/train.py`.

Prints one Markdown table of a training epoch and a validation pass, and writes every measurement as JSON. Each
measurement has a process of its own, in turns. For Linux, as memory is read from /proc. Without --data the slices are
of the built-in phantom, at 512 x 512; the weights are random.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import resource
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import overhead
import torch
import waterfall
from clock import RECORD, Job
from sampler import Record, cpu_model, shortened, three_figures, total_memory, versions

from matchai.data.phantom import write_phantom
from matchai.model.losses import balanced_class_weights
from matchai.runs.setup import read
from matchai.settings.config import TrainConfig
from matchai.system.console import Display
from matchai.system.files import write_whole
from matchai.system.machine import num_cores
from matchai.training.build import slice_weights_of

HERE = Path(__file__).parent
PHANTOM_SIZE = 512  # pixels, as in the arrays of the recipe
PHANTOM_VAL_FRACTION = 1 / 3  # of 36 slices in volumes of 8: 24 and 12
PACKAGES = (
    *("numpy", "torch", "segmentation-models-pytorch", "timm", "albumentations", "accelerate"),
    *("lightning", "monai", "pytorch-ignite", "matchai"),
)


@dataclasses.dataclass(frozen=True)
class Contender:
    """A loop, and how its process is started.

    Attributes:
        name: Its row in the table.
        arguments: The script and what follows the job's file.
        needs: Modules without which it is left out.
    """

    name: str
    arguments: tuple[str, str]
    needs: tuple[str, ...] = ()


CONTENDERS = {
    "matchai": Contender("matchai", ("product.py", "auto")),
    "matchai-fp32": Contender("matchai, fp32", ("product.py", "no")),
    "notebook": Contender("notebook", ("peers.py", "notebook")),
    "raw": Contender("raw PyTorch", ("peers.py", "raw")),
    "accelerate": Contender("Accelerate", ("peers.py", "accelerate")),
    "lightning": Contender("Lightning", ("peers.py", "lightning"), ("lightning",)),
    "monai": Contender("MONAI", ("peers.py", "monai"), ("monai", "ignite")),
}
REFERENCE = "notebook"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # the loop's own time is one thread's, and so a tiny step varies less


def main() -> None:
    options = parse(sys.argv[1:])
    end_with_children()
    what = "waterfall" if options.waterfall else "overhead" if options.overhead else ""
    # sizes apart, as one takes minutes and the other seconds
    sizes = "" if options.overhead else "-".join(map(str, options.size))
    path = options.output or HERE / "results" / f"{'_'.join(filter(None, ('train', what, options.device, sizes)))}.json"
    about = about_this(options)
    with tempfile.TemporaryDirectory() as name:
        if options.waterfall:
            records = measure_waterfall(Path(name), options)
            table = report_waterfall(about, records, options)
        elif options.overhead:
            records = measure_overhead(Path(name), options)
            table = report_overhead(about, records, options)
        else:
            about["missing"] = [CONTENDERS[key].name for key in options.contenders if not is_installed(key)]
            records = measure_epochs(Path(name), options)
            table = report_epochs(about, records, options)
    store(path, about, records)
    print(table)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measures training, matchai's and its peers'.")
    parser.add_argument("--size", type=int, action="append", help="pixels; may be repeated (default: 384 and 128)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds over all contenders")
    parser.add_argument("--threads", type=int, default=num_cores(), help="of torch, and OMP_NUM_THREADS")
    parser.add_argument("--batch-size", type=int, default=6, help="slices a step")
    parser.add_argument("--encoder", default="timm-efficientnet-b3", help="of the UNet++")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--data", type=Path, help="a folder in the Kaggle layout (default: the built-in phantom)")
    parser.add_argument("--slices", type=int, default=36, help="of the phantom; a third of them validates")
    parser.add_argument("--waterfall", action="store_true", help="the notebook's step, and each measure added to it")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of every process of --waterfall")
    parser.add_argument("--overhead", action="store_true", help="matchai's own time a step over a plain loop's")
    parser.add_argument("--time-limit", type=float, default=900, help="seconds after which a process is killed")
    parser.add_argument("--output", type=Path, help="JSON file (default: in benchmarks/results)")
    options = parser.parse_args(arguments)
    options.size = options.size or [384, 128]
    if any(size < 64 or size % 32 for size in options.size) or min(options.rounds, options.threads) < 1:
        parser.error("sizes must be multiples of 32 from 64 on, rounds and threads at least 1.")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device.")
    return options


def prepare(folder: Path, size: int, options: argparse.Namespace) -> Job:
    """Makes the data of a size ready, matchai's cache too, and says what every contender trains."""
    data = options.data or folder / "data"
    if options.data is None and not data.exists():
        write_phantom(data, options.slices, size=PHANTOM_SIZE)
    job = Job(
        data=str(data.absolute()),
        cache=str(folder / "cache"),
        output="",
        size=size,
        batch_size=options.batch_size,
        encoder=options.encoder,
        device=options.device,
        threads=options.threads,
        val_fraction=TrainConfig().input.val_fraction if options.data else PHANTOM_VAL_FRACTION,
        train=[],
        val=[],
        mean=0.0,
        std=1.0,
        slice_weights=[],
        class_weights=[],
    )
    config = TrainConfig().updated(**job.settings)
    found = read(config, folder / "cache", Display(False))
    pixels = torch.from_numpy(np.asarray(found.slices.pixels)[found.train].sum(axis=0))
    return dataclasses.replace(
        job,
        train=found.train,
        val=found.val,
        mean=found.mean,
        std=found.std,
        slice_weights=slice_weights_of(config, found).tolist(),
        class_weights=balanced_class_weights(pixels).tolist(),
    )


def end_with_children() -> None:
    """Turns SIGTERM into an exit that ends the measuring process too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def is_installed(key: str) -> bool:
    return all(map(importlib.util.find_spec, CONTENDERS[key].needs))


def measure_epochs(folder: Path, options: argparse.Namespace) -> list[Record]:
    """A timed epoch of every contender in every round, each in a process of its own."""
    keys = [key for key in options.contenders if is_installed(key)]
    jobs = {size: prepare(folder, size, options) for size in options.size}
    return take_turns(
        keys, jobs, options, lambda key, job, place: measure(CONTENDERS[key].arguments, job, place, options)
    )


def measure_waterfall(folder: Path, options: argparse.Namespace) -> list[Record]:
    """The steps of every variant in every round, each in a process of its own."""
    jobs = {size: prepare(folder, size, options) for size in options.size}
    rows, surroundings = waterfall.variants(), waterfall.own_environment()

    def measure_variant(label: str, job: Job, place: Path) -> Record:
        environment = surroundings if any(one.is_surrounding for one in rows[label]) else {}
        return measure(("waterfall.py", label, str(options.steps)), job, place, options, **environment)

    return take_turns(list(rows), jobs, options, measure_variant)


def measure_overhead(folder: Path, options: argparse.Namespace) -> list[Record]:
    """Matchai's loop and a plain one in turns, within one process for each of two models in every round."""
    cases = [(options.encoder, 128, overhead.NUM_PAIRS, {}), (*overhead.TINY, overhead.NUM_TINY_PAIRS, ONE_THREAD)]
    jobs = {size: dataclasses.replace(prepare(folder, size, options), encoder=encoder) for encoder, size, *_ in cases}
    surroundings = waterfall.own_environment()
    records = []
    for number in range(options.rounds):
        for encoder, size, num_pairs, threads in cases:
            place = folder / f"{size}-{number}"
            record: Record = {"encoder": encoder, "size": size, "round": number}
            environment = surroundings | threads
            record |= measure(("overhead.py", str(num_pairs)), jobs[size], place, options, **environment)
            records.append(record)
            print(json.dumps(record), file=sys.stderr)
    return records


def take_turns(
    names: Sequence[str],
    jobs: dict[int, Job],
    options: argparse.Namespace,
    measure_one: Callable[[str, Job, Path], Record],
) -> list[Record]:
    """Measures all by rounds, their order turned, so that a busy spell of the machine falls on all alike.

    What fails or is killed once is not tried again at that size.
    """
    records: list[Record] = []
    folder = Path(next(iter(jobs.values())).cache).parent
    for number in range(options.rounds):
        first = number % len(names)
        for size, job in jobs.items():
            for place, name in enumerate([*names[first:], *names[:first]]):
                if any("error" in one for one in chosen(records, name, size)):
                    continue
                record: Record = {"contender": name, "size": size, "round": number}
                record |= measure_one(name, job, folder / f"{size}-{number}-{place}")
                records.append(record)
                print(json.dumps(record), file=sys.stderr)
    return records


def measure(
    arguments: Sequence[str], job: Job, output: Path, options: argparse.Namespace, **environment: str
) -> Record:
    """Runs a script on a job in a process of its own.

    Args:
        arguments: The script, and what it takes after the job's file.
        job: The job.
        output: A folder for the process.
        options: Threads, device and time limit.
        environment: What its environment has more.

    Returns:
        What it measured, or an `error` in words; with `others`, the cores that the rest of the machine used meanwhile.
    """
    output.mkdir()
    dataclasses.replace(job, output=str(output)).save(output / "job.json")
    surroundings = {**os.environ, "OMP_NUM_THREADS": str(options.threads), **environment}
    if options.device == "cpu":
        surroundings["ACCELERATE_USE_CPU"] = "true"
    command = [sys.executable, str(HERE / arguments[0]), str(output / "job.json"), *arguments[1:]]
    begin, busy = time.perf_counter(), others_cpu_seconds()
    try:
        done = subprocess.run(
            command, env=surroundings, timeout=options.time_limit, capture_output=True, text=True, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"> {options.time_limit:g} s"}
    others = round((others_cpu_seconds() - busy) / (time.perf_counter() - begin), 3)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return {"others": others, "error": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]}
    found: Record = json.loads((output / RECORD).read_text(encoding="utf-8"))
    return {"others": others, **found}


def others_cpu_seconds() -> float:
    """CPU seconds of the whole machine so far, less those of this process and of those that it has waited for."""
    user, nice, system = map(int, Path("/proc/stat").read_text(encoding="ascii").split()[1:4])
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - own.ru_utime - own.ru_stime - time.process_time()


def about_this(options: argparse.Namespace, script: str = "train") -> Record:
    """When, where, with what and how the measurements were taken."""
    machine: Record = {"cpu": cpu_model(), "cores": num_cores(), "memory_gb": round(total_memory() / 1e9, 1)}
    if options.device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    return {
        "command": shlex.join(["python", f"benchmarks/{script}.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "versions": versions(PACKAGES),
        "threads": options.threads,
        "batch_size": options.batch_size,
        "encoder": options.encoder,
        "device": options.device,
    }


def store(path: Path, about: Record, records: Sequence[Record]) -> None:
    """Writes every measurement, one a line."""
    lines = ",\n".join(f"  {json.dumps(record)}" for record in records)
    head = json.dumps(about, indent=1).removesuffix("\n}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, f'{head},\n "measurements": [\n{lines}\n ]\n}}\n'.encode())


def report_epochs(about: Record, records: Sequence[Record], options: argparse.Namespace) -> str:
    """The table in Markdown, with what one must know to read it."""
    sizes = {(one["train_slices"], one["val_slices"]) for one in records if "error" not in one}
    train_slices, val_slices = next(iter(sizes), ("no", "none"))
    lines = [
        f"A training epoch of {train_slices} slices and a validation pass over {val_slices}, UNet++ "
        f"with {options.encoder}, batch {options.batch_size}, {options.threads} threads, {options.device}. Medians of "
        f"{options.rounds} rounds (smallest–largest); a round has a process of each, whose second epoch is timed.",
        "",
        "| px | pass | loop | slices a second | times the notebook's | CPU-seconds a slice | of the notebook's "
        "| peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in options.size:
        for what, label in (("train", "training"), ("val", "validation")):
            for key, contender in CONTENDERS.items():
                own = chosen(records, key, size)
                if own:
                    row = cells(own, chosen(records, REFERENCE, size), what)
                    lines.append(f"| {size} | {label} | {contender.name} | {' | '.join(row)} |")
    lines += [
        "",
        "- Training is everything from one epoch's end to the last step of the next: loading, augmentation, loss, "
        "optimiser, schedule, and for the notebook its Dice of every batch; validation has loss and Dice.",
        "- Memory is the largest resident set of the process, imports included"
        + (", and the most that CUDA's allocator held." if options.device == "cuda" else "."),
        quietness(records),
    ]
    for size in options.size:
        waits = [one for one in chosen(records, "matchai", size) if "epoch_s" in one]
        if waits:
            epoch = statistics.median(one["epoch_s"] for one in waits)
            passes = statistics.median(one["train_s"] + one["val_s"] for one in waits)
            lines.append(
                f"- matchai's user waits {three_figures(epoch)} s for such an epoch at {size} px, of which "
                f"{three_figures(epoch - passes)} s are for the saved state, the best weights and the history."
            )
    return "\n".join([*lines, *footnotes(about)])


def report_waterfall(about: Record, records: Sequence[Record], options: argparse.Namespace) -> str:
    """The waterfall's table, with what one must know to read it."""
    lines = [
        f"Seconds of a training step on fixed tensors, UNet++ with {options.encoder}, batch {options.batch_size}, "
        f"{options.threads} threads, {options.device}. Medians of {options.rounds} processes (smallest–largest), each "
        f"of which gives the median of {options.steps} steps.",
        "",
        *waterfall.report(records, options.size),
        "",
        "- Each row with a + has all measures above it too.",
        quietness(records),
    ]
    return "\n".join([*lines, *footnotes(about)])


def report_overhead(about: Record, records: Sequence[Record], options: argparse.Namespace) -> str:
    """The overhead's table, with what one must know to read it."""
    lines = [
        f"matchai's own time a step: its epochs and a plain loop's in turns, batch {options.batch_size}, "
        f"{options.threads} threads, {options.device}; medians.",
        "",
        *overhead.report(records),
        "",
        f"- The {overhead.TINY[0]} have one thread. Differences are of neighbouring epochs.",
        quietness(records),
    ]
    return "\n".join([*lines, *footnotes(about)])


def quietness(records: Sequence[Record]) -> str:
    """What else the machine did, as spinning threads of the peers suffer by it."""
    others = [one["others"] for one in records if "others" in one] or [0.0]
    return (
        f"- The rest of the machine used {statistics.median(others):.2f} cores meanwhile (median of the measurements; "
        f"{max(others):.2f} at most)."
    )


def chosen(records: Sequence[Record], key: str, size: int) -> list[Record]:
    return [one for one in records if (one["contender"], one["size"]) == (key, size)]


def cells(own: Sequence[Record], reference: Sequence[Record], what: str) -> list[str]:
    """The cells of a row, from the measurements of one contender and of the notebook at one size."""
    for record in own:
        if "error" in record:
            return [shortened(record["error"]), "–", "–", "–", "–"]

    def speeds(records: Sequence[Record]) -> list[float]:
        return [one[f"{what}_slices"] / one[f"{what}_s"] for one in records]

    def costs(records: Sequence[Record]) -> list[float]:
        return [one[f"{what}_cpu_s"] / one[f"{what}_slices"] for one in records]

    memory = f"{statistics.median(one['memory_mb'] for one in own) / 1000:.2f} GB"
    if "device_memory_mb" in own[0]:
        memory += f" + {statistics.median(one['device_memory_mb'] for one in own) / 1000:.2f} GB"
    ratios = ["–", "–"]
    if reference and not any("error" in one for one in reference):
        ratios = [
            f"{three_figures(statistics.median(kind(own)) / statistics.median(kind(reference)))}×"
            for kind in (speeds, costs)
        ]
    return [spread(speeds(own)), ratios[0], spread(costs(own)), ratios[1], memory]


def spread(values: Sequence[float]) -> str:
    """The median, the smallest and the largest."""
    low, typical, high = map(three_figures, (min(values), statistics.median(values), max(values)))
    return typical if len(values) == 1 else f"{typical} ({low}–{high})"


def footnotes(about: Record) -> list[str]:
    """What was left out, and where and with what the measurements were taken."""
    machine = about["machine"]
    gpu = f"{machine['gpu']}, " if "gpu" in machine else ""
    return [f"- Left out, as it is not installed: {name}." for name in about.get("missing", [])] + [
        f"- {gpu}{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB; "
        + ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        + f"; {about['date']}; `{about['command']}`."
    ]


if __name__ == "__main__":
    main()
