"""Which attributes a user's code looks at, as far as reading its bytecode tells."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

_LIBRARIES = ("torch", "transformers", "peft", "diffusers", "timm", "accelerate", "builtins", "zest_fast")
"""Packages whose losses do not depend on flags and whose forward passes do not write behind autograd's back."""


def attributes_read(roots: Iterable[Any]) -> Iterator[frozenset[str]]:
    """Names of attributes in each of these functions, and in those that they hold or name.

    A name that is put together at run time is not found.
    """
    seen: set[Any] = set()
    todo = list(roots)
    while todo:
        function = _plain(todo.pop())
        if function is None or function.__code__ in seen or _library(function.__module__):
            continue
        seen.add(function.__code__)
        attributes, globals_read = _names(function.__code__)
        yield attributes
        todo += [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        todo += [function.__globals__[name] for name in globals_read if name in function.__globals__]


def forward_functions(modules: Iterable[nn.Module]) -> Iterator[Any]:
    """The code that a call of these modules runs, but for that of libraries."""
    classes: set[type] = set()
    for module in modules:
        if "forward" in vars(module):
            yield vars(module)["forward"]
        classes.add(type(module))
    for kind in classes:
        for base in kind.__mro__:
            if not _library(base.__module__):
                yield from (f for f in vars(base).values() if callable(f))


def hook_functions(modules: Iterable[nn.Module]) -> Iterator[Any]:
    """Forward hooks and pre-hooks of these modules."""
    for module in modules:
        yield from module._forward_hooks.values()
        yield from module._forward_pre_hooks.values()


def _plain(function: Any) -> types.FunctionType | None:
    """The Python function behind a callable."""
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, nn.Module | type):
        return None
    function = getattr(function, "__func__", function)
    if not isinstance(function, types.FunctionType):
        function = vars(type(function)).get("__call__")  # what an object does when it is called
    return function if isinstance(function, types.FunctionType) else None


def _library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _LIBRARIES


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # not assigned yet
        return False


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Attributes and globals that code reads, with the functions inside of it."""
    attributes: set[str] = set()
    globals_read: set[str] = set()
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            attributes.add(step.argval)
        elif step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            globals_read.add(step.argval)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            more = _names(inner)
            attributes |= more[0]
            globals_read |= more[1]
    return frozenset(attributes), frozenset(globals_read)
