"""`zest_fast.profile()` on every model of the zoo, held against the oracle; and what it leaves behind."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cache

import pytest
import torch
from model_zoo import REFUSABLE, ZOO, build, entry_of
from oracle import METRICS, TOLERANCE, Measurement, Verdict, compare, compare_rounded, measure, rows_of
from torch import Tensor, nn
from untouched import bits, changes, state_of

import zest_fast


@cache
def specification(name: str) -> Measurement:
    return defined(name, measure(*build(name, double=True), entry_of(name).layers))


@cache
def plain_autograd(name: str) -> Measurement:
    return defined(name, measure(*build(name), entry_of(name).layers))


def defined(name: str, measurement: Measurement) -> Measurement:
    """The measurement with NaN where the entry says that a metric has no meaning."""
    for row, metrics in entry_of(name).undefined.items():
        measurement.values[row].update(dict.fromkeys(metrics, math.nan))
    return measurement


def profiled(name: str, **options: object) -> tuple[nn.Module, zest_fast.LayerProfile]:
    model, closure = build(name)
    return model, zest_fast.profile(model, closure=closure, layers=entry_of(name).layers, **options)


def as_table(profile: zest_fast.LayerProfile) -> dict[str, dict[str, float]]:
    return {name: {metric: float(profile[name][metric]) for metric in profile.metrics} for name in profile.names}


def judge(name: str, profile: zest_fast.LayerProfile) -> Verdict:
    judgement = compare_rounded if entry_of(name).rounded else compare
    table, expected = as_table(profile), specification(name)
    for row, metrics in entry_of(name).optional.items():
        for metric in metrics:
            if row in table and math.isnan(table[row][metric]) and profile.info[row]["note"]:
                table[row][metric] = expected.values[row][metric]
    return judgement(table, expected, plain_autograd(name))


@cache
def verdict(name: str) -> Verdict:
    return judge(name, profiled(name)[1])


@pytest.mark.parametrize("name", ZOO)
def test_every_metric_of_every_layer(name: str) -> None:
    assert not verdict(name).misses


@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if entry.undefined])
def test_what_is_undefined_has_a_reason(name: str) -> None:
    _, profile = profiled(name)
    for row, metrics in ZOO[name].undefined.items():
        assert all(math.isnan(profile[row][metric]) for metric in metrics)
        assert any(metric.partition("_")[0] in profile.info[row]["note"] for metric in metrics)


@pytest.mark.parametrize("name", REFUSABLE)
def test_exact_or_refused_by_name(name: str) -> None:
    before = state_of(build(name)[0])
    try:
        model, profile = profiled(name)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        assert re.search(REFUSABLE[name].refusal, str(error)), error
        return
    assert not judge(name, profile).misses
    assert profile.loss == pytest.approx(plain_autograd(name).loss, rel=TOLERANCE)
    assert [label for label in changes(before, state_of(model)) if label.startswith("bits of")] == []


def test_few_cells_are_beyond_plain_autograd() -> None:
    exact = [verdict(name) for name, entry in ZOO.items() if not entry.rounded]
    left_out = [cell for each in exact for cell in each.left_out]
    assert len(left_out) <= 0.02 * sum(each.cells for each in exact), left_out


@pytest.mark.parametrize("name", ["mlp_on_sequences", "conv_channels_last", "reused_linear", "llama_tied", "lstm"])
def test_the_reference_backend_gives_the_same_table(name: str) -> None:
    _, profile = profiled(name, backend="reference")
    assert profile.backend == "reference"
    assert not judge(name, profile).misses


@pytest.mark.parametrize("name", ZOO)
def test_loss_and_rows(name: str) -> None:
    model, profile = profiled(name)
    own = plain_autograd(name)
    assert profile.loss == pytest.approx(own.loss, rel=TOLERANCE)
    assert profile.metrics == list(METRICS)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for row in profile.names:
        info = profile.info[row]
        weight = parameters[info["parameter"]]
        assert info["parameter"] == own.parameters[row]
        assert (info["numel"], list(info["shape"])) == (weight.numel(), list(weight.shape))
        assert info["trainable"] == weight.requires_grad


@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if entry.layers is None])
def test_every_matrix_has_a_row_or_a_reason(name: str) -> None:
    model, profile = profiled(name)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    covered = {id(parameters[profile.info[row]["parameter"]]) for row in profile.names}
    explained = {id(parameters[parameter]) for parameter in profile.uncovered}
    matrices = {id(p): n for n, p in parameters.items() if p.dim() >= 2}
    assert [n for key, n in matrices.items() if key not in covered | explained] == []
    assert [n for key, n in matrices.items() if key in covered & explained] == []
    assert all(isinstance(reason, str) and reason for reason in profile.uncovered.values())


class Boom(Exception):
    """What a user's own code may raise."""


class RaisesInBackward(torch.autograd.Function):
    generate_vmap_rule = True  # it may stand in the midst of a torch.func transform

    @staticmethod
    def forward(y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        return tangent.clone()

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        raise Boom("backward")


def passes(model: nn.Module, victim: nn.Module, closure: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return closure


def raises_in_forward(model: nn.Module, victim: nn.Module, closure: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        raise Boom("forward")

    victim.register_forward_hook(hook)
    return closure


def raises_in_loss(model: nn.Module, victim: nn.Module, closure: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def failing() -> Tensor:
        closure()
        raise Boom("loss")

    return failing


def raises_in_backward(model: nn.Module, victim: nn.Module, closure: Callable[[], Tensor]) -> Callable[[], Tensor]:
    victim.register_forward_hook(lambda module, args, output: RaisesInBackward.apply(output))
    return closure


def victim_of(name: str, model: nn.Module) -> nn.Module:
    """A layer in the midst of those that have an output and are reached by the loss."""
    values, rows = specification(name).values, list(rows_of(model, ZOO[name].layers))
    layers = [row.layer for row in rows if values.get(row.name, {}).get("fisher", 0) > 0]
    if not layers:  # fisher is undefined throughout
        layers = [row.layer for row in rows if values.get(row.name, {}).get("grad_norm", 0) > 0]
    return layers[len(layers) // 2]


def prepared(name: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A model in the midst of its life: gradients of its own, and a random state that is not the closure's."""
    model, closure = build(name)
    for parameter in list(model.parameters())[::2]:
        parameter.grad = torch.full_like(parameter, 0.5)
    torch.manual_seed(3)
    return model, closure


@pytest.mark.parametrize("failure", [passes, raises_in_forward, raises_in_loss, raises_in_backward])
@pytest.mark.parametrize("name", ZOO)
def test_model_is_bit_for_bit_as_before(name: str, failure: Callable) -> None:
    model, closure = prepared(name)
    closure = failure(model, victim_of(name, model), closure)
    before = state_of(model)
    if failure is passes:
        zest_fast.profile(model, closure=closure, layers=ZOO[name].layers)
    else:
        with pytest.raises(Boom):
            zest_fast.profile(model, closure=closure, layers=ZOO[name].layers)
    assert changes(before, state_of(model)) == []


@pytest.mark.parametrize("name", ZOO)
def test_training_goes_on_as_if_nothing_had_happened(name: str) -> None:
    model, closure = build(name)
    zest_fast.profile(model, closure=closure, layers=ZOO[name].layers)
    untouched, closure_of_untouched = build(name)
    for each, loss in ((model, closure), (untouched, closure_of_untouched)):
        for parameter in filter(torch.is_floating_point, each.parameters()):
            parameter.requires_grad_(True)
        loss().backward()
    for (name, a), (_, b) in zip(model.named_parameters(), untouched.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or bits(a.grad.to_dense()) == bits(b.grad.to_dense()), name
