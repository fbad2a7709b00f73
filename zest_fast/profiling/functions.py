"""What a user's functions refer to and look at, as far as reading them tells."""

from __future__ import annotations

import dis
import functools
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from zest_fast.foundation.torch_private import forward_hooks, forward_pre_hooks

_LIBRARIES = ("torch", "transformers", "peft", "diffusers", "timm", "accelerate", "builtins", "zest_fast")
"""Packages whose forward passes neither look at flags nor draw from generators of their own."""


def referred(functions: Iterable[Any]) -> Iterator[FunctionType]:
    """These functions (methods, partial ones, callable objects) and those that they hold or name, each once."""
    seen: set[Any] = set()
    todo = list(functions)
    while todo:
        function = _plain(todo.pop())
        if function is None or function in seen or _is_library(function.__module__):
            continue
        seen.add(function)
        yield function
        todo += values_in(function)


def values_in(function: FunctionType) -> list[Any]:
    """What a function holds in its closure and defaults, and the globals that its code names."""
    names = _names(function.__code__)[1]
    values = [function.__globals__[name] for name in names if name in function.__globals__]
    values += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # a variable that was not assigned yet
            continue
    return values


def attributes_read(function: FunctionType) -> frozenset[str]:
    """Names of attributes in a function's code; one that is put together at run time is not found."""
    return _names(function.__code__)[0]


def forwards_of(modules: Iterable[nn.Module]) -> Iterator[Callable[..., Any]]:
    """The functions of the modules' classes that a call may run, but for those of libraries."""
    classes: set[type] = set()
    for module in modules:
        if "forward" in vars(module):
            yield vars(module)["forward"]
        classes.update(kind for kind in type(module).__mro__ if not _is_library(kind.__module__))
    for kind in classes:
        yield from (value for value in vars(kind).values() if isinstance(value, FunctionType))


def hooks_of(modules: Iterable[nn.Module]) -> Iterator[Callable[..., Any]]:
    """Their forward hooks and pre-hooks."""
    for module in modules:
        yield from forward_hooks(module).values()
        yield from forward_pre_hooks(module).values()


def _plain(function: Any) -> FunctionType | None:
    """The Python function behind a callable."""
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, nn.Module | type):
        return None
    function = getattr(function, "__func__", function)
    if not isinstance(function, FunctionType):
        function = vars(type(function)).get("__call__")  # what an object does when it is called
    return function if isinstance(function, FunctionType) else None


def _is_library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _LIBRARIES


@functools.lru_cache(maxsize=4096)
def _names(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Attributes and globals that code reads, with the functions inside of it."""
    attributes: set[str] = set()
    globals_read: set[str] = set()
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            attributes.add(step.argval)
        elif step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            globals_read.add(step.argval)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            more = _names(inner)
            attributes |= more[0]
            globals_read |= more[1]
    return frozenset(attributes), frozenset(globals_read)
