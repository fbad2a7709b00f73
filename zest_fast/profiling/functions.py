"""What a user's functions refer to and look at, as far as reading them tells."""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

from torch import nn

from zest_fast.foundation.torch_private import forward_hooks, forward_pre_hooks

_LIBRARIES = ("torch", "transformers", "peft", "diffusers", "timm", "accelerate", "builtins", "zest_fast")
"""Packages whose forward passes neither look at flags, draw from generators of their own nor write into weights."""
_READING = ("numpy", "scipy", "einops", "sklearn")
"""Packages that get no parameter to write into."""
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_WRITING = {"data", "step", "load_state_dict", "vector_to_parameters", "swap_tensors", "copyto"}


def referred(functions: Iterable[Any]) -> Iterator[FunctionType]:
    """These functions (methods, partial ones, callable objects) and those that they hold or name, each once.

    Of an object that they hold, the functions of its class; of a module, also those of its submodules.
    """
    seen: set[Any] = set()
    classes: set[type] = set()
    todo = list(functions)
    while todo:
        value = todo.pop()
        if isinstance(value, nn.Module):
            todo += forwards_of(value.modules())
            continue
        function = _plain(value)
        if function is None:
            kind = value if isinstance(value, type) else type(value)
            if kind not in classes and not _is_library(kind.__module__):
                classes.add(kind)
                todo += _functions_of(kind)
            continue
        if function in seen or _is_library(function.__module__):
            continue
        seen.add(function)
        yield function
        todo += values_in(function)


def values_in(function: FunctionType) -> list[Any]:
    """What a function holds in its closure and defaults, and the globals that its code names."""
    names = _read(function.__code__).names
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
    return _read(function.__code__).attributes


def may_write(functions: Iterable[FunctionType], modules: Iterable[nn.Module]) -> bool:
    """Whether one of these functions or modules may write into a tensor in place, as far as reading them tells.

    True also for what only looks like it (``x += 1``), and for code in a package that is not known here.
    """
    embeddings = (m for m in modules if isinstance(m, _EMBEDDINGS))
    if any(m.max_norm is not None for m in embeddings):
        return True
    return any(_read(function.__code__).writes or any(map(_is_unknown, values_in(function))) for function in functions)


def _is_unknown(value: Any) -> bool:
    if not isinstance(value, ModuleType):
        return False
    root = value.__name__.partition(".")[0]
    return root not in sys.stdlib_module_names and root not in _READING and not _is_library(root)


def forwards_of(modules: Iterable[nn.Module]) -> Iterator[Callable[..., Any]]:
    """The functions of the modules' classes that a call may run, but for those of libraries."""
    kinds: dict[type, bool] = {}  # and whether they are of a library
    for module in modules:
        kind = type(module)
        if kind not in kinds:
            kinds[kind] = _is_library(kind.__module__)
        if "forward" in vars(module):
            yield vars(module)["forward"]
        if not kinds[kind]:  # which may hold functions of its user
            yield from (value for value in vars(module).values() if callable(value) and not isinstance(value, type))
    classes = {base for kind in kinds for base in kind.__mro__ if not _is_library(base.__module__)}
    for kind in classes:
        yield from _functions_of(kind)


def _functions_of(kind: type) -> list[FunctionType]:
    values = (getattr(value, "__func__", value) for value in vars(kind).values())  # of static and class methods
    return [value for value in values if isinstance(value, FunctionType)]


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


@functools.lru_cache(maxsize=4096)
def _is_library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _LIBRARIES


class _Read(NamedTuple):
    """What code does, with the functions inside of it."""

    attributes: frozenset[str]
    """Names of the attributes that it reads."""
    names: frozenset[str]
    """Names of the globals that it reads."""
    writes: bool
    """Whether it may write into a tensor: methods that end with _, ``.data``, ``out=``, assignments to parts."""


@functools.lru_cache(maxsize=4096)
def _read(code: CodeType) -> _Read:
    attributes: set[str] = set()
    names: set[str] = set()
    writes = False
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            attributes.add(step.argval)
        elif step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names.add(step.argval)
        elif step.opname == "STORE_SUBSCR" or step.opname.startswith("INPLACE_"):
            writes = True
        elif step.opname == "BINARY_OP":
            writes = writes or step.argrepr.endswith("=")
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner = _read(constant)
            attributes |= inner.attributes
            names |= inner.names
            writes = writes or inner.writes
        elif isinstance(constant, tuple):  # names of keyword arguments, among others
            writes = writes or "out" in constant
    return _Read(frozenset(attributes), frozenset(names), writes or any(map(_names_a_write, attributes | names)))


def _names_a_write(name: str) -> bool:
    in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
    return in_place or name.startswith("_foreach") or name in _WRITING
