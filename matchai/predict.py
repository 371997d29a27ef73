"""`python -m matchai.predict RUN INPUT... --output DIR`: segments CT slices and volumes with trained runs."""

import sys

from matchai.settings import PredictSettings, parse_settings
from matchai.system import MISTAKE, choose_waiting, print_problems, refuse_launch, run_command

DESCRIPTION = (
    "Segments lesions in CT slices with a trained network. RUN is the folder of a run, or its best.safetensors; the "
    "probabilities of several runs, such as folds, are averaged. INPUT is a .npy array, a NIfTI file, a folder with a "
    "DICOM series, or a folder of 16-bit PNG or TIFF slices; several can be given. For research only: predictions must "
    "not guide the care of a patient."
)


def main(argv: list[str] | None = None, prog: str = "python -m matchai.predict") -> int:
    """Predicts as the command line says; returns the exit status: 0, 1 no memory, 2 the user's mistake, 130 Ctrl-C."""

    def work() -> int:
        settings = parse_settings(argv, DESCRIPTION, prog, PredictSettings)
        refuse_launch(prog)
        choose_waiting()
        from matchai.prediction import predict  # noqa: PLC0415 seconds of imports that --help does not need

        problems = predict(settings)
        print_problems(problems)
        return MISTAKE if problems else 0

    return run_command(
        work,
        left="What was done so far is in the folder of the results, each file whole, without a summary; to predict "
        "again, delete that folder or name another with --output.",
    )


if __name__ == "__main__":
    sys.exit(main())
