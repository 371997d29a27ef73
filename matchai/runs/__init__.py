"""A training run from first to last: the trainer, which picks the best epoch; the run's folder, report, model card."""

from typing import TYPE_CHECKING

from matchai.system.lazy import lazy_exports

if TYPE_CHECKING:
    from matchai.runs.facts import RunFacts, read_facts
    from matchai.runs.model_card import CARD, write_card
    from matchai.runs.report_page import PAGE, write_page
    from matchai.runs.setup import Setup, on_main_first, read, versions
    from matchai.runs.trainer import OnEpoch, OnStep, RunResult, Trainer, run
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = [
    "CARD", "PAGE", "OnEpoch", "OnStep", "RunFacts", "RunResult", "Setup", "Trainer", "on_main_first", "read",
    "read_facts", "run", "versions", "write_card", "write_page",
]
