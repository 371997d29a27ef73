"""Standard output and error that never end the work: what is shown does not decide over what is kept."""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import IO, Any, TextIO, cast

_SURROGATES = re.compile("[\ud800-\udfff]")
"""What Python reads for bytes of a file's name that are no UTF-8."""


def printable(text: str) -> str:
    """Text that every UTF-8 file takes: replacement characters stand for bytes of file names that are no UTF-8."""
    return _SURROGATES.sub("\ufffd", text)


class SafeStream:
    """A text stream whose failures are told once, on standard error, and else do not matter.

    Characters that its encoding lacks are replaced. Once it cannot be written (its reader has gone, the disk is full),
    everything is dropped.

    Args:
        find: Gives the stream, which may change; None where there is none.
        name: For the word on its failure; None for no word.
        is_own: Whether the descriptor below is this program's to redirect once it fails: else what is buffered fails
            again when the program ends.
    """

    def __init__(self, find: Callable[[], TextIO | None], name: str | None, *, is_own: bool) -> None:
        self._find, self._name, self._is_own = find, name, is_own
        self._is_dropped, self._reason = False, None  # type: bool, str | None

    def write(self, text: str) -> int:
        """Writes, or drops, text; returns its length."""
        self._tell()

        def put(stream: TextIO) -> None:
            shown = printable(text)
            try:
                stream.write(shown)
            except UnicodeEncodeError:
                encoding = stream.encoding or "ascii"
                stream.write(shown.encode(encoding, "replace").decode(encoding))

        self._try(put)
        return len(text)

    def flush(self) -> None:
        """Flushes what is buffered."""
        self._try(lambda stream: stream.flush())

    def __getattr__(self, name: str) -> Any:
        if name == "rich_proxied_file":  # it would lead rich past this object
            raise AttributeError(name)
        return getattr(self._find(), name)

    def _try(self, work: Callable[[TextIO], object]) -> None:
        stream = self._find()
        if stream is None or self._is_dropped:
            return
        try:
            work(stream)
        except (OSError, ValueError) as error:  # a ValueError of a closed stream
            self._is_dropped = True
            if self._is_own:
                with contextlib.suppress(OSError, ValueError):
                    _lead_nowhere(stream.fileno())
            self._reason = str((error.strerror if isinstance(error, OSError) else None) or error)
            if not isinstance(error, BrokenPipeError):  # a reader that has seen enough misses nothing until more comes
                self._tell()

    def _tell(self) -> None:
        if self._reason is None or self._name is None or sys.stderr is None:
            return
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"{self._name} cannot be written any more ({self._reason}); the work continues.\n")
            sys.stderr.flush()
        self._name = None


def safe_stdout() -> IO[str]:
    """Standard output as it is at each write, for a console that must not fail."""
    return cast(IO[str], SafeStream(lambda: _unwrapped(sys.stdout), "Standard output", is_own=False))


@contextlib.contextmanager
def safe_output() -> Iterator[None]:
    """While the block runs, nothing that is written to standard output or error raises."""
    for descriptor in (0, 1, 2):  # a file that takes the place of a closed one would get what libraries print
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    sys.stdout = cast(Any, SafeStream(lambda: before[0], "Standard output", is_own=True))
    sys.stderr = cast(Any, SafeStream(lambda: before[1], None, is_own=True))
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _unwrapped(stream: TextIO | None) -> TextIO | None:
    """The stream behind the one that rich puts in its place while it shows something that moves."""
    return getattr(stream, "rich_proxied_file", stream)


def _lead_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
