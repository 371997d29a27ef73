"""Every setting once: a frozen dataclass tree with one name for field, flag, YAML key and study parameter.

The recipe is the default of every setting. `matchai.settings.parsing` reads and writes them.
"""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from matchai.settings.names import nearest
from matchai.system import InputError


def _number(default: Any, low: float = -math.inf, high: float = math.inf, *, above: float = -math.inf) -> Any:
    """A field whose value must satisfy low <= value <= high and value > above."""
    return field(default=default, metadata={"low": low, "high": high, "above": above})


@dataclass(frozen=True)
class RunSettings:
    """What to run, and where the results go."""

    preset: Literal["recipe", "quick", "study"] = "recipe"
    """The settings to start from: `recipe` (the full settings: EfficientNet-B3, 384 px, 60 epochs, ImageNet weights),
    `quick` (small, for a first look) or `study` (smaller still). Without it: `recipe` if --data is given, otherwise
    `quick`, or `study` for a study."""
    config: Path | None = None
    """A YAML file of settings, such as the config.yaml of another run. Flags override it."""
    output: Path | None = None
    """Folder of the run (default: runs/PRESET) or of the study (default: studies/NAME). Running the same command again
    resumes what is there."""
    restart: bool = False
    """Start the run over. The old run is moved aside, never deleted. Not available for a study."""
    init: Path | None = None
    """Start from the best weights of another run: its folder, or a best.safetensors file."""
    seed: int = _number(0, 0, 2**63 - 1)
    """Random seed of initial weights, split, sampling, augmentation and drop path."""
    deterministic: bool = False
    """Reproduce results bit for bit, at lower speed: on CPUs with any number of processes, on CUDA with the same number
    of processes."""


@dataclass(frozen=True)
class InputSettings:
    """The data: which files, which classes, which pixels."""

    data: Path | None = None
    """Folder of the slices: .npy arrays, or folders `images` and `masks` with NIfTI or picture files. Without it
    matchai trains on its built-in synthetic phantom."""
    sets: tuple[str, ...] = ()
    """The sets of arrays to use together (default: those of medseg and radiopedia that are there)."""
    images_name: str = "images_{set}.npy"
    """File with the images of a set: (N, H, W) or (N, H, W, 1), any integer or float type, in HU."""
    masks_name: str = "masks_{set}.npy"
    """File with the masks of a set: one-hot (N, H, W, C) of any type, or class indices (N, H, W)."""
    groups_name: str = "groups.npy"
    """File with the patient or volume of each slice: (N,), over all sets in order. For volumes it may have one entry
    per volume instead. Without this file each volume is a group, and other slices are grouped by similarity."""
    orientation: Literal["auto", "LP", "LA", "RP", "RA", "PL", "PR", "AL", "AR"] = "auto"
    """The sides of the patient that the rows and columns of a slice run toward: L left, R right, A front, P back. auto:
    LP for .npy arrays (as in the Kaggle set), PL for pictures (upright, as a viewer shows them). NIfTI files store
    their own orientation and are turned to LP."""
    nifti_affine: Literal["auto", "sform", "qform"] = "auto"
    """The affine of a NIfTI header that places its voxels. auto: the sform if there is one; a file whose sform and
    pixdim disagree on the spacing is refused. qform: the qform, with the spacing of pixdim."""
    rescale: tuple[float, float] = (1.0, 0.0)
    """Slope and intercept that convert the numbers in the files to HU: HU = slope * number + intercept."""
    label_map: tuple[str, ...] = ()
    """The class of each number in the mask files, as NUMBER:CLASS. Without it .npy arrays hold class indices; in NIfTI
    and picture files 0 is the background, and 1, 2, ... are the other classes in order."""
    class_names: tuple[str, ...] = ("ground glass", "consolidation", "lungs other", "background")
    """The classes, in the order of the channels."""
    background_class: str = "background"
    """The class of pixels that belong to no other class."""
    lesion_classes: tuple[str, ...] = ("ground glass", "consolidation")
    """The classes whose mean Dice is the lesion Dice."""
    hu_window: tuple[float, float] = (-1500.0, 500.0)
    """Lowest and highest value in HU; values outside are clipped."""
    image_size: int = _number(384, 32, 4096)
    """Height and width that slices are resized to, in pixels; a multiple of 32."""
    val_fraction: float = _number(0.2, above=0.0, high=0.9)
    """Share of the slices used for validation, above 0 and up to 0.9. Groups (patients or volumes) are never split."""
    folds: int = _number(0, 0, 1000)
    """Number of folds of a grouped K-fold split. 0: a single split."""
    fold: int = _number(0, 0, 999)
    """The fold used for validation, counted from 0."""
    cache: Path | None = None
    """Folder for the prepared slices (default: `cache` beside the run's folder)."""
    phantom_slices: int = _number(160, 8, 100_000)
    """Number of slices in the built-in phantom, used without --data."""

    @property
    def background_index(self) -> int:
        """The background's channel."""
        return self.class_names.index(self.background_class)

    @property
    def lesion_indices(self) -> list[int]:
        """The lesion classes' channels."""
        return [self.class_names.index(name) for name in self.lesion_classes]


@dataclass(frozen=True)
class AugmentationSettings:
    """Augmentation of the training slices, after the resize."""

    horizontal_flip: float = _number(0.5, 0, 1)
    """Probability of a horizontal flip, 0 to 1."""
    vertical_flip: float = _number(0.3, 0, 1)
    """Probability of a vertical flip, 0 to 1. In the Kaggle arrays, which are stored transposed, it swaps left and
    right."""
    rotate90: float = _number(0.3, 0, 1)
    """Probability of a rotation by a random multiple of 90 degrees, 0 to 1."""
    affine: float = _number(0.4, 0, 1)
    """Probability of a random affine transform, 0 to 1."""
    affine_scale: float = _number(0.05, 0, 0.9)
    """Zoom of the affine transform: a factor from 1 - this to 1 + this."""
    affine_rotate: float = _number(10.0, 0, 180)
    """Rotation of the affine transform: up to ± this, in degrees."""
    affine_shear: float = _number(5.0, 0, 60)
    """Shear of the affine transform: up to ± this, in degrees."""
    affine_translate: float = _number(0.03, 0, 0.9)
    """Shift of the affine transform: from 0 to this share of the image size."""
    brightness_contrast: float = _number(0.2, 0, 1)
    """Probability of a change of brightness and contrast, 0 to 1."""
    brightness_contrast_limit: float = _number(0.10, 0, 1)
    """Size of the change of brightness and contrast: up to ± this share of the HU window."""


@dataclass(frozen=True)
class SamplingSettings:
    """Which slices are drawn, and how many make a step."""

    batch_size: int = _number(6, 1, 65536)
    """Slices per optimiser step, over all processes and micro-batches."""
    accumulate: int = _number(1, 1, 65536)
    """Gradient accumulation: micro-batches per step. It saves memory, but batch norm sees smaller batches."""
    sampler_weight: float = _number(3.0, above=0.0)
    """Sampling weight of slices that show a target class; other slices have weight 1."""
    target_classes: tuple[str, ...] = ("consolidation",)
    """The classes whose slices are drawn more often."""


@dataclass(frozen=True)
class NetworkSettings:
    """The network, a UNet++."""

    encoder: str = "timm-efficientnet-b3"
    """Name of the encoder: any encoder of segmentation-models-pytorch."""
    context: int = _number(0, 0, 16)
    """Number of neighbouring slices on each side, in the same volume, used as further input channels."""
    encoder_weights: str = "imagenet"
    """Pretrained encoder weights: imagenet, none, or a local file (.safetensors or .pth)."""
    sync_batch_norm: bool = True
    """With several processes, compute batch norm statistics over the whole batch, as one process would."""


@dataclass(frozen=True)
class LossSettings:
    """The loss: ce_weight · cross-entropy + dice_weight · Dice + focal_weight · focal."""

    ce_weight: float = _number(0.25, 0)
    """Weight of the cross-entropy, which is itself weighted by class."""
    dice_weight: float = _number(0.5, 0)
    """Weight of the Dice loss."""
    focal_weight: float = _number(0.25, 0)
    """Weight of the focal loss."""
    focal_gamma: float = _number(2.5, 0, 100)
    """Exponent of the focal loss."""
    soft_boundary: int = _number(0, 0, 64)
    """Width of the band on each side of a border between classes where labels are softened in training, in pixels. 0:
    none."""


@dataclass(frozen=True)
class OptimisationSettings:
    """AdamW with a one-cycle schedule."""

    epochs: int = _number(60, 1, 1_000_000)
    """Number of epochs. Each draws as many slices as there are for training."""
    max_lr: float = _number(5e-4, above=0.0)
    """Peak learning rate of the one-cycle schedule, which starts at max_lr / 25."""
    weight_decay: float = _number(1e-4, 0)
    """Weight decay of AdamW."""
    clip_grad_norm: float = _number(0.0, 0)
    """Largest gradient norm; larger gradients are scaled down to it. 0: no clipping."""
    ema_decay: float = _number(0.0, 0, 0.999999)
    """Decay per step of an exponential moving average of the weights, below 1. If used, the averaged weights are
    validated and kept. 0: none."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Precision of the forward pass; no is fp32. auto: the launcher's choice, otherwise bf16 if the hardware supports
    it, otherwise fp16 on CUDA, otherwise no (float32)."""


@dataclass(frozen=True)
class MachineSettings:
    """What may differ between machines without changing the experiment."""

    num_workers: int | None = _number(None, 0, 1024)
    """DataLoader workers per process (default: by cores and device)."""
    save_every: str = "60s"
    """How often the resumable state is saved within an epoch: seconds (60s), minutes (5min) or steps (200)."""
    collective_timeout: float = _number(600.0, above=0.0)
    """How long processes wait for each other before the run is given up, in seconds."""
    tracker: tuple[str, ...] = ()
    """Accelerate's trackers to report to, such as tensorboard."""


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a training run, grouped; leaf names are unique, so flags and YAML keys are the bare leaf names.

    >>> TrainConfig().updated(epochs=3, max_lr=1e-3).optimisation.epochs
    3
    """

    run: RunSettings = RunSettings()
    input: InputSettings = InputSettings()
    augmentation: AugmentationSettings = AugmentationSettings()
    sampling: SamplingSettings = SamplingSettings()
    network: NetworkSettings = NetworkSettings()
    loss: LossSettings = LossSettings()
    optimisation: OptimisationSettings = OptimisationSettings()
    machine: MachineSettings = MachineSettings()

    def flat(self) -> dict[str, Any]:
        """Every setting under its one name."""
        return {name: getattr(getattr(self, group), name) for name, (group, _) in LEAVES.items()}

    def updated(self, **settings: Any) -> "TrainConfig":
        """A copy with some settings changed, each under its one name.

        Raises:
            InputError: For an unknown name (the nearest right one is told) or a value of the wrong type.
        """
        return self.updated_from(settings)

    def updated_from(self, settings: dict[str, Any], where: str = "") -> "TrainConfig":
        """As `updated`, from a mapping; `where` begins each sentence of an error, such as the name of a file."""
        problems, changes = [], {}
        for name, value in ungrouped(settings, where).items():
            if name not in LEAVES:
                near = nearest(str(name), LEAVES)
                hint = f"did you mean {near}?" if near else "python -m matchai.train --help-all lists all"
                problems.append(f"{where}Unknown setting {name!r}: {hint}")
                continue
            try:
                changes[name] = _convert(value, _TYPES[name])
            except (TypeError, ValueError, OverflowError):
                problems.append(f"{where}{name} is {value!r}, but must be {_describe(_TYPES[name])}.")
        if problems:
            raise InputError(*problems)
        groups = {
            group.name: dataclasses.replace(
                getattr(self, group.name), **{n: v for n, v in changes.items() if LEAVES[n][0] == group.name}
            )
            for group in dataclasses.fields(self)
        }
        return TrainConfig(**groups)


LEAVES: dict[str, tuple[str, dataclasses.Field[Any]]] = {
    leaf.name: (group.name, leaf)
    for group in dataclasses.fields(TrainConfig)
    for leaf in dataclasses.fields(typing.cast(Any, group.type))
}
"""Every setting: its one name, the group it stands in, its field."""


def ungrouped(settings: dict[str, Any], where: str = "") -> dict[str, Any]:
    """Settings under their flat names, of a mapping that may hold some in their groups: `optimisation: {epochs: 9}`.

    Raises:
        InputError: If a setting stands in a group that is not its own, or stands twice.
    """
    groups = {group.name for group in dataclasses.fields(TrainConfig)}
    flat, problems = {}, []
    for name, found in settings.items():
        value = {} if name in groups and found is None else found  # all its lines commented out
        is_group = name in groups and isinstance(value, dict)
        if name in groups and not is_group:
            problems.append(f"{where}{name} is a group of settings: write them below it, indented, or without a group.")
            continue
        for leaf, one in value.items() if is_group else [(name, value)]:
            if is_group and leaf in LEAVES and LEAVES[leaf][0] != name:
                problems.append(f"{where}{leaf} stands in {name}, but belongs in {LEAVES[leaf][0]} or in no group.")
            if leaf in flat:
                problems.append(f"{where}{leaf} is given twice; keep one.")
            flat[leaf] = one
    if problems:
        raise InputError(*problems)
    return flat


_TYPES: dict[str, Any] = {name: leaf.type for name, (_, leaf) in LEAVES.items()}

PLACE = ("config", "output", "restart")
"""Settings that say where a run goes, not what it is: not saved with it."""

COMMON = (
    *("preset", "config", "output", "restart", "init", "seed"),
    *("data", "label_map", "class_names", "lesion_classes", "hu_window", "image_size", "val_fraction", "folds", "fold"),
    *("batch_size", "accumulate", "sampler_weight", "target_classes", "encoder", "encoder_weights"),
    *("epochs", "max_lr", "mixed_precision", "num_workers"),
)
"""Settings of a run that --help shows; --help-all shows all."""

FREE = (*PLACE, "data", "cache", "num_workers", "save_every", "collective_timeout", "tracker", "preset")
"""Settings that may differ when a run is resumed; the content of the data may not."""

PRESETS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "quick": {
        "image_size": 128,
        "encoder": "resnet18",
        "encoder_weights": "none",
        "epochs": 12,
        "max_lr": 2e-3,
    },
    "study": {
        "image_size": 64,
        "encoder": "tu-test_resnet",
        "encoder_weights": "none",
        "epochs": 6,
        "max_lr": 2e-3,
        "phantom_slices": 80,
    },
}


def _convert(value: Any, kind: Any) -> Any:
    """Turns what YAML or a caller gave into the field's type; TypeError or ValueError where it is another."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _convert(value, next(o for o in options if o is not type(None)))
    if origin is Literal:
        value = "no" if value is False and "no" in options else value  # YAML 1.1 reads a bare `no` as False
        accepted = value in options
    elif origin is tuple:
        fits = options[-1] is ... or (isinstance(value, list | tuple) and len(value) == len(options))
        accepted = isinstance(value, list | tuple) and fits
        value = tuple(_convert(item, options[0]) for item in value) if accepted else value
    elif kind is Path:
        accepted = isinstance(value, str | Path)
        value = Path(value).expanduser() if accepted else value
    elif kind in (str, bool):
        # a bare `save_every: 200` is a number to YAML
        value = str(value) if kind is str and isinstance(value, int) and not isinstance(value, bool) else value
        accepted = isinstance(value, kind)
    else:  # numbers; as text too, since PyYAML reads a bare 3e-4 as text
        accepted = not isinstance(value, bool) and (kind is float or float(value) == int(float(value)))
        value = kind(value if isinstance(value, int) else float(value))
    if not accepted:
        raise TypeError
    return value


def _describe(kind: Any) -> str:
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _describe(next(option for option in options if option is not type(None)))
    if origin is Literal:
        return "one of " + ", ".join(options)
    if origin is tuple:
        each = _describe(options[0]).removeprefix("a ").removeprefix("an ")
        return f"a list of {each} values" if options[-1] is ... else f"a list of {len(options)} {each} values"
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false", Path: "a path"}[kind]
