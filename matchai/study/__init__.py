"""The Optuna study: trials on any number of workers, their storage, the confirmation of a winner, the report."""

from typing import TYPE_CHECKING

from matchai.system.lazy import lazy_exports

if TYPE_CHECKING:
    from matchai.study.confirmation import Confirmation, best_file, draw_report
    from matchai.study.launcher import STOPPED, supervise, work
    from matchai.study.plan import Plan, Stage, about_study, make_plan
    from matchai.study.samplers import OneCyclePruner
    from matchai.study.significance import Contender, Verdict, judge
    from matchai.study.space import Space, default_space, load_space
    from matchai.study.storage import Store, open_store
    from matchai.study.trials import TrialTable
    from matchai.study.worker import Worker
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = [
    "STOPPED", "Confirmation", "Contender", "OneCyclePruner", "Plan", "Space", "Stage", "Store", "TrialTable",
    "Verdict", "Worker", "about_study", "best_file", "default_space", "draw_report", "judge", "load_space", "make_plan",
    "open_store", "supervise", "work",
]
