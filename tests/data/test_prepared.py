"""Prepared slices: exact sums, a cache that is verified, masks as they are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from matchai.data.arrays import ArraySet, open_sets
from matchai.data.augmentation import Augmentation
from matchai.data.digests import fingerprint
from matchai.data.prepared import STEPS, SliceDataset, Slices, prepare
from matchai.data.slice_set import SliceSet
from matchai.sampling.sampler import DistributedWeightedSampler, Draw, collate
from matchai.settings.config import InputSettings
from matchai.system.errors import InputError
from tests.steps import read_small

NAMES = ("ground glass", "consolidation", "lungs other", "background")


def prepared(data: Path, cache: Path, **settings: Any) -> Slices:
    asked = InputSettings(**{"image_size": 64} | settings)
    sets = open_sets(data, asked)
    digests = fingerprint([path for one in sets for path in (one.image_path, one.mask_path)])
    return prepare(sets, digests, cache, asked)


def test_rounding_is_far_below_the_noise_of_ct(data: Path, tmp_path: Path) -> None:
    slices = prepared(data, tmp_path / "cache")
    images = np.load(data / "images_medseg.npy")[..., 0]
    assert np.abs(slices.images[:].astype(np.float64) / STEPS * 2000 - 1500 - images).max() < 0.02


def test_statistics_are_those_of_the_chosen_slices_alone(data: Path, tmp_path: Path) -> None:
    slices = prepared(data, tmp_path / "cache")
    chosen = np.load(data / "images_medseg.npy")[[2, 5, 7]].astype(np.float64)
    mean, std = slices.mean_std([2, 5, 7])
    assert mean * 2000 - 1500 == pytest.approx(chosen.mean(), abs=0.01)
    assert std * 2000 == pytest.approx(chosen.std(), abs=0.01)


def test_every_dtype_and_layout_gives_the_same_slices(data: Path, tmp_path: Path) -> None:
    images = np.rint(np.load(data / "images_medseg.npy"))
    masks = np.load(data / "masks_medseg.npy")
    np.save(data / "images_medseg.npy", images)
    reference = prepared(data, tmp_path / "cache")
    for dtype in ("<f8", ">f4", "<i2", ">i4", "<f2"):
        np.save(data / "images_medseg.npy", images[..., 0].astype(dtype))
        other = prepared(data, tmp_path / "cache")
        assert np.abs(other.images[:].astype(int) - reference.images[:]).max() <= (17 if dtype == "<f2" else 0)
    for layout in (masks.astype(np.int16), masks.astype("u1") * 255, masks.argmax(-1), masks.argmax(-1).astype(">f4")):
        np.save(data / "masks_medseg.npy", layout)
        assert np.array_equal(prepared(data, tmp_path / "cache").targets, reference.targets)


def test_a_pixel_of_two_classes_takes_the_lower_and_of_none_the_background(data: Path, tmp_path: Path) -> None:
    masks = np.load(data / "masks_medseg.npy")
    masks[0, 0, 0], masks[0, 0, 1] = (False, True, True, False), False
    np.save(data / "masks_medseg.npy", masks)
    slices = prepared(data, tmp_path / "cache")
    assert slices.targets[0, 0, :2].tolist() == [1, 3]
    assert any("1 pixels carry several classes" in note for note in slices.notes)
    assert any("1 pixels carry no class" in note for note in slices.notes)


@pytest.mark.parametrize("name", ["images.npy", "targets.npy", "sums.npy", "meta.json"])
def test_a_damaged_cache_is_rebuilt(name: str, data: Path, tmp_path: Path) -> None:
    reference = np.array(prepared(data, tmp_path / "cache").images)
    file = next((tmp_path / "cache").glob(f"*/{name}"))
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    slices = prepared(data, tmp_path / "cache")
    assert np.array_equal(slices.images, reference)
    assert slices.mean_std([0]) == prepared(data, tmp_path / "other").mean_std([0])


def test_another_content_under_the_same_name_and_time_is_prepared_anew(data: Path, tmp_path: Path) -> None:
    prepared(data, tmp_path / "cache")
    images = np.load(data / "images_medseg.npy")
    images[3, 4, 5] = 123
    np.save(data / "images_medseg.npy", images)
    assert round(prepared(data, tmp_path / "cache").images[3, 4, 5] / STEPS * 2000 - 1500) == 123


def test_both_sets_are_used_together_and_one_can_be_chosen(data: Path) -> None:
    for what in ("images", "masks"):
        np.save(data / f"{what}_radiopedia.npy", np.load(data / f"{what}_medseg.npy")[:10])
    both = open_sets(data, InputSettings())
    one = open_sets(data, InputSettings(sets=("radiopedia",)))
    assert [len(found) for found in both] == [16, 10]
    assert [found.name for found in one] == ["radiopedia"]
    assert isinstance(one[0], ArraySet)


@pytest.mark.parametrize(("num_processes", "num_workers"), [(1, 2), (2, 0), (3, 2)])
def test_a_draws_augmented_bytes_depend_on_neither_processes_nor_workers(
    num_processes: int, num_workers: int, phantom: Path, cache: Path
) -> None:
    data = read_small(phantom, cache)
    augmentation = Augmentation(3, 0.25, 3, affine=1.0)
    dataset = SliceDataset(data.slices, data.train, data.mean, data.std, augmentation)

    def loaded(num_processes: int, num_workers: int) -> dict[int, tuple[bytes, bytes]]:
        found = {}
        for rank in range(num_processes):
            sampler = DistributedWeightedSampler(
                [1.0] * 3, 6, 23, num_processes=num_processes, process_index=rank, seed=3
            )
            loader = DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers, collate_fn=collate)
            for images, targets, positions in loader:
                for image, target, position in zip(images, targets, positions.tolist(), strict=True):
                    found[position] = image.numpy().tobytes(), target.numpy().tobytes()
        return found

    alone = loaded(1, 0)
    assert loaded(num_processes, num_workers) == alone
    assert len(set(alone.values())) == 23  # three slices, but no two draws alike


def test_an_item_holds_the_slice_between_its_neighbours_of_the_same_volume(phantom: Path, cache: Path) -> None:
    data = read_small(phantom, cache)
    assert data.volumes.tolist() == np.repeat([0, 1, 2, 3], 8).tolist()
    alone = SliceDataset(data.slices, range(32), data.mean, data.std)
    together = SliceDataset(data.slices, [7, 8, 12], data.mean, data.std, volumes=data.volumes, context=2)
    for row, expected in enumerate([[5, 6, 7, 6, 5], [10, 9, 8, 9, 10], [10, 11, 12, 13, 14]]):
        image, target, _ = together[row]
        assert torch.equal(image, torch.cat([alone[index][0] for index in expected]))
        assert torch.equal(target, alone[expected[2]][1])


def test_augmented_neighbours_move_with_the_slice(phantom: Path, cache: Path) -> None:
    data = read_small(phantom, cache)
    draw = Draw(3, 2, 17)
    alone = SliceDataset(data.slices, data.train, data.mean, data.std, Augmentation(3, 0.25, 3, affine=1.0))
    augmentation = Augmentation(3, 0.25, 3, affine=1.0, channels=7)
    together = SliceDataset(data.slices, data.train, data.mean, data.std, augmentation, volumes=data.volumes, context=3)
    assert torch.equal(together[draw][0][3:4], alone[draw][0])
    assert torch.equal(together[draw][1], alone[draw][1])


def test_rescale_makes_hu_of_arrays(data: Path, tmp_path: Path) -> None:
    images = np.rint(np.load(data / "images_medseg.npy")).astype(np.float32)
    np.save(data / "images_medseg.npy", images)
    np.save(data / "images_medseg.npy", ((images + 1024) * 2).astype(np.uint16))
    (one,) = open_sets(data, InputSettings(rescale=(0.5, -1024.0)))
    assert np.array_equal(one.read_image(3), images[3, ..., 0])
    with pytest.raises(InputError, match="--rescale 1 -1024"):
        prepared(data, tmp_path / "cache")


def test_a_label_map_is_the_whole_map_of_index_masks_and_refused_for_one_hot_ones(data: Path) -> None:
    entries = ("5:ground glass", "6:consolidation", "7:lungs other", "9:background")

    def opened() -> SliceSet:
        return open_sets(data, InputSettings(label_map=entries))[0]

    with pytest.raises(InputError, match=r"one-hot.*--label-map"):
        opened()
    labels = np.load(data / "masks_medseg.npy").argmax(-1)
    np.save(data / "masks_medseg.npy", np.array([5, 6, 7, 9], np.uint8)[labels])
    assert np.array_equal(opened().read_target(2, 4, 3).labels, labels[2])
    np.save(data / "masks_medseg.npy", labels)
    assert opened().read_target(2, 4, 3).wrong_values == [0, 1, 2, 3]


def test_what_the_sets_were_opened_with_is_part_of_the_key(data: Path, tmp_path: Path) -> None:
    for reading in ({}, {"rescale": (1.0, 5.0)}, {"orientation": "PL"}, {"orientation": "PL"}):
        settings = InputSettings(**{"image_size": 32} | reading)
        prepare(open_sets(data, settings), {"a": "b"}, tmp_path / "cache", settings)
    assert len(list((tmp_path / "cache").iterdir())) == 3
