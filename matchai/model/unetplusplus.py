"""The UNet++ of segmentation-models-pytorch: its weights seeded, its dropout keyed, its encoder loaded or refused."""

import copy
import difflib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from matchai.model.dropout import key_dropout
from matchai.model.encoder_weights import from_hub, load_weights_into, offline_problem, read_weights
from matchai.system import InputError, is_out_of_memory

try:
    import segmentation_models_pytorch as smp
    import timm
except (RuntimeError, OSError, ImportError) as error:
    # a CPU build of torch beside the registry's torchvision: "operator torchvision::nms does not exist"
    raise InputError(
        f"segmentation-models-pytorch cannot be imported ({str(error).splitlines()[0]}); most often torch and "
        "torchvision are builds that do not fit each other: install both in one command, "
        "`pip install --force-reinstall torch torchvision`."
    ) from error

__all__ = [
    "PROBE_SIZE",
    "build_model",
    "probe",
    "smp",
    "timm",
]  # the libraries, too: their import is guarded here alone

PROBE_SIZE = 64  # pixels; enough for five halvings
SURE_ENCODER = "timm-efficientnet-b3"  # the recipe's, which takes slices of any size


def build_model(
    encoder: str,
    num_classes: int,
    *,
    in_channels: int = 1,
    encoder_weights: str = "none",
    seed: int = 0,
    image_size: int | None = None,
) -> nn.Module:
    """Builds the UNet++ for slices, each alone or between its neighbours, and sees that it takes them.

    Takes images (B, in_channels, H, W) to logits (B, num_classes, H, W), H and W multiples of 32. The same seed gives
    the same weights; the global random state is left as it was. Parameters that no output depends on (the recipe's
    encoder has `conv_head` and `bn2`) are frozen: DistributedDataParallel waits for their gradient in vain.

    Args:
        encoder: Name of an smp encoder, or one of timm's as tu-NAME.
        num_classes: C.
        in_channels: Channels of an image.
        encoder_weights: `imagenet` (local cache, then hub), `none`, or a file of encoder weights. Filters of the first
            layer that take three colours, or one channel, are shared out to the channels as smp does.
        seed: Seed of the initial weights.
        image_size: Pixels a side; an encoder of one size is built for it. By default `PROBE_SIZE`, or the encoder's
            own size where it does not take that.

    Raises:
        InputError: For an encoder that is unknown or does not take such images, or weights that cannot be had or do
            not fit. Never falls back to random weights.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`timm-` encoders are deprecated", DeprecationWarning)
        warnings.filterwarnings("ignore", "For 'tu-'", UserWarning)

        def build(source: str) -> nn.Module:
            weights = _encoder_weights(encoder, source) if source != "none" else None
            problem: Exception | None = None
            for size, options in _attempts(encoder, image_size):
                torch.manual_seed(seed)
                try:
                    model = _unetplusplus(encoder, num_classes, in_channels, weights, source, options)
                    return _frozen(model, probe(model, 1, in_channels, size))
                except Exception as error:  # whatever smp, timm or a layer says of an encoder that is not for this
                    if isinstance(error, InputError) or is_out_of_memory(error):
                        raise
                    problem = problem or error
            assert problem is not None
            raise InputError(_encoder_problem(encoder, in_channels, image_size, problem)) from problem

        try:
            model = build(encoder_weights)
        except InputError:
            if encoder_weights != "none":
                build("none")  # an encoder that cannot be used says so: its weights would be fetched in vain
            raise
    key_dropout(model)
    return model


def _attempts(encoder: str, image_size: int | None) -> list[tuple[int, dict[str, Any]]]:
    """The sizes to try an encoder at, and with which of its options."""
    if image_size is not None:
        return [(image_size, {}), (image_size, {"img_size": image_size})]  # timm's networks of one size take that
    return [(size, {}) for size in dict.fromkeys((PROBE_SIZE, _own_size(encoder) or PROBE_SIZE))]


def _own_size(encoder: str) -> int | None:
    """Pixels a side at which timm trained an encoder, if it is one of timm's."""
    config = _timm_config(encoder)
    return config.input_size[-1] if config else None


def _timm_config(encoder: str) -> Any:
    """What timm tells of the weights of an encoder, if it is one of timm's; else None."""
    try:
        return timm.get_pretrained_cfg(encoder.removeprefix("tu-")) if encoder.startswith("tu-") else None
    except RuntimeError:  # no weights of that tag
        return None


def _frozen(model: nn.Module, used: set[str]) -> nn.Module:
    """The model, of which only the parameters of these names are trained."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in used)
    return model


def _unetplusplus(
    encoder: str,
    num_classes: int,
    in_channels: int,
    weights: dict[str, Tensor] | None,
    source: str,
    options: dict[str, Any],
) -> nn.Module:
    # only the first convolution takes colours; by shape, as a safetensors file does not keep the order of its names
    colours = any(weight.ndim == 4 and weight.shape[1] == 3 for weight in (weights or {}).values())
    channels = 3 if colours else in_channels
    by_timm = source == "imagenet" and weights is None

    def build(encoder_weights: str | None) -> Any:
        return smp.UnetPlusPlus(
            encoder, encoder_weights=encoder_weights, in_channels=channels, classes=num_classes, **options
        )

    try:
        model = build("imagenet" if by_timm else None)
    except Exception as error:
        if by_timm and not options:
            raise InputError(offline_problem(encoder)) from error
        raise
    if colours and in_channels != 3:  # not at once: the decoder's random numbers follow those of three channels
        model.encoder = smp.encoders.get_encoder(encoder, in_channels, weights=None, **options)
    if weights is not None:
        load_weights_into(model.encoder, weights, in_channels, encoder, source)
    built: nn.Module = model
    return built


def _encoder_weights(encoder: str, source: str) -> dict[str, Tensor] | None:
    """Pretrained weights of an encoder from the hub's cache, the hub or a file; None if timm is to fetch its own."""
    if source != "imagenet":
        return read_weights(Path(source).expanduser())
    place = weights_place(encoder)
    if place is None:
        raise InputError(
            f"The hub has no ImageNet weights of encoder {encoder}; give a local file with --encoder-weights FILE, or "
            "start from random weights with --encoder-weights none."
        )
    repo_id, revision, _ = place
    return None if revision is None else read_weights(from_hub(encoder, repo_id, revision))


def probe(
    model: nn.Module, num_slices: int, in_channels: int, image_size: int, *, normalises: bool = False
) -> set[str]:
    """Computes a batch of black slices forward and backward, in evaluation, on a copy of a model.

    Args:
        model: The model; not changed.
        num_slices: Slices of the batch; may be 0.
        in_channels: Channels of an image.
        image_size: Pixels a side.
        normalises: Whether batch norm takes the statistics of this batch, as in training.

    Returns:
        The names of the parameters that the logits depend on.

    Raises:
        Exception: What a layer says that does not take such images.
    """
    problem: Exception | None = None
    for device in ("meta", "cpu"):  # by shapes alone first, in a tenth of the time; some layers need numbers
        one = copy.deepcopy(model).to(device).eval()
        for norm in one.modules():
            norm.training = normalises and isinstance(norm, _BatchNorm)
        images = next(one.parameters()).new_zeros(num_slices, in_channels, image_size, image_size)
        try:
            logits = one(images)
            if (len(logits), *logits.shape[2:]) != (num_slices, image_size, image_size):
                raise ValueError(f"its logits are {tuple(logits.shape)}")
            logits.sum().backward()
        except Exception as error:
            problem = error
        else:
            return {name for name, parameter in one.named_parameters() if parameter.grad is not None}
    assert problem is not None
    raise problem


def encoder_names() -> list[str]:
    """Every encoder that can be named: smp's own, and timm's as tu-NAME."""
    return [*smp.encoders.get_encoder_names(), *(f"tu-{name}" for name in timm.list_models())]


def weights_place(encoder: str) -> tuple[str, str | None, tuple[str, ...]] | None:
    """Where the hub keeps the ImageNet weights of an encoder: repository, revision, file names; None without any."""
    if "pretrained_settings" in smp.encoders.encoders.get(encoder, {}):
        settings: Any = smp.encoders.encoders[encoder]["pretrained_settings"].get("imagenet")
        return settings and (settings["repo_id"], settings["revision"], ("model.safetensors",))
    config = _timm_config(encoder)
    if config is None or not config.hf_hub_id:
        return None
    return config.hf_hub_id, None, ("model.safetensors", "pytorch_model.bin")


def _encoder_problem(encoder: str, in_channels: int, image_size: int | None, error: Exception) -> str:
    names = encoder_names()
    if encoder.partition(".")[0] in names:
        said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        own = _own_size(encoder)
        remedy = f"name another with --encoder, such as {SURE_ENCODER}"
        if own and own != image_size and own % 32 == 0 and _is_built(encoder, in_channels, own):
            remedy = f"give --image-size {own}, or {remedy}"
        size = "" if image_size is None else f" for slices of {image_size} pixels"
        return f"Encoder {encoder} cannot be built into a UNet++{size} ({said}); {remedy}."
    near = difflib.get_close_matches(encoder, names, 3)
    hint = f"; did you mean {' or '.join(near)}? The" if near else "; the"
    return (
        f"There is no encoder {encoder!r}{hint} encoders are those of segmentation-models-pytorch, and all of timm's "
        "as tu-NAME."
    )


def _is_built(encoder: str, in_channels: int, image_size: int) -> bool:
    try:
        probe(_unetplusplus(encoder, 2, in_channels, None, "none", {}), 1, in_channels, image_size)
    except Exception:  # as where a model is built
        return False
    return True
