"""Equal slices are found under any name, and make one group."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from matchai.data.duplicates import find_equal, join_groups
from matchai.system.errors import InputError
from tests.data.test_pairs import FILE_NUMBERS, arrays_of, read_whole, save, volumes, whole

__all__ = ["volumes", "whole"]  # fixtures


def thumbnails(num: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).random((num, 64, 64)).astype(np.float32)


def test_equal_slices_of_different_groups_are_found_and_no_others() -> None:
    slices = thumbnails(6)
    slices[4], slices[5] = slices[1], slices[0]
    assert find_equal(slices, np.arange(6)) == [(0, 5), (1, 4)]
    assert find_equal(slices, np.array([0, 1, 2, 3, 1, 5])) == [(0, 5)]


@pytest.mark.parametrize(("off", "is_equal"), [(0.0004, True), (0.01, False)])
def test_rounding_makes_no_other_slice(off: float, is_equal: bool) -> None:
    slices = thumbnails(2)
    slices[1] = slices[0] + np.random.default_rng(1).uniform(-off, off, (64, 64)).astype(np.float32)
    assert bool(find_equal(slices, np.arange(2))) == is_equal


def test_blank_slices_are_like_no_other() -> None:
    assert find_equal(np.full((4, 64, 64), 0.25, np.float32), np.arange(4)) == []


@given(st.lists(st.integers(0, 5), min_size=2, max_size=12), st.data())
def test_groups_that_share_slices_are_one_and_all_others_stay_apart(groups: list[int], data: st.DataObject) -> None:
    place = st.integers(0, len(groups) - 1)
    pairs = data.draw(st.lists(st.tuples(place, place), max_size=4))
    joined = join_groups(np.array(groups), pairs)
    linked = {number: {number} for number in groups}
    for _ in groups:
        for one, other in pairs:
            both = linked[groups[one]] | linked[groups[other]]
            for number in both:
                linked[number] = both
    for one in range(len(groups)):
        for other in range(len(groups)):
            assert (joined[one] == joined[other]) == (groups[other] in linked[groups[one]])


@pytest.mark.parametrize("dtype", [np.int16, np.float64])
def test_a_volume_under_two_names_is_one_group_and_the_run_says_so(
    volumes: Path, whole: Path, cache: Path, tmp_path: Path, dtype: type
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for path in volumes.rglob("*.nii.gz"):
        (tmp_path / path.relative_to(volumes)).symlink_to(path)
    images, labels = arrays_of(whole)
    save(tmp_path / "images/copy.nii.gz", images[8:16].transpose(1, 2, 0).astype(dtype))
    save(tmp_path / "masks/copy.nii.gz", FILE_NUMBERS[labels[8:16]].transpose(1, 2, 0))
    data = read_whole(tmp_path, cache)
    # in natural order: copy, v0, v1, ...; v1 holds the slices of copy
    assert data.groups[0] == data.groups[16]
    assert len(np.unique(data.groups)) == 4
    assert any("8 pairs of slices in different groups show the same" in note for note in data.notes)
    sides = {side: set(data.groups[rows]) for side, rows in (("train", data.train), ("val", data.val))}
    assert not sides["train"] & sides["val"]


def test_groups_that_a_user_names_are_joined_too(whole: Path, cache: Path, tmp_path: Path) -> None:
    images, masks = np.load(whole / "images_medseg.npy"), np.load(whole / "masks_medseg.npy")
    images[31], masks[31] = images[0], masks[0]
    np.save(tmp_path / "images_medseg.npy", images)
    np.save(tmp_path / "masks_medseg.npy", masks)
    np.save(tmp_path / "groups.npy", np.arange(32) // 8)
    data = read_whole(tmp_path, cache)
    assert data.groups[31] == data.groups[0]
    assert any("slice 0 of medseg and slice 31 of medseg" in note for note in data.notes)


def test_copies_alone_cannot_be_split(whole: Path, cache: Path, tmp_path: Path) -> None:
    images, labels = arrays_of(whole)
    for name in ("a", "b"):
        save(tmp_path / f"images/{name}.nii.gz", images[:8].transpose(1, 2, 0))
        save(tmp_path / f"masks/{name}.nii.gz", FILE_NUMBERS[labels[:8]].transpose(1, 2, 0))
    with pytest.raises(InputError, match="1 group of slices found"):
        read_whole(tmp_path, cache)
