"""`python -m matchai.train`: trains a UNet++ on CT slices, or resumes a run. `--help-all` lists every setting."""

import signal
import sys

from matchai.settings import TrainConfig, parse
from matchai.system import INTERRUPTED, choose_waiting, run_command

DESCRIPTION = (
    "Trains a UNet++ to segment lesions in lung CT slices. Running the same command again resumes the run. Without "
    "--data it trains on a built-in synthetic phantom."
)


def main(argv: list[str] | None = None, prog: str = "python -m matchai.train") -> int:
    """Trains as the command line says; returns the exit status: 0, 1 diverged, 2 the user's mistake, 130 Ctrl-C."""

    def work() -> int:
        config = parse(sys.argv[1:] if argv is None else argv, DESCRIPTION, prog, TrainConfig)
        choose_waiting()
        from matchai.runs import run  # noqa: PLC0415 seconds of imports that --help does not need

        return INTERRUPTED if run(config).stopped_by == signal.SIGINT else 0

    return run_command(
        work,
        left="The same command resumes from the last saved state.",
        memory="A step needs more memory than there is; the last saved state is kept. Compute a batch in parts with "
        "--accumulate 2 or more, or choose a smaller --image-size or --encoder.",
    )


if __name__ == "__main__":
    sys.exit(main())
