"""What the user points at by a string: `module:function` references and paths."""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from zest_fast.profiling.nearest import nearest

_REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_reference(source: str) -> bool:
    """Whether `source` reads as `module:function` (and is no path that exists)."""
    return _REFERENCE.fullmatch(source) is not None and not Path(source).exists()


def nearest_path(path: Path, candidates: Iterable[Path] | None = None) -> str:
    """Like `nearest`, for a path that does not exist: among `candidates`, or what its first existing parent holds."""
    parent = path.parent
    while not parent.is_dir():
        parent = parent.parent
    wrong = path.relative_to(parent).parts[0]
    there = parent.iterdir() if candidates is None else candidates
    return f"{nearest(wrong, (entry.name for entry in there if not entry.name.startswith('.')))} in {str(parent)!r}"


def load_function(reference: str) -> Callable[[], Any]:
    """The function that `module:function` names; the current folder is importable, as with `python -m`.

    Raises ValueError where there is no such module or function, TypeError where it cannot be called. What the
    module itself raises while it is imported passes through unchanged.
    """
    module_name, _, name = reference.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, but one of its own imports is not
        raise ValueError(
            f"{reference!r}: no module named {error.name!r}; {nearest(error.name, _siblings(error.name))}"
        ) from None
    if not hasattr(module, name):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{reference!r}: {module_name} has no function {name!r}; {nearest(name, functions)}")
    function = getattr(module, name)
    if not callable(function):
        raise TypeError(f"{reference!r} is a {type(function).__name__}; it has to be a function without arguments")
    return function


def _siblings(module_name: str) -> list[str]:
    """Names that could stand in the place of `module_name`: in its package, or in the current folder."""
    package, _, _ = module_name.rpartition(".")
    if package:
        search = getattr(sys.modules.get(package), "__path__", [])
        return [f"{package}.{entry.name}" for entry in pkgutil.iter_modules(search)]
    return [entry.name for entry in pkgutil.iter_modules([str(Path.cwd())])]
