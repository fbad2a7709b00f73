"""Where the gradients of a step are read: in ``.grad`` once the user's backward pass is over, and what is not there
then by hooks on the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from zest_fast.foundation.interrupts import HeldInterrupts
from zest_fast.foundation.torch_private import post_accumulate_hooks, run_first
from zest_fast.profiling.layers import Weight
from zest_fast.profiling.processes.local import is_distributed, local_part

Receive = Callable[[Weight, Tensor], None]
Mark = tuple[int, ...] | None
_IN_PARTS = "its gradient arrived in several parts (reentrant checkpointing of a weight with several uses)"


class AccumulatedGradients:
    """``.grad`` of weights as backward passes leave it, before anything clips or unscales it.

    A weight with post-accumulate hooks of its user (an optimizer in the backward pass) is read before these run, since
    they may step and free it.

    Args:
        weights: those that train.
        receive: gets a weight and its accumulated gradient, after each backward pass that changed it.
        averaged: whether ``.grad`` is complete only when the backward pass is over (data parallelism).
        held: gradients that FSDP2 has not reduced yet, and keeps to itself: those of the micro-batches before.
    """

    def __init__(
        self,
        weights: Iterable[Weight],
        receive: Receive,
        averaged: bool,
        held: Callable[[], Iterable[Tensor]] = list,
    ) -> None:
        self._weights = list(weights)
        self._receive = receive
        self._averaged = averaged
        self._held = held
        self._held_before: object = None
        self._running = False
        self._marks: dict[Weight, Mark] = {}
        self._left: dict[Weight, Mark] = {}  # by the last backward pass
        self._read: dict[Weight, int] = {}  # by hooks in this backward pass, and the gradient that was there
        self._handles: dict[Weight, Any] = {}
        self.in_parts: set[Weight] = set()
        """Weights whose gradient was freed before it was complete."""

    def remove(self) -> None:
        """Takes the hooks away."""
        while self._handles:
            self._handles.popitem()[1].remove()

    def _hook(self) -> None:
        """Where its user has hooks now, ours comes first."""
        hooked = [w for w in self._weights if w not in self._handles and post_accumulate_hooks(w.parameter)]
        if not hooked:
            return
        with HeldInterrupts():
            for weight in hooked:
                handle = weight.parameter.register_post_accumulate_grad_hook(self._before_the_users(weight))
                self._handles[weight] = handle
                run_first(post_accumulate_hooks(weight.parameter), handle.id)

    def begin(self) -> None:
        self._hook()
        self._running = True
        self._read.clear()
        self._marks = {weight: _mark(weight.parameter) for weight in self._weights}
        self._held_before = self._mark_of_held()

    def end(self) -> bool:
        """Whether the backward pass added to any of the gradients."""
        self._running = False
        added = bool(self._read) or self._mark_of_held() != self._held_before
        for weight in self._weights:
            if weight in self._read and not (self._averaged and weight.parameter.grad is not None):
                continue
            if weight.parameter.grad is not None and _mark(weight.parameter) != self._marks[weight]:
                added = True
                self._receive(weight, weight.parameter.grad)
        self._marks.clear()
        self._left = {weight: _mark(weight.parameter) for weight in self._weights}
        return added

    def cleared(self) -> list[Weight]:
        """Weights whose gradient of before somebody has cleared since the last backward pass."""
        return [
            weight
            for weight in self._weights
            if self._left.get(weight) is not None
            and _mark(weight.parameter) != self._left[weight]
            and (weight.parameter.grad is None or not _is_nonzero(weight.parameter.grad))
        ]

    def taken_away(self) -> list[Weight]:
        """Weights that have no gradient any more."""
        return [w for w in self._weights if self._left.get(w) is not None and w.parameter.grad is None]

    def replaced(self) -> list[Weight]:
        """Weights that hold another tensor as their gradient than the last backward pass left."""
        return [
            weight
            for weight in self._weights
            if (left := self._left.get(weight)) is not None
            and weight.parameter.grad is not None
            and id(weight.parameter.grad) != left[0]
        ]

    def read_what_is_there(self) -> None:
        """For a step without a backward pass: gradients that its user put there."""
        for weight in self._weights:
            if weight.parameter.grad is not None:
                self._receive(weight, weight.parameter.grad)

    def are_gone(self) -> bool:
        """Whether there are weights, and none has a gradient, or only zeros that were not left by a backward pass."""
        if self.are_held_back():
            return False
        for weight in self._weights:
            gradient = weight.parameter.grad
            if gradient is not None and (_mark(weight.parameter) == self._left.get(weight) or _is_nonzero(gradient)):
                return False
        return bool(self._weights)

    def are_there(self) -> bool:
        """Whether any weight that trains now has a gradient that is not 0."""
        there = any(
            w.parameter.requires_grad and w.parameter.grad is not None and _is_nonzero(w.parameter.grad)
            for w in self._weights
        )
        return there or self.are_held_back()

    def are_held_back(self) -> bool:
        """Whether FSDP2 has gradients that it has not reduced."""
        return any(True for _ in self._held())

    def _mark_of_held(self) -> object:
        return [(id(gradient), gradient._version) for gradient in self._held()]

    def include(self, inputs: Iterable[Any]) -> bool:
        """Whether a backward pass that accumulates into these tensors only concerns any of the weights."""
        wanted = {id(x) for x in inputs}
        return any(id(weight.parameter) in wanted for weight in self._weights)

    def _before_the_users(self, weight: Weight) -> Callable[[Tensor], None]:
        def hook(p: Tensor) -> None:
            if not self._running or p.grad is None:
                return
            if self._read.setdefault(weight, id(p.grad)) != id(p.grad):
                self.in_parts.add(weight)
            self._receive(weight, p.grad)

        return hook


class PartGradients:
    """The gradient of each backward pass by itself, by a hook on the leaf: all uses together, before accumulation.

    Args:
        weights: those that train.
        receive: gets a weight and its gradient; read before the call returns.
        in_parts: weights whose gradient is known to arrive in several parts; they are summed until the pass is over.
            Others that turn out to be such are added, and are wrong in this pass.
    """

    def __init__(self, weights: Iterable[Weight], receive: Receive, in_parts: set[int]) -> None:
        self._weights = list(weights)
        self._receive = receive
        self._in_parts = in_parts
        self._running = False
        self._arrived: set[Weight] = set()
        self._sums: dict[Weight, Tensor] = {}
        self.wrong: dict[Weight, str] = {}
        """Weights of which this pass saw no complete gradient."""

    def hook(self) -> list[Any]:
        """Handles of the hooks."""
        return [weight.parameter.register_hook(self._arriving(weight)) for weight in self._weights]

    def begin(self, receive: Receive) -> None:
        self._receive = receive
        self._running = True
        self._arrived.clear()
        self.wrong.clear()

    def end(self) -> None:
        self._running = False
        for weight, total in self._sums.items():
            self._receive(weight, total)
        self._sums.clear()

    def _arriving(self, weight: Weight) -> Callable[[Tensor], None]:
        def hook(g: Tensor) -> None:
            if not self._running:
                return
            g = g.detach()
            if id(weight.parameter) in self._in_parts:
                with torch.no_grad():
                    self._sums[weight] = self._sums[weight] + g if weight in self._sums else g.clone()
                return
            if weight in self._arrived:
                self._in_parts.add(id(weight.parameter))
                self.wrong[weight] = _IN_PARTS
            self._arrived.add(weight)
            self._receive(weight, g)

        return hook


def marks(weights: Iterable[Weight]) -> list[Mark]:
    """Other ones once a backward pass has added to the gradient of any of these."""
    return [_mark(weight.parameter) for weight in weights]


def _mark(p: Tensor) -> Mark:
    """Something that is another one once a backward pass has added to ``.grad``."""
    if p.grad is None:
        return None
    # Autograd counts what it adds to a DTensor, FSDP2 adds to the shard inside of it.
    return id(p.grad), p.grad._version, local_part(p.grad)._version


def _is_nonzero(gradient: Tensor) -> bool:
    if is_distributed(gradient):
        gradient = local_part(gradient)
        if not gradient.numel():
            return True  # for all that this process knows
    values = gradient.coalesce().values() if gradient.layout == torch.sparse_coo else gradient
    return bool(values.any())
