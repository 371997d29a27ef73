"""matchai: trains a UNet++ to segment COVID-19 lesions in lung CT slices; the same run wherever it runs.

>>> from matchai import TrainConfig, run
>>> result = run(TrainConfig().updated(data="slices", epochs=10))  # doctest: +SKIP
"""

from typing import TYPE_CHECKING

from matchai.system.lazy import lazy_exports

if TYPE_CHECKING:
    from matchai.runs.trainer import RunResult, run
    from matchai.settings.config import TrainConfig
    from matchai.system.errors import InputError
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = ["InputError", "RunResult", "TrainConfig", "run"]
