"""The phantom: a function of its seed, near the real set in its shares, written whole or not at all."""

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from matchai.data import phantom
from matchai.data.phantom import phantom_slices, write_phantom
from matchai.system.errors import InputError

Stack = tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.int64]]


def stack(num_slices: int, *, seed: int = 0, size: int = 64, slices_per_volume: int = 8) -> Stack:
    slices = phantom_slices(num_slices, seed=seed, size=size, slices_per_volume=slices_per_volume)
    images, labels, groups = [], [], []
    for image, label, group in slices:
        images.append(image)
        labels.append(label)
        groups.append(group)
    return np.stack(images), np.stack(labels), np.array(groups)


@pytest.fixture(scope="module")
def twelve_volumes() -> Stack:
    return stack(96, size=128)


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "matchai.phantom", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_equal_seeds_give_equal_slices() -> None:
    for first, second in zip(stack(10, seed=3), stack(10, seed=3), strict=True):
        np.testing.assert_array_equal(first, second)


def test_other_seeds_give_other_slices() -> None:
    first, second = stack(2, seed=3), stack(2, seed=4)
    assert (first[0] != second[0]).mean() > 0.9
    assert (first[1] != second[1]).mean() > 0.02


def test_the_first_slices_do_not_depend_on_how_many_follow() -> None:
    short, long = stack(11), stack(20)
    np.testing.assert_array_equal(short[0], long[0][:11])
    np.testing.assert_array_equal(short[1], long[1][:11])
    np.testing.assert_array_equal(short[2], long[2][:11])


def test_size_changes_only_the_resolution() -> None:
    _, small, _ = stack(8, size=64)
    _, large, _ = stack(8, size=256)
    assert (small == large[:, 2::4, 2::4]).mean() > 0.96


def test_images_are_float32_of_plausible_hounsfield_units(twelve_volumes: Stack) -> None:
    images, labels, _ = twelve_volumes
    assert images.dtype == np.float32
    assert images.min() >= -1024
    assert images.max() < 1500
    means = [float(images[labels == label].mean()) for label in range(4)]
    assert -700 < means[phantom.GROUND_GLASS] < -450
    assert -300 < means[phantom.CONSOLIDATION] < 50
    assert -870 < means[phantom.LUNGS_OTHER] < -750


def test_labels_are_the_four_classes(twelve_volumes: Stack) -> None:
    _, labels, _ = twelve_volumes
    assert labels.dtype == np.uint8
    assert np.unique(labels).tolist() == [0, 1, 2, 3]


def test_pixel_shares_are_near_the_real_ones(twelve_volumes: Stack) -> None:
    _, labels, _ = twelve_volumes
    shares = np.bincount(labels.ravel(), minlength=4) / labels.size
    assert 0.03 < shares[phantom.GROUND_GLASS] < 0.065
    assert 0.012 < shares[phantom.CONSOLIDATION] < 0.035
    assert 0.17 < shares[phantom.LUNGS_OTHER] < 0.25
    assert 0.67 < shares[phantom.BACKGROUND] < 0.78


def test_lesions_are_as_frequent_as_in_the_real_set(twelve_volumes: Stack) -> None:
    _, labels, _ = twelve_volumes
    holds = [(labels == label).any(axis=(1, 2)).mean() for label in (phantom.GROUND_GLASS, phantom.CONSOLIDATION)]
    assert 0.88 < holds[0] < 1
    assert 0.65 < holds[1] < 0.92


def test_one_volume_in_sixteen_is_healthy() -> None:
    _, labels, groups = stack(16 * 4, size=32, slices_per_volume=4)
    healthy = [group for group in range(16) if (labels[groups == group] >= phantom.LUNGS_OTHER).all()]
    assert len(healthy) == 1


def test_the_slices_of_a_volume_are_contiguous() -> None:
    _, _, groups = stack(20)
    assert groups.tolist() == [0] * 8 + [1] * 8 + [2] * 4


def test_neighbours_are_more_alike_than_slices_of_different_volumes(twelve_volumes: Stack) -> None:
    images, _, groups = twelve_volumes
    near, far = [], []
    for first, second in itertools.combinations(range(0, 96), 2):
        if groups[first] == groups[second] and second == first + 1:
            near.append(np.abs(images[first] - images[second]).mean())
        elif first % 8 == second % 8:  # the same height in two patients
            far.append(np.abs(images[first] - images[second]).mean())
    assert np.mean(near) < 0.6 * np.mean(far)


def test_the_files_have_the_kaggle_layout(tmp_path: Path) -> None:
    write_phantom(tmp_path / "new" / "set", 10, seed=5, size=48)
    images, masks, groups = (
        np.load(tmp_path / "new" / "set" / name) for name in ("images_medseg.npy", "masks_medseg.npy", "groups.npy")
    )
    assert (images.shape, images.dtype) == ((10, 48, 48, 1), np.float32)
    assert (masks.shape, masks.dtype) == ((10, 48, 48, 4), np.bool_)
    assert (groups.shape, groups.dtype) == ((10,), np.int64)
    expected = stack(10, seed=5, size=48)
    np.testing.assert_array_equal(images[..., 0], expected[0])
    np.testing.assert_array_equal(masks, expected[1][..., None] == np.arange(4))
    np.testing.assert_array_equal(groups, expected[2])


def test_nothing_but_the_three_files_is_left(tmp_path: Path) -> None:
    write_phantom(tmp_path, 2, size=32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["groups.npy", "images_medseg.npy", "masks_medseg.npy"]


@pytest.mark.parametrize("name", ["images_medseg.npy", "masks_medseg.npy", "groups.npy"])
def test_refuses_to_overwrite(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(InputError, match=name):
        write_phantom(tmp_path, 2, size=32)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b"mine"


@pytest.mark.parametrize(("num_slices", "size", "seed"), [(1, 64, 0), (2, 31, 0), (2, 64, -1)])
def test_refuses_numbers_out_of_range_and_makes_no_folder(
    tmp_path: Path, num_slices: int, size: int, seed: int
) -> None:
    with pytest.raises(InputError, match="at least"):
        write_phantom(tmp_path / "set", num_slices, seed=seed, size=size)
    assert not (tmp_path / "set").exists()


def test_refuses_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="Cannot write"):
        write_phantom(tmp_path / "file" / "set", 2, size=32)


def test_a_failure_halfway_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_on_the_second(*_: object, **__: object) -> Iterator[object]:
        yield from itertools.islice(phantom_slices(1, size=32), 1)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(phantom, "phantom_slices", fail_on_the_second)
    with pytest.raises(InputError, match="No space left"):
        write_phantom(tmp_path, 2, size=32)
    assert list(tmp_path.iterdir()) == []


def test_the_images_get_their_name_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    replace = Path.replace

    def note(self: Path, target: Path) -> Path:
        order.append(Path(target).name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", note)
    write_phantom(tmp_path, 2, size=32)
    assert order == ["groups.npy", "masks_medseg.npy", "images_medseg.npy"]


def test_the_command_writes_a_set_and_says_that_it_is_synthetic(tmp_path: Path) -> None:
    result = run_command("--output", str(tmp_path), "--slices", "2", "--size", "32")
    assert result.returncode == 0, result.stderr
    assert "synthetic" in result.stdout
    assert result.stdout.count("\n") == 1
    assert np.load(tmp_path / "images_medseg.npy").shape == (2, 32, 32, 1)


def test_the_command_tells_a_mistake_in_one_line_and_exits_2(tmp_path: Path) -> None:
    result = run_command("--output", str(tmp_path), "--slices", "1")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_help_does_not_import_torch() -> None:
    script = "import sys, matchai.data.phantom; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 0
