"""matchai: trains a UNet++ to segment COVID-19 lesions in lung CT slices; the same run wherever it runs.

>>> from matchai import TrainConfig, run
>>> result = run(TrainConfig().updated(data="slices", epochs=10))  # doctest: +SKIP
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matchai.runs.trainer import RunResult, run
    from matchai.settings.config import TrainConfig
    from matchai.system.errors import InputError

__all__ = ["InputError", "RunResult", "TrainConfig", "run"]

_HOMES = {
    "TrainConfig": "settings.config",
    "InputError": "system.errors",
    "run": "runs.trainer",
    "RunResult": "runs.trainer",
}


def __getattr__(name: str) -> Any:
    """Imports the public names when they are first used, so that `--help` need not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'matchai' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"matchai.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
