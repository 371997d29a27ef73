"""Numbers that are no HU are told with the way out, whatever lies outside the scanner's circle."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from matchai.volumes.hounsfield import AIR, ValueCounts, count_values, implausible_values, raw_slice, replace_padding

WINDOW = (-1500.0, 500.0)
PADDINGS = [-2000, -2048, -3024, -8192, -32768]


def spread(low: float, high: float) -> ValueCounts:
    return count_values(np.linspace(low, high, 4096), WINDOW)


def slice_of(*parts: tuple[float, float, float], padding: float | None = None) -> NDArray[Any]:
    """64 x 64 numbers: shares of normal noise (share, mean, deviation), and a corner of padding of a fifth."""
    rng = np.random.default_rng(0)
    numbers = np.concatenate([rng.normal(mean, width, round(share * 4096)) for share, mean, width in parts])
    numbers = np.resize(numbers, 4096)
    if padding is not None:
        numbers[: 4096 // 5] = padding
    return numbers.reshape(64, 64)


AIR_AROUND, LUNG, TISSUE, BONE = (0.3, -1000, 15), (0.3, -850, 60), (0.37, 40, 60), (0.03, 700, 150)


def told(image: NDArray[Any], **more: Any) -> str | None:
    return implausible_values("a.png", count_values(image, WINDOW), WINDOW, **more)


@pytest.mark.parametrize("span", [(-1024, 3071), (-2048, 1500), (-1000, 50), (-3024, 400), (-700, 0)])
def test_hounsfield_units_of_a_lung_are_let_through(span: tuple[float, float]) -> None:
    assert implausible_values("a.png", spread(*span), WINDOW) is None


@pytest.mark.parametrize("padding", [None, -1024, *PADDINGS])
def test_a_chest_is_let_through_with_any_padding(padding: float | None) -> None:
    assert told(slice_of(AIR_AROUND, LUNG, TISSUE, BONE, padding=padding)) is None


@pytest.mark.parametrize("padding", [None, -1024, 0, -1000, *PADDINGS])
@pytest.mark.parametrize("offset", [1024, 32768])
def test_raw_numbers_are_told_with_any_padding(padding: float | None, offset: int) -> None:
    raw = np.maximum(slice_of(AIR_AROUND, LUNG, TISSUE, BONE) + offset, 0)
    if padding is not None:
        raw[:13] = padding
    problem = told(raw)
    assert problem is not None
    assert f"--rescale 1 -{offset}" in problem


@pytest.mark.parametrize("blur", [0, 20])
def test_padding_that_resampling_has_blurred_is_seen_through(blur: int) -> None:
    raw = np.maximum(slice_of(AIR_AROUND, LUNG, TISSUE, BONE) + 1024, 0)
    raw[:13] = -2000
    raw[13, :blur] = np.linspace(-1900, 0, blur)
    problem = told(np.tile(raw, (4, 4)))
    assert problem is not None
    assert "--rescale 1 -1024" in problem


@pytest.mark.parametrize("scale", [1, 255])
@pytest.mark.parametrize("padding", PADDINGS)
def test_pictures_with_padding_are_no_hounsfield_units(scale: int, padding: float) -> None:
    image = np.random.default_rng(0).random((64, 64)) * scale
    image[:10] = padding
    problem = told(image)
    assert problem is not None
    assert "not HU" in problem
    assert "padding" in problem


def test_a_body_in_air_of_one_number_is_let_through_without_a_lung() -> None:
    pelvis = slice_of((0.9, 20, 60), (0.1, 600, 200))
    pelvis[:20] = -1000
    assert told(pelvis) is None


def test_padding_of_an_unsigned_series_that_declares_none_is_no_hounsfield_unit() -> None:
    image = slice_of(AIR_AROUND, LUNG, TISSUE, BONE, padding=62512)
    problem = told(image)
    assert problem is not None
    assert "62512" in problem
    assert "-1000 HU (air)" in problem


@pytest.mark.parametrize(
    ("low", "high", "words"),
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
def test_other_numbers_are_told_for_what_they_look_like(low: float, high: float, words: str) -> None:
    problem = implausible_values("a.png", spread(low, high), WINDOW)
    assert problem is not None
    assert problem.startswith("a.png")
    assert words in problem
    assert "--rescale" in problem or low == high


def test_a_window_that_is_stated_for_other_numbers_is_believed() -> None:
    assert implausible_values("a.png", spread(0, 255), (0, 255)) is None


@pytest.mark.parametrize("span", [(0, 255), (5000, 9000), (0, 65535)])
def test_a_window_is_not_offered_where_it_cannot_be_chosen(span: tuple[float, float]) -> None:
    problem = implausible_values("a.png", spread(*span), WINDOW, can_choose_window=False)
    assert problem is not None
    assert "--rescale" in problem
    assert "--hu-window" not in problem


@pytest.mark.parametrize("padding", PADDINGS)
def test_padding_becomes_air_and_nothing_else_changes(padding: float) -> None:
    image = slice_of(AIR_AROUND, LUNG, TISSUE, BONE).astype(np.float32)
    padded = image.copy()
    padded[:13] = padding
    expected = image.copy()
    expected[:13] = AIR
    assert np.array_equal(replace_padding(padded, WINDOW), expected)
    note = count_values(padded, WINDOW).padding_note()
    assert note is not None
    assert "20.3%" in note
    assert f"{padding:g}" in note


def test_what_lies_in_a_window_is_no_padding() -> None:
    image = np.array([[-5000.0, -2000.0, 0.0]], np.float32)
    assert replace_padding(image, (-3000, 500)).tolist() == [[-1000, -2000, 0]]
    assert replace_padding(image, (-1000, 500)).tolist() == [[-1000, -1000, 0]]


@given(st.lists(st.lists(st.integers(-70000, 70000), min_size=1, max_size=20), min_size=1, max_size=5))
def test_counts_add_up_over_images(images: list[list[int]]) -> None:
    total = ValueCounts.total(count_values(np.array(one, np.float32), WINDOW) for one in images)
    whole = count_values(np.array([value for one in images for value in one], np.float32), WINDOW)
    assert (total.low, total.high, total.num_padding) == (whole.low, whole.high, whole.num_padding)
    assert np.array_equal(total.counts, whole.counts)
    assert total.counts.sum() == sum(map(len, images))


@pytest.mark.parametrize("spread", [20, 100, 200])
def test_noisy_padding_hides_no_raw_numbers(spread: float) -> None:
    raw = np.maximum(slice_of(AIR_AROUND, LUNG, TISSUE, BONE) + 1024, 0)
    raw[:13] = np.random.default_rng(1).normal(-2200, spread, (13, 64))
    problem = told(raw)
    assert problem is not None
    assert "--rescale 1 -1024" in problem


def test_a_few_pixels_hide_no_raw_numbers() -> None:
    raw = np.maximum(slice_of(AIR_AROUND, LUNG, TISSUE, BONE) + 1024, 0)
    raw[0, 0] = -1200
    problem = told(np.tile(raw, (2, 2)))
    assert problem is not None
    assert "--rescale 1 -1024" in problem


@pytest.mark.parametrize("scale", [1, 255])
def test_pictures_with_air_of_one_number_are_no_hounsfield_units(scale: int) -> None:
    image = np.random.default_rng(0).random((64, 64)) * scale
    image[:10] = -1000
    assert told(image) is not None


@pytest.mark.parametrize("padding", [3071, 4095, 30000])
def test_high_padding_is_told_and_metal_is_not(padding: float) -> None:
    image = slice_of(AIR_AROUND, LUNG, TISSUE, BONE)
    image[0, :8] = padding
    assert told(image) is None
    image[:13] = padding
    problem = told(image)
    assert problem is not None
    assert f"{padding}" in problem


def test_raw_slices_are_told_from_those_in_hu() -> None:
    in_hu = slice_of(AIR_AROUND, LUNG, TISSUE, BONE)
    assert not raw_slice(count_values(in_hu, WINDOW), WINDOW)
    assert raw_slice(count_values(in_hu + 1024 + 50, WINDOW), WINDOW)
