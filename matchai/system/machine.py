"""What the machine can do: precision, threads, memory."""

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import cv2
import torch
import torch.utils.deterministic

from matchai.system.errors import InputError
from matchai.system.processes import is_set_by_launcher

HALF_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The types of autocast, by what `choose_precision` returns; there is none for `no`."""


def choose_precision(asked: str, device: torch.device) -> tuple[str, str]:
    """Resolves `mixed_precision`.

    Args:
        asked: `auto`, `no`, `bf16` or `fp16`.
        device: Where the model runs.

    Returns:
        `no`, `bf16` or `fp16`, and the reason in words.

    Raises:
        InputError: For fp16 on a CPU, which Accelerate would accept and ignore.
    """
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # the bare launcher exports "no", which is no choice
    if asked != "auto":
        choice, reason = asked, "as asked"
    elif launcher in ("fp16", "bf16"):
        choice, reason = launcher, "as the launcher asks"
    elif device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        choice, reason = "bf16", "the GPU computes it natively"
    elif device.type == "cuda":
        choice, reason = "fp16", "the GPU has no native bf16"
    elif device.type == "cpu" and cpu_has_bf16():
        choice, reason = "bf16", "the CPU computes it natively"
    else:
        choice, reason = "no", f"the {device.type} has no native bf16"
    if choice == "fp16" and device.type == "cpu":
        raise InputError(
            "mixed_precision is fp16, but a CPU does not train in fp16: use --mixed-precision auto, bf16 or no."
        )
    return choice, reason


def cpu_has_bf16() -> bool:
    """Whether the CPU computes in bf16 natively."""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # newer than our oldest torch
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "sve_bf16", "bf16"))


def set_threads(num_local_processes: int) -> int:
    """Shares the cores out between this host's training processes, unless the user chose; returns the threads.

    `accelerate launch` and torchrun export OMP_NUM_THREADS=1 when nobody chose, which would leave all other cores
    idle, so theirs counts as no choice: what counts is the launcher's own environment, where it can be read.
    """
    # cv2's threads fight the loader's workers and torch's own
    cv2.setNumThreads(0)
    if "OMP_NUM_THREADS" in os.environ and not is_set_by_launcher("OMP_NUM_THREADS"):
        return torch.get_num_threads()
    torch.set_num_threads(max(1, num_cores() // num_local_processes))
    return torch.get_num_threads()


def num_local_processes(num_processes: int) -> int:
    """Training processes on this host, of `num_processes` over all hosts."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or num_processes)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def preparing_threads() -> int:
    """Threads that hash and prepare slices: one a core, as hashlib and numpy work without the interpreter's lock.

    Two prepare 1.9 times and hash 1.6 times as fast as one. At most 16: the rest of the work is under the lock.
    """
    return min(16, num_cores())


def keep_heap() -> None:
    """Lets glibc keep freed activations instead of handing them back to the system after every step.

    Mapping and clearing them again took half of a training step at 384² on the measured two-core CPU. Does nothing on
    other C libraries, nor where the user set glibc's own variables.
    """
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_mmap_threshold, 2**30)
        mallopt(m_trim_threshold, -1)  # never


@contextmanager
def gpu_kernels(*, is_repeatable: bool) -> Iterator[None]:
    """Chooses CUDA's kernels while the block runs, to be entered before the first of them.

    Args:
        is_repeatable: Whether those are taken that repeat their bits, where torch has such; the others warn, by name.
            Else the fastest are sought for each shape.
    """
    backend, deterministic = torch.backends.cudnn, cast(Any, torch.utils.deterministic)
    fill = deterministic.fill_uninitialized_memory
    before = backend.benchmark, torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if is_repeatable:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic.fill_uninitialized_memory = False  # a kernel for each new tensor
    backend.benchmark = not is_repeatable
    try:
        yield
    finally:
        backend.benchmark = before[0]
        torch.use_deterministic_algorithms(before[1], warn_only=warned_only)
        deterministic.fill_uninitialized_memory = fill


def unsupported_gpu(number: int) -> str | None:
    """Why this torch cannot use a GPU, a sentence; None if it can, or does not tell."""
    found = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name) for name in torch.cuda.get_arch_list()]
    known = [(one[1], int(one[2]), int(one[3])) for one in found if one is not None]
    major, minor = torch.cuda.get_device_capability(number)
    # code for one card runs on later ones of its generation, and what is compiled at the first call on all later ones
    fits = [
        (kind == "sm" and a == major and b <= minor) or (kind == "compute" and (a, b) <= (major, minor))
        for kind, a, b in known
    ]
    if not known or any(fits):
        return None
    names = ", ".join(f"{a}.{b}" for kind, a, b in known if kind == "sm")
    return (
        f"torch {torch.__version__} has no code for GPU {number}, {torch.cuda.get_device_name(number)} (compute "
        f"capability {major}.{minor}; it has code for {names}); install a torch for it, see pytorch.org, or train on "
        "the CPU with ACCELERATE_USE_CPU=1."
    )


def default_workers(device: torch.device, num_local_processes: int) -> int:
    """Loader processes for each training process.

    None on a CPU, where loading from the cache is 0.1 % of the recipe's step (1 % of the smallest encoder's at 64 px)
    and a worker takes a core from training; on a GPU the cores but one, at most 8 (a core loads and augments 400 slices
    of 384 px a second, 1,800 of 128).
    """
    if device.type == "cpu":
        return 0
    return max(0, min(8, num_cores() // num_local_processes - 1))
