"""What matchai says to a user, above all to one who made a mistake."""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """A mistake of the user's, told before anything was written.

    Commands print it without a traceback and exit with status 2.

    Args:
        *problems: Whole sentences, one a problem: what was found, what was expected, where, and the next step.

    >>> InputError("Found 3 masks for 4 images.", "The folder is empty.").problems
    ('Found 3 masks for 4 images.', 'The folder is empty.')
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems

    def __reduce__(self) -> tuple[type["InputError"], tuple[str, ...]]:
        return type(self), self.problems  # else all would be one problem on the process that it is sent to


class Problems(list[str]):
    """Sentences of several mistakes, gathered so that the user hears of all of them at once.

    >>> problems = Problems()
    >>> for number in (1, -1, -2):
    ...     with problems.collect():
    ...         if number < 0:
    ...             raise InputError(f"{number} is below 0.")
    >>> problems
    ['-1 is below 0.', '-2 is below 0.']
    """

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Ends its block at an `InputError`, whose problems it adds; what follows the block is run."""
        try:
            yield
        except InputError as error:
            self.extend(error.problems)

    def raise_any(self) -> None:
        """Raises an `InputError` of all problems, if there are any."""
        if self:
            raise InputError(*self)


def plural(number: int, noun: str) -> str:
    """A number with its noun: `1 slice`, `2 slices`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


class FailedError(RuntimeError):
    """The work could not be done, for no mistake of the user's; one sentence. Commands exit with status 1."""


class StoreError(FailedError):
    """A study's store failed for another reason than being busy, or was busy for too long; one sentence."""


class StoppedError(StoreError):
    """Waiting for the store was given up, as `Store.should_stop` said so; nothing was written."""


class LockLostError(StoreError):
    """A server's connection broke while its lock was held; take the lock again and decide again."""
