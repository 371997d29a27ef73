"""The machine's devices, cores, memory, disks and threads, checked as a training would use them."""

import contextlib
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from matchai.native import library
from matchai.preflight.software import Finding
from matchai.system import cpu_has_bf16, format_size, is_set_by_launcher, machine, num_cores

LEAST_DISK = 2.2e8  # bytes; a state of the recipe has as many,
FEW_DISK = 2e9  # and three of them, the best weights and the prepared slices take turns in so many
FEW_MEMORY = 5e9  # bytes; the recipe's step at 384 pixels takes 3.4 GB with bf16 on a CPU, 4.4 without our kernels


def choose_device() -> torch.device:
    """Where a training of one process would run, as Accelerate chooses."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "t", "on"):
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def check_devices(device: torch.device) -> list[Finding]:
    """The GPUs with their memory and native bf16; the CPU's cores, those that its container grants, its memory."""
    findings = []
    for number in range(torch.cuda.device_count() if device.type == "cuda" else 0):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        native = "native" if properties.major >= 8 else "no native"
        text = f"GPU {number}: {properties.name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free, {native} bf16"
        if (problem := machine.unsupported_gpu(number)) is not None:
            findings.append(Finding("problem", problem.rstrip(".")))
            continue
        busy = "end what else runs on it (nvidia-smi lists it), or train with a smaller --batch-size or --accumulate 2"
        findings.append(Finding("warning", text, busy) if free < 0.5 * total else Finding("ok", text))
    if device.type != "cuda":
        text = f"No GPU for torch {torch.__version__}: training runs on the {device.type.upper()}"
        if device.type == "cpu" and (Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi")):
            told = "no CUDA" if torch.version.cuda is None else "another CUDA"
            why = "ACCELERATE_USE_CPU is set" if "ACCELERATE_USE_CPU" in os.environ else f"this torch has {told}"
            remedy = "unset it" if "ACCELERATE_USE_CPU" in os.environ else "install a torch for it, see pytorch.org"
            findings.append(Finding("warning", f"{text}, though there is an NVIDIA driver ({why})", remedy))
        else:
            findings.append(Finding("ok", text))
    return [*findings, *_check_cpu()]


def _check_cpu() -> Iterator[Finding]:
    cores, granted = num_cores(), _granted_cores()
    text = f"CPU: {cores} of {os.cpu_count()} cores, {'native' if cpu_has_bf16() else 'no native'} bf16"
    if granted < cores:
        threads = max(1, math.floor(granted))
        text += f", but the container grants the time of {granted:g} alone"
        yield Finding("warning", text, f"set OMP_NUM_THREADS={threads}, or grant it more (docker run --cpus)")
    else:
        yield Finding("ok", text)
    memory = _free_memory()
    if memory is not None:
        text = f"Memory: {memory / 1e9:.1f} GB free"
        remedy = "choose a smaller --image-size or --encoder, or --accumulate 2 or more"
        yield Finding("warning", text, remedy) if memory < FEW_MEMORY else Finding("ok", text)


def check_kernels() -> Finding:
    """Whether matchai's own kernels for CPUs are there or can be compiled."""
    kernels, how = library.load()
    if kernels is not None:
        return Finding("ok", f"Kernels for the CPU: {how}")
    remedy = "install a C++ compiler (on Debian and Ubuntu: apt install g++)"
    return Finding("warning", f"Kernels for the CPU: none, as {how}; a step takes half as long again", remedy)


def check_threads(device_type: str, cores: int) -> Finding:
    """The environment's settings of threads and memory.

    Args:
        device_type: Where training runs.
        cores: That it may use.
    """
    names = ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"]
    names += sorted(name for name in os.environ if name.startswith("MALLOC_"))
    found = {name: os.environ[name] for name in names if name in os.environ and not is_set_by_launcher(name)}
    text = ", ".join(f"{name}={value}" for name, value in found.items())
    if not found:
        return Finding("ok", "Threads: nothing is set, so matchai chooses")
    threads = found.get("OMP_NUM_THREADS", "")
    if threads.isdecimal() and device_type == "cpu" and int(threads) < cores:
        return Finding("warning", f"Threads: {text}, where {cores} cores are free", "unset OMP_NUM_THREADS")
    if threads.isdecimal() and int(threads) > cores:
        return Finding("warning", f"Threads: {text}, more than the {cores} cores", "unset OMP_NUM_THREADS")
    if device_type == "cpu" and "OMP_WAIT_POLICY" in found:
        return Finding("warning", f"Threads: {text}; matchai's own way of waiting is faster", "unset OMP_WAIT_POLICY")
    return Finding("ok", f"Threads: {text}, as the user chose")


def check_disk(folder: Path, flag: str, need: float = 0) -> Finding:
    """Whether a folder can be made and written, and has room.

    Args:
        folder: It need not be there yet.
        flag: What names another.
        need: Bytes that will be written there.
    """
    near = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not near.is_dir() or not os.access(near, os.W_OK | os.X_OK):
        return Finding("problem", f"{folder} cannot be written: {near} does not allow it", f"name another with {flag}")
    free = shutil.disk_usage(near).free
    text = f"Disk: {format_size(free)} free for {folder}"
    remedy = f"make room, or name another folder with {flag}"
    if free < max(need * 1.05, LEAST_DISK):
        wanted = f", but {format_size(need)} are needed" if need * 1.05 > free else ""
        return Finding("problem", text + wanted, remedy)
    return Finding("warning", text, remedy) if free < need + FEW_DISK else Finding("ok", text)


def check_shared_memory(num_workers: int, batch_size: int, channels: int, image_size: int) -> Finding:
    """Whether the loader's workers can hand over their batches.

    Args:
        num_workers: Of the training loader; half as many validate.
        batch_size: Slices of one batch.
        channels: Of an image, float32; the target has one of bytes.
        image_size: Pixels a side.
    """
    if not num_workers:
        return Finding("ok", "Shared memory: none is needed, as slices are loaded without worker processes")
    # two batches wait for each worker, and one is in use
    need = (num_workers + (num_workers + 1) // 2) * 3 * batch_size * image_size**2 * (4 * channels + 1)
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return Finding("ok", f"Shared memory: {num_workers} workers; this system has no /dev/shm to run out of")
    text = f"Shared memory: {format_size(free)} free, {num_workers} workers need up to {format_size(need)}"
    remedy = "give the container more (docker run --shm-size 2g), or load without workers: --num-workers 0"
    return Finding("problem", text, remedy) if free < need else Finding("ok", text)


def _granted_cores() -> float:
    """The time that control groups grant, in cores; infinite without a limit."""
    limits = (text.split()[:2] for text in _control("cpu.max"))
    return min((int(quota) / int(period) for quota, period in limits if quota != "max"), default=math.inf)


def _free_memory() -> float | None:
    """Bytes of memory that are free for this process; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = float(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))) * 1024
    except (OSError, StopIteration):
        return None
    limits = zip(_control("memory.max"), _control("memory.current"), strict=False)
    return min([free, *(float(limit) - float(used) for limit, used in limits if limit.strip() != "max")])


def _control(name: str) -> list[str]:
    """What this process's control group and those above it say under a name."""
    try:
        place = Path("/proc/self/cgroup").read_text(encoding="ascii").rpartition("0::/")[2].strip()
    except OSError:
        return []
    root = Path("/sys/fs/cgroup")
    folders = [root / place, *(root / place).parents]
    texts = []
    for folder in folders[: folders.index(root) + 1] if root in folders else [root]:
        with contextlib.suppress(OSError):
            texts.append((folder / name).read_text(encoding="ascii"))
    return texts
