"""What hangs on the autograd graph of a loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from zest_fast.foundation.torch_private import python_function


class OtherGradients(AbstractContextManager["OtherGradients"]):
    """The ``.grad`` of tensors that are not a model's own, out of the way of a backward pass and put back after it.

    Args:
        own: parameters of the model, which are left alone.
    """

    def __init__(self, own: Iterable[Tensor]) -> None:
        self._own = {id(p) for p in own}
        self._gradients: dict[int, tuple[Tensor, Tensor | None]] = {}

    def set_aside(self, roots: Iterable[Any]) -> None:
        """Those of the leaves in the graphs of these tensors: what reentrant checkpointing hides shows only later."""
        for root in roots:
            if not isinstance(root, Tensor):
                continue
            for key, leaf in leaves_of(root)[0].items():
                if key not in self._own and key not in self._gradients:
                    self._gradients[key] = (leaf, leaf.grad)
                    leaf.grad = None

    def __exit__(self, *exception: object) -> None:
        for leaf, gradient in self._gradients.values():
            leaf.grad = gradient


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
    found = (python_function(node) for node in _nodes(loss))
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
