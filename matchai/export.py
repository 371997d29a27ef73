"""`python -m matchai.export RUN --format onnx|safetensors`: writes a run's model for other programs."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from matchai.system.errors import InputError
from matchai.system.thread_waits import choose_waiting, refuse_launch

DESCRIPTION = (
    "Writes the model of a run as one file for other programs, once it has computed the same there. RUN is the "
    "folder of a run, or its best.safetensors."
)


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


def main(argv: list[str] | None = None, prog: str = "python -m matchai.export") -> int:
    """Exports as the command line says; returns its status: 0, 1 not the same, 2 the user's mistake, 130 Ctrl-C."""
    try:
        settings = tyro.cli(ExportSettings, args=argv, prog=prog, description=DESCRIPTION)
        refuse_launch(prog)
        folder = settings.run if settings.run.is_dir() else settings.run.parent
        path = settings.output or folder / "export" / f"model.{settings.format}"
        if path.exists():
            raise InputError(f"{path} is there already and is not overwritten: move it, or name another with --output.")
        choose_waiting()
        # seconds of imports that --help does not need
        from matchai.prediction.export_formats import ExportError, pack_onnx, pack_safetensors  # noqa: PLC0415
        from matchai.prediction.inference import load_model  # noqa: PLC0415
        from matchai.system.files import write_whole  # noqa: PLC0415

        model, about = load_model(settings.run)
        try:
            content, found = (pack_onnx if settings.format == "onnx" else pack_safetensors)(model, about)
        except ExportError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, content)
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error.strerror}); name another file with --output.") from None
    except InputError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped by Ctrl-C; nothing was written.", file=sys.stderr)
        return 130
    there = "onnxruntime" if settings.format == "onnx" else "plain segmentation-models-pytorch"
    print(f"Compared with {there} on a slice of the phantom and on noise: {found}.")
    print(f"Wrote {path} ({len(content) / 1e6:.1f} MB), of epoch {about['epoch']} of {settings.run}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
