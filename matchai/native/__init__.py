"""matchai's own kernels for CPUs: compiled once on the machine that they run on, in `cpp/`."""

from typing import TYPE_CHECKING

from matchai.system.lazy import lazy_exports

# fmt: off
if TYPE_CHECKING:
    from matchai.native import compiler, library

__all__ = ["compiler", "library"]
# fmt: on

__getattr__ = lazy_exports(__name__)
