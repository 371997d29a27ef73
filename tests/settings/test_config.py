"""Every setting once: names and conversion."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from matchai.settings.config import FREE, LEAVES, PLACE, PRESETS, TrainConfig
from matchai.system.errors import InputError


def test_leaf_names_are_unique() -> None:
    default = TrainConfig()
    names = [
        leaf.name for group in dataclasses.fields(default) for leaf in dataclasses.fields(getattr(default, group.name))
    ]
    assert len(names) == len(set(names)) == len(LEAVES)


def test_lists_of_names_hold_settings_only() -> None:
    assert {*PLACE, *FREE, *(name for preset in PRESETS.values() for name in preset)} <= set(LEAVES)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("max_lr", "3e-4", 0.0003),
        ("max_lr", 1, 1.0),
        ("epochs", 3.0, 3),
        ("epochs", "7", 7),
        ("seed", 2**63 - 1, 2**63 - 1),
        ("mixed_precision", False, "no"),
        ("num_workers", None, None),
        ("num_workers", 2, 2),
        ("data", "a/b", Path("a/b")),
        ("data", None, None),
        ("sets", ["a", "b"], ("a", "b")),
        ("hu_window", [-1000, "2e2"], (-1000.0, 200.0)),
        ("restart", True, True),
        ("save_every", 200, "200"),
    ],
)
def test_a_value_is_taken_as_the_type_of_its_setting(name: str, given: Any, expected: Any) -> None:
    value = TrainConfig().updated_from({name: given}).flat()[name]
    assert value == expected
    assert type(value) is type(expected) or isinstance(expected, Path)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("max_lr", "fast"),
        ("max_lr", True),
        ("max_lr", None),
        ("max_lr", [1]),
        ("epochs", 2.5),
        ("epochs", True),
        ("epochs", "many"),
        ("restart", 1),
        ("restart", "yes"),
        ("encoder", 5.5),
        ("sets", "medseg"),
        ("hu_window", [1]),
        ("hu_window", [1, 2, 3]),
        ("hu_window", 5),
        ("class_names", [1.5, 2.5]),
        ("preset", "best"),
        ("data", 3),
        ("preset", ["quick"]),
        ("num_workers", "two"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(name: str, given: Any) -> None:
    with pytest.raises(InputError, match=name):
        TrainConfig().updated_from({name: given})


def test_an_unknown_name_is_told_with_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean batch_size"):
        TrainConfig().updated_from({"batch_sise": 4})


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(InputError) as caught:
        TrainConfig().updated_from({"epochs": "x", "nothing_like_it_at_all": 1, "max_lr": "y", "seed": 1})
    assert len(caught.value.problems) == 3


def test_an_update_changes_nothing_else() -> None:
    changed = TrainConfig().updated(epochs=3, image_size=64).flat()
    for name, value in TrainConfig().flat().items():
        assert changed[name] == {"epochs": 3, "image_size": 64}.get(name, value)
