"""The command line: one module a verb, with its settings (a dataclass that tyro makes the options from) and ``run``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import ComcatError, SettingsError

VERBS = {
    "inspect": "inspect:Inspect",
    "compress": "compress:Compress",
    "search": "search:Search",
    "tune": "tune:Tune",
    "eval": "evaluate:Eval",
    "bench": "bench:Bench",
    "customize": "customize:Customize",
    "generate": "generate:Generate",
    "score": "score:Score",
    "demo": "demo:Demo",
}
"""Verb → module of this package and settings in it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. Errors that a user can cause are told in one line, without a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["--version"]:
        from .._version import __version__

        print(f"comcat {__version__}")
        return 0
    from tyro.extras import subcommand_cli_from_dict

    from .recipes import with_recipe

    try:
        commands = {verb: settings_of(verb) for verb in VERBS}
        command = subcommand_cli_from_dict(
            commands,
            args=with_recipe(arguments, commands),
            prog="comcat",
            description="Attention-based vision models, smaller, faster and personal.",
        )
        if not 0 <= getattr(command, "seed", 0) < 2**63:
            raise SettingsError(f"got --seed {command.seed}, expected a whole number from 0 to 2^63 - 1")
        return import_module(type(command).__module__).run(_at_home(command))
    except ComcatError as error:
        print(f"comcat: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("comcat: interrupted; nothing was left half-written", file=sys.stderr)
        return 130
    except BrokenPipeError:
        with suppress(Exception):
            sys.stdout.close()
        return 141


def _at_home(command: Any) -> Any:
    """A command with ``~`` in its paths written out; a shell leaves it in ``--out=~/small``."""
    paths = {f.name: getattr(command, f.name) for f in fields(command) if isinstance(getattr(command, f.name), Path)}
    return replace(command, **{name: path.expanduser() for name, path in paths.items()})


def settings_of(verb: str) -> type:
    """The settings of a verb. Its module imports nothing heavy before it runs."""
    module, name = VERBS[verb].split(":")
    return getattr(import_module(f".{module}", __name__), name)
