import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from matchai.system.errors import InputError
from matchai.volumes.open import TrainedOn, kind_of, open_volume
from tests.volumes.test_dicom import write as write_image

VALUES = np.random.default_rng(0).integers(0, 2000, (2, 40, 50)).astype(np.uint16)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """The same numbers as an array, a NIfTI file and a folder of pictures."""
    np.save(tmp_path / "scan.npy", VALUES)
    nibabel.save(nibabel.Nifti1Image(np.moveaxis(VALUES, 0, 2), np.diag([-1.0, -1.0, 1.0, 1.0])), tmp_path / "scan.nii")
    (tmp_path / "pictures").mkdir()
    for number, one in enumerate(VALUES):
        Image.fromarray(one).save(tmp_path / "pictures" / f"{number}.png")
    return {"npy": tmp_path / "scan.npy", "nifti": tmp_path / "scan.nii", "picture": tmp_path / "pictures"}


@pytest.mark.parametrize("kind", ["npy", "nifti", "picture"])
def test_the_rescale_of_training_is_taken_for_files_of_its_kind_alone(files: dict[str, Path], kind: str) -> None:
    trained_on = TrainedOn("picture", "LP", (1.0, -1024.0))
    image = open_volume(files[kind], "LP", trained_on=trained_on).read(0)
    assert np.array_equal(image, VALUES[0] - np.float32(1024 if kind == "picture" else 0))


def test_a_rescale_that_the_user_gives_wins(files: dict[str, Path]) -> None:
    trained_on = TrainedOn("npy", "LP", (1.0, -1024.0))
    assert np.array_equal(
        open_volume(files["npy"], "LP", trained_on=trained_on, rescale=(2, 0)).read(1), VALUES[1] * np.float32(2)
    )


@pytest.mark.parametrize(
    ("kind", "lies", "expected"),
    [("npy", "PR", "PR"), ("npy", None, "LP"), ("picture", "PR", "PR"), ("picture", None, "PL"), ("nifti", "PR", "RA")],
)
def test_slices_that_cannot_tell_lie_as_those_of_training_did(
    files: dict[str, Path], kind: str, lies: str | None, expected: str
) -> None:
    trained_on = TrainedOn(kind if lies else "dicom", lies or "LP", (1.0, 0.0))
    assert open_volume(files[kind], "RA", trained_on=trained_on).orientation == expected


@pytest.mark.parametrize(
    ("name", "kind"), [("a.NPY", "npy"), ("a.nii.GZ", "nifti"), ("a.TIF", "picture"), ("a.csv", "unknown")]
)
def test_the_kind_of_a_file_is_told_by_its_suffix_in_any_case(name: str, kind: str) -> None:
    assert kind_of(Path(name)) == kind


def test_a_folder_of_volumes_is_refused_with_the_way_to_name_them(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").touch()
    with pytest.raises(InputError, match=r"is a folder of volumes; name them: .*/\*"):
        open_volume(tmp_path, "LP")


def test_one_slice_of_a_series_is_refused_with_the_folder_to_give(tmp_path: Path) -> None:
    (tmp_path / "1.dcm").touch()
    with pytest.raises(InputError, match=f"give the folder that holds the series, {tmp_path}"):
        open_volume(tmp_path / "1.dcm", "LP")


def test_a_folder_of_jpegs_is_told_what_they_have_lost(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((40, 50), np.uint8)).save(tmp_path / "a.jpg")
    with pytest.raises(InputError, match=r"a\.jpg is a JPEG .*it loses the numbers of CT values"):
        open_volume(tmp_path, "LP")


def add_series(folder: Path, number: int = 3) -> None:
    for index in range(number):
        write_image(folder, index)


def test_a_preview_beside_a_series_is_named_and_the_series_is_read(tmp_path: Path) -> None:
    add_series(tmp_path)
    Image.fromarray(VALUES[0]).save(tmp_path / "preview.png")
    assert kind_of(tmp_path) == "dicom"
    opened = open_volume(tmp_path, "LP", rescale=(1, 0))
    assert opened.shape[0] == 3
    assert "preview.png" in opened.notes[0]


def test_a_preview_above_the_folder_of_a_series_is_no_scan(tmp_path: Path) -> None:
    (tmp_path / "series").mkdir()
    add_series(tmp_path / "series")
    Image.fromarray(VALUES[0]).save(tmp_path / "preview.png")
    assert open_volume(tmp_path, "LP").shape[0] == 3


def test_pictures_beside_a_dicom_file_without_an_image_are_the_scan(files: dict[str, Path]) -> None:
    write_image(files["picture"], 0, Rows=None, Columns=None, SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11")
    assert kind_of(files["picture"]) == "picture"


def test_pictures_beside_a_volume_are_refused(files: dict[str, Path]) -> None:
    (files["picture"] / "scan.nii.gz").touch()
    with pytest.raises(InputError, match=r"holds pictures \(0\.png\) and scan\.nii\.gz"):
        open_volume(files["picture"], "LP")


@pytest.mark.parametrize("kind", ["npy", "nifti", "picture"])
def test_a_link_to_nothing_is_told_by_name(files: dict[str, Path], kind: str, tmp_path: Path) -> None:
    link = tmp_path / f"link{files[kind].suffix}"
    link.symlink_to(files[kind])
    assert open_volume(link, "LP").shape == (2, 40, 50)
    files[kind].rename(tmp_path / "gone")
    with pytest.raises(InputError, match=r"link\S* is a link to .*, which is not there"):
        open_volume(link, "LP")


@pytest.mark.parametrize("name", ["a.mha", "a.nrrd", "a.hdr", "a.img", "a.IMG"])
def test_formats_that_are_not_read_are_told_with_a_command_that_converts_them(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=f"python -c .*{name}.*nii.gz"):
        open_volume(tmp_path / name, "LP")


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_preview_of_any_kind_above_the_folder_of_a_series_is_no_scan(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "series").mkdir()
    add_series(tmp_path / "series")
    Image.fromarray(VALUES[0].astype(np.uint8)).save(tmp_path / f"preview{suffix}")
    assert open_volume(tmp_path, "LP").shape[0] == 3


@pytest.mark.parametrize("name", ["part2/2.png", "part2/scan.nii", "2.png/x.txt"])
def test_pictures_beside_a_folder_that_may_hold_more_are_refused(files: dict[str, Path], name: str) -> None:
    path = files["picture"] / name
    path.parent.mkdir()
    path.touch()
    with pytest.raises(InputError, match="which may hold more of the slices"):
        open_volume(files["picture"], "LP")


@pytest.mark.parametrize("name", ["2.bmp", "2.jp2", "2.png.part", "2"])
def test_pictures_beside_a_file_that_is_not_read_are_refused(files: dict[str, Path], name: str) -> None:
    (files["picture"] / name).touch()
    with pytest.raises(InputError, match="which is not read and may be one of the slices"):
        open_volume(files["picture"], "LP")


def test_texts_beside_pictures_are_no_slices(files: dict[str, Path]) -> None:
    for name in ("notes.txt", "table.csv", ".hidden"):
        (files["picture"] / name).touch()
    assert open_volume(files["picture"], "LP").shape[0] == 2


@pytest.mark.parametrize("suffix", [".png", ".tif", ".nii.gz", ".npy"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"pipe{suffix}")
    with pytest.raises(InputError, match="pipe"):
        open_volume(tmp_path / f"pipe{suffix}", "LP")
