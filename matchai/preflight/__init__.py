"""What `python -m matchai.doctor` checks before a training: packages, hardware, data."""

from typing import TYPE_CHECKING

from matchai.system.lazy import lazy_exports

if TYPE_CHECKING:
    from matchai.preflight.preflight import check_training
    from matchai.preflight.software import (
        Finding, check_extras, check_launcher, check_loading, check_packages, check_torch,
    )
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = [
    "Finding", "check_extras", "check_launcher", "check_loading", "check_packages", "check_torch", "check_training",
]
