"""What the user points at by a string: `module:function` references and paths."""

from __future__ import annotations

import importlib
import importlib.machinery
import inspect
import pkgutil
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from zest_fast.foundation.nearest import nearest

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


def find_function(reference: str) -> Callable[..., Any]:
    """The function that `module:function` names.

    What is installed goes before the current folder, which is importable only while the module is imported (see
    current_folder_last). A UserWarning says which of two modules of the same name was taken.
    Raises ValueError where there is no such module or function and where it ends Python instead of being imported,
    TypeError where it is no function. What the user's code raises passes through unchanged.
    """
    module_name, _, name = reference.partition(":")
    with current_folder_last():
        importlib.invalidate_caches()
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise  # the module is there, but one of its own imports is not
            taken = _taken_instead(module_name)
            raise ValueError(
                f"{reference!r}: no module named {error.name!r}; "
                + (taken or nearest(error.name, _siblings(error.name)))
            ) from None
        except SystemExit as error:
            raise ValueError(f"{reference!r}: {_ended(error)} while it was imported") from error
        taken = _taken_instead(module_name)
    if not hasattr(module, name):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{reference!r}: {module_name} has no function {name!r}; {taken or nearest(name, functions)}")
    if taken:
        warnings.warn(f"{reference!r}: {taken}", UserWarning, stacklevel=2)
    function: Callable[..., Any] = getattr(module, name)
    if not callable(function):
        raise TypeError(f"{reference!r} is a {type(function).__name__}; it has to be a function")
    return function


def load_function(reference: str) -> Callable[[], Any]:
    """The function that `module:function` names, to be called without arguments.

    As find_function; the current folder is importable while the function runs, too. Raises TypeError where it cannot be
    called without arguments, ValueError where it ends Python instead of returning.
    """
    function = find_function(reference)
    if needed := _needed(function):
        raise TypeError(f"{reference!r} needs {', '.join(needed)}; it has to be a function without arguments")

    def call() -> Any:
        with current_folder_last():
            try:
                return function()
            except SystemExit as error:
                raise ValueError(f"{reference!r}: {_ended(error)} instead of returning") from error

    return call


@contextmanager
def current_folder_last() -> Iterator[None]:
    """The current folder at the end of sys.path, unless it is on it already (`python -c`, PYTHONPATH).

    For as long as code of the user's may import what lies beside it, and processes may be started that unpickle it.
    """
    folder = str(Path.cwd())
    if any(Path(entry).absolute() == Path(folder) for entry in sys.path if isinstance(entry, str)):
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        with suppress(ValueError):  # the user's code removed it itself
            sys.path.remove(folder)


def _taken_instead(module_name: str) -> str:
    """Which module was taken where another one of its name lies in the current folder, too; "" where none does."""
    top = module_name.partition(".")[0]
    here = importlib.machinery.PathFinder.find_spec(top, [str(Path.cwd())])
    module = sys.modules.get(top)
    spec = getattr(module, "__spec__", None)
    if here is None or module is None or spec is None:
        return ""
    folders = [Path(folder).absolute() for folder in here.submodule_search_locations or ()]
    if here.origin is None:  # a folder without __init__.py: meant only if it holds what was asked for
        inside = Path(*module_name.split(".")[1:])
        holds = inside.parts and any(
            (folder / inside).is_dir() or (folder / inside).with_suffix(".py").is_file() for folder in folders
        )
        taken = {Path(folder).absolute() for folder in spec.submodule_search_locations or ()}
        if not holds or taken & set(folders):
            return ""
    elif spec.origin is not None and Path(spec.origin).absolute() == Path(here.origin).absolute():
        return ""
    mine = here.origin or folders[0]
    return f"{top!r} was taken from {spec.origin or 'a package'}, not from {mine}; rename yours to use it"


def _needed(function: Callable[..., Any]) -> list[str]:
    """Parameters that a call without arguments leaves open."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C
        return []
    return [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]


def _ended(error: SystemExit) -> str:
    return f"it called sys.exit({'' if error.code is None else repr(error.code)})"


def _siblings(module_name: str) -> list[str]:
    """Names that could stand in the place of `module_name`: in its package, or in the current folder."""
    package, _, _ = module_name.rpartition(".")
    if package:
        search = getattr(sys.modules.get(package), "__path__", [])
        return [f"{package}.{entry.name}" for entry in pkgutil.iter_modules(search)]
    return [entry.name for entry in pkgutil.iter_modules([str(Path.cwd())])]
