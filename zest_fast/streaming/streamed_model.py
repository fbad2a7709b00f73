"""Which mapped weights of a model are read layer by layer, and what is put into the model for that."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zest_fast.finetuning.quantised_weights import QuantisedLinear, head_name
from zest_fast.streaming.buffer_ring import BufferRing, CopiedWeight, Part, buffer_bytes
from zest_fast.streaming.mapped_files import Pages, pages_of
from zest_fast.streaming.stays_in_place import refuse_moves
from zest_fast.streaming.streamed_linear import (
    CopiedLayer,
    Prefetch,
    StreamedLinear,
    StreamedQuantisedLinear,
    StreamedWeight,
)
from zest_fast.streaming.streamed_rows import (
    CopiedBlocks,
    CopiedHead,
    LookedUp,
    LookedUpEmbedding,
    MappedBlocks,
    largest_block,
)
from zest_fast.streaming.transfer import Transfer

WEIGHTS = ("weight", "packed", "scale")  #: of nn.Linear, nn.Embedding and QuantisedLinear


def stream_weights(model: nn.Module, mapped: Collection[int], transfer: Transfer | None = None) -> None:
    """Make streamed layers of those whose weight is mapped, in place; nothing happens where nothing is.

    mapped: ids of parameters. transfer: to the device of the model; None = the CPU, where embeddings, the head of a
    language model and what shares its weight keep their class, since others look at it; their pages go when the next
    layer runs and at the end of the forward pass.
    """
    _refuse_moves_of(model, mapped, torch.device("cpu") if transfer is None else transfer.device)
    if not mapped:
        return
    layers = _layers(model, mapped)
    prefetch = _on_cpu(model, mapped, layers) if transfer is None else _on_device(model, mapped, layers, transfer)
    for module in layers:
        module.__class__ = StreamedQuantisedLinear if isinstance(module, QuantisedLinear) else StreamedLinear
    model.register_forward_pre_hook(partial(_begin, prefetch))
    model.register_forward_hook(partial(_end, prefetch), always_call=True)


def others_weights(model: nn.Module) -> set[int]:
    """Ids of the parameters of modules that are whole on a device: they may look at them themselves.

    Streamed to a device are nn.Linear, packed ones and nn.Embedding, and no subclasses.
    """
    others: set[int] = set()
    for module in model.modules():
        kind = type(module)
        if kind not in (nn.Linear, QuantisedLinear) and not (kind is nn.Embedding and module.max_norm is None):
            others.update(map(id, module._parameters.values()))
    return others - {id(None)}


def _on_cpu(model: nn.Module, mapped: Collection[int], layers: dict[nn.Module, dict[str, nn.Parameter]]) -> Prefetch:
    streamed = {id(pages_of(parameter)) for own in layers.values() for parameter in own.values()}
    others = {id(pages): pages for p in model.parameters() if id(p) in mapped and (pages := pages_of(p)) is not None}
    others = {key: pages for key, pages in others.items() if key not in streamed}
    whole = {id(pages_of(module.weight)) for module in model.modules() if isinstance(module, nn.Linear)}
    for key, pages in others.items():
        if key not in whole:  # an embedding, and not tied to the head
            pages.used_by_rows()
    heads = []
    for parameter in model.parameters():
        pages = pages_of(parameter)
        if pages is not None and id(pages) in others and id(pages) in whole:
            heads.append(MappedBlocks(parameter, pages))
            parameter.blocks = heads[-1]  # type: ignore[attr-defined]
    prefetch = Prefetch(others.values(), heads)
    for module, own in layers.items():
        vars(module)["streamed"] = StreamedWeight(prefetch, _pages(own.values()))
    return prefetch


def _on_device(
    model: nn.Module,
    mapped: Collection[int],
    layers: dict[nn.Module, dict[str, nn.Parameter]],
    transfer: Transfer,
) -> Prefetch:
    others = {
        name: module
        for name, module in model.named_modules()
        if module not in layers and id(module._parameters.get("weight")) in mapped
    }
    heads = {name: module for name, module in others.items() if type(module) is nn.Linear}
    sizes = [buffer_bytes([p.nbytes for p in own.values()]) for own in layers.values()]
    sizes += [buffer_bytes([largest_block(module.weight)]) for module in heads.values()]
    blocks: dict[int, CopiedBlocks] = {}
    if sizes:
        ring = BufferRing(transfer, max(sizes))
        for name, module in heads.items():
            weight: Any = module.weight
            if id(weight) not in blocks:
                (pages,) = _pages([weight])
                weight.blocks = blocks[id(weight)] = CopiedBlocks(ring, name, weight, pages)
    prefetch = Prefetch(last=blocks.values())
    names = {module: name for name, module in model.named_modules()}
    for layer, own in layers.items():
        both = zip(own.values(), _pages(own.values()), strict=True)
        weights = CopiedWeight(names[layer], tuple(Part(pages, p.dtype, tuple(p.shape)) for p, pages in both))
        vars(layer)["streamed"] = CopiedLayer(prefetch, ring, weights)
    for other in others.values():
        weight = other.weight
        if type(other) is nn.Linear:
            vars(other)["streamed"] = blocks[id(weight)]
            other.__class__ = CopiedHead
        else:
            vars(other)["streamed"] = LookedUp(_pages([weight])[0], transfer.device)
            other.__class__ = LookedUpEmbedding
    return prefetch


def _layers(model: nn.Module, mapped: Collection[int]) -> dict[nn.Module, dict[str, nn.Parameter]]:
    """The layers that are streamed, and their weights that are mapped."""
    head, uses = head_name(model), _uses(model)
    found = {}
    for name, module in model.named_modules():
        own = {key: p for key, p in module._parameters.items() if key in WEIGHTS and p is not None and id(p) in mapped}
        shared = any(uses[id(parameter)] > 1 for parameter in own.values())
        if own and name != head and not shared and type(module) in (nn.Linear, QuantisedLinear):
            found[module] = own
    return found


def _pages(parameters: Iterable[nn.Parameter]) -> list[Pages]:
    found = [pages_of(parameter) for parameter in parameters]
    return [pages for pages in found if pages is not None]


def _uses(model: nn.Module) -> dict[int, int]:
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    return uses


def _refuse_moves_of(model: nn.Module, mapped: Collection[int], device: torch.device) -> None:
    """The layers refuse, too, but this one before anything has moved."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if not mapped:
        return

    def apply(fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for dtype in dtypes:
            refuse_moves(dtype, device, fn)
        return type(model)._apply(model, fn, recurse)

    model._apply = apply  # type: ignore[method-assign]


def _begin(prefetch: Prefetch, *_: Any) -> None:
    if not torch.compiler.is_compiling():
        prefetch.begin()


def _end(prefetch: Prefetch, *_: Any) -> None:
    if not torch.compiler.is_compiling():
        prefetch.end()
