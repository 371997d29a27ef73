"""The command that makes a run's report."""

import subprocess
import sys
from pathlib import Path

import pytest

from matchai.report import main
from tests.kept import keep_run
from tests.runs.test_report_page import GROUPS, good_counts


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return keep_run(tmp_path / "run", good_counts(), GROUPS)


def test_it_makes_page_and_card_and_says_where(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert main([str(run)]) == 0
        assert capsys.readouterr().out.splitlines() == [
            f"Report: {run / 'report.html'}",
            f"Model card: {run / 'MODEL_CARD.md'}",
        ]
    assert (run / "report.html").read_text().startswith("<!doctype html>")


def test_another_file_is_written_once_and_the_run_is_left(run: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    page = tmp_path / "other" / "page.html"
    assert main([str(run), "--output", str(page)]) == 0
    assert {path.name for path in page.parent.iterdir()} == {"page.html", "MODEL_CARD.md"}
    assert not (run / "report.html").exists()
    assert main([str(run), "--output", str(page)]) == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["missing"], "missing is no folder"),
        (["."], "holds no config.yaml, so it is no matchai run"),
        (["run", "--output", "missing/page.html"], "missing is no folder; make it first"),
        (["run", "--output", "taken.html"], "taken.html is there already"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(
    arguments: list[str],
    told: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.html").write_text("mine")
    assert main(arguments) == 2
    assert told in capsys.readouterr().err
    assert (tmp_path / "taken.html").read_text() == "mine"
    assert not (run / "report.html").exists()


def test_help_needs_no_torch() -> None:
    code = "import sys, matchai.report as r\ntry: r.main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "False"
