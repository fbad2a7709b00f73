"""What a profile borrows from the user's model, and its return: bit for bit, also after an exception."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class ModelState(AbstractContextManager["ModelState"]):
    """Remembers flags, gradients, buffers, modes and random state; ``rewind`` and the end of the context restore them.

    Inside the context no parameter requires a gradient but ``trainable`` ones, and none has one. Post-accumulate hooks
    of the user (an optimizer in the backward pass, say) are set aside, since they would change the weights.
    """

    def __init__(self, modules: Iterable[nn.Module], trainable: Iterable[Tensor]) -> None:
        self._modules = list(modules)
        self._trainable = {id(p) for p in trainable}

    def __enter__(self) -> ModelState:
        modules = self._modules
        unique = {id(p): p for module in modules for p in module._parameters.values() if p is not None}
        parameters = list(unique.values())
        self._parameters = [(p, p.requires_grad, p.grad, p._post_accumulate_grad_hooks) for p in parameters]
        self._modes = [(module, module.training) for module in modules]
        # The dictionaries, because a model may replace or add buffers; clones, because it may write into them.
        self._registered = [(module, dict(module._buffers)) for module in modules]
        self._contents = [
            (buffer, buffer.detach().clone())
            for buffer in {id(b): b for _, buffers in self._registered for b in buffers.values()}.values()
            if buffer is not None and buffer.device.type != "meta" and not buffer.is_inference()
        ]
        self._cpu_random = torch.get_rng_state()
        self._cuda_random = {d: torch.cuda.get_rng_state(d) for d in {p.device for p in parameters} if d.type == "cuda"}
        for p in parameters:
            p.grad = None
            if p._post_accumulate_grad_hooks is not None:
                p._post_accumulate_grad_hooks = None  # type: ignore[assignment]
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
    def flags_of_the_user(self) -> Iterator[None]:
        """Every parameter requires a gradient, or not, as it was handed over."""
        now = [p.requires_grad for p in self.parameters]
        try:
            for p, requires_grad, *_ in self._parameters:
                p.requires_grad_(requires_grad)
            yield
        finally:
            for parameter, flag in zip(self.parameters, now, strict=True):
                parameter.requires_grad_(flag)

    def rewind(self) -> None:
        """Buffers, modes and random state as they were at first, for another pass over the same batch."""
        for module, training in self._modes:
            if module.training != training:
                module.training = training
        for module, buffers in self._registered:
            if any(module._buffers.get(name) is not b for name, b in buffers.items()) or len(module._buffers) != len(
                buffers
            ):
                module._buffers.clear()
                module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, clone in self._contents:  # all: native batch norm writes without a new version number
                _write(buffer, clone)
        torch.set_rng_state(self._cpu_random)
        for device, state in self._cuda_random.items():
            torch.cuda.set_rng_state(state, device)

    def clear_gradients(self) -> None:
        """Drops what a pass may have left in ``.grad``."""
        for p in self.parameters:
            p.grad = None

    def __exit__(self, *exception: Any) -> None:
        for p, requires_grad, grad, hooks in self._parameters:
            p.requires_grad_(requires_grad)
            p.grad = grad
            p._post_accumulate_grad_hooks = hooks
        self.rewind()


def _write(buffer: Tensor, clone: Tensor) -> None:
    """Copies clone into buffer; entries that an expanded buffer repeats are written once."""
    if buffer.layout == torch.strided:
        for dim, (size, stride) in enumerate(zip(buffer.shape, buffer.stride(), strict=True)):
            if stride == 0 and size > 1:
                buffer, clone = buffer.narrow(dim, 0, 1), clone.narrow(dim, 0, 1)
    buffer.copy_(clone)
