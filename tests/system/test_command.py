"""From what ends a command to a sentence and an exit status."""

import errno
import subprocess
import sys
from typing import Any

import pytest

from matchai.system.command import run_command
from matchai.system.errors import FailedError, InputError, StoreError


def ending_in(error: BaseException) -> Any:
    def work() -> int:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (InputError("One.", "Two."), 2, "error: One.\nerror: Two.\n"),
        (FailedError("It differs."), 1, "error: It differs.\n"),
        (StoreError("The store is busy."), 1, "error: The store is busy.\n"),
        (
            PermissionError(errno.EACCES, "Permission denied", "scan.npy"),
            1,
            "error: scan.npy cannot be read or written (Permission denied). All is kept.\n",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            1,
            "error: A file cannot be read or written (No space left on device). All is kept.\n",
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate"), 1, "error: Take less.\n"),
        (KeyboardInterrupt(), 130, "Stopped by Ctrl-C. All is kept.\n"),
    ],
)
def test_what_ends_a_command_is_told_in_sentences_with_a_status(
    error: BaseException, status: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(ending_in(error), left="All is kept.", memory="Take less.") == status
    assert capsys.readouterr().err == told


def test_a_fault_in_the_program_is_raised() -> None:
    with pytest.raises(RuntimeError, match="a fault"):
        run_command(ending_in(RuntimeError("a fault")))


def test_the_status_is_that_of_the_work() -> None:
    assert run_command(lambda: 7) == 7


@pytest.mark.parametrize(
    "words",
    [
        "DataLoader worker (pid 7) is killed by signal: Killed.",
        "DataLoader worker (pid(s) 7, 8) exited unexpectedly",
        "unable to write to file </torch_7_1>: No space left on device (28)",
        "unable to allocate shared memory(shm) for file </torch_7>: Resource temporarily unavailable (11)",
    ],
)
def test_a_loader_process_that_died_is_told_with_memory_and_the_flag(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(ending_in(RuntimeError(words)), left="All is kept.") == 1
    told = capsys.readouterr().err
    assert told.startswith("error: A loader process died")
    assert "memory" in told
    assert "--num-workers" in told
    assert told.endswith("All is kept.\n")


def test_an_interrupt_amid_an_import_ends_a_command_as_ctrl_c_does() -> None:
    """Libraries turn it into errors of their own, and leave half-loaded modules behind."""
    script = (
        "import os, signal, sys, types\n"
        "from matchai.system.command import run_command\n"
        "def work():\n"
        "    sys.modules['torch.distributed'] = types.ModuleType('torch.distributed')\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    except KeyboardInterrupt:\n"
        "        raise ImportError('cannot import name x from partially initialized module') from None\n"
        "sys.exit(run_command(work, left='All is kept.'))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 130
    assert done.stderr == "Stopped by Ctrl-C. All is kept.\n"
