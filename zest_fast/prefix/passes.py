"""Passes of a model that start at the cut, that end there, and the full ones that they are held against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from zest_fast.foundation.interrupts import HeldInterrupts
from zest_fast.prefix.boundaries import (
    Boundary,
    Call,
    NotReusable,
    Rows,
    close,
    forwards_replaced,
    intercepted,
    rounding,
    tensors,
)
from zest_fast.prefix.placeholders import Reached, Unkept, filled
from zest_fast.prefix.sample_keys import Samples
from zest_fast.prefix.volatile_state import VolatileState, preserved
from zest_fast.profiling.borrowing.kept_attributes import KeptAttributes

Kept = Mapping[Call, list[Tensor]]
"""Of each live call its tensors with a part for each sample, in the order of `rows_in`."""


class Before:
    """Buffers, generators and plain attributes (counters, lists that grow) as they are now. modules: of the model."""

    def __init__(self, model: nn.Module, modules: Sequence[nn.Module]) -> None:
        self._state, self._attributes = VolatileState(model, modules), KeptAttributes(modules)

    def renew(self) -> None:
        """As they are now, of the same modules: in a fraction of the time of another one."""
        self._state.renew()
        self._attributes.renew()

    def let_go(self) -> None:
        """Of the values; `renew` comes before another `restore`."""
        self._state.let_go()
        self._attributes.let_go()

    def restore(self) -> None:
        self._state.restore()
        self._attributes.restore()


@contextmanager
def undone(model: nn.Module) -> Iterator[None]:
    """At the end all of that is what it was."""
    before = Before(model, list(model.modules()))
    try:
        yield
    finally:
        before.restore()


class Passes:
    """Of one model. eval_prefix: what is below the cut runs in eval mode."""

    def __init__(self, model: nn.Module, *, eval_prefix: bool) -> None:
        self.model, self._eval_prefix = model, eval_prefix

    def by(self, forward: Callable[..., Any]) -> AbstractContextManager[None]:
        """Inside, `forward` is what runs: the model's own, without what others have put around it since, which has done
        its part already."""
        return forwards_replaced({self.model: forward})

    def run(self, samples: Samples) -> Any:
        """As it is."""
        return self.model.forward(*samples.args, **samples.keywords)

    def undisturbed(self, call: Call, forward: Callable[[], Any]) -> Any:
        """A call below the cut."""
        if not self._eval_prefix:
            return forward()
        modes = [(module, module.training) for module in call.module.modules()]
        try:
            for module, _ in modes:
                module.training = False
            return forward()
        finally:
            with HeldInterrupts():
                for module, training in modes:
                    module.training = training

    def whole(self, boundary: Boundary, samples: Samples) -> Any:
        """With all calls below the cut, undisturbed."""
        with intercepted(boundary.trace, boundary.skipped, self.undisturbed):
            return self.run(samples)

    def from_cut(self, boundary: Boundary, samples: Samples, kept: Kept) -> Any:
        """Without them: live calls give what is kept, to which the model may write; the others placeholders."""
        with intercepted(boundary.trace, boundary.skipped, partial(_replay, boundary, kept, samples.count)):
            return self.run(samples)

    def to_cut(self, boundary: Boundary, samples: Samples, wanted: tuple[Call, ...]) -> dict[Call, Any]:
        """The outputs of these calls, copied as they are returned, by a pass that ends at the last of them.

        Raises NotReusable where one is not as it is known to be, or needs a gradient, or the pass takes another way.
        """
        found: dict[Call, Any] = {}
        waiting = set(wanted)

        def handle(call: Call, forward: Callable[[], Any]) -> Any:
            output = self.undisturbed(call, forward)
            if call in waiting:
                if call.output is not None and (difference := call.fits(output, samples.count)):
                    raise NotReusable(f"the output of {call.name!r} {difference}", call)
                if any(tensor.requires_grad for tensor in tensors(output)):
                    raise NotReusable(f"the output of {call.name!r} requires a gradient")
                found[call] = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)
                waiting.discard(call)
                if not waiting:
                    raise Reached
            return output

        if not waiting:
            return found
        try:
            with intercepted(boundary.trace, boundary.skipped, handle):
                self.run(samples)
        except Reached:
            return found
        raise NotReusable("the forward pass took another way than the traced one")

    def outcome(self, boundary: Boundary, samples: Samples) -> list[Tensor]:
        """By which passes are compared: what a whole one returns."""
        with undone(self.model), torch.no_grad():
            found = floats_of(self.whole(boundary, samples))
        if not found:
            raise NotReusable("the model returns no tensors by which two passes could be compared")
        return found

    def difference(
        self, boundary: Boundary, samples: Samples, kept: Kept, expected: list[Tensor], other: Samples
    ) -> str:
        """Of a pass from the cut to what a whole one has given, in words; "" where there is none but rounding.

        other: samples that run before, so that what modules remember is of those. Raises NotReusable where it takes
        another way, or depends on what is not kept.
        """
        with undone(self.model), torch.no_grad():
            with preserved(self.model):
                self.run(other)
            copies = {call: [tensor.clone() for tensor in stores] for call, stores in kept.items()}
            found = floats_of(self.from_cut(boundary, samples, copies))
        if len(found) != len(expected):
            return "have another structure"
        for ours, theirs in zip(found, expected, strict=True):
            if isinstance(ours, Unkept):
                raise NotReusable("the output depends on what was not kept")
            if not close(ours, theirs, rounding(theirs.dtype)):
                return f"are up to {float((ours.double() - theirs.double()).abs().nan_to_num().max()):.2g} off"
        return ""

    def gradients(self, boundary: Boundary, samples: Samples, kept: Kept | None) -> list[Tensor | None]:
        """Of what trains, by a pass from the cut, or a whole one; none where the output has no gradient."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        with undone(self.model), torch.enable_grad():
            if kept is None:
                output = self.whole(boundary, samples)
            else:
                copies = {call: [tensor.clone() for tensor in stores] for call, stores in kept.items()}
                output = self.from_cut(boundary, samples, copies)
            loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
            found = [loss] if isinstance(loss, Tensor) else floats_of(output)
            total = [t.float().mul(_weights(t)).sum() for t in found if t.requires_grad]
            if not total:
                return []
            return list(torch.autograd.grad(torch.stack(total).sum(), trained, allow_unused=True))


def _weights(tensor: Tensor) -> Tensor:
    """So that no two entries count alike: sums of normalised values are constant."""
    return torch.linspace(0.5, 1.5, tensor.numel(), device=tensor.device).view(tensor.shape)


def floats_of(output: Any) -> list[Tensor]:
    """Every tensor of floats that a model returns, be it in an object of a class of its own."""
    leaves = tensors(output) or [leaf for leaf in getattr(output, "__dict__", {}).values() if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if isinstance(leaf, Unkept) or leaf.is_floating_point()]


def with_rows(call: Call, output: Any) -> list[Tensor]:
    """Of an output, the tensors with a part for each sample."""
    pairs = zip(tree_leaves(call.output), tree_leaves(output), strict=True)
    return [value for known, value in pairs if isinstance(known, Rows)]


def part_of(known: Rows, store: Tensor, row: int) -> Tensor:
    """That of one sample."""
    each = known.shape[known.dim]
    return store.narrow(known.dim, row * each, each)


def _replay(boundary: Boundary, kept: Kept, count: int, call: Call, _: Callable[[], Any]) -> Any:
    is_live = call in boundary.live
    stores = iter(kept[call] if is_live else ())

    def leaf(known: Any) -> Any:
        if not is_live:
            return filled(known, count, torch.nan, boundary.writable)
        if isinstance(known, Rows):
            return next(stores)
        return known.clone() if isinstance(known, Tensor) else known

    return tree_map(leaf, call.output)
