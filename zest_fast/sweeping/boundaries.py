"""Where a forward pass can be resumed: the calls of modules before a layer, and which of their outputs it still needs.

A pass is a tree of module calls. Before a layer runs, some calls are finished; if the model only looks at the outputs
of a few of them afterwards (a block's input, say), the pass can be taken up from those. Which ones is found by making
each output a leaf of a graph and looking which leaves the model's output depends on; a replay with NaN in all other
places then has to give the output of the full pass, else the boundary is not used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


@dataclass(eq=False)
class Call:
    """One call of one module in a forward pass."""

    module: nn.Module
    parent: Call | None
    start: float
    """Seconds since the pass began."""
    children: list[Call] = field(default_factory=list)
    output: Any = None
    """An example, of the traced samples."""
    per_sample: bool = False
    """Whether every tensor of the output has a row for each sample."""

    def path(self) -> list[Call]:
        """From the root to this call."""
        return [*(self.parent.path() if self.parent else ()), self]


@dataclass(eq=False)
class Trace:
    """The calls of one forward pass."""

    root: Call
    seconds: float

    def first_call(self, module: nn.Module) -> Call | None:
        """None where the module is not called."""
        return next((call for call in self._calls(self.root) if call.module is module), None)

    def _calls(self, call: Call) -> Iterator[Call]:
        yield call
        for child in call.children:
            yield from self._calls(child)


@dataclass(frozen=True, eq=False)
class Boundary:
    """A place to take a forward pass up: `skipped` calls are not run, `live` ones among them return what they did."""

    trace: Trace
    start: float
    """Seconds of the traced pass that lie before it."""
    skipped: tuple[Call, ...]
    live: tuple[Call, ...]

    @property
    def bytes_per_sample(self) -> int:
        """Of the outputs that have to be kept."""
        rows = (leaf[0] for call in self.live for leaf in tensors(call.output))
        return sum(row.numel() * row.element_size() for row in rows)


def tensors(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def trace_calls(model: nn.Module, forward: Callable[[], Any], samples: int) -> Trace:
    """Runs `forward`, a pass of `model` over this many samples, and notes every call of a module."""
    stack: list[Call] = []
    roots: list[Call] = []
    began = time.perf_counter()

    def enter(module: nn.Module, _: Any) -> None:
        call = Call(module, stack[-1] if stack else None, time.perf_counter() - began)
        (stack[-1].children if stack else roots).append(call)
        stack.append(call)

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        call = stack.pop()
        leaves = tree_leaves(output)
        call.per_sample = bool(leaves) and all(
            leaf is None or (isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == samples)
            for leaf in leaves
        )
        call.output = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)

    handles = [
        handle
        for module in dict.fromkeys(model.modules())
        for handle in (module.register_forward_pre_hook(enter), module.register_forward_hook(leave))
    ]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    if len(roots) != 1 or roots[0].module is not model:
        raise ValueError(f"{type(model).__name__} was not called once as a whole; its forward pass cannot be traced")
    return Trace(roots[0], time.perf_counter() - began)


def boundaries_before(trace: Trace, call: Call, forward: Callable[[], Any]) -> Iterator[Boundary]:
    """Places before `call`, the closest first, each with fewer finished calls than the one before.

    forward: a pass over the traced samples or any others.
    """
    seen = -1
    for place in reversed(call.path()):
        skipped = tuple(_finished_before(place))
        if skipped and len(skipped) != seen:
            seen = len(skipped)
            yield Boundary(trace, place.start, skipped, tuple(_live(trace, skipped, forward)))


def _finished_before(place: Call) -> Iterator[Call]:
    for step in place.path():
        if step.parent is not None:
            for sibling in step.parent.children:
                if sibling is step:
                    break
                yield from _skippable(sibling)


def _skippable(call: Call) -> Iterator[Call]:
    """The call, or those inside it where its own output is no rows of samples (those without any run again)."""
    if call.per_sample:
        yield call
    else:
        for child in call.children:
            yield from _skippable(child)


def _live(trace: Trace, skipped: tuple[Call, ...], forward: Callable[[], Any]) -> list[Call]:
    leaves: dict[int, Call] = {}
    live: set[Call] = set()

    def make_leaves(call: Call, run: Callable[[], Any]) -> Any:
        def leaf(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            value = value.detach().clone()
            if not value.is_floating_point():
                live.add(call)  # no graph tells
                return value
            leaves[id(value)] = call
            kept.append(value)
            return value.requires_grad_().clone()  # not the leaf itself: the model may write into what it gets

        return tree_map(leaf, run())

    kept: list[Tensor] = []  # ids stay unique only as long as the tensors live
    with torch.enable_grad(), intercepted(trace, skipped, make_leaves):
        output = forward()
    todo: list[Any] = [leaf.grad_fn for leaf in _output_tensors(output) if leaf.grad_fn is not None]
    seen: set[Any] = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in leaves:
            live.add(leaves[id(node.variable)])
        todo += [following for following, _ in node.next_functions]
    return [call for call in skipped if call in live]


def _output_tensors(output: Any) -> list[Tensor]:
    logits = getattr(output, "logits", None)
    return tensors(output if logits is None else logits)


Handler = Callable[[Call, Callable[[], Any]], Any]


@contextmanager
def intercepted(
    trace: Trace, skipped: Iterable[Call], handler: Handler, *, watched: Iterable[Call] = ()
) -> Iterator[None]:
    """During one forward pass, `handler(call, run)` gives the outputs of these calls; `run()` would compute one.

    Nothing inside a skipped call is intercepted, everything inside a watched one is. `forward` is set on the instances,
    since no hook can keep a module from running. The modules are as before at the end of the context, which serves a
    single forward pass: calls are told apart by their order.
    """
    skipped, wanted = set(skipped), {*skipped, *watched}
    agenda: dict[nn.Module, list[Call | None]] = {}
    todo = [trace.root]
    while todo:  # in the order of the calls
        call = todo.pop()
        agenda.setdefault(call.module, []).append(call if call in wanted else None)
        if call not in skipped:
            todo += reversed(call.children)
    inside = False

    def replace(module: nn.Module, expected: Iterator[Call | None]) -> None:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            call = None if inside else next(expected, None)
            if call is None:
                return original(*args, **kwargs)
            inside = call in skipped
            try:
                return handler(call, lambda: original(*args, **kwargs))
            finally:
                inside = False

        module.forward = forward  # type: ignore[method-assign]

    touched = [module for module, expected in agenda.items() if any(expected)]
    own = [(module, module.__dict__.get("forward")) for module in touched]
    try:
        for module in touched:
            replace(module, iter(agenda[module]))
        yield
    finally:
        for module, before in own:
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = before  # type: ignore[method-assign]
