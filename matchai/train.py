"""`python -m matchai.train`: trains a UNet++ on CT slices, or goes on with a run. `--help` lists every setting."""

import signal
import sys

from matchai.settings.config import TrainConfig
from matchai.settings.parsing import parse
from matchai.system.errors import InputError
from matchai.system.thread_waits import choose_waiting

DESCRIPTION = (
    "Trains a UNet++ to segment lesions in lung CT slices. The same command again goes on with the run. Without "
    "--data it trains on a built-in synthetic phantom."
)


def main(argv: list[str] | None = None, prog: str = "python -m matchai.train") -> int:
    """Trains as the command line says; returns the exit status: 0, 1 diverged, 2 the user's mistake, 130 Ctrl-C."""
    try:
        config = parse(sys.argv[1:] if argv is None else argv, DESCRIPTION, prog, TrainConfig)
        choose_waiting()
        # seconds of imports that --help does not need
        from matchai.runs.trainer import DivergedError, run  # noqa: PLC0415
        from matchai.system.machine import is_out_of_memory  # noqa: PLC0415
        from matchai.system.processes import is_lost_process, leave_group, lost_process_message  # noqa: PLC0415

        try:
            result = run(config)
        except DivergedError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except RuntimeError as error:
            if is_lost_process(error):
                print(f"error: {lost_process_message()}", file=sys.stderr)
                return 1
            if not is_out_of_memory(error):
                raise
            print(
                "error: A step needs more memory than there is; the last saved state is kept. Compute a batch in parts "
                "with --accumulate 2 or more, or choose a smaller --image-size or --encoder.",
                file=sys.stderr,
            )
            return 1
        finally:
            leave_group()
    except InputError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped by Ctrl-C; the same command goes on from the last saved state.", file=sys.stderr)
        return 130
    return 130 if result.stopped_by == signal.SIGINT else 0


if __name__ == "__main__":
    sys.exit(main())
