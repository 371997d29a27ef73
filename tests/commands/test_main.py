"""The commands under one name."""

import importlib
import inspect
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from matchai.__main__ import COMMANDS, main


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_of_the_table_is_there(name: str) -> None:
    parameters = inspect.signature(importlib.import_module(f"matchai.{name}").main).parameters
    assert list(parameters) == ["argv", "prog"]
    assert parameters["argv"].default is None
    assert parameters["prog"].default == f"python -m matchai.{name}"


def test_a_command_gets_the_words_after_it_and_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []

    def import_module(name: str) -> Any:
        def command(argv: list[str], prog: str) -> int:
            called.append((name, argv, prog))
            return 7

        return SimpleNamespace(main=command)

    monkeypatch.setattr(importlib, "import_module", import_module)
    assert main(["train", "--epochs", "3"]) == 7
    assert called == [("matchai.train", ["--epochs", "3"], "matchai train")]


@pytest.mark.parametrize("words", [["--help"], ["-h"], []])
def test_help_lists_every_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == (0 if words else 2)
    said = capsys.readouterr().out
    assert all(f"  {name} " in said and does in said for name, does in COMMANDS.items())


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_needs_no_torch(words: list[str]) -> None:
    script = "import sys\nfrom matchai.__main__ import main\ntry:\n    main(sys.argv[1:])\nfinally:\n"
    script += "    print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert f"usage: matchai {'COMMAND' if len(words) == 1 else words[0]}" in done.stdout


def test_an_unknown_command_is_told_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("matchai ")
