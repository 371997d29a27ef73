"""Errors that speak to the user."""

import pickle

import pytest

from matchai.system.errors import InputError, Problems, plural


def test_problems_stay_apart_on_their_way_to_another_process() -> None:
    error = pickle.loads(pickle.dumps(InputError("The first.", "The second.")))
    assert error.problems == ("The first.", "The second.")


def test_all_problems_are_told_at_once() -> None:
    problems = Problems()
    for words in (("a", "b"), ("c",)):
        with problems.collect():
            raise InputError(*words)
    with pytest.raises(InputError) as told:
        problems.raise_any()
    assert told.value.problems == ("a", "b", "c")


def test_without_a_problem_nothing_is_raised() -> None:
    Problems().raise_any()


def test_another_error_is_not_collected() -> None:
    with pytest.raises(KeyError), Problems().collect():
        raise KeyError


@pytest.mark.parametrize(("number", "told"), [(0, "0 slices"), (1, "1 slice"), (2, "2 slices")])
def test_a_noun_is_in_the_plural_where_it_is_due(number: int, told: str) -> None:
    assert plural(number, "slice") == told
