"""Profiles, steps and plans beside what they are held against, on models of which a pass takes a millisecond."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from zest_fast.benchmarking import passes, plans
from zest_fast.benchmarking.passes import profile_case, step_case
from zest_fast.benchmarking.plans import plan_case
from zest_fast.benchmarking.results import Case, Measured

pytestmark = pytest.mark.usefixtures("one_thread")
ROUNDS = 6


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(128, 5)
    )


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, 8, 8, generator=generator), torch.arange(6) % 5


def by_name(case: Case) -> dict[str, Measured]:
    return {one.name: one for one in case.measured}


def test_a_profile_is_held_against_the_reference_and_timed_beside_the_plain_pass():
    case = profile_case("net", network(), batch(), ROUNDS)
    found = by_name(case)
    assert case.name == "net, 1 thread" and case.baseline == "plain" and case.settings["layers"] == 3
    assert found["plain"].match is None and found["plain"].ratio.median == 1.0
    for name in ("zest_fast.profile", "hooks"):
        assert found[name].match and found[name].error <= found[name].tolerance == 2e-5
        assert found[name].seconds.n == ROUNDS and found[name].figures["peak_mib"] > 0


class Shared(nn.Module):
    """One layer twice: the hooks of torch see the sum of two outputs as the last of them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.inner(torch.relu(self.inner(x)))))


def test_hooks_that_are_wrong_on_a_model_are_named_and_not_timed():
    torch.manual_seed(0)
    found = by_name(profile_case("shared", Shared(), (torch.randn(5, 4), torch.arange(5) % 2), ROUNDS))
    assert found["zest_fast.profile"].match and found["zest_fast.profile"].seconds is not None
    assert found["hooks"].match is False and found["hooks"].seconds is None
    assert found["hooks"].why.startswith("wrong: ") and "of inner is off by" in found["hooks"].why


def test_a_profile_that_is_wrong_or_raises_is_named(monkeypatch):
    def wrong(model, batch, **options):
        if not options:
            model[0].weight.data[0] += 0.1
        return passes_profile(model, batch, **options)

    passes_profile = passes.profile
    monkeypatch.setattr(passes, "profile", wrong)
    one = by_name(profile_case("net", network(), batch(), ROUNDS))["zest_fast.profile"]
    assert one.match is False and one.seconds is None and one.why.startswith("wrong: ")

    def raises(model, batch, **options):
        return passes_profile(model, batch, **options) if options else {}["nothing"]

    monkeypatch.setattr(passes, "profile", raises)
    one = by_name(profile_case("net", network(), batch(), ROUNDS))["zest_fast.profile"]
    assert one.seconds is None and one.why == "raises KeyError: 'nothing'"


def test_a_step_has_the_gradients_of_full_training_and_fewer_flops():
    model = network()
    before = copy.deepcopy(model.state_dict())
    case = step_case("net", model, batch(), ["2"], ROUNDS)
    found = by_name(case)
    assert case.baseline == "full" and case.settings["cut"] == "2"
    for name in ("SelectiveBackward", "frozen by hand"):
        assert found[name].match and found[name].figures["flops_share"] < 1.0
        assert found[name].figures["peak_mib"] < found["full"].figures["peak_mib"]
    assert found["full"].figures["flops_share"] == 1.0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_a_step_with_other_gradients_is_named(monkeypatch):
    class Doubled(passes.SelectiveBackward):
        def __init__(self, model, layers):
            super().__init__(model, layers)
            model[2].weight.register_hook(lambda gradient: 2 * gradient)

    monkeypatch.setattr(passes, "SelectiveBackward", Doubled)
    found = by_name(step_case("net", network(), batch(), ["2"], ROUNDS))
    assert found["SelectiveBackward"].why.startswith("wrong: the gradient of 2.weight is off by")
    assert found["frozen by hand"].match


def test_a_planned_peak_is_held_against_the_counted_one(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 5))
    data = torch.randn(6, 64), torch.arange(6) % 5
    case = plan_case("net", model, data, ["2"], ROUNDS)
    found = by_name(case)
    assert found["zest_fast.plan"].match and found["zest_fast.plan"].seconds.n == ROUNDS
    assert found["step"].figures["peak_mib"] > 0 and case.settings["optimizer"] == "adamw"
    real = plans.planned_peak
    monkeypatch.setattr(plans, "planned_peak", lambda *given, **options: int(1.1 * real(*given, **options)))
    one = by_name(plan_case("net", model, data, ["2"], ROUNDS))["zest_fast.plan"]
    assert one.match is False and one.seconds is None and one.why.startswith("wrong: the peak is off by")


def test_what_the_baseline_raises_passes_through():
    def broken() -> None:
        raise RuntimeError("the model does not run")

    with pytest.raises(RuntimeError, match="does not run"):
        passes.measure_passes("x", [passes.Pass("plain", "floor", broken)], ROUNDS, {}, torch.device("cpu"))


def test_an_undefined_metric_has_to_be_undefined_on_both_sides():
    nan = float("nan")
    row = {"snip": 2.0, "plain": 0.0, "act_mean": nan, "act_std": nan}
    assert passes._of_table({"a": row}, {"a": row}, {"a": 4}, 1e-5).match
    assert not passes._of_table({"a": {**row, "act_mean": 1.0}}, {"a": row}, {"a": 4}, 1e-5).match
    assert not passes._of_table({"a": {**row, "snip": nan}}, {"a": row}, {"a": 4}, 1e-5).match
    assert not passes._of_table({}, {"a": row}, {"a": 4}, 1e-5).match


def test_best_layers_of_a_model_are_the_rankers(monkeypatch):
    from zest_fast.benchmarking import runs

    ranking = SimpleNamespace(names=["a", "b", "c", "d"], top=lambda count: ["a", "b", "c", "d"][:count])
    monkeypatch.setattr(runs, "rank", lambda profile: ranking)
    assert runs.best_layers(network(), batch()) == ("a", "b")
