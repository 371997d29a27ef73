"""`python -m matchai.predict RUN INPUT... --output DIR`: predicts what people have with what runs kept."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from matchai.system.errors import InputError
from matchai.system.thread_waits import choose_waiting, refuse_launch

DESCRIPTION = (
    "Predicts lesions in CT slices with the network that a run kept. RUN is the folder of a run, or its "
    "best.safetensors; several runs, such as folds, predict together by the mean of their probabilities. INPUT is a "
    ".npy array, a NIfTI file, a folder with a DICOM series, or a folder of 16-bit PNG or TIFF slices; several may be "
    "given. For research only: no prediction may guide the care of a patient."
)


@dataclass(frozen=True)
class PredictSettings:
    """What is predicted, and what is written."""

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN... INPUT...")]
    """Runs, then inputs."""
    output: Path = Path("predictions")
    """Folder of the results; it must be new or empty."""
    probabilities: bool = False
    """Also write a map of every class's probability."""
    tta: bool = False
    """Predict each slice mirrored left to right, too, and take the mean."""
    uncertainty: bool = False
    """Also write the entropy of the mean over the passes (implies --tta): a flag for review, no estimate of the
    error."""
    submission: Path | None = None
    """Also write the CSV of the Kaggle competition, of one .npy input of 512 x 512 slices."""
    rescale: tuple[float, float] | None = None
    """Slope and intercept that make HU of the inputs' numbers (default: those of the run's data for arrays and
    pictures, none for NIfTI and DICOM)."""
    orientation: Literal["LP", "LA", "RP", "RA", "PL", "PR", "AL", "AR"] | None = None
    """Toward which sides of the patient the rows and columns of arrays and pictures run (default: arrays as in the
    run's data, pictures upright, PL). NIfTI and DICOM know theirs."""
    series: str | None = None
    """Number of the series to take where a DICOM folder holds several."""
    batch_size: int | None = None
    """Slices of one forward pass (default: 8 on a CPU, 16 on a GPU)."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Precision of the forward pass; auto: bf16 or fp16 where the device computes it natively."""


def main(argv: list[str] | None = None, prog: str = "python -m matchai.predict") -> int:
    """Predicts as the command line says; returns the exit status: 0, 1 no memory, 2 the user's mistake, 130 Ctrl-C."""
    try:
        settings = tyro.cli(PredictSettings, args=argv, prog=prog, description=DESCRIPTION)
        output = _at_home(settings.output)
        refuse_launch(prog)
        choose_waiting()
        # seconds of imports that --help does not need
        from matchai.prediction.pipeline import predict  # noqa: PLC0415
        from matchai.system.machine import is_out_of_memory  # noqa: PLC0415

        try:
            problems = predict(
                [_at_home(path) for path in settings.paths],
                output,
                with_probabilities=settings.probabilities,
                is_mirrored=settings.tta or settings.uncertainty,
                with_uncertainty=settings.uncertainty,
                submission=_at_home(settings.submission) if settings.submission else None,
                rescale=settings.rescale,
                orientation=settings.orientation,
                series=settings.series,
                batch_size=settings.batch_size,
                mixed_precision=settings.mixed_precision,
            )
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            print("error: A batch needs more memory than there is; give a smaller --batch-size.", file=sys.stderr)
            return 1
    except InputError as error:
        problems = list(error.problems)
    except OSError as error:
        where = error.filename or output
        print(f"error: {where} cannot be read or written ({error.strerror or error}). {_left(output)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"Stopped by Ctrl-C. {_left(output)}", file=sys.stderr)
        return 130
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 2 if problems else 0


def _at_home(path: Path) -> Path:
    """The path, a leading `~` replaced, which shells leave in words such as --output=~/here."""
    return path.expanduser() if path.parts[:1] == ("~",) else path


def _left(output: Path) -> str:
    """What stands there after a prediction that came to no end."""
    return (
        f"What was done so far is in {output}, each file whole, without a summary; to predict anew, delete "
        "that folder or name another with --output."
    )


if __name__ == "__main__":
    sys.exit(main())
