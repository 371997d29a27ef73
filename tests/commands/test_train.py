"""The command line, end to end, as a user types it."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from matchai.train import main
from tests.conftest import small, train

TIMES = ("seconds", "images_per_second", "data_wait_share")


def history(output: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def weights(output: Path) -> list[str]:
    newest = sorted((output / "last").iterdir())[-1]
    files = [output / "best.safetensors", newest / "state.safetensors"]
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "matchai.train", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_state(output: Path, number: int, process: subprocess.Popen[Any], seconds: float = 120) -> None:
    """Returns once the run has committed its state `number`, or has ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        if any(int(path.name[-6:]) >= number for path in output.glob("last/state-??????")):
            return
        time.sleep(0.02)


@pytest.fixture(scope="module")
def finished(phantom: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run that keeps its state after every step."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    done = train(*small(phantom, cache, output), "--save-every", "1")
    assert done.returncode == 0, done.stderr
    return output


def test_a_run_leaves_everything_in_its_folder(finished: Path) -> None:
    figures = {"learning_curves.png", "dice_per_class.png", "confusion_matrix.png", "panels.png", "worst.png"}
    files = {"config.yaml", "split.json", "best.safetensors", "last", "report.html", "MODEL_CARD.md"}
    assert {path.name for path in finished.iterdir()} >= files
    assert {path.name for path in (finished / "figures").iterdir()} == figures
    rows = history(finished)
    assert [row["epoch"] for row in rows] == [1, 2]
    named = {"train_loss", "val_loss", "dice_per_class", "mean_dice", "lesion_dice", "lr", "notebook_dice"}
    assert named <= rows[0].keys()
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert page.count("<img ") == len(figures)


def test_the_sides_of_the_split_share_no_group(finished: Path) -> None:
    split = json.loads((finished / "split.json").read_text())
    train_groups, val_groups = ({split["groups"][i] for i in split[side]} for side in ("train", "val"))
    assert not train_groups & val_groups
    assert sorted(split["train"] + split["val"]) == list(range(32))


def test_a_finished_run_is_left_as_it_is(finished: Path, phantom: Path, cache: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    again = train(*small(phantom, cache, finished), "--save-every", "1")
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")} == before


def test_figures_that_a_kill_kept_from_being_drawn_are_drawn_later(finished: Path, phantom: Path, cache: Path) -> None:
    panels = finished / "figures" / "panels.png"
    content = panels.read_bytes()
    panels.write_bytes(b"of an earlier epoch")
    os.utime(panels, (0, 0))
    assert main([*small(phantom, cache, finished), "--save-every", "1"]) == 0
    assert panels.read_bytes() == content


def test_a_report_that_a_kill_kept_from_being_made_is_made_later(finished: Path, phantom: Path, cache: Path) -> None:
    page, card = finished / "report.html", finished / "MODEL_CARD.md"
    content = page.read_text(), card.read_text()
    page.unlink()
    card.unlink()
    assert main([*small(phantom, cache, finished), "--save-every", "1"]) == 0
    assert (page.read_text(), card.read_text()) == content


@pytest.mark.parametrize("kills", [(1,), (2, 5), (9,)])
def test_a_killed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(
    kills: tuple[int, ...], finished: Path, phantom: Path, cache: Path, tmp_path: Path
) -> None:
    arguments = [*small(phantom, cache, tmp_path / "run"), "--save-every", "1"]
    for number in kills:
        process = start(arguments)
        wait_for_state(tmp_path / "run", number, process)
        process.kill()
        process.communicate()
    ended = train(*arguments)
    assert ended.returncode == 0, ended.stderr
    assert json.dumps(history(tmp_path / "run")) == json.dumps(history(finished))  # the order of names too
    assert weights(tmp_path / "run") == weights(finished)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_kills_at_random_moments_change_nothing(
    finished: Path, phantom: Path, cache: Path, tmp_path: Path
) -> None:
    generator = np.random.default_rng(0)
    arguments = [*small(phantom, cache, tmp_path / "run"), "--save-every", "1"]
    for _ in range(50):
        process = start(arguments)
        time.sleep(generator.uniform(2, 12))
        process.kill()
        process.communicate()
    assert train(*arguments).returncode == 0
    assert weights(tmp_path / "run") == weights(finished)


def test_loader_workers_change_nothing(finished: Path, phantom: Path, cache: Path, tmp_path: Path) -> None:
    done = train(*small(phantom, cache, tmp_path / "run"), "--num-workers", "2", "--save-every", "1")
    assert done.returncode == 0, done.stderr
    assert history(tmp_path / "run") == history(finished)
    assert weights(tmp_path / "run")[0] == weights(finished)[0]


def test_the_saved_settings_repeat_the_run(finished: Path, cache: Path, tmp_path: Path) -> None:
    place = ["--output", str(tmp_path / "run"), "--cache", str(cache)]
    done = train("--config", str(finished / "config.yaml"), *place)
    assert done.returncode == 0, done.stderr
    assert history(tmp_path / "run") == history(finished)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_stop_signal_leaves_a_run_that_goes_on_to_the_same_end(
    number: signal.Signals, status: int, finished: Path, phantom: Path, cache: Path, tmp_path: Path
) -> None:
    arguments = [*small(phantom, cache, tmp_path / "run"), "--save-every", "1"]
    process = start(arguments)
    wait_for_state(tmp_path / "run", 2, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert "resumes" in out
    assert "Traceback" not in err
    assert train(*arguments).returncode == 0
    assert history(tmp_path / "run") == history(finished)
    assert weights(tmp_path / "run")[0] == weights(finished)[0]


def test_two_runs_cannot_write_one_folder(phantom: Path, cache: Path, tmp_path: Path) -> None:
    arguments = [*small(phantom, cache, tmp_path / "run"), "--epochs", "50", "--save-every", "1"]
    process = start(arguments)
    wait_for_state(tmp_path / "run", 1, process)
    second = train(*arguments)
    process.kill()
    process.communicate()
    assert second.returncode == 2
    assert f"in use by process {process.pid}" in second.stderr


def test_another_experiment_is_refused_with_every_difference(
    finished: Path, phantom: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main([*small(phantom, cache, finished), "--max-lr", "0.001", "--focal-gamma", "1"])
    said = capsys.readouterr().err
    assert status == 2
    assert "max_lr was 0.002 and is 0.001" in said
    assert "focal_gamma was 2.5 and is 1.0" in said


def test_restart_moves_the_old_run_aside(finished: Path, phantom: Path, cache: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = [*small(phantom, cache, output), "--epochs", "1"]
    assert main(arguments) == 0
    old = weights(output)
    assert main([*arguments, "--restart", "--seed", "1"]) == 0
    assert weights(tmp_path / "run-old-1") == old
    assert weights(output) != old


def test_init_starts_from_the_best_weights_of_another_run(
    finished: Path, phantom: Path, cache: Path, tmp_path: Path
) -> None:
    arguments = [*small(phantom, cache, tmp_path / "run"), "--epochs", "1", "--max-lr", "1e-12"]
    assert main([*arguments, "--init", str(finished)]) == 0
    best = max(row["mean_dice"] for row in history(finished))
    # a learning rate of nothing leaves the weights; only batch norm's running statistics move
    assert abs(history(tmp_path / "run")[0]["mean_dice"] - best) < 0.2
    assert history(tmp_path / "run")[0]["train_loss"] < history(finished)[0]["train_loss"]


def launch_two(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Trains on two real gloo processes, by the README's command."""
    flags = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *flags, "-m", "matchai.train"]
    return subprocess.run(
        [*command, *arguments],
        env={**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def test_two_processes_train_one_run(phantom: Path, cache: Path, tmp_path: Path, finished: Path) -> None:
    done = launch_two(small(phantom, cache, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert [row["lr"] for row in history(tmp_path / "run")] == [row["lr"] for row in history(finished)]
    assert "2 processes" in done.stdout
    assert done.stdout.count("epoch 1/2") == 1


def test_a_process_without_a_share_takes_part_in_the_step(phantom: Path, cache: Path, tmp_path: Path) -> None:
    # 24 training slices are a batch of 23 and one of 1, of which the second process has none
    done = launch_two([*small(phantom, cache, tmp_path / "run"), "--batch-size", "23"])
    assert done.returncode == 0, done.stderr
    assert [row["skipped_steps"] for row in history(tmp_path / "run")] == [0, 0]


def spoil_images(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return lambda data: np.save(data / "images_medseg.npy", change(np.load(data / "images_medseg.npy")))


def spoil_masks(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return lambda data: np.save(data / "masks_medseg.npy", change(np.load(data / "masks_medseg.npy")))


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def spoil(data: Path) -> None:
        (data / name).write_bytes(content)

    return spoil


def truncate(data: Path) -> None:
    file = data / "images_medseg.npy"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def put(array: Any, place: Any, value: Any) -> Any:
    array[place] = value
    return array


def only_class(labels: Any, absent: int) -> Any:
    labels = labels.argmax(-1)
    return np.where(labels == absent, 3, labels)


BAD_DATA: dict[str, tuple[Callable[[Path], Any], list[str], str]] = {
    "missing": (lambda d: (d / "masks_medseg.npy").unlink(), [], "missing"),
    "no folder": (lambda d: None, ["--data", "nowhere"], "does not exist"),
    "truncated": (truncate, [], "incomplete"),
    "empty file": (write("images_medseg.npy", b""), [], "an empty file"),
    "web page": (write("images_medseg.npy", b"<html>"), [], "a web page"),
    "lfs": (write("images_medseg.npy", b"version https://git-lfs.github.com/spec/v1"), [], "git lfs pull"),
    "pickle": (write("images_medseg.npy", b"\x80\x04K\x01."), [], "pickle"),
    "object": (spoil_images(lambda a: np.array([None, 1], object)), [], "Python objects"),
    "complex": (spoil_images(lambda a: a.astype(complex)), [], "real numbers"),
    "counts": (spoil_masks(lambda a: a[:-1]), [], "has 16 slices"),
    "sizes": (spoil_masks(lambda a: a[:, :32]), [], "64x64"),
    "rank": (spoil_images(lambda a: a[0, :, :, 0]), [], "(1, H, W)"),
    "channels first": (spoil_images(lambda a: np.moveaxis(a, -1, 1)), [], "moveaxis"),
    "three channels": (spoil_masks(lambda a: a[..., :3]), [], "one-hot (N, H, W, 4)"),
    "nan": (spoil_images(lambda a: put(a, (5, 3, 7), np.nan)), [], "slice 5 has 1, the first at row 3, column 7"),
    "infinite": (spoil_images(lambda a: put(a, (2, 0, 0), np.inf)), [], "slice 2"),
    "8 bit": (spoil_images(lambda a: ((a + 1000) / 1400 * 255).astype(np.uint8)), [], "8-bit"),
    "unit": (spoil_images(lambda a: (a + 1000) / 1400), [], "scaled to 0..1"),
    "constant": (spoil_images(lambda a: a * 0 - 1000), [], "constant"),
    "offset": (spoil_images(lambda a: (a + 1024).astype(np.uint16)), [], "without their offset"),
    "probabilities": (spoil_masks(lambda a: a * 0.925 + 0.025), [], "probabilities"),
    "label range": (spoil_masks(lambda a: put(a.argmax(-1), (4, 0, 0), 9)), [], "holds 9 in slice 4"),
    "negative label": (spoil_masks(lambda a: put(a.argmax(-1), (4, 0, 0), -1)), [], "holds -1 in slice 4"),
    "class absent": (spoil_masks(lambda a: only_class(a, 1)), [], "No training slice has a pixel of consolidation"),
    "too few groups": (lambda d: np.save(d / "groups.npy", np.zeros(16, int)), [], "group"),
    "groups length": (lambda d: np.save(d / "groups.npy", np.zeros(3, int)), [], "groups.npy"),
    "image size": (lambda d: None, ["--image-size", "100"], "96 and 128"),
    "batch of one": (lambda d: None, ["--image-size", "32", "--batch-size", "1"], "batch norm"),
    "accumulate": (lambda d: None, ["--accumulate", "9"], "the most"),
    "encoder": (lambda d: None, ["--encoder", "resnet19"], "did you mean resnet"),
    "class name": (lambda d: None, ["--target-classes", "consolidatoin"], "did you mean 'consolidation'"),
    "fp16 on a CPU": (lambda d: None, ["--mixed-precision", "fp16"], "a CPU does not train in fp16"),
    "weights file": (lambda d: None, ["--encoder-weights", "nowhere.pth"], "does not exist"),
    "init": (lambda d: None, ["--init", "nowhere"], "does not exist"),
    "negative": (lambda d: None, ["--max-lr", "-1"], "above 0"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_input_is_told_in_a_sentence_before_the_first_step(
    case: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, flags, expected = BAD_DATA[case]
    spoil(data)
    status = main([*small(data, tmp_path / "cache", tmp_path / "run"), *flags])
    said = capsys.readouterr().err
    assert status == 2
    assert expected in said
    assert all(line.startswith("error: ") for line in said.splitlines())
    assert not (tmp_path / "run" / "history.jsonl").exists()


def test_every_problem_is_told_at_once(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truncate(data)
    flags = ["--image-size", "100", "--max-lr", "-1", "--encoder", "resnet19"]
    assert main([*small(data, tmp_path / "cache", tmp_path / "run"), *flags]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 4


def test_a_folder_that_is_no_run_is_not_written_into(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    assert main(small(data, tmp_path / "cache", tmp_path / "run")) == 2
    assert "thesis.tex" in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_written_is_told(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(small(data, tmp_path / "cache", tmp_path / "file" / "run")) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_too_little_disk_for_the_cache_is_told(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    assert main(small(data, tmp_path / "cache", tmp_path / "run")) == 2
    assert "make room" in capsys.readouterr().err


def test_more_epochs_than_a_run_was_planned_for_are_told_the_way(
    finished: Path, phantom: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*small(phantom, cache, finished), "--epochs", "9"]) == 2
    told = capsys.readouterr().err
    assert f"the same command with --init {finished} --output {finished}-more." in told


def test_a_run_ends_well_whatever_becomes_of_its_output(phantom: Path, cache: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "matchai.train", *small(phantom, cache, tmp_path / "run"), "--epochs", "1"]
    done = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$@" | head -1', "bash", *words],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0
    assert len(history(tmp_path / "run")) == 1
