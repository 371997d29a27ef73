"""From what ends a command to one sentence and an exit status: the one place where that is decided."""

import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from matchai.system.errors import FailedError, InputError
from matchai.system.output import safe_output

FAILED, MISTAKE, INTERRUPTED = 1, 2, 130
"""Exit statuses: the work failed, the user's mistake, Ctrl-C."""

_MORE_MEMORY = "A batch needs more memory than there is; give a smaller --batch-size."


def run_command(work: Callable[[], int], left: str = "Nothing was written.", memory: str = _MORE_MEMORY) -> int:
    """Runs a command, and prints a sentence for each problem that ends it; a fault in the program is raised.

    Args:
        work: Returns the exit status.
        left: What an early end leaves behind, a sentence.
        memory: What to do where the memory is too small, a sentence.

    Returns:
        The exit status: that of `work`, `FAILED`, `MISTAKE` or `INTERRUPTED`.
    """
    with safe_output(), _noting_interrupt() as interrupts:
        try:
            return _run(work, left, memory)
        except Exception:
            # a library that was interrupted amid its imports may tell it as an error of its own
            if not interrupts:
                raise
            return _end_interrupted(left)


@contextmanager
def _noting_interrupt() -> Iterator[list[int]]:
    """Notes Ctrl-C while the block runs, and lets it act as ever."""
    noted: list[int] = []
    is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not is_usual or threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def handle(number: int, frame: Any) -> None:
        noted.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, handle)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end_interrupted(left: str) -> int:
    print(f"Stopped by Ctrl-C. {left}", file=sys.stderr)
    return INTERRUPTED


def _run(work: Callable[[], int], left: str, memory: str) -> int:
    try:
        return work()
    except InputError as error:
        return _end(error.problems, MISTAKE)
    except FailedError as error:
        return _end([str(error)], FAILED)
    except RuntimeError as error:
        return _end([_explain(error, left, memory)], FAILED)
    except OSError as error:
        what = f"{error.filename} cannot" if error.filename is not None else "A file cannot"
        return _end([f"{what} be read or written ({error.strerror or error}). {left}"], FAILED)
    except KeyboardInterrupt:
        return _end_interrupted(left)
    finally:
        distributed = sys.modules.get("torch.distributed")  # half of it, where its import was interrupted
        if distributed is not None and getattr(distributed, "is_initialized", bool)():
            from matchai.system.processes import leave_group  # noqa: PLC0415 as torch is loaded by now

            leave_group()


def print_problems(problems: Iterable[str]) -> None:
    """Prints the sentences of `problems` to stderr as errors."""
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)


def _end(problems: Iterable[str], status: int) -> int:
    print_problems(problems)
    return status


def _explain(error: RuntimeError, left: str, memory: str) -> str:
    """The sentence for an error of torch's that is no fault in the program; raises any other."""
    # they need torch, which raised the error
    from matchai.system.failures import (  # noqa: PLC0415
        device_message,
        is_dead_loader,
        is_lost_process,
        is_out_of_memory,
        lost_process_message,
    )

    if is_out_of_memory(error):
        return memory
    if is_lost_process(error):
        return lost_process_message()
    if (told := device_message(error)) is not None:
        return f"{told} {left}"
    if is_dead_loader(error):
        return (
            "A loader process died or found no room in shared memory, as when memory or /dev/shm is full; free memory, "
            "enlarge /dev/shm (docker run --shm-size 8g), or give a smaller --num-workers; 0 needs none of it. " + left
        )
    raise error
