"""Help: text that flows, common settings first, the defaults that the command line leads to."""

import dataclasses
import importlib
import io
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from matchai.doctor import DoctorConfig, DoctorRun
from matchai.settings.command_settings import (
    EvaluateSettings,
    ExportSettings,
    PhantomSettings,
    PredictSettings,
    ReportSettings,
)
from matchai.settings.config import COMMON, LEAVES, PRESETS, RunSettings, TrainConfig
from matchai.settings.help import docstrings
from matchai.settings.parsing import parse
from matchai.settings.study_settings import StudySettings, TuneConfig

KINDS: dict[str, Any] = {
    "train": TrainConfig,
    "tune": TuneConfig,
    "doctor": DoctorConfig,
    "predict": PredictSettings,
    "evaluate": EvaluateSettings,
    "export": ExportSettings,
    "report": ReportSettings,
    "phantom": PhantomSettings,
}
OF_RUNS, OTHERS = ("train", "tune", "doctor"), ("predict", "evaluate", "export", "report", "phantom")


@pytest.fixture
def tell(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a command prints that asks for help, at a terminal's width."""

    def told(command: str, *argv: str, width: int = 100) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        page = io.BytesIO()
        with (
            redirect_stdout(io.TextIOWrapper(page, encoding="utf-8", write_through=True)),
            pytest.raises(SystemExit) as caught,
        ):
            importlib.import_module(f"matchai.{command}").main(list(argv))
        assert caught.value.code == 0
        return page.getvalue().decode()

    return told


def flowing(page: str, width: int) -> str:
    """The words of a page without line breaks and boxes; those of a wide page, read as one, two and three columns."""
    texts = [
        line[width * at // number : width * (at + 1) // number]
        for number in ((1,) if width < 130 else (1, 2, 3))
        for at in range(number)
        for line in page.splitlines()
    ]
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", " ".join(texts)).split())


def default_of(page: str, flag: str) -> str:
    found = re.search(rf"--{flag} .*?\(default: (.*?)\)", flowing(page, 100))
    assert found
    return found[1]


def flags(page: str) -> set[str]:
    return {flag.replace("-", "_") for flag in re.findall(r"^│ --([a-z0-9-]+)", page, re.MULTILINE)}


def leaves(kind: Any) -> dict[str, str]:
    """Every setting of a command and its docstring."""
    found: dict[str, str] = {}
    for field in dataclasses.fields(kind):
        is_group = dataclasses.is_dataclass(field.type)
        found |= leaves(field.type) if is_group else {field.name: docstrings(kind)[field.name]}
    return found


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("command", KINDS)
def test_help_breaks_lines_at_the_width_and_nowhere_else(tell: Any, command: str, width: int) -> None:
    page = tell(command, "--help-all", width=width)
    assert max(map(len, page.splitlines())) <= width
    text = flowing(page, width)
    assert [doc for doc in leaves(KINDS[command]).values() if doc not in text] == []
    assert importlib.import_module(f"matchai.{command}").DESCRIPTION in text


def test_the_docstring_of_a_subclass_wins() -> None:
    assert docstrings(DoctorRun)["output"] != docstrings(RunSettings)["output"]
    assert docstrings(DoctorRun)["seed"] == docstrings(RunSettings)["seed"]


@pytest.mark.parametrize("command", OF_RUNS)
def test_help_shows_what_is_common_and_help_all_shows_all(tell: Any, command: str) -> None:
    own = set(leaves(KINDS[command])) - set(LEAVES)
    common, full = tell(command, "--help"), tell(command, "--help-all")
    assert flags(common) == set(COMMON) | own
    assert flags(full) == set(LEAVES) | own
    assert common.endswith(f"--help-all lists all {len(LEAVES) + len(own)} settings.\n")
    assert "--help-all" not in full


@pytest.mark.parametrize("command", OTHERS)
def test_help_of_a_small_command_shows_all(tell: Any, command: str) -> None:
    page = tell(command, "--help")
    assert page == tell(command, "--help-all") == tell(command, "-h")
    options = set(leaves(KINDS[command])) - {"paths", "runs", "run"}
    assert flags(page) == options


def test_a_setting_that_help_does_not_show_is_read() -> None:
    assert "affine_shear" not in COMMON
    assert parse(["--affine-shear", "3"], "", "matchai", TrainConfig).augmentation.affine_shear == 3


def test_the_settings_of_a_study_stand_before_those_of_its_runs(tell: Any) -> None:
    page = tell("tune", "--help", width=80)
    assert page.index("study options") < page.index("run options")
    assert flags(page) >= {field.name for field in dataclasses.fields(StudySettings)}


@pytest.mark.parametrize(
    ("command", "words", "preset"),
    [
        ("train", [], "quick"),
        ("train", ["--data", "DIR"], "recipe"),
        ("train", ["--data=DIR"], "recipe"),
        ("train", ["--preset", "recipe"], "recipe"),
        ("train", ["--data", "DIR", "--preset", "study"], "study"),
        ("train", ["--preset", "best"], "recipe"),
        ("doctor", ["--data", "DIR"], "recipe"),
        ("tune", [], "study"),
        ("tune", ["--data", "DIR"], "recipe"),
    ],
)
@pytest.mark.parametrize("is_last", [True, False])
def test_help_shows_the_defaults_that_the_other_flags_lead_to(
    tell: Any, command: str, words: list[str], preset: str, *, is_last: bool
) -> None:
    page = tell(command, *words, "--help") if is_last else tell(command, "--help", *words)
    expected = {"preset": preset, **TrainConfig().updated(**PRESETS[preset]).flat()} | {"preset": preset}
    for name in ("preset", "epochs", "image_size", "encoder", "encoder_weights", "max_lr"):
        assert default_of(page, name.replace("_", "-")) == str(expected[name])


def test_help_shows_the_defaults_of_a_file(tell: Any, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("preset: study\nepochs: 7\naffine_shear: 2.5\n")
    page = tell("train", "--config", str(file), "--help-all")
    found = [default_of(page, name) for name in ("epochs", "affine-shear", "image-size")]
    assert found == ["7", "2.5", str(PRESETS["study"]["image_size"])]


@pytest.mark.parametrize("content", [None, "epochs: many\n", "epochs: [\n", "preset: [1]\n"])
def test_help_beside_a_broken_file_shows_the_presets_defaults(tell: Any, tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "settings.yaml"
    if content is not None:
        file.write_text(content)
    page = tell("train", "--config", str(file), "--preset", "study", "--help")
    assert default_of(page, "epochs") == str(PRESETS["study"]["epochs"])


@pytest.mark.parametrize(
    "words", [["--epochs", "7"], ["--epochs", "many"], ["--epoch", "7"], ["stray"], ["--preset"], ["--data"]], ids=str
)
def test_flags_beside_help_are_never_an_error(tell: Any, words: list[str]) -> None:
    for argv in ([*words, "--help"], ["--help-all", *words]):
        assert "--epochs INT" in tell("train", *argv)


def test_a_setting_without_a_value_tells_its_default_once(tell: Any) -> None:
    text = flowing(tell("train", "--help-all"), 100)
    assert "(default: none)" in text
    assert "(default: None)" not in text
    assert "(default: )" not in text
    assert not re.search(r"\(default: [^)]*\)\.? \(default: none\)", text)


def test_every_common_setting_is_one_of_a_run() -> None:
    assert set(COMMON) <= set(LEAVES)
    assert len(set(COMMON)) == len(COMMON)


def test_a_reader_who_leaves_early_sees_no_traceback() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "matchai.train", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
