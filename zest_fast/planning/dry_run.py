"""The engine of every dry run: the user's own code on fake tensors, counted instead of computed.

Fake tensors have shapes, dtypes and devices and no contents, so a pass of a 7B model takes seconds and no memory. A
plan runs a copy of the model, on the CPU (`fill`); a count of FLOPs borrows the model itself (`faked`).
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from zest_fast.foundation.torch_private import DataDependentOutputException, DynamicOutputShapeException
from zest_fast.lean.frozen_norms import keep_frozen_norms_in_eval
from zest_fast.planning.fake_mode import FakeMode, masks_as_in_a_real_step
from zest_fast.profiling.borrowing.training_modes import modes_kept
from zest_fast.profiling.loss import loss_of


@contextlib.contextmanager
def dry(batch: Any = None) -> Iterator[FakeMode]:
    """A mode in which new tensors are fake. Tensors that a model keeps outside of its buffers stay real and take part.

    batch: one with values, by which a real step would leave out masks; None = texts without padding.
    The collector of cycles rests meanwhile, whose moments would be chance. Raises ValueError where a model asks for the
    value of a tensor.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with masks_as_in_a_real_step(batch):
            yield FakeMode()
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"the model asks for values of tensors ({error}), and a dry run has shapes only; pass a configuration or a "
            "form of the model whose forward does without"
        ) from error
    finally:
        if was_enabled:
            gc.enable()


def fill(model: nn.Module, dtype: torch.dtype | None, device: str | None = "cpu") -> None:
    """Put fake tensors in the place of parameters and buffers, tied ones once; floating-point ones in `dtype`.

    device: None = where each of them is.
    """
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    if id(tensor) not in made:
                        made[id(tensor)] = fake(tensor, dtype, device)
                    tensors[name] = made[id(tensor)]  # type: ignore[assignment]


def fake(tensor: Tensor, dtype: torch.dtype | None, device: str | None = "cpu") -> Tensor:
    """One like `tensor`, a parameter where that is one; in a mode of `dry`."""
    dtype = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=_place(tensor, device))
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def fake_batch(batch: Any, device: str | None = "cpu") -> Any:
    """The same with fake tensors; of those there, only shapes and dtypes are read."""
    return tree_map_only(Tensor, lambda x: torch.empty(x.shape, dtype=x.dtype, device=_place(x, device)), batch)


def _place(tensor: Tensor, device: str | None) -> str | torch.device:
    return device or ("cpu" if tensor.is_meta else tensor.device)


@contextlib.contextmanager
def faked(model: nn.Module, batch: Any) -> Iterator[Callable[[], Tensor]]:
    """A function that computes the loss of `batch` on fake tensors in the place of parameters, buffers and inputs.

    The model, in train mode meanwhile, has its own tensors, modes and random state back afterwards: it is borrowed and
    not copied, for whatever cannot be copied. Nothing requires a gradient. Raises as `dry`.
    """
    real = [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    handles: list[Any] = []
    with torch.random.fork_rng(devices=[]), modes_kept(model):
        try:
            with dry(batch) as mode, mode:
                fill(model, None, device=None)
                model.requires_grad_(False)
                handles += keep_frozen_norms_in_eval(model)
                model.train()
                yield loss_of(model, fake_batch(batch, device=None), None, None)
        finally:
            for handle in handles:
                handle.remove()
            for module, parameters, buffers in real:
                _put_back(module._parameters, parameters)
                _put_back(module._buffers, buffers)


def _put_back(there: dict[str, Any], found: dict[str, Any]) -> None:
    there.clear()
    there.update(found)
