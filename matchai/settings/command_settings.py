"""The settings of the commands that use a run: what is predicted, evaluated, exported, reported."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from matchai.system.errors import InputError


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

    @property
    def folder(self) -> Path:
        """Folder of the results."""
        return self.output or self.runs[0] / "evaluation"

    def of_the_data(self) -> dict[str, Any]:
        """The settings of the data that were given, by name; the others are those of the first run."""
        names = ("sets", "images_name", "masks_name", "groups_name", "orientation", "rescale", "label_map")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def check(self) -> None:
        """Refuses what no evaluation could take.

        Raises:
            InputError: With every problem found.
        """
        problems = []
        if not self.runs:
            problems.append("No run is given: python -m matchai.evaluate RUN --data DIR.")
        if not (math.isfinite(self.surface_tolerance) and self.surface_tolerance >= 0):
            problems.append(f"surface_tolerance is {self.surface_tolerance}, but must be 0 or more, in mm or pixels.")
        if self.batch_size is not None and self.batch_size < 1:
            problems.append(f"batch_size is {self.batch_size}, but must be at least 1.")
        if problems:
            raise InputError(*problems)


@dataclass(frozen=True)
class ExportSettings:
    """What is exported, and where to."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run."""
    format: Literal["onnx", "safetensors"] = "onnx"
    """onnx: the network itself, for onnxruntime and others. safetensors: its weights, for plain
    segmentation-models-pytorch."""
    output: Path | None = None
    """The file (default: export/model.onnx or export/model.safetensors in the run's folder); one that is there is
    never overwritten."""


@dataclass(frozen=True)
class ReportSettings:
    """What is reported, and where to."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder."""
    output: Path | None = None
    """Another file for the page; the model card then goes beside it. A file that is there is not overwritten."""


@dataclass(frozen=True)
class PhantomSettings:
    """What is written, and where to."""

    output: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder to write to."""
    slices: int = 128
    """How many slices, 8 a volume; at least 2."""
    size: int = 512
    """Pixels a side; at least 32."""
    seed: int = 0
    """Seed of all random draws; 0 or more."""
