"""`zest_fast.watch` on every model of the zoo: each cell as the oracle has it, or NaN with a reason; and no bit of the
training is another one than without it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
from model_zoo import ZOO, build, entry_of
from oracle import METRICS, Measurement, compare, compare_rounded, measure
from torch import Tensor, nn
from untouched import bits

import zest_fast

# A profile counts every output within its closure. A watch cannot know what a closure is, and counts the calls of the
# model through which the backward pass goes; these losses call it once more, for targets or for a search.
CALLED_BESIDE_THE_LOSS = {
    "two_passes_through_the_model",
    "adversarial_input",
    "teacher_called_functionally",
    "teacher_without_grad",
    "maml_of_first_order",
    "first_order_from_detached_weights",
    "langevin_samples",
    "distilled_data",
    "sharpness_aware_loss",
    "backward_within_the_loss",
}


def trained(name: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The model of that name with all that the oracle has rows for trained."""
    model, closure = build(name)
    for p in model.parameters():
        if p.dim() >= 2 and p.is_floating_point():
            p.requires_grad_(True)
    return model, closure


def one_step(model: nn.Module, closure: Callable[[], Tensor]) -> list[bytes]:
    """A backward pass and a step as a loop does them; everything that they leave."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    torch.manual_seed(0)
    closure().backward()
    gradients = [b"" if p.grad is None else bits(p.grad.to_dense()) for p in model.parameters()]
    optimizer.step()
    return [*gradients, *(bits(p) for p in model.parameters()), *(bits(b) for b in model.buffers()), random_state()]


def random_state() -> bytes:
    return bits(torch.get_rng_state())


@cache
def spec(name: str) -> tuple[Measurement, Measurement]:
    return measure(*build(name, double=True), entry_of(name).layers), measure(*build(name), entry_of(name).layers)


@pytest.mark.parametrize("name", ZOO)
def test_right_or_undefined_with_a_reason_and_bit_equal(name: str) -> None:
    alone = one_step(*trained(name))
    model, closure = trained(name)
    with zest_fast.watch(model, every=1, metrics="all", layers=entry_of(name).layers) as watched:
        left = one_step(model, closure)
    assert left == alone
    profile = watched.last.profile
    expected, own = spec(name)
    table = {}
    for row in profile.names:
        values = {metric: float(profile[row][metric]) for metric in METRICS}
        if row not in expected.values:
            assert math.isnan(values["grad_norm"]) and profile.info[row]["note"]
            continue
        for metric in METRICS:
            if name in CALLED_BESIDE_THE_LOSS and metric.startswith("act_"):
                values[metric] = expected.values[row][metric]
            if math.isnan(values[metric]) and not math.isnan(expected.values[row][metric]):
                assert metric.split("_")[0] in profile.info[row]["note"], (row, metric, profile.info[row]["note"])
                values[metric] = expected.values[row][metric]
        table[row] = values
    judge = compare_rounded if entry_of(name).rounded else compare
    assert not judge(table, expected, own).misses
