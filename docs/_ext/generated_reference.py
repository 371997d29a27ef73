"""The part of the reference that is made from the code: every setting, every command's help, the API.

Before Sphinx reads the pages it writes them to `docs/reference/generated/`, which git ignores.
"""

import dataclasses
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import types
import typing
from pathlib import Path
from typing import Any

import matchai
from matchai.__main__ import COMMANDS
from matchai.settings import command_settings, config, study_settings
from matchai.settings.help import docstrings

STABLE = ("matchai", "matchai.sampling", "matchai.losses", "matchai.metrics", "matchai.checkpoint")
WINGS = tuple(
    name for _, name, is_wing in pkgutil.iter_modules(matchai.__path__, "matchai.") if is_wing and name not in STABLE
)
PAGES = ("settings.rst", "commands.rst", *(f"api-{module}.rst" for module in (*STABLE, *WINGS)))
"""The files that are made."""


def generate(app: Any) -> None:
    """Writes all generated pages."""
    folder = Path(app.srcdir) / "reference" / "generated"
    folder.mkdir(exist_ok=True)
    for name in PAGES:
        if name == "settings.rst":
            text = settings_page()
        elif name == "commands.rst":
            text = commands_page()
        else:
            text = api_page(name.removeprefix("api-").removesuffix(".rst"))
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def settings_page() -> str:
    """Every setting of a training, a study and the other commands, by group."""
    parts = [
        heading("Settings", "="),
        "One name serves as flag (``--max-lr``), YAML key and Python argument (``max_lr``). Later ones win: default, "
        "preset, ``--config`` file, flag; of a repeated flag the last. The defaults here are those of the preset "
        "``recipe``.",
        heading("Presets", "-"),
    ]
    for name, changes in config.PRESETS.items():
        told = ", ".join(f"``{key}`` {value}" for key, value in changes.items()) or "all defaults, as below"
        parts.append(f"``{name}``\n    {told}.")
    for group in dataclasses.fields(config.TrainConfig):
        parts += [heading(f"Training: {group.name}", "-"), *settings_of(typing.cast(Any, group.type))]
    parts += [heading("Study", "-"), *settings_of(study_settings.StudySettings)]
    for name, kind in vars(command_settings).items():
        if name.endswith("Settings") and dataclasses.is_dataclass(kind):
            parts += [heading(f"Command {name.removesuffix('Settings').lower()}", "-"), *settings_of(kind)]
    return "\n\n".join(parts) + "\n"


def settings_of(kind: Any) -> list[str]:
    """The group's sentence, and an entry for each setting."""
    docs, hints = docstrings(kind), typing.get_type_hints(kind)
    parts = [str(kind.__doc__)]
    for field in dataclasses.fields(kind):
        low, high, above = (field.metadata.get(key) for key in ("low", "high", "above"))
        limits = (("at least", low), ("above", above), ("at most", high))
        bounds = [f"{word} {shown(value)}" for word, value in limits if value is not None and abs(value) < 1e300]
        default = "required" if field.default is dataclasses.MISSING else f"default ``{shown(field.default)}``"
        facts = "; ".join([describe(hints[field.name]), *([", ".join(bounds)] if bounds else []), default])
        flag = f"--{field.name.replace('_', '-')}"
        parts.append(f"``{flag}``\n    {facts}.\n\n    {escape(docs[field.name])}")
    return parts


def describe(hint: Any) -> str:
    """A type in words."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return describe(options[0])
    if origin is typing.Literal:
        return "one of " + ", ".join(f"``{option}``" for option in options)
    if origin in (typing.Union, types.UnionType):
        return " or none".join([describe(next(option for option in options if option is not type(None))), ""])
    if origin is tuple:
        return f"{'several' if options[-1] is ... else len(options)} values, each {describe(options[0])}"
    return {int: "a whole number", float: "a number", str: "a text", bool: "yes or no", Path: "a path"}[hint]


def shown(value: Any) -> str:
    """A default as a user would write it."""
    if isinstance(value, tuple):
        return " ".join(f'"{item}"' if " " in str(item) else f"{item}" for item in value) or "none"
    if value is None or isinstance(value, bool):
        return "none" if value is None else "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def commands_page() -> str:
    """What every command prints for --help-all."""
    parts = [
        heading("Commands", "="),
        "``matchai COMMAND`` is the same as ``python -m matchai.COMMAND``. The phantom is written by "
        "``python -m matchai.phantom`` alone.",
    ]
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    for name in COMMANDS:
        command = [sys.executable, "-m", f"matchai.{name}", "--help-all"]
        told = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=True).stdout
        block = "\n".join(f"    {line}".rstrip() for line in told.splitlines())
        title = f"matchai {name}" if name in COMMANDS else f"python -m matchai.{name}"
        parts += [heading(title, "-"), f".. code-block:: text\n\n{block}"]
    return "\n\n".join(parts) + "\n"


def api_page(module: str) -> str:
    """The functions and classes that a module hands on, from their docstrings."""
    found = importlib.import_module(module)
    parts = [heading(module, "="), escape(str(found.__doc__).split(">>>")[0].strip())]
    # a wing whose names the stable pages document too is not indexed twice
    again = "" if module in STABLE else "\n   :no-index:"
    for name in found.__all__:
        value = getattr(found, name)
        if inspect.isclass(value):
            fields = ", ".join(getattr(value, "_fields", ()))  # of a named tuple, which its docstring tells
            without = f"\n   :exclude-members: {fields}" if fields else ""
            parts.append(f".. autoclass:: {module}.{name}{again}\n   :members:{without}")
        elif inspect.isfunction(value):
            parts.append(f".. autofunction:: {module}.{name}{again}")
    return "\n\n".join(parts) + "\n"


def heading(text: str, line: str) -> str:
    """A title in reStructuredText."""
    return f"{text}\n{line * len(text)}"


def escape(text: str) -> str:
    """Text whose single backticks mark code and whose signs are meant as they stand."""
    return re.sub(r"(?<!\w)\*|[|]", lambda sign: f"\\{sign[0]}", text)


def escape_docstring(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Keeps `|P ∩ T|` in docstrings from being read as a substitution."""
    lines[:] = [line if line.lstrip().startswith((">>>", "...")) else line.replace("|", "\\|") for line in lines]


def setup(app: Any) -> dict[str, bool]:
    """Tells Sphinx when to call what."""
    app.connect("builder-inited", generate)
    app.connect("autodoc-process-docstring", escape_docstring)
    return {"parallel_read_safe": True}
