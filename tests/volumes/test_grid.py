import itertools
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from matchai.system.errors import InputError
from matchai.volumes.grid import GridVolume, check_same_geometry
from matchai.volumes.volume import file_labels, turn

SHAPE = (4, 5, 6)
TOWARD = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0)}


def numbers(seed: int = 0) -> NDArray[np.int16]:
    return np.random.default_rng(seed).integers(-1000, 500, SHAPE).astype(np.int16)


def turned_by(angles: list[float]) -> NDArray[np.float64]:
    turn_by = np.eye(3)
    for axis, angle in enumerate(angles):
        a, b = [i for i in range(3) if i != axis]
        one = np.eye(3)
        one[a, a], one[a, b], one[b, a], one[b, b] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        turn_by = turn_by @ one
    return turn_by


@st.composite
def affines(draw: st.DrawFn) -> NDArray[np.float64]:
    """Any order and direction of the axes, turned by up to 20 degrees about each, unequal voxels."""
    order = draw(st.permutations(range(3)))
    signs = [draw(st.sampled_from([-1.0, 1.0])) for _ in range(3)]
    angles = [draw(st.floats(-0.35, 0.35)) for _ in range(3)]
    affine = np.eye(4)
    affine[:3, :3] = turned_by(angles) @ (np.eye(3)[:, list(order)] * signs) * [0.7, 0.9, 5.0]
    affine[:3, 3] = [draw(st.floats(-300, 300)) for _ in range(3)]
    return affine


def volume(affine: NDArray[np.float64], orientation: str = "LP", **more: Any) -> GridVolume:
    return GridVolume(Path("scan"), "scan", numbers(), affine, orientation, **more)


def stack(opened: GridVolume) -> NDArray[np.float32]:
    return np.stack([opened.read(index) for index in range(opened.shape[0])])


orientations = st.sampled_from(["LP", "LA", "RP", "RA", "PL", "PR", "AL", "AR"])


@settings(max_examples=30, deadline=None)
@given(affine=affines(), orientation=orientations)
def test_slices_rows_and_columns_run_as_wanted_and_every_voxel_stays_in_its_place(
    affine: NDArray[np.float64], orientation: str
) -> None:
    opened = volume(affine, orientation)
    read = stack(opened)
    wanted = np.array([(0, 0, 1), TOWARD[orientation[0]], TOWARD[orientation[1]]])
    steps = opened.placement[:3, :3] / np.linalg.norm(opened.placement[:3, :3], axis=0)
    assert (np.sum(steps.T * wanted, axis=1) > np.sqrt(0.5)).all()
    inverse = np.linalg.inv(affine)
    for place in itertools.product(*map(range, read.shape)):
        voxel = np.rint((inverse @ opened.placement @ [*place, 1])[:3]).astype(int)
        assert read[place] == numbers()[tuple(voxel)]


@settings(max_examples=20, deadline=None)
@given(affine=affines(), orientation=orientations)
def test_a_mask_goes_back_to_the_voxels_that_its_slices_came_from(
    tmp_path_factory: pytest.TempPathFactory, affine: NDArray[np.float64], orientation: str
) -> None:
    folder = tmp_path_factory.mktemp("mask")
    opened = volume(affine, orientation)
    lesion = (stack(opened) > 0).astype(np.uint8)  # class 1 where the number is above 0, else class 0
    saved = nibabel.load(opened.save_mask(folder, lesion, [2, 7]))
    assert np.array_equal(np.asarray(saved.dataobj), np.where(numbers() > 0, 7, 2))
    assert saved.get_data_dtype() == np.uint8
    assert np.allclose(saved.affine, affine, atol=1e-4)


@settings(max_examples=10, deadline=None)
@given(affine=affines())
def test_another_orientation_is_the_same_slices_turned(affine: NDArray[np.float64]) -> None:
    assert np.array_equal(turn(stack(volume(affine, "LP")), "LP", "AR"), stack(volume(affine, "AR")))


@settings(max_examples=15, deadline=None)
@given(affine=affines())
def test_simpleitk_finds_the_same_mask_at_the_same_point(
    tmp_path_factory: pytest.TempPathFactory, affine: NDArray[np.float64]
) -> None:
    folder = tmp_path_factory.mktemp("itk")
    opened = volume(affine)
    marker = np.zeros(opened.shape, np.uint8)
    place = tuple(n // 2 for n in opened.shape)
    marker[place] = 1
    image = SimpleITK.ReadImage(str(opened.save_mask(folder, marker, [0, 1])))
    right, front, top, _ = (opened.placement @ [*place, 1]).tolist()
    found = image.TransformPhysicalPointToIndex((-right, -front, top))  # SimpleITK counts toward left and back
    assert image.GetPixel(*found) == 1


def test_a_map_is_stored_in_steps_of_a_65535th(tmp_path: Path) -> None:
    opened = volume(np.diag([1.0, -1, 2, 1]))
    values = np.random.default_rng(0).integers(0, 65536, opened.shape).astype(np.uint16)
    path = opened.save_map(tmp_path, values, "probability")
    assert path.name == "scan_probability.nii.gz"
    back = GridVolume(path, "map", np.asarray(nibabel.load(path).get_fdata()), opened.affine)
    assert np.abs(stack(back) - values / 65535).max() < 1e-6


def test_a_large_mask_is_written_piece_by_piece_into_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = volume(np.diag([1.0, 1, 1, 1]))
    mask = (stack(opened) % 3).astype(np.uint8)
    whole = opened.save_mask(tmp_path, mask, [0, 1, 2]).read_bytes()
    monkeypatch.setattr("matchai.volumes.grid._PIECE", 1)
    assert opened.save_mask(tmp_path, mask, [0, 1, 2]).read_bytes() == whole


def test_spacing_follows_the_axes_and_a_voxel_has_its_volume() -> None:
    affine = np.array([[0, 0, -2.0, 10], [0.5, 0, 0, 3], [0, 0.8, 0, 5], [0, 0, 0, 1]])
    opened = volume(affine, "LP")
    assert opened.shape == (5, 6, 4)
    assert opened.spacing == pytest.approx((0.8, 2.0, 0.5))
    assert opened.voxel_ml == pytest.approx(0.8 * 2 * 0.5 / 1000)
    assert "2.00 x 0.50 mm" in opened.notes[0]


def test_the_unit_of_length_counts_in_spacing_and_volume() -> None:
    opened = volume(np.diag([0.001, 0.001, 0.002, 1]), unit=1000)
    assert opened.spacing == pytest.approx((2, 1, 1))
    assert opened.voxel_ml == pytest.approx(0.002)


def test_hu_are_the_rescaled_numbers_of_the_files_own_scale() -> None:
    opened = volume(np.eye(4), "RA", scale=(2.0, -10.0), rescale=(0.5, 7.0))
    assert np.array_equal(stack(opened), ((numbers() * 2.0 - 10) * 0.5 + 7).transpose(2, 0, 1).astype(np.float32))
    assert np.array_equal(opened.read_labels(3), numbers()[:, :, 3] * 2.0 - 10)


def test_labels_keep_their_type_and_are_native() -> None:
    swapped = GridVolume(Path("m"), "m", numbers().astype(">i2"), np.eye(4))
    assert swapped.read_labels(0).dtype == np.dtype("=i2")
    assert swapped.read(0).dtype == np.dtype("=f4")


def test_a_slice_that_is_not_there_is_an_index_error() -> None:
    with pytest.raises(IndexError):
        volume(np.eye(4)).read(6)


@pytest.mark.parametrize(
    ("affine", "said"),
    [(np.diag([1.0, 1, 0, 1]), "singular"), (np.diag([1.0, np.nan, 1, 1]), "NaN"), (np.ones((4, 4)), "singular")],
)
def test_an_affine_that_places_no_voxels_is_refused(affine: NDArray[np.float64], said: str) -> None:
    with pytest.raises(InputError, match=f"scan: .*{said}"):
        volume(affine)


def test_a_tilted_volume_says_so() -> None:
    affine = np.eye(4)
    affine[:3, :3] = turned_by([0.4, 0, 0])
    assert "23 degrees" in volume(affine).notes[0]


def test_a_mask_that_stores_its_voxels_in_another_order_lies_on_its_image() -> None:
    flipped = np.diag([-1.0, 1, 1, 1])
    flipped[0, 3] = SHAPE[0] - 1
    check_same_geometry(volume(np.eye(4)), volume(flipped))


@pytest.mark.parametrize(("shift", "is_refused"), [(0.09, False), (0.11, True), (4.0, True)])
def test_a_mask_beside_its_image_is_refused_with_the_distance(shift: float, is_refused: bool) -> None:
    spacing = np.diag([1, 0.01, 1, 1])  # the limit is a part of the voxel, however small that is
    moved = spacing.copy()
    moved[1, 3] = shift * 0.01
    mask = GridVolume(Path("mask"), "mask", numbers(), moved)
    if not is_refused:
        check_same_geometry(volume(spacing), mask)
        return
    with pytest.raises(InputError, match=f"mask does not lie on its image scan: .* {shift:.4g} voxels"):
        check_same_geometry(volume(spacing), mask)


def test_a_mask_of_another_shape_is_refused() -> None:
    mask = GridVolume(Path("mask"), "mask", numbers()[1:], np.eye(4), "AR")
    with pytest.raises(InputError, match=r"mask has 6 x 5 x 3 .* scan has 6 x 5 x 4"):
        check_same_geometry(volume(np.eye(4), "AR"), mask)


def test_masks_of_lesions_use_the_numbers_of_viewers(tmp_path: Path) -> None:
    opened = volume(np.diag([-1.0, -1, 1, 1]), "PL")
    background = np.full(opened.shape, 3, np.uint8)
    assert not np.asarray(nibabel.load(opened.save_mask(tmp_path, background, file_labels(4, 3))).dataobj).any()
