"""The processes of a run: whether the launcher started what was asked for, and what happens when one is lost."""

import contextlib
import ctypes
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from matchai.errors import InputError

# what gloo, the store and torch's collectives say where another process does not answer any more
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Timed out waiting",
    "timed out",
    "Socket Timeout",
    "Read timeout",
    "Write timeout",
    "wait timeout",
    "Gloo",
    "gloo",
)


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


def check_launch(num_processes: int) -> None:
    """Refuses a launch that started other processes than the launcher was asked for.

    Args:
        num_processes: As Accelerate counts them.

    Raises:
        InputError: If the environment names more processes than have joined.
    """
    command = "ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes {} -m matchai.train"
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


def end_with_launcher() -> None:
    """Asks the kernel for a SIGTERM when the launcher dies, so that a killed launcher leaves no process training on.

    Linux only; elsewhere nothing happens.
    """
    if launcher() is None or not sys.platform.startswith("linux"):
        return
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        pr_set_pdeathsig = 1
        prctl(pr_set_pdeathsig, int(signal.SIGTERM))


def is_lost_process(error: BaseException) -> bool:
    """Whether an error means that another process of the group does not answer any more."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return False
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _LOST)


def lost_process_message() -> str:
    """One sentence for the process that lost another."""
    return (
        f"Process {dist.get_rank()} of {dist.get_world_size()} on {socket.gethostname()} lost another: it has ended, or "
        "did not answer within --collective-timeout. Nothing else is lost: the same command goes on from the last "
        "saved state, on as many processes as you like."
    )


def leave_group() -> None:
    """Closes the process group, without which the end of a process may abort it."""
    if dist.is_available() and dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def check_agreement(values: dict[str, Any], where: Path) -> None:
    """Refuses to go on where processes have found different things in what should be one folder.

    Args:
        values: What this process found.
        where: The folder.

    Raises:
        InputError: On all processes, if one of them found something else than the main one.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (socket.gethostname(), values))
    for rank, (host, other) in enumerate(found):
        for name, value in found[0][1].items():
            if other[name] != value:
                raise InputError(
                    f"Process {rank} on {host} finds {name} {other[name]}, process 0 on {found[0][0]} {value}: "
                    f"all hosts must see the same {where}; put it on storage that they share."
                )
