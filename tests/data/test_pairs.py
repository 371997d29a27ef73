"""Training data as pairs of files: the same slices as from arrays, volumes kept apart, what does not pair refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from matchai.data import prepared
from matchai.data.arrays import open_sets
from matchai.data.dataset import Data, read_data
from matchai.data.pairs import PairSet, read_labels
from matchai.settings.config import InputSettings
from matchai.system.errors import InputError
from matchai.train import main
from matchai.training.checkpoint import load_weights
from matchai.volumes.grid import FileVoxels
from tests.conftest import unprivileged

NAMES = ("ground glass", "consolidation", "lungs other", "background")
LIES_AS_ARRAYS = np.diag([-0.7, -0.7, 5.0, 1.0])  # voxel axes run to the left, the back and the head
FILE_NUMBERS = np.array([1, 2, 3, 0], np.uint8)


def read_whole(folder: Path, cache: Path, **settings: Any) -> Data:
    parts = {name: settings.pop(name) for name in ("context", "progress") if name in settings}
    return read_data(
        folder, cache, InputSettings(**{"image_size": 64, "val_fraction": 0.25} | settings), seed=0, **parts
    )


def save(path: Path, voxels: NDArray[Any], affine: NDArray[np.float64] = LIES_AS_ARRAYS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)


@pytest.fixture(scope="session")
def whole(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantom as arrays in whole HU, which 16 bits hold."""
    folder = tmp_path_factory.mktemp("whole")
    np.save(folder / "images_medseg.npy", np.rint(np.load(phantom / "images_medseg.npy")[..., 0]).astype(np.int16))
    np.save(folder / "masks_medseg.npy", np.load(phantom / "masks_medseg.npy"))
    np.save(folder / "groups.npy", np.arange(32) // 8)
    return folder


def arrays_of(folder: Path) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    return np.load(folder / "images_medseg.npy"), np.load(folder / "masks_medseg.npy").argmax(-1)


@pytest.fixture(scope="session")
def volumes(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as four pairs of NIfTI files, which lie in space as the arrays do."""
    folder = tmp_path_factory.mktemp("volumes")
    images, labels = arrays_of(whole)
    for number in range(4):
        part = slice(8 * number, 8 * number + 8)
        save(folder / f"images/v{number}_0000.nii.gz", images[part].transpose(1, 2, 0))
        save(folder / f"masks/v{number}.nii.gz", FILE_NUMBERS[labels[part]].transpose(1, 2, 0))
    return folder


@pytest.fixture
def pictures(whole: Path, tmp_path: Path) -> Path:
    """The same as pictures, upright: 16-bit PNG with an offset, and masks with palettes."""
    folder = tmp_path / "pictures"
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for index, (image, labels) in enumerate(zip(*arrays_of(whole), strict=True)):
        Image.fromarray((image.T.astype(np.int32) + 32768).astype(np.uint16)).save(folder / f"images/s{index}.png")
        mask = Image.fromarray(np.ascontiguousarray(FILE_NUMBERS[labels].T))
        mask.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 9, 9, 9])
        mask.save(folder / f"masks/s{index}.png")
    return folder


def test_volumes_are_prepared_as_the_same_slices_in_arrays(whole: Path, volumes: Path, cache: Path) -> None:
    from_arrays, from_volumes = read_whole(whole, cache), read_whole(volumes, cache)
    for name in prepared.ARRAYS[:-1]:
        assert np.array_equal(getattr(from_volumes.slices, name), getattr(from_arrays.slices, name))
    assert np.array_equal(from_volumes.groups, from_arrays.groups)
    assert (from_volumes.train, from_volumes.val) == (from_arrays.train, from_arrays.val)
    assert from_volumes.orientation == from_arrays.orientation == "LP"
    assert from_volumes.volumes.tolist() == [number for number in range(4) for _ in range(8)]


def test_pictures_are_prepared_as_the_same_slices_upright(whole: Path, pictures: Path, cache: Path) -> None:
    from_arrays, from_pictures = read_whole(whole, cache), read_whole(pictures, cache, rescale=(1.0, -32768.0))
    for name in ("images", "targets"):
        assert np.array_equal(getattr(from_pictures.slices, name), getattr(from_arrays.slices, name).swapaxes(1, 2))
    assert from_pictures.orientation == "PL"
    assert len(set(from_pictures.groups.tolist())) > 1


def test_volumes_are_turned_as_asked(volumes: Path, cache: Path) -> None:
    turned, usual = read_whole(volumes, cache, orientation="PL"), read_whole(volumes, cache)
    assert np.array_equal(turned.slices.targets, usual.slices.targets.swapaxes(1, 2))
    assert turned.orientation == "PL"


def test_an_offset_that_is_missing_is_told_with_the_setting_that_mends_it(pictures: Path, cache: Path) -> None:
    with pytest.raises(InputError, match="--rescale 1 -32768"):
        read_whole(pictures, cache)


def test_a_groups_file_wins_over_volumes(volumes: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "images").symlink_to(volumes / "images")
    (tmp_path / "masks").symlink_to(volumes / "masks")
    np.save(tmp_path / "groups.npy", np.array(["a", "b", "a", "c"]))
    by_volume = read_whole(tmp_path, cache).groups
    np.save(tmp_path / "groups.npy", np.repeat([5, 6, 5, 7], 8))
    assert np.array_equal(read_whole(tmp_path, cache).groups, by_volume)
    assert by_volume.tolist() == [group for group in (0, 1, 0, 2) for _ in range(8)]


def test_volumes_of_other_sizes_go_together(volumes: Path, cache: Path, tmp_path: Path) -> None:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        for path in (volumes / name).iterdir():
            (tmp_path / name / path.name).symlink_to(path)
    save(tmp_path / "images/w.nii", voxels("i2", 48, 80, 3) * 400 - 1000)
    save(tmp_path / "masks/w.nii", np.zeros((48, 80, 3), np.uint8))
    data = read_whole(tmp_path, cache)
    assert len(data.slices) == 35
    assert data.groups.tolist()[-3:] == [4, 4, 4]
    assert any("48x80" in note for note in data.notes)


def test_a_label_map_says_what_numbers_mean(volumes: Path, cache: Path) -> None:
    swapped = ["0:background", "1:consolidation", "2:ground glass", "3:lungs other"]
    usual, mapped = (read_whole(volumes, cache, label_map=labels).slices.targets for labels in ((), swapped))
    assert np.array_equal(np.array([1, 0, 2, 3])[usual], mapped)
    with pytest.raises(InputError, match=r"holds 3 .*give every number in the masks a class"):
        read_whole(volumes, cache, label_map=swapped[:3])


def test_every_decompressed_volume_is_closed(volumes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: set[int] = set()
    most = 0
    read, close = FileVoxels.__getitem__, FileVoxels.close

    def read_counted(self: FileVoxels, key: Any) -> NDArray[Any]:
        nonlocal most
        opened.add(id(self))
        most = max(most, len(opened))
        return read(self, key)

    def close_counted(self: FileVoxels) -> None:
        opened.discard(id(self))
        close(self)

    monkeypatch.setattr(FileVoxels, "__getitem__", read_counted)
    monkeypatch.setattr(FileVoxels, "close", close_counted)
    monkeypatch.setattr(prepared, "preparing_threads", lambda: 1)
    read_whole(volumes, tmp_path / "cache")
    assert opened == set()
    assert most == 2  # an image and its mask


def test_stacks_are_volumes(whole: Path, cache: Path, tmp_path: Path) -> None:
    images, labels = arrays_of(whole)
    for name, values in (("images", images.astype(np.int32)), ("masks", FILE_NUMBERS[labels])):
        (tmp_path / name).mkdir()
        for number in range(4):
            pages = [Image.fromarray(page) for page in values[8 * number : 8 * number + 8]]
            pages[0].save(tmp_path / name / f"v{number}.tif", save_all=True, append_images=pages[1:])
    data = read_whole(tmp_path, cache, orientation="LP")
    assert np.array_equal(data.slices.targets, read_whole(whole, cache).slices.targets)
    assert data.groups.tolist() == [number for number in range(4) for _ in range(8)]


def test_a_run_trains_on_volumes_and_keeps_how_they_lie(volumes: Path, cache: Path, tmp_path: Path) -> None:
    flags = ["--preset", "study", "--epochs", "1", "--image-size", "32", "--batch-size", "8", "--rescale", "1", "5"]
    output = tmp_path / "run"
    assert main([*flags, "--data", str(volumes), "--cache", str(cache), "--output", str(output)]) == 0
    about = load_weights(output)[1]
    assert about["orientation"] == "LP"
    assert about["rescale"] == [1, 5]
    assert (output / "history.jsonl").exists()


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return spoil


def voxels(dtype: str, *shape: int) -> NDArray[Any]:
    return np.random.default_rng(0).integers(0, 4, shape).astype(dtype)


def moved() -> NDArray[np.float64]:
    affine = LIES_AS_ARRAYS.copy()
    affine[0, 3] = 0.2 * 0.7  # voxels
    return affine


def save_both(values: NDArray[Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for name in ("images", "masks"):
            save(folder / name / "c.nii.gz", values)

    return spoil


def empty(folder: Path) -> None:
    for path in (folder / "images").iterdir():
        path.unlink()


def write_below(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).parent.mkdir()
        (folder / name).touch()

    return spoil


def dangling_pair(folder: Path) -> None:
    for name in ("images", "masks"):
        (folder / name / "c.nii.gz").symlink_to("gone")


def padded(values: NDArray[Any]) -> NDArray[Any]:
    values[:8, :8] = -2000
    return values


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no mask": (remove("masks/a.nii.gz"), r"images: 1 of 2 files have no namesake.*: a\.nii\.gz"),
    "no image": (remove("images/b_0000.nii.gz"), r"masks: 1 of 2 files have no namesake.*: b\.nii\.gz"),
    "twice": (lambda d: save(d / "images/a.nii", voxels("i2", 32, 32, 2)), "keep one of them"),
    "two images": (lambda d: save(d / "images/b.nii.gz", voxels("i2", 32, 32, 2)), "both belong"),
    "size": (lambda d: save(d / "masks/a.nii.gz", voxels("u1", 32, 33, 2)), "voxel by voxel"),
    "affine": (lambda d: save(d / "masks/a.nii.gz", voxels("u1", 32, 32, 2), moved()), r"0\.2 voxels away"),
    "tiny": (
        save_both(voxels("u1", 31, 32, 2)),
        "at least 32x32",
    ),
    "truncated": (lambda d: truncate(d / "images/a.nii.gz"), "damaged"),
    "one kind": (write("images/c.png", b"x"), r"holds pictures \(c\.png\) and a\.nii\.gz"),
    "jpeg": (write("masks/c.jpg", b"x"), "JPEG"),
    "labels": (lambda d: save(d / "masks/a.nii.gz", voxels("u1", 32, 32, 2) + 2), r"holds 4, 5 in .*--label-map"),
    "half labels": (lambda d: save(d / "masks/a.nii.gz", voxels("u1", 32, 32, 2) * 0.5), r"holds 0\.5, 1\.5 in"),
    "no masks": (lambda d: (d / "masks").rename(d / "labels"), "none named masks"),
    "empty": (empty, "neither"),
    "groups": (lambda d: np.save(d / "groups.npy", np.arange(3)), r"shape \(3,\).*each of the 2 volumes"),
    "unknown": (write("images/c.mgz", b"x"), r"c\.mgz is of no kind that is read here"),
    "part": (write("masks/c.nii.gz.part", b"x"), r"c\.nii\.gz\.part is of no kind"),
    "empty folder": (lambda d: (d / "images/c.nii.gz").mkdir(), r"holds the folder c\.nii\.gz"),
    "folder": (write_below("images/more/c.nii.gz"), "holds the folder more"),
    "mha": (write("images/c.mha", b"x"), r"c\.mha is a MetaImage; convert it"),
    "hdr": (write("masks/c.hdr", b"x"), r"c\.hdr is half of a .hdr/.img pair; convert it to NIfTI: .python -c"),
    "link": (lambda d: (d / "images/c.nii.gz").symlink_to("gone"), r"c\.nii\.gz is a link to gone, which is not there"),
    "both links": (dangling_pair, r"images/c\.nii\.gz is a link"),
    "links to folders": (lambda d: (d / "labels").symlink_to("gone"), "labels is a link to gone"),
    "groups link": (lambda d: (d / "groups.npy").symlink_to("gone"), r"groups\.npy is a link to gone"),
    "raw with padding": (lambda d: save(d / "images/a.nii.gz", padded(voxels("i2", 32, 32, 2) * 500)), "1 -1024"),
    "raw": (lambda d: save(d / "images/a.nii.gz", voxels("i2", 32, 32, 2) * 500), "--rescale 1 -1024"),
}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_pair_is_refused_by_name(case: str, tmp_path: Path) -> None:
    spoil, told = BAD[case]
    for name in ("a", "b_0000"):
        save(tmp_path / f"images/{name}.nii.gz", voxels("i2", 32, 32, 2) * 400 - 1000)
        save(tmp_path / f"masks/{name.removesuffix('_0000')}.nii.gz", voxels("u1", 32, 32, 2))
    spoil(tmp_path)
    with pytest.raises(InputError, match=told):
        read_whole(tmp_path, tmp_path / "cache", image_size=32)


def test_pictures_of_other_sizes_than_their_masks_are_refused(pictures: Path) -> None:
    for path in (pictures / "masks").iterdir():
        Image.open(path).crop((0, 0, 64, 32)).save(path)
    with pytest.raises(InputError, match="32 x 64 x 64"):
        open_sets(pictures, InputSettings())


def test_arrays_win_where_they_are_there(volumes: Path, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "images").symlink_to(volumes / "images")
    (tmp_path / "masks").symlink_to(volumes / "masks")
    assert isinstance(open_sets(tmp_path, InputSettings())[0], PairSet)
    for path in whole.glob("*_medseg.npy"):
        (tmp_path / path.name).symlink_to(path)
    (found,) = open_sets(tmp_path, InputSettings())
    assert found.name == "medseg"


def as_nnunet(volumes: Path, folder: Path, labels: Any) -> Path:
    """The same volumes as nnU-Net lays them, with the numbers of masks turned round."""
    for path in (volumes / "images").iterdir():
        (folder / "imagesTr").mkdir(exist_ok=True)
        (folder / "imagesTr" / path.name).symlink_to(path)
    for path in (volumes / "masks").iterdir():
        mask = nibabel.load(path)
        turned = np.array([0, 3, 2, 1], np.uint8)[np.asarray(mask.dataobj)]
        save(folder / "labelsTr" / path.name, turned, mask.affine)
    (folder / "imagesTs").mkdir()
    if labels is not None:
        (folder / "dataset.json").write_text(json.dumps({"labels": labels, "numTraining": 4}))
    return folder


VERSION_1 = {"0": "background", "3": "Ground_Glass", "2": "consolidation", "1": "lungs-other"}
VERSION_2 = {"background": 0, "ground glass": 3, "consolidation": 2, "lungs other": 1}


@pytest.mark.parametrize("labels", [VERSION_1, VERSION_2])
def test_nnunets_layout_is_read_with_the_labels_of_its_description(
    volumes: Path, cache: Path, tmp_path: Path, labels: Any
) -> None:
    usual, nnunet = read_whole(volumes, cache), read_whole(as_nnunet(volumes, tmp_path, labels), cache)
    for name in ("images", "targets"):
        assert np.array_equal(getattr(nnunet.slices, name), getattr(usual.slices, name))
    assert "dataset.json" in nnunet.digests


def test_another_description_is_another_content(volumes: Path, cache: Path, tmp_path: Path) -> None:
    folder = as_nnunet(volumes, tmp_path, VERSION_2)
    before = read_whole(folder, cache)
    (folder / "dataset.json").write_text(json.dumps({"labels": VERSION_2 | {"ground glass": 2, "consolidation": 3}}))
    after = read_whole(folder, cache)
    assert not np.array_equal(before.slices.targets, after.slices.targets)
    assert before.digests != after.digests


def test_a_label_map_wins_over_the_description(volumes: Path, cache: Path, tmp_path: Path) -> None:
    folder = as_nnunet(volumes, tmp_path, {"background": 0, "tumour": 1})
    label_map = ("0:background", "3:ground glass", "2:consolidation", "1:lungs other")
    assert np.array_equal(
        read_whole(folder, cache, label_map=label_map).slices.targets, read_whole(volumes, cache).slices.targets
    )


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ({"background": 0, "tumour": 1}, r"labels 0 background, 1 tumour, but the classes are .*--label-map 0:CLASS"),
        ({"background": 0, "lesion": [1, 2]}, "names no labels with one number each.*--label-map"),
        (["background"], "names no labels"),
        (VERSION_2 | {"lesion": 3}, "names no labels with one number each"),
        (VERSION_2 | {"consolidation": 2.7}, "names no labels with one number each"),
        (3, "names no labels"),
    ],
)
def test_a_description_that_does_not_name_our_classes_is_refused_with_the_flag(
    volumes: Path, cache: Path, tmp_path: Path, labels: Any, told: str
) -> None:
    with pytest.raises(InputError, match=rf"dataset\.json .*{told}"):
        read_whole(as_nnunet(volumes, tmp_path, labels), cache)


def test_both_layouts_in_one_folder_are_refused(volumes: Path, cache: Path, tmp_path: Path) -> None:
    (as_nnunet(volumes, tmp_path, None) / "images").mkdir()
    with pytest.raises(InputError, match="two layouts, images/masks and imagesTr/labelsTr"):
        read_whole(tmp_path, cache)


def test_a_set_that_cannot_be_reached_is_not_left_out(data: Path, cache: Path) -> None:
    (data / "images_radiopedia.npy").symlink_to("gone")
    with pytest.raises(InputError, match=r"images_radiopedia\.npy is a link to gone"):
        read_whole(data, cache)


def test_a_folder_that_cannot_be_read_is_told(cache: Path) -> None:
    with unprivileged() as folder:
        for name in ("images", "masks"):
            (folder / name).mkdir()
            (folder / name / "a.png").touch()
        (folder / "masks").chmod(0)
        with pytest.raises(InputError, match=r"masks cannot be read \(Permission denied\)"):
            open_sets(folder, InputSettings())
        folder.chmod(0)
        with pytest.raises(InputError, match="cannot be read"):
            open_sets(folder, InputSettings())
        folder.chmod(0o700)


def test_arrays_whose_slices_lie_along_the_last_axis_are_told(data: Path, cache: Path) -> None:
    images, masks = np.load(data / "images_medseg.npy")[..., 0], np.load(data / "masks_medseg.npy").argmax(-1)
    square = np.resize(images, (64, 64, 40)), np.resize(masks, (64, 64, 40))
    np.save(data / "images_medseg.npy", square[0])
    np.save(data / "masks_medseg.npy", square[1])
    (data / "groups.npy").unlink()
    assert "numpy.moveaxis(array, -1, 0)" in open_sets(data, InputSettings())[0].notes[0]


def test_a_description_with_a_byte_order_mark_is_read(volumes: Path, cache: Path, tmp_path: Path) -> None:
    folder = as_nnunet(volumes, tmp_path, VERSION_2)
    content = (folder / "dataset.json").read_text()
    (folder / "dataset.json").write_text(content, encoding="utf-8-sig")
    assert len(read_whole(folder, cache).slices) == 32


def test_number_0_is_what_the_description_names_it(tmp_path: Path) -> None:
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"labels": {"ground glass": 0, "consolidation": 1, "lungs other": 2, "background": 3}}))
    assert read_labels(path, NAMES, "background") == {0: 0, 1: 1, 2: 2, 3: 3}
    path.write_text(json.dumps({"labels": {"nothing": 0, "consolidation": 1}}))
    assert read_labels(path, NAMES, "background") == {0: 3, 1: 1}
