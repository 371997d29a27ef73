"""Public names that are imported when they are first used."""

import subprocess
import sys

import matchai.metrics


def loaded_after(code: str) -> set[str]:
    """Which of the slow libraries a fresh Python has loaded after some lines."""
    code += "\nimport sys; print(*{'torch', 'numpy', 'matplotlib', 'optuna', 'accelerate'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


def test_a_wing_alone_loads_no_library() -> None:
    assert loaded_after("import matchai, matchai.model, matchai.runs, matchai.study, matchai.data") == set()


def test_a_name_loads_what_it_needs() -> None:
    assert "torch" in loaded_after("from matchai.losses import SegmentationLoss")


def test_public_names_are_completed_in_a_notebook() -> None:
    assert {"dice_per_class", "Bootstrap"} <= set(dir(matchai.metrics))
