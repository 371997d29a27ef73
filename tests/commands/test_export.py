"""The command that exports, and what the documentation says of its files."""

import importlib
import re
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

from matchai.export import main
from matchai.model.unetplusplus import build_model
from matchai.prediction.export_formats import ExportError, sample
from matchai.prediction.inference import load_model
from matchai.training.checkpoint import pack_weights
from tests.prediction.test_export_formats import ABOUT

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "export.md"


def make_run(folder: Path, encoder: str = "tu-test_resnet", image_size: int = 32) -> Path:
    """The folder of a run with untrained weights."""
    about = ABOUT | {"encoder": encoder, "image_size": image_size, "context": 0, "in_channels": 1}
    folder.mkdir(parents=True)
    weights = build_model(encoder, 4).state_dict()
    (folder / "best.safetensors").write_bytes(pack_weights(weights, about))
    return folder


def test_a_run_becomes_an_onnx_file_in_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    assert main([str(run)]) == 0
    model, about = load_model(run)
    images = sample(about)
    session = onnxruntime.InferenceSession(run / "export" / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images})
    with torch.inference_mode():
        assert (logits.argmax(1) == model(torch.from_numpy(images)).numpy().argmax(1)).all()
    assert "the largest difference of a logit" in capsys.readouterr().out


def test_the_readmes_lines_load_exported_weights_into_plain_smp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "runs" / "quick", "resnet18")
    assert main([str(run / "best.safetensors"), "--format", "safetensors"]) == 0
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (lines,) = [block for block in blocks if "smp.UnetPlusPlus" in block]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(lines, names)
    model, about = load_model(run)
    images = torch.from_numpy(sample(about))
    with torch.inference_mode():
        assert torch.equal(names["model"](images), model(images))


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "mine.onnx").write_bytes(b"mine")
    assert main([str(run), "--output", str(tmp_path / "mine.onnx")]) == 2
    assert (tmp_path / "mine.onnx").read_bytes() == b"mine"
    assert "is there already" in capsys.readouterr().err


def test_a_model_that_computes_something_else_is_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def differ(*_: Any) -> Any:
        raise ExportError("The exported model differs.")

    run = make_run(tmp_path / "run")
    monkeypatch.setattr("matchai.prediction.export_formats.pack_onnx", differ)
    assert main([str(run)]) == 1
    assert {path.name for path in run.iterdir()} == {"best.safetensors"}
    assert "error: The exported model differs." in capsys.readouterr().err


def test_what_is_no_run_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "give the folder of a matchai run" in capsys.readouterr().err


def test_a_missing_onnx_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def is_missing(name: str, *arguments: Any) -> Any:
        if name == "onnxscript":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return load(name, *arguments)

    load = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", is_missing)
    assert main([str(make_run(tmp_path / "run"))]) == 2
    assert 'needs onnxscript, which is not installed: `pip install "matchai[onnx]"`' in capsys.readouterr().err
