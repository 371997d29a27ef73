"""`python -m matchai.export RUN --format onnx|safetensors`: writes a run's model for other programs."""

import sys

from matchai.settings import ExportSettings, parse_settings
from matchai.system import InputError, choose_waiting, refuse_launch, run_command

DESCRIPTION = (
    "Writes the model of a run as one file for other programs, after a check that it computes the same there. RUN is "
    "the folder of a run, or its best.safetensors."
)


def main(argv: list[str] | None = None, prog: str = "python -m matchai.export") -> int:
    """Exports as the command line says; returns its status: 0, 1 not the same, 2 the user's mistake, 130 Ctrl-C."""
    return run_command(lambda: _export(parse_settings(argv, DESCRIPTION, prog, ExportSettings), prog))


def _export(settings: ExportSettings, prog: str) -> int:
    refuse_launch(prog)
    folder = settings.run if settings.run.is_dir() else settings.run.parent
    path = settings.output or folder / "export" / f"model.{settings.format}"
    if path.exists():
        raise InputError(f"{path} is there already and is not overwritten: move it, or name another with --output.")
    choose_waiting()
    # seconds of imports that --help does not need
    from matchai.prediction import load_model, pack_onnx, pack_safetensors  # noqa: PLC0415
    from matchai.system import write_whole  # noqa: PLC0415

    model, about = load_model(settings.run)
    content, found = (pack_onnx if settings.format == "onnx" else pack_safetensors)(model, about)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); name another file with --output.") from None
    there = "onnxruntime" if settings.format == "onnx" else "plain segmentation-models-pytorch"
    print(f"Compared with {there} on a slice of the phantom and on noise: {found}.")
    print(f"Wrote {path} ({len(content) / 1e6:.1f} MB), of epoch {about['epoch']} of {settings.run}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
