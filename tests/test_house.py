"""The house: imports go down between wings and inside them, what is private stays so, and rooms stay small."""

import ast
import importlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "matchai"
TESTS = Path(__file__).parent

FLOORS = [
    {"system"},
    {"drawing", "metrics", "native", "sampling", "settings", "volumes"},
    {"data", "model"},
    {"training"},
    {"prediction", "runs"},
    {"preflight", "study"},
    {"top"},
]
"""The wings, from the lowest up; `top` holds the commands."""
WINGS = sorted(set().union(*FLOORS) - {"top"})
FLOOR = {wing: number for number, wings in enumerate(FLOORS) for wing in wings}

ROOMS = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if path.stem != "__init__")

Import = tuple[str, str]  # the module, the name taken from it


def tree_of(room: str) -> ast.Module:
    return ast.parse((PACKAGE / room).read_text(encoding="utf-8"))


def imports_in(tree: ast.AST) -> list[Import]:
    """Every `from matchai... import name`, wherever it stands; the package itself imports in no other way."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return [(str(node.module), alias.name) for node in nodes for alias in node.names if is_ours(str(node.module))]


def is_ours(module: str) -> bool:
    return module == "matchai" or module.startswith("matchai.")


def wing_of(module: str) -> str:
    name = module.removeprefix("matchai").removeprefix(".").split(".")[0]
    return name if name in WINGS else "top"


def wing_of_room(room: str) -> str:
    return room.split("/", maxsplit=1)[0] if "/" in room else "top"


def handed_on(wing: str) -> dict[str, str]:
    """The names that a wing's `__init__` imports, and the module that each comes from."""
    return {name: module for module, name in imports_in(tree_of(f"{wing}/__init__.py")) if wing_of(module) == wing}


def functions_of(room: str) -> list[tuple[str, ast.FunctionDef]]:
    """Each function and method with its name, such as `Trainer.go`."""
    found = []
    for node in ast.walk(tree_of(room)):
        inner = node.body if isinstance(node, ast.Module | ast.ClassDef) else []
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        found += [(prefix + one.name, one) for one in inner if isinstance(one, ast.FunctionDef)]
    return found


def test_every_folder_with_modules_is_a_wing_of_the_table() -> None:
    assert sorted({wing_of_room(room) for room in ROOMS} - {"top"}) == WINGS


@pytest.mark.parametrize("room", ROOMS)
def test_imports_between_wings_go_down(room: str) -> None:
    mine = wing_of_room(room)
    others = {wing_of(module) for module, _ in imports_in(tree_of(room))} - {mine}
    assert {other for other in others if FLOOR[other] >= FLOOR[mine]} == set()


@pytest.mark.parametrize("wing", [*WINGS, "top"])
def test_imports_inside_a_wing_never_go_in_a_circle(wing: str) -> None:
    rooms = {Path(room).stem: room for room in ROOMS if wing_of_room(room) == wing}
    needs = {
        name: {
            taken if f"{module}.{taken}" == f"matchai.{wing}.{taken}" else module.split(".")[-1]
            for module, taken in imports_in(tree_of(room))
            if wing_of(module) == wing
        }
        & set(rooms)
        for name, room in rooms.items()
    }
    while needs:
        free = {name for name, others in needs.items() if not others & set(needs)}
        assert free, f"a circle among {sorted(needs)}"
        needs = {name: others for name, others in needs.items() if name not in free}


@pytest.mark.parametrize("room", ROOMS)
def test_a_wing_takes_from_another_only_what_that_hands_on(room: str) -> None:
    mine = wing_of_room(room)
    taken = [(module, name) for module, name in imports_in(tree_of(room)) if wing_of(module) not in (mine, "top")]
    private = [
        f"{module}.{name}"
        for module, name in taken
        if module != f"matchai.{wing_of(module)}" or name not in handed_on(wing_of(module))
    ]
    assert private == []


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_tells_all_that_it_hands_on_and_can_be_asked_for_it(wing: str) -> None:
    module = importlib.import_module(f"matchai.{wing}")
    assert sorted(module.__all__) == sorted(handed_on(wing))
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


def test_a_wing_asked_for_another_name_says_that_it_has_none() -> None:
    with pytest.raises(AttributeError, match=r"module 'matchai\.metrics' has no attribute 'ledger'"):
        importlib.import_module("matchai.metrics").ledger  # noqa: B018


@pytest.mark.parametrize("room", [room for room in ROOMS if FLOOR[wing_of_room(room)] < FLOOR["training"]])
def test_a_part_takes_its_own_settings_and_never_the_whole_config(room: str) -> None:
    is_a_setting = wing_of_room(room) == "settings"
    assert is_a_setting or "TrainConfig" not in {name for _, name in imports_in(tree_of(room))}


@pytest.mark.parametrize(("wing", "most"), [*((wing, 14) for wing in WINGS), ("top", 15)])
def test_a_wing_has_few_rooms(wing: str, most: int) -> None:
    assert sum(wing_of_room(room) == wing for room in ROOMS) <= most


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_is_above_400_lines(room: str) -> None:
    assert len((PACKAGE / room).read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("room", ROOMS)
def test_no_function_is_above_60_lines(room: str) -> None:
    lengths = {name: (one.end_lineno or 0) - one.lineno + 1 for name, one in functions_of(room)}
    assert {name for name, length in lengths.items() if length > 60} == set()


@pytest.mark.parametrize("room", ROOMS)
def test_only_constructors_have_more_than_nine_parameters(room: str) -> None:
    numbers = {
        name: len(one.args.posonlyargs + one.args.args + one.args.kwonlyargs) for name, one in functions_of(room)
    }
    assert {name for name, number in numbers.items() if number > 9 and not name.endswith("__init__")} == set()


@pytest.mark.parametrize("path", sorted(path.relative_to(TESTS).as_posix() for path in TESTS.glob("*/test_*.py")))
def test_a_test_lies_where_its_room_does(path: str) -> None:
    folder, name = path.split("/")
    mirrored = {room for room in ROOMS if wing_of_room(room) == folder}
    ends_to_end = {"commands", "docs"}
    assert folder in ends_to_end or f"{folder}/{name.removeprefix('test_')}" in mirrored | {
        "training/distributed.py",
        "training/gpu.py",
    }


@pytest.mark.parametrize("wing", WINGS)
def test_every_wing_is_told_in_the_readme(wing: str) -> None:
    assert f"`{wing}" in (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
