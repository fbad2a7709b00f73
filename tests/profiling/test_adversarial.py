"""Traps that are no model: closures, patches, interruptions, threads. Each is exact, or refused by name."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import random
import re
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from model_zoo import ZOO, build
from oracle import METRICS, REACHABLE, TOLERANCE, Measurement, compare, measure, relative_error
from test_metrics_against_autograd import as_table, plain_autograd, specification
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from untouched import changes, state_of

import zest_fast

Loss = Callable[[nn.Module, Tensor], Tensor]
PACKAGE = str(Path(zest_fast.__file__).parent)


def data() -> Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(7))


def linears() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))


class Reused(nn.Module):
    """One weight in two ways, which a first pass cannot know: it is run again."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.linear(torch.tanh(self.inner(x)), self.inner.weight.t()))


def reused() -> Reused:
    torch.manual_seed(0)
    return Reused()


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def truth(make: Callable[[], nn.Module], loss: Loss) -> tuple[Measurement, Measurement]:
    """The specification and what plain autograd in float32 makes of it."""
    double, single = make().double(), make()
    return measure(double, lambda: loss(double, data().double())), measure(single, lambda: loss(single, data()))


def require_exact(profile: zest_fast.LayerProfile, make: Callable[[], nn.Module], loss: Loss) -> None:
    spec, own = truth(make, loss)
    assert compare(as_table(profile), spec, own).misses == []
    assert profile.loss == pytest.approx(own.loss, rel=TOLERANCE)


def profile_or_refusal(model: nn.Module, closure: Callable[[], Tensor], said: str) -> zest_fast.LayerProfile | None:
    """The profile, or None where it was refused with a message of the library in which `said` is found."""
    try:
        return zest_fast.profile(model, closure=closure)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        assert re.search(said, str(error)), error
        last = error.__traceback__
        while last.tb_next is not None:
            last = last.tb_next
        assert last.tb_frame.f_code.co_filename.startswith(PACKAGE)
        return None


# Patches that are there before the profile


@pytest.fixture
def scaled_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    original = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: original(self, 1.5 * x))


@pytest.mark.parametrize("metrics", [None, ["plain"], ["grad_norm"], ["fisher"]])
def test_linear_patched_for_good(scaled_linear: None, metrics: list[str] | None) -> None:
    model = linears()
    profile = zest_fast.profile(model, closure=lambda: squares(model, data()), metrics=metrics)
    spec, _ = truth(linears, squares)
    for row in profile.names:
        for metric in profile.metrics:
            cell = (float(profile[row][metric]), spec.values[row], spec.numel[row])
            assert relative_error(metric, *cell) < TOLERANCE, (row, metric)


@pytest.mark.parametrize("name", ["linear", "conv1d"])
def test_functions_patched_for_good(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    original = getattr(F, name)
    monkeypatch.setattr(F, name, lambda x, w, *rest: original(x, w.sin(), *rest))
    for make in (linears, convolutions):
        model = make()
        require_exact(zest_fast.profile(model, closure=lambda m=model: squares(m, data())), make, squares)


def test_a_function_mode_around_the_profile() -> None:
    class Scaled(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            return 1.1 * result if function is F.linear else result

    model = linears()
    with Scaled():
        profile = zest_fast.profile(model, closure=lambda: squares(model, data()))
        spec, own = truth(linears, squares)
    assert compare(as_table(profile), spec, own).misses == []


# Closures


@pytest.mark.parametrize("make", [linears, convolutions, reused])
@pytest.mark.parametrize("retain", [False, True], ids=["freed", "retained"])
def test_closure_as_an_optimizer_wants_it(make: Callable[[], nn.Module], retain: bool) -> None:
    """torch.optim.LBFGS calls closures that clear gradients, run backward and return the loss."""
    model = make()

    def closure() -> Tensor:
        model.zero_grad()
        loss = squares(model, data())
        loss.backward(retain_graph=retain)
        return loss

    profile = profile_or_refusal(model, closure, "backward")
    if profile is not None:
        require_exact(profile, make, squares)


@pytest.mark.parametrize("make", [linears, convolutions, reused])
def test_gradients_accumulated_within_the_closure_are_not_those_of_the_loss(make: Callable[[], nn.Module]) -> None:
    model = make()

    def closure() -> Tensor:
        (3 * squares(model, 2 * data())).backward()
        return squares(model, data())

    profile = profile_or_refusal(model, closure, "backward")
    if profile is not None:
        require_exact(profile, make, lambda model, x: squares(model, 2 * x).detach() * 0 + squares(model, x))


def test_closure_that_trains_leaves_the_model_as_it_was() -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        squares(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()
        return squares(model, x)

    model = linears()
    before = state_of(model)
    profile = profile_or_refusal(model, lambda: loss(model, data()), "backward")
    assert changes(before, state_of(model)) == []
    if profile is not None:
        require_exact(profile, linears, loss)


@pytest.mark.parametrize("kind", ["numpy", "python", "generator", "counter", "iterator"])
def test_a_second_run_is_of_the_same_loss(kind: str) -> None:
    model, own, steps = reused(), torch.Generator().manual_seed(1), iter(range(1, 100))
    np.random.seed(0)
    random.seed(0)
    model.steps = 0

    def factor() -> float:
        model.steps += 1
        numbers = {
            "numpy": np.random.rand,
            "python": random.random,
            "generator": lambda: torch.rand((), generator=own).item(),
            "counter": lambda: float(model.steps),
            "iterator": lambda: float(next(steps)),
        }
        return numbers[kind]()

    factors: list[float] = []

    def closure() -> Tensor:
        factors.append(factor())
        return factors[-1] * squares(model, data())

    profile = profile_or_refusal(model, closure, "loss|random|run again")
    if profile is not None:
        require_exact(profile, reused, lambda model, x: factors[0] * squares(model, x))


def test_losses_that_look_at_the_flags_of_frozen_layers() -> None:
    model = linears()
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]

    def decayed(model: nn.Module, x: Tensor) -> Tensor:
        return squares(model, x) + 0.1 * sum(p.square().sum() for n, p in model.named_parameters() if n in trainable)

    def looking(model: nn.Module, x: Tensor) -> Tensor:
        return squares(model, x) + 0.1 * sum(p.square().sum() for p in model.parameters() if p.requires_grad)

    profile = profile_or_refusal(model, lambda: looking(model, data()), "requires_grad|frozen")
    if profile is not None:
        require_exact(profile, linears, decayed)


def test_losses_that_look_at_gradients_of_before() -> None:
    model = linears()
    for p in model.parameters():
        p.grad = torch.ones_like(p)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return squares(model, x) * (2 if model[0].weight.grad is not None else 1)

    profile = profile_or_refusal(model, lambda: loss(model, data()), "grad")
    if profile is not None:
        assert profile.loss == pytest.approx(2 * squares(linears(), data()).item(), rel=TOLERANCE)


def test_another_model_behind_reentrant_checkpointing_keeps_its_gradients() -> None:
    model, other = linears(), linears()
    x = data().requires_grad_()
    x.grad = torch.ones_like(x)
    before, of_x = state_of(other), x.grad.clone()

    def closure() -> Tensor:
        return (model(x) + checkpoint(other, x, use_reentrant=True)).square().mean()

    zest_fast.profile(model, closure=closure)
    assert changes(before, state_of(other)) == []
    assert torch.equal(x.grad, of_x)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: torch.save(m, io.BytesIO())], ids=["deepcopy", "save"])
def test_the_model_can_be_copied_and_saved_within_the_closure(how: Callable) -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        how(model)
        return squares(model, x)

    model = linears()
    profile = zest_fast.profile(model, closure=lambda: loss(model, data()))
    require_exact(profile, linears, squares)


@pytest.mark.parametrize("metrics", [["act_mean"], ["weight_std"], None])
def test_closure_that_forbids_hooks_on_saved_tensors(metrics: list[str] | None) -> None:
    model = linears()

    def closure() -> Tensor:
        with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
            return squares(model, data())

    zest_fast.profile(model, closure=closure, metrics=metrics)


def test_within_a_backward_pass() -> None:
    model, other, found = linears(), linears(), []
    y = other(data())
    y.register_hook(lambda g: found.append(profile_or_refusal(model, lambda: squares(model, data()), "backward")))
    y.sum().backward()
    if found[0] is not None:
        require_exact(found[0], linears, squares)


# Layers and weights that come and go


def test_layers_made_in_forward_are_named() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.late = nn.Linear(8, 6), None

        def forward(self, x: Tensor) -> Tensor:
            if self.late is None:
                self.late = nn.Linear(6, 3)
            return self.late(torch.tanh(self.first(x)))

    torch.manual_seed(0)
    model = Late()
    profile = profile_or_refusal(model, lambda: squares(model, data()), "late")
    if profile is not None:
        assert "late" in profile.names or profile.uncovered.get("late.weight")


@pytest.mark.parametrize("what", ["module", "parameter", "data"])
def test_what_forward_replaces_is_put_back(what: str) -> None:
    class Replacing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            if what == "module":
                self.second = copy.deepcopy(self.second)
            elif what == "parameter":
                self.second.weight = nn.Parameter(2 * self.second.weight.detach())
            else:
                self.second.to(torch.float64).to(x.dtype)
            return self.second(torch.tanh(self.first(x)))

    torch.manual_seed(0)
    model = Replacing()
    before, second = state_of(model), model.second
    profile = profile_or_refusal(model, lambda: squares(model, data()), "second")
    assert model.second is second
    assert changes(before, state_of(model)) == []
    if profile is not None and what != "data":
        assert "second" not in profile.names or profile.info["second"]["note"]


def test_hooks_that_forward_leaves_on_weights_act() -> None:
    class Hooking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.out = nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.first.weight.register_hook(lambda g: 0.5 * g)
            return self.out(torch.tanh(self.first(x)))

    def make() -> Hooking:
        torch.manual_seed(0)
        return Hooking()

    model = make()
    require_exact(zest_fast.profile(model, closure=lambda: squares(model, data())), make, squares)


def test_forward_that_clears_hooks() -> None:
    class Clearing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.out = nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.first._forward_hooks.clear()
            return self.out(torch.tanh(self.first(x)))

    torch.manual_seed(0)
    model = Clearing()
    profile = profile_or_refusal(model, lambda: squares(model, data()), "first")
    if profile is not None:
        assert "first" in profile.names or "no gradient reached it" not in profile.uncovered["first.weight"]


def learner_of(module: nn.Module, factor: float) -> nn.Module:
    """A clone as meta-learning makes it (learn2learn): weights of its own, and the hooks of the module."""
    clone = module.__new__(type(module))
    vars(clone).update(vars(module))
    clone._parameters = {name: factor * p for name, p in module._parameters.items()}
    clone._modules = {name: learner_of(child, factor) for name, child in module._modules.items()}
    return clone


@pytest.mark.parametrize("make", [linears, convolutions])
@pytest.mark.parametrize(
    "copied",
    [copy.copy, lambda module: learner_of(module, 3.0), lambda module: learner_of(module, 1.0)],
    ids=["shallow", "other weights", "the same weights"],
)
@pytest.mark.parametrize("beside", [0.0, 1.0], ids=["alone", "beside the model"])
def test_outputs_of_copies_are_not_those_of_the_model(make: Callable, copied: Callable, beside: float) -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        of_model, of_copies = x, x
        for module in model:
            of_model = module(of_model) if beside else of_model
            of_copies = copied(module)(of_copies)
        return of_copies.square().mean() + beside * of_model.square().mean()

    model = make()
    require_exact(zest_fast.profile(model, closure=lambda: loss(model, data())), make, loss)


# Shapes and storage


def test_layers_of_no_width() -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.none, self.back, self.out = nn.Linear(8, 0), nn.Linear(0, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x) + self.back(self.none(x))

    torch.manual_seed(0)
    model = Narrow()
    profile = profile_or_refusal(model, lambda: squares(model, data()), "none|back")
    if profile is not None:
        assert "out" in profile.names
        assert float(profile["out"]["grad_norm"]) > 0


def test_jagged_input() -> None:
    torch.manual_seed(0)
    model, parts = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)), data().split([2, 3])
    jagged = torch.nested.nested_tensor(list(parts), layout=torch.jagged)
    profile = profile_or_refusal(model, lambda: model(jagged).values().square().mean(), "jagged|nested")
    if profile is not None:
        expected = zest_fast.profile(model, closure=lambda: squares(model, data()))
        found, expected = profile.to_pandas(), expected.to_pandas()
        assert found["grad_norm"].tolist() == pytest.approx(expected["grad_norm"].tolist(), rel=1e-5)


def test_jagged_output_that_is_written_through_its_data() -> None:
    """As the same samples in a dense tensor, whose case the zoo has."""
    dense = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(7))
    jagged = torch.nested.nested_tensor(list(dense), layout=torch.jagged)
    torch.manual_seed(0)
    first, second = model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))

    def loss(x: Tensor) -> Tensor:
        y = first(x)
        y.data.mul_(2)
        y = second(torch.tanh(y))
        return (y.values() if y.is_nested else y).square().mean()

    expected, found = (zest_fast.profile(model, closure=lambda x=x: loss(x)).values for x in (dense, jagged))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8)


def test_weight_that_is_a_negated_view() -> None:
    def make() -> nn.Sequential:
        model = linears()
        w = model[0].weight.detach()
        model[0].weight = nn.Parameter(torch.complex(torch.zeros_like(w), w).conj().imag)
        return model

    model = make()
    assert model[0].weight.is_neg()
    require_exact(zest_fast.profile(model, closure=lambda: squares(model, data())), make, squares)


def test_closed_form_of_plain_where_the_bias_dominates() -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))
        model[0].bias.data.add_(1e4)
        return model

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return (1e-4 * model(x)).square().mean()

    model = make()
    profile = zest_fast.profile(model, closure=lambda: loss(model, data()), metrics=["plain"])
    spec, own = truth(make, loss)
    for row in profile.names:
        reachable = relative_error("plain", own.values[row]["plain"], spec.values[row], spec.numel[row])
        error = relative_error("plain", float(profile[row]["plain"]), spec.values[row], spec.numel[row])
        assert reachable > REACHABLE or error < TOLERANCE, row


# One layer alone


@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if not entry.rounded and entry.layers is None])
def test_one_layer_alone_has_its_row(name: str) -> None:
    """Then hardly anything in front of it requires a gradient, unless it did before."""
    spec, own = specification(name), plain_autograd(name)
    rows = list(spec.values)
    row = rows[len(rows) // 2]
    model, closure = build(name)
    profile = zest_fast.profile(model, closure=closure, layers=[row])
    assert profile.names == [row]
    assert profile.loss == pytest.approx(own.loss, rel=TOLERANCE)
    for metric in METRICS:
        got, cell = float(profile[row][metric]), (spec.values[row], spec.numel[row])
        if metric in ZOO[name].optional.get(row, ()) and math.isnan(got) and profile.info[row]["note"]:
            continue
        if relative_error(metric, own.values[row][metric], *cell) <= REACHABLE:
            assert relative_error(metric, got, *cell) <= TOLERANCE, (metric, got, spec.values[row][metric])


# Threads and interruptions


class TwoWeights(nn.Module):
    """Two matrices and one output, which is that of neither."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(8, 8) / 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.first) @ self.second


def test_a_module_without_an_output_of_its_own_on_another_thread() -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(TwoWeights(), nn.Tanh(), nn.Linear(8, 3))

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            return model[1:](pool.submit(model[0], x).result()).square().mean()

    model = make()
    require_exact(zest_fast.profile(model, closure=lambda: loss(model, data())), make, loss)


def test_another_thread_that_runs_the_model_does_not_count() -> None:
    model, stop = linears(), threading.Event()

    def run() -> None:
        while not stop.is_set():
            with torch.no_grad():
                model(data())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        profiles = [profile_or_refusal(model, lambda: squares(model, data()), "thread") for _ in range(20)]
    finally:
        stop.set()
        thread.join()
    for profile in filter(None, profiles):
        require_exact(profile, linears, squares)


class RaisesInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, error: BaseException) -> Tensor:
        ctx.error = error
        return y.clone()

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        raise ctx.error


PLACES = ("pre-hook", "hook", "backward", "backward hook", "weight hook", "loss")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, MemoryError, StopIteration, GeneratorExit])
def test_whatever_is_raised_passes_and_leaves_nothing(kind: type[BaseException], place: str) -> None:
    model, error = linears(), kind("raised by the user")
    model[0].weight.grad = torch.ones_like(model[0].weight)
    layer = model[2]

    def raise_it(*_: object) -> None:
        raise error

    register = {
        "pre-hook": lambda: layer.register_forward_pre_hook(raise_it),
        "hook": lambda: layer.register_forward_hook(raise_it),
        "backward": lambda: layer.register_forward_hook(lambda m, a, y: RaisesInBackward.apply(y, error)),
        "backward hook": lambda: layer.register_full_backward_hook(raise_it),
        "weight hook": lambda: layer.weight.register_hook(raise_it),
        "loss": lambda: None,
    }
    handle = register[place]()
    before = state_of(model)

    def closure() -> Tensor:
        loss = squares(model, data())
        return loss if place != "loss" else raise_it()

    with pytest.raises(kind):
        zest_fast.profile(model, closure=closure)
    assert changes(before, state_of(model)) == []
    if handle is not None:
        handle.remove()
    require_exact(zest_fast.profile(model, closure=lambda: squares(model, data())), linears, squares)


def lines_of(run: Callable[[], object], stop_at: int | None) -> int:
    """Runs and counts the lines of the library that are run; at number `stop_at` comes Ctrl-C."""
    count = 0

    def trace(frame, event: str, argument: object) -> Callable | None:
        nonlocal count
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            count += 1
            if count == stop_at:
                signal.raise_signal(signal.SIGINT)  # and no raise: the library may put it off to a better moment
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return count


def one_pass(model: nn.Module) -> Callable[[], object]:
    return lambda: zest_fast.profile(model, closure=lambda: squares(model, data()))


def test_ctrl_c_at_any_line_leaves_nothing() -> None:
    left: dict[str, int] = {}
    model = linears()
    total = max(lines_of(one_pass(model), None) for _ in range(2))  # the first one may import
    before = state_of(model)
    for stop in range(1, total, 17):
        with contextlib.suppress(KeyboardInterrupt):
            lines_of(one_pass(model), stop)
        found = changes(before, state_of(model))
        try:
            one_pass(model)()
        except RuntimeError as error:
            found.append(str(error)[:40])
        for label in found:
            left[label] = left.get(label, 0) + 1
        if found:
            model = linears()
            before = state_of(model)
    assert left == {}
