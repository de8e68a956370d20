"""Names of a package that are imported when they are first asked for.

What the package's settings alone are read for, such as the options of a command line, is then there at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def attributes_of(package: str, where: Mapping[str, str]) -> Callable[[str], Any]:
    """A ``__getattr__`` for a package: ``where`` says in which of its modules each public name is.

    The name stays in the package once it was asked for, in place of a module of the same name.
    """

    def attribute(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f".{where[name]}", package), name)
        setattr(sys.modules[package], name, value)
        return value

    return attribute
