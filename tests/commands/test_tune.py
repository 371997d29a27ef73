"""The command, end to end, as a user types it, over real runs."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest

from matchai.tune import main
from tests.conftest import train

TIMES = ("seconds", "images_per_second", "data_wait_share")


def tune(*arguments: str, folder: Path, timeout: float = 250, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m matchai.tune` in a folder."""
    return subprocess.run(
        [sys.executable, "-m", "matchai.tune", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd=folder,
        env={**os.environ, **environment},
    )


def small(phantom: Path, cache: Path, *more: str) -> list[str]:
    """Flags of a study of seconds, in the folder where it is started."""
    return [
        *("--preset", "study", "--data", str(phantom), "--cache", str(cache), "--image-size", "64"),
        *("--encoder", "tu-test_efficientnet", "--epochs", "2", "--trials", "3", "--confirm", "1", *more),
    ]


def table(folder: Path, name: str = "study") -> list[Any]:
    trials = optuna.load_study(study_name=name, storage=f"sqlite:///{folder}/studies/matchai.db").get_trials()
    return [(row.number, row.state.name, row.values, row.params, row.intermediate_values) for row in trials]


def history(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in lines]


@pytest.fixture(scope="module")
def finished(phantom: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished study of three trials, with what it said."""
    folder = tmp_path_factory.mktemp("finished")
    done = tune(*small(phantom, cache), folder=folder)
    assert done.returncode == 0, done.stderr
    (folder / "said.txt").write_text(done.stdout)
    return folder


def test_a_study_says_what_it_does_and_what_it_found(finished: Path) -> None:
    lines = (finished / "said.txt").read_text().splitlines()
    assert lines[0].startswith("matchai: a study of preset study on ")
    assert "mean_dice of its best epoch" in lines[1]
    assert any(line.startswith("trial 0: complete") for line in lines)
    assert any("fresh seed 3" in line for line in lines)
    assert any("confidence" in line or "interval" in line for line in lines)
    assert any(line.startswith("Train it: accelerate launch") for line in lines)


def test_a_trial_is_an_ordinary_run_whose_history_is_the_curve(finished: Path) -> None:
    study = finished / "studies" / "study"
    for number, state, values, _, curve in table(finished):
        run = study / "trials" / f"{number:04d}"
        assert {"config.yaml", "split.json", "history.jsonl"} <= {path.name for path in run.iterdir()}
        rows = history(run)
        assert curve == {row["epoch"]: row["mean_dice"] for row in rows}
        if state == "COMPLETE":
            assert values == [max(row["mean_dice"] for row in rows)]


@pytest.mark.timeout(120)
def test_the_answer_is_trained_by_the_command_that_is_told(finished: Path) -> None:
    best = finished / "studies" / "study" / "best.yaml"
    done = subprocess.run(
        [sys.executable, "-m", "matchai.train", "--config", str(best)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=finished,
    )
    assert done.returncode == 0, done.stderr
    again = history(finished / "runs" / "study-best")
    trials = sorted((finished / "studies" / "study" / "trials").glob("0???/history.jsonl"))
    assert again in [history(file.parent) for file in trials]


def test_the_report_is_one_file_with_its_pictures_inside(finished: Path) -> None:
    study = finished / "studies" / "study"
    page = (study / "report.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert (study / "figures" / "learning_curves.png").is_file()


def test_a_report_is_drawn_of_a_study_as_it_stands(
    finished: Path, phantom: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(finished)
    before = table(finished)
    page = finished / "studies" / "study" / "report.html"
    page.unlink()
    assert main([*small(phantom, cache), "--report"]) == 0
    assert "report.html" in capsys.readouterr().out
    assert page.is_file()
    assert table(finished) == before
    assert main([*small(phantom, cache), "--report", "--study-name", "other"]) == 2
    assert "no study other" in capsys.readouterr().err


@pytest.mark.timeout(200)
def test_killed_in_the_middle_of_a_trial_a_study_ends_as_an_uninterrupted_one(
    finished: Path, phantom: Path, cache: Path, tmp_path: Path
) -> None:
    arguments = small(phantom, cache, "--save-every", "3", "--confirm", "0")
    command = [sys.executable, "-m", "matchai.tune", *arguments]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    last = tmp_path / "studies" / "study" / "trials" / "0001" / "last"
    while not any(int(path.name[-6:]) >= 3 for path in last.glob("state-??????")):  # in its second epoch
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    done = tune(*arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert table(tmp_path) == table(finished)


@pytest.mark.timeout(250)
def test_workers_share_a_study_and_neither_their_death_nor_that_of_who_watches_loses_a_trial(
    phantom: Path, cache: Path, tmp_path: Path
) -> None:
    arguments = small(phantom, cache, "--workers", "2", "--trials", "4", "--confirm", "0")
    command = [sys.executable, "-m", "matchai.tune", *arguments]
    trials = tmp_path / "studies" / "study" / "trials"
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=file, stderr=file)
    until = time.monotonic() + 100

    def wait_for(is_there: Callable[[], bool]) -> None:
        while not is_there():
            assert time.monotonic() < until, log.read_text()
            assert process.poll() is None, log.read_text()
            time.sleep(0.02)

    wait_for((trials / "0001" / "config.yaml").exists)
    children = psutil.Process(process.pid).children()
    workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    assert len(workers) == 2
    workers[0].kill()
    wait_for(lambda: "another takes its place" in log.read_text())
    wait_for((trials / "0002" / "config.yaml").exists)
    rest = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert not psutil.wait_procs(rest, timeout=30)[1]
    done = tune(*arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    found = table(tmp_path)
    assert [row[0] for row in found] == list(range(4))
    assert {row[1] for row in found} <= {"COMPLETE", "PRUNED"}
    assert len({json.dumps(row[3], sort_keys=True) for row in found}) == 4


@pytest.mark.timeout(250)
def test_a_trial_on_two_processes_has_the_settings_of_one(
    finished: Path, phantom: Path, cache: Path, tmp_path: Path
) -> None:
    flags = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *flags]
    done = subprocess.run(
        [*launcher, "-m", "matchai.tune", *small(phantom, cache, "--trials", "2", "--confirm", "0")],
        env={**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trial 0: complete") == 1
    alone, together = table(finished), table(tmp_path)
    assert [row[3] for row in together] == [row[3] for row in alone[:2]]  # to the last bit
    assert [row[2][0] for row in together] == pytest.approx([row[2][0] for row in alone[:2]], abs=0.1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--restart"], "--study-name"),
        (["--objective", "dice"], "mean_dice, lesion_dice"),
        (["--trials", "0"], "trials is 0"),
        (["--workers", "0"], "workers is 0"),
        (["--study-name", "../up"], "names a folder"),
        (["--screen-epochs", "6"], "fewer than the 6 epochs"),
        (["--ce-weight", "0.5"], "--dice-weight and --focal-weight too"),
        (["--space", "nowhere.yaml"], "check --space"),
        (["--storage", "redis://host"], "sqlite"),
        (["--image-size", "100"], "multiple of 32"),
    ],
)
def test_a_mistake_is_told_in_a_sentence_and_nothing_is_written(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--preset", "study", "--phantom-slices", "8", *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.startswith("error: ")
    assert not list(tmp_path.rglob("*.db"))


def test_workers_under_a_launcher_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["--workers", "2"]) == 2
    assert "drop --workers" in capsys.readouterr().err


def test_help_loads_no_torch() -> None:
    code = (
        "import contextlib, sys; from matchai.tune import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False"
    assert "--search-sampler" in done.stdout


def test_train_still_knows_no_optuna() -> None:
    code = "import sys, matchai.runs.trainer, matchai.train; print('optuna' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False"
    assert train("--help").returncode == 0
