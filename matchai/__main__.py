"""`matchai COMMAND ...`: the commands of matchai under one name; `python -m matchai.COMMAND` is the same."""

import difflib
import importlib
import sys
from importlib import metadata

from matchai.system import MISTAKE, print_problems, run_command

COMMANDS = {
    "train": "trains a UNet++ on CT slices, or resumes a run",
    "tune": "searches for better settings, or resumes a study",
    "predict": "segments slices and volumes with trained runs",
    "evaluate": "compares the predictions of runs with masks",
    "report": "writes the report and the model card of a run",
    "doctor": "checks whether training would start here, and says what to fix",
    "export": "writes a run's model as ONNX, or as weights for plain segmentation-models-pytorch",
    "phantom": "writes a synthetic data set to try things on",
}
"""Each command, which is a module of its own, and what it does."""


def main(argv: list[str] | None = None) -> int:
    """Hands the words after the command to it; returns its exit status, or 2 for an unknown command."""
    words = sys.argv[1:] if argv is None else argv
    return run_command(lambda: _main(words))


def _main(argv: list[str]) -> int:
    name, rest = (argv[0], argv[1:]) if argv else ("", [])
    if name in COMMANDS:
        status: int = importlib.import_module(f"matchai.{name}").main(rest, prog=f"matchai {name}")
        return status
    if name == "--version":
        print(f"matchai {metadata.version('matchai')}")
        return 0
    if name in ("", "-h", "--help", "--help-all"):
        print("usage: matchai COMMAND ...\n\nSegments COVID-19 lesions in lung CT slices. For research only.\n")
        print("\n".join(f"  {command:<10}{does}" for command, does in COMMANDS.items()))
        print("\n`matchai COMMAND --help` shows the common settings of a command, `--help-all` all of them.")
        return 0 if name else MISTAKE
    near = difflib.get_close_matches(name, COMMANDS, 1, 0.5)
    hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}."
    print_problems([f"There is no command {name!r}: {hint}"])
    return MISTAKE


if __name__ == "__main__":
    sys.exit(main())
