"""The reference that is made from the code: nothing that is public or can be set is left out."""

import dataclasses
import importlib
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from matchai.metrics import summarise
from matchai.runs.setup import describe_weights
from matchai.settings import PRESETS, StudySettings, TrainConfig, command_settings
from matchai.training.meters import EpochMeter, epoch_row

ROOT = Path(__file__).parents[2]
FILES = (ROOT / "docs" / "reference" / "files.md").read_text(encoding="utf-8")


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_ext"))
    return importlib.import_module("generated_reference")


def kinds() -> list[Any]:
    found = [kind for name, kind in vars(command_settings).items() if name.endswith("Settings")]
    return [StudySettings, *found]


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_every_setting_of_a_study_and_of_a_command_is_told(kind: Any, reference: Any) -> None:
    told = "\n".join(reference.settings_of(kind))
    hints = inspect.get_annotations(kind)
    assert [
        f.name for f in dataclasses.fields(kind) if f"``{reference.term(f.name, hints[f.name])}``" not in told
    ] == []


def test_an_argument_without_a_flag_is_told_as_help_tells_it(reference: Any) -> None:
    told = "\n".join(reference.settings_of(command_settings.PredictSettings))
    assert "``RUN... INPUT...``" in told
    assert "--paths" not in told


def test_every_preset_is_told_with_what_it_changes(reference: Any) -> None:
    page = reference.settings_page()
    assert [
        (name, key)
        for name, changes in PRESETS.items()
        for key in changes
        if f"``{name}``\n    " not in page or f"``{key}`` {changes[key]}" not in page
    ] == []


def test_every_function_and_class_that_a_module_hands_on_is_told(reference: Any) -> None:
    lost = []
    for module in (*reference.STABLE, *reference.WINGS):
        found, page = importlib.import_module(module), reference.api_page(module)
        public = {name: getattr(found, name) for name in found.__all__}
        named = [name for name, value in public.items() if inspect.isclass(value) or callable(value)]
        typed = [name for name in named if hasattr(public[name], "__origin__")]  # aliases, which tell nothing
        lost += [f"{module}.{name}" for name in set(named) - set(typed) if f":: {module}.{name}" not in page]
    assert lost == []


def test_every_page_of_the_reference_is_in_its_index(reference: Any) -> None:
    index = (ROOT / "docs" / "reference" / "index.md").read_text(encoding="utf-8").splitlines()
    assert [name for name in reference.PAGES if f"generated/{name.removesuffix('.rst')}" not in index] == []


@pytest.mark.parametrize(
    "tag", ['<script src="https://', '<link rel="stylesheet" href="//', "<img alt='' src='http://"]
)
def test_a_page_that_loads_from_elsewhere_ends_the_build(tag: str, tmp_path: Path, reference: Any) -> None:
    (tmp_path / "page.html").write_text(f"{tag}example.org/x'>")
    with pytest.raises(Exception, match=r"would not open offline: .*page\.html"):
        reference.refuse_elsewhere(SimpleNamespace(outdir=tmp_path), None)


def test_a_page_may_link_to_elsewhere(tmp_path: Path, reference: Any) -> None:
    (tmp_path / "page.html").write_text('<script src="_static/x.js"></script><a href="https://example.org">x</a>')
    reference.refuse_elsewhere(SimpleNamespace(outdir=tmp_path), None)


def test_every_key_of_the_history_is_told() -> None:
    metrics = summarise(np.ones((1, 2, 2), np.int64), [0], 1)
    row = epoch_row(1, EpochMeter(consumed=1, loss_sum=1.0, num_draws=1, seconds=1.0), 0.5, metrics, 1.0)
    assert [key for key in row if f"`{key}`" not in FILES] == []


def test_every_key_of_the_weights_header_is_told() -> None:
    data: Any = SimpleNamespace(mean=0.5, std=0.1, kind="npy", orientation="LP")
    about = describe_weights(TrainConfig(), data, {"epoch": 1, "mean_dice": 0.5})
    assert [key for key in about if f"`{key}`" not in FILES] == []
