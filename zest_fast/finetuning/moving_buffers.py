"""Buffers that a model's own forward pass moves in train mode, whatever is frozen, such as those of spectral norms.

That is torch's behaviour and no fault of training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from zest_fast.foundation.torch_private import forward_pre_hooks


class MovingBuffers:
    """Sees which saved buffers the passes of `model` change. names: those that moved in one, be it in a run before."""

    def __init__(self, model: nn.Module) -> None:
        self.names: set[str] = set()
        self._places = [
            (f"{prefix}.{key}" if prefix else key, module, key)
            for prefix, module in model.named_modules()
            for key in module._buffers
            if key not in module._non_persistent_buffers_set
        ]
        self.names.update(name for name, module, key in self._places if _is_of_spectral_norm(module, key))
        self._running = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around a forward pass."""
        if self._running or not self._places:  # of another thread, or an outer one
            yield
            return
        before = self._versions()
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            for name, version in self._versions().items():
                if before[name] != version:
                    self.names.add(name)

    def _versions(self) -> dict[str, tuple[int, int]]:
        return {name: _version(module._buffers.get(key)) for name, module, key in self._places}


def _version(buffer: Tensor | None) -> tuple[int, int]:
    if buffer is None or buffer.is_inference():  # which does not count its changes
        return id(buffer), 0
    return id(buffer), buffer._version


def _is_of_spectral_norm(module: nn.Module, key: str) -> bool:
    """Also where a pass is not seen: in compiled code, or of a part of the model."""
    if isinstance(module, _SpectralNorm):
        return True
    hooks = forward_pre_hooks(module).values()
    return any(isinstance(hook, SpectralNorm) and key in (f"{hook.name}_u", f"{hook.name}_v") for hook in hooks)
