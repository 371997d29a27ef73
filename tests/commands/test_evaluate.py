"""The command: quick help, and a user's mistake in one sentence."""

import subprocess
import sys
from pathlib import Path

import pytest

from matchai.evaluate import main


def test_help_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, contextlib\nfrom matchai.evaluate import main\nwith contextlib.suppress(SystemExit):\n"
        "    main(['--help'])\nassert not {'torch', 'numpy', 'monai'} & set(sys.modules), 'imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--surface-tolerance" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere", "--data", "."], "no matchai run"),
        ([".", "--surface-tolerance", "-1"], "surface_tolerance"),
        ([".", "--batch-size", "0"], "batch_size"),
    ],
    ids=["no run", "tolerance", "batch"],
)
def test_a_users_mistake_is_one_sentence_and_status_2(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert list(tmp_path.iterdir()) == []


def test_without_monai_distances_are_refused_where_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("monai", "monai.metrics"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main([str(tmp_path), "--surface", "yes"]) == 2
    assert 'pip install "matchai[evaluate]"' in capsys.readouterr().err


def test_without_monai_one_line_says_how_to_get_distances(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "monai", None)
    assert main([str(tmp_path)]) == 2  # no run
    assert 'pip install "matchai[evaluate]"' in capsys.readouterr().out
