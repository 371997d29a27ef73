"""What an error of torch's, or of the libraries below it, means for the user: which it is, and in which words."""

import socket

import torch
import torch.distributed as dist

# torch's words for it, the CPU's allocator's, and those of CUDA's libraries
_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed", "allocation_failed")
# torch's words where a worker of a DataLoader was killed, or a batch did not fit into shared memory
_DEAD_LOADER = ("dataloader worker", "/torch_", "unable to allocate shared memory", "shm_open", "bus error")
# what gloo and the store say, among other words, where another process does not answer any more
_LOST = ("gloo", "connection", "pair closure", "broken pipe", "socket", "timed out", "timeout")
# and what NCCL says then; its general word for a failed call of the system names sockets, too
_LOST_BY_NCCL = ("remote process exited", "ncclremoteerror", "timeout", "timed out", "watchdog", "aborted")

_NCCL_REMEDIES = {
    "duplicate gpu": "two processes use one GPU: start at most as many processes as there are GPUs (--num_processes)",
    "shared memory": "/dev/shm is too small: give the container more (docker run --shm-size 2g)",
    "/dev/shm": "/dev/shm is too small: give the container more (docker run --shm-size 2g)",
    "no space left": "/dev/shm is full: give the container more (docker run --shm-size 2g)",
    "invalid device": "the processes see fewer GPUs than they were started for: check CUDA_VISIBLE_DEVICES",
}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the host, has no more memory to give."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in said for words in _NO_MEMORY)
    )


def is_dead_loader(error: BaseException) -> bool:
    """Whether an error says that a process which loads slices died, or had no room for a batch in shared memory."""
    said = str(error).lower()
    return isinstance(error, RuntimeError) and not _is_nccl(said) and any(words in said for words in _DEAD_LOADER)


def is_lost_process(error: BaseException) -> bool:
    """Whether an error means that another process of the group does not answer any more."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1 or is_out_of_memory(error):
        return False
    said = str(error).lower()
    if _is_nccl(said):
        return any(words in said for words in _LOST_BY_NCCL)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(words in said for words in _LOST)
    )


def lost_process_message() -> str:
    """One sentence for the process that lost another."""
    return (
        f"Process {dist.get_rank()} of {dist.get_world_size()} on {socket.gethostname()} lost another: it has ended or "
        "did not answer within --collective-timeout. Nothing else is lost: the same command resumes from the last "
        "saved state, on as many processes as you like."
    )


def is_sticky(error: BaseException) -> bool:
    """Whether a GPU answers this process with the same error from now on, whatever it asks (CUDA's sticky errors)."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)


def device_message(error: BaseException) -> str | None:
    """One sentence for what NCCL, or a GPU, cannot do here, in its own words; None for any other error."""
    said = str(error)
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if _is_nccl(said.lower()):
        found = next((remedy for words, remedy in _NCCL_REMEDIES.items() if words in said.lower()), None)
        way = found or "NCCL_DEBUG=WARN shows more, and NCCL_SOCKET_IFNAME names the network between hosts"
        return f"NCCL, by which GPUs exchange numbers, failed: {lines[-1].rstrip('.')}. {way[0].upper()}{way[1:]}."
    if "no kernel image is available" in said:
        return (
            "This torch has no code for this GPU (no kernel image is available); install a torch for it, see "
            "pytorch.org, or train on the CPU with ACCELERATE_USE_CPU=1."
        )
    return None


def _is_nccl(said: str) -> bool:
    return "nccl" in said
