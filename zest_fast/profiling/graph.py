"""What hangs on the autograd graph of a loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


@contextmanager
def gradients_of_others(loss: Tensor, parameters: list[Tensor]) -> Iterator[None]:
    """Tensors that a closure brings along (inputs, another model's weights) keep the .grad that they have."""
    own = {id(p) for p in parameters}
    others = [(leaf, leaf.grad) for key, leaf in leaves_of(loss)[0].items() if key not in own]
    for leaf, _ in others:
        leaf.grad = None
    try:
        yield
    finally:
        for leaf, grad in others:
            leaf.grad = grad


def leaves_of(loss: Tensor) -> tuple[dict[int, Tensor], bool]:
    """Leaf tensors (by id) in the graph of a loss, and whether reentrant checkpointing hides a part of it."""
    leaves: dict[int, Tensor] = {}
    opaque = False
    for node in _nodes(loss):
        opaque = opaque or node.name() == "CheckpointFunctionBackward"
        if hasattr(node, "variable"):
            leaves[id(node.variable)] = node.variable
    return leaves, opaque


def custom_functions(loss: Tensor) -> list[str]:
    """Names of the autograd functions in the graph of a loss that are written in Python, by others than torch."""
    found = (getattr(type(node), "_forward_cls", None) for node in _nodes(loss))
    return sorted({f.__name__ for f in found if f is not None and f.__module__.partition(".")[0] != "torch"})


def _nodes(loss: Tensor) -> Iterator[Any]:
    seen: set[Any] = set()
    todo: list[Any] = [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        todo += [next_node for next_node, _ in node.next_functions]
