"""README and the documentation: their code runs, their commands are taken, their links lead somewhere."""

import importlib
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matchai.__main__ import COMMANDS
from matchai.settings import LEAVES, TrainConfig, TuneConfig, command_settings, parsing
from tests.kept import keep_weights

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
SITE = [path for path in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in path.parts]
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "studies" / "README.md", *SITE]

CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
SHELL = re.compile(r"```sh\n(.*?)```", re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
SPOKEN = re.compile(r"`([^`\n]*(?:\bmatchai[. ]|launch/)\w[^`\n]*)`")
# `matchai X`, `-m matchai.X`, or a script, which hands its words to the one or the other
COMMAND = re.compile(rf"(?:-m matchai\.|\bmatchai )({'|'.join(COMMANDS)}|phantom)\b(.*)")
SCRIPT = re.compile(r"\blaunch/(\w+)\.sh(?: (tune)\b)?(.*)")

GENERATOR = "generated_reference"
NUMBERS = {"N": "2", "SLOPE": "1", "INTERCEPT": "-1024", "LOW": "-1000", "HIGH": "400", "NUMBER": "3"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def commands_of(path: Path, *, spoken: bool = True) -> list[str]:
    """Every command line of a page: in blocks of shell and, if asked for, in the text."""
    text = path.read_text(encoding="utf-8")
    blocks = "\n".join(SHELL.findall(text)).replace("\\\n", " ")
    lines = [part for line in blocks.splitlines() for part in re.split(r"&&|  #", line)]
    lines += SPOKEN.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL)) if spoken else []
    return [line.strip() for line in lines]


def split_command(line: str) -> tuple[str, str]:
    """The command of a line, and the words after it; empty if there is none."""
    if found := COMMAND.search(line):
        return found[1], found[2]
    if found := SCRIPT.search(line):
        return "tune" if found[2] or found[1].startswith("study") else "train", found[3]
    return "", ""


ALL_COMMANDS = sorted({(name_of(path), line) for path in PAGES for line in commands_of(path) if split_command(line)[0]})
CHEAP = ("phantom", "predict", "export")
"""Commands of seconds that need no more than a run's weights."""
SCANS = ("scan.npy", "INPUT.npy")


def cheap_commands(page: Path) -> list[tuple[str, list[str]]]:
    """The cheap commands of a page's shell blocks whose inputs a test can make, in their order."""
    told = []
    for line in commands_of(page, spoken=False):
        name, rest = split_command(line)
        words = shlex.split(re.sub(r"\bINPUT\b(\.\.\.)?", "INPUT.npy", rest))
        if name in CHEAP and words and not {"scan.nii.gz", "DICOM_FOLDER", "onnx"} & set(words):
            told.append((name, words))
    return told


@pytest.mark.parametrize("page", [path for path in [README, *SITE] if CODE.search(path.read_text(encoding="utf-8"))])
@pytest.mark.timeout(120)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matchai.export import main

    monkeypatch.chdir(tmp_path)
    run = keep_weights(tmp_path / "runs" / "quick", encoder="resnet18", image_size=32)
    if "runs/quick/export" in page.read_text(encoding="utf-8"):
        assert main([str(run), "--format", "safetensors"]) == 0
    scope: dict[str, Any] = {}
    for block in CODE.findall(page.read_text(encoding="utf-8")):
        exec(compile(block, name_of(page), "exec"), scope)


@pytest.mark.parametrize(("page", "line"), ALL_COMMANDS)
def test_a_command_that_is_told_is_taken(page: str, line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name, rest = split_command(line)
    words = [NUMBERS.get(word, word) for word in shlex.split(rest.replace("...", "").replace("[]", ""))]
    if not words or {"--help", "--help-all"} & set(words):
        return
    monkeypatch.chdir(tmp_path)
    for index, word in enumerate(words):
        if word == "--config":  # a file that a run or a study has written
            (tmp_path / "config.yaml").write_text("epochs: 3\n")
            words[index + 1] = "config.yaml"
    parse_of(name)(words)


def parse_of(name: str) -> Callable[[list[str]], Any]:
    """Reads a command line as the command does, and does nothing else."""
    kinds: dict[str, Any] = {
        "train": TrainConfig,
        "doctor": importlib.import_module("matchai.doctor").DoctorConfig,
        "tune": TuneConfig,
    }
    if name in kinds:
        return lambda words: parsing.parse(words, "", name, kinds[name])
    kind: Any = getattr(command_settings, f"{name.capitalize()}Settings")
    return lambda words: parsing.parse_settings(words, "", name, kind)


@pytest.mark.parametrize("page", [page for page in PAGES if any(cheap_commands(page))], ids=name_of)
@pytest.mark.timeout(120)
def test_the_cheap_commands_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for run in ("runs/quick", "runs/mine", "runs/fold0", "runs/fold1", "RUN"):
        keep_weights(tmp_path / run, image_size=32)
    for scan in SCANS:
        np.save(tmp_path / scan, np.random.default_rng(0).uniform(-1000, 200, (2, 40, 40)).astype(np.float32))
    for name, words in cheap_commands(page):
        assert importlib.import_module(f"matchai.{name}").main(words) == 0, (name, words)


@pytest.mark.parametrize(("page", "line"), ALL_COMMANDS)
def test_a_command_that_is_told_is_one_of_matchais(page: str, line: str) -> None:
    found = re.search(r"(?<![-\w.])matchai (\w+)", line)
    assert found is None or found[1] in COMMANDS


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_script_that_is_told_is_there(page: Path) -> None:
    told = re.findall(r"\blaunch/\w+\.sh", page.read_text(encoding="utf-8"))
    assert [script for script in told if not (ROOT / script).exists()] == []


def test_commands_were_found() -> None:
    assert len(ALL_COMMANDS) > 40


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_or_to_pages_that_are_made(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_ext"))
    made = {ROOT / "docs" / "reference" / "generated" / name for name in importlib.import_module(GENERATOR).PAGES}
    targets = {target: (page.parent / target).resolve() for target in LINK.findall(page.read_text(encoding="utf-8"))}
    assert [target for target, path in targets.items() if path not in made and not path.exists()] == []


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 250


def test_every_page_is_reached_from_the_index_of_its_folder() -> None:
    pages = [path for path in SITE if path.stem != "index"]
    lost = [name_of(path) for path in pages if path.stem not in (path.parent / "index.md").read_text(encoding="utf-8")]
    assert lost == []


def test_the_reference_tells_every_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_ext"))
    page = importlib.import_module(GENERATOR).settings_page()
    assert [name for name in LEAVES if f"``--{name.replace('_', '-')}``" not in page] == []
