"""Pretrained weights of an encoder: read from a file or the hub, brought under the encoder's own names, and checked."""

import socket
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors.torch import load
from torch import Tensor, nn

from matchai.system import InputError

# where training scripts keep the weights of a checkpoint, the likeliest first
NESTS = ("state_dict", "model_state_dict", "model", "state_dict_ema", "model_ema")
UNUSED = "num_batches_tracked"  # may be missing: it counts for nothing where batch norm has a momentum


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads a .safetensors or a .pth file, told apart by content; takes the weights out of a whole checkpoint.

    Raises:
        InputError: If it is no file of tensors.
    """
    try:
        if not path.is_file():
            raise FileNotFoundError
        found = _load(path)
        for _ in range(len(NESTS)):  # a checkpoint may lie in another, and in itself
            found = _inner(found)
        weights = {name: one for name, one in found.items() if isinstance(name, str) and isinstance(one, Tensor)}
        if not weights:
            raise ValueError
    except Exception as error:  # what the formats' readers say of a file that is none of theirs
        raise InputError(
            f"encoder weights cannot be read from {path}: {_reason(path, error)}; --encoder-weights takes imagenet, "
            "none, or a .safetensors or .pth file of weights alone."
        ) from None
    return weights


def _load(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(9)
        file.seek(0)
        # safetensors begins with the length of a JSON object, and the object
        if head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
            return load(path.read_bytes())  # by the content, as safetensors takes no name that is no UTF-8
        return torch.load(file, "cpu", weights_only=True)  # not by the path, whose suffix it would believe


def _inner(found: Any) -> Any:
    """The weights in a checkpoint: under a usual name, or the only mapping that holds tensors; else what it is."""
    nests = {name: one for name, one in found.items() if isinstance(one, Mapping)}
    usual = next((nests[name] for name in NESTS if name in nests), None)
    if usual is not None:
        return usual
    holding = [one for one in nests.values() if any(isinstance(value, Tensor) for value in one.values())]
    return holding[0] if len(holding) == 1 and not any(isinstance(one, Tensor) for one in found.values()) else found


def _reason(path: Path, error: Exception) -> str:
    if path.is_dir():
        return "it is a folder"
    if not path.exists():
        return "it is a link to a file that does not exist" if path.is_symlink() else "it does not exist"
    # torch's own reading of a cut file has no name
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return error.strerror
    return "it is no file of tensors"


def from_hub(encoder: str, repo_id: str, revision: str) -> Path:
    """The file of an encoder's ImageNet weights, in the hub's cache, fetched if need be.

    Raises:
        InputError: If they are not there and the hub cannot be reached.
    """
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
        raise InputError(offline_problem(encoder, repo_id, revision)) from error


def offline_problem(encoder: str, repo_id: str = "", revision: str = "") -> str:
    """The sentence for ImageNet weights that are not at hand."""
    fetch = f"run `hf download {repo_id} --revision {revision}` and " if repo_id else ""
    return (
        f"The ImageNet weights of {encoder} are not in the local cache, and the hub cannot be reached: on a machine "
        f"with network {fetch}copy its ~/.cache/huggingface here, or give a local file with --encoder-weights FILE, "
        "or start from random weights with --encoder-weights none."
    )


def load_weights_into(encoder: nn.Module, weights: dict[str, Tensor], in_channels: int, name: str, source: str) -> None:
    """Loads pretrained weights into an encoder; what it does not have, such as a classifier, is left out.

    Args:
        encoder: The module.
        weights: Under its own names, possibly behind a prefix such as `module.encoder.`, or under timm's.
        in_channels: Channels of an image. Filters of the first layer that take three colours, or one channel, are
            shared out to these as smp does.
        name: The encoder's name, for the problem.
        source: Where the weights come from, for the problem.

    Raises:
        InputError: If a weight is missing, or is no finite numbers of the shape that the encoder has.
    """
    expected = encoder.state_dict()
    named = _named_as(weights, expected)
    fitted = _share_out(named, expected, in_channels)
    unfit = _unfit(fitted, expected)
    if unfit:  # some encoders know names of older files
        kept = {key: value.clone() for key, value in expected.items()}
        try:
            encoder.load_state_dict(_share_out(_numbers(weights), expected, in_channels))
        except Exception:  # what an encoder's own code says of a file that it does not know
            encoder.load_state_dict(kept)
            which, what = next(iter(unfit.items()))
            raise InputError(
                f"{source} does not hold the weights of encoder {name}: {which} {what} ({len(unfit)} of "
                f"{len(expected)} do not fit); give the weights of that encoder, or another --encoder."
            ) from None
    else:
        nn.Module.load_state_dict(encoder, {**expected, **fitted})


def _named_as(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that are expected, under these names: without what stands before them in one of the two, as timm.

    timm's networks have dots where those that smp makes of them have underscores, and no `model.` before.
    """
    best: dict[str, Tensor] = {}
    for own in ("", "model."):
        wanted = {key.removeprefix(own).replace(".", "_"): key for key in expected}
        by_prefix: dict[str, dict[str, Tensor]] = {}
        for key, weight in weights.items():
            parts = key.split(".")
            for number in range(len(parts)):
                rest = "_".join(parts[number:])
                if rest in wanted:
                    by_prefix.setdefault(".".join(parts[:number]), {})[wanted[rest]] = weight
        best = max((best, *by_prefix.values()), key=len)  # the first of several
    return best


def _share_out(weights: dict[str, Tensor], expected: dict[str, Tensor], in_channels: int) -> dict[str, Tensor]:
    """The weights, the filters of their first layer shared out to as many channels as an image has, as smp does."""
    fitted = dict(weights)
    for name, weight in weights.items():
        shape = expected[name].shape if name in expected else weight.shape
        if weight.shape == shape or weight.ndim != 4 or len(shape) != 4 or weight.shape[1] not in (1, 3):
            continue
        held, wanted = weight.shape[1], shape[1]
        if wanted != in_channels or not weight.is_floating_point():
            continue
        if wanted == 1:
            fitted[name] = weight.sum(1, keepdim=True)
        else:
            fitted[name] = weight[:, [channel % held for channel in range(wanted)]] * (held / wanted)
    return fitted


def _unfit(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, str]:
    """What is wrong with the weights that do not fit, by name."""
    unfit = {}
    for name, wanted in expected.items():
        found = weights.get(name)
        if found is None:
            if not name.endswith(UNUSED):
                unfit[name] = "is missing"
        elif wanted.is_floating_point() and not _is_number(found):
            unfit[name] = f"is of {str(found.dtype).removeprefix('torch.')}, not of finite floating-point numbers"
        elif found.shape != wanted.shape:
            unfit[name] = f"is {tuple(found.shape)}, not {tuple(wanted.shape)}"
    return unfit


def _is_number(weight: Tensor) -> bool:
    """Whether a tensor is of finite floating-point numbers that are there, in memory."""
    is_plain = weight.is_floating_point() and weight.layout is torch.strided and weight.device.type == "cpu"
    return is_plain and bool(torch.isfinite(weight.float()).all())


def _numbers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight for name, weight in weights.items() if name.endswith(UNUSED) or _is_number(weight)}
