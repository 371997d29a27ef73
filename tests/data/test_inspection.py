"""What is odd about slices is told, and what no training could use is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matchai.data.dataset import Data, read_data
from matchai.settings.config import InputSettings
from matchai.system.errors import InputError


def read(data: Path, cache: Path, **settings: Any) -> Data:
    return read_data(data, cache, InputSettings(**{"image_size": 64} | settings), seed=0)


def change(path: Path, how: Any) -> None:
    values = np.load(path)
    np.save(path, how(values))


@pytest.mark.parametrize("padding", [-2000, -2048, -3024])
def test_slices_with_padding_are_those_with_air_there_and_the_run_says_so(
    data: Path, tmp_path: Path, padding: float
) -> None:
    images = np.load(data / "images_medseg.npy")
    images[:, :20, :20] = -1000
    np.save(data / "images_medseg.npy", images)
    with_air = read(data, tmp_path / "cache")
    images[:, :20, :20] = padding
    np.save(data / "images_medseg.npy", images)
    padded = read(data, tmp_path / "cache")
    assert np.array_equal(padded.slices.images, with_air.slices.images)
    assert (padded.mean, padded.std) == (with_air.mean, with_air.std)
    assert any(f"9.8% of the pixels lie below -1500 HU (down to {padding})" in note for note in padded.notes)
    assert not any("below -1500" in note for note in with_air.notes)


@pytest.mark.parametrize("padding", [-2000, -3024, -1024])
def test_raw_numbers_with_padding_are_refused(data: Path, tmp_path: Path, padding: float) -> None:
    images = np.load(data / "images_medseg.npy") + 1024
    images[:, :20, :20] = padding
    np.save(data / "images_medseg.npy", images)
    with pytest.raises(InputError, match="--rescale 1 -1024"):
        read(data, tmp_path / "cache")


def test_a_lesion_class_that_covers_half_of_the_body_is_told(data: Path, tmp_path: Path) -> None:
    # as in masks of two lungs and an infection that are read without a label map
    labels = np.load(data / "masks_medseg.npy").argmax(-1)
    labels[labels == 2] = 0
    labels[0, 40] = 2
    np.save(data / "masks_medseg.npy", labels)
    notes = read(data, tmp_path / "cache").notes
    assert any("ground glass covers 6" in note and "check --label-map" in note for note in notes)


def test_lesions_of_a_usual_share_are_not_told(data: Path, tmp_path: Path) -> None:
    assert not any("covers" in note for note in read(data, tmp_path / "cache").notes)


@pytest.mark.parametrize("number", [0.99999999977, 1.0005])
def test_one_hot_masks_that_a_scale_has_rounded_are_the_whole_numbers(
    data: Path, tmp_path: Path, number: float
) -> None:
    usual = read(data, tmp_path / "cache").slices.targets
    change(data / "masks_medseg.npy", lambda masks: masks * number)
    assert np.array_equal(read(data, tmp_path / "cache").slices.targets, usual)


def test_a_value_that_is_nearly_a_class_is_shown_as_it_is(data: Path, tmp_path: Path) -> None:
    change(data / "masks_medseg.npy", lambda masks: masks.argmax(-1) + 0.9999997 * (masks[..., 0] > 0) * 0.5)
    with pytest.raises(InputError, match=r"holds 0\.49999985 in slice"):
        read(data, tmp_path / "cache")


def test_raw_slices_among_others_are_refused_by_number(data: Path, tmp_path: Path) -> None:
    images = np.load(data / "images_medseg.npy")
    images[5:7] = np.where(images[5:7] < 0, images[5:7] / 4, images[5:7]) + 1100
    np.save(data / "images_medseg.npy", images)
    with pytest.raises(InputError, match=r"2 of 16 slices \(5, 6\) that look like raw CT values"):
        read(data, tmp_path / "cache")


def test_another_order_of_the_classes_is_another_meaning(data: Path, tmp_path: Path) -> None:
    names = ("ground glass", "consolidation", "lungs other", "background")
    labels = np.load(data / "masks_medseg.npy").argmax(-1)
    np.save(data / "masks_medseg.npy", labels)
    label_map = ("0:ground glass", "1:consolidation", "2:lungs other", "3:background")
    usual = read(data, tmp_path / "cache", class_names=names, label_map=label_map).slices.targets
    swapped = (names[1], names[0], *names[2:])
    turned = read(data, tmp_path / "cache", class_names=swapped, label_map=label_map).slices.targets
    assert np.array_equal(turned, np.array([1, 0, 2, 3])[usual])
