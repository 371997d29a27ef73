"""`python -m matchai.evaluate RUN --data DIR`: compares the predictions of a run with masks."""

import sys

from matchai.settings import EvaluateSettings, parse_settings
from matchai.system import choose_waiting, refuse_launch, run_command

DESCRIPTION = (
    "Compares the predictions of a run with masks: Dice, IoU, precision and recall of each class and of any lesion, "
    "pooled over pixels and as means over images; surface distances; the error of the affected share of the lung. "
    "Bootstrap intervals over groups are given. Of the run's own data only the validation slices are used. The "
    "probabilities of several runs are averaged."
)


def main(argv: list[str] | None = None, prog: str = "python -m matchai.evaluate") -> int:
    """Evaluates as the command line says; returns the exit status: 0, 1 no memory, 2 the user's mistake, 130 Ctrl-C."""

    def work() -> int:
        settings = parse_settings(argv, DESCRIPTION, prog, EvaluateSettings)
        refuse_launch(prog)
        choose_waiting()
        # seconds of imports that --help does not need
        from matchai.prediction import evaluate  # noqa: PLC0415
        from matchai.system import Display, show_evaluation  # noqa: PLC0415

        display = Display(is_main_process=True)
        try:
            result = evaluate(settings, display)
        finally:
            display.close()
        show_evaluation(result, display)
        display.say(f"All figures: {settings.folder}")
        return 0

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
