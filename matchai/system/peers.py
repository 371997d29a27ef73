"""Processes of one group that lose each other: what really went wrong reaches all of them, and none waits for good."""

import contextlib
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from matchai.system.failures import is_lost_process, lost_process_message
from matchai.system.processes import is_portable, leave_group, num_processes

GRACE = 10.0  # seconds for a process to find by itself that it lost another


def share_error(error: Exception) -> Exception:
    """What really went wrong, where an error on one process of several leaves the others waiting for it in vain.

    The process that failed leaves its error in the group's store and the group itself, at which the others' exchanges
    fail at once; they find the error there. The group is left for good: the launch has to end. Alone, nothing happens.

    Returns:
        The error of the process that failed first, or `error` where none told one.
    """
    world = num_processes()
    if world == 1:
        return error
    store = dist.distributed_c10d._get_default_store()
    key, is_own = "matchai/error", not is_lost_process(error)
    shared: Exception = error
    with contextlib.suppress(RuntimeError):  # the store may be gone with the process that held it
        if is_own and store.compare_set(key, "", "told").decode() in ("", "told"):
            store.set(f"{key}/words", pickle.dumps(error if is_portable(error) else RuntimeError(str(error))).hex())
        leave_group()
        store.wait([f"{key}/words"], timedelta(seconds=10))
        shared = pickle.loads(bytes.fromhex(store.get(f"{key}/words").decode()))
        store.add(f"{key}/heard", 1)
        until = time.monotonic() + 10
        while store.add(f"{key}/heard", 0) < world and time.monotonic() < until:
            time.sleep(0.05)  # one of them may hold the store itself
    return shared


@contextmanager
def watching_peers(timeout: float, end: Callable[[], None] | None = None) -> Iterator[None]:
    """While the block runs, this process ends with a sentence when another of the group is lost.

    For exchanges by NCCL alone, whose waits never return to Python when a peer is gone: every process counts up in the
    group's store from a thread, and one whose count stands still for `timeout` seconds, or who has told an error
    (`share_error`), is lost. The process itself is given `GRACE` seconds to find that out and to end.

    Args:
        timeout: Seconds.
        end: What ends the process; without it, `os._exit`.
    """
    if num_processes() == 1 or (end is None and dist.get_backend() != "nccl"):
        yield
        return
    is_over = threading.Event()
    watch = threading.Thread(target=_watch, args=(timeout, is_over, end or (lambda: os._exit(1))), daemon=True)
    watch.start()
    try:
        yield
        with contextlib.suppress(RuntimeError):  # who ends first is not lost
            dist.distributed_c10d._get_default_store().set(f"matchai/over/{dist.get_rank()}", "yes")
    finally:
        is_over.set()
        watch.join()


def _watch(timeout: float, is_over: threading.Event, end: Callable[[], None]) -> None:
    store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    others = [other for other in range(dist.get_world_size()) if other != rank]
    seen = {other: (-1, time.monotonic()) for other in others}
    message = lost_process_message()
    while not is_over.wait(min(2.0, timeout / 4)):
        try:
            store.add(f"matchai/alive/{rank}", 1)
            for other in others:
                count = store.add(f"matchai/alive/{other}", 0)
                if count != seen[other][0] or store.check([f"matchai/over/{other}"]):
                    seen[other] = count, time.monotonic()
            is_lost = any(time.monotonic() - since > timeout for _, since in seen.values())
            is_lost = is_lost or store.check(["matchai/error/words"])
        except RuntimeError:  # the process that held the store is gone
            is_lost = True
        if is_lost and not is_over.wait(GRACE):
            print(f"error: {message}", file=sys.stderr, flush=True)
            end()
            return
