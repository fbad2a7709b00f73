"""What zest_fast.profile() is compared with, in plain PyTorch: functions (model, batch) -> {layer: {metric: value}}.

Written for the models of zest_fast.benchmarking.models, where every profiled weight is used once and no in-place
operation follows a layer; the general case is the library's job. Layers are all modules with a weight of two or more
dimensions but embeddings, as in profile(). Index letters: n samples, p positions, k output channels; Y and G = dL/dY
are [n, p.., k] for Linear, [n, k, p..] for convolutions.
"""

from __future__ import annotations

import types
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zest_fast.benchmarking import hooks
from zest_fast.benchmarking.hooks import Table, positions_of, profiled_layers, removed_at_the_end, trainable
from zest_fast.benchmarking.models import Batch


def plain(model: nn.Module, batch: Batch) -> None:
    """The baseline: one forward and one backward of all parameters, gradients None before and after."""
    hooks.plain_pass(model, lambda: model(**batch).loss)


def drop_gradients(model: nn.Module, batch: Batch, *, only: str = "all") -> None:
    """The memory baseline, as LOMO does it: each gradient is dropped as soon as it is accumulated.

    only: "all" parameters are trainable, or the "profiled" weights alone (which never holds an embedding's gradient).
    """
    weights = list(model.parameters()) if only == "all" else [m.weight for m in profiled_layers(model).values()]
    with trainable(model, weights), removed_at_the_end() as handles:
        handles += [w.register_post_accumulate_grad_hook(_drop) for w in weights]
        model(**batch).loss.backward()


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


# (a) a plain backward, then the definitions written out


def reductions_after_backward(model: nn.Module, batch: Batch) -> Table:
    """Keep every output and gradient, then reduce with one torch expression per metric: the straightforward way."""
    outputs: dict[str, Tensor] = {}
    layers = profiled_layers(model)
    with removed_at_the_end() as handles:
        handles += [m.register_forward_hook(partial(_keep_output, outputs, name)) for name, m in layers.items()]
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
    positions = positions_of(module, product)
    return product.sum(positions) if positions else product  # to torch.sum an empty list means every dimension


# (b) the strongest peer


def hook_reductions(model: nn.Module, batch: Batch, *, fisher: bool = True) -> Table:
    """Hooks reduce each gradient and drop it at once, and each output on the way: zest_fast.benchmarking.hooks."""
    return hooks.hook_reductions(model, lambda: model(**batch).loss, fisher=fisher)


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
    with trainable(model, []):
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

    with removed_at_the_end() as handles:
        handles += [m.register_forward_hook(partial(on_output, name)) for name, m in profiled_layers(model).items()]
        model(**batch).loss.backward()
    return values
