"""Statistics and what the taps counted -> the LayerProfile: rows in order of first use, and reasons for the rest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from zest_fast.profiling.heads import find_head
from zest_fast.profiling.layer_profile import LayerProfile
from zest_fast.profiling.layers import Layer, LayerSelection, find_layers, select_layers, unsupported
from zest_fast.profiling.metrics import FISHER, METRICS, OUTPUT
from zest_fast.profiling.observer import Statistics
from zest_fast.profiling.on_request.request import OnRequest
from zest_fast.profiling.taps import Taps

_MADE = "it was made during the pass; run a forward pass first, so that it is there"


@dataclass(frozen=True)
class Subject:
    """A model whose layers are profiled, as it was handed over."""

    model: nn.Module
    modules: dict[str, nn.Module]
    layers: list[Layer]
    chosen: list[Layer]
    """Those that were selected."""
    trainable: dict[Layer, bool]
    """Whether the weights of the chosen ones required a gradient."""

    @classmethod
    def of(cls, model: nn.Module, modules: dict[str, nn.Module], selection: LayerSelection) -> Subject:
        """modules: every one by its name. Raises as ``select_layers`` does."""
        layers = find_layers(modules)
        chosen = select_layers(layers, selection)
        return cls(model, modules, layers, chosen, {layer: layer.weight.parameter.requires_grad for layer in chosen})


@dataclass(frozen=True)
class Passed:
    """What a pass that stands has left."""

    taps: Taps
    statistics: Statistics
    reached: list[Layer]
    """The rows: what the loss depends on."""
    made: list[str]
    """Parameters that came with the pass."""
    loss: float
    """Of the unscaled loss."""
    loss_scale: float


def build_profile(subject: Subject, passed: Passed, request: OnRequest, metrics: list[str]) -> LayerProfile:
    """The table of one pass."""
    taps, statistics = passed.taps, passed.statistics
    depth = depths(passed.reached, subject, taps.order)
    rows = sorted(passed.reached, key=depth.__getitem__)
    head = head_or_none(subject.model)
    values = np.empty((len(rows), len(metrics)))
    info = {}
    for i, layer in enumerate(rows):
        found, nonfinite = statistics.of(layer, passed.loss_scale)
        request.add_to(found, layer.weight, passed.loss_scale)
        values[i] = [METRICS[name].value(found) for name in metrics]
        notes = [layer.note or missing_output(layer, statistics), other_weights(layer, taps), *request.notes]
        info[layer.name] = row_info(
            layer,
            depth=depth[layer],
            uses=taps.uses.get(layer.called_module, 1),
            head=layer.module_name == head,
            trainable=subject.trainable[layer],
            nonfinite=nonfinite,
            notes=notes,
        )
    return LayerProfile(
        [layer.name for layer in rows],
        metrics,
        values,
        info=info,
        loss=passed.loss,
        backend="+".join(sorted(statistics.collector.used)),
        uncovered=_uncovered(subject, rows, taps) | dict.fromkeys(passed.made, _MADE),
    )


def row_info(
    layer: Layer, *, depth: int, uses: int, head: bool, trainable: bool, nonfinite: int, notes: Iterable[str]
) -> dict[str, Any]:
    """What a table says of a layer beside its metrics."""
    return {
        "numel": layer.weight.parameter.numel(),
        "kind": layer.kind,
        "depth": depth,
        "uses": uses,
        "shape": list(layer.weight.parameter.shape),
        "head": head,
        "trainable": trainable,
        "shared_with": [other.name for other in layer.weight.layers if other is not layer],
        "parameter": layer.parameter_name,
        "module": layer.module_name,
        "nonfinite": nonfinite,
        "note": "; ".join(filter(None, notes)),
    }


def ancestors(layer: Layer, modules: dict[str, nn.Module]) -> list[nn.Module]:
    """The modules around a layer's own, innermost first."""
    parts = layer.module_name.split(".") if layer.module_name else []
    return [modules[".".join(parts[:n])] for n in range(len(parts) - 1, -1, -1)]


def depths(rows: Iterable[Layer], subject: Subject, order: dict[nn.Module, int]) -> dict[Layer, int]:
    """Position in the order of first use; a module that is never called itself counts with its parent."""
    position = {layer: i for i, layer in enumerate(subject.layers)}

    def key(layer: Layer) -> tuple[int, int]:
        candidates = [layer.called_module, *ancestors(layer, subject.modules)]
        return next((order[m] for m in candidates if m in order), len(order)), position[layer]

    return {layer: i for i, layer in enumerate(sorted(rows, key=key))}


def head_or_none(model: nn.Module) -> str | None:
    try:
        return find_head(model)
    except ValueError:  # it cannot tell; fine-tuning asks, a table need not
        return None


def missing_output(layer: Layer, statistics: Statistics) -> str:
    """Why columns of a layer's output are NaN, where they are."""
    pairs = (("act", OUTPUT, statistics.outputs), ("fisher", FISHER, statistics.fisher))
    missing = [name for name, kind, found in pairs if kind in statistics.needed and layer not in found]
    if not missing:
        return ""
    why = statistics.missed_outputs.get(layer) or statistics.missed_gradients.get(layer)
    if why:
        return f"{' and '.join(missing)} undefined: {why}"
    module = layer.called_module
    return (
        f"{' and '.join(missing)} undefined: {type(module).__name__} {layer.module_name!r} was not called as a module "
        "or has no single output tensor"
    )


def other_weights(layer: Layer, taps: Taps) -> str:
    """What is to be known where another tensor stood in the place of the layer's weight."""
    calls = taps.with_other_weights.get(layer.called_module)
    if not calls:
        return ""
    return (
        f"in {calls} of {taps.uses.get(layer.called_module, calls)} calls another tensor stood in the place of the "
        "weight (functional_call?): act and fisher count their outputs, the gradient is that of the weight itself"
    )


def _uncovered(subject: Subject, rows: list[Layer], taps: Taps) -> dict[str, str]:
    covered = {id(layer.weight.parameter) for layer in rows}
    was_chosen = set(subject.chosen)
    reasons: dict[str, str] = {}
    for layer in subject.layers:
        if id(layer.weight.parameter) in covered or layer.weight.layers[0] is not layer:
            continue
        reason = unsupported(layer.weight.parameter)
        if not reason and any(owner in was_chosen for owner in layer.weight.layers):
            called = layer.called_module in taps.uses
            reason = "no gradient reached it" + ("" if called else ": its module was not called")
            if layer.called_module in taps.with_other_weights:
                reason += ": another tensor stood in its place (functional_call?)"
        elif not reason:
            embedding = "an embedding; name it in layers= to profile it"
            reason = embedding if layer.is_embedding else "not selected by layers="
        reasons[layer.parameter_name] = reason
    return reasons
