"""Augmentation: a pure function of (slice, key) that moves image and target together."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from matchai.data.augmentation import Augmentation
from tests.conftest import assert_global_randomness_is_untouched

BACKGROUND = 3
NEVER: dict[str, Any] = {
    "horizontal_flip": 0,
    "vertical_flip": 0,
    "rotate90": 0,
    "affine": 0,
    "brightness_contrast": 0,
}
ALWAYS: dict[str, Any] = dict.fromkeys(NEVER, 1.0)
SIZE = 64


def one_slice(seed: int = 0, labels: tuple[int, ...] = (0, 2)) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    generator = np.random.default_rng(seed)
    image = generator.random((SIZE, SIZE), dtype=np.float32)
    target = np.full((SIZE, SIZE), labels[0], np.uint8)
    target[:, SIZE // 3 :] = labels[-1]
    return image, target


def augment(settings_: dict[str, Any], epoch: int = 0, position: int = 0, *, seed: int = 0, air: float = 0.0) -> Any:
    return Augmentation(seed, air, BACKGROUND, **settings_)(*one_slice(), epoch, position)


def test_the_same_key_gives_the_same_bytes() -> None:
    first, second = (augment({}, 3, 5) for _ in range(2))
    assert [part.tobytes() for part in first] == [part.tobytes() for part in second]


def test_a_draw_does_not_depend_on_those_before_it() -> None:
    augmentation = Augmentation(0, 0.0, BACKGROUND, **ALWAYS)
    for position in range(7):
        image, target = augmentation(*one_slice(), 1, position)
    fresh_image, fresh_target = Augmentation(0, 0.0, BACKGROUND, **ALWAYS)(*one_slice(), 1, 6)
    assert np.array_equal(image, fresh_image)
    assert np.array_equal(target, fresh_target)


@pytest.mark.parametrize("other", [{"position": 1}, {"epoch": 1}, {"seed": 1}], ids=str)
def test_another_position_epoch_or_seed_augments_differently(other: dict[str, int]) -> None:
    assert not np.array_equal(augment(ALWAYS)[0], augment(ALWAYS, **other)[0])


def test_the_global_random_states_are_neither_changed_nor_read() -> None:
    assert_global_randomness_is_untouched(lambda: [part.tobytes() for part in augment(ALWAYS)])


@settings(deadline=None, max_examples=40)
@given(position=st.integers(0, 10**6), limit=st.floats(0, 1))
def test_values_stay_in_0_to_1(position: int, limit: float) -> None:
    image, _ = augment({**ALWAYS, "brightness_contrast_limit": limit}, position=position)
    assert image.min() >= 0
    assert image.max() <= 1


@settings(deadline=None, max_examples=40)
@given(position=st.integers(0, 10**6))
def test_shape_and_dtype_are_kept(position: int) -> None:
    image, target = augment(ALWAYS, position=position)
    assert (image.shape, image.dtype) == ((SIZE, SIZE), np.float32)
    assert (target.shape, target.dtype) == ((SIZE, SIZE), np.uint8)


def test_the_input_is_left_as_it_was() -> None:
    image, target = one_slice()
    before = image.tobytes(), target.tobytes()
    for position in range(10):
        Augmentation(0, 0.0, BACKGROUND, **ALWAYS)(image, target, 0, position)
    assert (image.tobytes(), target.tobytes()) == before


@pytest.mark.parametrize("position", range(5))
def test_all_chances_0_is_the_identity_bit_for_bit(position: int) -> None:
    image, target = augment(NEVER, position=position)
    assert image.tobytes() == one_slice()[0].tobytes()
    assert target.tobytes() == one_slice()[1].tobytes()


@pytest.mark.parametrize("position", range(5))
def test_brightness_of_strength_0_is_the_identity(position: int) -> None:
    image, _ = augment({**NEVER, "brightness_contrast": 1.0, "brightness_contrast_limit": 0.0}, position=position)
    assert np.abs(image - one_slice()[0]).max() <= 1e-6


def test_brightness_leaves_the_target_alone() -> None:
    image, target = augment({**NEVER, "brightness_contrast": 1.0})
    assert not np.array_equal(image, one_slice()[0])
    assert np.array_equal(target, one_slice()[1])


@settings(deadline=None, max_examples=40)
@given(position=st.integers(0, 10**6))
def test_labels_are_those_of_the_slice_and_background(position: int) -> None:
    _, target = augment({**ALWAYS, "affine_rotate": 90.0}, position=position)
    assert set(np.unique(target)) <= {0, 2, BACKGROUND}


@pytest.mark.parametrize("air", [0.0, 0.25])
def test_what_an_affine_map_uncovers_is_air_and_background(air: float) -> None:
    image, target = np.full((SIZE, SIZE), 0.75, np.float32), np.zeros((SIZE, SIZE), np.uint8)
    augmentation = Augmentation(0, air, BACKGROUND, **{**NEVER, "affine": 1.0, "affine_rotate": 45.0})
    uncovered = 0
    for position in range(10):
        new_image, new_target = augmentation(image, target, 0, position)
        outside = new_target == BACKGROUND
        uncovered += int(outside.sum())
        # a pixel on the edge mixes both; away from it there is only air
        padded = np.pad(~outside, 2)
        near = np.any([np.roll(padded, (i, j), (0, 1)) for i in range(-2, 3) for j in range(-2, 3)], axis=0)
        assert np.allclose(new_image[outside & ~near[2:-2, 2:-2]], air, atol=1e-6)
        assert new_image.min() >= air - 1e-6
    assert uncovered > 100


@settings(deadline=None, max_examples=60)
@given(
    position=st.integers(0, 10**6),
    moves=st.sets(st.sampled_from(["horizontal_flip", "vertical_flip", "rotate90", "affine"])),
)
def test_image_and_target_move_together(position: int, moves: set[str]) -> None:
    target = np.full((SIZE, SIZE), BACKGROUND, np.uint8)
    target[10:40, 5:25], target[25:50, 30:55] = 0, 1
    marks = np.array([0.4, 0.7, 1.0, 0.0], np.float32)
    augmentation = Augmentation(0, 0.0, BACKGROUND, **{**NEVER, **dict.fromkeys(moves, 1.0)})
    image, moved = augmentation(marks[target], target, 0, position)
    for label in (0, 1):
        inside = moved == label
        assert inside.any()
        assert (np.abs(image[inside] - marks[label]) < 0.15).mean() >= 0.9


@pytest.mark.parametrize("chance", ["horizontal_flip", "vertical_flip", "affine"])
def test_a_chance_is_kept(chance: str) -> None:
    image, target = one_slice()
    augmentation = Augmentation(0, 0.0, BACKGROUND, **{**NEVER, chance: 0.3})
    changed = sum(not np.array_equal(augmentation(image, target, 0, position)[0], image) for position in range(400))
    assert abs(changed - 120) <= 4 * np.sqrt(400 * 0.3 * 0.7)


@settings(deadline=None, max_examples=25)
@given(position=st.integers(0, 10**6), channels=st.sampled_from([1, 3, 7, 9]))
def test_every_channel_is_changed_as_it_would_be_alone(position: int, channels: int) -> None:
    augmentation = Augmentation(0, 0.2, BACKGROUND, **ALWAYS, channels=channels)
    target = one_slice()[1]
    images = np.stack([one_slice(seed)[0] for seed in range(channels)])
    together, moved = augmentation(images, target, 1, position)
    assert together.shape == images.shape
    assert together.dtype == np.float32
    for image, found in zip(images, together, strict=True):
        alone, expected = Augmentation(0, 0.2, BACKGROUND, **ALWAYS)(image, target, 1, position)
        assert np.array_equal(found, alone)
        assert np.array_equal(moved, expected)
