"""Modules that only some users need: imported where they are used, and asked for in one sentence."""

import importlib
from types import ModuleType

from matchai.system.errors import InputError


def need(module: str, extra: str, what: str) -> ModuleType:
    """Imports a module of one of matchai's extras.

    Args:
        module: Its name, as `import` takes it.
        extra: The extra in `pyproject.toml` that brings it.
        what: What is to be done with it, the begin of the sentence, such as "Reading NIfTI files".

    Raises:
        InputError: If it is not installed, or is broken: what cannot be done, and the command that mends it.
    """
    mend = f'`pip install "matchai[{extra}]"`'
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] != package:  # one of its own needs is missing
            raise InputError(f"{what} needs {package}, which itself needs {error.name}: {mend}.") from None
        raise InputError(f"{what} needs {package}, which is not installed: {mend}.") from None
    except ImportError as error:
        raise InputError(f"{what} needs {package}, which is installed but broken ({error}): {mend}.") from None
