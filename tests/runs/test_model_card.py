"""The model card of a run: it can be handed on with the weights."""

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matchai.runs.facts import read_facts
from matchai.runs.model_card import CARD, render_card, write_card
from matchai.system.errors import InputError
from tests.kept import keep_run, keep_weights
from tests.runs.test_report_page import GROUPS, HOSTILE, good_counts


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return keep_run(tmp_path / "secret" / "mine", good_counts(), GROUPS, data="/home/somebody/slices")


def test_it_says_what_it_is_for_and_how_well_it_does(run: Path) -> None:
    card = render_card(read_facts(run))
    assert "**For research only. Not a medical device" in card
    for heading in ("Model", "Intended use", "Training data", "Results", "Limits", "Ethical considerations"):
        assert f"\n## {heading}\n" in card
    assert re.search(r"Epoch 2: mean Dice 0\.\d{3} \(rough 95 % interval 0\.\d{3}–0\.\d{3}\), lesion Dice 0\.", card)
    assert re.search(r"\n\| ground glass \| 0\.\d{3} \(", card)
    assert f"| images\\_medseg.npy | `{'0' * 64}` |" in card
    assert "8 slices in 3 groups (the groups were found by likeness)" in card


def test_of_paths_it_holds_the_last_name_alone(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "data": "/home/somebody/slices",
        "init": "/home/somebody/first",
        "cache": "/home/somebody/cache",
    }
    run = keep_run(tmp_path / "secret" / "mine", good_counts(), GROUPS, **settings)
    card = render_card(read_facts(run))
    assert "Model card: mine\n" in card
    assert "Data set slices: 8 slices" in card
    assert not re.search(r"somebody|secret|/home|cache", card)


def test_it_names_no_file_that_may_be_named_after_a_patient(tmp_path: Path) -> None:
    digests = {f"{side}/Doe.nii.gz": "ab" * 32 for side in ("masks", "images")}
    run = keep_run(tmp_path / "run", good_counts(), GROUPS, data="slices", recorded={"data": digests})
    card = render_card(read_facts(run))
    assert "Doe" not in card
    listing = "".join(f"{'ab' * 32}  {side}/Doe.nii.gz\n" for side in ("images", "masks"))
    assert f"sorted by name | `{hashlib.sha256(listing.encode()).hexdigest()}` |" in card


def test_its_lines_load_the_weights(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    found = re.search(r"```python\n(.*?)```", render_card(read_facts(run)), re.DOTALL)
    assert found is not None
    monkeypatch.chdir(run)
    keep_weights(run)
    names: dict[str, object] = {}
    exec(found[1], names)
    model = names["model"]
    assert isinstance(model, torch.nn.Module)
    assert model(torch.zeros(1, 1, 64, 64)).shape == (1, 4, 64, 64)


def test_a_card_that_was_edited_is_left_and_any_other_is_replaced(run: Path) -> None:
    card, facts = run / CARD, read_facts(run)
    write_card(facts, card)
    first = card.read_text()
    write_card(facts, card)
    assert card.read_text() == first
    card.write_text(first.replace("## Limits", "## Limits, and whom to ask"))
    with pytest.raises(InputError, match="was edited by hand"):
        write_card(facts, card)
    assert "whom to ask" in card.read_text()


def test_no_name_becomes_markup(tmp_path: Path) -> None:
    names = [HOSTILE, "consolidation", "lungs other", "background"]
    run = keep_run(tmp_path / "run", good_counts(), GROUPS, class_names=names, lesion_classes=[HOSTILE])
    card = render_card(read_facts(run))
    assert not re.search(r"(?<!\\)<(script|b)", card)
    columns = {line.replace("\\|", "").count("|") for line in card.splitlines() if line.startswith("| ")}
    assert columns == {3, 7}  # of files and of classes


def test_a_run_before_its_first_epoch_has_a_card_too(tmp_path: Path) -> None:
    run = keep_run(tmp_path / "run", np.zeros((4, 4, 4), np.int64), GROUPS, num_done=0)
    assert "No epoch is finished yet." in render_card(read_facts(run))
