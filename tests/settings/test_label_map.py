"""Label maps: read whole, or refused by name."""

import pytest

from matchai.settings.label_map import parse_label_map
from matchai.system.errors import InputError

NAMES = ("ground glass", "consolidation", "background")


def test_numbers_may_be_many_and_negative_and_spaced() -> None:
    found = parse_label_map(["0:background", "-1 : background", " 7:ground glass ", "8:ground glass"], NAMES)
    assert found == {0: 2, -1: 2, 7: 0, 8: 0}


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("background", "NUMBER:CLASS"),
        ("x:background", "NUMBER:CLASS"),
        ("1.5:background", "NUMBER:CLASS"),
        ("70000:background", "NUMBER:CLASS"),
        ("1:", "no class"),
        ("1:ground glas", "did you mean 'ground glass'"),
        ("1:bone", "the classes are ground glass, consolidation, background"),
    ],
)
def test_an_entry_of_no_number_or_no_class_is_refused_by_name(entry: str, told: str) -> None:
    with pytest.raises(InputError, match=told) as caught:
        parse_label_map(["0:background", entry], NAMES)
    assert len(caught.value.problems) == 1


def test_a_number_has_one_class() -> None:
    with pytest.raises(InputError, match="gives 3 a class twice"):
        parse_label_map(["3:background", "+3:consolidation"], NAMES)
