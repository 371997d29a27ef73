"""Packages, launcher and encoder, where they are as they must be and where not."""

import socket
import sys
import types
from importlib import metadata
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from matchai.preflight import software
from matchai.preflight.software import (
    Finding,
    check_encoder,
    check_extras,
    check_launcher,
    check_packages,
    check_torch,
    check_trackers,
)
from matchai.system.errors import InputError

NMS = "operator torchvision::nms does not exist"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """The versions that the metadata tell; a test may change them. None: not installed."""
    versions: dict[str, str | None] = {"torch": "2.9.0", "torchvision": "0.24.0", "numpy": "2.1.0"}

    def version(name: str) -> str:
        if versions.get(name) is None:
            raise metadata.PackageNotFoundError(name)
        return str(versions[name])

    needs = {
        "matchai": ["torch>=2.6", "torchvision", "numpy<3,>=1.26", "onnx; extra == 'onnx'"],
        "torchvision": ["numpy", "torch==2.9.0"],
    }
    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda name: needs[name])
    monkeypatch.setattr(metadata, "metadata", lambda _: {"Requires-Python": ">=3.11"})
    return versions


def load_torchvision_as(monkeypatch: pytest.MonkeyPatch, fault: Exception | None) -> None:
    """Lets torch load, and torchvision load or fail."""
    loaded = types.SimpleNamespace(ops=types.SimpleNamespace(torchvision=types.SimpleNamespace(nms=None)))

    def load(name: str) -> Any:
        if name == "torchvision" and fault is not None:
            raise fault
        return loaded

    monkeypatch.setattr(software, "import_module", load)


def test_packages_that_fit_are_one_line_with_their_versions(installed: dict[str, str | None]) -> None:
    (found,) = check_packages()
    assert found.status == "ok"
    assert "torch 2.9.0, torchvision 0.24.0, numpy 2.1.0" in found.text


@pytest.mark.parametrize(
    ("name", "version", "remedy"),
    [("torch", "2.5.1", 'pip install "torch>=2.6"'), ("numpy", None, 'pip install "numpy<3,>=1.26"')],
)
def test_a_package_that_is_too_old_or_missing_is_a_problem_with_its_command(
    name: str, version: str | None, remedy: str, installed: dict[str, str | None]
) -> None:
    installed[name] = version
    (found,) = check_packages()
    assert found.status == "problem"
    assert found.text.startswith(f"{name} {version or 'is not installed'}")
    assert remedy in found.remedy


def test_an_environment_without_packages_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    (found,) = software.check_packages()
    assert found.status == "problem"
    assert sys.executable in found.text


def test_an_old_python_is_a_problem(installed: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "metadata", lambda _: {"Requires-Python": ">=99"})
    (found,) = check_packages()
    assert (found.status, ">=99 is needed" in found.text) == ("problem", True)


def test_a_missing_extra_is_no_fault_and_has_its_command(installed: dict[str, str | None]) -> None:
    found = check_extras()
    assert found.status == "ok"
    assert 'export to ONNX (`pip install "matchai[onnx]"`)' in found.text
    installed["onnx"] = "1.20.0"
    assert check_extras().text == "Extras: onnx"


def test_a_pair_that_loads_fits(installed: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    load_torchvision_as(monkeypatch, None)
    assert check_torch() == Finding("ok", "torch 2.9.0 and torchvision 0.24.0 fit each other")


def test_a_pair_that_does_not_load_is_a_problem_with_the_command_for_both(
    installed: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed["torch"] = "2.8.0+cpu"
    load_torchvision_as(monkeypatch, RuntimeError(f"{NMS}\nand more"))
    found = check_torch()
    assert found.status == "problem"
    assert f"({NMS}; torchvision asks for torch==2.9.0)" in found.text
    assert "--force-reinstall torch torchvision --index-url https://download.pytorch.org/whl/cpu`" in found.remedy


def test_a_pair_that_loads_but_was_not_made_for_each_other_is_a_warning(
    installed: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed["torch"] = "2.8.0"
    load_torchvision_as(monkeypatch, None)
    assert check_torch().status == "warning"


def test_a_missing_torch_is_told(installed: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    installed["torch"] = None
    monkeypatch.setitem(sys.modules, "torch", None)
    found = check_torch()
    assert found.status == "problem"
    assert "torch (not installed)" in found.text


def test_a_package_that_does_not_load_is_told_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: str) -> Any:
        raise ImportError("libGL.so.1: cannot open shared object file")

    monkeypatch.setattr(software, "import_module", fail)
    found = software.check_loading()
    assert (found.status, "libGL.so.1" in found.text) == ("problem", True)
    assert "opencv-python-headless" in found.remedy


def build_nothing(_: str) -> None:
    """Stands for a model that can be built."""


def test_an_encoder_that_can_be_built_is_ok() -> None:
    assert check_encoder("resnet18", "none", build_nothing).status == "ok"


@pytest.mark.parametrize("weights", ["none", "weights.pth", "imagenet"])
def test_an_encoder_that_training_refuses_is_a_problem_in_its_words(
    weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: str) -> None:
        raise InputError("Such an encoder cannot be had.")

    monkeypatch.setattr(software, "_is_cached", lambda *_: True)
    found = check_encoder("mit_b0", weights, refuse)
    assert (found.status, found.text) == ("problem", "Such an encoder cannot be had.")


@pytest.mark.parametrize("encoder", ["resnet18", "timm-efficientnet-b3", "tu-test_resnet"])
def test_imagenet_weights_are_looked_for_in_the_cache_and_then_on_the_hub(
    encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "create_connection", refuse)
    found = check_encoder(encoder, "imagenet", build_nothing)
    assert found.status == "problem"
    assert "Network is unreachable" in found.text
    assert "--encoder-weights none" in found.remedy
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: socket.socket())
    assert "will be fetched" in check_encoder(encoder, "imagenet", build_nothing).text
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: "/cache/model.safetensors")
    assert "in the local cache" in check_encoder(encoder, "imagenet", build_nothing).text


@pytest.mark.parametrize(("num_gpus", "status"), [(4, "ok"), (1, "warning")])
def test_the_launchers_default_file_is_told_and_must_fit_the_gpus(
    num_gpus: int, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").write_text("distributed_type: MULTI_GPU\nnum_processes: 4\n")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    found = check_launcher(num_gpus)[-1]
    assert found.status == status
    assert "num_processes 4" in found.text


@pytest.mark.parametrize("text", ["distributed_type: FSDP", "distributed_type: DEEPSPEED", "mixed_precision: fp8"])
def test_a_default_file_by_which_matchai_does_not_train_is_a_warning(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").write_text(f"{text}\n")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    found = check_launcher(8)[-1]
    assert found.status == "warning"
    assert "--config_file accelerate_config.yaml" in found.remedy


def test_a_config_in_the_current_folder_is_said_to_need_its_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "accelerate_config.yaml").write_text("num_processes: 1\n")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert any("--config_file accelerate_config.yaml" in one.text for one in check_launcher(0))


def test_a_tracker_that_is_not_installed_is_a_problem() -> None:
    assert [one.status for one in check_trackers(["matchai", "nothing_like_it"])] == ["problem"]


def test_every_extra_of_the_package_but_those_of_developers_is_explained() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(project["optional-dependencies"]) - {"dev", "docs"} <= set(software.EXTRAS)
