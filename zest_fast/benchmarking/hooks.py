"""A pass beside which profile() stands: plain, and with hooks that reduce what they see by torch.

The hooks are right where every profiled weight is used once, no in-place operation follows a layer and a layer returns
one tensor; the general case is profile()'s. Layers are all modules with a weight of two or more dimensions but
embeddings. Index letters: n samples, p positions, k output channels; Y and G = dL/dY are [n, p.., k] where the weight
is a matrix, [n, k, p..] for convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zest_fast.benchmarking.torch_reductions import (
    Scratch,
    lean_channel_products,
    lean_gradient_moments,
    lean_moments,
    mean_and_deviation,
)

Table = dict[str, dict[str, float]]


def profiled_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that profile() has a row for, by name; each has a weight."""
    owners: dict[str, Any] = {
        name: module for name, module in model.named_modules() if isinstance(getattr(module, "weight", None), Tensor)
    }
    return {n: m for n, m in owners.items() if m.weight.dim() >= 2 and not isinstance(m, nn.Embedding)}


def plain_pass(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """The baseline: one forward and one backward of all that requires a gradient, gradients None before and after."""
    loss().backward()
    model.zero_grad(set_to_none=True)


def hook_reductions(model: nn.Module, loss: Callable[[], Tensor], *, fisher: bool = True) -> Table:
    """Hooks reduce each gradient with separate torch reductions and drop it at once, and each output on the way.

    At its best: unprofiled parameters are frozen, every metric is derived from shared sums, the sums are those that
    torch vectorises best (dot and sum run at the speed of memory, var_mean does not) and are taken over blocks that
    stay in the cache, temporaries live in two reused buffers, and scalars leave torch once, at the end. foreach does
    not apply: one gradient is alive at a time, and on a CPU _foreach_norm is the same loop. The price of Σx² - (Σx)²/n:
    digits on offset data.
    """
    layers = profiled_layers(model)
    sums: dict[str, dict[str, Any]] = {name: {} for name in layers}
    scratch = Scratch()
    with trainable(model, [m.weight for m in layers.values()]), removed_at_the_end() as handles:
        for name, module in layers.items():
            on_output = partial(_reduce_output, sums[name], scratch, fisher)
            on_gradient = partial(_reduce_gradient, sums[name], scratch)
            handles += [
                module.register_forward_hook(on_output),
                module.weight.register_post_accumulate_grad_hook(on_gradient),
            ]
        loss().backward()
    numel = {name: {"act": sums[name].pop("act_numel"), "weight": m.weight.numel()} for name, m in layers.items()}
    flat = iter(torch.stack([value for row in sums.values() for value in row.values()]).tolist())
    return {name: _derive({key: next(flat) for key in row}, numel[name]) for name, row in sums.items()}


def _reduce_output(
    sums: dict[str, Any], scratch: Scratch, fisher: bool, module: nn.Module, inputs: Any, output: Tensor
) -> None:
    y = output.detach()
    sums["act_numel"] = y.numel()
    sums |= {f"act_{key}": value for key, value in lean_moments(y, scratch).items()}
    if fisher:
        output.register_hook(partial(_reduce_fisher, sums, scratch, module, y))


def _reduce_fisher(sums: dict[str, Any], scratch: Scratch, module: nn.Module, y: Tensor, dy: Tensor) -> None:
    positions = positions_of(module, y)
    per_channel = lean_channel_products(y, dy, positions, scratch) if positions else y * dy
    sums["fisher"] = torch.linalg.vector_norm(per_channel).square() / (2 * len(y))


def positions_of(module: Any, y: Tensor) -> list[int]:
    """The dimensions of an output that are neither samples nor channels."""
    channel = y.dim() - 1 if module.weight.dim() == 2 else 1
    return [d for d in range(1, y.dim()) if d != channel]


def _reduce_gradient(sums: dict[str, Any], scratch: Scratch, weight: Tensor) -> None:
    dw, weight.grad = weight.grad, None
    assert dw is not None
    sums |= lean_gradient_moments(dw, weight.detach(), scratch)


def _derive(sums: dict[str, float], numel: dict[str, int]) -> dict[str, float]:
    row = {}
    for kind, n in (("weight", numel["weight"]), ("act", numel["act"]), ("grad", numel["weight"])):
        row[f"{kind}_mean"], row[f"{kind}_std"] = mean_and_deviation(n, sums[f"{kind}_sum"], sums[f"{kind}_square"])
        if kind != "weight":
            absolute = mean_and_deviation(n, sums[f"{kind}_abs"], sums[f"{kind}_square"])
            row[f"{kind}_abs_mean"], row[f"{kind}_abs_std"] = absolute
    row["grad_norm"] = math.sqrt(sums["grad_square"])
    row["plain"], row["snip"] = sums["product"] / numel["weight"], sums["product_abs"]
    row["rgn"] = row["grad_norm"] / math.sqrt(sums["weight_square"])
    return {**row, "fisher": sums["fisher"]} if "fisher" in sums else row


@contextmanager
def trainable(model: nn.Module, weights: Sequence[Tensor]) -> Iterator[None]:
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
def removed_at_the_end() -> Iterator[list[Any]]:
    """A list of hook handles that are removed on the way out."""
    handles: list[Any] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()
