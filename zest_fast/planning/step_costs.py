"""What a training step costs in FLOPs, layer by layer, so that choices of layers can be compared without running them.

A step = the whole forward pass + the gradients dX of everything above the cut + the gradients dW of what trains. For a
linear layer or a convolution each of the three is 2 x weights x positions; of what has no weight (attention), backward
is twice the forward. The order is that of the forward pass, so two layers that run side by side (query and key) count
as one above the other. Operators that torch's counter does not know (recurrent cells) count nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from zest_fast.finetuning.trainable_layers import head_layers
from zest_fast.finetuning.walking import upwards
from zest_fast.planning.dry_run import faked
from zest_fast.planning.flop_formulas import flop_counter
from zest_fast.profiling.layers import find_layers
from zest_fast.ranking.ranking import Ranking


@dataclass(frozen=True)
class LayerCost:
    """rank: place in the order of first use. flops: of its forward. cut: the rank down to which backward runs when it
    trains; below its own where it shares its weight with an earlier layer."""

    rank: int
    flops: float
    cut: int


@dataclass(frozen=True)
class StepCosts:
    """Forward FLOPs in the order of the forward pass.

    between: FLOPs of what has no weight, by the rank of the layer that ran before it (-1: none). head: the layers that
    train in any case. measured: False where every layer is taken to see as many positions as any other, which holds for
    the linear layers of a transformer.
    """

    layers: dict[str, LayerCost]
    between: dict[int, float] = field(default_factory=dict)
    head: tuple[str, ...] = ()
    measured: bool = False

    @property
    def forward(self) -> float:
        """FLOPs of the whole forward pass."""
        return sum(layer.flops for layer in self.layers.values()) + sum(self.between.values())

    def step(self, chosen: Iterable[str]) -> float:
        """FLOPs of a step that trains these layers and the head."""
        trained = {*chosen, *self.head}
        cut = min(self.layers[name].cut for name in trained)
        above = sum(layer.flops for layer in self.layers.values() if layer.rank > cut)
        above += 2 * sum(flops for rank, flops in self.between.items() if rank >= cut)
        return self.forward + above + sum(self.layers[name].flops for name in trained)

    @property
    def full(self) -> float:
        """FLOPs of a step of full fine-tuning."""
        return self.step(self.layers)


def costs_of_ranking(ranking: Ranking) -> StepCosts:
    """From what the profile knows: the weights of each layer and the order of use. The unit is a FLOP a position."""
    rows = ranking.explain()
    layers = {}
    for name, depth, kind, numel in zip(rows.index, rows["depth"], rows["kind"], rows["numel"], strict=True):
        layers[str(name)] = LayerCost(int(depth), 0.0 if kind == "embedding" else 2.0 * numel, int(depth))
    return StepCosts(layers)


def measured_costs(model: nn.Module, batch: Any) -> StepCosts:
    """From one forward pass on fake tensors, whose FLOPs are read wherever a layer begins or ends."""
    rows = find_layers(dict(model.named_modules()))
    chains = {row.name: upwards(row.module_name.split(".parametrizations.")[0]) for row in rows}
    owners = {chain[0] for chain in chains.values()}
    with faked(model, batch) as compute_loss, flop_counter() as counter:
        clock = _Clock(model, owners, {name for chain in chains.values() for name in chain}, counter.get_total_flops)
        try:
            compute_loss()
            clock.tick()
        finally:
            clock.remove()
    places = {row.name: next((name for name in chains[row.name] if name in clock.order), "") for row in rows}
    weights = {row.name: row.weight.parameter.numel() for row in rows}
    sharing: dict[str, int] = {}  # weights of the layers in one place, which has one figure: gates of an LSTM
    for name, place in places.items():
        sharing[place] = sharing.get(place, 0) + weights[name]
    rank = {row.name: clock.order.get(places[row.name], len(clock.order)) for row in rows}
    layers = {
        row.name: LayerCost(
            rank[row.name],
            clock.flops.get(places[row.name], 0.0) * weights[row.name] / sharing[places[row.name]],
            min(rank[other.name] for other in row.weight.layers),
        )
        for row in rows
    }
    return StepCosts(layers, clock.between, _head(model), measured=True)


class _Clock:
    """Reads a counter whenever a layer begins or ends and books what was counted since.

    order: rank of the first use of each watched module. flops: by layer, nested ones left out. between: what ran in no
    layer, by the rank of the layer that ended last.
    """

    def __init__(
        self, model: nn.Module, owners: Iterable[str], watched: Iterable[str], read: Callable[[], int]
    ) -> None:
        self.order: dict[str, int] = {}
        self.flops: dict[str, float] = {}
        self.between: dict[int, float] = {}
        self._read, self._last = read, 0
        self._running: list[str] = []
        self._ended = -1
        self._handles: list[Any] = []
        for name in watched:
            module = model.get_submodule(name)
            self._handles.append(module.register_forward_pre_hook(partial(self._note, name)))
            if name in owners:
                self._handles.append(module.register_forward_pre_hook(partial(self._begin, name)))
                self._handles.append(module.register_forward_hook(self._end, always_call=True))

    def tick(self) -> None:
        """Book what was counted since the last reading."""
        now = self._read()
        if now > self._last:
            if self._running:
                self.flops[self._running[-1]] = self.flops.get(self._running[-1], 0.0) + now - self._last
            else:
                self.between[self._ended] = self.between.get(self._ended, 0.0) + now - self._last
        self._last = now

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, name: str, module: nn.Module, inputs: Any) -> None:
        self.order.setdefault(name, len(self.order))

    def _begin(self, name: str, module: nn.Module, inputs: Any) -> None:
        self.tick()
        self._running.append(name)

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.tick()
        self._ended = max(self._ended, self.order[self._running.pop()])


def _head(model: nn.Module) -> tuple[str, ...]:
    """As SelectiveBackward's "auto"; nothing where that cannot tell."""
    try:
        return tuple(part.name for part in head_layers(model, "auto"))
    except ValueError:
        return ()
