import gzip
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK
from numpy.typing import NDArray

from matchai.system.errors import InputError
from matchai.volumes.nifti import open_nifti

AFFINE = np.array([[-0.7, 0, 0, 90], [0, 0.8 * 0.96, -2.5 * 0.28, -70], [0, 0.8 * 0.28, 2.5 * 0.96, 30], [0, 0, 0, 1]])
SHAPE = (7, 6, 5)


def numbers(dtype: str = "i2") -> NDArray[Any]:
    return np.random.default_rng(0).integers(0, 120, SHAPE).astype(dtype)


def write(path: Path, values: NDArray[Any], kind: Any = nibabel.Nifti1Image, endian: str = "<", **fields: Any) -> Path:
    header = kind.header_class(endianness=endian)
    image = kind(values, AFFINE, header, dtype=values.dtype)
    image.set_sform(AFFINE, 2)
    image.set_qform(AFFINE, 1)
    nibabel.save(image, path)
    if fields:
        unpacked = (gzip.decompress if path.suffix == ".gz" else bytes)(path.read_bytes())
        changed = kind.header_class(unpacked[: kind.header_class.sizeof_hdr], check=False)
        for field, value in fields.items():
            changed[field] = value
        content = changed.binaryblock + unpacked[len(changed.binaryblock) :]
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def stack(opened: Any) -> NDArray[np.float32]:
    return np.stack([opened.read(index) for index in range(opened.shape[0])])


def as_stored(opened: Any) -> NDArray[np.float32]:
    """The slices of `AFFINE` (columns of voxels run to the left, rows to the front) as nibabel orders the voxels."""
    return stack(opened)[:, :, ::-1].transpose(1, 2, 0)


def write_affines(path: Path, sform: Any, qform: Any, pixdim: Any = None) -> Path:
    """A header with the two affines as given, each None for a code of 0."""
    image = nibabel.Nifti1Image(numbers(), np.eye(4))
    for place, affine in ((image.set_qform, qform), (image.set_sform, sform)):
        place(affine, 0 if affine is None else 1)
    if pixdim is not None:
        image.header["pixdim"][1:4] = pixdim
    path.write_bytes(image.to_bytes())
    return path


SCANNED = np.diag([-0.7, -0.7, 2.0, 1])


@pytest.mark.parametrize("sform", [np.eye(4), np.diag([-0.7, -0.7, 2.1, 1])])
def test_a_spacing_that_pixdim_denies_is_refused_unless_the_user_says_which(tmp_path: Path, sform: Any) -> None:
    path = write_affines(tmp_path / "a.nii", sform, SCANNED)
    with pytest.raises(InputError, match=r"by its sform, but 0\.7 x 0\.7 x 2 by .*--nifti-affine sform or"):
        open_nifti(path)
    assert open_nifti(path, affine="qform").spacing == pytest.approx((2, 0.7, 0.7))
    assert open_nifti(path, affine="sform").voxel_ml == pytest.approx(np.linalg.det(sform[:3, :3]) / 1000)


def test_pixdim_denies_an_sform_without_a_qform_too(tmp_path: Path) -> None:
    path = write_affines(tmp_path / "a.nii", SCANNED, None, [0.5, 0.5, 4])
    with pytest.raises(InputError, match=r"0\.7 x 0\.7 x 2 by its sform, but 0\.5 x 0\.5 x 4 by"):
        open_nifti(path)
    assert open_nifti(path, affine="qform").spacing == pytest.approx((4, 0.5, 0.5))
    assert open_nifti(path, affine="sform").spacing == pytest.approx((2, 0.7, 0.7))


@pytest.mark.parametrize(("shift", "is_told"), [(0.06, False), (0.08, True), (30, True)])
def test_affines_that_place_voxels_apart_are_told_with_the_one_that_is_taken(
    tmp_path: Path, shift: float, is_told: bool
) -> None:
    moved = SCANNED.copy()
    moved[0, 3] = shift  # of voxels of 0.7 mm
    opened = open_nifti(write_affines(tmp_path / "a.nii", moved, SCANNED))
    assert any("the sform is taken" in note for note in opened.notes) == is_told
    assert np.allclose(opened.affine, moved)


@pytest.mark.parametrize("pixdim", [[0, 0, 0], [-0.7, 0.7, 2], [0.7, 0.7, 2.01]])
def test_a_pixdim_that_tells_nothing_or_the_same_is_no_contradiction(tmp_path: Path, pixdim: Any) -> None:
    path = write_affines(tmp_path / "a.nii", SCANNED, None, pixdim)
    assert open_nifti(path).spacing == pytest.approx((2, 0.7, 0.7))


def test_the_pixdim_of_a_tilted_scan_may_tell_the_distance_of_its_planes(tmp_path: Path) -> None:
    sheared = SCANNED.copy()
    sheared[1, 2] = 2 * np.tan(np.radians(20))
    for third in (2.0, 2 / np.cos(np.radians(20))):
        assert open_nifti(write_affines(tmp_path / "a.nii", sheared, None, [0.7, 0.7, third])).spacing is not None


def test_voxels_that_would_begin_within_the_header_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"begin at byte 0 \(vox_offset\), within its own header of 348"):
        open_nifti(write(tmp_path / "a.nii", numbers(), vox_offset=0))


def test_a_header_without_a_qform_is_no_contradiction(tmp_path: Path) -> None:
    assert open_nifti(write_affines(tmp_path / "a.nii", SCANNED, None, [0.7, 0.7, 2])).notes == []


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("name", ["a b.nii", "ü.nii.gz", "A.NII", "A.Nii.GZ"])
def test_names_versions_and_packing_read_as_nibabel_reads_them(tmp_path: Path, name: str, kind: Any) -> None:
    written = write(tmp_path / name.lower(), numbers(), kind)
    truth = nibabel.load(written).get_fdata()
    opened = open_nifti(written.rename(tmp_path / name))
    assert opened.name == name[: name.index(".")]
    assert np.array_equal(as_stored(opened), truth)


@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
def test_any_real_type_in_any_byte_order_reads_as_nibabel_reads_it(tmp_path: Path, dtype: str, endian: str) -> None:
    path = write(tmp_path / "a.nii", numbers(dtype), endian=endian)
    assert nibabel.load(path).get_data_dtype() == np.dtype(endian + dtype)
    assert np.array_equal(as_stored(open_nifti(path)), nibabel.load(path).get_fdata())


@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize(("slope", "intercept"), [(0, 5), (np.nan, np.nan), (1, 0), (0.37, -1024), (-2, 0.5)])
def test_the_files_scale_is_taken_as_nibabel_takes_it(
    tmp_path: Path, slope: float, intercept: float, endian: str
) -> None:
    path = write(tmp_path / "a.nii.gz", numbers(), endian=endian, scl_slope=slope, scl_inter=intercept)
    truth = nibabel.load(path).get_fdata().astype(np.float32)
    assert np.array_equal(as_stored(open_nifti(path)), truth)


def test_rescale_comes_on_top_of_the_files_scale(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii", numbers(), scl_slope=2, scl_inter=1)
    assert np.array_equal(as_stored(open_nifti(path, rescale=(10, -3))), (numbers() * 2.0 + 1) * 10 - 3)


@pytest.mark.parametrize("orientation", ["LP", "AR"])
def test_a_point_of_the_patient_holds_what_simpleitk_reads_there(tmp_path: Path, orientation: str) -> None:
    path = write(tmp_path / "a.nii.gz", numbers())
    image = SimpleITK.ReadImage(str(path))
    opened = open_nifti(path, orientation)
    for place in [(0, 0, 0), (4, 1, 2), (2, 5, 3)]:
        right, front, top, _ = (opened.placement @ [*place, 1]).tolist()
        found = image.TransformPhysicalPointToIndex((-right, -front, top))
        assert opened.read(place[0])[place[1:]] == image.GetPixel(*found)


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("endian", ["<", ">"])
def test_a_mask_has_the_geometry_of_its_image_to_the_last_bit(tmp_path: Path, kind: Any, endian: str) -> None:
    path = write(tmp_path / "a.nii", numbers()[..., None], kind, endian, xyzt_units=2, descrip=b"Jane Doe")
    opened = open_nifti(path)
    mask = nibabel.load(opened.save_mask(tmp_path, np.zeros(opened.shape, np.uint8), [0, 1]))
    image = nibabel.load(path)
    assert type(mask.header) is type(image.header)
    assert mask.shape == image.shape == (*SHAPE, 1)
    same = ["sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c", "quatern_d"]
    for field in [*same, "qoffset_x", "qoffset_y", "qoffset_z", "pixdim", "xyzt_units", "dim"]:
        assert np.array_equal(mask.header[field], image.header[field]), field
    assert b"Doe" not in mask.header.binaryblock


def test_a_map_keeps_the_byte_order_of_its_image(tmp_path: Path) -> None:
    opened = open_nifti(write(tmp_path / "a.nii", numbers(), endian=">"))
    values = np.arange(np.prod(opened.shape), dtype=np.uint16).reshape(opened.shape)
    back = open_nifti(opened.save_map(tmp_path, values, "p"))
    assert np.allclose(stack(back), values / 65535, atol=1e-7)


def test_a_file_without_orientation_is_taken_as_nibabel_takes_it_and_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii", numbers(), sform_code=0, qform_code=0)
    opened = open_nifti(path)
    assert "has no orientation" in opened.notes[0]
    assert np.array_equal(opened.affine, nibabel.load(path).affine)


@pytest.mark.parametrize(("unit", "mm"), [(1, 1000), (3, 0.001)])
def test_other_units_of_length_are_told_in_millimetres(tmp_path: Path, unit: int, mm: float) -> None:
    opened = open_nifti(write(tmp_path / "a.nii", numbers(), xyzt_units=unit))
    plain = open_nifti(write(tmp_path / "b.nii", numbers(), xyzt_units=2))
    assert opened.spacing == pytest.approx([s * mm for s in plain.spacing or ()])
    assert "unit of length" in opened.notes[0]


def test_what_nibabel_mends_in_a_header_is_mended_without_a_word(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.nii", numbers(), pixdim=[0, 0.7, 0.8, 2.5, 1, 1, 1, 1], xyzt_units=64)
    assert stack(open_nifti(path)).size == np.prod(SHAPE)
    assert not "".join(capfd.readouterr())


def test_a_packed_file_is_unpacked_once_without_a_name_and_again_after_close(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii.gz", numbers())
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    opened = open_nifti(path, scratch=scratch)
    first = stack(opened)
    path.rename(tmp_path / "moved.nii.gz")
    assert np.array_equal(stack(opened), first)
    assert not list(scratch.iterdir())
    opened.close()
    with pytest.raises(InputError, match="cannot be unpacked"):
        opened.read(0)


def test_threads_read_the_same_slices(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii.gz", numbers())
    opened = open_nifti(path)
    read: dict[int, NDArray[np.float32]] = {}

    def work(index: int) -> None:
        read[index] = opened.read(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(opened.shape[0])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(np.stack([read[index] for index in sorted(read)]), stack(open_nifti(path)))


def cut(keep: float) -> Callable[[bytes], bytes]:
    return lambda content: content[: int(len(content) * keep)]


def with_wrong_sum(content: bytes) -> bytes:
    return content[:-8] + bytes([content[-8] ^ 1]) + content[-7:]


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        ("a.nii", cut(0.9), "incomplete: .* bytes"),
        ("a.nii", cut(0), "no NIfTI file: it is empty"),
        ("a.nii", lambda _: b"<!DOCTYPE html>" + b" " * 600, "no NIfTI file"),
        ("a.nii.gz", cut(0.9), "damaged or incomplete"),
        ("a.nii.gz", cut(0.05), "damaged or incomplete"),
        ("a.nii.gz", with_wrong_sum, "damaged or incomplete: CRC"),
        ("a.nii.gz", lambda content: gzip.compress(cut(0.9)(gzip.decompress(content))), "incomplete: unpacked"),
    ],
)
def test_a_broken_file_is_refused_by_name(
    tmp_path: Path, name: str, spoil: Callable[[bytes], bytes], said: str
) -> None:
    path = write(tmp_path / name, numbers())
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(InputError, match=rf"{name} is {said}"):
        open_nifti(path).read(0)


COLOURS = np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])


@pytest.mark.parametrize(
    ("values", "fields", "said"),
    [
        (np.zeros((*SHAPE, 2), "i2"), {}, "7 x 6 x 5 x 2; a volume has three axes: save"),
        (np.zeros(SHAPE[:2], "i2"), {}, "7 x 6; a volume has three axes"),
        (COLOURS, {}, "colours"),
        (np.zeros(SHAPE, "c8"), {}, "complex"),
        (numbers(), {"srow_x": 0}, "singular"),
        (numbers(), {"srow_y": [np.nan, 0, 0, 0]}, "--nifti-affine qform"),
        (numbers(), {"srow_y": [np.nan, 0, 0, 0], "qform_code": 0}, "NaN"),
        (numbers(), {"scl_slope": 2, "scl_inter": np.nan}, "scale slope 2"),
        (numbers(), {"magic": b"ni1"}, r"header of a \.hdr/\.img pair"),
        (numbers(), {"datatype": 9999}, "makes no sense"),
        (numbers(), {"dim": [3, 7, -6, 5, 1, 1, 1, 1]}, "three axes"),
        (numbers(), {"sform_code": 0, "quatern_b": 2}, "qform that is no rotation"),
    ],
)
def test_what_is_no_volume_is_refused_by_name(
    tmp_path: Path, values: NDArray[Any], fields: dict[str, Any], said: str
) -> None:
    path = write(tmp_path / "a.nii", values, **fields)
    with pytest.raises(InputError, match=rf"a\.nii.*{said}"):
        open_nifti(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        open_nifti(tmp_path / "a.nii")
    with pytest.raises(InputError, match="is a folder"):
        open_nifti(tmp_path)


def test_too_little_room_for_the_unpacked_file_is_told_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_nifti(write(tmp_path / "a.nii.gz", numbers()), scratch=tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(InputError, match=r"unpacks to [0-9.]+ (kB|bytes), but .* only 100 bytes free"):
        opened.read(0)


@pytest.mark.parametrize("qform", [SCANNED, None])
def test_a_spacing_that_is_not_told_is_not_made_up(tmp_path: Path, qform: Any) -> None:
    path = write_affines(tmp_path / "a.nii", None, qform)
    content = bytearray(path.read_bytes())
    content[80:92] = bytes(12)  # of pixdim
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"tells no spacing \(pixdim is 0 x 0 x 0\)"):
        open_nifti(path)


@pytest.mark.parametrize("sform", [np.zeros((4, 4)), np.full((4, 4), np.nan)])
def test_an_sform_that_places_nothing_is_refused_with_the_flag_of_a_good_qform(tmp_path: Path, sform: Any) -> None:
    path = write_affines(tmp_path / "a.nii", SCANNED, SCANNED)
    content = bytearray(path.read_bytes())
    content[280:328] = sform[:3].astype("<f4").tobytes()
    path.write_bytes(content)
    with pytest.raises(InputError, match="--nifti-affine qform"):
        open_nifti(path)
    assert open_nifti(path, affine="qform").spacing == pytest.approx((2, 0.7, 0.7))
