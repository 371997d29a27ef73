"""The house of the design: imports go down, rooms stay small."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "matchai"

FLOORS = [
    {"checks", "config", "environment", "errors", "extras", "files", "keys", "labels", "parsing", "tuning"},
    {
        "accuracy",
        "address",
        "arrays",
        "augmentation",
        "checkpoint",
        "checkup",
        "claims",
        "compiled",
        "console",
        "context",
        "data_figures",
        "data_report",
        "decoding",
        "dicom",
        "dicom_images",
        "digests",
        "dropout",
        "evidence",
        "figures",
        "grid",
        "hounsfield",
        "intervals",
        "kernels",
        "lockstep",
        "losses",
        "laws",
        "machine",
        "metrics",
        "model",
        "nifti",
        "normalisation",
        "npy",
        "page",
        "pairs",
        "phantom",
        "pictures",
        "processes",
        "resources",
        "reasons",
        "sampling",
        "search",
        "sets",
        "slices",
        "split",
        "store",
        "study_figures",
        "study_page",
        "study_rows",
        "surface",
        "tally",
        "toolchain",
        "unseen",
        "volumes",
        "inputs",
        "summaries",
        "waiting",
        "data",
    },
    {
        "build",
        "delivery",
        "evaluation",
        "exporting",
        "inference",
        "loop",
        "model_card",
        "opening",
        "prediction",
        "resume",
        "run_facts",
        "run_figures",
        "run_page",
        "run_words",
        "space",
    },
    {"examination", "runner"},
    {"confirm", "ledger", "plan", "study", "workers"},
    {"__main__", "doctor", "evaluate", "export", "predict", "report", "train", "tune"},
]
ROOMS = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def imports_of(room: str) -> set[str]:
    tree = ast.parse((PACKAGE / f"{room}.py").read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "matchai":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("matchai."):
            found.add(str(node.module).split(".")[1])
    return found


def floor_of(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_never_go_up(room: str) -> None:
    assert all(floor_of(other) <= floor_of(room) for other in imports_of(room))


def test_imports_never_go_in_a_circle() -> None:
    done: set[str] = set()
    rest = set(ROOMS)
    while rest:
        free = {room for room in rest if imports_of(room) <= done}
        assert free, f"a circle among {sorted(rest)}"
        done |= free
        rest -= free


@pytest.mark.parametrize("room", sorted(FLOORS[1]))
def test_a_part_takes_plain_arguments_and_never_the_config(room: str) -> None:
    assert "config" not in imports_of(room)


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_is_above_400_lines(room: str) -> None:
    assert len((PACKAGE / f"{room}.py").read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_is_told_in_the_readme(room: str) -> None:
    assert f"\n  {room}.py " in (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
