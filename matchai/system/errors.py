"""What matchai says to a user who made a mistake."""


class InputError(ValueError):
    """A mistake of the user's, told before anything was written.

    Commands print it without a traceback and exit with status 2.

    Args:
        *problems: Whole sentences, one a problem: what was found, what was expected, where, and the next step.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class FailedError(RuntimeError):
    """The work could not be done, for no mistake of the user's; one sentence. Commands exit with status 1."""


class StoreError(FailedError):
    """A study's store failed for another reason than being busy, or was busy for too long; one sentence."""


class StoppedError(StoreError):
    """Waiting for the store was given up, as `Store.should_stop` said so; nothing was written."""


class LockLostError(StoreError):
    """A server's connection broke while its lock was held; take the lock again and decide anew."""
