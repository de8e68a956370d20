"""The command line: one module a verb, with its settings (a dataclass that tyro makes the options from) and ``run``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import ComcatError, nearest
from ..files import home_path
from ..settings import LARGEST_SEED, expect

VERBS = {
    "inspect": ("judge.inspect:Inspect", "what of a model can shrink, and what cannot and why"),
    "compress": ("shrink.compress:Compress", "make a model smaller and faster"),
    "explore": ("shrink.explore:Explore", "every budget of a model on a page with a slider"),
    "merge": ("shrink.merge:Merge", "run a model's blocks on fewer tokens"),
    "prune": ("shrink.prune:Prune", "prune channels while the model is trained"),
    "search": ("shrink.search:Search", "find the ranks of a plan by search on training pictures"),
    "tune": ("shrink.tune:Tune", "win back by training what compression lost"),
    "eval": ("judge.evaluate:Eval", "accuracy of a model, and agreement with another"),
    "export": ("export:Export", "write a model as a file that another runtime loads"),
    "import": ("importing:Import", "what the paper's published code has written, as files of ours"),
    "bench": ("judge.bench:Bench", "time a model, beside another in one interleaved run"),
    "customize": ("personal.customize:Customize", "teach a text-to-image pipeline a concept"),
    "generate": ("personal.generate:Generate", "pictures from prompts, with adapters"),
    "score": ("judge.score:Score", "measure generated pictures: KID, FID, CLIP-I, CLIP-T, DINO"),
    "demo": ("demo:Demo", "see it work without any download"),
}
"""Verb → module of this package and settings in it, and what the verb does."""

USAGE = (
    "usage: comcat VERB [options]\n\nAttention-based vision models, smaller, faster and personal.\n\n{}\n\nThe "
    "options of a verb: comcat VERB --help"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status. What a user can cause is told in one line, without a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] not in VERBS:
        return _without_a_verb(arguments)
    from .terminal import plain_warnings

    try:
        with plain_warnings():
            command = _parsed(arguments)
            return import_module(type(command).__module__).run(_at_home(command))
    except ComcatError as error:
        print(f"comcat: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:  # a long run says how far it came
        how = f" {error}; the same command goes on from there" if str(error) else "; nothing was left half-written"
        print(f"comcat: interrupted{how}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        with suppress(Exception):
            sys.stdout.close()
        return 141


def _without_a_verb(arguments: Sequence[str]) -> int:
    """Usage, the version, or what is wrong: nothing here imports more than it needs to be said at once."""
    usage = USAGE.format("\n".join(f"  {verb:<10} {about}" for verb, (_, about) in VERBS.items()))
    first = arguments[0] if arguments else None
    if first == "--version":
        print(f"comcat {__version__}")
    elif first in ("-h", "--help"):
        print(usage)
    elif first is None:
        print(usage, file=sys.stderr)
    else:
        known = f"expected one of {', '.join(VERBS)}{nearest(first, VERBS)}"
        print(f"comcat: got {first!r}, {known}", file=sys.stderr)
    return 0 if first in ("--version", "-h", "--help") else 2


def _parsed(arguments: list[str]) -> Any:
    """The settings of the verb that the arguments begin with, ``--recipe`` read in."""
    import tyro

    from .recipes import with_recipe

    verb, settings = arguments[0], settings_of(arguments[0])
    command = tyro.cli(settings, args=with_recipe(arguments, {verb: settings})[1:], prog=f"comcat {verb}")
    if hasattr(command, "seed"):
        expect(command, "seed", least=0, most=LARGEST_SEED)
    return command


def _at_home(command: Any) -> Any:
    """A command with ``~`` in its paths written out; a shell leaves it in ``--out=~/small``."""
    paths = {f.name: getattr(command, f.name) for f in fields(command) if isinstance(getattr(command, f.name), Path)}
    return replace(command, **{name: home_path(path) for name, path in paths.items()})


def settings_of(verb: str) -> type:
    """The settings of a verb. Its module imports nothing heavy before it runs."""
    module, name = VERBS[verb][0].split(":")
    return getattr(import_module(f".{module}", __name__), name)
