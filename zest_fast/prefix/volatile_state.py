"""What a forward pass may change beside its output: buffers, and the generators of torch, Python and NumPy."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zest_fast.foundation.torch_private import flattened


class VolatileState:
    """Remembers buffers and generators of a model; `restore` puts them back, as often as it is called.

    modules: of the model, by whoever has walked them already.
    """

    def __init__(self, model: nn.Module, modules: Iterable[nn.Module] | None = None) -> None:
        self._model = model
        self._modules = list(model.modules() if modules is None else modules)
        self._remember()

    def _remember(self) -> None:
        # The dictionaries, because a model may replace buffers; clones, because it may write into them.
        held = ((module, module._buffers) for module in self._modules)
        self._registered = [(module, dict(buffers)) for module, buffers in held if buffers]
        buffers = {id(b): b for _, own in self._registered for b in own.values() if b is not None}
        self._plain = [(buffer, _kind(buffer)) for buffer in buffers.values() if _is_plain(buffer)]
        groups: dict[Any, list[Tensor]] = {}
        for buffer, kind in self._plain:
            groups.setdefault(kind, []).append(buffer)
        self._groups = [(group, _joined(group)) for group in groups.values()]
        self._generators = generators()

    def renew(self) -> None:
        """Remembers what is there now, of the same modules: the values are copied, and what they are found by is kept
        where it still holds."""
        if self._is_laid_out_the_same():
            self._groups = [(group, _joined(group)) for group, _ in self._groups]
            self._generators = generators()
        else:
            self._remember()

    def let_go(self) -> None:
        """Of the copies of values, and of buffers that hold on to a graph; `renew` comes before another `restore`."""
        self._groups = [(group, group[0].new_empty(0)) for group, _ in self._groups]
        if any(buffer.requires_grad for buffer, _ in self._plain):
            self._registered, self._plain, self._groups = [], [], []

    def _is_laid_out_the_same(self) -> bool:
        now = [(module, module._buffers) for module in self._modules if module._buffers]
        return (
            len(now) == len(self._registered)
            and all(
                module is known and buffers.keys() == before.keys() and all(map(is_, buffers.values(), before.values()))
                for (module, buffers), (known, before) in zip(now, self._registered, strict=True)
            )
            and all(_kind(buffer) == kind for buffer, kind in self._plain)
        )

    @torch.no_grad()
    def restore(self) -> None:
        for module, buffers in self._registered:
            if any(module._buffers.get(name) is not buffer for name, buffer in buffers.items()):
                module._buffers.update(buffers)
        for buffer, clone in self._written():  # else a graph may have saved it, and it may be an expanded one
            buffer.copy_(clone)
        _set_generators(self._generators)

    def _written(self) -> list[tuple[Tensor, Tensor]]:
        """Buffers whose values are not what they were, and these."""
        found = []
        for group, joined in self._groups:
            if not _same(_joined(group), joined):
                parts = joined.split([buffer.numel() for buffer in group])
                pairs = [(buffer, part.view(buffer.shape)) for buffer, part in zip(group, parts, strict=True)]
                found += [(buffer, part) for buffer, part in pairs if not _same(buffer, part)]
        return found

    def changed_buffers(self) -> set[int]:
        """Ids of those that are not what they were."""
        return {id(buffer) for buffer, _ in self._written()} | {
            id(buffer)
            for module, buffers in self._registered
            for name, buffer in buffers.items()
            if buffer is not None and module._buffers.get(name) is not buffer
        }

    def changed_names(self) -> list[str]:
        """Of those, as they were called."""
        changed, paths = self.changed_buffers(), {module: path for path, module in self._model.named_modules()}
        return sorted(
            f"{paths[module]}.{name}" if paths[module] else name
            for module, buffers in self._registered
            for name, buffer in buffers.items()
            if id(buffer) in changed
        )


@contextmanager
def preserved(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """At the end buffers and generators are what they were; inside, the generators start from `seed`, if one is given.

    So what a model draws, such as dropout that is active in eval mode, does not depend on what ran before.
    """
    state = VolatileState(model)
    try:
        if seed is not None:
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
        yield
    finally:
        state.restore()


def generators() -> tuple[Any, ...]:
    """The states of the generators; two are equal where nothing was drawn in between."""
    numpy_state: Any = np.random.get_state()
    name, keys, *rest = numpy_state
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    cuda = tuple(bytes(torch.cuda.get_rng_state(device).numpy()) for device in devices)
    return bytes(torch.get_rng_state().numpy()), cuda, random.getstate(), (name, bytes(keys), *rest)


def _set_generators(states: tuple[Any, ...]) -> None:
    cpu, cuda, python, (name, keys, *rest) = states
    torch.set_rng_state(_state(cpu))
    for device, state in enumerate(cuda):
        torch.cuda.set_rng_state(_state(state), device)
    random.setstate(python)
    np.random.set_state((name, np.frombuffer(keys, dtype=np.uint32), *rest))


def _state(contents: bytes) -> Tensor:
    return torch.frombuffer(bytearray(contents), dtype=torch.uint8)


def _joined(group: list[Tensor]) -> Tensor:
    """A copy of all values, one after another: one tensor is copied and compared in a fraction of the time of many."""
    with torch.no_grad():
        return flattened(group) if len(group) > 1 else group[0].clone().reshape(-1)  # of one alone it is no copy


def _same(buffer: Tensor, clone: Tensor) -> bool:
    return bool(torch.eq(buffer, clone).logical_or_((buffer != buffer) & (clone != clone)).all())


def _kind(buffer: Tensor) -> tuple[Any, ...]:
    """Those of one kind are joined."""
    return type(buffer), buffer.device, buffer.dtype


def _is_plain(buffer: Tensor) -> bool:
    return buffer.layout == torch.strided and not (buffer.is_meta or buffer.is_inference() or buffer.is_quantized)
