"""Which outputs of layers belong to the step: those of calls through which its backward passes go.

Between two steps a model is often called otherwise (validation, a forward that failed, a teacher). Outputs are
therefore counted by call of the whole model, and a call counts once a gradient arrives at it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zest_fast.kernels.storage import has_storage
from zest_fast.profiling.layers import Layer
from zest_fast.profiling.processes.local import local_part
from zest_fast.profiling.taps import ModuleHook

Found = Callable[[], Any]  # moments, once they are fetched


class Call:
    """The outputs of layers in one call of the model."""

    def __init__(self, counted: dict[Layer, list[Found]], samples: int | None, sizes: list[int | None]) -> None:
        self._counted, self._samples, self._sizes = counted, samples, sizes
        self._waiting: list[tuple[Layer, Found]] | None = []

    def add(self, layer: Layer, found: Found) -> None:
        if self._waiting is None:
            self._counted.setdefault(layer, []).append(found)
        else:
            self._waiting.append((layer, found))

    def count(self) -> None:
        """A gradient arrived: the call is part of the step."""
        if self._waiting is None:
            return
        waiting, self._waiting = self._waiting, None
        self._sizes.append(self._samples)
        for layer, found in waiting:
            self._counted.setdefault(layer, []).append(found)


class Calls:
    """Hooks on the model as its user calls it.

    Args:
        counted: where the outputs of calls that count are put.
        in_backward: whether a backward pass of the step runs.
        samples: how many samples a call has, as of ``watch``.
    """

    def __init__(
        self,
        counted: dict[Layer, list[Found]],
        in_backward: Callable[[], bool],
        samples: int | Callable[[tuple[Any, ...], Mapping[str, Any]], int] | None,
    ) -> None:
        self._counted = counted
        self._in_backward = in_backward
        self._samples = samples
        self._thread = threading.get_ident()
        self._depth = 0
        self._call: Call | None = None
        self._sizes: list[int | None] = []  # of the calls that count in this backward pass
        self.returned: set[int] = set()
        """Addresses of what the model returned: its user may write into that."""

    def hook(self, model: nn.Module) -> list[Any]:
        """Handles of the hooks."""
        return [
            model.register_forward_pre_hook(ModuleHook(self._before), with_kwargs=True, prepend=True),
            model.register_forward_hook(ModuleHook(self._after), always_call=True),
        ]

    @property
    def current(self) -> Call | None:
        """The call that runs, None where no gradient can arrive at it (validation); outside of any call each output is
        one by itself."""
        if self._depth:
            return self._call
        return Call(self._counted, None, []) if torch.is_grad_enabled() else None

    def samples_of_part(self) -> int | None:
        """Samples of the backward pass that ends, None where its calls do not say, or not the same."""
        if isinstance(self._samples, int):
            return self._samples
        found = set(self._sizes)
        self._sizes.clear()
        return found.pop() if len(found) == 1 else None

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or threading.get_ident() != self._thread:
            return
        self._depth += 1
        if self._depth > 1:
            return
        if torch.is_grad_enabled():
            count = self._samples if callable(self._samples) else _first_dimension
            self._call = Call(self._counted, count(args, kwargs), self._sizes)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling() or threading.get_ident() != self._thread:
            return
        self._depth = max(0, self._depth - 1)
        if self._depth:
            return
        call, self._call = self._call, None
        for tensor in _tensors(output):
            own = local_part(tensor.detach())
            if has_storage(own):
                self.returned.add(own.data_ptr())
            if tensor.grad_fn is not None and call is not None:
                # A hook after the node: one before it would look like a hook of the user's to the taps.
                tensor.grad_fn.register_hook(self._counting(call))

    def _counting(self, call: Call) -> Callable[..., None]:
        def arrived(*_: Any) -> None:
            if self._in_backward():
                call.count()

        return arrived


def _first_dimension(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    return next((t.shape[0] for t in _tensors((args, dict(kwargs))) if t.dim()), None)


def _tensors(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """Those in the containers that models take and return."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner, depth - 1)
    elif depth and isinstance(value, tuple | list):
        for inner in value:
            yield from _tensors(inner, depth - 1)
