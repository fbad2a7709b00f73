"""Whether an activation depends on something that trains; the tensors in the arguments of a module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

_DEEPEST = 6  # a cache of keys and values: arguments, cache, its layers, a layer, its attributes, a tensor


def trains(tensor: Tensor) -> bool:
    """Whether backward from `tensor` would reach a parameter, and not merely an input that requires a gradient."""
    pending, seen = [tensor.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(getattr(node, "variable", None), nn.Parameter):
            return True
        pending += [parent for parent, _ in node.next_functions]
    return False


def tensors_in(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """The tensors in the arguments or the output of a module: in containers, and in the attributes of objects."""
    if isinstance(value, Tensor):
        yield value
    elif depth < _DEEPEST:
        for part in _parts(value):
            yield from tensors_in(part, depth + 1)


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        yield from value
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type) and not callable(value):
        yield from vars(value).values()
