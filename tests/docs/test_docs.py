"""README and the documentation: their code runs, their commands are taken, their links lead somewhere."""

import importlib
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from matchai.settings import LEAVES, TrainConfig, TuneConfig, command_settings, parsing
from tests.kept import keep_weights

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
SITE = [path for path in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in path.parts]
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "studies" / "README.md", *SITE]

CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
SHELL = re.compile(r"```sh\n(.*?)```", re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
SPOKEN = re.compile(r"`([^`\n]*\bmatchai[. ](?:train|tune|predict|evaluate|report|export|doctor|phantom)\b[^`\n]*)`")
COMMAND = re.compile(r"(?:-m matchai\.|\bmatchai )(train|tune|predict|evaluate|report|export|doctor|phantom)\b(.*)")

NUMBERS = {"N": "2", "SLOPE": "1", "INTERCEPT": "-1024", "LOW": "-1000", "HIGH": "400", "NUMBER": "3"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def commands_of(path: Path) -> list[str]:
    """Every command line of matchai in a page: in blocks of shell, and in the text."""
    text = path.read_text(encoding="utf-8")
    blocks = "\n".join(SHELL.findall(text)).replace("\\\n", " ")
    lines = [part for line in blocks.splitlines() for part in re.split(r"&&|  #", line)]
    return [line.strip() for line in [*lines, *SPOKEN.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL))]]


ALL_COMMANDS = sorted({(name_of(path), line) for path in PAGES for line in commands_of(path) if COMMAND.search(line)})


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
    found = COMMAND.search(line)
    assert found is not None
    name, rest = found[1], found[2].replace("...", "").replace("[]", "")
    words = [NUMBERS.get(word, word) for word in shlex.split(rest)]
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


def test_commands_were_found() -> None:
    assert len(ALL_COMMANDS) > 40


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page: Path) -> None:
    targets = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "/generated/" not in link]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 250


def test_every_page_is_reached_from_the_index_of_its_folder() -> None:
    pages = [path for path in SITE if path.stem != "index"]
    lost = [name_of(path) for path in pages if path.stem not in (path.parent / "index.md").read_text(encoding="utf-8")]
    assert lost == []


def test_the_reference_tells_every_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_ext"))
    page = importlib.import_module("generated_reference").settings_page()
    assert [name for name in LEAVES if f"``--{name.replace('_', '-')}``" not in page] == []
