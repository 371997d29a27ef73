"""Measures one epoch's weighted draw, matchai's and that of its peers: `python benchmarks/sampler.py`.

Prints one Markdown table and writes every measurement as JSON. For Linux with glibc: memory is read from /proc. The
largest default size takes 12 GB of memory, in MONAI's sampler.
"""

import argparse
import ctypes
import gc
import importlib
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from numpy.typing import NDArray
from torch.utils.data import BatchSampler, WeightedRandomSampler

from matchai.sampling.sampler import DistributedWeightedSampler
from matchai.system.files import write_whole
from matchai.system.machine import num_cores

NUM_PROCESSES = 8
BATCH_SIZE = 64  # over all processes
FURTHER = 2000  # batches timed after the first: a share of N = 10^8 has 1.6 million, minutes in any Python loop
RESUME_AT = 0.9
PAUSE = 0.02  # seconds between two looks at the memory; a look takes about 5 ms of another core
PIECE = 1 << 22  # weights written at a time
MONAI_SAMPLERS = "monai.data.samplers"

Record = dict[str, Any]
Batches = Iterable[list[int]]


def deal(weights: NDArray[np.float32], skip: int, **law: bool) -> Batches:
    sampler = DistributedWeightedSampler(
        weights, BATCH_SIZE, len(weights), num_processes=NUM_PROCESSES, process_index=0, **law
    )
    sampler.load_state_dict({"seed": 0, "epoch": 0, "consumed": skip * BATCH_SIZE})
    return sampler


def draw_with_torch(weights: NDArray[np.float32], batch_size: int) -> BatchSampler:
    generator = torch.Generator().manual_seed(0)
    # typed as taking sequences, but documented and used with tensors, which spare it a loop in Python
    values: Any = torch.from_numpy(weights)
    return BatchSampler(WeightedRandomSampler(values, len(weights), generator=generator), batch_size, drop_last=False)


def deal_with_torch(weights: NDArray[np.float32], skip: int) -> Batches:
    return islice(draw_with_torch(weights, BATCH_SIZE), skip, None)


def deal_with_accelerate(weights: NDArray[np.float32], skip: int) -> Batches:
    # `split_batches=True`, which cuts batches of 64 instead of picking batches of 8, took as long
    drawn = draw_with_torch(weights, BATCH_SIZE // NUM_PROCESSES)
    shard = BatchSamplerShard(drawn, num_processes=NUM_PROCESSES, process_index=0)
    resumed: Batches = SkipBatchSampler(shard, skip_batches=skip) if skip else shard
    return resumed


def deal_with_monai(weights: NDArray[np.float32], skip: int) -> Batches:
    drawn = importlib.import_module(MONAI_SAMPLERS).DistributedWeightedRandomSampler(
        range(len(weights)),  # asked for its length only
        # it reads weight by weight: of list, array, tensor and this, this is fastest, and it copies nothing
        weights.data,
        generator=torch.Generator().manual_seed(0),
        num_replicas=NUM_PROCESSES,
        rank=0,
    )
    return islice(BatchSampler(drawn, BATCH_SIZE // NUM_PROCESSES, drop_last=False), skip, None)


SAMPLERS: dict[str, Callable[[NDArray[np.float32], int], Batches]] = {
    "matchai": deal,
    "matchai, balanced": lambda weights, skip: deal(weights, skip, balanced=True),
    "matchai, without replacement": lambda weights, skip: deal(weights, skip, replacement=False),
    "torch": deal_with_torch,
    "accelerate": deal_with_accelerate,
    "MONAI": deal_with_monai,
}


def main() -> None:
    options = parse(sys.argv[1:])
    missing = [] if importlib.util.find_spec("monai") else ["MONAI"]
    names = [name for name in SAMPLERS if name not in missing]
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as folder:
        paths = {size: write_weights(Path(folder) / f"{size}.npy", size) for size in options.sizes}
        # repetitions outermost, so that a busy spell of the machine falls on all samplers alike
        for repetition in range(options.repeats):
            for size in options.sizes:
                for name in names:
                    for kind in ("epoch", "resume"):
                        if not has_failed(records, name, size):
                            record = {"sampler": name, "size": size, "kind": kind, "repetition": repetition}
                            record |= measure(name, kind, paths[size], options.time_limit)
                            records.append(record)
                            print(json.dumps(record), file=sys.stderr)
    about = {
        "command": shlex.join(["python", "benchmarks/sampler.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_model(), "cores": num_cores(), "memory_gb": round(total_memory() / 1e9, 1)},
        "versions": versions(["numpy", "torch", "accelerate", "monai", "matchai"]),
        "num_processes": NUM_PROCESSES,
        "batch_size": BATCH_SIZE,
        "missing": missing,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(record)}" for record in records)
    head = json.dumps(about, indent=1).removesuffix("\n}")
    write_whole(options.output, f'{head},\n "measurements": [\n{lines}\n ]\n}}\n'.encode())
    print(report(about, records, options))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measures one epoch's weighted draw, matchai's and its peers'.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**5, 10**6, 10**7, 10**8], help="numbers of weights")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions of every measurement")
    parser.add_argument("--time-limit", type=float, default=120, help="seconds after which a measurement is killed")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "sampler.json")
    options = parser.parse_args(arguments)
    if min(options.sizes) < 1000 or options.repeats < 1 or options.time_limit <= 0:
        parser.error("sizes must be at least 1000, repeats at least 1, and the time limit above 0.")
    return options


def write_weights(path: Path, size: int) -> Path:
    weights = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(size,))
    generator = np.random.default_rng(0)
    for start in range(0, size, PIECE):
        piece = weights[start : start + PIECE]
        piece[:] = generator.choice(np.array([1, 3], dtype=np.float32), len(piece))
    weights.flush()
    return path


def has_failed(records: list[Record], name: str, size: int) -> bool:
    """Whether a sampler failed or was killed at a size, so that trying it again would tell little for much time."""
    return any("error" in record for record in records if (record["sampler"], record["size"]) == (name, size))


def measure(name: str, kind: str, path: Path, time_limit: float) -> Record:
    """Runs one measurement in a process of its own and watches its memory from outside.

    The process is forked from a server that has done nothing but import, so none pays for another's imports or heap.

    Returns:
        What `run` sends, with `memory_mb`, the largest growth of anonymous memory; or an `error` in words.
    """
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=run, args=(name, kind, path, theirs))
    process.start()
    theirs.close()
    try:
        ours.recv()
        before = peak = anonymous_memory(process.pid)
        ours.send("go")
        deadline = time.perf_counter() + time_limit
        while not ours.poll(PAUSE):
            peak = max(peak, anonymous_memory(process.pid))
            if time.perf_counter() > deadline:
                return {"error": f"> {time_limit:g} s"}
        record: Record = ours.recv()
        # what it holds after the last batch, however quick it was
        peak = max(peak, anonymous_memory(process.pid))
        return record if "error" in record else record | {"memory_mb": (peak - before) / 1e6}
    except (EOFError, OSError):
        process.join()
        return {"error": f"ended with exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def run(name: str, kind: str, path: Path, connection: Connection) -> None:
    """Times a sampler from its construction on; the body of a measuring process, which the measurer then kills.

    Sends an empty message when ready, then, told to go, a record: `first_s` to the first batch, and for an epoch
    `further_s` of the `further` batches after it; or an `error`.
    """
    # copy-on-write, as torch warns of arrays that it may not write; nobody does
    weights: NDArray[np.float32] = np.load(path, mmap_mode="c")
    skip = int(RESUME_AT * num_steps(len(weights))) if kind == "resume" else 0
    if name == "MONAI":
        importlib.import_module(MONAI_SAMPLERS)
    # touches what the fork shares, so that no collection within the measurement has to copy it
    gc.collect()
    # hands back what the imports freed, or a sampler would fill that before its memory is seen to grow
    ctypes.CDLL(None).malloc_trim(0)
    connection.send(None)
    connection.recv()
    try:
        start = time.perf_counter()
        batches = iter(SAMPLERS[name](weights, skip))
        next(batches)
        first = time.perf_counter()
        record: Record = {"first_s": first - start}
        if kind == "epoch":
            # all but the last at most, as a used-up iterator lets go of what the last look is to see
            further = sum(1 for _ in islice(batches, min(FURTHER, num_steps(len(weights)) - 2)))
            record |= {"further": further, "further_s": time.perf_counter() - first}
    except (RuntimeError, MemoryError) as error:
        record = {"error": f"{type(error).__name__}: {error}"}
    connection.send(record)
    # keeps what the sampler holds alive for the last look
    connection.recv()


def num_steps(size: int) -> int:
    return math.ceil(size / BATCH_SIZE)


def anonymous_memory(process_id: int | None) -> int:
    text = Path(f"/proc/{process_id}/smaps_rollup").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Anonymous:"))


def total_memory() -> int:
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    return int(text.split()[1]) * 1024


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def versions(names: Sequence[str]) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def report(about: Record, records: list[Record], options: argparse.Namespace) -> str:
    """The table in Markdown, with what one must know to read it."""
    machine = about["machine"]
    lines = [
        f"One epoch's weighted draw: D = N draws, rank 0 of W = {NUM_PROCESSES} processes, {BATCH_SIZE} draws a batch "
        f"over all processes, weights 1 and 3. Medians of {options.repeats} (smallest–largest).",
        "",
        "| N | sampler | first batch | 1,000 further batches [1] | whole own share [2] | resume at 90 % [3] "
        "| extra memory [4] |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in options.sizes:
        for name in SAMPLERS:
            if name not in about["missing"]:
                own = [record for record in records if (record["sampler"], record["size"]) == (name, size)]
                lines.append(f"| {size:,} | {name} | {' | '.join(cells(own, size))} |")
    lines += [
        "",
        f"1. Timed over the {FURTHER:,} batches after the first, or all but the last where there are fewer. A batch is "
        f"the own {BATCH_SIZE // NUM_PROCESSES} draws of a step; torch's sampler knows no processes, so its batch is "
        f"all {BATCH_SIZE}. The peers draw the whole epoch before their first batch, and so does matchai without "
        "replacement; matchai otherwise draws batch by batch.",
        "2. Reckoned, not measured: the first batch, and the further batches of the share at their measured pace.",
        "3. Building the sampler anew up to the batch after 90 % of the steps. matchai loads its state. The peers have "
        "none: one draws the epoch anew from the same seed and skips (accelerate with its own SkipBatchSampler).",
        "4. The largest growth of anonymous memory until the last timed batch, looked at every "
        f"{PAUSE * 1000:g} ms and at the end, so a shorter peak can be missed. The weights, a float32 file in the page "
        "cache, are mapped and not counted; torch and accelerate copy them to double precision.",
        "",
        "- All figures are of a first epoch, the sampler's construction included; matchai and matchai, balanced, "
        "build their tables once, the others work anew in every epoch.",
        "- The laws differ: all draw with replacement but one, and MONAI draws within the rank's own shard of N / W.",
        f"- A sampler that fails, or is killed at {options.time_limit:g} s, is not tried again at that N.",
    ]
    lines += [f"- Left out, as it is not installed: {name}." for name in about["missing"]]
    lines += [
        f"- {machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB; "
        + ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        + f"; {about['date']}; `{about['command']}`.",
    ]
    return "\n".join(lines)


def cells(records: list[Record], size: int) -> list[str]:
    """The cells of a row, from the measurements of one sampler at one size."""
    epochs = [record for record in records if record["kind"] == "epoch"]
    resumes = [record for record in records if record["kind"] == "resume"]
    for record in epochs:
        if "error" in record:
            return [shortened(record["error"]), "–", "–", "–", "–"]
    failures = [shortened(record["error"]) for record in resumes if "error" in record]
    paces = [record["further_s"] / record["further"] for record in epochs]
    rest = num_steps(size) - 1
    return [
        spread([record["first_s"] for record in epochs]),
        spread([1000 * pace for pace in paces]),
        spread([record["first_s"] + rest * pace for record, pace in zip(epochs, paces, strict=True)]),
        failures[0] if failures else spread([record["first_s"] for record in resumes]),
        f"{statistics.median(record['memory_mb'] for record in epochs):,.1f} MB",
    ]


def spread(seconds: Sequence[float]) -> str:
    """The median with its unit, and the smallest and the largest in the same unit."""
    middle = statistics.median(seconds)
    unit, factor = ("s", 1) if middle >= 1 else ("ms", 1000)
    low, typical, high = (three_figures(value * factor) for value in (min(seconds), middle, max(seconds)))
    return f"{typical} {unit}" if len(seconds) == 1 else f"{typical} {unit} ({low}–{high})"


def three_figures(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def shortened(text: str) -> str:
    """A cell's text: an error's first 60 characters."""
    flat = " ".join(text.replace("|", "/").split())
    return flat if len(flat) <= 60 else f"{flat[:59]}…"


if __name__ == "__main__":
    # the server imports this file and the one peer that it imports late
    multiprocessing.get_context("forkserver").set_forkserver_preload(["__main__", MONAI_SAMPLERS])
    main()
