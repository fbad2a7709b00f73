"""What zest_fast.profile() is compared with, in plain PyTorch: functions (model, batch) -> {layer: {metric: value}}.

Written for the models of bench/models.py, where every profiled weight is used once and no in-place operation follows a
layer; the general case is the library's job. Layers are all modules with a weight of two or more dimensions but
embeddings, as in profile(). Index letters: n samples, p positions, k output channels; Y and G = dL/dY are [n, p.., k]
for Linear, [n, k, p..] for convolutions.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.kernels.reductions import Scratch, lean_channel_products, lean_gradient_moments, lean_moments
from bench.models import Batch

Table = dict[str, dict[str, float]]


def profiled_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that profile() has a row for, by name."""
    owners = {
        name: module for name, module in model.named_modules() if isinstance(getattr(module, "weight", None), Tensor)
    }
    return {n: m for n, m in owners.items() if m.weight.dim() >= 2 and not isinstance(m, nn.Embedding)}


def plain(model: nn.Module, batch: Batch) -> None:
    """The baseline: one forward and one backward of all parameters, gradients None before and after."""
    model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)


def drop_gradients(model: nn.Module, batch: Batch, *, only: str = "all") -> None:
    """The memory baseline, as LOMO does it: each gradient is dropped as soon as it is accumulated.

    only: "all" parameters are trainable, or the "profiled" weights alone (which never holds an embedding's gradient).
    """
    weights = list(model.parameters()) if only == "all" else [m.weight for m in profiled_layers(model).values()]
    with _trainable(model, weights), _hooks() as hooks:
        hooks += [w.register_post_accumulate_grad_hook(_drop) for w in weights]
        model(**batch).loss.backward()


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


# (a) a plain backward, then the definitions written out


def reductions_after_backward(model: nn.Module, batch: Batch) -> Table:
    """Keep every output and gradient, then reduce with one torch expression per metric: the straightforward way."""
    outputs: dict[str, Tensor] = {}
    layers = profiled_layers(model)
    with _hooks() as hooks:
        hooks += [m.register_forward_hook(partial(_keep_output, outputs, name)) for name, m in layers.items()]
        model(**batch).loss.backward()
    table = {name: written_out(module, y.detach(), y.grad) for name, module in layers.items() for y in [outputs[name]]}
    model.zero_grad(set_to_none=True)
    return table


def _keep_output(outputs: dict[str, Tensor], name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
    output.retain_grad()
    outputs[name] = output


def written_out(module: nn.Module, y: Tensor, dy: Tensor) -> dict[str, float]:
    w, dw = module.weight.detach(), module.weight.grad
    product = w * dw
    values = {
        "weight_mean": w.mean(),
        "weight_std": w.std(correction=0),
        "act_mean": y.mean(),
        "act_std": y.std(correction=0),
        "act_abs_mean": y.abs().mean(),
        "act_abs_std": y.abs().std(correction=0),
        "grad_mean": dw.mean(),
        "grad_std": dw.std(correction=0),
        "grad_abs_mean": dw.abs().mean(),
        "grad_abs_std": dw.abs().std(correction=0),
        "grad_norm": dw.norm(),
        "plain": product.mean(),
        "snip": product.abs().sum(),
        "fisher": _over_positions(module, y * dy).square().mean(0).sum() / 2,
        "rgn": dw.norm() / w.norm(),
    }
    return {metric: value.item() for metric, value in values.items()}


def _over_positions(module: nn.Module, product: Tensor) -> Tensor:
    """Sum Y ⊙ G over its positions: [n, k]."""
    positions = _positions(module, product)
    return product.sum(positions) if positions else product  # to torch.sum an empty list means every dimension


def _positions(module: nn.Module, y: Tensor) -> list[int]:
    channel = y.dim() - 1 if isinstance(module, nn.Linear) else 1
    return [d for d in range(1, y.dim()) if d != channel]


# (b) the strongest peer


def hook_reductions(model: nn.Module, batch: Batch, *, fisher: bool = True) -> Table:
    """Hooks reduce each gradient with separate torch reductions and drop it at once, and each output on the way.

    At its best: unprofiled parameters are frozen, every metric is derived from shared sums, the sums are those that
    torch vectorises best (dot and sum run at the speed of memory, var_mean does not) and are taken over blocks that
    stay in the cache, temporaries live in two reused buffers, and scalars leave torch once, at the end. foreach does
    not apply: one gradient is alive at a time, and on a CPU _foreach_norm is the same loop. The price of Σx² - (Σx)²/n:
    digits on offset data.
    """
    layers = profiled_layers(model)
    sums: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
    scratch = Scratch()
    with _trainable(model, [m.weight for m in layers.values()]), _hooks() as hooks:
        for name, module in layers.items():
            on_output = partial(_reduce_output, sums[name], scratch, fisher)
            on_gradient = partial(_reduce_gradient, sums[name], scratch)
            hooks += [
                module.register_forward_hook(on_output),
                module.weight.register_post_accumulate_grad_hook(on_gradient),
            ]
        model(**batch).loss.backward()
    numel = {name: {"act": sums[name].pop("act_numel"), "weight": m.weight.numel()} for name, m in layers.items()}
    flat = iter(torch.stack([value for row in sums.values() for value in row.values()]).tolist())
    return {name: _derive({key: next(flat) for key in row}, numel[name]) for name, row in sums.items()}


def _reduce_output(
    sums: dict, scratch: Scratch, fisher: bool, module: nn.Module, inputs: tuple, output: Tensor
) -> None:
    y = output.detach()
    sums["act_numel"] = y.numel()
    sums |= {f"act_{key}": value for key, value in lean_moments(y, scratch).items()}
    if fisher:
        output.register_hook(partial(_reduce_fisher, sums, scratch, module, y))


def _reduce_fisher(sums: dict, scratch: Scratch, module: nn.Module, y: Tensor, dy: Tensor) -> None:
    positions = _positions(module, y)
    per_channel = lean_channel_products(y, dy, positions, scratch) if positions else y * dy
    sums["fisher"] = torch.linalg.vector_norm(per_channel).square() / (2 * len(y))


def _reduce_gradient(sums: dict, scratch: Scratch, weight: Tensor) -> None:
    dw, weight.grad = weight.grad, None
    sums |= lean_gradient_moments(dw, weight.detach(), scratch)


def _derive(sums: dict[str, float], numel: dict[str, int]) -> dict[str, float]:
    row = {}
    for kind, n in (("weight", numel["weight"]), ("act", numel["act"]), ("grad", numel["weight"])):
        row[f"{kind}_mean"], row[f"{kind}_std"] = _mean_std(n, sums[f"{kind}_sum"], sums[f"{kind}_square"])
        if kind != "weight":
            absolute = _mean_std(n, sums[f"{kind}_abs"], sums[f"{kind}_square"])
            row[f"{kind}_abs_mean"], row[f"{kind}_abs_std"] = absolute
    row["grad_norm"] = math.sqrt(sums["grad_square"])
    row["plain"], row["snip"] = sums["product"] / numel["weight"], sums["product_abs"]
    row["rgn"] = row["grad_norm"] / math.sqrt(sums["weight_square"])
    return {**row, "fisher": sums["fisher"]} if "fisher" in sums else row


def _mean_std(n: int, total: float, square: float) -> tuple[float, float]:
    mean = total / n
    return mean, math.sqrt(max(0.0, square / n - mean * mean))


# (c) zero-cost-nas (Abdelfattah 2021): one forward and backward per metric, the formulas as published


def zero_cost_nas(model: nn.Module, batch: Batch) -> Table:
    """snip, grad_norm, plain and fisher, each with a pass of its own (plain divided by numel, fisher over the channels
    of Linear).
    """
    table: Table = {name: {} for name in profiled_layers(model)}
    for metric, measure in (("snip", _snip), ("grad_norm", _grad_norm), ("plain", _plain), ("fisher", _fisher)):
        for name, value in measure(model, batch).items():
            table[name][metric] = value.item()
        model.zero_grad(set_to_none=True)
    return table


def _snip(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Gradient of a mask of ones that multiplies each weight inside an overridden forward."""
    layers = profiled_layers(model)
    masks = {name: torch.ones_like(m.weight, requires_grad=True) for name, m in layers.items()}
    with _trainable(model, []):
        for name, module in layers.items():
            module.forward = types.MethodType(partial(_masked_forward, masks[name]), module)
        try:
            model(**batch).loss.backward()
        finally:
            for module in layers.values():
                del module.forward
    return {name: mask.grad.abs().sum() for name, mask in masks.items()}


def _masked_forward(mask: Tensor, module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, nn.Linear):
        return F.linear(x, module.weight * mask, module.bias)
    if hasattr(module, "static_padding"):  # of EfficientNet-Lite, whose convolutions pad in their forward
        x = module.static_padding(x)
    return module._conv_forward(x, module.weight * mask, module.bias)


def _grad_norm(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    model(**batch).loss.backward()
    return {name: m.weight.grad.norm() for name, m in profiled_layers(model).items()}


def _plain(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    model(**batch).loss.backward()
    return {name: (m.weight.grad * m.weight.detach()).mean() for name, m in profiled_layers(model).items()}


def _fisher(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}

    def on_output(name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        def on_gradient(dy: Tensor) -> None:
            values[name] = _over_positions(module, output.detach() * dy).square().mean(0).mul(0.5).sum()

        output.register_hook(on_gradient)

    with _hooks() as hooks:
        hooks += [m.register_forward_hook(partial(on_output, name)) for name, m in profiled_layers(model).items()]
        model(**batch).loss.backward()
    return values


@contextmanager
def _trainable(model: nn.Module, weights: list[Tensor]) -> Iterator[None]:
    """Only `weights` require a gradient inside."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    chosen = {id(w) for w in weights}
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _hooks() -> Iterator[list]:
    """A list of hook handles that are removed on the way out."""
    handles: list = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()
