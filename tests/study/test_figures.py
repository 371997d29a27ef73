"""Pictures of a study: drawn for every space and every stage, and not spoilt by what failed."""

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from matplotlib import pyplot
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from matchai.drawing.figures import PALETTE, TRAIN_COLOR, VAL_COLOR
from matchai.study.figures import DPI, WIDTH, draw_study
from tests.studies import make_free_trial, make_study, make_trial

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.timeout(60)]
ALL = {"history", "learning_curves", "slices", "parallel_coordinates", "importance"}
Pixels = npt.NDArray[np.float32]


def make_trials(num_trials: int) -> list[FrozenTrial]:
    return [make_trial(number, 0.8 + 0.01 * math.sin(number)) for number in range(num_trials)]


def draw(folder: Path, *trials: FrozenTrial, direction: str = "maximize") -> dict[str, Pixels]:
    """Draws into an empty folder, sees that only the PNGs are left there, and returns them, (H, W, 3) from 0 to 1."""
    paths = draw_study(folder, make_study(*trials, direction=direction), "mean_dice")
    assert {path.name for path in folder.iterdir()} == {f"{name}.png" for name in paths}
    pictures = {name: imread(path)[..., :3] for name, path in paths.items()}
    for picture in pictures.values():
        assert picture.shape[1] == WIDTH * DPI
        assert (picture[:, :5] == 1).all()  # a text that is cut off would reach the edge
        assert (picture[:, -5:] == 1).all()
    return pictures


def near(picture: Pixels, color: str) -> npt.NDArray[np.bool_]:
    return np.asarray(np.abs(picture - np.array(to_rgb(color))).max(axis=2) < 0.02)


@pytest.mark.parametrize(
    ("num_trials", "names"),
    [
        (0, set()),
        (1, {"history", "learning_curves", "slices"}),
        (2, ALL - {"importance"}),
        (12, ALL),
    ],
)
def test_what_can_be_drawn_grows_with_the_trials(num_trials: int, names: set[str], tmp_path: Path) -> None:
    assert set(draw(tmp_path, *make_trials(num_trials))) == names


def test_a_study_that_only_runs_or_failed_is_drawn(tmp_path: Path) -> None:
    trials = [
        make_trial(0, None, TrialState.RUNNING),
        make_trial(1, None, TrialState.FAIL),
        make_trial(2, 0.0, reason="non-finite loss"),
        make_trial(3, math.inf),
    ]
    assert set(draw(tmp_path, *trials)) == {"history", "learning_curves"}


def test_a_minimised_objective_is_drawn(tmp_path: Path) -> None:
    trials = [*make_trials(12), make_trial(12, math.inf), make_trial(13, 0.0, reason="a")]
    assert set(draw(tmp_path, *trials, direction="minimize")) == ALL


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_the_best_stands_on_the_good_side(direction: str, tmp_path: Path) -> None:
    pictures = draw(tmp_path, *make_trials(4), direction=direction)
    upper, lower = np.array_split(near(pictures["history"], VAL_COLOR)[: 2 * DPI], 2)
    assert (upper.sum() > lower.sum()) == (direction == "maximize")


def test_the_value_of_a_failed_trial_does_not_move_the_axes(tmp_path: Path) -> None:
    zero, far = (
        draw(tmp_path / str(value), *make_trials(3), make_trial(3, value, reason="a")) for value in (0.0, -1000.0)
    )
    for name in ("history", "slices", "parallel_coordinates"):
        assert (zero[name] == far[name]).all(), name


def test_a_failed_trial_stands_at_the_bad_edge(tmp_path: Path) -> None:
    heights = []
    for direction in ("maximize", "minimize"):
        trials = [*make_trials(3), make_trial(3, 0.0, reason="a")]
        history = draw(tmp_path / direction, *trials, direction=direction)["history"]
        right = near(history, PALETTE[7])[:, -round(0.5 * DPI) :]  # the last trial's mark; the legend is further left
        heights.append(float(np.flatnonzero(right.any(axis=1)).mean()))
    assert heights[0] > heights[1] + DPI


def test_a_value_far_off_does_not_move_the_axes(tmp_path: Path) -> None:
    near_by, far = (draw(tmp_path / str(value), *make_trials(12), make_trial(12, value)) for value in (0.3, 0.1))
    for name in ("history", "slices"):
        assert (near_by[name] == far[name]).all(), name


def test_a_good_value_is_never_off_the_scale(tmp_path: Path) -> None:
    pictures = draw(tmp_path, *make_trials(4), make_trial(12, 5.0))
    stars = near(pictures["history"], VAL_COLOR)[:, -round(0.5 * DPI) :]
    assert stars.sum() > 200


def test_the_recipe_is_marked(tmp_path: Path) -> None:
    with_it = draw(tmp_path / "with", *make_trials(4))
    without = draw(tmp_path / "without", *(make_trial(number, 0.8 + number / 1000) for number in range(1, 5)))
    for name in ("history", "learning_curves", "slices", "parallel_coordinates"):
        assert near(with_it[name], TRAIN_COLOR).sum() > near(without[name], TRAIN_COLOR).sum() + 100, name


def test_pruned_trials_are_told_from_complete_ones(tmp_path: Path) -> None:
    trials = make_trials(4)
    complete = draw(tmp_path / "complete", *trials, make_trial(12, 0.79))
    pruned = draw(tmp_path / "pruned", *trials, make_trial(12, 0.79, TrialState.PRUNED))
    for name in ("history", "learning_curves", "slices"):
        assert complete[name].shape != pruned[name].shape or (complete[name] != pruned[name]).any(), name


SPACES: list[tuple[dict[str, BaseDistribution], list[dict[str, Any]]]] = [
    ({"one": FloatDistribution(0, 1)}, [{"one": number / 12} for number in range(12)]),
    ({"fixed": FloatDistribution(2, 2)}, [{"fixed": 2.0}] * 12),
    ({"steps": IntDistribution(1, 1024, log=True)}, [{"steps": 2 ** (number % 11)} for number in range(12)]),
    ({"narrow": FloatDistribution(3e-4, 4e-4, log=True)}, [{"narrow": 3e-4 + number * 8e-6} for number in range(12)]),
    (
        {
            r"$\odd$ <name> " + "x" * 60: IntDistribution(0, 10, step=5),
            "names": CategoricalDistribution([r"$\glass$", "a long name " * 9, "x" * 50, "", None]),
            "flags": CategoricalDistribution([True, False]),
        },
        [
            {
                r"$\odd$ <name> " + "x" * 60: 5 * (number % 3),
                "names": [r"$\glass$", "a long name " * 9, "x" * 50, "", None][number % 5],
                "flags": bool(number % 2),
            }
            for number in range(12)
        ],
    ),
]


@pytest.mark.parametrize(("space", "rows"), SPACES, ids=["one", "fixed", "whole numbers", "narrow", "odd names"])
def test_every_space_is_drawn(space: dict[str, BaseDistribution], rows: list[dict[str, Any]], tmp_path: Path) -> None:
    trials = [make_free_trial(0.8 + number / 100, params, space) for number, params in enumerate(rows)]
    assert set(draw(tmp_path, *trials)) >= {"history", "slices", "parallel_coordinates"}


def test_a_single_setting_leaves_the_other_half_blank(tmp_path: Path) -> None:
    trials = [make_free_trial(0.8 + number / 100, {"one": number / 12}, SPACES[0][0]) for number in range(12)]
    slices = draw(tmp_path, *trials)["slices"]
    assert (slices[round(0.4 * DPI) : round(1.8 * DPI), round((WIDTH / 2 + 0.3) * DPI) :] == 1).all()


def test_choices_that_are_lists_are_drawn(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna's, of choices that are lists
        space: dict[str, BaseDistribution] = {
            "classes": CategoricalDistribution([["a"], ["a", "b"]]),  # type: ignore[list-item]
            "other": FloatDistribution(0, 1),
        }
    rows = [{"classes": [["a"], ["a", "b"]][number % 2], "other": number / 12} for number in range(12)]
    trials = [make_free_trial(0.8 + number / 100, params, space) for number, params in enumerate(rows)]
    assert set(draw(tmp_path, *trials)) == ALL - {"learning_curves"}


def test_a_gap_in_a_curve_does_not_hinder_it(tmp_path: Path) -> None:
    trial = make_trial(0, 0.8)
    trial.intermediate_values = {1: math.nan, 2: math.inf, 3: 0.5}
    assert "learning_curves" in draw(tmp_path, trial)


def test_the_same_study_makes_the_same_pictures(tmp_path: Path) -> None:
    one, other = (draw(tmp_path / name, *make_trials(12)) for name in ("one", "other"))
    assert all((one[name] == other[name]).all() for name in ALL)


def test_drawing_touches_no_global_state(tmp_path: Path) -> None:
    before = dict(pyplot.rcParams)
    draw(tmp_path, *make_trials(2))
    assert pyplot.get_fignums() == []
    assert dict(pyplot.rcParams) == before
