"""The observer of a pass that several processes run: what of a tensor is this process's to count, and what a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from zest_fast.kernels.moments import SquaredProducts
from zest_fast.profiling.layers import Layer, Weight, channel_dim, is_transformers_conv1d
from zest_fast.profiling.observer import Statistics
from zest_fast.profiling.processes.gradient_mean import GradientMeans
from zest_fast.profiling.processes.layout import DDP, Layout, is_a_copy
from zest_fast.profiling.processes.local import is_distributed, local_part
from zest_fast.profiling.processes.report import Part, Report
from zest_fast.profiling.taps import Taps


class SharedStatistics(Statistics):
    """Reduces what lies on this process, and hands it out as a ``Report``; takes the merged one in its place.

    Args:
        needed, backend, may_be_written: as for ``Statistics``.
        layout: who shares the model.
        layers: the chosen ones, in the same order on every process.
    """

    def __init__(
        self,
        needed: frozenset[str],
        backend: str,
        may_be_written: Callable[[Tensor], bool],
        layout: Layout,
        layers: Sequence[Layer],
    ) -> None:
        super().__init__(needed, backend, may_be_written=may_be_written)
        self._layout = layout
        self._is_first = torch.distributed.get_rank() == layout.ranks[0]
        self._layers = list(layers)
        self._place = {layer: i for i, layer in enumerate(layers)}
        self._copied_outputs: set[Layer] = set()
        self._copied_products: set[Layer] = set()
        self._split_by_channels: set[Layer] = set()
        self._samples: dict[Layer, list[int]] = {}
        self.means: GradientMeans | None = None
        """Of DDP, during a backward pass."""
        self.came_again = False
        """Whether the gradient of a weight came when its mean had been formed."""

    @property
    def all_weights(self) -> list[Weight]:
        """Those of the chosen layers, each once."""
        return list({layer.weight: None for layer in self._layers})

    def begin(self, order: Iterable[Weight], absent: Iterable[Weight]) -> None:
        """Before the backward pass: in which order DDP forms means."""
        if self._layout.kind == DDP:
            self.means = GradientMeans(self._layout.group, self.reduce, list(order), set(absent))

    def end(self) -> None:
        """After it, also where it failed."""
        if self.means is not None:
            self.means.finish()

    def output(self, layer: Layer, y: Tensor) -> Callable[[], None] | None:
        if is_distributed(y):
            if why := _why_not_whole(y):
                self.missed(layer, why, outputs=True)
                return None
            y = _summed(y)
        if self._is_copy(layer, y):
            self._copied_outputs.add(layer)
        y = local_part(y)
        self._samples.setdefault(layer, []).append(_samples(layer, y))
        return super().output(layer, y)

    def weight_gradient(self, weight: Weight, dw: Tensor) -> None:
        if self.means is not None:
            self.came_again |= not self.means.arrived(weight, dw)
        elif is_distributed(dw):
            self.reduce(weight, local_part(_placed_as(dw, weight.parameter)), local_part(weight.parameter))
        else:
            self.reduce(weight, local_part(dw), local_part(weight.parameter))

    def output_gradient(self, layer: Layer, y: Callable[[], Tensor], g: Tensor, only_use: bool) -> None:
        if layer in self.missed_gradients:
            return
        whole: Any = y()
        if not is_distributed(whole):
            if _is_channel_shard(layer, whole):
                self._split_by_channels.add(layer)
            elif self._is_copy(layer, whole):
                self._copied_products.add(layer)
            super().output_gradient(layer, lambda: local_part(whole), local_part(g), only_use)
            return
        channel, samples = whole.dim() + channel_dim(layer, whole), 0
        keep = [p.is_shard() and p.dim in (channel, samples) and whole.dim() > 1 for p in whole.placements]
        as_whole: Any = torch.distributed.tensor.Replicate()
        placements = [p if kept else as_whole for p, kept in zip(whole.placements, keep, strict=True)]
        part = whole.detach().redistribute(placements=placements)
        same: Any = g
        if is_a_copy(part):
            self._copied_products.add(layer)
        elif any(p.is_shard() and p.dim == channel for p in placements):
            self._split_by_channels.add(layer)
        local = local_part(part)
        super().output_gradient(layer, lambda: local, local_part(same.redistribute(placements=placements)), only_use)

    def untouched(self, layer: Layer) -> None:
        super().untouched(layer)
        counts = self._samples.get(layer, [])
        uses = counts[:1] if len(set(counts)) == 1 else counts
        self._fisher[layer] = [(lambda n=n: SquaredProducts(0.0, n)) for n in uses]  # type: ignore[misc]

    def _is_copy(self, layer: Layer, y: Tensor) -> bool:
        """Whether the first process has the same: of a plain output in tensor parallelism, every other one."""
        if self._layout.splits_the_batch:
            return False
        return is_a_copy(y) if is_distributed(y) else not (self._is_first or _is_channel_shard(layer, y))

    def _weight_is_copy(self, weight: Weight, whole_on_each: bool) -> bool:
        p = weight.parameter
        if is_distributed(p):
            return is_a_copy(p)
        return not self._is_first and (whole_on_each or not self._layout.splits_the_batch)

    def report(self, taps: Taps | None, names: dict[Any, str], loss: float, loss_is_half: bool) -> Report:
        """After ``finish``; names: of all modules."""
        order, uses, others = (taps.order, taps.uses, taps.with_other_weights) if taps else ({}, {}, {})
        own, copies = Part(), Part()
        for layer, moments in self.outputs.items():
            (copies if layer in self._copied_outputs else own).outputs[self._place[layer]] = moments
        for weight, gradients in self.gradients.items():
            part = copies if self._weight_is_copy(weight, whole_on_each=False) else own
            part.gradients[self._of(weight)] = gradients
        for weight, values in self.weights.items():
            part = copies if self._weight_is_copy(weight, whole_on_each=True) else own
            part.weights[self._of(weight)] = values
        for layer, products in self.fisher.items():
            if layer in self._split_by_channels and not self._is_first:  # the samples are the same ones
                products = [SquaredProducts(p.total, 0) for p in products]
            (copies if layer in self._copied_products else own).fisher[self._place[layer]] = products
        return Report(
            own=own,
            copies=copies,
            missed_outputs={self._place[layer]: why for layer, why in self.missed_outputs.items()},
            missed_gradients={self._place[layer]: why for layer, why in self.missed_gradients.items()},
            overwritten={self._place[layer] for layer in self.overwritten},
            order=[names[module] for module in sorted(order, key=order.__getitem__) if module in names],
            uses={names[module]: count for module, count in uses.items() if module in names},
            with_other_weights={names[m]: count for m, count in others.items() if m in names},
            backends=set(self.collector.used),
            loss=loss,
            loss_is_half=loss_is_half,
        )

    def take(self, report: Report, taps: Taps | None, modules: dict[str, Any]) -> None:
        """Puts what all processes found in the place of what this one did."""
        layers = self._layers
        self.outputs = {layers[i]: found for i, found in report.own.outputs.items()}
        self.gradients = {layers[i].weight: found for i, found in report.own.gradients.items()}
        self.weights = {layers[i].weight: found for i, found in report.own.weights.items()}
        self.fisher = {layers[i]: found for i, found in report.own.fisher.items()}
        self.missed_outputs = {layers[i]: why for i, why in report.missed_outputs.items()}
        self.missed_gradients = {layers[i]: why for i, why in report.missed_gradients.items()}
        self.overwritten = {layers[i] for i in report.overwritten}
        self.collector.used = set(report.backends)
        if taps is None:
            return
        taps.order = {modules[name]: i for i, name in enumerate(report.order)}
        taps.uses = {modules[name]: count for name, count in report.uses.items()}
        taps.with_other_weights = {modules[name]: count for name, count in report.with_other_weights.items()}

    def _of(self, weight: Weight) -> int:
        return next(self._place[layer] for layer in weight.layers if layer in self._place)


def _is_channel_shard(layer: Layer, y: Tensor) -> bool:
    """Whether a plain output has the channels of one shard of the weight: transformers' plans hand out such."""
    p: Any = layer.weight.parameter
    if not is_distributed(p) or p.dim() != 2 or y.is_nested:
        return False
    own, dim = local_part(p), 1 if is_transformers_conv1d(layer.module) else 0
    return any(s.is_shard() and s.dim == dim for s in p.placements) and y.shape[channel_dim(layer, y)] == own.shape[dim]


def _why_not_whole(y: Any) -> str:
    """Why the parts of an output cannot be summed up once more than its module does; empty where they can."""
    odd = [type(p).__name__ for p in y.placements if p.is_partial() and type(p).__name__ != "Partial"]
    return (
        f"tensor parallelism leaves it on processes as {odd[0]} (an embedding by rows), which is summed up once"
        if odd
        else ""
    )


def _summed(y: Any) -> Tensor:
    """A distributed output with no part of it left to be summed up: that of a row-wise layer before its all-reduce."""
    if not any(placement.is_partial() for placement in y.placements):
        return y
    as_whole = torch.distributed.tensor.Replicate()
    return y.detach().redistribute(placements=[as_whole if p.is_partial() else p for p in y.placements])


def _placed_as(dw: Any, parameter: Any) -> Tensor:
    return dw if dw.placements == parameter.placements else dw.redistribute(placements=parameter.placements)


def _samples(layer: Layer, y: Tensor) -> int:
    if y.is_nested:
        return y.size(0)
    return y.shape[0] if y.dim() > -channel_dim(layer, y) else 1
