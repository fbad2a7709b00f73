"""Plans beside real steps: the peak that a plan says, the peak that the allocator counts, and what the plan takes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from zest_fast.benchmarking.accuracy import Verdict
from zest_fast.benchmarking.passes import Pass, measure_passes
from zest_fast.benchmarking.real_steps import training
from zest_fast.benchmarking.results import Case
from zest_fast.planning.counted_memory import peak_bytes
from zest_fast.planning.plan import planned_peak

OPTIMIZER = "adamw"
_SHARE = 0.02  # of the counted peak: what the tests of the planner allow
_ROUNDING = 128 * 512  # bytes: a plan rounds each tensor up to 512, as the allocator of a GPU does


def plan_case(name: str, model: nn.Module, batch: Any, layers: Sequence[str], rounds: int) -> Case:
    """The plan of a step of SelectiveBackward with AdamW on a CPU beside that step, on a copy of the model.

    Peaks are of the second step: weights and states of the optimizer are there before it. A plan may be off by 2 %, and
    by 64 KiB, which only the smallest models notice.
    """
    trained = copy.deepcopy(model)
    plan = partial(planned_peak, model, batch, list(layers), optimizer=OPTIMIZER)
    with training(trained, batch, layers, OPTIMIZER, {}) as (step, held):
        step()
        peaks = {"step": held() + peak_bytes(step), "zest_fast.plan": plan()}

        def judge() -> Verdict:
            off = abs(peaks["zest_fast.plan"] - peaks["step"]) / peaks["step"]
            return Verdict(off, _SHARE + _ROUNDING / peaks["step"], "the peak")

        passes = [Pass("step", "floor", step), Pass("zest_fast.plan", "ours", plan, judge)]
        settings = {"layers": list(layers), "optimizer": OPTIMIZER}
        cpu = torch.device("cpu")
        return measure_passes(name, passes, rounds, settings, cpu, peak_of=lambda one: peaks[one.name])
