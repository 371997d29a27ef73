"""Every setting once: defaults, presets, command line and YAML, and what no run could take."""

from typing import TYPE_CHECKING

from matchai.system.lazy import lazy_exports

if TYPE_CHECKING:
    from matchai.settings import parsing
    from matchai.settings.command_settings import (
        EvaluateSettings, ExportSettings, PhantomSettings, PredictSettings, ReportSettings,
    )
    from matchai.settings.config import FREE, LEAVES, PLACE, PRESETS, InputSettings, RunSettings, TrainConfig
    from matchai.settings.label_map import parse_label_map
    from matchai.settings.parsing import given, load_mapping, parse, parse_settings
    from matchai.settings.study_settings import OBJECTIVES, StudySettings, TuneConfig, check_study, refuse_restart
    from matchai.settings.validation import check, parse_interval
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = [
    "FREE", "LEAVES", "OBJECTIVES", "PLACE", "PRESETS", "EvaluateSettings", "ExportSettings", "InputSettings",
    "PhantomSettings", "PredictSettings", "ReportSettings", "RunSettings", "StudySettings", "TrainConfig", "TuneConfig",
    "check", "check_study", "given", "load_mapping", "parse", "parse_interval", "parse_label_map", "parse_settings",
    "parsing", "refuse_restart",
]
