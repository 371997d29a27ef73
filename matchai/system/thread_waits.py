"""What must be chosen before torch is loaded, where the user has not chosen it."""

import os

from matchai.system.errors import InputError

# Turns of an idle OpenMP thread's waiting loop before it sleeps: about 0.1 ms on the measured CPU, where waking one
# takes 0.08 ms and a step has thousands of parallel loops. Asleep at once (OMP_WAIT_POLICY=PASSIVE), a step at 128²
# takes twice as long; libgomp's own 300,000 turns, in which nothing else can run, were seen to make it 17 times as long
# beside another busy process.
SPIN_COUNT = 20_000

_CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


_READ_AT_IMPORT = {
    "ACCELERATE_LOG_LEVEL": ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
    "TORCH_DISTRIBUTED_DEBUG": ("OFF", "INFO", "DETAIL"),
}
"""Settings by which a library refuses to be imported, with a traceback, and what they may be."""


def choose_waiting() -> None:
    """Lets idle OpenMP threads wait as long as waking them takes; libgomp reads it when torch is loaded.

    Raises:
        InputError: For settings in the environment by which torch or Accelerate would refuse to be loaded.
    """
    wrong = [
        name for name, allowed in _READ_AT_IMPORT.items() if (os.environ.get(name) or allowed[0]).upper() not in allowed
    ]
    if wrong:
        raise InputError(
            *(
                f"{name} is {os.environ[name]}, but must be one of {', '.join(_READ_AT_IMPORT[name])}: `unset {name}`."
                for name in wrong
            )
        )
    if not any(name in os.environ for name in _CHOICES):
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


def refuse_launch(program: str) -> None:
    """Refuses to be one of several processes, which would all write the same files.

    Args:
        program: How the user called it, such as `python -m matchai.predict`.

    Raises:
        InputError: If a launcher started several; its message is empty but in the first of them.
    """
    num_processes, rank = os.environ.get("WORLD_SIZE") or "1", os.environ.get("RANK") or "0"
    if num_processes == "1":
        return
    problem = f"A launcher started {num_processes} processes, but this works in one; start it as `{program} ...`."
    raise InputError(*([problem] if rank == "0" else []))
