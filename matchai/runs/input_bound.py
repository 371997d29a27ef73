"""What a user should do where steps wait for their data."""

import math

from matchai.system import num_cores

MOST = 0.05  # share of the steps' time; more is worth a word


class InputBoundMonitor:
    """Watches the epochs of a run, and advises once.

    Args:
        num_workers: Loader processes of each training process.
        num_local_processes: Training processes of this host.
    """

    def __init__(self, num_workers: int, num_local_processes: int) -> None:
        self.num_workers, self.num_local_processes = num_workers, num_local_processes
        self.started: tuple[float, float] | None = None
        self.has_advised = False

    def after_step(self, seconds: float, waited: float) -> None:
        """Takes the epoch's seconds so far, and those waited; what stands at the first step of all is left out.

        That step waits for workers to start and files to be opened, and its kernels are made.
        """
        if self.started is None:
            self.started = seconds, waited

    def after_epoch(self, seconds: float, waited: float) -> str | None:
        """The advice, if there is any and it was not given yet."""
        before = self.started or (0.0, 0.0)
        self.started = 0.0, 0.0
        share = (waited - before[1]) / max(seconds - before[0], 1e-9)
        advice = None if self.has_advised else loading_advice(share, self.num_workers, self.num_local_processes)
        self.has_advised |= advice is not None
        return advice


def loading_advice(share: float, num_workers: int, num_local_processes: int) -> str | None:
    """What to do about steps that wait for their data, in a sentence; None where they hardly do.

    Args:
        share: Of the steps' time, spent waiting.
        num_workers: Loader processes of each training process.
        num_local_processes: Training processes of this host.
    """
    if share <= MOST:
        return None
    found = f"{share:.0%} of the steps' time was spent waiting for data"
    most = num_cores() // num_local_processes - 1  # one core is the training process's own
    if num_workers >= most:
        return (
            f"{found}, and no core is free to load more: a --cache on a fast local disk helps where reading is slow, "
            "fewer processes on this host or a cheaper augmentation (--affine 0 halves it) where computing is."
        )
    # workers that load in the time that the rest of a step takes
    need = (num_workers or share) / (1 - min(share, 0.99))
    number = min(most, max(num_workers + 1, math.ceil(need)))
    return f"{found}: load with --num-workers {number} (stop the run; the same command with it resumes from there)."
