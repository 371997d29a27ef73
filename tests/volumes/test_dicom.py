from collections.abc import Callable
from pathlib import Path
from typing import Any

import gdcm
import nibabel
import numpy as np
import pytest
import SimpleITK
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset

from matchai.system.errors import InputError
from matchai.volumes.dicom import open_dicom
from matchai.volumes.dicom_image import why_not_decodable

SHAPE = (4, 9, 8)
TILTED = [1.0, 0, 0, 0, 0.96, 0.28]  # rows run left, columns back and up


def hu() -> NDArray[np.int16]:
    """What lies where in the patient: (image from the feet up, row, column)."""
    smooth = np.add.outer(np.arange(SHAPE[1]), np.arange(SHAPE[2])) * 40
    return (smooth + 100 * np.arange(SHAPE[0])[:, None, None] - 900).astype(np.int16)


def write(folder: Path, index: int, name: str | None = None, **tags: Any) -> Path:
    """One CT image; every tag may be given another value, or None to leave it out."""
    stored = tags.pop("pixels", (hu()[index % SHAPE[0]] + 1024).astype(np.uint16))
    syntax = tags.pop("syntax", uid.ExplicitVRLittleEndian)
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.file_meta.MediaStorageSOPClassUID = uid.CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{index}"
    order = ">" if syntax == uid.ExplicitVRBigEndian else "<"
    values: dict[str, Any] = {
        "SOPClassUID": uid.CTImageStorage,
        "SOPInstanceUID": f"1.2.3.{index}",
        "SeriesInstanceUID": "1.2.3",
        "SeriesNumber": 2,
        "SeriesDescription": "Thorax",
        "PatientName": "Doe^Jane",
        "Modality": "CT",
        "Rows": stored.shape[0],
        "Columns": stored.shape[1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": int(stored.dtype.kind == "i"),
        "PixelSpacing": [0.8, 0.7],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "ImagePositionPatient": [-100, -90, 30 + 2 * index],
        "SliceThickness": 2,
        "RescaleSlope": 1,
        "RescaleIntercept": -1024,
        "InstanceNumber": 99 - index,
    }
    for tag, value in (values | tags).items():
        if value is not None:
            setattr(data, tag, value)
    data.PixelData = stored.astype(stored.dtype.newbyteorder(order)).tobytes()
    data["PixelData"].VR = "OW"
    path = folder / (name or f"{chr(122 - index)}.dcm")  # names against the order of places
    data.save_as(path, enforce_file_format=True)
    return path


def series(folder: Path, indices: Any = range(SHAPE[0]), **tags: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for index in indices:
        write(folder, index, **tags)
    return folder


def packed(path: Path, kind: Any) -> None:
    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(kind))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()


def at_start_of_python(folder: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """What every Python that is started from here on does first."""
    (folder / ".code").mkdir()
    (folder / ".code" / "sitecustomize.py").write_text(line)
    monkeypatch.syspath_prepend(folder / ".code")


def stack(opened: Any) -> NDArray[np.float32]:
    return np.stack([opened.read(index) for index in range(opened.shape[0])])


def by_simpleitk(folder: Path) -> Any:
    return SimpleITK.ReadImage(SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))


def test_slices_come_from_the_feet_up_whatever_names_and_numbers_say(tmp_path: Path) -> None:
    opened = open_dicom(series(tmp_path / "scan"), "PL")
    assert np.array_equal(stack(opened), hu())
    assert opened.name == "scan"
    assert opened.spacing == pytest.approx((2, 0.8, 0.7))
    assert opened.voxel_ml == pytest.approx(2 * 0.8 * 0.7 / 1000)
    assert not opened.notes


@pytest.mark.parametrize(
    "directions", [[1, 0, 0, 0, 1, 0], [-1, 0, 0, 0, 1, 0], TILTED, [0, 1, 0, 0, 0, -1], [1, 0, 0, 0, 0, -1]]
)
def test_a_point_of_the_patient_holds_what_simpleitk_reads_there(tmp_path: Path, directions: list[float]) -> None:
    normal = np.cross(directions[:3], directions[3:])
    for index in range(SHAPE[0]):
        write(tmp_path, index, ImageOrientationPatient=directions, ImagePositionPatient=list(normal * index * 2.5 + 7))
    image = by_simpleitk(tmp_path)
    opened = open_dicom(tmp_path)
    read = stack(opened)
    assert read.size == np.prod(image.GetSize())
    for place in np.ndindex(read.shape):
        right, front, top, _ = (opened.placement @ [*place, 1]).tolist()
        assert read[place] == image.GetPixel(*image.TransformPhysicalPointToIndex((-right, -front, top)))


def test_a_mask_is_nifti_on_the_grid_that_simpleitk_reads(tmp_path: Path) -> None:
    folder = series(tmp_path / "scan", ImageOrientationPatient=[-1, 0, 0, 0, 1, 0])
    image = by_simpleitk(folder)
    opened = open_dicom(folder)
    mask = SimpleITK.ReadImage(str(opened.save_mask(tmp_path, (stack(opened) > 0).astype(np.uint8), [0, 3])))
    assert mask.GetSize() == image.GetSize()
    for ours, theirs in [
        (mask.GetOrigin(), image.GetOrigin()),
        (mask.GetSpacing(), image.GetSpacing()),
        (mask.GetDirection(), image.GetDirection()),
    ]:
        assert np.allclose(ours, theirs, atol=1e-5)
    truth = SimpleITK.GetArrayFromImage(image)
    assert np.array_equal(SimpleITK.GetArrayFromImage(mask), np.where(truth > 0, 3, 0))


def twelve_bits(values: NDArray[Any]) -> NDArray[Any]:
    return ((values.astype(np.int16).view(np.uint16) & 0x0FFF) | 0xA000).astype(np.uint16)


@pytest.mark.parametrize(
    "tags",
    [
        {"syntax": uid.ImplicitVRLittleEndian},
        {"syntax": uid.ExplicitVRBigEndian},
        {"syntax": uid.DeflatedExplicitVRLittleEndian},
        {"pixels": hu()[1], "RescaleIntercept": 0},
        {"RescaleSlope": 0.25, "RescaleIntercept": -100.5},
        {"pixels": twelve_bits(hu()[1] + 1024), "BitsStored": 12, "HighBit": 11},
        {"pixels": twelve_bits(hu()[1]).view(np.int16), "BitsStored": 12, "HighBit": 11, "RescaleIntercept": 0},
    ],
    ids=[
        "implicit",
        "big-endian",
        "deflated",
        "signed",
        "slope",
        "12 bits over rubbish",
        "12 signed bits over rubbish",
    ],
)
def test_every_way_to_store_numbers_gives_the_hu_that_simpleitk_gives(tmp_path: Path, tags: dict[str, Any]) -> None:
    series(tmp_path, [1], **tags)
    truth = SimpleITK.GetArrayFromImage(by_simpleitk(tmp_path)).astype(np.float32)
    assert np.array_equal(stack(open_dicom(tmp_path, "PL")), truth)
    if "RescaleSlope" not in tags:
        assert np.array_equal(truth[0], hu()[1])


LOSSLESS = ["RLELossless", "JPEGLosslessProcess14", "JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless"]


@pytest.mark.parametrize("kind", [*LOSSLESS, "JPEGExtendedProcess2_4", "JPEGLSNearLossless", "JPEG2000"])
def test_packed_images_are_read_with_the_decoders_of_the_extra_alone(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_start_of_python(tmp_path, monkeypatch, "import sys; sys.modules |= {'pylibjpeg': None, 'jpeg_ls': None}")
    packed(write(tmp_path, 1, BitsStored=12, HighBit=11), getattr(gdcm.TransferSyntax, kind))
    truth = SimpleITK.GetArrayFromImage(by_simpleitk(tmp_path))
    read = stack(open_dicom(tmp_path, "PL"))
    assert np.array_equal(read, truth.astype(np.float32))
    assert np.abs(read[0] - hu()[1]).max() <= (0 if kind in LOSSLESS else 2)


def test_a_slope_of_its_own_in_every_file_is_applied_to_that_file(tmp_path: Path) -> None:
    for index in range(SHAPE[0]):
        write(tmp_path, index, RescaleSlope=index + 1, RescaleIntercept=-10 * index)
    opened = open_dicom(tmp_path, "PL", rescale=(2, 1))
    by_hand = [((hu()[i] + 1024.0) * (i + 1) - 10 * i) * 2 + 1 for i in range(SHAPE[0])]
    assert np.array_equal(stack(opened), by_hand)


def test_the_series_is_found_among_other_files_and_in_folders(tmp_path: Path) -> None:
    series(tmp_path / "scan")
    (tmp_path / "scan" / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    (tmp_path / "scan" / "._a.dcm").write_bytes(b"Mac")
    (tmp_path / "readme.txt").write_text("about")
    report = write(tmp_path, 9, SeriesInstanceUID="9", Rows=None, Columns=None, SOPClassUID=uid.BasicTextSRStorage)
    report.rename(tmp_path / "report")
    assert np.array_equal(stack(open_dicom(tmp_path, "PL")), hu())


def test_a_file_without_preamble_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, 0, syntax=uid.ImplicitVRLittleEndian)
    content = path.read_bytes()
    path.write_bytes(content[content.index(b"\x08\0\x16\0") :])
    assert np.array_equal(stack(open_dicom(tmp_path, "PL")), hu()[:1])


def test_copies_of_an_image_are_left_out_and_told(tmp_path: Path) -> None:
    write(series(tmp_path), 2, "copy")
    opened = open_dicom(tmp_path, "PL")
    assert np.array_equal(stack(opened), hu())
    assert "1 of 5 files" in opened.notes[0]


def test_one_image_is_a_volume_as_thick_as_its_slice(tmp_path: Path) -> None:
    assert open_dicom(series(tmp_path, [1])).spacing == pytest.approx((2, 0.7, 0.8))


def test_one_image_of_unknown_thickness_has_no_volume_in_ml(tmp_path: Path) -> None:
    opened = open_dicom(series(tmp_path, [1], SliceThickness=None))
    assert opened.spacing is None
    assert opened.voxel_ml is None
    assert "unknown" in opened.notes[0]


def test_a_tilted_gantry_shears_the_grid_and_is_told(tmp_path: Path) -> None:
    for index in range(SHAPE[0]):
        write(tmp_path, index, ImagePositionPatient=[-100, -90 + index, 30 + 2 * index])
    opened = open_dicom(tmp_path, "PL")
    assert opened.placement @ [3, 0, 0, 1] == pytest.approx([100, 87, 36, 1])
    assert "26.6 degrees" in opened.notes[0]
    saved = nibabel.load(opened.save_mask(tmp_path, np.zeros(opened.shape, np.uint8), [0, 1]))
    assert np.allclose(saved.affine, opened.affine, atol=1e-5)


def test_the_mask_of_a_tilted_gantry_lies_for_simpleitk_as_its_own_reading_of_the_series(tmp_path: Path) -> None:
    for index in range(SHAPE[0]):
        write(tmp_path, index, ImagePositionPatient=[-100, -90 + index, 30 + 2 * index])
    opened = open_dicom(tmp_path)
    mask = SimpleITK.ReadImage(str(opened.save_mask(tmp_path, np.zeros(opened.shape, np.uint8), [0, 1])))
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path)))
    image = reader.Execute()
    for name in ("GetOrigin", "GetSpacing", "GetDirection", "GetSize"):
        assert getattr(mask, name)() == pytest.approx(getattr(image, name)(), abs=1e-5), name


def test_places_rounded_by_their_writer_are_no_gaps(tmp_path: Path) -> None:
    for index in range(SHAPE[0]):
        write(tmp_path, index, ImagePositionPatient=[0, 0, round(0.625 * index + 0.2, 1)])
    spacing = open_dicom(tmp_path).spacing
    assert spacing is not None
    assert spacing[0] == pytest.approx(0.625, rel=0.05)


@pytest.mark.parametrize(
    ("tags", "said"),
    [
        ({"RescaleSlope": None, "RescaleIntercept": None}, "4 of 4 images name no rescale"),
        ({"Modality": None}, "does not name its modality"),
        ({"RescaleType": "OD"}, "numbers are OD"),
    ],
)
def test_what_is_taken_for_granted_is_told(tmp_path: Path, tags: dict[str, Any], said: str) -> None:
    assert said in open_dicom(series(tmp_path, **tags)).notes[0]


def two_series(folder: Path, **tags: Any) -> None:
    series(folder)
    other = {"SeriesNumber": 7, "SeriesInstanceUID": "7.7", "SeriesDescription": "Topogram", "SliceThickness": None}
    write(folder, 1, "other", **(other | tags), pixels=np.ones((9, 8), np.uint16))
    write(folder, 2, "other2", **(other | tags), pixels=np.ones((9, 8), np.uint16))


def test_several_scans_are_listed_without_the_patient(tmp_path: Path) -> None:
    series(tmp_path)
    for index in range(2):
        write(tmp_path, index, f"b{index}", SeriesNumber=7, SeriesInstanceUID="7.7", SeriesDescription="Late")
    with pytest.raises(InputError) as refused:
        open_dicom(tmp_path)
    assert "2 series: 2 'Thorax' (4 images, 2 mm); 7 'Late' (2 images, 2 mm); `--series" in str(refused.value)
    assert "Doe" not in str(refused.value)


@pytest.mark.parametrize(
    ("tags", "number"),
    [
        ({}, 1),  # one key image
        ({"Modality": "OT", "SOPClassUID": uid.SecondaryCaptureImageStorage}, 1),
        ({"Modality": "OT", "SOPClassUID": uid.SecondaryCaptureImageStorage}, 3),
        ({"SOPClassUID": uid.SecondaryCaptureImageStorage}, 3),
        ({"Modality": "SR"}, 3),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, 3),
    ],
)
def test_the_only_scan_is_taken_and_what_is_plainly_none_is_named(
    tmp_path: Path, tags: dict[str, Any], number: int
) -> None:
    series(tmp_path)
    other = {"SeriesNumber": 9, "SeriesInstanceUID": "9.9", "SeriesDescription": "Screen", "SliceThickness": None}
    for index in range(number):
        write(tmp_path, index, f"other{index}", **(other | tags))
    opened = open_dicom(tmp_path, "PL")
    assert np.array_equal(stack(opened), hu())
    assert "Left out, as no scans: series 9 'Screen'" in opened.notes[0]


def test_two_scans_of_different_modality_are_not_chosen_from(tmp_path: Path) -> None:
    series(tmp_path)
    for index in range(3):
        write(tmp_path, index, f"pet{index}", Modality="PT", SeriesNumber=9, SeriesInstanceUID="9.9")
    with pytest.raises(InputError, match=r"holds 2 series.*PT, 3 images"):
        open_dicom(tmp_path)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_links_are_followed(tmp_path: Path, kind: str) -> None:
    whole = series(tmp_path / "elsewhere")
    scan = series(tmp_path / "scan", range(2))
    if kind == "folder":
        second = series(tmp_path / "second", range(2, 4))
        (scan / "rest").symlink_to(second)
        (second / "loop").symlink_to(scan)  # ends
    else:
        for path in sorted(whole.iterdir())[:2]:
            (scan / path.name).symlink_to(path)
    assert np.array_equal(stack(open_dicom(scan)), stack(open_dicom(whole)))


def test_a_link_to_nothing_is_refused_by_name(tmp_path: Path) -> None:
    scan = series(tmp_path / "scan")
    (scan / "slice").symlink_to("../.git/annex/objects/k")
    with pytest.raises(InputError, match=r"slice is a link to .*annex.*not there.*git annex get"):
        open_dicom(scan)


def test_files_that_are_no_dicom_images_are_named(tmp_path: Path) -> None:
    scan = series(tmp_path)
    (scan / "notes.txt").write_text("hello")
    (scan / "preview.png").write_bytes(b"x")
    (scan / "DICOMDIR").write_bytes(b"x")
    assert open_dicom(scan).notes[0] == "Left out, as they are no DICOM images: notes.txt, preview.png."


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("scan.nii.gz", b"x", r"DICOM images and scan\.nii\.gz, so it is not clear"),
        ("scan.mha", b"x", r"DICOM images and scan\.mha"),
        ("IM5", b"", "IM5 is empty"),
        ("IM5", b"version https://git-lfs.github.com/spec/v1\n", r"IM5 is a pointer to a file.*git lfs pull"),
    ],
)
def test_files_that_may_be_the_scan_or_a_part_of_it_are_refused(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (series(tmp_path) / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        open_dicom(tmp_path)


def test_as_many_pictures_as_images_are_refused(tmp_path: Path) -> None:
    scan = series(tmp_path)
    for number in range(4):
        (scan / f"{number}.png").write_bytes(b"x")
    with pytest.raises(InputError, match="4 DICOM images and 4 pictures"):
        open_dicom(scan)


SYNTAXES = [
    *[
        uid.ImplicitVRLittleEndian,
        uid.ExplicitVRLittleEndian,
        uid.ExplicitVRBigEndian,
        uid.DeflatedExplicitVRLittleEndian,
    ],
    *[uid.RLELossless, uid.JPEGLSLossless, uid.JPEG2000Lossless, uid.JPEGLosslessSV1],
]
TO_GDCM = {
    uid.RLELossless: gdcm.TransferSyntax.RLELossless,
    uid.JPEGLSLossless: gdcm.TransferSyntax.JPEGLSLossless,
    uid.JPEG2000Lossless: gdcm.TransferSyntax.JPEG2000Lossless,
    uid.JPEGLosslessSV1: gdcm.TransferSyntax.JPEGLosslessProcess14_1,
}


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda one: one.name)
@pytest.mark.parametrize("is_signed", [False, True])
def test_declared_padding_is_air_in_every_transfer_syntax(tmp_path: Path, syntax: uid.UID, is_signed: bool) -> None:
    number, kind = (-2000, np.int16) if is_signed else (63536, np.uint16)
    for index in range(SHAPE[0]):
        pixels = (hu()[index] + 1024).astype(kind)
        pixels[:2, :3] = number
        is_packed = syntax in TO_GDCM
        plain = uid.ExplicitVRLittleEndian if is_packed else syntax
        path = write(tmp_path, index, pixels=pixels, syntax=plain, PixelPaddingValue=number)
        if is_packed:
            packed(path, TO_GDCM[syntax])
    opened = open_dicom(tmp_path, "PL")
    expected = hu().astype(np.float32)
    expected[:, :2, :3] = -1000
    assert np.array_equal(stack(opened), expected)
    assert f"pixels of {number} are declared as padding" in opened.notes[0]


@pytest.mark.parametrize("ends", [(0, 40), (40, 0)])
def test_a_range_of_padding_is_air_from_end_to_end(tmp_path: Path, ends: tuple[int, int]) -> None:
    for index in range(SHAPE[0]):
        pixels = (hu()[index] + 1024).astype(np.uint16)
        pixels[0, :4] = 0, 20, 40, 41
        write(tmp_path, index, pixels=pixels, PixelPaddingValue=ends[0], PixelPaddingRangeLimit=ends[1])
    assert stack(open_dicom(tmp_path, "PL"))[0, 0, :4].tolist() == [-1000, -1000, -1000, 41 - 1024]


def test_padding_is_air_whatever_rescale_makes_hu(tmp_path: Path) -> None:
    pixels = (hu()[0] + 1024).astype(np.uint16)
    pixels[0, 0] = 63536
    bare = {"RescaleSlope": None, "RescaleIntercept": None}
    write(tmp_path, 0, pixels=pixels, PixelPaddingValue=63536, **bare)
    opened = open_dicom(tmp_path, "PL", (1, -1024))
    assert opened.read(0)[0, 0] == -1000
    assert opened.read(0)[1, 1] == hu()[0, 1, 1]


@pytest.mark.parametrize(("jitter", "is_told"), [(0.005, False), (0.03, True)])
def test_places_that_jitter_by_parts_of_a_gap_are_even(tmp_path: Path, jitter: float, is_told: bool) -> None:
    for index in range(SHAPE[0]):
        z = 30 + 2 * index + jitter * (-1) ** index * (0 < index < 3)
        write(tmp_path, index, ImagePositionPatient=[-100, -90, round(z, 3)])
    opened = open_dicom(tmp_path)
    assert opened.spacing is not None
    assert opened.spacing[0] == pytest.approx(2, rel=0.02)
    assert any("taken as even" in note for note in opened.notes) == is_told


@pytest.mark.parametrize("wanted", ["7", "7.7"])
def test_a_series_is_chosen_by_its_number_or_uid(tmp_path: Path, wanted: str) -> None:
    two_series(tmp_path)
    assert open_dicom(tmp_path, series=wanted).shape[0] == 2


def test_series_of_one_number_are_told_apart_by_uid(tmp_path: Path) -> None:
    two_series(tmp_path, SeriesNumber=2)
    with pytest.raises(InputError, match=r"UID 1\.2\.3\).*UID 7\.7\).*--series UID"):
        open_dicom(tmp_path, series="2")


def test_a_series_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    two_series(tmp_path)
    with pytest.raises(InputError, match="no series 3: 2 'Thorax'"):
        open_dicom(tmp_path, series="3")


@pytest.mark.parametrize(
    ("tags", "said"),
    [
        ({"Modality": "MR"}, "modality MR"),
        ({"NumberOfFrames": 3}, "several frames"),
        ({"PhotometricInterpretation": "MONOCHROME1"}, "MONOCHROME1"),
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, "no grey image"),
        ({"ImagePositionPatient": None}, "no ImagePositionPatient"),
        ({"ImageOrientationPatient": None}, "no ImageOrientationPatient"),
        ({"PixelSpacing": None}, "no PixelSpacing"),
        ({"PixelSpacing": [0, 1]}, "not above 0"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "right angles"),
        ({"BitsAllocated": 12}, "BitsAllocated is 12"),
        ({"RescaleSlope": 0}, "rescale slope 0"),
        ({"BitsStored": 12, "HighBit": 15}, "HighBit"),
        ({"ModalityLUTSequence": [Dataset()]}, "lookup table"),
        ({"Rows": None, "Columns": None}, "truncated"),
        # of the odd image alone:
        ({"pixels": np.zeros((5, 8), np.uint16)}, "5 x 8 pixels and not 9 x 8.*localizer"),
        ({"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}, "another direction.*localizer"),
        ({"PixelSpacing": [1.5, 1.5]}, r"1\.5 x 1\.5 mm and not 0\.8 x 0\.7 mm"),
        ({"ImagePositionPatient": [-100, -90, 32]}, "two images of one place"),
        ({"ImagePositionPatient": [-100, -90, 32], "SOPInstanceUID": "1.2.3.1"}, "different pixels"),
        ({"ImagePositionPatient": [-100, -90, 46]}, "gap 10 mm between z = 36 and 46 mm where 2 is expected: 4 images"),
        ({"ImagePositionPatient": [-100, -90, 38.2]}, r"gap 2\.2 mm .*uneven"),
        ({"ImagePositionPatient": [-96, -90, 38]}, "straight, even row"),
    ],
)
def test_what_is_no_ct_on_a_grid_is_refused_by_name(tmp_path: Path, tags: dict[str, Any], said: str) -> None:
    odd = write(series(tmp_path), 4, "odd", **tags)
    with pytest.raises(InputError, match=rf"(?s){odd if 'gap' not in said else tmp_path}.*{said}|{said}.*{odd}"):
        open_dicom(tmp_path)


def cut(keep: float) -> Callable[[bytes], bytes]:
    return lambda content: content[: int(len(content) * keep)]


@pytest.mark.parametrize("kind", ["", "JPEGLosslessProcess14_1", "DeflatedExplicitVRLittleEndian"])
@pytest.mark.parametrize("keep", [0.98, 0.4, 0.1])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, kind: str, keep: float) -> None:
    path = write(series(tmp_path, range(3)), 3, pixels=np.random.default_rng(0).integers(0, 4000, (40, 40), np.uint16))
    for other in tmp_path.iterdir():
        if other != path:
            other.unlink()
    if kind:
        packed(path, getattr(gdcm.TransferSyntax, kind))
    path.write_bytes(cut(keep)(path.read_bytes()))
    with pytest.raises(InputError, match=rf"{path} is (damaged or )?truncated|{path} is named like"):
        open_dicom(tmp_path).read(0)


@pytest.mark.parametrize("content", [b"", b"\x30\x80\x06\x09" + bytes(range(200))], ids=["empty", "encrypted"])
def test_a_file_that_only_its_name_calls_dicom_is_refused(tmp_path: Path, content: bytes) -> None:
    (series(tmp_path) / "b.dcm").write_bytes(content)
    with pytest.raises(InputError, match=r"b\.dcm is named like a DICOM file"):
        open_dicom(tmp_path)


def test_a_decoder_that_breaks_down_takes_no_more_with_it_than_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed(write(tmp_path, 0), gdcm.TransferSyntax.JPEG2000Lossless)
    at_start_of_python(tmp_path, monkeypatch, "import os, pydicom; pydicom.dcmread = lambda *_, **__: os.abort()")
    with pytest.raises(InputError, match=r"z\.dcm is damaged: the decoder of its packed pixels broke down"):
        open_dicom(tmp_path).read(0)


def test_pixels_that_a_decoder_made_up_are_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 4000, (40, 40)).astype(np.uint16)
    path = write(tmp_path, 0, pixels=noise, BitsStored=12, HighBit=11)
    packed(path, gdcm.TransferSyntax.JPEGLosslessProcess14_1)
    content = path.read_bytes()
    path.write_bytes(content[:-800] + b"\xff\xd9" + content[-798:])  # an end before the end
    with pytest.raises(InputError, match=r"is damaged: its packed pixels do not decode .*premature end"):
        open_dicom(tmp_path).read(0)


def test_a_missing_decoder_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed(write(tmp_path, 0, BitsStored=12, HighBit=11), gdcm.TransferSyntax.JPEG2000Lossless)
    nobody = type("Decoder", (), {"is_available": False})
    why_not_decodable.cache_clear()
    monkeypatch.setattr("pydicom.pixels.get_decoder", lambda _: nobody)
    with pytest.raises(InputError, match=r'JPEG 2000 .* no decoder is installed: `pip install "matchai\[medical\]"`'):
        open_dicom(tmp_path)
    why_not_decodable.cache_clear()


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("nothing")
    with pytest.raises(InputError, match="holds no DICOM images"):
        open_dicom(tmp_path)
    with pytest.raises(InputError, match="is a file, not a folder"):
        open_dicom(tmp_path / "a.txt")


def test_decoded_pixels_have_no_name_and_go_with_close(tmp_path: Path) -> None:
    (scratch := tmp_path / "scratch").mkdir()
    opened = open_dicom(series(tmp_path / "scan"), scratch=scratch)
    opened.read(0)
    assert not list(scratch.iterdir())
    opened.close()
    next((tmp_path / "scan").iterdir()).unlink()
    with pytest.raises(InputError):
        opened.read(0)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rest.zip", b"PK"),
        ("a.dcm.gz", b"\x1f\x8b"),
        ("1.2.840.113619.5", b""),
        ("IM007", b"\0" * 200),
        ("IM007", b"\x02\0\0\0UL"),
    ],
)
def test_what_may_hold_one_of_the_slices_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (series(tmp_path) / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}.*may hold one of the slices"):
        open_dicom(tmp_path)


def test_a_text_without_a_suffix_is_left_out(tmp_path: Path) -> None:
    (series(tmp_path) / "README").write_text("about these files")
    assert "README" in open_dicom(tmp_path).notes[0]


def test_captures_in_the_scans_own_series_are_left_out_one_by_one(tmp_path: Path) -> None:
    series(tmp_path)
    write(tmp_path, 4, "capture", SOPClassUID=uid.SecondaryCaptureImageStorage)
    write(tmp_path, 60, "scout", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    opened = open_dicom(tmp_path, "PL")
    assert np.array_equal(stack(opened), hu())
    assert "2 captures or localizers" in opened.notes[0]


def test_an_image_of_many_frames_is_no_key_image(tmp_path: Path) -> None:
    series(tmp_path)
    write(tmp_path, 0, "frames", NumberOfFrames=200, SeriesNumber=9, SeriesInstanceUID="9.9")
    with pytest.raises(InputError, match=r"holds 2 series"):
        open_dicom(tmp_path)


@pytest.mark.parametrize(
    ("name", "told"), [("scan.nii.gz", "name scan.nii.gz itself"), ("a.mha", "a.mha is a MetaImage")]
)
def test_a_folder_without_dicom_images_is_told_by_what_it_holds(tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / name).touch()
    (tmp_path / "readme.txt").touch()
    with pytest.raises(InputError, match=f"holds no DICOM images, but {told}"):
        open_dicom(tmp_path)
