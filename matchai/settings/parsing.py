"""Settings from the command line and YAML files, and back.

Precedence: default < preset < `--config` file < flag; the last of a repeated flag wins. Neither this module nor
`matchai.settings.config` imports torch or numpy, so that `--help` answers at once.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from matchai.settings.config import COMMON, LEAVES, PLACE, PRESETS, TrainConfig, ungrouped
from matchai.settings.help import asks_for_help, read_flags
from matchai.system import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound=TrainConfig)
Plain = TypeVar("Plain", bound="DataclassInstance")


def parse(argv: list[str], description: str, prog: str, kind: type[Settings], *, first_look: str = "quick") -> Settings:
    """Reads a command line; prints and exits with status 0 if it asks for help, with 2 for a wrong flag.

    Args:
        argv: The words after the command.
        description: What help says first.
        prog: The command.
        kind: The settings that it takes: `TrainConfig`, or one with more groups.
        first_look: The preset without --data.

    Raises:
        InputError: For a --config file that cannot be used, with every problem in it.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("config", "preset", "data"):
        first.add_argument(f"--{name}", nargs="?")
    known = first.parse_known_args(argv)[0]
    data = None if known.data == "None" else known.data
    try:
        settings = load(Path(known.config)) if known.config else {}
    except InputError:
        if not asks_for_help(argv):
            raise
        settings = {}
    base = preset_config(settings, preset=known.preset, data=data, first_look=first_look)
    kinds: dict[str, Any] = {group.name: group.type for group in dataclasses.fields(kind)}
    groups = [group.name for group in dataclasses.fields(TrainConfig)]
    default = kind(**{name: kinds[name](**vars(getattr(base, name))) for name in groups})
    return read_flags(argv, description, prog, kind, default, rare=LEAVES.keys() - COMMON)


def parse_settings(argv: list[str] | None, description: str, prog: str, kind: type[Plain]) -> Plain:
    """Reads the command line of a command with settings of its own; a leading `~` of a path is the home folder.

    Args:
        argv: The words after the command; None for those of this process.
        description: What help says first.
        prog: The command.
        kind: A dataclass of settings.
    """
    settings = read_flags(sys.argv[1:] if argv is None else argv, description, prog, kind)
    # shells leave the `~` in words such as --output=~/here
    return dataclasses.replace(settings, **{name: _at_home(value) for name, value in vars(settings).items()})


def _at_home(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_at_home(item) for item in value)
    return value.expanduser() if isinstance(value, Path) and value.parts[:1] == ("~",) else value


def given(argv: list[str]) -> list[str]:
    """The settings that a command line which was parsed well gives as flags, by their names."""
    words = [word[2:].split("=")[0].replace("-", "_") for word in argv if word.startswith("--")]
    return [name for name in LEAVES if name in words or f"no_{name}" in words]


def preset_config(
    settings: dict[str, Any], *, preset: str | None = None, data: str | None = None, first_look: str = "quick"
) -> TrainConfig:
    """The preset that `settings` and the two flags imply, with `settings` over it.

    Args:
        settings: Settings under their names, as a file holds them.
        preset: The preset asked for by flag; wins over `settings`.
        data: The data folder asked for by flag.
        first_look: The preset without data.

    Raises:
        InputError: For unknown names and wrong types in `settings`.
    """
    has_data = data is not None or settings.get("data") is not None
    name = preset or settings.get("preset") or ("recipe" if has_data else first_look)
    # An unknown name is left to the parser, which lists the right ones.
    base = TrainConfig().updated(**PRESETS.get(name, {}))
    return base.updated_from({**settings, "preset": name if name in PRESETS else "recipe"}, "")


_MERGE = "tag:yaml.org,2002:merge"


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, of which YAML would silently keep the last."""

    merged: frozenset[int] = frozenset()

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        self.merged = frozenset() if node is None else frozenset(_sources_of_merges(node, set()))
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # what is merged somewhere, `common: &common {...}` with `<<: *common`, is there for that alone
        node.value = [pair for pair in node.value if pair[0].tag == _MERGE or id(pair[1]) not in self.merged]
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value if key.tag != _MERGE]
        for key in keys:
            if keys.count(key) > 1:
                raise InputError(f"{key} is given twice; keep one.")
        return super().construct_mapping(node, deep)


def _sources_of_merges(node: yaml.Node, seen: set[int]) -> Iterator[int]:
    """The identities of all nodes that some mapping merges."""
    if id(node) in seen or isinstance(node, yaml.ScalarNode):
        return
    seen.add(id(node))
    for one in node.value:
        key, value = one if isinstance(node, yaml.MappingNode) else (None, one)
        if key is not None and key.tag == _MERGE:
            yield from map(id, value.value if isinstance(value, yaml.SequenceNode) else [value])
        yield from _sources_of_merges(value, seen)


def load(path: Path) -> dict[str, Any]:
    """Reads a YAML file of settings under their flat names; what a run recorded of itself is left out.

    Raises:
        InputError: If the file is missing, no YAML mapping, or holds an unknown name or a value of a wrong type.
    """
    content = load_mapping(path, "--config", "settings")
    content.pop("recorded", None)
    content = ungrouped(content, f"{path}: ")
    TrainConfig().updated_from(content, f"{path}: ")
    return content


def load_mapping(path: Path, flag: str, what: str) -> dict[str, Any]:
    """Reads a YAML file that holds a mapping; {} for an empty one.

    Args:
        path: The file.
        flag: The flag that named it, for errors.
        what: What the file holds, for errors.

    Raises:
        InputError: If the file is missing or holds anything else.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except OSError as error:
        way = "its permissions" if isinstance(error, PermissionError) else flag
        raise InputError(f"{path}: the file of {what} cannot be read ({error.strerror}); check {way}.") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a text file; {flag} takes a YAML file of {what}.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "not readable as YAML"
        raise InputError(f"{path}{line}: {reason}; write one `name: value` a line, indented with spaces.") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path} holds a value that YAML cannot read; write one `name: value` a line.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {type(content).__name__}, but {what} are a mapping: one `name: value` a line.")
    return content


def load_recorded(path: Path) -> dict[str, Any]:
    """What a run recorded of itself in its config.yaml: data, versions, precision."""
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    recorded: dict[str, Any] = content.get("recorded", {})
    return recorded


def dump(config: TrainConfig, recorded: dict[str, Any]) -> str:
    """The settings as YAML that `load` reads back, grouped, with what the run recorded of itself at the end."""
    parts = ["# A matchai run. `--config` with this file repeats it; a flag wins over a line here."]
    for group in dataclasses.fields(TrainConfig):
        settings = getattr(config, group.name)
        values = {
            leaf.name: _plain(getattr(settings, leaf.name))
            for leaf in dataclasses.fields(settings)
            if leaf.name not in PLACE
        }
        parts.append(f"# {str(type(settings).__doc__).splitlines()[0]}\n{_yaml(values)}")
    parts.append(f"# What was found when it ran; not read back.\n{_yaml({'recorded': recorded})}")
    return "\n".join(parts)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def _yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110, default_flow_style=False)
