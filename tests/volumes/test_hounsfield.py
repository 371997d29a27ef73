"""Numbers that are no HU are told with the way out."""

import pytest

from matchai.volumes.hounsfield import implausible_range

WINDOW = (-1500.0, 500.0)


@pytest.mark.parametrize("span", [(-1024, 3071), (-2048, 1500), (-1000, 50), (-3024, 400), (-700, 0)])
def test_hounsfield_units_of_a_lung_are_let_through(span: tuple[float, float]) -> None:
    assert implausible_range("a.png", *span, WINDOW) is None


@pytest.mark.parametrize(
    ("low", "high", "told"),
    [
        (0, 4095, "--rescale 1 -1024"),
        (24, 1524, "--rescale 1 -1024"),
        (31744, 34815, "--rescale 1 -32768"),
        (0, 35839, "--rescale 1 -32768"),
        (0, 65535, "16-bit grey values"),
        (0, 255, "8-bit grey values"),
        (0, 1, "scaled to 0..1"),
        (-1, 1, "no Hounsfield units"),
        (5000, 9000, "all outside"),
        (-9000, -2000, "all outside"),
        (7, 7, "constant"),
    ],
)
def test_other_numbers_are_told_for_what_they_look_like(low: float, high: float, told: str) -> None:
    problem = implausible_range("a.png", low, high, WINDOW)
    assert problem is not None
    assert problem.startswith("a.png")
    assert told in problem
    assert "--rescale" in problem or low == high


def test_a_window_that_is_stated_for_other_numbers_is_believed() -> None:
    assert implausible_range("a.png", 0, 255, (0, 255)) is None


@pytest.mark.parametrize("span", [(0, 255), (5000, 9000), (0, 65535)])
def test_a_window_is_not_offered_where_it_cannot_be_chosen(span: tuple[float, float]) -> None:
    problem = implausible_range("a.png", *span, WINDOW, can_choose_window=False)
    assert problem is not None
    assert "--rescale" in problem
    assert "--hu-window" not in problem
