"""The judge on trial: finite differences and exact identities, in float64, that share no gradient with it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from model_zoo import build
from oracle import FAMILIES, METRICS, TOLERANCE, Measurement, compare, compare_rounded, measure, relative_error, rows_of
from torch import Tensor, nn

# Without kinks, and without the casts to float32 that many language models carry in their norms and losses.
SMOOTH = [
    "linear_on_4d_without_bias",
    "linear_on_transposed_input",
    "bilinear",
    "conv_groups_dilated_depthwise",
    "conv_transposed",
    "reused_linear",
    "tied_embedding",
    "parameters_in_einsum",
    "weight_norm_parametrised",
    "multihead_attention",
    "lstm",
    "gradient_penalty",
    "checkpoint_reentrant_reused_layer",
]


def slope(closure: Callable[[], Tensor], weight: Tensor, direction: Tensor, step: float = 1e-4) -> float:
    """The derivative of the loss along `direction` of `weight`, by differences of fourth order."""

    def at(t: float) -> float:
        with torch.no_grad():
            weight.add_(direction, alpha=t * step)
            loss = closure_value(closure)
            weight.sub_(direction, alpha=t * step)
        return loss

    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)


def closure_value(closure: Callable[[], Tensor]) -> float:
    with torch.enable_grad():  # a gradient penalty differentiates within its loss
        return closure().item()


@pytest.mark.parametrize("name", SMOOTH)
def test_gradient_metrics_are_slopes_of_the_loss(name: str) -> None:
    model, closure = build(name, double=True)
    spec = measure(model, closure)
    for row in list(rows_of(model))[:6]:
        values, w = spec.values[row.name], row.weight
        gradient = w.grad.clone()
        unit = values["grad_norm"] * w.detach().norm().item() + 1e-12
        assert values["plain"] * w.numel() == pytest.approx(slope(closure, w, w.detach().clone()), abs=1e-6 * unit)
        total = slope(closure, w, torch.ones_like(w))
        assert values["grad_mean"] * w.numel() == pytest.approx(total, abs=1e-6 * unit + 1e-6 * abs(total))
        along = slope(closure, w, gradient / gradient.norm())
        assert values["grad_norm"] == pytest.approx(along, rel=1e-5)
        assert values["snip"] == pytest.approx(slope(closure, w, w.detach() * (w * gradient).sign()), rel=1e-5)


@pytest.mark.parametrize("name", ["linear_on_4d_without_bias", "conv_transposed", "reused_linear", "bilinear"])
def test_fisher_is_the_slope_along_each_channel_of_each_sample(name: str) -> None:
    """S[n, k] is how the loss answers when channel k of sample n is scaled in all uses of the layer."""
    model, closure = build(name, double=True)
    spec = measure(model, closure)
    for row in rows_of(model):
        channel_dim = 1 if hasattr(row.layer, "kernel_size") else -1
        shape: list[int] = []
        row.layer.register_forward_hook(lambda m, a, y, d=channel_dim, s=shape: s.extend((y.shape[0], y.shape[d])))
        closure()
        samples, channels = shape[:2]
        sums = torch.tensor(
            [[scaled_slope(row.layer, closure, n, k, channel_dim) for k in range(channels)] for n in range(samples)]
        )
        assert spec.values[row.name]["fisher"] == pytest.approx(0.5 * sums.square().mean(0).sum().item(), rel=1e-6)


def scaled_slope(layer: nn.Module, closure: Callable[[], Tensor], n: int, k: int, channel_dim: int) -> float:
    step = 1e-4

    def at(t: float) -> float:
        def scale(module: nn.Module, args: tuple, y: Tensor) -> Tensor:
            y = y.clone()
            y[n].select(channel_dim if channel_dim < 0 else channel_dim - 1, k).mul_(1 + t * step)
            return y

        handle = layer.register_forward_hook(scale)
        loss = closure_value(closure)
        handle.remove()
        return loss

    return (at(1) - at(-1)) / (2 * step)


@pytest.mark.parametrize(
    "name", ["mlp_on_sequences", "conv_groups_dilated_depthwise", "reused_linear", "bert_in_eval_mode", "vit"]
)
def test_plain_and_bias_add_up_to_the_products_of_output_and_gradient(name: str) -> None:
    """plain * n + sum b * db = sum of Y * G, with Y * G taken here as the slope along the scaled output."""
    model, closure = build(name, double=True)
    spec = measure(model, closure)
    checked = 0
    for row in rows_of(model):
        if not isinstance(row.layer, nn.Linear | nn.Conv2d) or row.name not in spec.values:
            continue
        bias = row.layer.bias
        with_bias = 0.0 if bias is None else (bias * bias.grad).sum().item()
        slopes = []
        for t in (1e-4, -1e-4):
            handle = row.layer.register_forward_hook(lambda m, a, y, t=t: y * (1 + t))
            slopes.append(closure().item())
            handle.remove()
        expected = (slopes[0] - slopes[1]) / 2e-4
        values = spec.values[row.name]
        unit = values["snip"] + abs(with_bias) + abs(expected)
        assert values["plain"] * spec.numel[row.name] + with_bias == pytest.approx(expected, abs=1e-5 * unit)
        checked += 1
        if checked == 8:
            break
    assert checked > 0


def test_sum_of_the_gradient_has_a_closed_form() -> None:
    """sum dW = sum over positions of (sum X)(sum G)."""
    model, closure = build("linear_on_4d_without_bias", double=True)
    seen: dict[str, Tensor] = {}
    model[0].register_forward_hook(lambda m, args, y: seen.update(x=args[0].detach()))
    model[0].register_full_backward_hook(lambda m, grad_in, grad_out: seen.update(g=grad_out[0]))
    values = measure(model, closure).values["0"]
    expected = (seen["x"].sum(-1) * seen["g"].sum(-1)).sum().item()
    assert values["grad_mean"] * model[0].weight.numel() == pytest.approx(expected, rel=1e-12)


def test_scale_in_front_of_batch_norm_has_no_slope() -> None:
    model, closure = build("residual_batch_norm_in_train_mode", double=True)
    values = measure(model, closure).values["conv2"]
    assert abs(values["plain"]) < 1e-4 * values["snip"] / model.conv2.weight.numel()  # batch norm's eps is not scaled


def test_activations_are_those_of_the_output_before_anything_overwrites_it() -> None:
    model, closure = build("mlp_on_sequences", double=True)
    inputs: list[Tensor] = []
    model[0].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    values = measure(model, closure).values["0"]
    y = (inputs[0] @ model[0].weight.T + model[0].bias).detach()
    assert (y < 0).any()  # which the activation that follows would have clipped
    assert values["act_mean"] == pytest.approx(y.mean().item(), rel=1e-12)
    assert values["act_std"] == pytest.approx(y.var(correction=0).sqrt().item(), rel=1e-12)
    assert values["act_abs_mean"] == pytest.approx(y.abs().mean().item(), rel=1e-12)
    assert values["act_abs_std"] == pytest.approx(y.abs().var(correction=0).sqrt().item(), rel=1e-12)


def test_rows_follow_the_naming_rule() -> None:
    def names(name: str, layers: tuple[str, ...] | None = None) -> list[str]:
        return [row.name for row in rows_of(build(name)[0], layers)]

    assert names("mlp") == ["0", "2"]
    assert names("tied_embedding") == ["body", "head"]
    assert names("tied_linears") == ["0", "2", "4"]
    assert names("parameters_in_einsum") == ["experts", "mix", "first"]
    assert names("sparse_embedding", ("0", "2")) == ["0", "2"]
    assert names("gru_bidirectional") == [
        "cell.weight_ih_l0",
        "cell.weight_hh_l0",
        "cell.weight_ih_l0_reverse",
        "cell.weight_hh_l0_reverse",
        "out",
    ]


def table(**changes: float) -> Measurement:
    values = dict.fromkeys(METRICS, 1.0) | {"snip": 8.0} | changes
    return Measurement({"layer": values}, {"layer": 4}, {"layer": "layer.weight"}, set(), 0.0)


def test_families_cover_every_metric() -> None:
    assert tuple(sorted(FAMILIES)) == tuple(sorted(METRICS))


@pytest.mark.parametrize("metric", METRICS)
def test_a_wrong_cell_is_a_miss(metric: str) -> None:
    exact = table()
    for factor, caught in ((0.5, False), (2.0, True)):
        shift = factor * TOLERANCE * (2.0 if metric == "plain" else exact.values["layer"][metric])
        wrong = table(**{metric: exact.values["layer"][metric] + shift})
        assert bool(compare(wrong.values, exact, exact).misses) == caught
        assert bool(compare_rounded(wrong.values, exact, exact).misses) == caught


def test_nan_only_where_nan_is_due() -> None:
    with_nan = table(fisher=math.nan)
    assert not compare(with_nan.values, with_nan, with_nan).misses
    assert compare(table().values, with_nan, with_nan).misses
    assert compare(with_nan.values, table(), table()).misses


def test_missing_and_superfluous_rows_are_misses() -> None:
    exact = table()
    assert compare({}, exact, exact).misses == ["row 'layer' is missing"]
    assert compare(exact.values | {"other": {}}, exact, exact).misses == ["row 'other' should not be there"]


def test_cells_beyond_plain_autograd_are_left_out() -> None:
    verdict = compare(table(snip=8.1).values, table(), table(snip=8.01))
    assert not verdict.misses
    assert len(verdict.left_out) == 1


def test_means_are_measured_against_the_spread() -> None:
    assert relative_error("act_mean", 1.001, {"act_mean": 1.0, "act_std": 10.0}, 4) == pytest.approx(1e-4)
    assert relative_error("plain", 1.001, {"plain": 1.0, "snip": 8.0}, 4) == pytest.approx(5e-4)
