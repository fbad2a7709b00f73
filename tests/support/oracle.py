"""The independent judge of `zest_fast.profile()`: every metric of every layer from its definition, by plain autograd.

Nothing here is fast, clever or taken from the library. A weight's gradient is what autograd leaves in `.grad`; a
layer's output Y is cloned by a forward hook before anybody can overwrite it; G arrives at an alias of the output that
the hook puts in its place. All statistics are formed in float64 from these tensors.

The specification is `measure` on a float64 copy of the model. `measure` on the model as it is gives the accuracy that
plain autograd itself reaches in that precision: cells where it misses the specification are not held against the
library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList
from transformers.pytorch_utils import Conv1D

METRICS = (
    "weight_mean",
    "weight_std",
    "act_mean",
    "act_std",
    "act_abs_mean",
    "act_abs_std",
    "grad_mean",
    "grad_std",
    "grad_abs_mean",
    "grad_abs_std",
    "grad_norm",
    "plain",
    "snip",
    "fisher",
    "rgn",
)
SPREAD_OF_MEAN = {
    "weight_mean": "weight_std",
    "act_mean": "act_std",
    "act_abs_mean": "act_abs_std",
    "grad_mean": "grad_std",
    "grad_abs_mean": "grad_abs_std",
}
MAGNITUDE = {metric: pair for pair in SPREAD_OF_MEAN.items() for metric in pair}
FAMILIES = {  # metrics whose rounding errors have the same cause
    metric: family
    for family, metrics in {
        "weight": ("weight_mean", "weight_std"),
        "act": ("act_mean", "act_std", "act_abs_mean", "act_abs_std"),
        "grad": ("grad_mean", "grad_std", "grad_abs_mean", "grad_abs_std", "grad_norm", "plain", "snip", "rgn"),
        "fisher": ("fisher",),
    }.items()
    for metric in metrics
}
TOLERANCE = 2e-5  # what the library must reach against the specification
REACHABLE = 1e-5  # beyond this, plain autograd in the model's own precision misses the specification itself
NOTHING = 1e-12  # of a mean and its spread together, this is the last digits of float64

Values = dict[str, dict[str, float]]  # row -> metric -> value


@dataclass(eq=False)
class Outputs:
    """What one module returned and which gradients came back to it.

    values: Y of every call of the forward pass; products: S = sum over positions of Y * G, [samples, channels], of
    every call that the loss reached; single: False once a call returned anything but one floating tensor.
    """

    channel_dim: int | None  # None: the last one
    values: list[Tensor] = field(default_factory=list)
    products: list[Tensor] = field(default_factory=list)
    single: bool = True


@dataclass(eq=False)
class Row:
    """One line of the table: a weight, and the module whose output stands for it (None: no single output)."""

    name: str
    parameter: str
    weight: nn.Parameter
    layer: nn.Module | None


@dataclass
class Measurement:
    """The table of one run: `values` has the rows that the loss reached, `unreached` names the other parameters."""

    values: Values
    numel: dict[str, int]
    parameters: dict[str, str]
    unreached: set[str]
    loss: float


def matrices(module: nn.Module) -> dict[str, nn.Parameter]:
    """The floating parameters of two or more dimensions that `module` itself owns."""
    return {n: p for n, p in module._parameters.items() if p is not None and p.dim() >= 2 and p.is_floating_point()}


def rows_of(model: nn.Module, layers: Iterable[str] | None = None) -> Iterator[Row]:
    """A row for every matrix of every module; embeddings only when `layers` names them."""
    wanted = None if layers is None else set(layers)
    for module_name, module in model.named_modules():
        own = matrices(module)
        for parameter_name, weight in own.items():
            full = f"{module_name}.{parameter_name}" if module_name else parameter_name
            name = module_name if module_name and len(own) == 1 else full
            chosen = not isinstance(module, nn.Embedding | nn.EmbeddingBag) if wanted is None else name in wanted
            if chosen:
                yield Row(name, full, weight, layer_with_output(model, module_name, module))


def layer_with_output(model: nn.Module, name: str, owner: nn.Module) -> nn.Module | None:
    """The module whose output belongs to the matrices of `owner`, None where no single output does."""
    layer, owned = owner, len(matrices(owner))
    if isinstance(owner, ParametrizationList):
        layer = model.get_submodule(f".{name}".rpartition(".parametrizations.")[0].removeprefix("."))
    if isinstance(layer, nn.Linear | Conv1D | _ConvNd | nn.Bilinear):
        return layer
    return layer if owned == 1 else None


@contextmanager
def recorded(layers: Iterable[nn.Module]) -> Iterator[tuple[dict[nn.Module, Outputs], Callable[[], None]]]:
    """Hooks that collect the `Outputs` of each layer, and a function that starts the collection of gradients.

    Gradients count from that start on: a gradient penalty differentiates inside the closure, and what arrives then is
    not the gradient of the loss. Outputs count outside of a backward pass only: checkpointing calls modules again in
    there.
    """
    outputs = {layer: Outputs(1 if isinstance(layer, _ConvNd) else None) for layer in layers}
    counting = False

    def start() -> None:
        nonlocal counting
        counting = True

    def hook(module: nn.Module, args: tuple, output: object) -> Tensor | None:
        record = outputs.get(module)
        if record is None:  # a copy of the module that the user made, hooks and all
            return None
        if not isinstance(output, Tensor) or not output.is_floating_point():
            record.single = False
            return None
        y = physical(output).detach().clone()
        if torch._C._current_graph_task_id() == -1:
            record.values.append(y)
        if not output.requires_grad:
            return None
        alias = output * 1.0

        def arrived(g: Tensor) -> None:
            if counting:
                record.products.append(channel_sums(y, physical(g).detach(), module, record.channel_dim))

        alias.register_hook(arrived)
        return alias * 1.0  # a hook that the user puts on this one acts first

    # Before the user's own hooks: Y is what the layer computed, not what a hook made of it.
    handles = [layer.register_forward_hook(hook, prepend=True) for layer in outputs]
    try:
        yield outputs, start
    finally:
        for handle in handles:
            handle.remove()


def physical(x: Tensor) -> Tensor:
    """The tensor that functorch's transforms wrap: under vmap with one more dimension, under jvp the primal."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def channel_sums(y: Tensor, g: Tensor, module: nn.Module, channel_dim: int | None) -> Tensor:
    """S[n, k]: the sum over positions of y * g, both shaped like the output; a call without a batch is one sample."""
    product = y.double() * g.double()
    unbatched = y.dim() == (len(module.kernel_size) + 1 if isinstance(module, _ConvNd) else 1)
    if unbatched:
        product = product.unsqueeze(0)
    channels_last = product.movedim(-1 if channel_dim is None else channel_dim, -1)
    return channels_last.flatten(1, -2).sum(1) if channels_last.dim() > 2 else channels_last


def measure(model: nn.Module, closure: Callable[[], Tensor], layers: Iterable[str] | None = None) -> Measurement:
    """Runs `closure` and its backward once and tabulates every metric. Leaves gradients and flags changed."""
    rows = list(rows_of(model, layers))
    for parameter in model.parameters():
        parameter.grad = None
        if parameter.dim() >= 2 and parameter.is_floating_point():
            parameter.requires_grad_(True)
    layers_with_output = {row.layer for row in rows if row.layer is not None}
    with (
        torch.enable_grad(),
        torch.compiler.set_stance("force_eager"),
        recorded(layers_with_output) as (outputs, start),
    ):
        loss = closure()
        start()
        loss.backward()
    reached = [row for row in rows if row.weight.grad is not None]
    return Measurement(
        values={row.name: metrics_of(row, outputs.get(row.layer)) for row in reached},
        numel={row.name: row.weight.numel() for row in reached},
        parameters={row.name: row.parameter for row in reached},
        unreached={row.parameter for row in rows if row.weight.grad is None},
        loss=float(loss.detach()),
    )


def metrics_of(row: Row, outputs: Outputs | None) -> dict[str, float]:
    """The table of metrics in the README, line by line."""
    w = row.weight.detach().double()
    dw = row.weight.grad.to_dense().double()
    values = {
        "weight_mean": w.mean(),
        "weight_std": deviation(w),
        "grad_mean": dw.mean(),
        "grad_std": deviation(dw),
        "grad_abs_mean": dw.abs().mean(),
        "grad_abs_std": deviation(dw.abs()),
        "grad_norm": dw.norm(),
        "plain": (w * dw).mean(),
        "snip": (w * dw).abs().sum(),
        "rgn": dw.norm() / w.norm(),
    }
    if outputs is not None and outputs.single and outputs.values:
        y = torch.cat([value.double().flatten() for value in outputs.values])
        values |= {
            "act_mean": y.mean(),
            "act_std": deviation(y),
            "act_abs_mean": y.abs().mean(),
            "act_abs_std": deviation(y.abs()),
            "fisher": fisher(outputs.products),
        }
    return {name: float(values.get(name, math.nan)) for name in METRICS}


def deviation(x: Tensor) -> Tensor:
    """The standard deviation that divides by n."""
    return (x - x.mean()).square().mean().sqrt()


def fisher(products: list[Tensor]) -> Tensor | float:
    """Half the mean square of S over samples, summed over channels; products: S [samples, channels] of every use.

    0 where no sample passed, as in an expert that is called without tokens.
    """
    if len({product.shape for product in products}) == 1:
        products = [sum(products)]
    return sum(0.5 * s.square().mean(0).sum() for s in products if len(s))


@dataclass
class Verdict:
    """misses: a readable line per wrong cell; left_out: cells that plain autograd cannot reach; cells: their number."""

    misses: list[str]
    left_out: list[str]
    cells: int
    worst: float


def compare(got: Mapping[str, Mapping[str, float]], spec: Measurement, own: Measurement) -> Verdict:
    """Holds the table `got` against the specification, cell by cell.

    Errors are relative to the value; of means relative to the standard deviation of the same quantity; of `plain`
    relative to snip / n. Rows that only one side has are misses.
    """
    misses = [f"row {name!r} is missing" for name in spec.values if name not in got]
    misses += [f"row {name!r} should not be there" for name in got if name not in spec.values]
    left_out, cells, worst = [], 0, 0.0
    for name, expected in spec.values.items():
        if name not in got:
            continue
        for metric in METRICS:
            cells += 1
            error = relative_error(metric, got[name][metric], expected, spec.numel[name])
            reachable = relative_error(metric, own.values[name][metric], expected, spec.numel[name])
            cell = f"{name} {metric}: {got[name][metric]:.9g} instead of {expected[metric]:.9g}"
            if reachable > REACHABLE:
                left_out.append(f"{cell} (plain autograd is off by {reachable:.1e})")
                continue
            worst = max(worst, error)
            if error > TOLERANCE:
                misses.append(f"{cell} (off by {error:.1e})")
    return Verdict(misses, left_out, cells, worst)


def compare_rounded(got: Mapping[str, Mapping[str, float]], spec: Measurement, own: Measurement) -> Verdict:
    """As `compare` for half precision, where plain autograd's worst cell of the same family is the measure.

    By half more is allowed: the same roundings in another order.
    """
    misses = [f"row {name!r} is missing" for name in spec.values if name not in got]
    misses += [f"row {name!r} should not be there" for name in got if name not in spec.values]
    allowed = dict.fromkeys(FAMILIES.values(), 0.0)
    for name, expected in spec.values.items():
        for metric, family in FAMILIES.items():
            error = relative_error(metric, own.values[name][metric], expected, spec.numel[name])
            allowed[family] = max(allowed[family], error)
    cells, worst = 0, 0.0
    for name, metric in ((name, metric) for name in spec.values if name in got for metric in METRICS):
        error = relative_error(metric, got[name][metric], spec.values[name], spec.numel[name])
        cells, worst = cells + 1, max(worst, error)
        if error > 1.5 * allowed[FAMILIES[metric]] + TOLERANCE:
            misses.append(f"{name} {metric}: off by {error:.1e}, plain autograd by {allowed[FAMILIES[metric]]:.1e}")
    return Verdict(misses, [], cells, worst)


def relative_error(metric: str, value: float, expected: Mapping[str, float], numel: int) -> float:
    """The error of one cell in its unit (see `compare`); NaN is right where, and only where, NaN is expected."""
    target = expected[metric]
    if math.isnan(target) or math.isnan(value):
        return 0.0 if math.isnan(target) and math.isnan(value) else math.inf
    if value == target:
        return 0.0
    if metric in MAGNITUDE and abs(value - target) <= NOTHING * math.hypot(*(expected[m] for m in MAGNITUDE[metric])):
        return 0.0
    if metric in SPREAD_OF_MEAN:
        unit = expected[SPREAD_OF_MEAN[metric]] or abs(target)  # one element has no spread
    elif metric == "plain":
        unit = expected["snip"] / numel
    else:
        unit = abs(target)
    return abs(value - target) / unit if unit > 0 else math.inf
