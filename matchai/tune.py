"""`python -m matchai.tune`: searches for better settings, or resumes a study. `--help-all` lists every setting."""

import dataclasses
import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from matchai.settings import TuneConfig, given, parse
from matchai.system import INTERRUPTED, InputError, choose_waiting, run_command

if TYPE_CHECKING:
    from matchai.study import Plan

DESCRIPTION = (
    "Searches for the settings with the best validation Dice, and tests them on new seeds before it names a winner. "
    "Running the same command again resumes the study until it has --trials finished trials. Without --data it trains "
    "on a built-in synthetic phantom. A setting given by its flag is the same in all trials."
)


def main(argv: list[str] | None = None, prog: str = "python -m matchai.tune") -> int:
    """Studies as the command line says; returns the exit status: 0, 1 broken, 2 the user's mistake, 130 Ctrl-C."""
    words = sys.argv[1:] if argv is None else argv
    return run_command(lambda: _tune(words, prog), left="The same command resumes from the last saved state.")


def _tune(argv: list[str], prog: str) -> int:
    tune = parse(argv, DESCRIPTION, prog, TuneConfig, first_look="study")
    choose_waiting()
    # seconds of imports that --help does not need
    from matchai.study import STOPPED, make_plan, supervise, work  # noqa: PLC0415
    from matchai.system import StopSignal, StudyDisplay, launcher  # noqa: PLC0415

    plan = make_plan(tune, given(argv))
    if plan.settings.workers > 1 and (launcher() or int(os.environ.get("WORLD_SIZE") or 1) > 1):
        raise InputError(
            f"--workers {plan.settings.workers} was given to launched processes, which train each trial together: "
            "drop --workers, or start without the launcher."
        )
    display = StudyDisplay(plan.settings.objective, plan.settings.workers)
    is_main = os.environ.get("RANK", "0") == "0"
    if plan.settings.report:
        return _report(plan) if is_main else 0
    if is_main:
        _greet(plan, display.say)
    stop = StopSignal()
    try:
        status = supervise(plan, display, stop) if plan.settings.workers > 1 else work(plan, display.hear, stop)
    finally:
        display.close()
    if is_main:
        _say_how_it_ended(plan, display, stop.received)
    if stop.received is not None:
        return INTERRUPTED if stop.received == signal.SIGINT else 0
    return 0 if status == STOPPED else status


def _greet(plan: "Plan", say: Callable[[str], None]) -> None:
    """Says first what is studied, and how."""
    settings, preset, data = plan.settings, plan.config.run.preset, plan.config.input.data
    if data is None:
        say(
            f"matchai: a study of preset {preset} on the built-in synthetic phantom, which is no patient's data. For "
            "your own slices: python -m matchai.tune --trials 50 --data DIR"
        )
    else:
        say(f"matchai: a study of preset {preset} on {data}")
    pruner = settings.pruner if settings.prune and not settings.screen_epochs else "none"
    screening = f", screened with {settings.screen_epochs} epochs each" if settings.screen_epochs else ""
    say(
        f"study {plan.name}: {settings.trials} trials{screening} over {', '.join(plan.space.entries)}; a trial's value "
        f"is the {settings.objective} of its best epoch; search sampler {settings.search_sampler}, pruner {pruner}; "
        f"runs in {plan.folder}"
    )


def _say_how_it_ended(plan: "Plan", display: Any, received: signal.Signals | None) -> None:
    if display.answer is not None:
        if not display.has_ended:
            display.say(f"Study {plan.name} has all its {plan.settings.trials} trials; there is nothing to do.")
        display.say(display.answer["text"])
        if display.answer["best"]:
            display.say(f"Train it: {display.answer['command']}")
        display.say(f"Report: {plan.folder / 'report.html'}")
    elif received is not None:
        display.say(f"Stopped by {received.name}, all saved in {plan.folder}; the same command resumes from there.")


def _report(plan: "Plan") -> int:
    """Draws the report of a study as the store has it; writes nothing else."""
    from matchai.study import (  # noqa: PLC0415
        Confirmation,
        Stage,
        TrialTable,
        about_study,
        best_file,
        draw_report,
        open_store,
    )

    store = open_store(plan.settings.storage, may_create=False)
    if not store.has_study(plan.name):
        raise InputError(
            f"{store.shown} holds no study {plan.name}, so there is nothing to report; run it first, or give its "
            "--study-name."
        )
    about = about_study(store, plan.name)
    settings = dataclasses.replace(plan.settings, objective=about["objective"])
    plan = dataclasses.replace(plan, settings=settings, direction=about["direction"])
    names = [name for name in (f"{plan.name}-screen", plan.name) if store.has_study(name)]
    tables = [TrialTable(plan, Stage(name, 1, ""), store) for name in names]
    best = best_file(plan, Confirmation(tables[-1]).verdict())
    print(f"Report: {draw_report(tables, best if best.exists() else None)}")
    store.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
