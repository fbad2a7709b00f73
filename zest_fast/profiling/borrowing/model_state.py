"""What a profile borrows from the user's model, and its return: bit for bit, also after an exception."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zest_fast.foundation.nearest import some
from zest_fast.foundation.torch_private import post_accumulate_hooks, set_post_accumulate_hooks
from zest_fast.profiling.borrowing.kept_attributes import KeptAttributes
from zest_fast.profiling.borrowing.kept_random import KeptRandom
from zest_fast.profiling.borrowing.kept_values import CopyOnWrite, KeptValues, storage_of
from zest_fast.profiling.functions import forwards_of
from zest_fast.profiling.processes.local import local_part


class ModelState(AbstractContextManager["ModelState"]):
    """Remembers values, flags, gradients, buffers, attributes, modes and random state; ``rewind`` and the end of the
    context restore them.

    Inside the context no parameter requires a gradient but ``trainable`` ones, and none has one. Post-accumulate hooks
    of the user (an optimizer in the backward pass, say) are set aside, since they would change the weights. What a
    forward writes (a momentum encoder, ``max_norm`` of an embedding, clipping) is restored if it ran ``guarded``.

    Args:
        modules: of the model.
        trainable: parameters that require a gradient inside.
        functions: what runs the model; generators of random numbers that they refer to are rewound as well.
        values: whether values of parameters are restored, too; False for who writes into them and restores them.
        writes: whether functions or modules may write into tensors by themselves (see ``functions.may_write``). Where
            not, the forward pass of a large model is not watched, which takes time with each operator.

    Raises RuntimeError at the end of the context where a parameter was written that could not be saved before.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        trainable: Iterable[Tensor],
        functions: Iterable[Callable[..., Any]] = (),
        *,
        values: bool = False,
        writes: bool = True,
    ) -> None:
        self._modules = list(modules)
        self._writes = writes
        self._keeps_values = values
        self._trainable = {id(p) for p in trainable}
        self._functions = list(functions)
        self._written: set[int] | None = None if writes else set()

    def __enter__(self) -> ModelState:
        modules = self._modules
        unique = {id(p): p for module in modules for p in module._parameters.values() if p is not None}
        parameters = list(unique.values())
        self._parameters = [(p, p.requires_grad, p.grad, post_accumulate_hooks(p)) for p in parameters]
        self._modes = [(module, module.training) for module in modules]
        # The dictionaries, because a model may replace or add buffers; clones, because it may write into them.
        self._registered: list[tuple[dict[str, Any], dict[str, Any]]] = [
            (own, dict(own))
            for module in modules
            for own in (module._buffers, module._parameters, module._modules)
            if own
        ]
        self._registered += [
            (own, {}) for module in modules for own in (module._buffers, module._parameters, module._modules) if not own
        ]
        buffers = {id(b): b for module in modules for b in module._buffers.values() if b is not None}
        self._contents = [
            (buffer, buffer.detach().clone())
            for buffer in buffers.values()
            if buffer.device.type != "meta" and not buffer.is_inference()
        ]
        self._attributes = KeptAttributes(modules)
        self._own_tensors = [t for t in self._attributes.tensors if id(t) not in buffers and id(t) not in unique]
        self._values = [self._values_now()]
        self._random = KeptRandom(parameters, self._attributes.objects, self._functions, forwards_of(modules))
        for p in parameters:
            p.grad = None
            if post_accumulate_hooks(p) is not None:
                set_post_accumulate_hooks(p, None)
        self.set_flags(own=False)
        return self

    @property
    def parameters(self) -> list[Tensor]:
        """Every parameter of the model, once."""
        return [p for p, *_ in self._parameters]

    def set_flags(self, *, own: bool) -> None:
        """What requires a gradient: the trainable parameters, and of the others all or none that their user trains."""
        for p, requires_grad, *_ in self._parameters:
            wanted = id(p) in self._trainable or (own and requires_grad)
            if p.requires_grad != wanted:
                p.requires_grad_(wanted)

    @contextmanager
    def as_handed_over(self) -> Iterator[None]:
        """Every parameter requires a gradient, or not, and has one, or not, as its user has it."""
        now = [(p.requires_grad, p.grad) for p in self.parameters]
        try:
            for p, requires_grad, grad, _ in self._parameters:
                p.requires_grad_(requires_grad)
                p.grad = grad
            yield
        finally:
            for parameter, (flag, gradient) in zip(self.parameters, now, strict=True):
                parameter.requires_grad_(flag)
                parameter.grad = gradient

    def guarded(self, compute_loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """The function, run so that what it writes into parameters can be restored."""

        def run() -> Tensor:
            if not self._writes or all(kept.everything for kept in self._values):
                return compute_loss()
            with CopyOnWrite(self._values) as watching:
                self._written = watching.written
                return compute_loss()

        return run

    def may_have_written(self, tensor: Tensor) -> bool:
        """Whether a ``guarded`` forward may have written into this tensor by an alias of it; False is certain."""
        return self._written is None or storage_of(tensor) in self._written

    @contextmanager
    def replaced(self, tensors: Iterable[Tensor], change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
        """Parameters with other values, of another dtype if need be: ``change(i, values)`` for the i-th.

        Their own storage is set aside and put back, not written to: signs of zeros and payloads of NaN included, they
        are afterwards as before. Inside, ``rewind`` restores the other values.
        """
        before = [(tensor, tensor.data) for tensor in tensors]
        versions = [tensor._version for tensor, _ in before]
        levels = len(self._values)
        try:
            for i, (tensor, values) in enumerate(before):
                tensor.data = change(i, values)
            self._values.append(self._values_now())
            yield
        finally:
            del self._values[levels:]
            for tensor, values in before:
                tensor.data = values
            written = {id(t): t._version - version for (t, _), version in zip(before, versions, strict=True)}
            for kept in self._values:  # into the other values, which are gone
                kept.ignore_writes(written)

    def _values_now(self) -> KeptValues:
        return KeptValues(map(local_part, [*self.parameters, *self._own_tensors]) if self._keeps_values else [])

    def rewind(self) -> None:
        """Values, buffers, attributes, modes and random state as at first, for another pass over the same batch."""
        for module, training in self._modes:
            if module.training != training:
                module.training = training
        self._attributes.restore()
        for own, entries in self._registered:
            if not own and not entries:
                continue
            if own.keys() != entries.keys() or not all(map(operator.is_, map(own.get, entries), entries.values())):
                own.clear()
                own.update(entries)
        with torch.no_grad():
            self._values[-1].restore()
            for buffer, clone in self._contents:  # all: native batch norm writes without a new version number
                _write(buffer, clone)
        self._random.restore()

    def clear_gradients(self) -> None:
        """Drops what a pass may have left in ``.grad``."""
        for p in self.parameters:
            p.grad = None

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        for p, requires_grad, grad, hooks in self._parameters:
            p.requires_grad_(requires_grad)
            p.grad = grad
            if hooks is not post_accumulate_hooks(p):
                set_post_accumulate_hooks(p, hooks)
        self.rewind()
        lost = self._values[0].lost
        if lost and kind is None:
            names = {id(p): n for module in self._modules[:1] for n, p in module.named_parameters()}
            raise RuntimeError(
                f"written in place outside of the forward pass (a hook of the backward pass, say) and hence not as "
                f"before: {some(names.get(id(p), 'a tensor of the model') for p in lost)}; load the weights again, and "
                "profile without what writes them"
            )


def _write(buffer: Tensor, clone: Tensor) -> None:
    """Copies clone into buffer; entries that an expanded buffer repeats are written once."""
    if buffer.layout == torch.strided:
        for dim, (size, stride) in enumerate(zip(buffer.shape, buffer.stride(), strict=True)):
            if stride == 0 and size > 1:
                buffer, clone = buffer.narrow(dim, 0, 1), clone.narrow(dim, 0, 1)
    buffer.copy_(clone)
