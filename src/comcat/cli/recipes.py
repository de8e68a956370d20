"""Options from a YAML file, for every verb whose settings have a field ``recipe``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, get_type_hints

from ..errors import SettingsError, nearest
from .common import Positional


def with_recipe(arguments: list[str], commands: Mapping[str, type]) -> list[str]:
    """The arguments with the options of ``--recipe FILE`` put before those given, so that the latter win.

    Positional arguments that a recipe names are used where the command line does not begin with its own.
    """
    settings = commands.get(arguments[0]) if arguments else None
    names = [f.name for f in fields(settings)] if settings is not None else []
    path, given = _take_recipe(arguments[1:])
    if settings is None or "recipe" not in names or path is None:
        return arguments
    hints = {name: hint for name, hint in get_type_hints(settings, include_extras=True).items() if name in names}
    content = _read(Path(path), {name: hint for name, hint in hints.items() if name != "recipe"})
    leading = list(takewhile(lambda a: not a.startswith("-"), given))
    by_hand = {a.split("=")[0].removeprefix("--").replace("-", "_") for a in given if a.startswith("--")}
    replaced = set(settings.ALTERNATIVES) if by_hand & set(settings.ALTERNATIVES) else set()

    positional = [name for name in names if Positional in getattr(hints[name], "__metadata__", ())]
    first = [str(content[name]) for name in positional[len(leading) :] if name in content]
    options = [
        word
        for name, value in content.items()
        if name not in replaced and name not in positional
        for word in _option(name, value, hints[name])
    ]
    return [arguments[0], *leading, *first, *options, *given[len(leading) :], "--recipe", path]


def _take_recipe(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The file after ``--recipe``, and the arguments without it."""
    for i, argument in enumerate(arguments):
        if argument.startswith("--recipe="):
            return argument.split("=", 1)[1], arguments[:i] + arguments[i + 1 :]
        if argument == "--recipe" and i + 1 < len(arguments):
            return arguments[i + 1], arguments[:i] + arguments[i + 2 :]
    return None, arguments


def _read(path: Path, hints: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a file by field name; what is left empty there keeps its default."""
    import yaml

    class Once(yaml.SafeLoader):
        """YAML's reader keeps the last of two options of one name in silence."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            if twice := [name for place, name in enumerate(names) if name in names[:place]]:
                raise SettingsError(f"{path}: {twice[0]!r} is there twice, expected it once")
            return super().construct_mapping(node, deep)

    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise SettingsError(f"no recipe at {str(path)!r}{nearest(path.name, beside)}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), Once)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: expected options by name, got {type(content).__name__}")
    return _checked(path, content, hints, "")


def _checked(path: Path, content: Mapping[Any, Any], hints: Mapping[str, Any], group: str) -> dict[str, Any]:
    """Options by field name; those of a group of settings (``search:``) are a mapping themselves."""
    options = {str(name).replace("-", "_"): value for name, value in content.items() if value is not None}
    for name, value in options.items():
        if name not in hints:
            raise SettingsError(f"{path}: unknown option {group + name!r}{nearest(name, hints)}")
        if is_dataclass(hints[name]):
            if not isinstance(value, dict):
                raise SettingsError(f"{path}: got {group}{name} {value!r}, expected options by name")
            options[name] = _checked(path, value, get_type_hints(hints[name]), f"{group}{name}.")
        elif isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, list | dict) for v in value)):
            raise SettingsError(f"{path}: got {group}{name} {value!r}, expected one value or a list of values")
        elif hints[name] is bool and not isinstance(value, bool):
            raise SettingsError(f"{path}: got {group}{name} {value!r}, expected true or false")
    return options


def _option(name: str, value: Any, hint: Any) -> list[str]:
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        return [word for inner, v in value.items() for word in _option(f"{name}.{inner}", v, hints[inner])]
    flag = name.replace("_", "-")
    if hint is bool and isinstance(value, bool):
        group, dot, last = flag.rpartition(".")
        return [f"--{flag}" if value else f"--{group}{dot}no-{last}"]
    return [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
