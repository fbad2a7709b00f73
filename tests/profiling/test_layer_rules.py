"""The rules of layers on tensors as models hand them over: any shape, strides, offset, dtype, and entries that are NaN.

Expected is what the definitions say of float64 copies, written out with dimensions by name.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from awkward_tensors import DTYPES, SPECIALS, view
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from zest_fast import kernels
from zest_fast.kernels import Collector
from zest_fast.profiling import layer_rules
from zest_fast.profiling.layers import Layer, find_layers

FEW, MANY = range(3), range(3, 200)
# Sums of float32 products (docs/profile.md); a gradient formed in half precision has the rounding of its entries, 2^-9.
RELATIVE = {torch.float32: 2e-5, torch.float64: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11 + 2e-5}


def layer_of(module: nn.Module) -> Layer:
    (layer,) = find_layers({"layer": module})
    return layer


def expanded(chance: random.Random, sizes: list[int], dtype: torch.dtype) -> Tensor:
    """Of stride 0 in every dimension but one or two, as the gradient of a sum or a mean is."""
    kept = [size if chance.random() < 0.5 else min(size, 1) for size in sizes]
    return view(chance, kept, dtype=dtype).expand(sizes)


def dense(chance: random.Random, sizes: list[int], dtype: torch.dtype) -> Tensor:
    return view(chance, sizes, dtype=dtype).contiguous()


MEMORY: dict[str, Callable[[random.Random, list[int], torch.dtype], Tensor]] = {
    "dense": dense,
    "permuted, stepped and offset": lambda chance, sizes, dtype: view(chance, sizes, dtype=dtype),
    "expanded": expanded,
}


# --- linear layers ----------------------------------------------------------------------------------------------------


def linear_layer(chance: random.Random, kind: str, inputs: int, outputs: int, dtype: torch.dtype) -> nn.Module:
    module = nn.Linear(inputs, outputs) if kind == "linear" else Conv1D(outputs, inputs)
    module.weight = nn.Parameter(view(chance, list(module.weight.shape), dtype=dtype))
    return module


def gradient(module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    """dW in float64, as the rule has it: with the input in the dtype of the gradient, as autocast's is."""
    dw = torch.einsum("to,ti->oi", g.double().reshape(-1, g.shape[-1]), x.to(g.dtype).double().reshape(-1, x.shape[-1]))
    return dw if isinstance(module, nn.Linear) else dw.t()


def leading_sizes(chance: random.Random) -> list[int]:
    """None, none of a row, one row, several dimensions, or more rows than are turned to float64 at once."""
    return chance.choice(([], [0], [1], [chance.randint(2, 5)] * chance.randint(1, 3), [chance.randint(65, 150)]))


def check_linear(chance: random.Random, kind: str, memory: str, dtype: torch.dtype) -> None:
    inputs, outputs, leading = chance.randint(1, 30), chance.randint(1, 30), leading_sizes(chance)
    module = linear_layer(chance, kind, inputs, outputs, dtype)
    x, g = (MEMORY[memory](chance, [*leading, size], dtype) for size in (inputs, outputs))
    if chance.random() < 0.2:
        x = x.float()
    dw, w = gradient(module, x, g), module.weight.detach().double()
    magnitude = gradient(module, x.abs(), g.abs())  # of the terms of each entry, which may cancel
    rel = RELATIVE[dtype]

    formed = layer_rules.linear_gradient(module, x, g)
    assert formed.dtype == dtype and formed.shape == w.shape
    assert ((formed.double() - dw).abs() <= rel * magnitude).all()

    collector = Collector("auto")
    later = layer_rules.linear_gradient_moments(collector, module, x, g)
    collector.fetch()
    found = later()
    of_one = magnitude.norm().item()
    assert found.gradient.count == w.numel() and found.gradient.nonfinite == found.weight_nonfinite == 0
    assert found.gradient.norm == pytest.approx(dw.norm().item(), abs=rel * of_one)
    assert found.gradient.mean == pytest.approx(dw.mean().item(), abs=rel * magnitude.mean().item())
    assert found.gradient.abs_mean == pytest.approx(dw.abs().mean().item(), abs=rel * magnitude.mean().item())
    of_product = (w * magnitude).abs().sum().item()
    assert found.product_sum == pytest.approx((w * dw).sum().item(), abs=rel * of_product)
    assert found.product_abs_sum == pytest.approx((w * dw).abs().sum().item(), abs=rel * of_product)
    assert found.weight_std == pytest.approx(w.std(correction=0).item(), rel=1e-6, abs=1e-12)

    if x.dtype == g.dtype:  # the observer forms tiles of any others, and of rounded ones that need the product
        product = dtype.itemsize >= 4
        later = layer_rules.linear_gradient_moments_without_tiles(collector, module, x, g, product)
        collector.fetch()
        closed = later()
        assert closed.gradient.norm**2 == pytest.approx(dw.square().sum().item(), abs=1e-12 * of_one**2)
        assert closed.gradient.mean == pytest.approx(dw.mean().item(), abs=1e-12 * magnitude.mean().item())
        assert math.isnan(closed.gradient.abs_mean) and math.isnan(closed.product_abs_sum)
        if product:
            assert closed.product_sum == pytest.approx((w * dw).sum().item(), abs=rel * of_product)
        else:
            assert math.isnan(closed.product_sum)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("kind", ["linear", "transformers' Conv1D"])
def test_rules_of_linear_layers(kind: str, memory: str, dtype: torch.dtype) -> None:
    for seed in FEW:
        check_linear(random.Random(seed), kind, memory, dtype)


@pytest.mark.slow
def test_rules_of_many_linear_layers() -> None:
    for seed in MANY:
        chance = random.Random(seed)
        for kind in ("linear", "transformers' Conv1D"):
            check_linear(chance, kind, chance.choice(list(MEMORY)), chance.choice(DTYPES))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["input", "gradient", "weight"])
@pytest.mark.parametrize("kind", ["linear", "transformers' Conv1D"])
def test_entries_of_linear_layers_that_are_not_finite(kind: str, where: str, value: float) -> None:
    """An entry of X spoils dW for one input, one of G for one output; what it does not enter is as it was."""
    chance = random.Random(1)
    module = linear_layer(chance, kind, 5, 7, torch.float32)
    x, g = view(chance, [9, 5], dtype=torch.float32), view(chance, [9, 7], dtype=torch.float32)
    with torch.no_grad():
        {"input": x, "gradient": g, "weight": module.weight}[where][1, 2] = value
    collector = Collector("auto")
    for product in (True, False):
        tiles = layer_rules.linear_gradient_moments(collector, module, x, g)()
        closed = layer_rules.linear_gradient_moments_without_tiles(collector, module, x, g, product)()
        for found in (tiles, closed):
            assert found.weight_nonfinite == (where == "weight")
            assert bool(found.gradient.nonfinite) == (where != "weight")
            assert math.isnan(found.product_sum) and math.isnan(found.product_abs_sum)
            assert math.isnan(found.gradient.norm) == math.isnan(found.gradient.mean) == (where != "weight")
            assert math.isnan(found.weight_mean) == (where == "weight")
        assert tiles.gradient.nonfinite == {"input": 7, "gradient": 5, "weight": 0}[where]


# --- weights whose gradient exists ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", FEW)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_sparse_gradient_that_come_twice_add_up(dtype: torch.dtype, seed: int) -> None:
    chance = random.Random(seed)
    rows, width = chance.randint(2, 12), chance.randint(1, 9)
    values = view(chance, [20, width], dtype=dtype).contiguous()
    indices = torch.tensor([[chance.randrange(rows) for _ in range(20)]])
    weight = view(chance, [rows, width], dtype=dtype)
    dw = torch.sparse_coo_tensor(indices, values, (rows, width), check_invariants=True)
    found = layer_rules.weight_gradient_moments(Collector("auto"), dw, weight)()
    expected = torch.zeros(rows, width, dtype=torch.float64).index_add_(0, indices[0], values.double())
    magnitude = torch.zeros(rows, width, dtype=torch.float64).index_add_(0, indices[0], values.double().abs())
    # Torch rounds each of at most 20 sums to the dtype.
    bound = 20 * torch.finfo(dtype).eps + 1e-6
    assert found.gradient.norm == pytest.approx(expected.norm().item(), abs=bound * magnitude.norm().item())
    assert found.gradient.count == rows * width
    product, size = (weight.double() * t for t in (expected, magnitude))
    assert found.product_abs_sum == pytest.approx(product.abs().sum().item(), abs=bound * size.abs().sum().item())


# --- outputs ----------------------------------------------------------------------------------------------------------


class OwnConvolution(nn.Module):
    """Somebody's own, whose only mark is the shape of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 2, 2))


OUTPUTS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "linear, one sample": (lambda: nn.Linear(3, 4), "k"),
    "linear": (lambda: nn.Linear(3, 4), "nk"),
    "linear, tokens": (lambda: nn.Linear(3, 4), "npk"),
    "linear, tokens of images": (lambda: nn.Linear(3, 4), "npqk"),
    "linear, five dimensions": (lambda: nn.Linear(3, 4), "npqrk"),
    "embedding": (lambda: nn.Embedding(9, 4), "npk"),
    "bilinear": (lambda: nn.Bilinear(3, 3, 4), "nk"),
    "conv1d": (lambda: nn.Conv1d(3, 4, 2), "nkp"),
    "conv1d, one sample": (lambda: nn.Conv1d(3, 4, 2), "kp"),
    "conv2d": (lambda: nn.Conv2d(3, 4, 2), "nkpq"),
    "conv2d, one sample": (lambda: nn.Conv2d(3, 4, 2), "kpq"),
    "conv3d": (lambda: nn.Conv3d(3, 4, 2), "nkpqr"),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(3, 4, 2), "nkpq"),
    "a convolution of somebody's own": (OwnConvolution, "nkpq"),
}


def check_outputs(chance: random.Random, kind: str, memory: str, dtype: torch.dtype) -> None:
    build, dimensions = OUTPUTS[kind]
    layer = layer_of(build())
    sizes = [4 if name == "k" else chance.choice((1, chance.randint(1, 7))) for name in dimensions]
    y, g = (MEMORY[memory](chance, sizes, dtype) for _ in range(2))
    if chance.random() < 0.3:
        g = g.to(torch.float32)  # as of a loss that is computed beside autocast
    own = g.to(y.dtype)
    s, size = (
        torch.einsum(f"{dimensions},{dimensions}->{'nk' if 'n' in dimensions else 'k'}", a, b)
        for a, b in ((y.double(), own.double()), (y.double().abs(), own.double().abs()))
    )
    s, size = s.reshape(-1, 4), size.reshape(-1, 4)
    collector = Collector("auto")
    products = layer_rules.output_products(collector, layer, y, g)
    assert products.dtype == torch.float64 and products.shape == s.shape
    assert ((products - s).abs() <= 1e-6 * size).all()
    for later in (
        layer_rules.products_of_one_use(collector, layer, y, g),
        layer_rules.squared_products(collector, products),
    ):
        collector.fetch()
        found = later()
        assert found.samples == len(s)
        assert found.fisher == pytest.approx(
            0.5 * s.square().mean(0).sum().item(), abs=2e-6 * size.square().sum().item()
        )


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("kind", OUTPUTS)
def test_products_of_outputs(kind: str, memory: str) -> None:
    for dtype in DTYPES:
        check_outputs(random.Random(str(dtype)), kind, memory, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OUTPUTS)
def test_products_of_many_outputs(kind: str) -> None:
    for seed in MANY:
        chance = random.Random(seed)
        check_outputs(chance, kind, chance.choice(list(MEMORY)), chance.choice(DTYPES))


@pytest.mark.parametrize("value", [value for value in SPECIALS if not math.isfinite(value)])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_that_are_not_finite_spoil_their_own_sample_and_channel(kind: str, value: float) -> None:
    build, dimensions = OUTPUTS[kind]
    layer, chance = layer_of(build()), random.Random(1)
    sizes = [4 if name == "k" else 3 for name in dimensions]
    y, g = (view(chance, sizes, dtype=torch.float32) for _ in range(2))
    place = {"n": 2, "k": 1}
    y[tuple(place.get(name, 0) for name in dimensions)] = value
    products = layer_rules.output_products(Collector("auto"), layer, y, g)
    finite = torch.ones_like(products, dtype=torch.bool)
    finite[-1, 1] = False
    assert torch.equal(products.isfinite(), finite)
    assert not math.isfinite(layer_rules.products_of_one_use(Collector("auto"), layer, y, g)().fisher)


@pytest.mark.parametrize("kind", [kind for kind, (_, dimensions) in OUTPUTS.items() if "n" in dimensions])
def test_outputs_without_samples(kind: str) -> None:
    build, dimensions = OUTPUTS[kind]
    y = torch.empty([{"n": 0, "k": 4}.get(name, 3) for name in dimensions])
    found = layer_rules.products_of_one_use(Collector("auto"), layer_of(build()), y, y)()
    assert (found.samples, found.total, found.fisher) == (0, 0.0, 0.0)


@pytest.mark.parametrize("seed", FEW)
@pytest.mark.parametrize("trailing", [[4], [2, 4]])
def test_products_of_samples_of_different_lengths(trailing: list[int], seed: int) -> None:
    chance = random.Random(seed)
    lengths = [chance.randint(1, 6) for _ in range(5)]
    lengths[chance.randrange(5)] = 0
    samples = [[torch.randn(length, *trailing) for length in lengths] for _ in range(2)]
    y, g = (torch.nested.nested_tensor(parts, layout=torch.jagged) for parts in samples)
    found = layer_rules.output_products(Collector("auto"), layer_of(nn.Linear(3, 4)), y, g)
    expected = [(a.double() * b.double()).flatten(0, -2).sum(0) for a, b in zip(*samples, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected))
    assert torch.equal(layer_rules.jagged_rows(y)[0], torch.cat(samples[0]))


def strided_nested() -> Tensor:
    return torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)])


def jagged_with_gaps() -> Tensor:
    values = torch.randn(6, 4)
    return torch.nested.narrow(values.repeat(2, 1, 1), 1, torch.tensor([0, 1]), torch.tensor([2, 3]), torch.jagged)


def jagged_in_its_last_dimension() -> Tensor:
    parts = [torch.randn(2, 4), torch.randn(3, 4)]
    return torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("nested", [strided_nested, jagged_with_gaps, jagged_in_its_last_dimension])
def test_nested_tensors_of_another_kind_are_refused(nested: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match="pad the batch"):
        layer_rules.jagged_rows(nested())


# --- what comes again -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_output_comes_again_from_its_input(dtype: torch.dtype, memory: str) -> None:
    chance = random.Random(1)
    for module, sizes in ((nn.Linear(3, 4), [2, 5, 3]), (nn.Conv2d(3, 4, 2, stride=2), [2, 3, 5, 6])):
        module = module.to(dtype)
        assert layer_rules.has_output_rule(layer_of(module))
        x = MEMORY[memory](chance, sizes, dtype)
        again = layer_rules.output_again(module, x, dtype)
        assert torch.equal(again, module(x)) and not again.requires_grad
        if dtype == torch.float32:
            with torch.autocast("cpu", torch.bfloat16):
                rounded = module(x)
            assert torch.equal(layer_rules.output_again(module, x, torch.bfloat16), rounded)


@pytest.mark.parametrize("seed", FEW)
def test_rows_of_any_view(seed: int) -> None:
    chance = random.Random(seed)
    for sizes in ([3], [2, 3], [2, 0, 3], [4, 0], [2, 3, 4, 5]):
        x = view(chance, sizes)
        found = layer_rules.rows(x)
        assert found.shape == (math.prod(sizes[:-1]), sizes[-1])
        assert torch.equal(found.flatten(), x.flatten())


def test_kernels_and_rules_take_the_same_dtypes() -> None:
    assert set(DTYPES) == set(RELATIVE) == set(kernels.DTYPES)
