"""Figures: each function writes one whole PNG that shows what it was given, whatever the names and gaps."""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from matchai.drawing.figures import (
    class_colors,
    draw_confusion_matrix,
    draw_dice_per_class,
    draw_learning_curves,
    draw_panels,
)
from matchai.drawing.layout import DPI, GAP, MARGIN, WIDTH

NAMES = ["ground glass", "consolidation", "lungs other", "background"]
pytestmark = pytest.mark.filterwarnings("error")

# `$\glass$` is no formula that matplotlib knows: read as one, it would be an error.
ODD_NAMES = [r"$\glass$ <1>", "_consolidation$x$", "lungs other " * 20, "W" * 150]
LONG_TITLE = r"a synthetic phantom, $\glass$ = 5e-4, " * 12
Picture = npt.NDArray[np.float32]

# Machado, Oliveira and Fernandes (2009), deuteranopia at severity 1, for linear RGB.
DEUTERANOPIA = np.array(
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
)
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])  # sRGB, D65


def to_lab(color: str, seen: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Returns CIELAB of a colour after `seen`, (3, 3) on linear RGB."""
    srgb = np.array(to_rgb(color))
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    xyz = XYZ @ np.clip(seen @ linear, 0, 1) / XYZ.sum(axis=1)
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def nearest_pair(colors: list[str], seen: npt.NDArray[np.float64]) -> float:
    labs = [to_lab(color, seen) for color in colors]
    return min(float(np.linalg.norm(one - other)) for one, other in itertools.combinations(labs, 2))


def make_history(num_epochs: int, **replaced: Any) -> list[dict[str, Any]]:
    return [
        {
            "epoch": epoch,
            "train_loss": 1 / epoch,
            "val_loss": 1.1 / epoch,
            "mean_dice": 0.8 - 0.5 / epoch,
            "lesion_dice": 0.7 - 0.5 / epoch,
            "lr": 1e-5 * epoch,
            "dice_per_class": [0.5, 0.6, 0.9, 0.99],
        }
        | replaced
        for epoch in range(1, num_epochs + 1)
    ]


def drawn(draw: Callable[[Path], None], folder: Path) -> Picture:
    """Draws into an empty folder, sees that only the PNG is left there, and returns it, (H, W, 3) from 0 to 1."""
    folder.mkdir()
    path = folder / "picture.png"
    draw(path)
    assert [file.name for file in folder.iterdir()] == ["picture.png"]
    picture: Picture = imread(path)[..., :3]
    assert picture.shape[1] >= WIDTH * DPI
    assert 200 < picture.shape[0] < 4000
    return picture


def margins_are_blank(picture: Picture) -> bool:
    """Tells whether nothing reaches into the outer 15 pixels, as clipped text would."""
    inside = np.zeros(picture.shape[:2], dtype=bool)
    inside[15:-15, 15:-15] = True
    return bool((picture[~inside] == 1).all())


def near(picture: Picture, color: str) -> npt.NDArray[np.bool_]:
    return np.asarray(np.abs(picture - np.array(to_rgb(color))).max(axis=2) < 0.02)


@pytest.mark.parametrize("num_epochs", [0, 1, 2, 60])
def test_curves_are_drawn_for_any_number_of_epochs(num_epochs: int, tmp_path: Path) -> None:
    history = make_history(num_epochs)
    curves = drawn(lambda path: draw_learning_curves(history, path, title="run"), tmp_path / "curves")
    dices = drawn(lambda path: draw_dice_per_class(history, NAMES, path, title="run"), tmp_path / "dices")
    assert margins_are_blank(curves)
    assert margins_are_blank(dices)


def test_a_single_epoch_is_visible(tmp_path: Path) -> None:
    def draw(mean_dice: float | None) -> Callable[[Path], None]:
        return lambda path: draw_learning_curves(make_history(1, mean_dice=mean_dice), path, title="run")

    defined, undefined = drawn(draw(0.5), tmp_path / "defined"), drawn(draw(None), tmp_path / "undefined")
    assert (defined != undefined).any()


@pytest.mark.parametrize("undefined", [None, float("nan"), float("inf")])
def test_undefined_values_leave_gaps(undefined: float | None, tmp_path: Path) -> None:
    color = class_colors(4, 3)[0]

    def draw(epochs: range) -> Callable[[Path], None]:
        history = make_history(60)
        for epoch in epochs:
            history[epoch - 1] |= {"dice_per_class": [undefined, 0.6, 0.9, 0.99]}
            history[epoch - 1] |= dict.fromkeys(("val_loss", "mean_dice", "lesion_dice", "lr"), undefined)
        draw_learning_curves(history, tmp_path / "curves.png", title="run")
        return lambda path: draw_dice_per_class(history, NAMES, path, title="run", background_class=3)

    counts = [
        near(drawn(draw(epochs), tmp_path / str(len(epochs))), color).sum()
        for epochs in (range(0), range(20, 40), range(1, 61))
    ]
    legend = counts[2]
    assert 0 < legend < 0.1 * counts[0]
    # 19 of 59 segments lie between undefined epochs, and 2 beside them.
    assert (counts[1] - legend) / (counts[0] - legend) == pytest.approx(38 / 59, abs=0.05)


def test_a_value_between_two_gaps_is_visible(tmp_path: Path) -> None:
    history = make_history(60, dice_per_class=[None] * 4)
    empty = drawn(lambda path: draw_dice_per_class(history, NAMES, path, title="run"), tmp_path / "empty")
    history[30]["dice_per_class"] = [0.5, None, None, None]
    lonely = drawn(lambda path: draw_dice_per_class(history, NAMES, path, title="run"), tmp_path / "lonely")
    color = class_colors(4, None)[0]
    assert near(lonely, color).sum() > near(empty, color).sum() + 10


def test_the_best_epoch_is_marked_where_mean_dice_is_highest(tmp_path: Path) -> None:
    def draw(best: int) -> Callable[[Path], None]:
        history = make_history(60, mean_dice=0.5)
        history[best - 1]["mean_dice"] = 0.5001  # moves the curve by less than a pixel
        return lambda path: draw_learning_curves(history, path, title="run")

    early, late = drawn(draw(11), tmp_path / "early"), drawn(draw(51), tmp_path / "late")
    columns = np.flatnonzero((early != late).any(axis=2)[-250:].any(axis=0))  # the learning rate: only the line differs
    left, right = (MARGIN + 0.5) * DPI, (WIDTH - MARGIN) * DPI
    epochs = 1 + (columns - left) / (right - left) * 59
    assert {round(epoch / 10) for epoch in epochs} == {1, 5}


@pytest.mark.parametrize("num_classes", [1, 2, 4, 12])
def test_confusion_is_drawn_for_any_number_of_classes(num_classes: int, tmp_path: Path) -> None:
    confusion = np.full((num_classes, num_classes), 10**9, dtype=np.int64)
    names = [f"class {index}" for index in range(num_classes)]
    picture = drawn(lambda path: draw_confusion_matrix(confusion, names, path, title="run"), tmp_path / "confusion")
    assert margins_are_blank(picture)


def test_a_confusion_row_without_pixels_is_drawn_as_no_share(tmp_path: Path) -> None:
    confusion = np.diag([100, 0, 100, 100]).astype(np.int64)
    full = np.diag([100, 100, 100, 100]).astype(np.int64)
    with np.errstate(all="raise"):
        empty_row = drawn(lambda path: draw_confusion_matrix(confusion, NAMES, path, title="run"), tmp_path / "empty")
    full_row = drawn(lambda path: draw_confusion_matrix(full, NAMES, path, title="run"), tmp_path / "full")
    dark = [int((picture[..., 0] < 0.1).sum()) for picture in (empty_row, full_row)]
    assert dark[0] == pytest.approx(dark[1] * 3 / 4, rel=0.1)


def make_slices(num_slices: int, lesion: int) -> tuple[Any, Any]:
    """Returns (K, 96, 96) images in HU, and class indices with a square of class `lesion` in the lung."""
    rows = np.linspace(-1200, 300, 96)
    images = np.broadcast_to(rows[None, :, None], (num_slices, 96, 96)).astype(np.float32).copy()
    labels = np.full((num_slices, 96, 96), 3, dtype=np.int64)
    labels[:, 8:88, 8:88] = 2
    labels[:, 24:48, 60:72] = lesion
    return images, labels


def draw_slices(num_slices: int, target: int, pred: int, path: Path, **replaced: Any) -> None:
    images, targets = make_slices(num_slices, target)
    arguments: dict[str, Any] = {
        "images": images,
        "targets": targets,
        "preds": make_slices(num_slices, pred)[1],
        "captions": [f"slice {index} · lesion Dice 0.41" for index in range(num_slices)],
        "class_names": NAMES,
        "background_class": 3,
        "hu_window": (-1500.0, 500.0),
        "title": "run",
    }
    draw_panels(path=path, **arguments | replaced)


@pytest.mark.parametrize("num_slices", [1, 3, 8])
def test_panels_are_drawn_for_any_number_of_slices(num_slices: int, tmp_path: Path) -> None:
    picture = drawn(lambda path: draw_slices(num_slices, 0, 1, path), tmp_path / "panels")
    assert picture.shape[1] == WIDTH * DPI
    assert margins_are_blank(picture)


def test_a_lesion_is_coloured_only_where_it_is(tmp_path: Path) -> None:
    without = drawn(lambda path: draw_slices(1, 2, 2, path), tmp_path / "without")
    side = (WIDTH - 2 * MARGIN - 2 * GAP) / 3 * DPI
    truth_left, pred_left = ((MARGIN + column * (side / DPI + GAP)) * DPI for column in (1, 2))
    for lefts, target, pred in (([truth_left], 0, 2), ([pred_left], 2, 0), ([truth_left, pred_left], 0, 0)):
        picture = drawn(
            lambda path, target=target, pred=pred: draw_slices(1, target, pred, path),  # type: ignore[misc]
            tmp_path / f"{target} {pred}",
        )
        differs = (picture != without).any(axis=2)
        expected = np.zeros(differs.shape[1], dtype=bool)
        for left in lefts:
            expected[round(left + 60 / 96 * side) : round(left + 72 / 96 * side)] = True
        columns = differs.any(axis=0)
        assert columns[expected].all()
        # 3 pixels of outline and interpolation around the square of 46 × 92 pixels
        assert not columns[~np.convolve(expected, np.ones(7), "same").astype(bool)].any()
        heights = np.flatnonzero(differs.any(axis=1))
        assert np.ptp(heights) == pytest.approx(24 / 96 * side, abs=6)


def test_a_class_may_fill_the_whole_slice(tmp_path: Path) -> None:
    everywhere = np.zeros((1, 96, 96), dtype=np.uint8)
    drawn(lambda path: draw_slices(1, 0, 0, path, targets=everywhere, preds=everywhere), tmp_path / "panels")


def test_the_first_panel_shows_the_window_in_grey(tmp_path: Path) -> None:
    images, _ = make_slices(1, 0)
    images[:] = -500.0
    images[:, :48] = np.nan
    picture = drawn(lambda path: draw_slices(1, 0, 0, path, images=images), tmp_path / "panels")
    column = picture[:, round((MARGIN + 1) * DPI)]
    assert (column == column[:, :1]).all(axis=1).sum() > 360
    assert (np.abs(column - 0.5).max(axis=1) < 0.01).sum() == pytest.approx(184, abs=4)  # -500 HU is its middle
    assert (column.max(axis=1) < 0.01).sum() == pytest.approx(184, abs=4)


def test_panels_keep_the_shape_of_a_slice(tmp_path: Path) -> None:
    images, labels = make_slices(1, 0)
    cut = {"images": images[:, :48], "targets": labels[:, :48], "preds": labels[:, :48]}
    tall = drawn(lambda path: draw_slices(1, 0, 0, path), tmp_path / "tall")
    flat = drawn(lambda path: draw_slices(1, 0, 0, path, **cut), tmp_path / "flat")
    assert tall.shape[0] - flat.shape[0] == pytest.approx(184, abs=2)


def test_odd_names_and_long_titles_are_drawn_whole(tmp_path: Path) -> None:
    history, confusion = make_history(3), np.full((4, 4), 7, dtype=np.int64)
    draws: list[Callable[[Path], None]] = [
        lambda path: draw_learning_curves(history, path, title=LONG_TITLE),
        lambda path: draw_dice_per_class(history, ODD_NAMES, path, title=LONG_TITLE),
        lambda path: draw_confusion_matrix(confusion, ODD_NAMES, path, title=LONG_TITLE),
        lambda path: draw_slices(
            2, 0, 1, path, class_names=ODD_NAMES, title=LONG_TITLE, captions=[r"$\glass$", LONG_TITLE]
        ),
    ]
    for number, draw in enumerate(draws):
        assert margins_are_blank(drawn(draw, tmp_path / str(number)))


def test_threads_draw_what_one_thread_draws(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(8)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda path: draw_learning_curves(make_history(9), path, title="run"), paths))
    draw_learning_curves(make_history(9), tmp_path / "alone.png", title="run")
    assert {path.read_bytes() for path in paths} == {(tmp_path / "alone.png").read_bytes()}


def test_ten_class_colors_differ_under_deuteranopia() -> None:
    for num_classes in range(2, 11):
        colors = class_colors(num_classes, num_classes - 1)
        assert nearest_pair(colors, np.eye(3)) > 25
        assert nearest_pair(colors, DEUTERANOPIA) > 17


def test_the_background_s_place_does_not_change_the_other_colors() -> None:
    others = class_colors(3, None)
    assert [class_colors(4, place)[:place] + class_colors(4, place)[place + 1 :] for place in range(4)] == [others] * 4


def test_the_recipe_s_class_colors_differ_in_grey() -> None:
    colors = class_colors(4, 3)
    assert nearest_pair(colors, DEUTERANOPIA) > 30
    lightness = sorted(float(to_lab(color, np.eye(3))[0]) for color in colors)
    assert min(np.diff(lightness)) > 10


@pytest.mark.parametrize("num_classes", [1, 4, 10, 40])
def test_every_class_has_its_own_color_and_background_is_grey(num_classes: int) -> None:
    colors = class_colors(num_classes, 0)
    assert len(set(colors)) == num_classes
    assert len(set(to_rgb(colors[0]))) == 1


def test_letters_that_no_font_or_encoding_has_are_drawn_without_a_warning(tmp_path: Path) -> None:
    names = ["\u8089\u82bd", "M\udcfcller", "lungs other", "background"]
    draw_confusion_matrix(np.eye(4, dtype=np.int64), names, tmp_path / "a.png", title="\u80ba \udcff")
    assert imread(tmp_path / "a.png").ndim == 3
