"""The pass of `zest_fast.profile` on fake tensors: its own taps, with nobody behind them who reduces anything."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from zest_fast.planning.batches import cast, make_batch
from zest_fast.planning.blocks import Layout
from zest_fast.planning.dry_run import dry, fake_batch, fill
from zest_fast.planning.ledger import Ledger
from zest_fast.planning.settings import DTYPES, Setting
from zest_fast.planning.step import Step, hold
from zest_fast.profiling.layers import Layer, Weight, find_layers, select_layers
from zest_fast.profiling.loss import loss_of
from zest_fast.profiling.metrics import BACKWARD, ON_REQUEST, select_metrics, statistics_needed
from zest_fast.profiling.taps import Routes, Taps
from zest_fast.profiling.watched import watched_for

# Of a Linear's dW as much exists at once on a GPU where it is formed and reduced in two steps; on a CPU a few MiB.
_TILE_BYTES = 32 << 20


def dry_profile(
    skeleton: nn.Module,
    layout: Layout,
    setting: Setting,
    metrics: Iterable[str] | str | None = None,
    batch: Any = None,
) -> Step:
    """The forward and backward pass of a profile of every layer, in eval mode. batch: its shapes are those of the pass,
    in the place of the sizes of the setting."""
    needed = statistics_needed(select_metrics(metrics))
    if needed & ON_REQUEST:
        raise NotImplementedError(f"metrics: {', '.join(sorted(needed & ON_REQUEST))} take passes that are not planned")
    if not needed & BACKWARD:
        raise ValueError("metrics: none of them needs a backward pass, so a profile needs the memory of inference")
    model = copy.deepcopy(skeleton).eval()
    weights = DTYPES[setting.dtype][0] if setting.dtype else None
    with dry(batch) as mode, mode:
        fill(model, weights)
        batch = cast(make_batch(model, setting) if batch is None else fake_batch(batch), weights)
        chosen = select_layers(find_layers(dict(model.named_modules())), None)
        trainable = {id(layer.weight.parameter): layer.weight.parameter for layer in chosen}
        watched = watched_for(needed)
        for parameter in model.parameters():
            parameter.requires_grad_(watched.gradients and id(parameter) in trainable)
        ledger = Ledger()
        hold(ledger, model, batch, {})
        ledger.watch(model, layout.head)
        taps = Taps(
            chosen,
            [module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)],
            (),
            _Mute(ledger),
            Routes(),
            watched,
        )
        compute_loss = loss_of(model, batch, None, None)
        with ledger, taps:
            ledger.enter("forward")
            ledger.start()
            loss = compute_loss()
            ledger.enter("backward")
            taps.backward(loss, model.parameters())
        books = ledger.books()
        return Step(books.peak(), books.flops_by_phase, sum(p.numel() for p in trainable.values()), "")


class _Mute:
    """Sees what a profile would reduce, and counts what forming it costs."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def output(self, layer: Layer, y: Tensor) -> None:
        """Reduced where it is."""

    def linear(self, layer: Layer, x: Tensor, g: Tensor) -> None:
        entries = x.shape[-1] * g.shape[-1]
        self._ledger.count(2 * (x.numel() // x.shape[-1]) * entries)
        torch.empty(min(4 * entries, _TILE_BYTES) // 4, device="cpu")  # seen by the ledger, and gone again

    def weight_gradient(self, weight: Weight, dw: Tensor) -> None:
        """Reduced where it is."""

    def output_gradient(self, layer: Layer, y: Callable[[], Tensor], g: Tensor, only_use: bool) -> None:
        y()

    def untouched(self, layer: Layer) -> None:
        """Nothing is reduced."""

    def missed(self, layer: Layer, why: str, *, outputs: bool) -> None:
        """Nothing is reduced."""
