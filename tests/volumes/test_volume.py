from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matchai.system.errors import InputError
from matchai.volumes.volume import STEPS, file_labels, open_array_volume, release_pages, turn

ORIENTATIONS = ("LP", "LA", "RP", "RA", "PL", "PR", "AL", "AR")
SIDES = {"L": (1, 0), "R": (-1, 0), "P": (0, 1), "A": (0, -1)}  # toward the left, toward the back


def lay_out(orientation: str) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """A slice of 3 pixels from right to left and 3 from front to back, each holding 10 · left + back."""
    rows, columns = (SIDES[letter] for letter in orientation)
    image = np.zeros((3, 3), np.int64)
    for i in range(3):
        for j in range(3):
            left, back = (rows[k] * (i - 1) + columns[k] * (j - 1) + 1 for k in (0, 1))
            image[i, j] = 10 * left + back
    return image


@pytest.mark.parametrize("wanted", ORIENTATIONS)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_turned_slice_shows_the_same_places(orientation: str, wanted: str) -> None:
    assert turn(lay_out(orientation), orientation, wanted).tolist() == lay_out(wanted).tolist()


@given(st.sampled_from(ORIENTATIONS), st.sampled_from(ORIENTATIONS), st.integers(1, 4), st.integers(1, 4))
def test_turning_back_gives_the_slice_itself(orientation: str, wanted: str, height: int, width: int) -> None:
    stack = np.arange(2 * height * width).reshape(2, height, width)
    assert np.array_equal(turn(turn(stack, orientation, wanted), wanted, orientation), stack)


def test_the_background_is_0_in_files_for_viewers_and_the_others_follow() -> None:
    assert file_labels(4, 3) == [1, 2, 3, 0]
    assert file_labels(3, 0) == [0, 1, 2]


@pytest.mark.parametrize("shape", [(3, 40, 50), (3, 40, 50, 1), (40, 50)])
def test_a_mask_comes_back_in_the_arrays_own_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "scan.npy", np.zeros(shape, np.float32))
    volume = open_array_volume(tmp_path / "scan.npy", "LP", (1, 0))
    mask = np.random.default_rng(0).integers(0, 4, volume.shape).astype(np.uint8)
    path = volume.save_mask(tmp_path, mask, [1, 2, 3, 0])
    saved = np.load(path)
    assert saved.shape == shape
    assert saved.dtype == np.uint8
    assert np.array_equal(saved.reshape(mask.shape), mask)


def test_a_map_is_saved_as_numbers_from_0_to_1(tmp_path: Path) -> None:
    np.save(tmp_path / "scan.npy", np.zeros((1, 32, 32), np.float32))
    volume = open_array_volume(tmp_path / "scan.npy", "LP", (1, 0))
    values = np.linspace(0, STEPS, 32 * 32).round().astype(np.uint16).reshape(1, 32, 32)
    saved = np.load(volume.save_map(tmp_path, values, "uncertainty"))
    assert np.array_equal(np.rint(saved.astype(np.float64) * STEPS), values)


def test_an_array_whose_last_axis_may_be_that_of_the_slices_says_how_it_is_read(tmp_path: Path) -> None:
    np.save(tmp_path / "scan.npy", np.zeros((64, 64, 40), np.float32))
    assert "read as 64 slices of 64x40 pixels" in open_array_volume(tmp_path / "scan.npy", "LP", (1, 0)).notes[0]


@pytest.mark.parametrize("dtype", [">f4", "<f8", ">i2", "u2", "f2"])
def test_numbers_of_any_byte_order_are_read_as_hu(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "scan.npy", np.full((1, 32, 32), 100).astype(dtype))
    image = open_array_volume(tmp_path / "scan.npy", "LP", (2.0, -1000.0)).read(0)
    assert image.dtype == np.dtype(np.float32)
    assert image.dtype.isnative
    assert (image == -800).all()


@pytest.mark.parametrize("shape", [(32,), (2, 32, 32, 3), (1, 2, 32, 32, 1)])
def test_an_array_that_is_no_stack_of_slices_is_refused_with_its_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "scan.npy", np.zeros(shape))
    with pytest.raises(InputError, match=rf"scan.npy has shape \({shape[0]}"):
        open_array_volume(tmp_path / "scan.npy", "LP", (1, 0))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads its own memory from /proc")
def test_what_was_read_of_a_mapped_array_is_given_back(tmp_path: Path) -> None:
    def mapped() -> int:
        text = Path("/proc/self/smaps").read_text().split("big.npy", 1)
        return int(text[1].split("Rss:", 1)[1].split("kB", 1)[0]) if len(text) > 1 else 0

    np.save(tmp_path / "big.npy", np.ones((8, 1024, 1024), np.float32))
    array = np.load(tmp_path / "big.npy", mmap_mode="r")
    assert array.sum() == 8 * 1024 * 1024
    assert mapped() > 30_000  # kB
    release_pages(array[1:3][0])
    assert mapped() < 1_000
    assert array[7, 5, 5] == 1
