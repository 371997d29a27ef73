"""The packages that a training needs, its launcher and its encoder, checked; speaks where torch is broken, too."""

import os
import shutil
import socket
import sys
import threading
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from matchai.system import InputError

HUB_PATIENCE = 2.0  # seconds
OTHER_WEIGHTS = "give a local file with --encoder-weights FILE, or start from random weights: --encoder-weights none"

EXTRAS = {
    "medical": "NIfTI and DICOM",
    "onnx": "export to ONNX",
    "evaluate": "surface distances",
    "tensorboard": "--tracker tensorboard",
    "postgresql": "a study on PostgreSQL",
    "mysql": "a study on MySQL",
    "dashboard": "optuna-dashboard",
}
"""The extras and what each is for; one that is missing is no fault."""


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        status: `ok`; `warning`: training starts, but not as it could; `problem`: it would not start, or soon end.
        text: What was found, a sentence without its full stop.
        remedy: What to do about it; empty for `ok`, and where the text says it.
        lines: To be shown below it.
    """

    status: Literal["ok", "warning", "problem"]
    text: str
    remedy: str = ""
    lines: Sequence[str] = ()

    def __str__(self) -> str:
        said = self.text + (f". Remedy: {self.remedy}" if self.remedy else "")
        return "\n".join((f"{self.status:<8} {said}{'' if said.endswith(('.', '?', ':')) else '.'}", *self.lines))


def check_packages() -> list[Finding]:
    """Python's and every package's version against what the installed matchai asks for."""
    try:
        from packaging.requirements import Requirement  # noqa: PLC0415 what is missing is told
        from packaging.specifiers import SpecifierSet  # noqa: PLC0415

        about = metadata.metadata("matchai")
    except ModuleNotFoundError as error:  # metadata's own error is one, too
        missing = error.name or "matchai"
        remedy = "activate the environment that has matchai, or `pip install -e .` in matchai's folder"
        return [Finding("problem", f"{missing} is not installed for {sys.executable}", remedy)]
    findings = []
    python, wanted = ".".join(map(str, sys.version_info[:3])), about["Requires-Python"] or ""
    if not SpecifierSet(wanted).contains(python, prereleases=True):
        findings.append(Finding("problem", f"Python {python}, but {wanted} is needed", "make an environment with it"))
    fitting = []
    for requirement in map(Requirement, metadata.requires("matchai") or ()):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            found = f"{requirement.name} {version or 'is not installed'}"
            need = f", but {requirement.specifier} is needed" if version else ""
            remedy = f'`pip install "{requirement.name}{requirement.specifier}"`'
            findings.append(Finding("problem", found + need, remedy))
        else:
            fitting.append(f"{requirement.name} {version}")
    if not findings:
        findings.append(Finding("ok", f"Python {python}; {len(fitting)} packages as required: {', '.join(fitting)}"))
    return findings


def check_extras() -> Finding:
    """Which extras are installed, and the command for the others."""
    from packaging.requirements import Requirement  # noqa: PLC0415

    requirements = [Requirement(text) for text in metadata.requires("matchai") or ()]
    installed, missing = [], []
    for extra, purpose in EXTRAS.items():
        named = [one for one in requirements if one.marker and one.marker.evaluate({"extra": extra})]
        named = [one for one in named if not one.marker.evaluate({"extra": ""})]  # type: ignore[union-attr]
        if named and all(_version(one.name) for one in named):
            installed.append(extra)
        elif named:
            missing.append(f'{purpose} (`pip install "matchai[{extra}]"`)')
    lacks = f"; without {', '.join(missing)}" if missing else ""
    return Finding("ok", f"Extras: {', '.join(installed) or 'none'}{lacks}")


def check_torch() -> Finding:
    """Whether torch and torchvision are builds that fit each other, by their metadata and by loading both."""
    versions = {name: _version(name) for name in ("torch", "torchvision")}
    pair = " and ".join(f"{name} {version or '(not installed)'}" for name, version in versions.items())
    local = (versions["torch"] or "").partition("+")[2]
    index = f" --index-url https://download.pytorch.org/whl/{local}" if local else ""
    remedy = f"install both in one command: `pip install --force-reinstall torch torchvision{index}`"
    fault = _metadata_fault(versions["torch"])
    try:
        torch = import_module("torch")
        import_module("torchvision")
        _ = torch.ops.torchvision.nms  # its compiled part
    except Exception as error:
        said = str(error).strip() or type(error).__name__
        return Finding("problem", f"{pair} do not load together ({said.splitlines()[0]}{fault})", remedy)
    if fault:
        text = f"{pair} load together, but were not made for each other ({fault.lstrip('; ')})"
        return Finding("warning", text, remedy)
    return Finding("ok", f"{pair} fit each other")


def _metadata_fault(torch_version: str | None) -> str:
    """What torchvision's own metadata say against this torch; empty for nothing."""
    from packaging.requirements import Requirement  # noqa: PLC0415

    if torch_version is None or _version("torchvision") is None:
        return ""
    for requirement in map(Requirement, metadata.requires("torchvision") or ()):
        if requirement.name == "torch" and not requirement.specifier.contains(torch_version, prereleases=True):
            return f"; torchvision asks for torch{requirement.specifier}"
    return ""


def check_loading() -> Finding:
    """Whether the other packages that a training imports can be loaded."""
    try:
        import_module("matchai.runs.trainer")
    except Exception as error:
        said = str(error).strip() or type(error).__name__
        remedy = "install the package that it names again"
        if "libGL" in said:
            remedy = "`pip install --force-reinstall opencv-python-headless`, which needs no screen"
        return Finding("problem", f"What training imports does not load: {said.splitlines()[0]}", remedy)
    return Finding("ok", "All that training imports can be loaded")


def check_launcher(num_gpus: int) -> list[Finding]:
    """The `accelerate` command, and which of its files of settings counts.

    Args:
        num_gpus: GPUs that torch sees.
    """
    findings = []
    beside = shutil.which("accelerate", path=str(Path(sys.executable).parent))
    if shutil.which("accelerate") is None:
        way = f"call {beside}" if beside else "use `python -m accelerate.commands.launch`"
        findings.append(Finding("warning", "The accelerate command is not on the path", way))
    else:
        findings.append(Finding("ok", "Launcher: the accelerate command is there"))
    here = Path("accelerate_config.yaml")
    if here.exists():
        text = f"{here} is here; accelerate launch reads it with --config_file {here}, and not without"
        findings.append(Finding("ok", text))
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    defaults = [home.expanduser() / "accelerate" / f"default_config.{suffix}" for suffix in ("yaml", "json")]
    existing = [path for path in defaults if path.exists()]
    return findings + [_check_default_config(path, num_gpus) for path in existing[:1]]


def _check_default_config(path: Path, num_gpus: int) -> Finding:
    import yaml  # noqa: PLC0415 reads JSON, too

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        names = ("distributed_type", "num_processes", "mixed_precision")
        shown = {name: settings[name] for name in names if name in settings}
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return Finding("warning", f"{path}, which accelerate launch reads, is damaged", "remove it")
    text = f"accelerate launch without --config_file reads {path}: " + ", ".join(f"{k} {v}" for k, v in shown.items())
    number = shown.get("num_processes", 1)
    kind, precision = str(shown.get("distributed_type", "NO")), str(shown.get("mixed_precision", "no"))
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU", "False") or precision not in ("no", "bf16", "fp16", "False"):
        remedy = "give accelerate launch --config_file accelerate_config.yaml"
        return Finding("warning", f"{text}, by which matchai does not train", remedy)
    if kind == "MULTI_GPU" and isinstance(number, int) and number > num_gpus:
        remedy = f"give --config_file accelerate_config.yaml, or --num_processes {max(num_gpus, 1)}"
        return Finding("warning", f"{text}, but there are {num_gpus} GPUs", remedy)
    return Finding("ok", text)


def check_encoder(encoder: str, encoder_weights: str, build: Callable[[str], object]) -> Finding:
    """Whether the model can be built as training would build it, and its weights are at hand or can be fetched.

    Args:
        encoder: Its name.
        encoder_weights: `imagenet`, `none`, or a file.
        build: Builds the model with such weights, or raises InputError with what training would say.
    """
    try:
        if encoder_weights == "imagenet" and (found := _check_hub(encoder)):
            build("none")  # what the hub has is not fetched for a check
            return found
        build(encoder_weights)
    except InputError as error:
        return Finding("problem", " ".join(error.problems))
    if encoder_weights == "imagenet":
        return Finding("ok", f"The ImageNet weights of {encoder} are in the local cache")
    source = "random weights" if encoder_weights == "none" else f"the weights in {encoder_weights}"
    return Finding("ok", f"Encoder {encoder}, from {source}")


def _check_hub(encoder: str) -> Finding | None:
    """Whether an encoder's ImageNet weights can be fetched; None if that is not needed, or there are none."""
    from matchai.model import weights_place  # noqa: PLC0415 needs torch, torchvision and timm

    place = weights_place(encoder)
    if place is None or _is_cached(*place):
        return None
    reason = _why_hub_is_out_of_reach()
    if reason is None:
        return Finding("ok", f"The ImageNet weights of {encoder} will be fetched: the hub, or the proxy to it, answers")
    text = f"The ImageNet weights of {encoder} are not in the local cache, and {reason}"
    return Finding("problem", text, OTHER_WEIGHTS)


def _is_cached(repo_id: str, revision: str | None, names: Sequence[str]) -> bool:
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 timm brings it

    found: list[Any] = [try_to_load_from_cache(repo_id, name, revision=revision) for name in names]
    return any(isinstance(one, str) for one in found)


def _why_hub_is_out_of_reach() -> str | None:
    from huggingface_hub import constants  # noqa: PLC0415

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE keeps them from being fetched"
    proxies = urllib.request.getproxies()
    proxy = proxies.get("https") or proxies.get("http") or ""
    address = urlsplit(proxy if "//" in proxy else f"//{proxy}") if proxy else urlsplit(constants.ENDPOINT)
    port = address.port or (80 if proxy else 443)
    outcome: list[str | None] = []

    def connect() -> None:
        try:
            socket.create_connection((address.hostname or "", port), timeout=HUB_PATIENCE).close()
            outcome.append(None)
        except OSError as error:
            outcome.append(error.strerror or str(error))

    # beside, as the search for the name of a host takes what time it likes
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(HUB_PATIENCE + 0.5)
    reason = outcome[0] if outcome else f"no answer in {HUB_PATIENCE:g} s"
    return reason and f"the {'proxy' if proxy else 'hub'} {address.hostname} cannot be reached ({reason})"


def check_trackers(trackers: Sequence[str]) -> list[Finding]:
    """Whether the trackers asked for are installed."""
    missing = [name for name in trackers if find_spec(name) is None]
    return [Finding("problem", f"tracker {name} is not installed", f"`pip install {name}`") for name in missing]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
