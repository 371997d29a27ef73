"""The settings of the commands that use a run: what is predicted, evaluated, exported, reported."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from matchai.system import InputError


@dataclass(frozen=True)
class PredictSettings:
    """What to predict, and what to write."""

    paths: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RUN... INPUT...", help_behavior_hint="(required)"),
    ]
    """One or more runs, then one or more inputs."""
    output: Path = Path("predictions")
    """Folder for the results. It must be new or empty."""
    probabilities: bool = False
    """Also write the probability map of each class."""
    tta: bool = False
    """Also predict each slice mirrored left to right, and average both."""
    uncertainty: bool = False
    """Also write the entropy of the averaged probabilities, 0 to 1 (implies --tta). It flags regions for review; it
    does not estimate the error."""
    submission: Path | None = None
    """Also write the CSV file of the Kaggle competition, for one .npy input of 512 x 512 slices."""
    rescale: tuple[float, float] | None = None
    """Slope and intercept that convert the numbers of the inputs to HU (default: those of the run's data for arrays and
    pictures, none for NIfTI and DICOM)."""
    orientation: Literal["LP", "LA", "RP", "RA", "PL", "PR", "AL", "AR"] | None = None
    """The sides of the patient that the rows and columns of arrays and pictures run toward: L left, R right, A front, P
    back (default: as in the run's data for arrays; PL, upright, for pictures). NIfTI and DICOM files store their
    own."""
    nifti_affine: Literal["auto", "sform", "qform"] = "auto"
    """The affine of a NIfTI header that places its voxels. auto: the sform if there is one; a file whose sform and
    pixdim disagree on the spacing is refused. qform: the qform, with the spacing of pixdim."""
    series: str | None = None
    """Number of the series to use if a DICOM folder holds several."""
    batch_size: int | None = None
    """Slices per forward pass (default: 8 on a CPU, 16 on a GPU)."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Precision of the forward pass; no is fp32. auto: bf16 or fp16 where the device computes it natively."""


@dataclass(frozen=True)
class EvaluateSettings:
    """What to evaluate, and on which slices."""

    runs: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...", help_behavior_hint="(required)")
    ]
    """Folders of one or more runs."""
    data: Path | None = None
    """Folder of the images and masks, in any layout that training reads (default: the data of the run)."""
    output: Path | None = None
    """Folder for the results (default: RUN/evaluation). An evaluation that is already there is replaced."""
    slices: Literal["auto", "val", "train", "all"] = "auto"
    """Which slices to use. auto: the validation slices of the run's own data, all slices of other data."""
    tta: bool = False
    """Also predict each slice mirrored left to right, and average both."""
    surface: Literal["auto", "yes", "no"] = "auto"
    """Measure surface distances: in mm where volumes have a spacing, else in pixels within each slice. auto: if MONAI
    is installed."""
    surface_tolerance: float = 2.0
    """Largest distance at which the normalised surface Dice counts a piece of surface as correct, in mm or pixels."""
    sets: tuple[str, ...] | None = None
    """The sets of arrays to use (default: as in the run)."""
    images_name: str | None = None
    """File with the images of a set (default: as in the run)."""
    masks_name: str | None = None
    """File with the masks of a set (default: as in the run)."""
    groups_name: str | None = None
    """File with the patient or volume of each slice (default: as in the run)."""
    orientation: Literal["auto", "LP", "LA", "RP", "RA", "PL", "PR", "AL", "AR"] | None = None
    """The sides of the patient that the rows and columns of arrays and pictures run toward: L left, R right, A front, P
    back (default: as in the run, or as training's auto if the run's files are of another kind)."""
    nifti_affine: Literal["auto", "sform", "qform"] | None = None
    """The affine of a NIfTI header that places its voxels: see matchai.train (default: as in the run)."""
    rescale: tuple[float, float] | None = None
    """Slope and intercept that convert the numbers in the files to HU (default: as in the run, or 1 and 0 if the run's
    files are of another kind)."""
    label_map: tuple[str, ...] | None = None
    """The class of each number in the mask files, as NUMBER:CLASS (default: as in the run, or none if the run's files
    are of another kind)."""
    batch_size: int | None = None
    """Slices per forward pass (default: 8 on a CPU, 16 on a GPU)."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Precision of the forward pass; no is fp32. auto: bf16 or fp16 where the device computes it natively."""

    @property
    def folder(self) -> Path:
        """Folder of the results."""
        return self.output or self.runs[0] / "evaluation"

    def of_the_data(self) -> dict[str, Any]:
        """The settings of the data that were given, by name; the others are those of the first run."""
        files = ("sets", "images_name", "masks_name", "groups_name")
        names = (*files, "orientation", "nifti_affine", "rescale", "label_map")
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
    """What to export, and where to."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run, or its best.safetensors."""
    format: Literal["onnx", "safetensors"] = "onnx"
    """onnx: the network itself, for onnxruntime and other programs. safetensors: its weights, for plain
    segmentation-models-pytorch."""
    output: Path | None = None
    """The file to write (default: export/model.onnx or export/model.safetensors in the run's folder). An existing file
    is never overwritten."""


@dataclass(frozen=True)
class ReportSettings:
    """What to report, and where to."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""
    output: Path | None = None
    """Another file for the page (default: report.html in the run's folder). The model card goes beside it. A file given
    here must not exist yet."""


@dataclass(frozen=True)
class PhantomSettings:
    """What to write, and where to."""

    output: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder to write to."""
    slices: int = 128
    """Number of slices, 8 per volume; at least 2."""
    size: int = 512
    """Height and width of the slices, in pixels; at least 32."""
    seed: int = 0
    """Seed for everything random; 0 or more."""
