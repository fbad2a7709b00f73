"""Which trials there are, in which order, and where each takes the forward pass up."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import nn

from zest_fast.finetuning.trainable_layers import chosen_layers
from zest_fast.prefix.boundaries import PROBED, Boundary, Call, Trace, anything_before, trace_calls, what_prevents
from zest_fast.prefix.inputs import Inputs, count, rows_of
from zest_fast.profiling.layers import Layer
from zest_fast.sweeping.reused_prefix import find_boundary
from zest_fast.sweeping.trials import LayerTask


def plan(
    model: nn.Module,
    trained: tuple[nn.Parameter, ...],
    left: Mapping[Layer, tuple[int, ...]],
    inputs: Inputs,
    *,
    reuse: bool,
    limit: int,
) -> dict[str, LayerTask]:
    """By layer, in the order of the boundaries; warns where the full forward pass has to run.

    trained: what trains with every layer. left: the seeds that are left to do for each layer. inputs: a few samples are
    run. limit: bytes a sample.
    """
    probe = rows_of(inputs, torch.arange(min(count(inputs), PROBED if reuse else 2)))
    trace = trace_calls(model, probe)
    tasks = []
    for layer, seeds in left.items():
        place = _first_use(model, layer, trace)
        part = chosen_layers(model, [layer.name])[0]
        boundary = Boundary(trace, 0.0, (), ())
        if reuse and count(probe) == PROBED:
            parameters = tuple(dict.fromkeys((*part.parameters, *trained)))
            boundary = find_boundary(model, trace, place, parameters, probe, limit)
        tasks.append(LayerTask(part, seeds, place, boundary))
    recomputed = [task for task in tasks if not task.boundary.skipped and anything_before(task.place)]
    if reuse and recomputed:
        why = what_prevents(recomputed[0].place)
        warnings.warn(
            f"what lies below {len(recomputed)} of {len(tasks)} layers (such as {recomputed[0].part.name!r}) cannot be "
            f"reused{f' ({why})' if why else ''}: the full forward pass runs for them, which takes longer",
            stacklevel=5,
        )
    return {task.part.name: task for task in sorted(tasks, key=lambda task: task.boundary.start)}


def _first_use(model: nn.Module, layer: Layer, trace: Trace) -> Call:
    """The first call that may use the layer's weight: of an owner, or where that is never called of what holds it."""
    modules = dict(model.named_modules())
    calls = []
    for owner in layer.weight.layers:
        names = [owner.module_name]
        while names[-1]:
            names.append(names[-1].rpartition(".")[0])
        found = (trace.first_call(module) for module in (owner.called_module, *(modules[name] for name in names)))
        calls.append(next(call for call in found if call is not None))
    return min(calls, key=lambda call: call.start)
