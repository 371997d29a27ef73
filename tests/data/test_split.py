"""Groups are found where they show, and no group is ever on two sides."""

import itertools
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from matchai.data.phantom import phantom_slices
from matchai.data.split import assign_folds, check_groups_array, find_groups, volume_numbers
from matchai.system.errors import InputError

MEDSEG = Path(__file__).parents[3] / "shared/data/medseg50.npz"
RADIOPAEDIA_LENGTHS = (39, 39, 42, 42, 45, 45, 66, 93, 418)
HALVES_AND_FIFTHS = st.sampled_from([(0.2, 0.8), (1, 1), (1, 1, 1), (1, 1, 1, 1, 1), (3, 1, 1)])


def thumbnails_of(images: NDArray[Any]) -> NDArray[np.float32]:
    windowed = np.clip((images.astype(np.float32) + 1500) / 2000, 0, 1)
    return np.stack([cv2.resize(image, (64, 64), interpolation=cv2.INTER_AREA) for image in windowed])


def phantom_stack(
    lengths: tuple[int, ...], seed: int = 0, turned: int = 99
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Phantom volumes of these lengths, one in `turned` upside down: thumbnails and the volume of each slice."""
    volumes = []
    for number, length in enumerate(lengths):
        drawn = phantom_slices(length, seed=100 * seed + number, size=64, slices_per_volume=length)
        volume = [image for image, _, _ in drawn]
        volumes.append(np.stack(volume[::-1] if number % turned == turned - 1 else volume))
    return thumbnails_of(np.concatenate(volumes)), np.repeat(np.arange(len(lengths)), lengths)


def zeros(num_slices: int) -> NDArray[np.int64]:
    return np.zeros(num_slices, np.int64)


def num_false_breaks(groups: NDArray[np.int64], volumes: NDArray[np.int64]) -> int:
    return sum(len(np.unique(groups[volumes == volume])) - 1 for volume in np.unique(volumes))


@pytest.fixture(scope="module")
def medseg() -> dict[str, NDArray[np.int16]]:
    if not MEDSEG.exists():
        pytest.skip("the real slices are not here")
    with np.load(MEDSEG) as archive:
        return {name: archive[name] for name in ("images", "kaggle_index")}


@pytest.fixture(scope="module")
def stack() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    return phantom_stack((30, 24, 8, 40, 12, 9))


# Groups


def test_real_slices_of_one_cut_or_of_near_cuts_share_a_group_and_strangers_do_not(
    medseg: dict[str, NDArray[np.int16]],
) -> None:
    found = find_groups(thumbnails_of(medseg["images"]), zeros(50))
    pairs = {
        (int(medseg["kaggle_index"][i]), int(medseg["kaggle_index"][j]))
        for i, j in itertools.combinations(range(50), 2)
        if found.groups[i] == found.groups[j]
    }
    assert pairs == {(10, 43), (4, 17), (5, 46)}
    assert (found.num_groups, found.num_volumes, found.num_alone, found.num_duplicate_pairs) == (47, 0, 50, 3)


@pytest.mark.parametrize("seed", range(5))
def test_order_joins_nothing_in_a_shuffled_array(medseg: dict[str, NDArray[np.int16]], seed: int) -> None:
    images = medseg["images"][np.random.default_rng(seed).permutation(50)]
    assert find_groups(thumbnails_of(images), zeros(50)).num_volumes == 0


def test_a_shuffled_array_with_a_stack_behind_it_keeps_its_slices_apart(
    medseg: dict[str, NDArray[np.int16]], stack: tuple[NDArray[np.float32], NDArray[np.int64]]
) -> None:
    both = np.concatenate([thumbnails_of(medseg["images"]), stack[0]])
    found = find_groups(both, zeros(len(both)))
    assert (found.num_volumes, found.num_alone) == (6, 50)


def test_real_slices_shifted_or_with_noise_are_found_as_duplicates(medseg: dict[str, NDArray[np.int16]]) -> None:
    images = medseg["images"].astype(np.float32)
    noise = np.random.default_rng(0).normal(0, 50, images.shape).astype(np.float32)
    again = np.roll(images, (2, -2), (1, 2)) + noise
    groups = find_groups(thumbnails_of(np.concatenate([images, again])), np.repeat([0, 1], 50)).groups
    assert (groups[:50] == groups[50:]).all()


def test_every_break_between_phantom_volumes_is_found_and_none_within(
    stack: tuple[NDArray[np.float32], NDArray[np.int64]],
) -> None:
    found = find_groups(stack[0], zeros(len(stack[0])))
    assert (found.groups == stack[1]).all()


@pytest.mark.parametrize("seed", range(3))
def test_no_volume_of_a_stack_with_very_different_lengths_is_cut(seed: int) -> None:
    lengths = np.random.default_rng(seed).permutation(RADIOPAEDIA_LENGTHS)
    thumbnails, volumes = phantom_stack(tuple(lengths.tolist()), seed + 1, turned=3)
    found = find_groups(thumbnails, zeros(len(volumes)))
    assert num_false_breaks(found.groups, volumes) == 0
    assert found.num_groups >= 6  # where top meets top a break may be missed, but nearly all in one group is no split


def test_one_spoilt_slice_does_not_cut_its_volume(stack: tuple[NDArray[np.float32], NDArray[np.int64]]) -> None:
    thumbnails = stack[0].copy()
    thumbnails[70] = np.random.default_rng(0).random((64, 64), dtype=np.float32)
    assert (find_groups(thumbnails, zeros(len(thumbnails))).groups == stack[1]).all()


def test_a_new_array_is_a_new_volume(stack: tuple[NDArray[np.float32], NDArray[np.int64]]) -> None:
    volume = stack[0][62:102]
    assert find_groups(volume, zeros(40)).num_volumes == 1
    assert find_groups(volume, np.repeat([0, 1], 20)).num_volumes == 2


def test_a_volume_exported_again_joins_the_first(stack: tuple[NDArray[np.float32], NDArray[np.int64]]) -> None:
    thumbnails, volumes = stack
    again = thumbnails[volumes == 3] + np.random.default_rng(0).normal(0, 0.01, (40, 64, 64)).astype(np.float32)
    sets = np.repeat([0, 1], [len(volumes), 40])
    groups = find_groups(np.concatenate([thumbnails, again]), sets).groups
    assert (groups == np.concatenate([volumes, np.full(40, 3)])).all()


def test_groups_are_numbered_by_first_appearance(stack: tuple[NDArray[np.float32], NDArray[np.int64]]) -> None:
    order = np.random.default_rng(0).permutation(len(stack[0]))
    groups = find_groups(stack[0][order], zeros(len(order))).groups
    _, first = np.unique(groups, return_index=True)
    assert groups.dtype == np.int64
    assert (np.diff(first) > 0).all()


def test_the_description_tells_what_was_found(stack: tuple[NDArray[np.float32], NDArray[np.int64]]) -> None:
    description = find_groups(stack[0], zeros(len(stack[0]))).description
    assert description.startswith(
        "123 slices in 6 volumes found by breaks between neighbours; 0 near-duplicate pairs joined: 6 groups."
    )
    assert "groups file" in description


@pytest.mark.parametrize("length", [8, 20, 60])
def test_an_array_of_one_volume_is_one_group(length: int) -> None:
    for seed in range(5):
        thumbnails, _ = phantom_stack((length,), seed)
        assert find_groups(thumbnails, zeros(length)).num_groups == 1


@pytest.mark.parametrize("num_slices", [1, 2, 3, 4])
def test_few_slices_and_slices_without_content_are_no_trouble(num_slices: int) -> None:
    blank = np.full((num_slices, 64, 64), 0.25, np.float32)
    assert find_groups(blank, zeros(num_slices)).num_groups == num_slices


def test_identical_slices_are_one_group() -> None:
    thumbnail = np.random.default_rng(0).random((1, 64, 64), dtype=np.float32)
    assert find_groups(np.repeat(thumbnail, 1100, 0), zeros(1100)).num_groups == 1


def test_a_thousand_slices_take_seconds_at_most() -> None:
    thumbnails = np.random.default_rng(0).random((1000, 64, 64), dtype=np.float32)
    start = time.perf_counter()
    find_groups(thumbnails, zeros(1000))
    assert time.perf_counter() - start < 5  # 0.2 s on two free cores


# Folds


@st.composite
def groups_with_presence(draw: st.DrawFn) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    sizes = draw(st.lists(st.integers(1, 30), min_size=5, max_size=40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    groups = rng.permutation(np.repeat(rng.permutation(len(sizes)), sizes))
    return groups, rng.random((len(groups), 4)) < (0.9, 0.4, 0.1, 1)


@settings(max_examples=60, deadline=None)
@given(groups_with_presence(), HALVES_AND_FIFTHS, st.integers(0, 2**63))
def test_no_group_is_ever_on_two_sides_and_no_side_is_empty(
    slices: tuple[NDArray[np.int64], NDArray[np.bool_]], shares: tuple[float, ...], seed: int
) -> None:
    groups, presence = slices
    bins = assign_folds(groups, presence, shares, seed)
    assert bins.shape == groups.shape
    assert bins.dtype == np.int64
    assert all(len(np.unique(bins[groups == group])) == 1 for group in np.unique(groups))
    assert set(bins.tolist()) == set(range(len(shares)))


@settings(max_examples=60, deadline=None)
@given(groups_with_presence(), HALVES_AND_FIFTHS, st.integers(0, 2**63))
def test_sizes_lie_within_the_largest_group_of_the_shares(
    slices: tuple[NDArray[np.int64], NDArray[np.bool_]], shares: tuple[float, ...], seed: int
) -> None:
    groups, presence = slices
    largest = np.bincount(groups).max()
    wanted = np.array(shares) / sum(shares) * len(groups)
    if wanted.min() >= largest:  # below that, keeping a side from being empty comes first
        sizes = np.bincount(assign_folds(groups, presence, shares, seed), minlength=len(shares))
        assert (np.abs(sizes - wanted) <= largest).all()


@settings(max_examples=30, deadline=None)
@given(groups_with_presence(), st.integers(0, 2**63))
def test_the_order_of_the_slices_does_not_part_groups(
    slices: tuple[NDArray[np.int64], NDArray[np.bool_]], seed: int
) -> None:
    groups, presence = slices
    order = np.random.default_rng(seed).permutation(len(groups))
    bins = assign_folds(groups[order], presence[order], (0.2, 0.8), seed)
    assert not set(groups[order][bins == 0]) & set(groups[order][bins == 1])


def test_a_hundred_single_slices_give_twenty_of_each_kind_in_proportion() -> None:
    presence = np.stack([np.arange(100) < 96, np.arange(100) >= 22, np.ones(100, bool)], 1)
    for seed in range(10):
        validation = assign_folds(np.arange(100), presence, (0.2, 0.8), seed) == 0
        assert validation.sum() == 20
        assert abs(presence[validation, 0].sum() - 19.2) < 1
        assert abs(presence[validation, 1].sum() - 15.6) < 1


def test_single_slices_are_truly_shuffled() -> None:
    presence = np.arange(100)[:, None] % 4 > 0
    drawn = np.stack([assign_folds(np.arange(100), presence, (0.2, 0.8), seed) == 0 for seed in range(100)])
    assert len(np.unique(drawn, axis=0)) == 100
    assert drawn.mean(0).min() > 0.04  # 0.2 with a standard deviation of 0.04
    assert drawn.mean(0).max() < 0.36


def test_the_large_volume_lands_in_training() -> None:
    groups = np.repeat(np.arange(9), RADIOPAEDIA_LENGTHS)
    presence = np.random.default_rng(0).random((829, 4)) < 0.45
    splits = [assign_folds(groups, presence, (0.2, 0.8), seed) for seed in range(20)]
    assert all((bins[groups == 8] == 1).all() for bins in splits)
    assert all(abs((bins == 0).sum() - 165.8) < 20 for bins in splits)
    assert len({bins.tobytes() for bins in splits}) > 1


def test_every_slice_is_in_exactly_one_fold_of_nearly_equal_size() -> None:
    folds = assign_folds(np.arange(103), np.ones((103, 1), bool), [1] * 5, 3)
    assert sorted(np.bincount(folds).tolist()) == [20, 20, 21, 21, 21]


def test_names_serve_as_groups() -> None:
    names = np.array(["anna", "bert", "anna", "cleo", "bert"])
    bins = assign_folds(names, np.ones((5, 1), bool), (1, 1), 0)
    assert bins[0] == bins[2]
    assert bins[1] == bins[4]


def test_the_same_arguments_give_the_same_folds_and_leave_the_global_state_alone() -> None:
    groups, presence = np.arange(60) // 3, np.arange(60)[:, None] % 2 == 0
    np.random.seed(1)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # type: ignore[index] # noqa: NPY002
    first = assign_folds(groups, presence, (0.2, 0.8), 5)
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index] # noqa: NPY002
    np.random.seed(2)  # noqa: NPY002
    assert (assign_folds(groups, presence, (0.2, 0.8), 5) == first).all()


def test_fewer_groups_than_folds_are_refused_with_the_way_out() -> None:
    with pytest.raises(InputError, match=r"^3 groups of slices found, .* 5 parts .*fewer folds, or give a groups file"):
        assign_folds(np.arange(30) // 10, np.ones((30, 1), bool), [1] * 5, 0)


# Groups files


def test_a_volume_ends_with_its_file_and_with_its_group() -> None:
    sets, groups = np.array([0, 0, 0, 1, 1, 1]), np.array(["a", "b", "b", "b", "a", "a"])
    assert volume_numbers(sets, groups).tolist() == [0, 1, 1, 2, 3, 3]


def test_the_volumes_of_one_patient_are_told_apart_by_their_images(
    stack: tuple[NDArray[np.float32], NDArray[np.int64]],
) -> None:
    thumbnails, volumes = stack
    assert (volume_numbers(zeros(len(volumes)), volumes // 2, thumbnails) == volumes).all()
    every_fifth = slice(None, None, 5)  # so far apart that they are no stack
    assert len(np.unique(volume_numbers(zeros(6), zeros(6), thumbnails[:30][every_fifth]))) == 1


def test_the_volumes_found_in_the_images_are_told(stack: tuple[NDArray[np.float32], NDArray[np.int64]]) -> None:
    assert (find_groups(stack[0], zeros(len(stack[0]))).volumes == stack[1]).all()


@pytest.mark.parametrize(
    "groups", [np.arange(4), np.array([1, 1, 2, 9], np.uint8), np.array(["a", "b", "b", "c"]), np.array([1.0, 1, 2, 2])]
)
def test_one_group_for_each_slice_is_accepted(groups: NDArray[np.int64]) -> None:
    check_groups_array(groups, 4, "groups.npy")


@pytest.mark.parametrize(
    ("groups", "problem"),
    [
        (np.arange(5), r"shape \(5,\)"),
        (np.zeros((4, 1), int), r"shape \(4, 1\)"),
        (np.array(3), r"shape \(\)"),
        (np.array(["a", 1, None, 2], object), "dtype object"),
        (np.ones(4, bool), "dtype bool"),
        (np.ones(4, complex), "dtype complex128"),
        (np.array([1, 2, np.nan, np.nan]), "2 slices without a group.* index 2"),
        (np.array([1, np.inf, 2, 3]), "1 slice without a group.* index 1"),
        (np.array(["a", "", "b", "c"]), "1 slice without a group.* index 1"),
    ],
)
def test_a_wrong_groups_array_is_refused_with_its_file(groups: NDArray[np.int64], problem: str) -> None:
    with pytest.raises(InputError, match=rf"^groups\.npy: .*{problem}.*4 slices"):
        check_groups_array(groups, 4, "groups.npy")
