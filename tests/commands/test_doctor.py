"""The doctor: what it says of a machine and of data, and its exit status."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from matchai import doctor
from matchai.data.arrays import ArraySet
from matchai.doctor import main
from matchai.preflight import data, preflight
from matchai.preflight.software import Finding

FLAGS = ["--preset", "study", "--image-size", "32", "--batch-size", "5"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of each test, which is empty."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def check_training(data: Path, *more: str) -> int:
    return main([*FLAGS, "--data", str(data), "--output", "doctor", *more])


def lines_of(text: str, status: str) -> str:
    return "\n".join(line for line in text.splitlines() if line.startswith(status))


def test_sound_data_are_told_and_drawn_and_nothing_else_is_written(
    phantom: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_training(phantom) == 0
    said = capsys.readouterr().out
    for part in ("32 slices of 64 x 64 pixels", "float32", "4 groups, from groups.npy", "Precision: ", "Sampler: "):
        assert part in said
    assert said.splitlines()[-1] == "Training would start."
    written = {str(path.relative_to(elsewhere)) for path in elsewhere.rglob("*") if path.is_file()}
    assert written == {"doctor/histogram.png", "doctor/slices.png"}


def test_data_that_training_refuses_are_problems_in_its_words(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = np.load(data / "images_medseg.npy")
    images[3, 5, 5] = np.nan
    np.save(data / "images_medseg.npy", images)
    assert check_training(data) == 1
    assert "slice 3 has 1, the first at row 5, column 5" in lines_of(capsys.readouterr().out, "problem")


def test_equal_slices_of_two_groups_are_told(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = np.load(data / "images_medseg.npy")
    images[9] = images[2]
    np.save(data / "images_medseg.npy", images)
    assert check_training(data) == 0
    said = capsys.readouterr().out
    assert "slice 2 of medseg and slice 9 of medseg" in lines_of(said, "ok")
    assert "no slice, and none that looks alike, is on both sides" in lines_of(said, "ok")


def test_neighbours_in_several_groups_are_a_warning(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = np.load(data / "images_medseg.npy")
    noise = np.random.default_rng(1).normal(0, 5, images.shape)
    np.save(data / "images_medseg.npy", (images[0] + noise).astype(np.float32))
    assert check_training(data) == 0
    assert "Look-alikes: 16 slices" in lines_of(capsys.readouterr().out, "warning")


def test_wrong_settings_are_problems_and_the_data_wait(phantom: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_training(phantom, "--max-lr", "-1") == 1
    said = capsys.readouterr().out
    assert "max_lr is -1.0, but must be above 0" in lines_of(said, "problem")
    assert "The data are not examined" in lines_of(said, "warning")


def test_a_folder_that_holds_other_things_gets_no_pictures(phantom: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").touch()
    assert check_training(phantom, "--output", str(run)) == 1
    assert [path.name for path in run.iterdir()] == ["config.yaml"]


def test_no_more_is_examined_where_torch_does_not_load(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = Finding("problem", "they do not load together", "install both")
    monkeypatch.setattr(doctor, "check_torch", lambda: fault)
    monkeypatch.setattr(preflight, "check_training", lambda *_: pytest.fail("it was examined"))
    assert main(FLAGS) == 1
    said = capsys.readouterr().out
    assert "problem  they do not load together. Remedy: install both." in said
    assert "are not examined" in said


@pytest.mark.parametrize(
    ("module", "fault", "remedy"),
    [
        ("torch", "OSError('libtorch_cpu.so: cannot open it')", "pip install --force-reinstall torch torchvision"),
        ("tyro", "ImportError('No module named tyro')", "pip install --force-reinstall tyro"),
    ],
)
def test_it_speaks_where_a_package_is_broken(module: str, fault: str, remedy: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text(f"raise {fault}")
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from matchai.doctor import main; sys.exit(main([]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert fault.split("'")[1] in lines_of(done.stdout, "problem")
    assert remedy in lines_of(done.stdout, "problem")
    assert "Traceback" not in done.stdout + done.stderr


def test_problems_give_status_1_and_warnings_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def examined(*_: object) -> Iterator[Finding]:
        yield Finding("warning", "slow", "mend it")

    monkeypatch.setattr(doctor, "_check", examined)
    assert main([]) == 0
    monkeypatch.setattr(doctor, "_check", lambda _: iter([Finding("problem", "broken", "mend it")]))
    assert main([]) == 1


def test_every_pixel_of_the_histogram_is_counted_once() -> None:
    images = np.stack([np.full((8, 8), value, np.float32) for value in (-1600, -600, 400, 1400)])
    one = ArraySet("one", Path("images.npy"), Path("masks.npy"), images, np.zeros((4, 8, 8), np.uint8))
    values = data.count_values([one], (-1500, 500))
    assert (values.low, values.high, values.num_pixels) == (-1600, 1400, 4 * 64)
    assert (values.below, values.above, int(values.counts.sum())) == (64, 64, 128)


@pytest.mark.parametrize(("share", "drawn"), [(0.5, 0.75), (0.2, 3 / 7)])
def test_the_share_of_draws_is_what_the_weights_make_of_it(share: float, drawn: float) -> None:
    presence = (np.arange(10) < 10 * share)[:, None]
    found = data.check_sampler(presence, [0], ["consolidation"], 3)
    assert found.status == "ok"
    assert f"{share:.0%} of the training slices" in found.text
    assert f"of the draws {drawn:.0%} will" in found.text


def test_a_sampler_that_changes_nothing_is_a_warning() -> None:
    assert data.check_sampler(np.ones((4, 1), bool), [0], ["any"], 3).status == "warning"
