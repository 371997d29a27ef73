"""What makes a study this one and no other."""

from typing import Any

import pytest

from matchai.study.plan import differences


def about(**recipe: Any) -> dict[str, Any]:
    """What is stored of a study with some settings of the recipe."""
    common = {"objective": "mean_dice", "direction": "maximize", "screen_epochs": 0, "space": {}, "data": {}}
    return {**common, "split": "a", "recipe": {"epochs": 60, "ema_decay": 0.0} | recipe}


def test_equal_studies_have_no_differences() -> None:
    assert differences(about(), about()) == []


def test_a_study_of_before_a_setting_existed_is_taken_for_one_with_its_default() -> None:
    assert differences(about(), about(soft_boundary=0)) == []


def test_a_setting_that_the_older_study_did_not_know_is_told_if_it_is_used() -> None:
    assert differences(about(), about(soft_boundary=2)) == ["the recipe's soft_boundary was 0 and is 2"]


@pytest.mark.parametrize(("name", "value"), [("epochs", 30), ("ema_decay", 0.9)])
def test_another_recipe_is_told(name: str, value: Any) -> None:
    (told,) = differences(about(), about(**{name: value}))
    assert told.startswith(f"the recipe's {name} was ")
