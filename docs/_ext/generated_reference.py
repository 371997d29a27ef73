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
from collections.abc import Collection
from pathlib import Path
from typing import Any

import docutils.nodes
import tyro
from sphinx.errors import ExtensionError
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docstrings import prepare_docstring

import matchai
from matchai.__main__ import COMMANDS
from matchai.doctor import DoctorRun
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
        "``recipe``. A switch is turned off by ``--no-`` before its name (``--no-prune``); in YAML it is ``true`` or "
        "``false``.",
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
    told = "It takes every setting of training. One means something else:"
    parts += [heading("Command doctor", "-"), told, *entries(DoctorRun, inspect.get_annotations(DoctorRun))]
    return "\n\n".join(parts) + "\n"


def settings_of(kind: Any) -> list[str]:
    """The group's sentence, and an entry for each setting."""
    return [str(kind.__doc__), *entries(kind, [field.name for field in dataclasses.fields(kind)])]


def entries(kind: Any, names: Collection[str]) -> list[str]:
    """An entry for each of the named settings of a group."""
    docs, hints = docstrings(kind), typing.get_type_hints(kind, include_extras=True)
    parts = []
    for field in dataclasses.fields(kind):
        if field.name not in names:
            continue
        low, high, above = (field.metadata.get(key) for key in ("low", "high", "above"))
        limits = (("at least", low), ("above", above), ("at most", high))
        bounds = [f"{word} {shown(value)}" for word, value in limits if value is not None and abs(value) < 1e300]
        facts = [describe(hints[field.name]), *([", ".join(bounds)] if bounds else [])]
        if field.default is dataclasses.MISSING:
            facts.append("required")
        elif field.default not in (None, ()) or "default:" not in docs[field.name]:  # which says it better
            facts.append(f"default ``{shown(field.default)}``")
        parts.append(
            f"``{term(field.name, hints[field.name])}``\n    {'; '.join(facts)}.\n\n    {escape(docs[field.name])}"
        )
    return parts


def term(name: str, hint: Any) -> str:
    """A setting as it stands on the command line: its flag, or what help calls an argument without one."""
    marks = getattr(hint, "__metadata__", ())
    if tyro.conf.Positional in marks:
        return next(mark.metavar for mark in marks if getattr(mark, "metavar", None))
    return f"--{name.replace('_', '-')}"


def describe(hint: Any) -> str:
    """A type in words."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return describe(options[0])
    if origin is typing.Literal:
        return "one of " + ", ".join(f"``{option}``" for option in options)
    if origin in (typing.Union, types.UnionType):
        return f"{describe(next(option for option in options if option is not type(None)))}, or none"
    if origin is tuple:
        return f"{'several' if options[-1] is ... else len(options)} values, each {describe(options[0])}"
    return {int: "a whole number", float: "a number", str: "a text", bool: "a switch", Path: "a path"}[hint]


def shown(value: Any) -> str:
    """A default as a user would write it."""
    if isinstance(value, tuple):
        return " ".join(f'"{item}"' if " " in str(item) else f"{item}" for item in value) or "none"
    if value is None or isinstance(value, bool):
        return "none" if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def commands_page() -> str:
    """What every command prints for --help-all."""
    parts = [
        heading("Commands", "="),
        "``matchai COMMAND`` is the same as ``python -m matchai.COMMAND``. Below is what ``--help-all`` prints without "
        "other flags: its defaults are those of the preset ``quick``, and of ``study`` for ``tune``.",
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
    """What a module hands on, from the docstrings: functions and classes, documented constants, modules."""
    found = importlib.import_module(module)
    constants = constant_docs(found)
    parts = [heading(module, "="), escape(str(found.__doc__).split(">>>")[0].strip())]
    # modules last, as they begin sections
    for name in sorted(found.__all__, key=lambda name: inspect.ismodule(getattr(found, name))):
        value = getattr(found, name)
        # what another page tells too is not indexed twice
        again = "" if first_to_hand_on(value) == module else "\n   :no-index:"
        if dataclasses.is_dataclass(value) and str(value.__module__).startswith("matchai.settings."):
            is_needed = {field.name: field.default is field.default_factory for field in dataclasses.fields(value)}
            signature = ", ".join(one if needed else f"{one}=..." for one, needed in is_needed.items())
            parts.append(
                f".. autoclass:: {module}.{name}({signature}){again}\n   :members:\n   :exclude-members: "
                f"{', '.join(is_needed)}\n\n   :doc:`settings` tells types, ranges and defaults."
            )
        elif inspect.isclass(value):
            fields = ", ".join(getattr(value, "_fields", ()))  # of a named tuple, which its docstring tells
            without = f"\n   :exclude-members: {fields}" if fields else ""
            parts.append(f".. autoclass:: {module}.{name}{again}\n   :members:{without}")
        elif inspect.isfunction(value) or type(value).__module__.startswith("matchai."):  # or an object that is called
            parts.append(f".. autofunction:: {module}.{name}{again}")
        elif inspect.ismodule(value) and value.__name__.startswith("matchai."):
            parts += [heading(value.__name__, "-"), f".. automodule:: {value.__name__}\n   :members:\n   :no-index:"]
        elif name in constants:
            told = f"\n   :value: {value!r}" if isinstance(value, str | int | float) else ""
            parts.append(f".. py:data:: {module}.{name}{again}{told}\n\n   {escape(constants[name])}")
    return "\n\n".join(parts) + "\n"


def constant_docs(found: types.ModuleType) -> dict[str, str]:
    """The docstrings under the constants of a wing's modules."""
    docs = {}
    for _, name, _ in pkgutil.iter_modules(getattr(found, "__path__", ()), f"{found.__name__}."):
        analyzer = ModuleAnalyzer.for_module(name)
        analyzer.analyze()
        docs |= {what: " ".join(lines).strip() for (owner, what), lines in analyzer.attr_docs.items() if not owner}
    return docs


def first_to_hand_on(value: Any) -> str:
    """The module whose page indexes a function or class: the first of those that hand it on."""
    for module in (*STABLE, *WINGS):
        found = importlib.import_module(module)
        if any(getattr(found, name) is value for name in found.__all__):
            return module
    raise LookupError(value)


def heading(text: str, line: str) -> str:
    """A title in reStructuredText."""
    return f"{text}\n{line * len(text)}"


def escape(text: str) -> str:
    """Text whose single backticks mark code and whose signs are meant as they stand."""
    return re.sub(r"(?<!\w)\*|[|]", lambda sign: f"\\{sign[0]}", text)


ELSEWHERE = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=["'](?:https?:)?//""")

COLON = "\ue000"
"""Stands for a colon while napoleon reads, which takes what is before it for an attribute's type."""


def hide_colon(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Keeps "Folder (default: x)" in an attribute's docstring from being read as the type "Folder (default"."""
    if what in ("attribute", "data", "property") and lines:
        lines[0] = lines[0].replace(":", COLON)


def tell_of_class(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Adds to an object that is called, such as `collate`, what its class tells of arguments and errors."""
    if what == "function" and not inspect.isroutine(value):
        lines += ["", *prepare_docstring(str(type(value).__doc__))]


def escape_docstring(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Keeps `|P ∩ T|` in docstrings from being read as a substitution."""
    lines[:] = [line if line.lstrip().startswith((">>>", "...")) else line.replace("|", "\\|") for line in lines]
    lines[:] = [line.replace(COLON, ":") for line in lines]


def draw_dashes(app: Any, tree: Any) -> None:
    """Writes a dash where Sphinx puts two hyphens between a parameter and what it is."""
    for text in [node for node in tree.findall(docutils.nodes.Text) if node == " -- "]:
        text.parent.replace(text, docutils.nodes.Text(" – "))


def refuse_elsewhere(app: Any, error: Exception | None) -> None:
    """Ends the build with an error where a page loads a script, a style or a picture from another place."""
    if error is None:
        pages = [path for path in sorted(Path(app.outdir).rglob("*.html")) if ELSEWHERE.search(path.read_text("utf-8"))]
        if pages:
            raise ExtensionError(f"These pages would not open offline: {', '.join(map(str, pages))}")


def setup(app: Any) -> dict[str, bool]:
    """Tells Sphinx when to call what."""
    app.connect("builder-inited", generate)
    app.connect("autodoc-process-docstring", hide_colon, priority=400)  # before napoleon, which takes 500
    app.connect("autodoc-process-docstring", tell_of_class, priority=400)
    app.connect("autodoc-process-docstring", escape_docstring, priority=600)
    app.connect("doctree-read", draw_dashes)
    app.connect("build-finished", refuse_elsewhere)
    return {"parallel_read_safe": True}
