"""Which mapped weights of a model are read layer by layer, and what is put into the model for that."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zest_fast.finetuning.quantised_weights import QuantisedLinear, head_name
from zest_fast.streaming.mapped_files import Pages, pages_of
from zest_fast.streaming.streamed_linear import (
    Prefetch,
    StreamedLinear,
    StreamedQuantisedLinear,
    StreamedWeight,
    refuse_moves,
)

WEIGHTS = ("weight", "packed", "scale")  #: of nn.Linear, nn.Embedding and QuantisedLinear


def stream_weights(model: nn.Module, mapped: Collection[int]) -> None:
    """Make streamed layers of those whose weight is mapped, in place; nothing happens where nothing is.

    Embeddings, the head of a language model and what shares its weight keep their class, since others look at it;
    their pages go when the next layer runs and at the end of the forward pass.
    mapped: ids of parameters.
    """
    if not mapped:
        return
    layers = _layers(model, mapped)
    streamed = {id(pages) for every in layers.values() for pages in every}
    others = {id(pages): pages for p in model.parameters() if id(p) in mapped and (pages := pages_of(p)) is not None}
    others = {key: pages for key, pages in others.items() if key not in streamed}
    whole = {id(pages_of(module.weight)) for module in model.modules() if isinstance(module, nn.Linear)}
    for key, pages in others.items():
        if key not in whole:  # an embedding, and not tied to the head
            pages.used_by_rows()
    prefetch = Prefetch(others.values(), (pages for key, pages in others.items() if key in whole))
    for module, own in layers.items():
        module.__class__ = StreamedQuantisedLinear if isinstance(module, QuantisedLinear) else StreamedLinear
        vars(module)["streamed"] = StreamedWeight(prefetch, own)
    model.register_forward_pre_hook(partial(_begin, prefetch))
    model.register_forward_hook(partial(_end, prefetch), always_call=True)
    _refuse_moves_of(model)


def _layers(model: nn.Module, mapped: Collection[int]) -> dict[nn.Module, list[Pages]]:
    """The layers that are streamed, and the pages of their weights."""
    head, uses = head_name(model), _uses(model)
    found = {}
    for name, module in model.named_modules():
        own = [p for key, p in module._parameters.items() if key in WEIGHTS and id(p) in mapped]
        shared = any(uses[id(parameter)] > 1 for parameter in own)
        if own and name != head and not shared and type(module) in (nn.Linear, QuantisedLinear):
            found[module] = [pages for parameter in own if (pages := pages_of(parameter)) is not None]
    return found


def _uses(model: nn.Module) -> dict[int, int]:
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    return uses


def _refuse_moves_of(model: nn.Module) -> None:
    """The layers refuse, too, but this one before anything has moved."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}

    def apply(fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for dtype in dtypes:
            refuse_moves(dtype, fn)
        return type(model)._apply(model, fn, recurse)

    model._apply = apply  # type: ignore[method-assign]


def _begin(prefetch: Prefetch, *_: Any) -> None:
    if not torch.compiler.is_compiling():
        prefetch.begin()


def _end(prefetch: Prefetch, *_: Any) -> None:
    if not torch.compiler.is_compiling():
        prefetch.end()
