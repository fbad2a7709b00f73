"""Frozen Linear layers whose weights are kept in int8 or nf4 and unpacked one at a time, in forward and in backward.

Only weights are quantised: what is computed is what the same model, wrapped alike, computes with the rounded weights,
bit for bit.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Collection, Mapping
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zest_fast.finetuning.quantised_formats import FORMATS
from zest_fast.foundation.nearest import some
from zest_fast.foundation.torch_private import forward_mode_is_on, transforms_are_active
from zest_fast.lean.forward import LeanForward
from zest_fast.profiling.heads import find_head


class QuantisedLinear(nn.Module):
    """What an nn.Linear is while its weight is packed; made by `QuantisedWeights` and never from scratch.

    packed, scale: parameters that never train, in the place of `weight`. `.weight` unpacks: the rounded weight, [out,
    in] in `dtype`, a fresh tensor at every reading, so that writing to it changes nothing.
    """

    packed: nn.Parameter
    scale: nn.Parameter
    bias: nn.Parameter | None
    format: str
    dtype: torch.dtype
    in_features: int
    out_features: int

    @property
    def weight(self) -> Tensor:
        return self.unpack(self.packed.detach(), self.scale.detach())

    def unpack(self, packed: Tensor, scale: Tensor) -> Tensor:
        shape = torch.Size((self.out_features, self.in_features))
        return FORMATS[self.format].unpack(packed, scale, shape, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if transforms_are_active() or forward_mode_is_on():
            return F.linear(x, self.weight, self.bias)  # which knows every kind of differentiation
        return _PackedLinear.apply(x, self.bias, self.packed, self.scale, self.unpack)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.format}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantisedLinear:
        """`.to(dtype)` is about the unpacked weight: its scales stay in float32."""
        packed, scale = self.packed.detach(), self.scale.detach()
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=scale.device)).dtype
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self.scale.data = scale.to(self.scale.device)
        if self.packed.dtype != packed.dtype:  # of `.type()`
            self.packed.data = packed.to(self.packed.device)
        return self


class _PackedLinear(torch.autograd.Function):
    """Keeps the packed weight for the backward pass; torch's own would keep the unpacked one of every layer."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, packed: Tensor, scale: Tensor, unpack: Callable[..., Tensor]
    ) -> Tensor:
        ctx.save_for_backward(packed, scale)
        ctx.unpack, ctx.dtype, ctx.bias_dtype = unpack, x.dtype, None if bias is None else bias.dtype
        return F.linear(x, unpack(packed, scale), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        dx = db = None
        if ctx.needs_input_grad[0]:
            dx = torch.matmul(g, ctx.unpack(*ctx.saved_tensors).to(g.dtype)).to(ctx.dtype)
        if ctx.needs_input_grad[1]:  # of an adapter: here it is frozen
            db = g.reshape(-1, g.shape[-1]).sum(0).to(ctx.bias_dtype)
        return dx, db, None, None, None


class QuantisedWeights:
    """The frozen Linear layers of a model, packed in place; `.remove()` unpacks them.

    That gives plain nn.Linear layers of their own dtype again, with the rounded weights: what was lost stays lost, and
    the memory of the plain model is needed.
    """

    def __init__(self, model: nn.Module, format: str, trained: Collection[int]) -> None:
        """trained: ids of the parameters that are to train. Nothing happens before `.put_in()`.

        Raises ValueError for an unknown format and where there is nothing to pack, ImportError without the library.
        """
        if format not in FORMATS:
            raise ValueError(f"frozen={format!r} is unknown; None, 'int8' or 'nf4' is needed")
        self.format = format
        self._model = model
        self._adapted: list[nn.Module] = []
        self._replaced: list[weakref.ref[Tensor]] = []
        self._bytes = 0
        self._layers = frozen_linears(model, trained, head_name(model), format)
        FORMATS[format].check()
        on_meta = [name for name, module in self._layers.items() if module.weight.is_meta]
        if on_meta:
            raise ValueError(
                f"frozen={format!r}: {some(map(repr, on_meta))} on the meta device (offloaded or not loaded); "
                "load the weights first"
            )

    def put_in(self) -> None:
        """Raises ValueError, with nothing packed, for a weight that is not finite."""
        for name, module in self._layers.items():
            if not torch.isfinite(torch.stack(torch.aminmax(module.weight.detach()))).all():
                raise ValueError(f"frozen={self.format!r}: {name!r} holds weights that are not finite; mend them first")
        for module in self._layers.values():
            self._replaced.append(weakref.ref(module.weight))
            _pack(module, self.format)
            self._bytes += sum(parameter.nbytes for parameter in module.parameters())
        packed = {id(module) for module in self._layers.values()}
        self._adapted = [adapter for adapter in self._model.modules() if id(_base_of(adapter)) in packed]
        for adapter in self._adapted:
            vars(adapter).update(merge=_refuse_merge, unmerge=_refuse_merge)

    def remove(self) -> None:
        for adapter in self._adapted:
            for name in ("merge", "unmerge"):
                vars(adapter).pop(name, None)
        for module in self._layers.values():
            _unpack(module)

    def replaced(self) -> set[int]:
        """Ids of the plain weights that somebody still holds, such as an optimizer of before."""
        return {id(weight) for reference in self._replaced if (weight := reference()) is not None}

    @property
    def rounded(self) -> bool:
        """Whether any weight has been packed, be it unpacked since."""
        return self._bytes > 0

    def __str__(self) -> str:
        return f"{len(self._layers)} Linear layers in {self.format}, {self._bytes / 2**20:,.1f} MiB, rounded for good"


def frozen_linears(model: nn.Module, trained: Collection[int], head: str | None, format: str) -> dict[str, nn.Linear]:
    """The layers that can be packed, by name: plain nn.Linear, weight frozen and nobody else's, and not the head.

    trained: ids of the parameters that train. Raises ValueError, naming the format, where there are none.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and name != head
        and isinstance(vars(module).get("forward"), NoneType | LeanForward)
        and (weight := module._parameters.get("weight")) is not None
        and weight.numel() > 0
        and weight.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and id(weight) not in trained
        and owners[id(weight)] == 1
    }
    if not found:
        raise ValueError(f"frozen={format!r}: the model has no frozen nn.Linear to quantise; leave it None")
    return found


def _base_of(module: nn.Module) -> nn.Module | None:
    """What an adapter of PEFT is on."""
    base = module._modules.get("base_layer")
    return base if hasattr(module, "merge") else None


def _refuse_merge(*_: Any, **__: Any) -> None:
    raise RuntimeError("an adapter cannot be merged into a quantised weight: call .remove() of SelectiveBackward first")


def head_name(model: nn.Module) -> str | None:
    """The head, which stays as it is whether it trains or not; None where there is none that can be told."""
    try:
        return find_head(model)
    except ValueError:
        return None


def weight_counts(model: nn.Module) -> dict[int, int]:
    """By id of each parameter, how many weights of the model it stands for: packed ones for those that they hold."""
    counts = {id(parameter): _stands_for(parameter) for parameter in model.parameters()}
    for module in model.modules():
        if isinstance(module, QuantisedLinear):
            counts[id(module.packed)] = module.in_features * module.out_features
            counts[id(module.scale)] = 0
    return counts


def _stands_for(parameter: Tensor) -> int:
    state = getattr(parameter, "quant_state", None)  # of bitsandbytes, in 4 bits
    return parameter.numel() if state is None else math.prod(state.shape)


def _pack(module: nn.Module, format: str) -> None:
    """The same object with another class, as torch's parametrisations do it: names, hooks and references stay."""
    weight = module._parameters["weight"]
    assert weight is not None
    packed, scale = FORMATS[format].pack(weight.detach())
    new = {"packed": nn.Parameter(packed, False), "scale": nn.Parameter(scale, False)}
    module.__class__ = QuantisedLinear
    vars(module).update(format=format, dtype=weight.dtype)
    _rename(module._parameters, {"weight": new})


def _unpack(module: nn.Module) -> None:
    if isinstance(module, QuantisedLinear):
        weight = nn.Parameter(module.weight, False)
        plain: nn.Module = module
        plain.__class__ = nn.Linear
        for name in ("format", "dtype"):
            del vars(plain)[name]
        _rename(plain._parameters, {"packed": {"weight": weight}, "scale": {}})


def _rename(there: dict[str, Any], changes: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace entries where they stand: `named_parameters()` goes by the order."""
    found = list(there.items())
    there.clear()
    for name, value in found:
        there.update(changes.get(name, {name: value}))
