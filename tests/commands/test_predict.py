import errno
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from matchai.predict import main
from matchai.prediction import pipeline
from matchai.system.console import Display
from tests.kept import keep_weights


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    np.save(tmp_path / "scan.npy", np.random.default_rng(0).uniform(-1000, 400, (1, 512, 512, 1)).astype(np.float32))
    return tmp_path / "scan.npy"


def test_help_imports_neither_torch_nor_numpy() -> None:
    code = "import sys; from matchai.predict import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([name for name in ('torch', 'numpy') if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "--uncertainty" in out.stdout
    assert out.stdout.strip().endswith("[]")


def test_the_command_writes_masks_and_the_submission(tmp_path: Path, scan: Path) -> None:
    run = keep_weights(tmp_path / "run")
    submission = tmp_path / "submission.csv"
    assert main([str(run), str(scan), "--output", str(tmp_path / "out"), "--submission", str(submission)]) == 0
    mask = np.load(tmp_path / "out" / "scan_mask.npy")[..., 0]
    predicted = np.loadtxt(submission, delimiter=",", skiprows=1, usecols=1, dtype=np.int64)
    assert np.array_equal(predicted.reshape(1, 512, 512, 2), np.stack([mask == 0, mask == 1], axis=-1))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["missing.npy"], "missing.npy does not exist"),
        ([], "No input was given"),
        (["note.txt"], "of no kind that is known here"),
        (["photo.jpg"], "a JPEG, whose compression has lost HU"),
        (["note.txt", "--batch-size=0"], "batch_size is 0, but must be at least 1"),
        (["note.txt", "--rescale", "0", "5"], "rescale is 0 5, but needs a slope other than 0"),
    ],
)
def test_a_users_mistake_is_one_sentence_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    run = keep_weights(tmp_path / "run")
    for name in ("note.txt", "photo.jpg"):
        (tmp_path / name).write_text("x")
    assert (
        main(
            [
                str(run),
                *(str(tmp_path / word) if "." in word else word for word in words),
                "--output",
                str(tmp_path / "out"),
            ]
        )
        == 2
    )
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert told in lines[0]


def test_a_submission_that_is_there_already_is_left_alone(tmp_path: Path, scan: Path) -> None:
    run = keep_weights(tmp_path / "run")
    (tmp_path / "mine.csv").write_text("mine")
    words = [str(run), str(scan), "--output", str(tmp_path / "out"), "--submission", str(tmp_path / "mine.csv")]
    assert main(words) == 2
    assert (tmp_path / "mine.csv").read_text() == "mine"


def test_a_submission_may_go_into_the_new_folder_of_the_results(tmp_path: Path, scan: Path) -> None:
    words = [str(keep_weights(tmp_path / "run")), str(scan), "--output", str(tmp_path / "out")]
    assert main([*words, "--submission", str(tmp_path / "out" / "mine.csv")]) == 0
    assert (tmp_path / "out" / "mine.csv").exists()


def test_an_output_that_cannot_be_made_is_one_sentence(
    tmp_path: Path, scan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(keep_weights(tmp_path / "run")), str(scan), "--output", str(scan / "out")]) == 2
    assert capsys.readouterr().err == f"error: {scan}/out cannot be written (Not a directory); name another folder " + (
        "with --output.\n"
    )


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 2, "was not predicted to its end (No space left on device)"),
        (KeyboardInterrupt(), 130, "Stopped by Ctrl-C. What was done so far is in"),
    ],
)
def test_a_prediction_that_is_broken_off_says_what_is_there_and_leaves_no_bar(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    status: int,
    told: str,
) -> None:
    closed = []
    monkeypatch.setattr(Display, "close", lambda _: closed.append(True))
    monkeypatch.setattr(pipeline, "predict_volume", Mock(side_effect=error))
    np.save(tmp_path / "scan.npy", np.random.default_rng(0).uniform(-1000, 400, (1, 32, 32)))
    words = [str(keep_weights(tmp_path / "run")), str(tmp_path / "scan.npy"), "--output", str(tmp_path / "out")]
    assert main(words) == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert told in lines[0]
    assert closed


def test_a_folder_at_home_is_meant_where_the_shell_leaves_the_tilde(
    tmp_path: Path, scan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    keep_weights(tmp_path / "run")
    assert main(["~/run", f"~/{scan.name}", "--output=~/out"]) == 0
    assert (tmp_path / "out" / "summary.json").exists()


def test_a_name_that_is_no_utf_8_is_predicted_and_shown_with_replacement_characters(
    tmp_path: Path, scan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = keep_weights(tmp_path / "run")
    odd = scan.rename(tmp_path / os.fsdecode(b"M\xfcller scan.npy"))
    assert main([str(run), str(odd), "--output", str(tmp_path / "out"), "--probabilities"]) == 0
    assert b"M\xfcller scan_mask.npy" in [os.fsencode(path.name) for path in (tmp_path / "out").iterdir()]
    assert "M\ufffdller scan: " in capsys.readouterr().out
    assert "M\ufffdller scan" in (tmp_path / "out" / "summary.json").read_text(encoding="utf-8")


def test_a_full_disk_leaves_what_was_found_on_the_screen(
    tmp_path: Path, scan: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = keep_weights(tmp_path / "run")
    monkeypatch.setattr(pipeline, "_write", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    assert main([str(run), str(scan), "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert "of the lung affected" in said.out
    assert "error: Not all could be written (No space left on device)" in said.err
