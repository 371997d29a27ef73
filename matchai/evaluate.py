"""`python -m matchai.evaluate RUN --data DIR`: judges what a run predicts by masks that people drew."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from matchai.system.errors import InputError
from matchai.system.thread_waits import choose_waiting, refuse_launch

DESCRIPTION = (
    "Judges what a run predicts by masks: Dice, IoU, precision and recall of each class and of any lesion, pooled over "
    "pixels and as means over images, surface distances, and the error of the affected share of the lung, with "
    "bootstrap intervals over groups. Of the run's own data only its validation slices are taken. Several runs predict "
    "together by the mean of their probabilities."
)


@dataclass(frozen=True)
class EvaluateSettings:
    """What is judged, and by which slices."""

    runs: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...", help_behavior_hint="(required)")
    ]
    """Folders of runs."""
    data: Path | None = None
    """Folder of the images and masks, in any layout that training reads (default: the run's own)."""
    output: Path | None = None
    """Folder of the results (default: RUN/evaluation); an evaluation that stands there is replaced."""
    slices: Literal["auto", "val", "train", "all"] = "auto"
    """Which slices. auto: the validation slices of the run's own data, all of other data."""
    tta: bool = False
    """Predict each slice mirrored left to right, too, and take the mean."""
    surface: Literal["auto", "yes", "no"] = "auto"
    """Surface distances, in mm where volumes have a spacing, else in pixels of each slice. auto: where MONAI is
    installed."""
    surface_tolerance: float = 2.0
    """Up to which distance the normalised surface Dice counts a piece of border as right, in mm or pixels."""
    sets: tuple[str, ...] | None = None
    """The sets of arrays to use (this and those to --label-map, default: as in the run's settings)."""
    images_name: str | None = None
    """File of a set's images."""
    masks_name: str | None = None
    """File of a set's masks."""
    groups_name: str | None = None
    """File that names each slice's patient or volume."""
    orientation: Literal["auto", "LP", "LA", "RP", "RA", "PL", "PR", "AL", "AR"] | None = None
    """Toward which sides of the patient the rows and columns of arrays and pictures run (this and both below: of data
    of another kind of files than the run's, nothing is taken from its settings)."""
    rescale: tuple[float, float] | None = None
    """Slope and intercept that make HU of the files' numbers."""
    label_map: tuple[str, ...] | None = None
    """Which class a number in mask files means, as NUMBER:CLASS."""
    batch_size: int | None = None
    """Slices of one forward pass (default: 8 on a CPU, 16 on a GPU)."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Precision of the forward pass; auto: bf16 or fp16 where the device computes it natively."""


OF_THE_DATA = ("sets", "images_name", "masks_name", "groups_name", "orientation", "rescale", "label_map")


def main(argv: list[str] | None = None, prog: str = "python -m matchai.evaluate") -> int:
    """Evaluates as the command line says; returns the exit status: 0, 1 no memory, 2 the user's mistake, 130 Ctrl-C."""
    try:
        settings = tyro.cli(EvaluateSettings, args=argv, prog=prog, description=DESCRIPTION)
        refuse_launch(prog)
        _check(settings)
        choose_waiting()
        # seconds of imports that --help does not need
        from matchai.metrics.surface_distance import can_measure  # noqa: PLC0415
        from matchai.prediction.evaluation import evaluate  # noqa: PLC0415
        from matchai.system.console import Display, show_evaluation  # noqa: PLC0415
        from matchai.system.machine import is_out_of_memory  # noqa: PLC0415
        from matchai.system.optional_packages import need  # noqa: PLC0415

        display = Display(is_main_process=True)
        if settings.surface == "yes":
            need("monai.metrics", "evaluate", "Measuring surface distances")
        elif settings.surface == "auto" and not can_measure():
            display.say('surface distances are left out, as they need MONAI: `pip install "matchai[evaluate]"`')
        measures = settings.surface == "yes" or (settings.surface == "auto" and can_measure())
        try:
            result = evaluate(
                settings.runs,
                settings.data,
                settings.output,
                wanted=settings.slices,
                is_mirrored=settings.tta,
                tolerance=settings.surface_tolerance if measures else None,
                settings={n: getattr(settings, n) for n in OF_THE_DATA if getattr(settings, n) is not None},
                batch_size=settings.batch_size,
                mixed_precision=settings.mixed_precision,
                display=display,
            )
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            print("error: A batch needs more memory than there is; give a smaller --batch-size.", file=sys.stderr)
            return 1
        finally:
            display.close()
    except InputError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped by Ctrl-C; nothing was written.", file=sys.stderr)
        return 130
    show_evaluation(result, display)
    display.say(f"All figures: {settings.output or settings.runs[0] / 'evaluation'}")
    return 0


def _check(settings: EvaluateSettings) -> None:
    problems = []
    if not settings.runs:
        problems.append("No run is given: python -m matchai.evaluate RUN --data DIR.")
    if not (math.isfinite(settings.surface_tolerance) and settings.surface_tolerance >= 0):
        problems.append(f"surface_tolerance is {settings.surface_tolerance}, but must be 0 or more, in mm or pixels.")
    if settings.batch_size is not None and settings.batch_size < 1:
        problems.append(f"batch_size is {settings.batch_size}, but must be at least 1.")
    if problems:
        raise InputError(*problems)


if __name__ == "__main__":
    sys.exit(main())
