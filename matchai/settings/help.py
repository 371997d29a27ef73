"""From a dataclass of settings to flags and their help, which fills the terminal's width and tells common flags first.

Like `matchai.settings.config`, it imports neither torch nor numpy, so that `--help` answers at once.
"""

import ast
import dataclasses
import functools
import inspect
import io
import itertools
import re
import shutil
import sys
import textwrap
from collections.abc import Collection, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from matchai.settings.names import nearest
from matchai.system import Problems

Kind = TypeVar("Kind")


def asks_for_help(argv: Collection[str]) -> bool:
    """Whether a command line asks for help instead of work."""
    return not {"-h", "--help", "--help-all"}.isdisjoint(argv)


def read_flags(
    argv: list[str],
    description: str,
    prog: str,
    kind: type[Kind],
    default: Kind | None = None,
    rare: Collection[str] = (),
) -> Kind:
    """Reads a command line; prints and exits with status 0 if it asks for help, with 2 for a wrong flag.

    Args:
        argv: The words after the command.
        description: What help says first.
        prog: The command.
        kind: The dataclass of settings: flat, or one level of groups.
        default: The settings without flags, if those of `kind` do not serve.
        rare: Settings that --help leaves to --help-all.
    """
    options: dict[str, Any] = {} if default is None else {"default": default}
    options |= {"prog": prog, "description": description, "config": (tyro.conf.OmitArgPrefixes,)}
    if not asks_for_help(argv):
        _refuse_other_names(argv, _names(kind))
        settings: Kind = tyro.cli(kind, args=argv, registry=_registry(), **options)
        return settings
    rare = () if "--help-all" in argv else rare
    page = _Page()
    with redirect_stdout(page), suppress(SystemExit):
        tyro.cli(kind, args=["--help"], registry=_registry(rare), **options)
    usage, _, rest = page.getvalue().partition("\n")
    usage = re.sub(r"\x1b\[[\d;]*m", "", usage)  # styles have no width
    text = f"{_fill(usage)}\n{rest.replace(description, _fill(description), 1)}"
    if rare:
        text += f"These are the common settings; --help-all lists all {len(_names(kind))} settings.\n"
    sys.stdout.write(text)
    sys.exit(0)


class _Page(io.StringIO):
    """Keeps what is printed, and looks to tyro like the terminal, so that boxes and colours are as there."""

    def __init__(self) -> None:
        super().__init__()
        self._terminal = sys.stdout

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._terminal.encoding

    def isatty(self) -> bool:
        return self._terminal.isatty()


def _fill(text: str) -> str:
    """Breaks lines at the terminal's width, as tyro does all but the usage and the description."""
    return textwrap.fill(
        text, max(40, shutil.get_terminal_size().columns), break_long_words=False, break_on_hyphens=False
    )


def _names(kind: Any) -> list[str]:
    """The settings of a dataclass and of its groups."""
    fields = dataclasses.fields(kind)
    return [name for one in fields for name in (_names(one.type) if dataclasses.is_dataclass(one.type) else [one.name])]


def _refuse_other_names(argv: Sequence[str], names: Collection[str]) -> None:
    """Refuses flags of another program that mean one of ours; all other wrong ones are left to the parser."""
    flags = [word[2:].split("=")[0] for word in argv if word.startswith("--")]
    known = {*names, *(f"no_{name}" for name in names)}
    strange = [flag for flag in flags if flag.replace("-", "_") not in known]
    meant = [(flag, near) for flag in strange if (near := nearest(flag, names)) is not None]
    Problems(f"There is no --{flag}: did you mean --{near.replace('_', '-')}?" for flag, near in meant).raise_any()


def _registry(rare: Collection[str] = ()) -> ConstructorRegistry:
    """How tyro reads settings: docstrings on one line (it keeps their line breaks), a subclass's own fields first."""
    registry = ConstructorRegistry()

    @registry.struct_rule
    def rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not dataclasses.is_dataclass(info.type):
            return None
        kind: Any = info.type
        own = inspect.get_annotations(kind)
        ordered = sorted(dataclasses.fields(kind), key=lambda field: field.name not in own)
        fields = tuple(_flag(kind, field, info.default, rare) for field in ordered)
        return StructConstructorSpec(instantiate=kind, fields=fields)

    return registry


def _flag(kind: type, field: dataclasses.Field[Any], defaults: Any, rare: Collection[str]) -> StructFieldSpec:
    default = getattr(defaults, field.name, field.default)
    if default is dataclasses.MISSING:
        default = tyro.MISSING
    is_group = dataclasses.is_dataclass(field.type)
    text = " ".join(str(field.type.__doc__).split()) if is_group else docstrings(kind)[field.name]
    marks: list[Any] = [tyro.conf.Suppress] if field.name in rare else []
    if default in (None, ()):
        marks.append(tyro.conf.arg(help_behavior_hint="" if "default:" in text.lower() else "(default: none)"))
    type_: Any = field.type
    for mark in marks:
        type_ = Annotated[type_, mark]
    return StructFieldSpec(name=field.name, type=type_, default=default, helptext=text)


@functools.cache
def docstrings(kind: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, inherited ones too, each on one line."""
    found = {}
    for base in reversed(kind.__mro__[:-1]):
        for pair in itertools.pairwise(_classes(base.__module__)[base.__name__].body):
            match pair:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
    return found


@functools.cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    source = Path(str(sys.modules[module].__file__)).read_text(encoding="utf-8")
    return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
