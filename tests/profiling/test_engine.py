"""What the taps ask of torch's autograd engine, and that no more of a pass counts than what belongs to it."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from untouched import changes, state_of

import zest_fast
from zest_fast.profiling import engine, layer_rules


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))


def batch(samples: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, 8, generator=generator), torch.randint(4, (samples,), generator=generator)


def gradient_norms(model: nn.Module, closure: Callable[[], Tensor]) -> dict[str, float]:
    names = [name for name, p in model.named_parameters() if p.dim() > 1]
    gradients = torch.autograd.grad(closure(), [model.get_parameter(name) for name in names])
    return {name.removesuffix(".weight"): g.norm().item() for name, g in zip(names, gradients, strict=True)}


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of layers whose gradient was reduced tile by tile."""
    formed: list[str] = []
    original = layer_rules.linear_gradient_moments
    monkeypatch.setattr(layer_rules, "linear_gradient_moments", lambda *a: formed.append("tile") or original(*a))
    return formed


def test_a_mode_of_torch_keeps_the_tiles_and_one_of_the_user_does_not(tiles: list[str]) -> None:
    class Own(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    model, (x, target) = mlp(), batch()
    with torch.device("cpu"):
        zest_fast.profile(model, (x, target))
    assert len(tiles) == 3
    with Own():
        zest_fast.profile(model, (x, target))
    assert len(tiles) == 3


def test_the_engine_is_watched_only_during_a_pass() -> None:
    before = torch.autograd._engine_run_backward
    seen = []
    model, data = mlp(), batch()
    model[1].register_forward_hook(lambda *_: seen.append(torch.autograd._engine_run_backward is before))
    zest_fast.profile(model, data)
    with pytest.raises(ZeroDivisionError):
        zest_fast.profile(model, closure=lambda: model(data[0]).sum() / (1 // 0))
    assert seen and not any(seen)
    assert torch.autograd._engine_run_backward is before
    assert not engine.Watching._spectators


def test_a_pass_leaves_nothing_behind_that_waits_for_the_garbage_collector() -> None:
    model, data = mlp(), batch()
    outputs = []
    model[2].register_forward_hook(lambda module, args, y: outputs.append(weakref.ref(y)))
    gc.disable()
    try:
        zest_fast.profile(model, data)
        unused = mlp()
        zest_fast.profile(unused, closure=lambda: unused(data[0]).sum() + 0 * unused(data[0]).detach().sum())
        assert [y() for y in outputs] == [None]
    finally:
        gc.enable()


def test_a_layer_that_is_called_on_several_threads_at_once() -> None:
    model, (x, target) = mlp(), batch(32)
    inputs = x.chunk(8)
    whole = zest_fast.profile(
        model, closure=lambda: F.cross_entropy(torch.cat([model(part) for part in inputs]), target)
    )
    with ThreadPoolExecutor(4) as pool:

        def closure() -> Tensor:
            parts = [pool.submit(model, part) for part in inputs[:6]]
            own = [model(part) for part in inputs[6:]]
            return F.cross_entropy(torch.cat([part.result() for part in parts] + own), target)

        for _ in range(20):
            profile = zest_fast.profile(model, closure=closure)
            assert profile.names == whole.names
            for name in whole.names:
                assert dict(profile[name]) == pytest.approx(dict(whole[name]), rel=2e-5, abs=1e-9)
                assert profile.info[name]["uses"] == 8


@pytest.mark.parametrize("grad", [False, True])
def test_another_thread_that_runs_the_model_meanwhile_changes_nothing(grad: bool) -> None:
    model, data = mlp(), batch()
    alone = zest_fast.profile(model, data)
    other, stop = torch.randn(64, 8), threading.Event()
    results = []

    def run() -> None:
        with torch.set_grad_enabled(grad):
            while not stop.is_set():
                results.append(float(model(other).sum()))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        found = [zest_fast.profile(model, data) for _ in range(40)]
    finally:
        stop.set()
        thread.join()
    assert len(results) > 10
    for profile in found:
        assert profile.names == alone.names
        assert profile.to_pandas().equals(alone.to_pandas())


def test_another_thread_that_trains_the_model_meanwhile_is_refused() -> None:
    model, (x, target) = mlp(), batch()

    def disturbed() -> Tensor:
        thread = threading.Thread(target=lambda: model(x).sum().backward())
        thread.start()
        thread.join()
        return F.cross_entropy(model(x), target)

    with pytest.raises(RuntimeError, match="another thread ran a backward pass over the model"):
        zest_fast.profile(model, closure=disturbed)


def test_another_thread_that_trains_another_model_is_none_of_ours() -> None:
    model, data, other = mlp(), batch(), mlp()
    alone = zest_fast.profile(model, data)

    def closure() -> Tensor:
        thread = threading.Thread(target=lambda: other(data[0]).sum().backward())
        thread.start()
        thread.join()
        return F.cross_entropy(model(data[0]), data[1])

    assert zest_fast.profile(model, closure=closure).to_pandas().equals(alone.to_pandas())
    assert other[0].weight.grad is not None


class TwoProducts(nn.Module):
    """Whatever hides an output gradient from its layer: fisher alone must not lose rows to it."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(3, 4, 2)
        self.mix = nn.Bilinear(4, 4, 5)
        self.table = nn.Linear(5, 6)
        self.unused = nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).transpose(1, 2)
        y = self.mix(y, y).relu_()
        self.unused(y)
        return F.linear(y, self.table.weight).flatten(1)


def test_fisher_alone_has_the_rows_and_reasons_of_the_whole_pass() -> None:
    torch.manual_seed(0)
    model, x = TwoProducts(), torch.randn(5, 3, 4)
    whole = zest_fast.profile(model, closure=lambda: model(x).square().mean())
    alone = zest_fast.profile(model, closure=lambda: model(x).square().mean(), metrics=["fisher"])
    assert alone.names == whole.names == ["up", "mix", "table.weight"] or alone.names == whole.names
    assert alone.uncovered == whole.uncovered
    for name in whole.names:
        assert alone[name]["fisher"] == pytest.approx(whole[name]["fisher"], rel=1e-5, nan_ok=True)
        assert alone.info[name]["note"].replace("act and fisher", "fisher") == whole.info[name]["note"].replace(
            "act and fisher", "fisher"
        )


class Reversed(torch.autograd.Function):
    """A block that keeps nothing and runs its layers again in backward, as reversible networks do."""

    @staticmethod
    def forward(ctx, x: Tensor, block: nn.Module) -> Tensor:
        ctx.block = block
        ctx.save_for_backward(x)
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, None]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            torch.autograd.backward(ctx.block(x), g)
        return x.grad, None


def test_layers_inside_a_function_of_somebody_s_have_rows_for_activations_alone() -> None:
    model = nn.ModuleDict({"block": mlp()[:3], "left": nn.Linear(16, 3), "out": nn.Linear(16, 2)})
    x = torch.randn(5, 8)

    def closure() -> Tensor:
        y = Reversed.apply(x.requires_grad_(), model["block"])
        model["left"](y.detach())
        return model["out"](y).square().mean()

    whole = zest_fast.profile(model, closure=closure)
    forward = zest_fast.profile(model, closure=closure, metrics=["act_std"])
    assert forward.names == whole.names == ["block.0", "block.2", "out"]
    assert [forward[n]["act_std"] for n in forward.names] == [whole[n]["act_std"] for n in whole.names]
    assert forward.uncovered == whole.uncovered


def test_forward_metrics_of_a_loss_that_takes_gradients_itself() -> None:
    model, (x, _) = mlp(), batch()

    def closure() -> Tensor:
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(model(leaf).sum(), leaf, create_graph=True)
        return g.square().mean() + model(x).square().mean()

    whole, forward = (zest_fast.profile(model, closure=closure, metrics=m) for m in (None, ["act_mean", "act_std"]))
    assert forward.names == whole.names
    assert [forward[n]["act_std"] for n in forward.names] == [whole[n]["act_std"] for n in whole.names]


def test_layers_that_are_made_during_the_pass_are_named() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "second"):
                self.second = nn.Linear(5, 4)
            return self.second(self.first(x))

    model, data = Lazy(), batch()
    profile = zest_fast.profile(model, data)
    assert profile.names == ["first"]
    assert "made during the pass" in profile.uncovered["second.weight"]
    assert not hasattr(model, "second")
    model(data[0])
    assert zest_fast.profile(model, data).names == ["first", "second"]


class Decayed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = mlp(), nn.Linear(4, 2)

    def loss(self, x: Tensor) -> Tensor:
        decay = sum(p.square().sum() for p in self.parameters() if p.requires_grad)
        return self.head(self.body(x)).square().mean() + 0.1 * decay


def test_a_loss_that_looks_at_requires_grad_is_exact_or_refused() -> None:
    torch.manual_seed(0)
    model, (x, _) = Decayed(), batch()
    profile = zest_fast.profile(model, closure=lambda: model.loss(x))
    assert profile.loss == pytest.approx(model.loss(x).item(), rel=1e-6)
    expected = gradient_norms(model, lambda: model.loss(x))
    assert {name: profile[name]["grad_norm"] for name in profile.names} == pytest.approx(expected, rel=1e-5)
    model.body[0].weight.requires_grad_(False)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"depends on requires_grad.*body\.0.*layers="):
        zest_fast.profile(model, closure=lambda: model.loss(x))
    assert changes(before, state_of(model)) == []
    some = zest_fast.profile(model, closure=lambda: model.loss(x), layers=["body.2", "body.4", "head"])
    assert some.loss == pytest.approx(model.loss(x).item(), rel=1e-6)


def test_weights_that_the_user_freezes_within_the_loss_get_no_gradient() -> None:
    model, (x, _) = mlp(), batch()

    def closure() -> Tensor:
        model[2].weight.requires_grad_(False)
        try:
            return model(x).square().mean()
        finally:
            model[2].weight.requires_grad_(True)

    profile = zest_fast.profile(model, closure=closure)
    assert profile.names == ["0", "4"]
    assert "no gradient reached it" in profile.uncovered["2.weight"]
