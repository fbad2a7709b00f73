"""Where a forward pass can be resumed: the calls of modules before a layer, and which of their outputs it still needs.

A pass is a tree of module calls. Before a layer runs, some calls are finished; if the model only looks at the outputs
of a few of them afterwards (a block's input, say), the pass can be taken up from those. Which ones is found by making
each output a leaf of a graph and looking which leaves the model's output depends on; replays with other values in all
other places then have to give the output of the full pass, else the boundary is not used.

What is kept of a sample must not depend on the batch it was in: a few samples run in several batches, and an output
that is not the same in all of them, or draws random numbers, or writes buffers, is computed in every pass.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from zest_fast.foundation.interrupts import HeldInterrupts
from zest_fast.foundation.torch_private import is_compiled_in_place
from zest_fast.prefix.inputs import Inputs, count, rows_of
from zest_fast.prefix.volatile_state import VolatileState, generators
from zest_fast.profiling.loss import call_model

PROBED = 5
"""Samples that are run to find out what can be reused."""
_TRACED = (0, 1, 2)
# Each sample is once replaced by another one, all else being equal: rows that depend on others differ by more than
# rounding. Then other numbers of samples in another order: a dimension of samples is one that changes with them.
_REPLACED = ((0, 1, 2), (0, 3, 2), (3, 1, 2), (0, 1, 3))
_REORDERED = (2, 0)
DEPENDS, DRAWS, _WRITES = "depends on the other samples of its batch", "draws random numbers", "writes buffers"
_TELLING = {DEPENDS, DRAWS, _WRITES}


class NotReusable(Exception):
    """A pass was not as the probed ones were. blamed: the call after which it went another way, if that is known."""

    def __init__(self, message: str, blamed: Call | None = None) -> None:
        super().__init__(message)
        self.blamed = blamed


@dataclass(frozen=True)
class Rows:
    """What is known of a tensor with entries for each sample: `per_sample` of them along `dim`, sample by sample."""

    shape: tuple[int, ...]
    """Of one sample."""
    dim: int
    order: tuple[int, ...]
    """Dimensions, the outermost in memory first: a model in channels_last stays fast, and a view can be taken."""
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor, dim: int, samples: int) -> Rows:
        """Of a tensor of so many samples along `dim`."""
        shape = list(tensor.shape)
        shape[dim] //= samples
        return cls(tuple(shape), dim, order_of(tensor), tensor.dtype, tensor.device)

    @property
    def bytes_per_sample(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def shape_of(self, samples: int) -> tuple[int, ...]:
        """The shape for that many samples."""
        return (*self.shape[: self.dim], self.shape[self.dim] * samples, *self.shape[self.dim + 1 :])

    def view(self, memory: Tensor, samples: int) -> Tensor:
        """This flat memory as the tensor of so many samples."""
        shape = self.shape_of(samples)
        return memory.view([shape[dim] for dim in self.order]).permute(self._back)

    def empty(self, samples: int) -> Tensor:
        """Uninitialised."""
        size = torch.Size(self.shape).numel() * samples
        return self.view(torch.empty(size, dtype=self.dtype, device=self.device), samples)

    def take(self, store: Tensor, rows: Tensor) -> Tensor:
        """The samples with these numbers, copied in the same layout."""
        entries = self._entries(rows.to(store.device))
        taken = store.permute(self.order).index_select(self.order.index(self.dim), entries)
        return taken.to(self.device).permute(self._back)

    def put(self, store: Tensor, rows: Tensor, value: Tensor) -> None:
        """Samples that follow one another: a copy, not a scatter."""
        each = self.shape[self.dim]
        store.narrow(self.dim, int(rows[0]) * each, len(rows) * each).copy_(value)

    def _entries(self, rows: Tensor) -> Tensor:
        each = self.shape[self.dim]
        return rows if each == 1 else (rows[:, None] * each + torch.arange(each, device=rows.device)).flatten()

    @property
    def _back(self) -> tuple[int, ...]:
        return tuple(self.order.index(dim) for dim in range(len(self.order)))


@dataclass(eq=False)
class Call:
    """One call of one module in a forward pass."""

    module: nn.Module
    name: str
    parent: Call | None
    start: float
    """Seconds since the pass began."""
    children: list[Call] = field(default_factory=list)
    output: Any = None
    """Its structure: Rows, tensors that are the same for all samples, and values that are no tensors."""
    reason: str = ""
    """Why the output cannot be kept, if so."""
    irregular: bool = False
    """Whether the calls inside differ from batch to batch."""

    def path(self) -> list[Call]:
        """From the root to this call."""
        return [*(self.parent.path() if self.parent else ()), self]

    def fits(self, output: Any, samples: int) -> str:
        """What is different about an output for that many samples; empty if nothing is."""
        known, structure = tree_flatten(self.output)
        found, found_structure = tree_flatten(output)
        if structure != found_structure:
            return "has another structure"
        for leaf, value in zip(known, found, strict=True):
            if isinstance(leaf, Rows):
                if not isinstance(value, Tensor) or tuple(_shape(value)) != leaf.shape_of(samples):
                    shape = list(_shape(value)) if isinstance(value, Tensor) else type(value).__name__
                    return f"is {shape} where {list(leaf.shape_of(samples))} was expected"
                if value.dtype != leaf.dtype or value.layout != torch.strided:
                    return f"is {value.dtype} where {leaf.dtype} was expected"
            elif isinstance(leaf, Tensor):
                if not isinstance(value, Tensor) or not close(value, leaf, rounding(leaf.dtype)):
                    return "holds a tensor that is not the same for all samples"
            elif not equal(leaf, value):
                return f"holds {value!r} where it held {leaf!r}"
        return ""


@dataclass(eq=False)
class Trace:
    """The calls of one forward pass."""

    root: Call
    seconds: float
    modules: dict[nn.Module, str]
    """Names of the modules, but those that Python does not run."""

    def first_call(self, module: nn.Module) -> Call | None:
        """None where the module is not called."""
        return next((call for call in _inside(self.root) if call.module is module), None)

    def expected(self, skipped: Iterable[Call], wanted: Iterable[Call]) -> list[Call]:
        """Calls in their order up to the last wanted one, without those inside skipped and irregular ones."""
        skipped, wanted = set(skipped), set(wanted)
        calls = []
        last = 0
        todo = [self.root]
        while todo:
            call = todo.pop()
            calls.append(call)
            if call in wanted:
                last = len(calls)
            if call not in skipped and not call.irregular:
                todo += reversed(call.children)
        return calls[:last]


def _inside(call: Call) -> Iterator[Call]:
    yield call
    for child in call.children:
        yield from _inside(child)


@dataclass(frozen=True, eq=False)
class Boundary:
    """A place to take a forward pass up: `skipped` calls are not run, `live` ones among them return what they did."""

    trace: Trace
    start: float
    """Seconds of the traced pass that lie before it."""
    skipped: tuple[Call, ...]
    live: tuple[Call, ...]
    writable: bool = False
    """Whether the model writes into outputs of skipped calls that do not matter."""

    @property
    def bytes_per_sample(self) -> int:
        """Of the outputs that have to be kept."""
        return sum(leaf.bytes_per_sample for call in self.live for leaf in rows_in(call.output))


def tensors(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def rows_in(output: Any) -> list[Rows]:
    """The tensors with a part for each sample in the output of a call."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Rows)]


def rounding(dtype: torch.dtype) -> float:
    """What other batch sizes may change, relative to the largest entry: they choose other kernels."""
    return max(1e-4, 8 * torch.finfo(dtype).eps) if dtype.is_floating_point or dtype.is_complex else 0.0


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether all entries are the same up to this part of the largest finite one; NaN equals NaN."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not (expected.is_floating_point() or expected.is_complex()):
        return torch.equal(found, expected)
    if (near := _near_if_finite(found, expected, tolerance)) is not None:
        return near
    finite = expected[expected.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    wide = torch.promote_types(expected.dtype, torch.float32)
    return torch.allclose(found.to(wide), expected.to(wide), rtol=0, atol=tolerance * scale, equal_nan=True)


def _near_if_finite(found: Tensor, expected: Tensor, tolerance: float) -> bool | None:
    """`close` in three passes over the memory instead of a dozen; None where that does not tell (NaN, infinities)."""
    if expected.is_complex() or not expected.numel() or expected.dtype.itemsize < 4:
        return None
    low, high = map(float, torch.aminmax(expected))
    apart_low, apart_high = map(float, torch.aminmax(found - expected))
    if not all(map(math.isfinite, (low, high, apart_low, apart_high))):
        return None
    return max(-apart_low, apart_high) <= tolerance * max(-low, high)


def same_gradient(found: Tensor | None, expected: Tensor | None) -> bool:
    """Whether two gradients of one parameter are the same up to rounding, or neither is there."""
    if found is None or expected is None:
        return found is expected
    return close(found, expected, 10 * rounding(expected.dtype))


# The trace


@torch.no_grad()
def trace_calls(model: nn.Module, inputs: Inputs) -> Trace:
    """Runs the model on the first of these samples and notes every call of a module.

    With PROBED samples it is run on several batches of them, which tells what can be kept; with fewer, nothing can.
    """
    probed = count(inputs) >= PROBED
    state = VolatileState(model)
    try:
        tracer = _Tracer(model)
        traced = torch.tensor(_TRACED[: count(inputs)])
        call_model(model, rows_of(inputs, traced))  # the first pass is slower than the others
        tracer.record(lambda: call_model(model, rows_of(inputs, traced)))
        tracer.blame_owners(state.changed_buffers())
        if not probed:
            tracer.blame_all("too few samples to compare")
        else:
            tracer.compare(_REORDERED, lambda rows: call_model(model, rows_of(inputs, rows)))
            for rows in _REPLACED:
                tracer.compare(rows, lambda rows: call_model(model, rows_of(inputs, rows)))
        return tracer.finish()
    finally:
        state.restore()


@contextmanager
def around_calls(modules: Iterable[nn.Module], around: Callable[[nn.Module, Callable[[], Any]], Any]) -> Iterator[None]:
    """Inside, in this thread, `around(module, run)` gives the outputs of these modules; `run()` would compute one.

    `forward` is set on the instances: no hook can keep a module from running, and hooks turn off torch's fast paths.
    """

    def wrapped(module: nn.Module) -> Callable[..., Any]:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if get_ident() != thread:
                return original(*args, **kwargs)
            return around(module, lambda: original(*args, **kwargs))

        forward.__wrapped__ = original  # type: ignore[attr-defined]  # for those that ask for its signature
        return forward

    thread = get_ident()
    with forwards_replaced({module: wrapped(module) for module in modules}):
        yield


@contextmanager
def forwards_replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, these are what `forward` of the instances is."""
    own = [(module, module.__dict__.get("forward")) for module in forwards]
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        with HeldInterrupts():
            for module, before in own:
                if before is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.__dict__["forward"] = before


def run_by_python(model: nn.Module) -> dict[nn.Module, str]:
    """The modules whose `forward` is called as such, not those inside compiled or scripted ones, and their names."""
    compiled = {
        inner
        for module in model.modules()
        if isinstance(module._modules.get("_orig_mod"), nn.Module)
        or isinstance(module, torch.jit.ScriptModule)
        or is_compiled_in_place(module)
        for inner in module.modules()
        if inner is not module or isinstance(module, torch.jit.ScriptModule) or is_compiled_in_place(module)
    }
    return {module: name for name, module in model.named_modules() if module not in compiled}


class _Tracer:
    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = run_by_python(model)
        self._root = Call(model, "", None, 0.0)
        self._seconds = 0.0
        self._dims: dict[Call, list[int | None]] = {}

    def record(self, forward: Callable[[], Any]) -> None:
        outermost = Call(self._model, "", None, 0.0)
        stack = [outermost]
        began = time.perf_counter()

        def around(module: nn.Module, run: Callable[[], Any]) -> Any:
            parent = stack[-1] if stack[-1] is not outermost else None
            call = Call(module, self._modules[module], parent, time.perf_counter() - began)
            stack[-1].children.append(call)
            stack.append(call)
            before = generators()
            try:
                output = run()
            finally:
                stack.pop()
            if generators() != before:
                call.reason = DRAWS
            call.output = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)
            call.reason = call.reason or why_not_kept(output)
            return output

        with around_calls(self._modules, around):
            forward()
        self._seconds = time.perf_counter() - began
        if len(outermost.children) == 1 and outermost.children[0].module is self._model:
            self._root = outermost.children[0]
        else:  # a model that is not run as a whole, such as a compiled one
            self._root.irregular, self._root.reason = True, "is not called as a whole"

    def blame_owners(self, changed: set[int]) -> None:
        """Modules that write buffers run in every pass."""
        for call in _inside(self._root) if changed else ():
            if any(id(buffer) in changed for buffer in call.module.buffers()):
                call.reason = _WRITES

    def blame_all(self, reason: str) -> None:
        for call in _inside(self._root):
            call.reason = reason

    def compare(self, rows: tuple[int, ...], forward: Callable[[Tensor], Any]) -> None:
        """Run these samples: calls that are not the traced ones, and outputs that are not the same, are noted."""
        here = [place for place, row in enumerate(rows) if row in _TRACED]
        there = [_TRACED.index(row) for row in rows if row in _TRACED]
        reordered = len(rows) != len(_TRACED)
        open_calls: list[Call | None] = []
        done: dict[Call, int] = {}

        def around(module: nn.Module, run: Callable[[], Any]) -> Any:
            parent = open_calls[-1] if open_calls else None
            call = self._root if not open_calls and module is self._model else None
            if parent is not None:
                at = done.get(parent, 0)
                call = parent.children[at] if at < len(parent.children) else None
                if call is None or call.module is not module:
                    parent.irregular, call = True, None
                done[parent] = at + 1
            open_calls.append(call)
            try:
                output = run()
            finally:
                open_calls.pop()
            if call is not None:
                call.irregular |= done.get(call, 0) != len(call.children)
                if not call.reason and reordered:
                    self._dims[call], call.reason = dims_of(call.output, output, len(_TRACED), len(rows))
                if not call.reason and call in self._dims:
                    call.reason = self._why_not_same(call, output, here, there, reordered)
            return output

        with around_calls(self._modules, around):
            forward(torch.tensor(rows))

    def _why_not_same(self, call: Call, output: Any, here: list[int], there: list[int], reordered: bool) -> str:
        known, structure = tree_flatten(call.output)
        found, found_structure = tree_flatten(output)
        if structure != found_structure:
            return "has another structure for other samples"
        dims = iter(self._dims[call])
        for expected, value in zip(known, found, strict=True):
            if not isinstance(expected, Tensor):
                if not equal(expected, value):
                    return "holds a value that changes with the samples"
                continue
            if not isinstance(value, Tensor) or value.dtype != expected.dtype:
                return "has another type for other samples"
            dim = next(dims)
            # The same kernels run on as many samples: far less than that is rounding.
            tolerance = 10 * rounding(expected.dtype) if reordered else rounding(expected.dtype) / 8
            if dim is not None:
                if not reordered and value.shape != expected.shape:
                    return "has another shape for other samples"
                value = samples_along(value, dim, len(_REORDERED) if reordered else len(_TRACED), here)
                expected = samples_along(expected, dim, len(_TRACED), there)
            if not close(value, expected, tolerance):
                return DEPENDS
        return ""

    def finish(self) -> Trace:
        for call in _inside(self._root):
            if not call.reason and call not in self._dims:
                call.reason = "is not called for other samples"
            if call.reason:
                call.output = None  # it may be large
                continue
            dims = iter(self._dims[call])

            def known(leaf: Any, dims: Iterator[int | None] = dims) -> Any:
                if not isinstance(leaf, Tensor) or (dim := next(dims)) is None:
                    return leaf
                return Rows.of(leaf, dim, len(_TRACED))

            call.output = tree_map(known, call.output)
        return Trace(self._root, self._seconds, self._modules)


def why_not_kept(output: Any) -> str:
    leaves = tree_leaves(output)
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if leaf.layout != torch.strided or leaf.is_nested or leaf.is_quantized or leaf.is_meta:
                return f"holds a tensor of layout {leaf.layout}"
        elif not isinstance(leaf, bool | int | float | str | None):
            return f"holds a {type(leaf).__name__}"
    return "" if any(isinstance(leaf, Tensor) for leaf in leaves) else "holds no tensor"


def dims_of(known: Any, found: Any, traced: int, samples: int) -> tuple[list[int | None], str]:
    """For each tensor the dimension that grows with the samples, None where none does; or why it cannot be told."""
    ours, theirs = tensors(known), tensors(found)
    if len(ours) != len(theirs):
        return [], "has another structure for other samples"
    dims: list[int | None] = []
    for mine, other in zip(ours, theirs, strict=True):
        if other.layout != torch.strided or other.is_nested or mine.dim() != other.dim():
            return [], "has another layout for other samples"
        changed = [dim for dim in range(mine.dim()) if mine.shape[dim] != other.shape[dim]]
        if len(changed) > 1 or any(mine.shape[dim] * samples != other.shape[dim] * traced for dim in changed):
            return [], "has a shape that does not grow with the samples"
        dims.append(changed[0] if changed else None)
    if all(dim is None for dim in dims):
        return [], "has no rows of samples"
    return dims, ""


def samples_along(value: Tensor, dim: int, samples: int, chosen: list[int]) -> Tensor:
    return value.unflatten(dim, (samples, value.shape[dim] // samples)).index_select(
        dim, torch.tensor(chosen, device=value.device)
    )


def order_of(leaf: Tensor) -> tuple[int, ...]:
    natural = tuple(range(leaf.dim()))
    if leaf.is_contiguous():
        return natural
    if leaf.dim() == 4 and leaf.is_contiguous(memory_format=torch.channels_last):
        return 0, 2, 3, 1
    strides = leaf.stride()
    return tuple(sorted(natural, key=lambda dim: -strides[dim]))


def equal(ours: Any, theirs: Any) -> bool:
    """Of values that are no tensors; NaN equals NaN."""
    return type(ours) is type(theirs) and (ours == theirs or (ours != ours and theirs != theirs))


def _shape(value: Tensor) -> tuple[int, ...]:
    return () if value.is_nested else tuple(value.shape)


# Boundaries


def boundaries_before(trace: Trace, call: Call, forward: Callable[[], Any]) -> Iterator[Boundary]:
    """Places before `call`, the closest first, each with fewer finished calls than the one before.

    forward: a pass over any samples. Places that it does not come by are left out.
    """
    seen = -1
    for place in reversed(call.path()):
        skipped = tuple(finished_before(place))
        if skipped and len(skipped) != seen:
            seen = len(skipped)
            live = _live(trace, skipped, forward)
            if live is not None:
                yield Boundary(trace, place.start, skipped, tuple(live))


def anything_before(call: Call) -> bool:
    """Whether a call is finished before this one, or may be in other passes."""
    return any(
        step.irregular or (step.parent is not None and step.parent.children[0] is not step) for step in call.path()
    )


def what_prevents(call: Call) -> str:
    """Why nothing before this call can be kept, as far as the calls tell; empty where they do not."""
    for step in call.path()[:-1]:
        if step.irregular:
            inside = repr(step.name) if step.name else "the model"
            return f"the calls inside {inside} differ from batch to batch"
    for step in call.path():
        siblings = step.parent.children if step.parent is not None else [step]
        for sibling in siblings[: siblings.index(step)]:
            for inner in _inside(sibling):
                if inner.reason in _TELLING and not any(child.reason in _TELLING for child in inner.children):
                    return f"{inner.name!r} {inner.reason}"
    return ""


def finished_before(place: Call) -> Iterator[Call]:
    for step in place.path():
        if step.parent is not None:
            if step.parent.irregular:  # which of its calls come before is not known
                return
            for sibling in step.parent.children:
                if sibling is step:
                    break
                yield from _skippable(sibling)


def _skippable(call: Call) -> Iterator[Call]:
    """The call, or those inside it where its own output cannot be kept (those without any run again)."""
    if not call.reason:
        yield call
    elif not call.irregular:
        for child in call.children:
            yield from _skippable(child)


def _live(trace: Trace, skipped: tuple[Call, ...], forward: Callable[[], Any]) -> list[Call] | None:
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
    try:
        with torch.enable_grad(), intercepted(trace, skipped, make_leaves):
            output = forward()
    except (NotReusable, RuntimeError):  # another way with gradients, or something that has none
        return None
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

    Nothing inside a skipped call is intercepted, everything inside a watched one is. Calls are told apart by their
    order, so up to the last of them the calls have to be the traced ones: raises NotReusable where they are not. The
    modules are as before at the end of the context, which serves a single forward pass.
    """
    skipped = set(skipped)
    wanted = {*skipped, *watched}
    expected = trace.expected(skipped, wanted)
    at = 0
    inside = False
    failure: NotReusable | None = None

    def around(module: nn.Module, run: Callable[[], Any]) -> Any:
        nonlocal at, inside, failure
        if inside or at == len(expected):
            return run()
        call = expected[at]
        if call.module is not module:
            failure = NotReusable(f"{trace.modules[module]!r} was called where {call.name!r} was expected", call)
            raise failure
        at += 1
        inside = opened = call in skipped or call.irregular
        try:
            return handler(call, run) if call in wanted else run()
        finally:
            if opened:
                inside = False

    with around_calls(trace.modules, around):
        yield
    if failure is not None:  # the model has caught it
        raise failure
    if at < len(expected):
        raise NotReusable(f"{expected[at].name!r} was not called", expected[at])
