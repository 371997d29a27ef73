"""The UNet++ of segmentation-models-pytorch: its weights seeded, its dropout keyed, its encoder loaded or refused."""

import difflib
import socket
import urllib.request
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from matchai.model.dropout import key_dropout
from matchai.system import InputError

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

__all__ = ["PROBE_SIZE", "build_model", "smp", "timm"]  # the libraries, too: their import is guarded here alone

PROBE_SIZE = 64  # pixels; enough for five halvings


def build_model(
    encoder: str, num_classes: int, *, in_channels: int = 1, encoder_weights: str = "none", seed: int = 0
) -> nn.Module:
    """Builds the UNet++ for slices, each alone or between its neighbours.

    Takes images (B, in_channels, H, W) to logits (B, num_classes, H, W), H and W multiples of 32. The same seed gives
    the same weights; the global random state is left as it was. Parameters that no output depends on (the recipe's
    encoder has `conv_head` and `bn2`) are frozen: DistributedDataParallel waits for their gradient in vain.

    Args:
        encoder: Name of an smp encoder.
        num_classes: C.
        in_channels: Channels of an image.
        encoder_weights: `imagenet` (local cache, then hub), `none`, or a file of encoder weights. Filters of the first
            layer that take three colours, or one channel, are shared out to the channels as smp does.
        seed: Seed of the initial weights.

    Raises:
        InputError: For an unknown encoder, or weights that cannot be had or do not fit. Never falls back to random
            weights.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`timm-` encoders are deprecated", DeprecationWarning)
        warnings.filterwarnings("ignore", "For 'tu-'", UserWarning)
        torch.manual_seed(seed)
        model = _unetplusplus(encoder, num_classes, in_channels, encoder_weights)
    key_dropout(model)
    _freeze_unused(model, in_channels)
    return model


def _unetplusplus(encoder: str, num_classes: int, in_channels: int, encoder_weights: str) -> nn.Module:
    # timm's own encoders bring their weights themselves
    by_timm = encoder_weights == "imagenet" and "pretrained_settings" not in smp.encoders.encoders.get(encoder, {})
    pretrained = encoder_weights != "none" and not by_timm
    weights = _encoder_weights(encoder, encoder_weights) if pretrained else {}
    # only the first convolution takes colours; by shape, as a safetensors file does not keep the order of its names
    colours = any(weight.ndim == 4 and weight.shape[1] == 3 for weight in weights.values())
    try:
        model: Any = smp.UnetPlusPlus(
            encoder,
            encoder_weights="imagenet" if by_timm else None,
            in_channels=3 if colours else in_channels,
            classes=num_classes,
        )
        if colours and in_channels != 3:  # not at once: the decoder's random numbers follow those of three channels
            model.encoder = smp.encoders.get_encoder(encoder, in_channels, weights=None)
    except Exception as error:
        raise InputError(_encoder_problem(encoder, by_timm, error)) from error
    if pretrained:
        weights = _share_out(weights, model.encoder.state_dict())
        try:
            # the encoder's own way first: it drops its classifier, and some rename what older files hold
            model.encoder.load_state_dict(dict(weights))
        except (RuntimeError, KeyError):
            _load_fitting(model.encoder, weights, f"{encoder_weights} does not hold the weights of encoder {encoder}")
    built: nn.Module = model
    return built


def _share_out(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights, the filters of their first layer shared out to as many channels as `expected` has, as smp does."""
    fitted = dict(weights)
    for name, weight in weights.items():
        shape = expected[name].shape if name in expected else weight.shape
        if weight.shape == shape or weight.ndim != 4 or weight.shape[1] not in (1, 3):
            continue
        held, wanted = weight.shape[1], shape[1]
        if wanted == 1:
            fitted[name] = weight.sum(1, keepdim=True)
        else:
            fitted[name] = weight[:, [channel % held for channel in range(wanted)]] * (held / wanted)
    return fitted


def _load_fitting(encoder: nn.Module, weights: dict[str, Tensor], problem: str) -> None:
    """Loads a file that holds the encoder's weights among others; raises InputError, which begins with `problem`."""
    expected = encoder.state_dict()
    missing = sorted(set(expected) - set(weights) - {k for k in expected if k.endswith("num_batches_tracked")})
    wrong = [name for name in expected if name in weights and expected[name].shape != weights[name].shape]
    if missing or wrong:
        which = f"{missing[0]} is missing" if missing else f"{wrong[0]} is {tuple(weights[wrong[0]].shape)}"
        raise InputError(
            f"{problem}: {which} ({len(missing)} missing and {len(wrong)} of another shape among {len(expected)}); "
            "give the weights of that encoder, or another --encoder."
        )
    encoder.load_state_dict({**expected, **{k: v for k, v in weights.items() if k in expected}})


def _encoder_weights(encoder: str, source: str) -> dict[str, Tensor]:
    """Pretrained weights of an encoder under its own names, from the hub's cache, the hub or a file."""
    if source != "imagenet":
        path = Path(source).expanduser()
    else:
        settings: Any = smp.encoders.encoders[encoder]["pretrained_settings"].get("imagenet")
        if settings is None:
            raise InputError(f"encoder {encoder} has no ImageNet weights; give --encoder-weights none, or a file.")
        path = _from_hub(encoder, settings["repo_id"], settings["revision"])
    try:
        if path.suffix == ".safetensors":
            weights: Any = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        weights = weights.get("state_dict", weights)
        assert all(isinstance(weight, Tensor) for weight in weights.values())
    except Exception as error:
        reason = "it does not exist" if isinstance(error, FileNotFoundError) else "it is no file of tensors"
        raise InputError(
            f"encoder weights cannot be read from {path}: {reason}; --encoder-weights takes imagenet, none, or a "
            ".safetensors or .pth file of weights alone."
        ) from None
    prefix = "encoder."
    inner = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    return inner or dict(weights)


def _from_hub(encoder: str, repo_id: str, revision: str) -> Path:
    from huggingface_hub import constants, hf_hub_download  # noqa: PLC0415 imports that random weights do not need

    try:
        return Path(hf_hub_download(repo_id, "model.safetensors", revision=revision, local_files_only=True))
    except Exception:  # not in the cache: the hub raises its own and its HTTP library's errors
        print(f"Fetching the ImageNet weights of {encoder} from the hub ...", flush=True)
    try:
        if not urllib.request.getproxies():
            # without a network this fails at once, the hub's own retries after 23 s
            socket.create_connection((urlsplit(constants.ENDPOINT).hostname, 443), timeout=10).close()
        return Path(hf_hub_download(repo_id, "model.safetensors", revision=revision))
    except Exception as error:
        raise InputError(_offline_problem(encoder, repo_id, revision)) from error


def _offline_problem(encoder: str, repo_id: str = "", revision: str = "") -> str:
    fetch = f"run `hf download {repo_id} --revision {revision}` and " if repo_id else ""
    return (
        f"The ImageNet weights of {encoder} are not in the local cache, and the hub cannot be reached: on a machine "
        f"with network {fetch}copy its ~/.cache/huggingface here, or give a local file with --encoder-weights FILE, "
        "or start from random weights with --encoder-weights none."
    )


def encoder_names() -> list[str]:
    """Every encoder that can be named: smp's own, and timm's as tu-NAME."""
    return [*smp.encoders.get_encoder_names(), *(f"tu-{name}" for name in timm.list_models())]


def weights_place(encoder: str) -> tuple[str, str | None, tuple[str, ...]] | None:
    """Where the hub keeps the ImageNet weights of an encoder: repository, revision, file names; None without any."""
    if "pretrained_settings" in smp.encoders.encoders.get(encoder, {}):
        settings: Any = smp.encoders.encoders[encoder]["pretrained_settings"].get("imagenet")
        return settings and (settings["repo_id"], settings["revision"], ("model.safetensors",))
    config = timm.get_pretrained_cfg(encoder.removeprefix("tu-"))
    if config is None or not config.hf_hub_id:
        return None
    return config.hf_hub_id, None, ("model.safetensors", "pytorch_model.bin")


def _encoder_problem(encoder: str, by_timm: bool, error: Exception) -> str:
    names = encoder_names()
    if encoder in names:
        return _offline_problem(encoder) if by_timm else f"Encoder {encoder} cannot be built into a UNet++: {error}"
    near = difflib.get_close_matches(encoder, names, 3)
    return (
        f"There is no encoder {encoder!r}"
        + (f"; did you mean {' or '.join(near)}" if near else "")
        + "? The encoders are those of segmentation-models-pytorch, and all of timm's as tu-NAME."
    )


def _freeze_unused(model: nn.Module, in_channels: int) -> None:
    was_training = model.training
    model.eval()
    model(torch.zeros(1, in_channels, PROBE_SIZE, PROBE_SIZE)).sum().backward()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
    model.train(was_training)
