"""Where backward ends: the first module of the forward pass whose parameters train."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from zest_fast.profiling.profile import is_being_profiled


class CutFinder:
    """Knows the lowest of some modules: by registration at first, by the order of use after the first forward pass.

    Its hooks only note the order of the first forward pass of `model` and go away with it. A module that is never
    called, because its parent uses its weight directly (nn.MultiheadAttention.out_proj), counts where the parent runs.
    Warns where backward will not end there, because the input of the lowest module requires a gradient.
    """

    def __init__(self, model: nn.Module, owners: Mapping[str, nn.Module]) -> None:
        """owners: the modules that own a parameter that trains, by name, in the order of registration."""
        self.owner = next(iter(owners))
        self._owners = list(owners)
        self._order: dict[str, int] = {}  # of first use
        self._passes_on: set[str] = set()  # whose input requires a gradient
        watched = dict.fromkeys(place for name in owners for place in _upwards(name) if place)
        self._handles = [model.register_forward_pre_hook(self._begin), model.register_forward_hook(self._end)]
        for name in watched:
            self._handles.append(
                model.get_submodule(name).register_forward_pre_hook(partial(self._note, name), with_kwargs=True)
            )

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        self._order, self._passes_on = {"": 0}, set()  # afresh: an earlier forward pass may have raised

    def _note(self, name: str, module: nn.Module, inputs: Any, keywords: dict[str, Any]) -> None:
        self._order.setdefault(name, len(self._order))
        if any(isinstance(x, torch.Tensor) and x.requires_grad for x in (*inputs, *keywords.values())):
            self._passes_on.add(name)

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if is_being_profiled(module):
            return
        self.owner = min(self._owners, key=self._position)  # the first in registration where they tie
        self.remove()
        if self.owner in self._passes_on:
            warnings.warn(
                f"backward will run on below {self.owner!r}, where it should end, because the input of that module "
                "requires a gradient; after gradient_checkpointing_enable(), call disable_input_require_grads()",
                stacklevel=2,
            )

    def _position(self, name: str) -> int:
        return next(self._order[place] for place in _upwards(name) if place in self._order)


def _upwards(name: str) -> list[str]:
    """The name, those of its parents, and "" for the root."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)] + ([""] if name else [])
