"""Where the frozen part of a training pass ends, and which outputs of its calls the rest still needs.

Sweeps find that with a graph through the whole model and some twenty passes over a few samples (boundaries.py). Of a
model that hardly fits once neither is possible. Here the pass runs to the first module that trains, and the values are
followed: what a finished call returned, and what code outside of such calls made of it, is needed if its memory is
still held when that module is entered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from zest_fast.foundation.nearest import some
from zest_fast.foundation.torch_private import (
    StorageWeakRef,
    forward_hooks,
    forward_pre_hooks,
    saved_tensors_hooks,
    storage_key,
)
from zest_fast.prefix.boundaries import (
    DRAWS,
    Call,
    NotReusable,
    Trace,
    around_calls,
    finished_before,
    intercepted,
    run_by_python,
    tensors,
    why_not_kept,
)
from zest_fast.prefix.placeholders import Reached, writes
from zest_fast.prefix.volatile_state import generators

Run = Callable[[Call, Callable[[], Any]], Any]
"""How a call below the cut runs: `forward()`, or in eval mode."""


def first_trained_call(
    model: nn.Module, run: Callable[[], Any], trained: Mapping[int, str], undisturbed: Run
) -> tuple[Trace, Call, frozenset[int]]:
    """Runs up to the first call that a trained parameter takes part in; that call, all before it, and the ids of the
    tensors that are read until then.

    run: calls `model.forward`. trained: id of each parameter -> its name. undisturbed: runs what nothing in trains.
    Where a parent uses the weight of a module without calling it (nn.MultiheadAttention.out_proj), its call counts.

    Raises NotReusable where nothing runs before, or what does draws random numbers or needs a gradient.
    """
    modules = run_by_python(model)
    owners = {m for m in modules if any(id(p) in trained for p in m._parameters.values())}
    holders = {m for m in modules if any(id(p) in trained for p in m.parameters())}
    observed = {m for m in modules if any(map(is_observed, m.modules()))}
    stack = [Call(model, "", None, 0.0)]  # of the outermost, whose only child is the model's own
    found: list[Call] = []
    entered: dict[Call, tuple[Any, Any]] = {}  # saved-tensor hooks and generators of that moment

    def around(module: nn.Module, forward: Callable[[], Any]) -> Any:
        parent = stack[-1]
        call = Call(module, modules[module], parent if len(stack) > 1 else None, 0.0)
        parent.children.append(call)
        entered[call] = saved_tensors_hooks(), generators()
        if module in owners:
            found.append(call)
            raise Reached
        stack.append(call)
        try:
            output = forward() if module in holders else undisturbed(call, forward)
        finally:
            stack.pop()
        drawn = generators() != entered[call][1]
        call.reason = DRAWS if drawn else _OBSERVED if module in observed else why_not_kept(output)
        if module in holders:  # whose weights nobody was seen to read, as of scripted code
            found.append(call)
            raise Reached
        if any(tensor.requires_grad for tensor in tensors(output)):
            raise NotReusable(f"the output of {call.name!r} requires a gradient though nothing in it trains")
        return output

    def read(name: str, function: str) -> None:
        if len(stack) > 2 and stack[-1].module in holders:
            found.append(stack[-1])
            raise Reached
        raise NotReusable(f"{name!r} trains, and its values are read ({function}) before its layer is called")

    reads = _Reads(trained, read)
    with around_calls(modules, around), contextlib.suppress(Reached), reads:
        run()
    if not found:
        raise NotReusable("no module that trains was called")
    place = _before_checkpointing(found[0], {call: hooks for call, (hooks, _) in entered.items()})
    root = stack[0].children[0]
    _refuse_draws(place, entered[place][1] != entered[root][1])
    if not any(finished_before(place)):
        raise NotReusable(f"nothing that could be kept runs before {place.name or 'the model'!r}, which trains")
    return Trace(root, 0.0, modules), place, frozenset(reads.ids)


_OBSERVED = "has hooks that look at what runs inside"


def is_observed(module: nn.Module) -> bool:
    """Whether somebody else has hooked it."""
    after, before = forward_hooks(module), forward_pre_hooks(module)
    if not after and not before:  # as most
        return False
    return not all(map(is_ours, (*after.values(), *before.values())))


def is_ours(code: Any) -> bool:
    """Whether a hook is of this package."""
    while isinstance(code, partial):
        code = code.func
    place = getattr(code, "__module__", None) or type(code).__module__
    return str(place).startswith("zest_fast.")


def _before_checkpointing(place: Call, hooks: Mapping[Call, Any]) -> Call:
    """`place`, or the first call of the outermost region of checkpointing that it is in: what backward recomputes runs
    as a whole, without anybody who would give it what is kept."""
    for step in place.path():
        if step.parent is not None and hooks[step] is not hooks[step.parent]:
            return next(call for call in step.parent.children if hooks[call] is hooks[step])
    return place


def _refuse_draws(place: Call, are_drawn: bool) -> None:
    names = _innermost([call.name for call in before(place) if call.reason == DRAWS])
    what = ""
    if names:
        what = f"{some(map(repr, names))} below the cut {'draws' if len(names) == 1 else 'draw'} random numbers"
        what += " (dropout in train mode?)"
    elif are_drawn:
        parents = some(repr(call.name) if call.name else "the model" for call in place.path()[:-1])
        what = f"the code of {parents} draws random numbers below the cut, between the modules that it calls"
    if what:
        raise Drawn(f"{what}, so that the same sample gives other activations each time")


_DESCRIBES = {
    "shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "is_cuda", "is_meta", "is_sparse",
    "names", "is_quantized", "is_nested", "grad", "grad_fn", "size", "dim", "numel", "stride", "is_contiguous",
    "element_size", "is_floating_point", "is_complex", "data_ptr", "storage_offset", "type", "get_device",
}  # fmt: skip


class _Reads(TorchFunctionMode):
    """Tells when a value that trains is read, with a gradient or without one (its sign, say). ids: of all that is."""

    def __init__(self, trained: Mapping[int, str], told: Callable[[str, str], None]) -> None:
        super().__init__()
        self._trained, self._told = trained, told
        self.ids: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(getattr(getattr(func, "__self__", None), "__name__", None) or getattr(func, "__name__", ""))
        for leaf in tree_leaves((args, kwargs)) if name not in _DESCRIBES else ():
            if isinstance(leaf, Tensor):
                self.ids.add(id(leaf))
            if id(leaf) in self._trained:
                self._told(self._trained[id(leaf)], name)
        return func(*args, **(kwargs or {}))


class Drawn(NotReusable):
    """Random numbers are drawn below the cut."""


def before(place: Call) -> Iterable[Call]:
    """All calls that were entered before this one, but for those that it is in."""
    path = set(place.path())
    todo = [path_call for path_call in place.path() if path_call.parent is None]
    while todo:
        call = todo.pop()
        if call is place:
            return
        if call not in path:
            yield call
        todo += reversed(call.children)


def _innermost(names: list[str]) -> list[str]:
    return [name for name in names if not any(other.startswith(f"{name}.") for other in names)]


def needed(trace: Trace, place: Call, run: Callable[[], Any], undisturbed: Run) -> tuple[Call, ...]:
    """The calls finished before `place` whose outputs, or what was made of them, are still held when it is entered.

    That is every call that matters to the rest, and some that do not: a variable that nobody reads again holds its
    value, too.
    """
    skipped = tuple(finished_before(place))
    flow, held = _Flow(), set[Call]()

    def handle(call: Call, forward: Callable[[], Any]) -> Any:
        if call is place:
            held.update(flow.held())  # now: what stands in the middle of an expression goes with the exception
            raise Reached
        flow.paused = True
        try:
            output = undisturbed(call, forward)
        finally:
            flow.paused = False
        flow.add(output, {call})
        return output

    try:
        with intercepted(trace, skipped, handle, watched=[place]), flow:
            run()
    except Reached:
        return tuple(call for call in skipped if call in held)
    raise NotReusable("the forward pass took another way than the traced one")


class _Flow(TorchFunctionMode):
    """Notes for the memory of every tensor from which calls its values come."""

    def __init__(self) -> None:
        super().__init__()
        self.paused = False
        self._origins: dict[int, tuple[StorageWeakRef, set[Call]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not self.paused:
            origins: set[Call] = set()
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor):
                    origins |= self._of(leaf)
            if origins:
                self.add(output, origins)
                if writes(func, kwargs):
                    self.add((args[:1], (kwargs or {}).get("out")), origins)
        return output

    def add(self, values: Any, origins: set[Call]) -> None:
        for tensor in tensors(values):
            storage = tensor.untyped_storage()
            known = self._origins.get(storage_key(storage))
            if known is None or known[0].expired():
                known = StorageWeakRef(storage), set()
                self._origins[storage_key(storage)] = known
            known[1].update(origins)

    def _of(self, tensor: Tensor) -> set[Call]:
        try:
            known = self._origins.get(storage_key(tensor.untyped_storage()))
        except (RuntimeError, NotImplementedError):  # of a kind without a storage
            return set()
        return known[1] if known is not None and not known[0].expired() else set()

    def held(self) -> set[Call]:
        return {call for reference, calls in self._origins.values() if not reference.expired() for call in calls}
