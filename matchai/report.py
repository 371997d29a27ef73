"""`python -m matchai.report`: makes a run's report and model card, or makes them again."""

import sys
from pathlib import Path

from matchai.settings import ReportSettings, parse_settings
from matchai.system import InputError, run_command

DESCRIPTION = (
    "Writes RUN/report.html, one page that opens offline, and RUN/MODEL_CARD.md. The run may be finished or not; only "
    "its folder is needed. Training writes both files at its end."
)


def main(argv: list[str] | None = None, prog: str = "python -m matchai.report") -> int:
    """Reports as the command line says; returns the exit status: 0, 2 the user's mistake, 130 Ctrl-C."""
    return run_command(lambda: _report(parse_settings(argv, DESCRIPTION, prog, ReportSettings)))


def _report(settings: ReportSettings) -> int:
    # seconds of imports that --help does not need
    from matchai.runs import CARD, PAGE, read_facts, write_card, write_page  # noqa: PLC0415

    facts = read_facts(settings.run)
    page = settings.output or settings.run / PAGE
    if settings.output is not None:
        _check_free(page)
    try:
        write_page(facts, page)
        print(f"Report: {page}")
        write_card(facts, page.with_name(CARD))
        print(f"Model card: {page.with_name(CARD)}")
    except OSError as error:
        raise InputError(
            f"{page.parent} cannot be written ({error.strerror}); name another file with --output."
        ) from None
    return 0


def _check_free(page: Path) -> None:
    if page.exists():
        raise InputError(f"{page} is there already; name another file with --output.")
    if not page.parent.is_dir():
        raise InputError(f"{page.parent} is no folder; make it first, or name another file with --output.")


if __name__ == "__main__":
    sys.exit(main())
