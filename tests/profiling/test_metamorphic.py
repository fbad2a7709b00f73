"""What a profile has to answer when model, batch or loss are changed in a known way, for layers of random sizes.

The changes and what each does to every metric follow from the definitions (docs/profile.md); nobody computes a metric a
second time here.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from metamorphic_models import CLASSES, KINDS, SAMPLES, Case, Probed, assert_row, called, case
from oracle import METRICS, compare_rounded, measure
from torch import Tensor, nn
from torch.nn import functional as F

import zest_fast

FEW, MANY = range(1), range(1, 40)
FACTORS = (-3.0, 0.25, 7.0)
ON_REQUEST = ("grasp", "synflow", "agree_dot", "agree_sign", "agree_cos")
SIGNED = ("weight_mean", "act_mean", "grad_mean", "plain")
Row = Mapping[str, float]


def profiled(model: nn.Module, x: object, target: Tensor, **options: object) -> zest_fast.LayerProfile:
    return zest_fast.profile(model, (x, target), layers=".*", **options)


def of(made: Case, **options: object) -> zest_fast.LayerProfile:
    return profiled(made.model, made.x, made.target, **options)


def assert_rows(
    found: zest_fast.LayerProfile,
    before: zest_fast.LayerProfile,
    law: Callable[[str, str], float] = lambda row, metric: 1.0,
    metrics: Sequence[str] = METRICS,
) -> None:
    """Every metric of every row is what it was before, times a factor."""
    assert found.names == before.names
    for row in before.names:
        expected = {metric: before[row][metric] * law(row, metric) for metric in METRICS}
        assert_row(found[row], expected, before.info[row]["numel"], metrics)


def to_the_power(metric: str, c: float, power: int) -> float:
    return (c if metric in SIGNED else abs(c)) ** power


def of_gradient(metric: str) -> int:
    """How many times dW is a factor."""
    return 1 if metric.startswith("grad_") or metric in ("plain", "snip", "rgn") else 0


# --- scales -----------------------------------------------------------------------------------------------------------


def scale_of_the_loss(made: Case, chance: random.Random) -> None:
    c = chance.choice(FACTORS)
    scaled = of(made, loss_fn=lambda output, target: c * F.cross_entropy(output, target))
    powers = {metric: 2 if metric == "fisher" else of_gradient(metric) for metric in METRICS}
    assert_rows(scaled, of(made), lambda row, metric: to_the_power(metric, c, powers[metric]))


def rescaled(made: Case, parameters: Sequence[str], c: float) -> set[str]:
    """Multiplies parameters of the layer; the names of those that have rows."""
    with torch.no_grad():
        for name, parameter in made.model.layer.named_parameters():
            if name in parameters:
                parameter *= c
    return {f"layer.{name}" for name in parameters}


def scale_of_a_weight(metric: str, c: float) -> float:
    """Of W times c where the function stays the same: dW is divided by c, so W⊙dW and Y⊙G are as they were."""
    power = {"plain": 0, "snip": 0, "rgn": -2, "weight_mean": 1, "weight_std": 1}.get(metric, -of_gradient(metric))
    return to_the_power(metric, c, power)


def scale_of_a_weight_that_the_input_undoes(made: Case, chance: random.Random) -> None:
    c, before = chance.choice(FACTORS), of(made)
    scaled = rescaled(made, made.entered, c)
    made.model.before = 1 / c if scaled else 1.0
    after = of(made)
    info = after.info
    assert_rows(after, before, lambda row, m: scale_of_a_weight(m, c) if info[row]["parameter"] in scaled else 1.0)


def scale_of_a_weight_that_is_undone_behind_it(made: Case, chance: random.Random) -> None:
    c, before = chance.choice(FACTORS), of(made)
    scaled = rescaled(made, made.left, c)
    made.model.after = 1 / c if scaled else 1.0
    after = of(made)

    def law(row: str, metric: str) -> float:
        if after.info[row]["parameter"] not in scaled:
            return 1.0
        return to_the_power(metric, c, 1) if metric.startswith("act_") else scale_of_a_weight(metric, c)

    assert_rows(after, before, law)


# --- samples ----------------------------------------------------------------------------------------------------------


def order_of_samples(made: Case, chance: random.Random) -> None:
    order = torch.tensor(chance.sample(range(SAMPLES), SAMPLES))
    assert_rows(profiled(made.model, made.x[order], made.target[order]), of(made))


def the_batch_twice(made: Case, chance: random.Random) -> None:
    """The mean gradient stays; that of each sample is halved, and fisher is a mean of its square."""
    twice = profiled(made.model, torch.cat([made.x, made.x]), torch.cat([made.target, made.target]))
    assert_rows(twice, of(made), lambda row, metric: 0.25 if metric == "fisher" else 1.0)


def samples_without_weight(made: Case, chance: random.Random) -> None:
    """Only their outputs count, and that they are samples, over which fisher is a mean."""
    others = made.x.flip(0)[: chance.randint(1, SAMPLES)]
    ignored = torch.full((len(others),), -100)  # cross-entropy's index of what has no weight
    more = profiled(made.model, torch.cat([made.x, others]), torch.cat([made.target, ignored]))
    share = SAMPLES / (SAMPLES + len(others))
    metrics = [metric for metric in METRICS if not metric.startswith("act_")]
    assert_rows(more, of(made), lambda row, metric: share if metric == "fisher" else 1.0, metrics)


def another_name_for_every_class(made: Case, chance: random.Random) -> None:
    """Cross-entropy is symmetric in its classes: rows of the head move with them, and no sum over rows is another."""
    before, order = of(made), torch.tensor(chance.sample(range(CLASSES), CLASSES))
    with torch.no_grad():
        made.model.head.weight.copy_(made.model.head.weight[order])
        made.model.head.bias.copy_(made.model.head.bias[order])
    assert_rows(profiled(made.model, made.x, order.argsort()[made.target]), before)


def the_other_sign_of_every_target(made: Case, chance: random.Random) -> None:
    """Of a squared error: with the head's sign turned, too, only its signed statistics are others, but for plain."""
    made.target = torch.randn(SAMPLES, CLASSES)
    before = of(made, loss_fn=F.mse_loss)
    with torch.no_grad():
        for parameter in made.model.head.parameters():
            parameter.neg_()
    made.target.neg_()
    signed = ("weight_mean", "act_mean", "grad_mean")
    after = of(made, loss_fn=F.mse_loss)
    assert_rows(after, before, lambda row, metric: -1.0 if row == "head" and metric in signed else 1.0)


# --- layouts and what is beside the layer ---------------------------------------------------------------------------


def strewn(x: Tensor, chance: random.Random) -> Tensor:
    """The same values behind an offset, every other place, dimensions in another order of memory."""
    order = chance.sample(range(x.dim()), x.dim())
    memory = torch.zeros([x.shape[d] for d in order[:-1]] + [2 * x.shape[order[-1]] + 3], dtype=x.dtype)
    inverse = torch.tensor(order).argsort().tolist()
    laid = memory[..., 3::2].permute(inverse)
    laid.copy_(x)
    return laid


def layout_of_inputs(made: Case, chance: random.Random) -> None:
    before = of(made)
    assert_rows(profiled(made.model, strewn(made.x, chance), made.target), before)


def expanded_inputs(made: Case, chance: random.Random) -> None:
    """One sample that is there once in memory, and the same as copies."""
    expanded = made.x[:1].expand(made.x.shape)
    assert expanded.stride(0) == 0
    found = profiled(made.model, expanded, made.target)
    assert_rows(found, profiled(made.model, expanded.contiguous(), made.target))


def layout_of_weights(made: Case, chance: random.Random) -> None:
    if isinstance(made.model.layer, nn.RNNBase):  # torch itself lays its weights into one buffer
        return
    before = of(made)
    for parameter in made.model.parameters():
        parameter.data = strewn(parameter.data, chance)
    assert_rows(of(made), before)


class Beside(nn.Module):
    """Frozen and dead layers around a model: what they add to its output is nothing."""

    def __init__(self, model: Probed) -> None:
        super().__init__()
        self.model = model
        self.frozen = nn.Linear(CLASSES, CLASSES, bias=False)
        nn.init.eye_(self.frozen.weight).requires_grad_(False)
        self.unused, self.dead, self.silent = (nn.Linear(CLASSES, CLASSES) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.frozen(self.model(x))
        self.dead(y)
        return y + 0.0 * self.silent(y.detach())


def layers_beside_it(made: Case, chance: random.Random) -> None:
    before = of(made)
    for parameter in made.model.layer.parameters():
        parameter.requires_grad_(chance.random() < 0.5)
    model = Beside(made.model)
    after = profiled(model, made.x, made.target)
    assert after.names == [*(f"model.{row}" for row in before.names), "frozen", "silent"]
    assert sorted(after.uncovered) == ["dead.weight", "unused.weight"]
    assert after["silent"]["grad_norm"] == after["silent"]["snip"] == after["silent"]["fisher"] == 0
    for row in before.names:
        assert_row(after[f"model.{row}"], before[row], before.info[row]["numel"])


# --- precision --------------------------------------------------------------------------------------------------------


def converted(made: Case, dtype: torch.dtype) -> Case:
    x = made.x.to(dtype) if made.x.is_floating_point() else made.x
    return Case(copy.deepcopy(made.model).to(dtype), x, made.target, made.entered, made.left)


def float32_and_float64(made: Case, chance: random.Random) -> None:
    assert_rows(of(made), of(converted(made, torch.float64)))


def bfloat16_is_no_worse_than_autograd(made: Case, chance: random.Random) -> None:
    rounded = converted(made, torch.bfloat16)
    exact = converted(rounded, torch.float64)
    profile = of(rounded)
    found = {row: {metric: profile[row][metric] for metric in METRICS} for row in profile.names}
    names = profile.names

    def measured(of_case: Case) -> object:
        return measure(of_case.model, lambda: F.cross_entropy(of_case.model(of_case.x), of_case.target), names)

    assert not compare_rounded(found, measured(exact), measured(rounded)).misses


# --- a layer in parts -------------------------------------------------------------------------------------------------


class SideBySide(nn.Module):
    """Parts whose outputs are put together; each gets its share of the input, or (one share) all of it."""

    def __init__(self, parts: list[nn.Module], shares: int, dim: int) -> None:
        super().__init__()
        self.parts, self.shares, self.dim = nn.ModuleList(parts), shares, dim

    def forward(self, x: Tensor) -> Tensor:
        inputs = x.chunk(self.shares, 1) if self.shares > 1 else [x] * len(self.parts)
        return torch.cat([called(part, own, own) for part, own in zip(self.parts, inputs, strict=True)], self.dim)


def taken(layer: nn.Module, dim: int, channels: slice, of_bias: slice) -> nn.Module:
    """A copy of the layer with these of its channels, which lie in a dimension of the weight."""
    part = copy.deepcopy(layer)
    index = (slice(None),) * dim + (channels,)
    part.weight = nn.Parameter(layer.weight.detach()[index].clone())
    if getattr(layer, "bias", None) is not None:
        part.bias = nn.Parameter(layer.bias.detach()[of_bias].clone())
    return part


def in_parts(layer: nn.Module, chance: random.Random) -> SideBySide:
    """By groups, where there are any; else two halves of the output channels."""
    convolution = isinstance(layer, nn.modules.conv._ConvNd)
    groups = layer.groups if convolution else 1
    if groups > 1:
        inside, outside = len(layer.weight) // groups, layer.out_channels // groups
        places = [(slice(i * inside, (i + 1) * inside), slice(i * outside, (i + 1) * outside)) for i in range(groups)]
        parts = [taken(layer, 0, *place) for place in places]
        for part in parts:
            part.groups, part.in_channels = 1, part.in_channels // groups
        return SideBySide(parts, groups, 1)
    dim = 1 if isinstance(layer, nn.Embedding) or getattr(layer, "transposed", False) else 0
    cut = chance.randint(1, layer.weight.shape[dim] - 1)
    parts = [taken(layer, dim, channels, channels) for channels in (slice(0, cut), slice(cut, None))]
    return SideBySide(parts, 1, 1 if convolution else -1)


def together(rows: Sequence[Row], numels: Sequence[int]) -> dict[str, float]:
    """The row of parts that share their samples: entries of W, dW and Y are put together, sums over channels add."""
    shares = [numel / sum(numels) for numel in numels]

    def mean(metric: str) -> float:
        return sum(share * row[metric] for share, row in zip(shares, rows, strict=True))

    whole = {metric: mean(metric) for metric in METRICS}
    for kind in ("weight", "act", "act_abs", "grad", "grad_abs"):
        square = sum(s * (r[f"{kind}_std"] ** 2 + r[f"{kind}_mean"] ** 2) for s, r in zip(shares, rows, strict=True))
        whole[f"{kind}_std"] = math.sqrt(max(square - whole[f"{kind}_mean"] ** 2, 0.0))
    whole |= {metric: sum(row[metric] for row in rows) for metric in ("snip", "fisher")}
    whole["grad_norm"] = math.hypot(*(row["grad_norm"] for row in rows))
    whole["rgn"] = whole["grad_norm"] / math.hypot(*(row["grad_norm"] / row["rgn"] for row in rows))
    return whole


def layer_in_parts(made: Case, chance: random.Random) -> None:
    if isinstance(made.model.layer, nn.RNNBase | nn.MultiheadAttention):  # test_same_function has these
        return
    before = of(made)
    made.model.layer = in_parts(made.model.layer, chance)
    after = of(made)
    parts = [row for row in after.names if row != "head"]
    assert len(parts) > 1
    numels = [after.info[row]["numel"] for row in parts]
    assert sum(numels) == before.info["layer"]["numel"]
    assert_row(together([after[row] for row in parts], numels), before["layer"], sum(numels))
    assert_row(after["head"], before["head"], before.info["head"]["numel"])


# --- what takes passes of its own ------------------------------------------------------------------------------------


def assert_on_request(made: Case, other: Case, powers: Mapping[str, int], c: float = 1.0, **options: object) -> None:
    """Every metric on request of ``other`` is that of ``made`` times a power of c. Float64, since sums may cancel.

    The cosine with a gradient of nothing (a recurrent weight in a sequence of one) is NaN in both.
    """
    before, after = of(made, metrics=ON_REQUEST), of(other, metrics=ON_REQUEST, **options)
    for metric in ON_REQUEST:
        expected = before.column(metric) * abs(c) ** powers.get(metric, 0)
        assert after.column(metric) == pytest.approx(expected, rel=1e-6, abs=1e-12, nan_ok=True), metric


def scale_of_the_loss_on_request(made: Case, chance: random.Random) -> None:
    c, made = chance.choice(FACTORS), converted(made, torch.float64)
    powers = {"grasp": 2, "agree_dot": 2, "agree_sign": 1}
    assert_on_request(made, made, powers, c, loss_fn=lambda output, target: c * F.cross_entropy(output, target))


def the_batch_twice_on_request(made: Case, chance: random.Random) -> None:
    """Both halves are there twice, since their number of samples is even; R of synflow is a sum over samples."""
    made = converted(made, torch.float64)
    x, target = (torch.cat([t, t]) for t in (made.x, made.target))
    assert_on_request(made, replace(made, x=x, target=target), {"synflow": 1}, 2.0)


def order_of_samples_on_request(made: Case, chance: random.Random) -> None:
    """Within the halves, and which of them comes first."""
    made = converted(made, torch.float64)
    halves = [chance.sample(range(first, SAMPLES, 2), SAMPLES // 2) for first in chance.sample((0, 1), 2)]
    order = torch.tensor(halves).t().flatten()
    assert_on_request(made, replace(made, x=made.x[order], target=made.target[order]), {})


def scale_of_a_weight_on_request(made: Case, chance: random.Random) -> None:
    """Of each row, profiled alone, since grasp follows the gradient of all rows that are profiled."""
    c, made = abs(chance.choice(FACTORS)), converted(made, torch.float64)
    scaled = converted(made, torch.float64)
    names = rescaled(scaled, made.entered or made.left, c)
    scaled.model.before, scaled.model.after = (1 / c, 1.0) if made.entered else (1.0, 1 / c)
    rows = [row for row, info in of(made).info.items() if info["parameter"] in names]
    powers = {"grasp": -2, "agree_dot": -2, "agree_sign": -1}
    for row in rows:
        before, after = (
            zest_fast.profile(each.model, (each.x, each.target), layers=[row], metrics=ON_REQUEST)[row]
            for each in (made, scaled)
        )
        for metric in ON_REQUEST:
            expected = before[metric] * c ** powers.get(metric, 0)
            assert after[metric] == pytest.approx(expected, rel=1e-6), metric


RELATIONS: list[Callable[[Case, random.Random], None]] = [
    scale_of_the_loss,
    scale_of_a_weight_that_the_input_undoes,
    scale_of_a_weight_that_is_undone_behind_it,
    order_of_samples,
    the_batch_twice,
    samples_without_weight,
    another_name_for_every_class,
    the_other_sign_of_every_target,
    layout_of_inputs,
    expanded_inputs,
    layout_of_weights,
    layers_beside_it,
    float32_and_float64,
    bfloat16_is_no_worse_than_autograd,
    layer_in_parts,
]
RELATIONS_ON_REQUEST = [
    scale_of_the_loss_on_request,
    the_batch_twice_on_request,
    order_of_samples_on_request,
    scale_of_a_weight_on_request,
]


def check(relation: Callable[[Case, random.Random], None], kind: str, seed: int) -> None:
    key = f"{relation.__name__} {seed}"  # every relation has layers of its own
    relation(case(kind, key), random.Random(key))


@pytest.mark.parametrize("seed", FEW)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("relation", RELATIONS + RELATIONS_ON_REQUEST)
def test_relation(relation: Callable[[Case, random.Random], None], kind: str, seed: int) -> None:
    check(relation, kind, seed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("relation", RELATIONS + RELATIONS_ON_REQUEST)
def test_relation_of_many(relation: Callable[[Case, random.Random], None], kind: str) -> None:
    for seed in MANY:
        check(relation, kind, seed)
