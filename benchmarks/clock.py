"""What the processes of `benchmarks/train.py` share: the job that each is given, and the clock that it hands back.

Imports no torch, so that a process may first set what torch reads when it loads.
"""

import dataclasses
import json
import math
import multiprocessing
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

RECORD = "record.json"  # in a job's output


@dataclasses.dataclass(frozen=True)
class Job:
    """What a process trains, the same for all.

    Attributes:
        data: Folder in the Kaggle layout.
        cache: Folder of matchai's prepared slices, filled.
        output: A folder of the process's own.
        size: Pixels a side.
        batch_size: Slices a step.
        encoder: Of the UNet++.
        device: `cpu` or `cuda`.
        threads: Of torch, and OMP_NUM_THREADS.
        val_fraction: Share of the slices kept for validation.
        train: Indices of the training slices.
        val: Indices of the validation slices.
        mean: Of the training slices' pixels, in units of the window.
        std: Likewise.
        slice_weights: Of the training slices in the draw.
        class_weights: Of the cross-entropy.
    """

    data: str
    cache: str
    output: str
    size: int
    batch_size: int
    encoder: str
    device: str
    threads: int
    val_fraction: float
    train: list[int]
    val: list[int]
    mean: float
    std: float
    slice_weights: list[float]
    class_weights: list[float]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of matchai that make it train the same."""
        return {
            "data": self.data,
            "cache": self.cache,
            "image_size": self.size,
            "val_fraction": self.val_fraction,
            "batch_size": self.batch_size,
            "encoder": self.encoder,
        }

    @property
    def steps(self) -> int:
        """Batches of a training epoch."""
        return math.ceil(len(self.train) / self.batch_size)

    @property
    def val_batches(self) -> int:
        """Batches of a validation pass."""
        return math.ceil(len(self.val) / self.batch_size)

    def save(self, path: Path) -> None:
        """Writes it where a process will read it."""
        path.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Job":
        """Reads what `save` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


class Clock:
    """Wall and CPU seconds at the ends of the timed epoch: `begin`, `trained`, `validated`, and perhaps `saved`."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.marks: dict[str, tuple[float, float]] = {}

    def mark(self, name: str) -> None:
        """Notes the instant at which all that was begun is done, on the device too."""
        if self.device == "cuda":
            sys.modules["torch"].cuda.synchronize()
        self.marks[name] = time.perf_counter(), cpu_seconds()

    def save(self, job: Job) -> None:
        """Writes what the marks come to where the parent will read it."""
        (begin, begin_cpu), (trained, trained_cpu) = self.marks["begin"], self.marks["trained"]
        validated, validated_cpu = self.marks["validated"]
        record: dict[str, Any] = {
            "train_slices": len(job.train),
            "train_s": trained - begin,
            "train_cpu_s": trained_cpu - begin_cpu,
            "val_slices": len(job.val),
            "val_s": validated - trained,
            "val_cpu_s": validated_cpu - trained_cpu,
            "memory_mb": peak_memory() / 1e6,
        }
        if "saved" in self.marks:
            record["epoch_s"] = self.marks["saved"][0] - begin
        if self.device == "cuda":
            record["device_memory_mb"] = sys.modules["torch"].cuda.max_memory_allocated() / 1e6
        (Path(job.output) / RECORD).write_text(json.dumps(record), encoding="utf-8")


def cpu_seconds() -> float:
    """CPU seconds of this process and of its loader's workers, dead or alive."""
    dead = resource.getrusage(resource.RUSAGE_CHILDREN)
    tick = os.sysconf("SC_CLK_TCK")
    alive = 0.0
    for process in multiprocessing.active_children():
        # behind the name, which may hold spaces: utime and stime are the 14th and 15th fields
        fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        alive += (int(fields[11]) + int(fields[12])) / tick
    return time.process_time() + dead.ru_utime + dead.ru_stime + alive


def peak_memory() -> int:
    """Bytes of this process's largest resident set; `ru_maxrss` would begin at that of the process that started it."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("VmHWM:"))
