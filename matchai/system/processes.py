"""The processes of a run: whether the launcher started what was asked for, and what happens when one is lost."""

import contextlib
import ctypes
import gc
import os
import pickle
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env

from matchai.system.errors import InputError

T = TypeVar("T")


def launcher() -> str | None:
    """Which launcher started this process: `accelerate launch`, `torchrun`, or None."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return "accelerate launch"
    return "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else None


def is_set_by_launcher(name: str) -> bool:
    """Whether an environment variable comes from the launcher, not from the user's own environment."""
    if launcher() is None or name not in os.environ:
        return False
    try:
        environment = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:  # no Linux: the launchers' value of OMP_NUM_THREADS for "nobody chose" is 1
        return os.environ[name] == "1"
    return not any(entry.startswith(f"{name}=".encode()) for entry in environment.split(b"\0"))


_TRUE, _FALSE = ("1", "true", "yes", "y", "t", "on"), ("0", "false", "no", "n", "f", "off")  # as Accelerate reads them


def _one_of(*allowed: str) -> Callable[[str], bool]:
    return lambda value: value.lower() in allowed


def _whole(low: int, high: int = 2**31) -> Callable[[str], bool]:
    return lambda value: value.removeprefix("-").isdecimal() and low <= int(value) <= high


def _is_device(value: str) -> bool:
    try:
        torch.device(value)
    except RuntimeError:
        return False
    return True


_Rule = tuple[str, Callable[[str], bool]]
_ON_OR_OFF: _Rule = ("1 or 0", _one_of(*_TRUE, *_FALSE))
_OFF: _Rule = ("off, as matchai trains whole models by DDP", _one_of(*_FALSE))
_INDEX, _COUNT = ("a whole number from 0", _whole(0)), ("a whole number from 1", _whole(1))
_LAUNCH_SETTINGS: dict[str, _Rule] = {
    **dict.fromkeys(("ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY"), _ON_OR_OFF),
    **{f"ACCELERATE_DYNAMO_USE_{name}": _ON_OR_OFF for name in ("FULLGRAPH", "DYNAMIC", "REGIONAL_COMPILATION")},
    "FORK_LAUNCHED": _ON_OR_OFF,
    **{f"ACCELERATE_USE_{name}": _OFF for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")},
    "ACCELERATE_USE_SAGEMAKER": _OFF,
    "ACCELERATE_DYNAMO_BACKEND": ("no, as matchai compiles no model", _one_of("no")),
    "ACCELERATE_MIXED_PRECISION": ("no, bf16 or fp16", _one_of("no", "bf16", "fp16")),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1, as matchai has --accumulate", _one_of("1")),
    "ACCELERATE_TORCH_DEVICE": ("a device of torch", _is_device),
    "MASTER_PORT": ("a whole number from 0 to 65535", _whole(0, 65535)),
    "LOCAL_RANK": ("a whole number from 0", _whole(-1)),  # -1 is torch's word for a process alone
    **dict.fromkeys(("RANK", "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"), _INDEX),
    **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"), _COUNT),
    **{f"{mpi}_{name}": _INDEX for mpi in ("PMI", "OMPI_COMM_WORLD", "MV2_COMM_WORLD") for name in ("RANK", "SIZE")},
}
"""What Accelerate, torch and matchai read of the environment: what each setting must be, in words and as a test."""


def _program() -> str:
    """The module that was started, such as `matchai.train`."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    program: str = spec.name if spec and spec.name.startswith("matchai.") else "matchai.train"
    return program.replace("__main__", sys.argv[1]) if program == "matchai.__main__" else program


def _setting_problems() -> list[str]:
    """What is wrong with the launcher's settings in the environment, one sentence each; an empty one is not set."""
    problems = []
    found = {name: os.environ[name] for name in _LAUNCH_SETTINGS if os.environ.get(name)}
    for name, value in found.items():
        expected, is_fitting = _LAUNCH_SETTINGS[name]
        if not is_fitting(value):
            remedy = f"unset it (`unset {name}`)"
            if is_set_by_launcher(name):
                remedy = (
                    "the launcher's settings are at fault, so start with "
                    f"`accelerate launch --config_file accelerate_config.yaml -m {_program()}` in matchai's folder"
                )
            problems.append(f"{name} is {value}, but must be {expected}: {remedy}.")
    world, rank = found.get("WORLD_SIZE", "1"), found.get("RANK", "0")
    if not problems and int(rank) >= int(world):
        problems.append(f"RANK is {rank}, but WORLD_SIZE is {world}: start all processes with one launcher.")
    return problems


def check_launch(num_processes: int | None = None) -> None:
    """Refuses settings of the launcher's that matchai cannot train by, and a launch that started other processes.

    Args:
        num_processes: As Accelerate counts them, once it does.

    Raises:
        InputError: If settings in the environment are wrong, or it names more processes than have joined.
    """
    problems = _setting_problems()
    if problems:
        raise InputError(*problems)
    if num_processes is None:
        return
    command = f"ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes {{}} -m {_program()}"
    text = os.environ.get("WORLD_SIZE", "1")
    asked = int(text) if text.isdecimal() else num_processes
    if asked != num_processes:
        raise InputError(
            f"The launcher started {asked} processes, but each believes to be alone; on CPUs start them with "
            f"`{command.format(asked)}`."
        )
    # `accelerate launch --cpu --num_processes 2` tells one process the address of a group that nobody else joins
    if num_processes == 1 and launcher() == "accelerate launch" and is_set_by_launcher("MASTER_ADDR"):
        raise InputError(
            "The launcher was asked for several processes but started one, as it does with --cpu; start them with "
            f"`{command.format('N')}`, or ask for one with --num_processes 1."
        )


def num_restarts() -> int:
    """How many times torchrun, or Slurm, has started this very command again."""
    return sum(int(os.environ.get(name) or 0) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def join_group(timeout: float) -> PartialState:
    """Joins the process group that the launcher names, if there is one; `timeout` in seconds.

    Raises:
        InputError: If it cannot be formed, or settings of the launcher's are wrong.
    """
    check_launch()
    _check_gpus()
    for name in _LAUNCH_SETTINGS:
        if os.environ.get(name) == "":  # as if it were not set, which Accelerate does not know
            del os.environ[name]
    _check_fork()
    seconds = timedelta(seconds=timeout if 0 < timeout < 1e9 else 600)  # what is wrong with it is told by the check
    use_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    if os.environ.get("WORLD_SIZE", "").isdecimal():
        # where nobody says how many are on this host, Accelerate would say one, and each would take all cores
        os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
    try:
        if _is_store_stale():
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            tcp = dist.TCPStore(*address, timeout=seconds)  # type: ignore[attr-defined]
            store = dist.PrefixStore(f"restart-{num_restarts()}", tcp)  # type: ignore[attr-defined]
            rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            backend = "nccl" if torch.cuda.is_available() and not use_cpu else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=seconds)
        return PartialState(cpu=use_cpu, timeout=seconds)
    except (ValueError, RuntimeError) as error:
        PartialState._reset_state()
        raise InputError(
            f"The group of {os.environ.get('WORLD_SIZE', '?')} processes could not be formed "
            f"({str(error).splitlines()[0]}); start all of them with one launcher, such as `ACCELERATE_USE_CPU=1 "
            "accelerate launch --multi_gpu --num_processes 2 -m matchai.train` or torchrun."
        ) from error


def _check_gpus() -> None:
    """Refuses more processes than this host has GPUs, which NCCL would not let share one."""
    mine = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    if parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available():
        return
    num_gpus = torch.cuda.device_count()
    if mine > max(num_gpus, 1):
        raise InputError(
            f"{mine} processes were started on this host, but it has {num_gpus} GPUs, and each process needs its own; "
            f"start at most {num_gpus} (--num_processes {num_gpus}), or train on the CPU with ACCELERATE_USE_CPU=1."
        )


def _check_fork() -> None:
    """Refuses a process that a notebook's launcher has forked from one in which Accelerate was alone."""
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if PartialState._shared_state and PartialState().num_processes != asked > 1:
        raise InputError(
            f"{asked} processes were to train together, but this one comes from a Python that has trained alone; "
            "restart the kernel, and call the launcher before any other training."
        )


def _is_store_stale() -> bool:
    """Whether the store that torchrun hands on still holds the addresses of the processes before a restart.

    It does since torch 2.5, and new ones may wait for the old ones for good (pytorch issue 135712; seen in 3 of 9
    restarts). With agents on several hosts, which count restarts each for itself, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    is the remedy; launch/multi_node.sh sets it.
    """
    return (
        os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        and os.environ.get("GROUP_WORLD_SIZE") == "1"
        and int(os.environ.get("WORLD_SIZE") or 1) > 1
        and int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0
    )


def end_with_launcher() -> None:
    """Asks the kernel for a signal when the launcher dies, so that a killed launcher leaves no process training on.

    SIGTERM, at which all processes save and end. Where other hosts have launchers of their own it is SIGKILL, as theirs
    are to continue, not to be asked to stop. Linux only; elsewhere nothing happens.

    Raises:
        InputError: If the launcher is gone already.
    """
    if launcher() is None:
        return
    has_others = int(os.environ.get("GROUP_WORLD_SIZE") or 1) > 1
    if end_with_parent(signal.SIGKILL if has_others else signal.SIGTERM):
        with contextlib.suppress(OSError):
            # whoever adopts orphans is no Python program; a launcher that is a container's first process is one
            if os.getppid() == 1 and b"python" not in Path("/proc/1/cmdline").read_bytes():
                raise InputError("The launcher has ended before this process began; start again.")


def end_with_parent(number: int = signal.SIGTERM) -> bool:
    """Asks the kernel for a signal when the process that started this one dies; whether it could be asked (Linux)."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform.startswith("linux") else None
    if prctl is None:
        return False
    pr_set_pdeathsig = 1
    return bool(prctl(pr_set_pdeathsig, int(number)) == 0)


class StopSignal:
    """Remembers the first stop signal; a second Ctrl-C acts at once. The handler only sets a field."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[int, Any] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listens while the block runs; within another such block of its own it changes nothing."""
        if self._before or threading.current_thread() is not threading.main_thread():
            yield
            return
        names = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")  # the last from a terminal that is closed
        wanted = [getattr(signal, name) for name in names if hasattr(signal, name)]
        wanted = [number for number in wanted if signal.getsignal(number) is not signal.SIG_IGN]  # as under nohup
        self._before = {number: signal.signal(number, self._handle) for number in wanted}
        try:
            yield
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before = {}

    def _handle(self, number: int, frame: Any) -> None:
        self.received = self.received or signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])


def is_main_process() -> bool:
    """Whether this is the process that writes; the only one outside of a group."""
    return num_processes() == 1 or dist.get_rank() == 0


def num_processes() -> int:
    """Processes of the group; 1 outside of one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def decide(work: Callable[[], T]) -> T:
    """Runs `work` on the main process alone; what it returns, or the error that it raises, comes out on all processes.

    Exactly: as an object, not as numbers of some precision. An error that cannot be told as it is becomes a
    `RuntimeError` of the same words.
    """
    if num_processes() == 1:
        return work()
    told: list[Any] = [None]
    if is_main_process():
        try:
            told = [(work(), None)]
        except Exception as error:  # whatever it is, all processes are to raise it
            told = [(None, error if is_portable(error) else RuntimeError(f"{type(error).__name__}: {error}"))]
    broadcast_object_list(told)
    value, problem = told[0]
    if problem is not None:
        raise problem
    return value  # type: ignore[no-any-return]


def is_portable(error: Exception) -> bool:
    """Whether an error can be told to another process as it is."""
    try:
        return str(pickle.loads(pickle.dumps(error))) == str(error)
    except Exception:  # pickling runs what the class of the error says
        return False


def any_process(claim: bool) -> bool:
    """Whether it holds on any process; all of them must ask together."""
    return claim if num_processes() == 1 else any(gather_object([claim]))


def leave_group() -> None:
    """Closes the process group, without which the end of a process may abort it."""
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # a DistributedDataParallel that outlives its group may abort the process too
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def check_agreement(values: dict[str, Any], remedy: str) -> None:
    """Stops where processes disagree on what must be one.

    Args:
        values: What this process has, by name; the same names on all.
        remedy: What to do about it, the end of the sentence.

    Raises:
        InputError: On all processes, if one of them has something else than the main one.
    """
    if num_processes() == 1:
        return
    found = gather_object([(socket.gethostname(), values)])
    for rank, (host, other) in enumerate(found):
        for name, value in found[0][1].items():
            if other.get(name) != value:
                odd, main = f"Process {rank} on {host}", f"process 0 on {found[0][0]}"
                raise InputError(f"{odd} has {name} {other.get(name)}, {main} {value}: {remedy}")
