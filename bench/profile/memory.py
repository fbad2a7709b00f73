"""Peak memory of profile() beside the honest peer: all weights trainable, each gradient dropped as soon as it exists.

The claim (with the first row as reference): profile without fisher <= that peer + 16 MiB, with and without gradient
checkpointing; fisher adds at most the bytes of the outputs Y that nothing else keeps. Figures are bytes beyond the
model and the batch, counted by zest_fast.planning.counted_memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import zest_fast
from bench.profile import peers
from zest_fast.benchmarking.models import Batch, Case
from zest_fast.planning.counted_memory import peak_bytes
from zest_fast.profiling.metrics import METRIC_NAMES

WITHOUT_FISHER = [name for name in METRIC_NAMES if name != "fisher"]


def measure_peaks(case: Case) -> dict[str, dict[str, int]]:
    """Peak bytes of every candidate, without and (where the model has it) with non-reentrant gradient checkpointing."""
    model, batch = case.build()
    peaks = {"stored": _peaks(_candidates(model, batch) | _hook_candidates(model, batch))}
    peaks["stored"]["outputs_nobody_keeps"] = outputs_nobody_keeps(model, batch)
    if case.checkpointing:
        _checkpoint(model)
        peaks["checkpointed"] = _peaks(_candidates(model, batch))
    return peaks


def _checkpoint(model: nn.Module) -> None:
    kwargs = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # transformers 5 renamed it
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def _candidates(model: nn.Module, batch: Batch) -> dict[str, Callable[[], object]]:
    return {
        "drop_gradients": partial(peers.drop_gradients, model, batch),
        "drop_gradients_profiled_only": partial(peers.drop_gradients, model, batch, only="profiled"),
        "plain": partial(peers.plain, model, batch),
        "profile": partial(zest_fast.profile, model, batch),
        "profile_without_fisher": partial(zest_fast.profile, model, batch, metrics=WITHOUT_FISHER),
    }


def _hook_candidates(model: nn.Module, batch: Batch) -> dict[str, Callable[[], object]]:
    """Peer (b) keeps Y in a closure, which defeats checkpointing: compared without it only."""
    return {
        "hook_and_drop": partial(peers.hook_reductions, model, batch),
        "hook_and_drop_without_fisher": partial(peers.hook_reductions, model, batch, fisher=False),
    }


def _peaks(candidates: dict[str, Callable[[], object]]) -> dict[str, int]:
    for run in candidates.values():
        run()  # first calls allocate what stays (caches, lazily imported modules)
    return {name: peak_bytes(run) for name, run in candidates.items()}


def outputs_nobody_keeps(model: nn.Module, batch: Batch) -> int:
    """Bytes of the profiled layers' outputs Y that autograd does not save anyway: what fisher may cost."""
    outputs: dict[int, Tensor] = {}
    saved: dict[int, Tensor] = {}

    def on_output(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        outputs[output.untyped_storage().data_ptr()] = output

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x
        return x

    handles = [m.register_forward_hook(on_output) for m in peers.profiled_layers(model).values()]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return sum(y.untyped_storage().nbytes() for pointer, y in outputs.items() if pointer not in saved)
