"""matchai's own kernels for CPUs: compiled once on the machine that they run on, in `cpp/`."""

from typing import TYPE_CHECKING

from matchai.system.lazy import lazy_exports

if TYPE_CHECKING:
    from matchai.native import compiler, library
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = ["compiler", "library"]
