"""Who works on what: claims on trials and confirming runs that end with the process that holds them.

On one host a claim is a lock of the system's, gone when its process dies, however it dies. Between hosts, which share
a server, it is a lease on progress: every worker writes down its steps, and one whose steps have stood still for
`LEASE` seconds, by the clock of the one who looks, is given up. No clocks of two hosts are compared, and a process that
hangs is found out like one that is gone, which no heartbeat of a thread could tell.
"""

import functools
import os
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import optuna

from matchai.study.storage import Store
from matchai.system import HostLocks, LockLostError, StoreError

LEASE = 300.0  # seconds without a step or a validation batch; slices are prepared before any claim
AVOID = 20.0  # seconds until something that could not be worked on is looked at again
RENEW_EVERY = 20.0  # seconds between two records of progress


Parameters = ParamSpec("Parameters")
T = TypeVar("T")


def retry_on_lost_lock(decide: Callable[Parameters, T]) -> Callable[Parameters, T]:
    """Makes a function that holds a lock of the store's begin again where the lock was lost with its connection."""

    @functools.wraps(decide)
    def repeat(*arguments: Parameters.args, **more: Parameters.kwargs) -> T:
        while True:
            try:
                return decide(*arguments, **more)
            except LockLostError:  # to hold the lock again waits for the server, for as long as the store is patient
                time.sleep(0.5)

    return repeat


class LostLeaseError(RuntimeError):
    """Another worker took over, as this one had seemed to stand still."""


class LostTrialError(LostLeaseError):
    """Another program ended or deleted the trial; one sentence."""


class Leases:
    """The claims of one worker in one study.

    `take`, `begin` and `is_mine` are to be called under the study's lock.

    Args:
        store: The study's store.
        study: The study.
        folder: Where this host's locks lie, a local one.
        file: The file of locks in it.
    """

    def __init__(self, store: Store, study: optuna.Study, folder: Path, file: str) -> None:
        self.store, self.study = store, study
        self.locks = HostLocks(folder, file)
        at = folder.stat()
        self.place = f"{socket.gethostname()}:{at.st_dev}:{at.st_ino}"
        self.token = uuid.uuid4().hex
        self._seen: dict[str, tuple[Any, float]] = {}
        self._renewed: dict[str, float] = {}
        self._avoided: dict[str, float] = {}

    def take(self, key: str) -> bool:
        """Takes `key` unless a living worker holds it, or it is avoided; returns whether it is held now."""
        if time.monotonic() < self._avoided.get(key, 0.0):
            return False
        owner = self._owner(key)
        if owner is not None and owner["place"] != self.place:
            mark = (owner["token"], owner["progress"])
            if self._seen.get(key, (None, 0.0))[0] != mark:
                self._seen[key] = (mark, time.monotonic())
            if time.monotonic() - self._seen[key][1] < LEASE:
                return False
        return self.begin(key)

    def begin(self, key: str) -> bool:
        """Takes `key`, which nobody on another host holds."""
        if not self.locks.take(key):
            return False
        try:
            with self.store.locked(key):
                self._write(key, 0)
        except StoreError:
            self.locks.drop(key)  # else this very process could not take it again
            raise
        return True

    @retry_on_lost_lock
    def renew(self, key: str, step: int) -> None:
        """Writes down that the work has come to `step`, as long as it is still this worker's.

        To be called as often as one likes, without the lock.
        """
        if self.store.is_server and time.monotonic() - self._renewed.get(key, 0.0) > RENEW_EVERY:
            with self.store.locked(key):  # not the study's, under which others may be busy proposing
                if self.is_mine(key):
                    self._write(key, step)

    def is_mine(self, key: str) -> bool:
        """Whether this worker still holds `key`."""
        owner = self._owner(key)
        return owner is None or owner["token"] == self.token

    def avoid(self, key: str) -> None:
        """Lets go of `key`, and leaves it to others for a while."""
        self._avoided[key] = time.monotonic() + AVOID
        self.drop(key)

    def drop(self, key: str) -> None:
        """Lets go of `key`."""
        self.locks.drop(key)

    def _owner(self, key: str) -> dict[str, Any] | None:
        """Who wrote down last that it works on `key`; on one host the lock alone tells, and nothing is written."""
        owner: dict[str, Any] | None = self.study.user_attrs.get(f"owner {key}") if self.store.is_server else None
        return owner

    def _write(self, key: str, step: int) -> None:
        self._renewed[key] = time.monotonic()
        if self.store.is_server:
            owner = {"place": self.place, "token": self.token, "process": os.getpid(), "progress": step}
            self.store.set_attr(self.study, None, f"owner {key}", owner)
