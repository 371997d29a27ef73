"""Output that cannot be written never ends the work."""

import io
import os
import subprocess
import sys
from typing import Any

import pytest

from matchai.system.console import Display
from matchai.system.output import SafeStream, printable, safe_output

TEXT = "epoch 1 \u00b7 M\udcfcller"


class Failing(io.StringIO):
    """A stream that fails from its second write on."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error, self.num_writes = error, 0

    def write(self, text: str) -> int:
        self.num_writes += 1
        if self.num_writes > 1:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [("ascii", b"epoch 1 ? M?ller"), ("iso8859-2", b"epoch 1 ? M?ller"), ("utf-8", "epoch 1 · M\ufffdller".encode())],
)
def test_characters_that_an_encoding_lacks_are_replaced(encoding: str, expected: bytes) -> None:
    below = io.BytesIO()
    stream = io.TextIOWrapper(below, encoding)
    SafeStream(lambda: stream, "Output", is_own=False).write(TEXT)
    stream.flush()
    assert below.getvalue() == expected


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("I/O operation on closed file")])
def test_a_stream_that_fails_is_dropped_with_one_word(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    below = Failing(error)
    stream = SafeStream(lambda: below, "Output", is_own=False)
    for _ in range(5):
        assert stream.write("line\n") == 5
        stream.flush()
    assert below.getvalue() == "line\n"
    assert below.num_writes == 2
    assert capsys.readouterr().err.count("Output cannot be written any more") == 1


def test_a_reader_that_goes_is_told_only_when_more_comes(capsys: pytest.CaptureFixture[str]) -> None:
    below = Failing(BrokenPipeError(32, "Broken pipe"))
    stream = SafeStream(lambda: below, "Output", is_own=False)
    stream.write("a")
    stream.write("b")
    assert capsys.readouterr().err == ""
    stream.write("c")
    assert "Output cannot be written any more (Broken pipe)" in capsys.readouterr().err


def test_no_stream_at_all_is_no_problem() -> None:
    SafeStream(lambda: None, "Output", is_own=False).write("a")


def test_streams_are_as_they_were_after_a_command() -> None:
    before = sys.stdout, sys.stderr
    with safe_output():
        assert sys.stdout is not before[0]
    assert (sys.stdout, sys.stderr) == before


def test_a_display_writes_to_the_stream_of_the_moment(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(is_main_process=True)
    display.say("hello")
    assert capsys.readouterr().out == "hello\n"


def test_only_surrogates_are_replaced() -> None:
    assert printable("a\ud800b\udfffc\ud7ff\ue000") == "a\ufffdb\ufffdc\ud7ff\ue000"


SCRIPT = """
import os, sys
from matchai.system.command import run_command
def work():
    print("first", flush=True)
    print("last")
    return 7
sys.exit(run_command(work))
"""


@pytest.mark.parametrize(
    "redirection", [">/dev/full", ">&-", "| true", "2>&-", ">&- 2>&- <&-", "2>/dev/full >/dev/full"]
)
def test_a_command_keeps_its_status_whatever_becomes_of_its_output(redirection: str) -> None:
    if "/dev/full" in redirection and not os.path.exists("/dev/full"):  # noqa: PTH110
        pytest.skip("this system has no /dev/full")
    shell = f'set -o pipefail; "$0" -c "$1" {redirection}'
    done: Any = subprocess.run(
        ["bash", "-c", shell, sys.executable, SCRIPT], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 7
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
