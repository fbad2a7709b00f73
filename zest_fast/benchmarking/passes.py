"""Whole passes of a model beside each other: profile() and hooks beside the plain pass, SelectiveBackward beside full.

Each is judged before it is timed. Profiles are held against `backend="reference"`, every statistic by its definition in
float64; the gradients of a step against those of a float64 copy of the model, where full training's own are allowed to
be off, too. What is judged runs in eval mode or from one random state, so that dropout does not differ.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from zest_fast.benchmarking.accuracy import Verdict, relative_error, tolerance_of
from zest_fast.benchmarking.hooks import hook_reductions, plain_pass
from zest_fast.benchmarking.results import Case, Measured
from zest_fast.benchmarking.timers import CpuTimer, CudaTimer
from zest_fast.benchmarking.timing import Run, interleave, median, ratio
from zest_fast.finetuning.selective_backward import SelectiveBackward
from zest_fast.foundation.text_table import first_line
from zest_fast.planning.counted_memory import peak_bytes
from zest_fast.profiling.borrowing.training_modes import in_eval_mode
from zest_fast.profiling.layer_profile import LayerProfile
from zest_fast.profiling.loss import loss_of
from zest_fast.profiling.profile import profile

_TIMES_OF_FULL = 4.0  # how much further off than full training's a step's gradient may be
_MIB = 2**20


@dataclass(frozen=True)
class Pass:
    """One candidate. judge: what its result is worth; None = there is nothing to compare. It may raise."""

    name: str
    role: str
    run: Run
    judge: Callable[[], Verdict] | None = None


def profile_case(name: str, model: nn.Module, batch: Any, rounds: int) -> Case:
    """profile() and hooks beside a plain forward and backward pass. The model's running statistics move."""
    loss = loss_of(model, batch, None, None)
    expected = _seeded(lambda: profile(model, batch, backend="reference"))
    dtype = next(model.parameters()).dtype
    numel = {layer: expected.info[layer]["numel"] for layer in expected.names}
    rows = _rows(expected)

    def judged(run: Callable[[], Any], of_result: torch.dtype | None) -> Verdict:
        found = _seeded(run)
        table = found if isinstance(found, Mapping) else _rows(found)
        return _of_table(table, rows, numel, tolerance_of(dtype, of_result))

    ours, hooks = partial(profile, model, batch), partial(hook_reductions, model, loss)
    passes = [
        Pass("plain", "floor", partial(plain_pass, model, loss)),
        Pass("zest_fast.profile", "ours", ours, partial(judged, ours, None)),
        Pass("hooks", "peer", hooks, partial(judged, hooks, dtype)),
    ]
    settings = {"layers": len(rows), "parameters": sum(p.numel() for p in model.parameters())}
    return measure_passes(name, passes, rounds, settings, _device_of(model))


def _rows(found: LayerProfile) -> dict[str, dict[str, float]]:
    return {
        name: dict(zip(found.metrics, row, strict=True))
        for name, row in zip(found.names, found.values.tolist(), strict=True)
    }


def _of_table(
    found: Mapping[str, Mapping[str, float]],
    expected: Mapping[str, Mapping[str, float]],
    numel: Mapping[str, int],
    tolerance: float,
) -> Verdict:
    """The worst metric of all layers. An undefined one (NaN) has to be undefined, or left out, on both sides."""
    worst = Verdict(0.0, tolerance, "nothing")
    for layer, row in expected.items():
        if layer not in found:
            return Verdict(math.inf, tolerance, f"{layer}, which it has no row for,")
        for metric, target in row.items():
            value = found[layer].get(metric, math.nan)
            error = 0.0 if math.isnan(value) and math.isnan(target) else _error(metric, value, row, numel[layer])
            if error > worst.error:
                worst = Verdict(error, tolerance, f"{metric} of {layer}")
    return worst


def _error(metric: str, value: float, row: Mapping[str, float], numel: int) -> float:
    """Relative to a mean's deviation, to the mean |W⊙dW| for plain (both may be zero by symmetry)."""
    unit = row["snip"] / numel if metric == "plain" else abs(row[metric])
    if metric.endswith("_mean"):
        unit = row[metric.replace("_mean", "_std")] or unit
    return relative_error(value, row[metric], unit)


def step_case(name: str, model: nn.Module, batch: Any, layers: Sequence[str], rounds: int) -> Case:
    """Forward and backward of SelectiveBackward, and of the same layers frozen by hand, beside full training.

    The optimizer is left out: its share depends on which it is. FLOPs are those of torch's FlopCounterMode.
    """
    full, by_hand, selective = (copy.deepcopy(model) for _ in range(3))
    full.requires_grad_(True)
    with SelectiveBackward(selective, layers) as tuned:
        trained = [key for key, parameter in selective.named_parameters() if parameter.requires_grad]
        for key, parameter in by_hand.named_parameters():
            parameter.requires_grad_(key in trained)
        models = {"full": full, "SelectiveBackward": selective, "frozen by hand": by_hand}
        roles = {"full": "floor", "SelectiveBackward": "ours", "frozen by hand": "peer"}
        target, own = _float64_gradients(model, batch, trained)
        passes = [
            Pass(
                one,
                roles[one],
                partial(plain_pass, models[one], loss_of(models[one], batch, None, None)),
                None if one == "full" else partial(_of_gradients, models[one], batch, target, own),
            )
            for one in models
        ]
        settings = {"layers": list(layers), "cut": tuned.cut, "trained": sum(_sizes(selective).values())}
        case = measure_passes(name, passes, rounds, settings, _device_of(model))
        return _with_shares(case, {one.name: one.run for one in passes})


def _sizes(model: nn.Module) -> dict[str, int]:
    return {key: parameter.numel() for key, parameter in model.named_parameters() if parameter.requires_grad}


def _float64_gradients(model: nn.Module, batch: Any, names: Sequence[str]) -> tuple[dict[str, Tensor], float]:
    """The gradients of a float64 copy, and how far those of a plain copy are from them."""
    exact = tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, batch)
    target = _gradients(copy.deepcopy(model).double().requires_grad_(True), exact, names)
    own = _gradients(copy.deepcopy(model).requires_grad_(True), batch, names)
    return target, max(_distances(own, target).values())


def _gradients(model: nn.Module, batch: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """In eval mode, in which dropout and batch norm do not depend on chance; gradients are None afterwards."""
    with in_eval_mode(model):
        try:
            loss_of(model, batch, None, None)().backward()
            parameters = dict(model.named_parameters())
            found = {name: gradient.clone() for name in names if (gradient := parameters[name].grad) is not None}
        finally:
            model.zero_grad(set_to_none=True)
    return {name: found.get(name, torch.zeros(())) for name in names}


def _distances(found: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, float]:
    """Of each gradient, in the Euclidean norm, relative to its own norm, or to a thousandth of all together where that
    is more: the bias of attention's keys has none but by rounding. Infinite where a gradient is missing."""
    whole = math.sqrt(sum(float(one.norm()) ** 2 for one in target.values()))
    return {
        name: relative_error(float((found[name].double() - one).norm()), 0.0, max(float(one.norm()), whole / 1000))
        if found[name].shape == one.shape
        else math.inf
        for name, one in target.items()
    }


def _of_gradients(model: nn.Module, batch: Any, target: Mapping[str, Tensor], own: float) -> Verdict:
    errors = _distances(_gradients(model, batch, list(target)), target)
    worst = max(errors, key=lambda name: errors[name])
    tolerance = max(_TIMES_OF_FULL * own, torch.finfo(torch.float64).eps)
    return Verdict(errors[worst], tolerance, f"the gradient of {worst}")


def _with_shares(case: Case, runs: Mapping[str, Run]) -> Case:
    """With the FLOPs of each, relative to those of the baseline."""
    flops = {one.name: _flops(runs[one.name]) for one in case.measured if not one.why}
    measured = [
        Measured(**{**vars(one), "figures": {**one.figures, "flops_share": flops[one.name] / flops[case.baseline]}})
        if one.name in flops
        else one
        for one in case.measured
    ]
    return Case(**{**vars(case), "measured": tuple(measured)})


def _flops(run: Run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def measure_passes(
    name: str,
    passes: Sequence[Pass],
    rounds: int,
    settings: Mapping[str, Any],
    device: torch.device,
    peak_of: Callable[[Pass], int] | None = None,
) -> Case:
    """Judge, count bytes, and time in interleaved rounds; the first pass is the baseline.

    Whatever one raises is why it is not timed; the baseline's passes through. peak_of: bytes, by default those that a
    pass holds beyond what is there before it.
    """
    verdicts: dict[str, Verdict] = {}
    why: dict[str, str] = {}
    peaks: dict[str, float] = {}
    for one in passes:
        try:
            if one.judge is not None:
                verdicts[one.name] = verdict = one.judge()
                if not verdict.match:
                    why[one.name] = f"wrong: {verdict}"
                    continue
            one.run()
            peaks[one.name] = _peak_bytes(one.run, device) if peak_of is None else peak_of(one)
        except Exception as error:
            if one is passes[0]:
                raise
            why[one.name] = f"raises {type(error).__name__}: {first_line(error, '')}"
    timer = CudaTimer(graphs=False) if device.type == "cuda" else CpuTimer()
    runs = {one.name: one.run for one in passes if one.name not in why}
    times = interleave(runs, rounds, timed=timer.seconds)
    baseline = passes[0].name
    measured = []
    for one in passes:
        judged = verdicts.get(one.name)
        fields: dict[str, Any] = {"match": None if one.judge is None else one.name not in why}
        if judged is not None:
            fields |= {"error": judged.error if math.isfinite(judged.error) else None, "tolerance": judged.tolerance}
        if one.name in why:
            measured.append(Measured(one.name, one.role, why=why[one.name], **fields))
            continue
        seconds, relative = median(times[one.name]), ratio(times, one.name, baseline)
        figures = {"peak_mib": peaks[one.name] / _MIB}
        measured.append(Measured(one.name, one.role, seconds=seconds, ratio=relative, figures=figures, **fields))
    threads = torch.get_num_threads()
    label = f"{name}, {threads} thread{'s' * (threads > 1)}"
    return Case(label, baseline, tuple(measured), {**settings, "threads": threads})


def _peak_bytes(run: Run, device: torch.device) -> int:
    """Beyond what is there before it."""
    if device.type != "cuda":
        return peak_bytes(run)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _seeded(run: Callable[[], Any]) -> Any:
    """From one random state, which is put back: passes that are compared drop the same entries."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return run()


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
