"""Tensors that are not what their address says: each is read right or refused by name, and no process dies of one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from oracle import measure
from small_models import assert_same, snapshot
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

import zest_fast
from zest_fast import kernels
from zest_fast.kernels.cpu import interval_bits, masked_into, silu_gated_backward

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors", "ignore:The PyTorch API of nested")


class Wrapped(Tensor):
    """A tensor around another one, as quantised weights of torchao or trackers are: no memory of its own."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), dtype=inner.dtype, device=inner.device, requires_grad=False
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(Wrapped, lambda x: x.inner, (args, kwargs or {}))
        return tree_map_only(Tensor, Wrapped, func(*args, **kwargs))


class Unwrap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.inner.clone()

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return Wrapped(g)


def freed(x: Tensor) -> Tensor:
    x.untyped_storage().resize_(0)
    return x


def shrunk(x: Tensor) -> Tensor:
    x.untyped_storage().resize_(8)
    return x


def fake(x: Tensor) -> Tensor:
    with FakeTensorMode() as mode:
        return mode.from_tensor(x)


def values() -> Tensor:
    return torch.arange(24.0).view(6, 4).clone()


WITHOUT_MEMORY: dict[str, tuple[Callable[[], Tensor], str]] = {
    "freed": (lambda: freed(values()), "storage was freed"),
    "a view of what was freed": (lambda: freed(values()[2:, 1:]), "storage was freed"),
    "shrunk": (lambda: shrunk(values()), "freed or shrunk"),
    "fake": (lambda: fake(values()), "FakeTensor"),
    "a wrapper": (lambda: Wrapped(values()), "Wrapped that wraps other tensors"),
    "functional": (lambda: torch._to_functional_tensor(values()), "no memory of its own"),
    "meta": (lambda: values().to("meta"), "meta device"),
    "jagged": (lambda: torch.nested.nested_tensor([values()], layout=torch.jagged), "nested tensor"),
    "nested": (lambda: torch.nested.nested_tensor([values()]), "nested tensor"),
}


@pytest.mark.parametrize("case", WITHOUT_MEMORY)
def test_public_kernels_refuse_what_has_no_memory(case: str) -> None:
    make, message = WITHOUT_MEMORY[case]
    with pytest.raises(ValueError, match=rf"tensors\[1\] is .*{message}"):
        kernels.moments([values(), make()])
    collector = kernels.Collector("cpu")
    with pytest.raises(ValueError, match=message):
        collector.moments([make()])
    if "nested" in message:
        return
    whole, bad = torch.ones(make().shape), make()
    for name, call in {
        "dw": lambda: kernels.gradient_moments(bad, whole),
        "w": lambda: kernels.gradient_moments(whole, bad),
        "x": lambda: kernels.linear_gradient_moments(bad, whole, torch.ones(whole.shape[1], whole.shape[1])),
        "g": lambda: kernels.channel_products(whole, bad),
        "y": lambda: kernels.squared_channel_products(bad, whole),
    }.items():
        with pytest.raises(ValueError, match=rf"^{name} is .*{message}"):
            call()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_transforms_of_torch_func_are_refused_by_name(backend: str) -> None:
    def inside(x: Tensor) -> Tensor:
        kernels.moments([x], backend=backend)
        return x.sum()

    for transform in (torch.func.vmap, torch.func.grad):
        with pytest.raises(ValueError, match=r"tensors\[0\] is inside of a transform of torch\.func"):
            transform(inside)(torch.ones(3) if transform is torch.func.grad else torch.ones(3, 4))


@pytest.mark.parametrize("shape", [(5, 6), (5, 4, 6)])
def test_negated_views_have_their_sign(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    negated = torch.randn(*shape, dtype=torch.complex64).conj().imag
    plain, other = negated.clone(), torch.randn(*shape)
    assert negated.is_neg() and not plain.is_neg()
    assert kernels.moments([negated]) == kernels.moments([plain])
    assert kernels.gradient_moments(negated, other) == kernels.gradient_moments(plain, other)
    assert kernels.gradient_moments(other, negated) == kernels.gradient_moments(other, plain)
    assert torch.equal(kernels.channel_products(negated, other), kernels.channel_products(plain, other))
    if len(shape) == 2:
        w = torch.randn(6, 6)
        found = kernels.linear_gradient_moments(negated, other, w)
        assert found.product_sum == pytest.approx(kernels.linear_gradient_moments(plain, other, w).product_sum)


class Complex(nn.Module):
    """The gradient of ``imaginary`` reaches it as a negated view, and so does the output of ``Negated``."""

    def __init__(self) -> None:
        super().__init__()
        self.real, self.imaginary, self.negated = nn.Linear(4, 6), nn.Linear(4, 6), Negated()

    def forward(self, x: Tensor) -> Tensor:
        z = torch.complex(self.real(x), self.imaginary(x))
        return torch.view_as_real(z.conj().resolve_conj() * z * z).flatten(1) + self.negated(x).mean()


class Negated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.complex(x[:, :3], x @ self.weight.t()).conj().imag


def test_a_profile_of_negated_views_agrees_with_autograd() -> None:
    torch.manual_seed(0)
    model, x = Complex(), torch.randn(5, 4)
    spec = copy.deepcopy(model).double()
    expected = measure(spec, lambda: spec(x.double()).square().mean()).values
    found = zest_fast.profile(model, closure=lambda: model(x).square().mean())
    for layer, row in expected.items():
        assert found[layer] == pytest.approx(row, rel=1e-4, abs=1e-6, nan_ok=True)


def test_lean_kernels_leave_such_tensors_to_torch() -> None:
    negated = torch.randn(16, 4, dtype=torch.complex64).conj().imag.clone().contiguous()
    negated = torch._neg_view(negated)
    g, bits = torch.ones(64), torch.full((8,), 255, dtype=torch.uint8)
    assert interval_bits(negated.reshape(-1), 0.0, 1.0) is None
    assert not masked_into(torch._neg_view(g), bits, torch.empty(64))
    assert silu_gated_backward(negated, negated, negated) is None
    assert interval_bits(freed(torch.ones(64)), 0.0, 1.0) is None
    assert not masked_into(freed(torch.ones(64)), bits, torch.empty(64))
    assert silu_gated_backward(torch.ones(4, 4), freed(torch.ones(4, 4)), torch.ones(4, 4)) is None


# --- profiles ---------------------------------------------------------------------------------------------------------


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 4), torch.randint(3, (5,))


@pytest.fixture
def one_process() -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["fully_shard", "tensor parallel"])
def test_sharded_parameters_are_profiled_on_one_process(kind: str, one_process: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (1,))
    torch.manual_seed(0)
    model, (x, y) = mlp(), batch()
    expected = zest_fast.profile(model, (x, y))
    if kind == "fully_shard":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=mesh)
    else:
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        parallelize_module(model, mesh, {"0": ColwiseParallel()})
    found = zest_fast.profile(model, (x, y))
    assert found.values == pytest.approx(expected.values, rel=1e-5, abs=1e-9)
    assert all(p.grad is None for p in model.parameters())


def test_dtensors_are_refused_by_the_public_kernels(one_process: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    x = distribute_tensor(values(), init_device_mesh("cpu", (1,)), [Replicate()])
    with pytest.raises(ValueError, match=r"tensors\[0\] is a DTensor.*full_tensor"):
        kernels.moments([x])


def test_a_parameter_whose_storage_was_freed_is_refused_by_name() -> None:
    model = mlp()
    freed(model[2].weight.data)
    with pytest.raises(ValueError, match=r"parameter '2\.weight' is .*freed"):
        zest_fast.profile(model, batch())


def test_a_weight_that_is_a_wrapper_is_uncovered_unless_named() -> None:
    model = mlp()
    model[0].weight = nn.Parameter(Wrapped(model[0].weight.detach()), requires_grad=False)
    model[0].forward = lambda x: nn.functional.linear(x, model[0].weight.inner, model[0].bias)
    found = zest_fast.profile(model, batch())
    assert found.names == ["2"] and "Wrapped that wraps other tensors" in found.uncovered["0.weight"]
    with pytest.raises(ValueError, match=r"layer '0' cannot be profiled: its weight is a Wrapped"):
        zest_fast.profile(model, batch(), layers=["0"])


@pytest.mark.parametrize("metrics", [None, ["fisher"], ["grad_norm"], ["snip"], ["plain"], ["act_std"]])
def test_activations_that_are_wrappers_are_refused_by_layer(metrics: list[str] | None) -> None:
    model, (x, y) = mlp(), batch()
    before = snapshot(model)
    try:
        found = zest_fast.profile(
            model, closure=lambda: nn.functional.cross_entropy(Unwrap.apply(model(Wrapped(x))), y), metrics=metrics
        )
    except ValueError as error:
        assert "layer '" in str(error) and "Wrapped that wraps other tensors" in str(error)
    else:  # where nothing has to be read of them
        plain = zest_fast.profile(model, (x, y), metrics=metrics)
        assert found.values == pytest.approx(plain.values, rel=1e-5)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("metrics", [None, ["fisher"], ["grad_norm", "plain"], ["act_abs_std"]])
def test_jagged_batches_agree_with_one_sample_at_a_time(metrics: list[str] | None) -> None:
    model = mlp().double()
    samples = [torch.randn(n, 4, dtype=torch.float64) for n in (2, 5, 1)]
    jagged = torch.nested.nested_tensor(samples, layout=torch.jagged)
    found = zest_fast.profile(model, closure=lambda: model(jagged).values().square().mean(), metrics=metrics)
    outputs: dict[str, list[Tensor]] = {"0": [], "2": []}
    for x in samples:
        outputs["0"].append(model[0](x))
        outputs["2"].append(model[2](torch.tanh(outputs["0"][-1])))
    for y in outputs["0"] + outputs["2"]:
        y.retain_grad()
    torch.cat(outputs["2"]).square().mean().backward()
    for name, ys in outputs.items():
        w, dw, rows = model[int(name)].weight, model[int(name)].weight.grad, torch.cat(ys)
        s = torch.stack([(y * y.grad).sum(0) for y in ys])
        expected = {
            "fisher": 0.5 * s.square().mean(0).sum(),
            "grad_norm": dw.norm(),
            "plain": (w * dw).mean(),
            "snip": (w * dw).abs().sum(),
            "act_abs_std": rows.abs().std(correction=0),
        }
        for metric, value in expected.items():
            if metric in found.metrics:
                assert found[name][metric] == pytest.approx(value.item(), rel=1e-9)


def test_nested_batches_of_another_kind_are_refused_by_layer() -> None:
    model = mlp()
    nested = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)])
    with pytest.raises(ValueError, match=r"layer '0': its output is a nested tensor .*jagged.*pad"):
        zest_fast.profile(model, (nested, nested), loss_fn=lambda o, _: o.to_padded_tensor(0.0).square().mean())


class Widths(nn.Module):
    """Layers without inputs or outputs, and a call without samples."""

    def __init__(self) -> None:
        super().__init__()
        self.to_nothing, self.from_nothing, self.between = nn.Linear(4, 0), nn.Linear(0, 4), nn.Linear(4, 6)
        self.convolution, self.last = nn.Conv2d(1, 2, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.from_nothing(self.to_nothing(x))
        nothing = self.between(h[:0])
        empty = self.convolution(h[:0].view(0, 1, 2, 2)).sum() + self.convolution(h.view(-1, 1, 2, 2)).mean()
        return self.last(torch.cat([nothing, self.between(h)])) + empty


@pytest.mark.parametrize("metrics", [None, ["fisher"], ["grad_norm", "plain"]])
def test_layers_and_calls_without_entries_agree_with_autograd(metrics: list[str] | None) -> None:
    torch.manual_seed(0)
    model, (x, y) = Widths(), batch()
    spec = copy.deepcopy(model).double()
    expected = measure(spec, lambda: nn.functional.cross_entropy(spec(x.double()), y)).values
    found = zest_fast.profile(model, (x, y), metrics=metrics)
    assert set(found) == set(expected)
    for layer, row in expected.items():
        # a mean of nothing is NaN in torch, and so is it here
        assert found[layer] == pytest.approx({m: row[m] for m in found.metrics}, rel=1e-4, abs=1e-7, nan_ok=True)


def test_a_model_of_embeddings_alone_asks_for_their_names() -> None:
    model = nn.Sequential(nn.Embedding(7, 3))
    tokens = torch.randint(7, (5,)), torch.randint(3, (5,))
    with pytest.raises(ValueError, match=r"no layers but embeddings.*layers=\['0'\]"):
        zest_fast.profile(model, tokens)
    assert zest_fast.profile(model, tokens, layers=["0"]).names == ["0"]


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e7])
def test_plain_keeps_its_digits_under_a_large_bias(scale: float) -> None:
    """The loss is linear, so that float32's rounding of Y reaches no gradient. The unit is that of the oracle."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24))
    nn.init.constant_(model[0].bias, scale)
    x, weights = torch.randn(100, 32), torch.randn(100, 24)
    found = zest_fast.profile(model, (x, weights), loss_fn=lambda o, w: (o * w).mean(), metrics=["plain"])
    spec = copy.deepcopy(model).double()
    (spec(x.double()) * weights.double()).mean().backward()
    products = spec[0].weight * spec[0].weight.grad
    assert abs(found["0"]["plain"] - float(products.mean())) <= 1e-6 * float(products.abs().mean())
