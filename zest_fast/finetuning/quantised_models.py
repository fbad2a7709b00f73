"""Layers of models that bitsandbytes has quantised (transformers does so on request): plain again where they train.

Known by the classes of their weights, so that bitsandbytes is imported only where a model has it already.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class _Owned(Protocol):
    @property
    def owners(self) -> tuple[str, ...]: ...


def can_be_unpacked(weight: Tensor) -> bool:
    """Whether it is a weight of bitsandbytes, in 4 or 8 bits, that has been quantised."""
    library: Any = sys.modules.get("bitsandbytes")
    if library is None or not isinstance(weight, library.nn.Params4bit | library.nn.Int8Params):
        return False
    return not weight.is_floating_point()


class UnpackedLayers:
    """Makes the quantised layers among `parts` plain nn.Linear layers in place; they train and stay so."""

    def __init__(self, model: nn.Module, parts: Iterable[_Owned]) -> None:
        """Raises ValueError, with the model untouched, where someone has replaced the forward of such a layer."""
        owners = {name: model.get_submodule(name) for part in parts for name in part.owners}
        self._packed = {
            name: (module, type(module), module._parameters["weight"])
            for name, module in owners.items()
            if module._parameters.get("weight") is not None and can_be_unpacked(module.weight)  # type: ignore[arg-type]
        }
        for name, (module, kind, _) in self._packed.items():
            if "forward" in vars(module):
                raise ValueError(
                    f"{name!r} is quantised, and the forward of its {kind.__name__} was replaced by "
                    f"{vars(module)['forward']!r:.80}, so it cannot be unpacked to train; choose another layer"
                )
        try:
            for module, _, weight in self._packed.values():
                module._parameters["weight"] = nn.Parameter(_dense(module, weight, _dtype(model)), False)
                module.__class__ = nn.Linear
        except BaseException:  # no memory for it
            self.undo()
            raise

    def undo(self) -> None:
        """Put the quantised weights back: nothing has trained yet."""
        for module, kind, weight in self._packed.values():
            module._parameters["weight"] = weight
            module.__class__ = kind

    def __bool__(self) -> bool:
        return bool(self._packed)


def _dense(module: Any, weight: Any, dtype: torch.dtype) -> Tensor:
    functional = sys.modules["bitsandbytes"].functional
    if getattr(weight, "quant_state", None) is not None:
        dense: Tensor = functional.dequantize_4bit(weight.data, weight.quant_state)
        return dense
    scale = weight.SCB if weight.SCB is not None else module.state.SCB  # moves at the first forward pass
    dense = functional.int8_vectorwise_dequant(weight.data, scale)
    return dense.to(dtype)


def _dtype(model: nn.Module) -> torch.dtype:
    """That of the model in general: weights in 8 bits do not say theirs."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
