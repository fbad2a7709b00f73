"""A step of each layer alone: what it gains, what is refused, and that nothing of it stays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zest_fast
from zest_fast.probing import directions
from zest_fast.probing import probe as probing
from zest_fast.probing.budget import BATCH, STEP_SIZES, sizes_for, sweep_units


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(),
        nn.Linear(24, 3),
    )  # fmt: skip


def samples(count: int = 480, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Three classes that a small network learns."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 8, generator=generator)
    hidden = torch.tanh(inputs @ torch.randn(8, 16, generator=torch.Generator().manual_seed(2)))
    return inputs, (hidden @ torch.randn(16, 3, generator=torch.Generator().manual_seed(3))).argmax(1)


def trained(steps: int = 300) -> nn.Sequential:
    model = network()
    inputs, targets = samples(2000, seed=5)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        rows = slice(step * 64 % 1900, step * 64 % 1900 + 64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[rows]), targets[rows]).backward()
        optimizer.step()
    return model.eval()


def state_of(model: nn.Module) -> dict[str, Any]:
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()}
    return {"tensors": tensors, "flags": flags, "modes": [m.training for m in model.modules()]}


def assert_untouched(model: nn.Module, before: dict[str, Any], random_state: Tensor) -> None:
    after = state_of(model)
    assert after["flags"] == before["flags"] and after["modes"] == before["modes"]
    for name, tensor in before["tensors"].items():
        assert torch.equal(tensor, after["tensors"][name]), name
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_layer_that_was_spoilt_gains_most() -> None:
    """Whichever it is; labels at random make nothing of it."""
    good = trained()
    for name in ("3", "5"):
        model = copy.deepcopy(good)
        with torch.no_grad():
            model.get_submodule(name).weight.mul_(-1.0)
        found = zest_fast.probe(model, [samples()], budget=0.3, progress=False)
        assert found.top(1) == (name,)
        assert found.gains.max() > 2 * found.errors[found.gains.argmax()]
        inputs, targets = samples()
        shuffled = targets[torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))]
        noise = zest_fast.probe(model, [(inputs, shuffled)], budget=0.3, progress=False)
        assert noise.gains.max() < 0.25 * found.gains.max()


def test_gains_are_those_of_plain_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same head and samples, gradients of autograd, without reuse of what lies below a layer."""
    seen: list[Any] = []
    create = probing._Probing
    monkeypatch.setattr(probing, "_Probing", lambda *fields: seen.append(create(*fields)) or seen[-1])
    fitted: list[nn.Module] = []
    directions = probing.directions_of
    monkeypatch.setattr(probing, "directions_of", lambda *of: fitted.append(copy.deepcopy(of[0])) or directions(*of))
    model = trained(50)
    found = zest_fast.probe(model, [samples()], layers=["0", "5"], budget=0.2, progress=False)
    copied = fitted[0].requires_grad_(True)  # with the head that the probe fitted
    given, scored = seen[0]._for_directions, seen[0]._scored
    gradients: dict[str, list[Tensor]] = {"0": [], "5": []}
    for rows in torch.arange(len(given)).split(BATCH):
        copied.zero_grad()
        nn.functional.cross_entropy(copied(given.inputs[rows]), given.targets[rows]).backward()
        for name, batches in gradients.items():
            batches += [copied.get_submodule(name).weight.grad.clone()] * len(rows)
    with torch.no_grad():
        start = nn.functional.cross_entropy(copied(scored.inputs).double(), scored.targets, reduction="none")
        for row, name in enumerate(found.names):
            weight, each = copied.get_submodule(name).weight, torch.stack(gradients[name])
            rate = 1e-2 * min(0.2, float(weight.square().mean().sqrt()))
            before, direction = weight.clone(), each.mean(0) / each.square().mean(0).sqrt().clamp_min(1e-30)
            for step in STEP_SIZES:
                gain, error = found.by_step[step][:, row]
                if np.isnan(gain):
                    break
                weight.copy_(before - step * rate * direction)
                after = nn.functional.cross_entropy(copied(scored.inputs).double(), scored.targets, reduction="none")
                assert gain == pytest.approx(float((start - after).mean()), abs=1e-5)
                assert error == pytest.approx(float((start - after).std() / len(after) ** 0.5), abs=1e-5)
            weight.copy_(before)
            assert found.gains[row] == np.nanmax([values[0, row] for values in found.by_step.values()])
    assert found.start == pytest.approx(float(start.mean()), abs=1e-6)


def test_directions_come_in_groups_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(50)
    whole = zest_fast.probe(model, [samples()], budget=0.5, progress=False)
    monkeypatch.setattr(directions, "MEMORY", 12 * 24 * 24)
    passes = []
    create = probing.directions_of
    monkeypatch.setattr(probing, "directions_of", lambda *of: passes.append(len(of[1])) or create(*of))
    parts = zest_fast.probe(model, [samples()], budget=0.5, progress=False)
    assert passes == [1, 1, 1]
    assert parts.gains == pytest.approx(whole.gains, abs=1e-5)


def test_a_step_ends_where_it_does_harm() -> None:
    """A quadratic whose best step is known: no step size beyond two that are worse is tried."""
    torch.manual_seed(0)

    class Bowl(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)
            self.last = nn.Linear(4, 1, bias=False)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.last(self.layer(inputs))

    model = Bowl()
    inputs = torch.randn(256, 4)
    with torch.no_grad():
        rate = 1e-2 * float(model.layer.weight.square().mean().sqrt())
        targets = inputs @ (model.layer.weight + 3 * rate * model.last.weight.T.sign()).T @ model.last.weight.T
    found = zest_fast.probe(
        model, [(inputs, targets)], loss_fn=nn.functional.mse_loss, layers=["layer"], budget=1.0, progress=False
    )
    tried = [step for step, values in found.by_step.items() if np.isfinite(values[0, 0])]
    assert found.steps[0] == 3.0 and tried == [0.3, 1.0, 3.0, 10.0]


@pytest.mark.parametrize("failure", [None, ValueError("of the loss"), KeyboardInterrupt()])
def test_the_model_is_as_it_was(failure: BaseException | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained().train()
    model[3].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before, random_state = state_of(model), torch.get_rng_state()
    calls = 0

    def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if failure is not None and calls == 40:
            raise failure
        return nn.functional.cross_entropy(output, targets)

    if failure is None:
        zest_fast.probe(model, [samples()], loss_fn=loss_fn, progress=False)
        assert calls > 40
    else:
        with pytest.raises(type(failure)):
            zest_fast.probe(model, [samples()], loss_fn=loss_fn, progress=False)
    assert_untouched(model, before, random_state)
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))


def test_the_same_seed_gives_the_same_probe() -> None:
    model = trained(50)
    first, again, other = (zest_fast.probe(model, [samples()], seed=seed, progress=False) for seed in (0, 0, 1))
    assert np.array_equal(first.gains, again.gains) and np.array_equal(first.errors, again.errors)
    assert not np.array_equal(first.gains, other.gains)


def test_batches_are_put_together() -> None:
    model, (inputs, targets) = trained(50), samples()
    whole = zest_fast.probe(model, [(inputs, targets)], progress=False)
    parts = zest_fast.probe(model, zip(inputs.split(48), targets.split(48), strict=True), progress=False)
    assert np.array_equal(whole.gains, parts.gains)


def test_a_larger_budget_scores_more_and_keeps_to_it() -> None:
    model = trained(50)
    small, large = (zest_fast.probe(model, [samples(2000)], budget=b, progress=False) for b in (0.05, 0.5))
    assert small.cost <= 0.05 and large.cost <= 0.5
    assert large.settings["scored_samples"] > 2 * small.settings["scored_samples"]


def test_language_models_have_no_head_that_trains() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(50, (64, 6))
    before, random_state = state_of(model), torch.get_rng_state()
    found = zest_fast.probe(model, [{"input_ids": tokens, "labels": tokens}], budget=0.1, progress=False)
    assert len(found) == 14 and "lm_head" not in found.names
    assert found.settings["head_samples"] == 0
    assert np.isfinite(found.gains).all() and np.isfinite(found.errors).all()
    assert_untouched(model, before, random_state)


def test_the_head_of_a_regression_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    inputs, _ = samples()
    targets = inputs[:, :1].sin()
    found = zest_fast.probe(model, [(inputs, targets)], loss_fn=nn.functional.mse_loss, budget=0.1, progress=False)
    assert found.settings["head_samples"] == 0
    rows = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))[-found.settings["scored_samples"] :]
    assert found.start > 0 and len(rows) and np.isfinite(found.gains).all()


def batch(count: int = 64) -> dict[str, Tensor]:
    return {"input": torch.randn(count, 8), "labels": torch.zeros(count, dtype=torch.int64)}


BAD: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "no batches": (list, {}, "batches is empty"),
    "a number": (lambda: 3, {}, "batches is a int"),
    "other keys": (lambda: [{"input": torch.randn(9, 8), "labels": torch.zeros(9)}, {"input": torch.randn(9, 8)}], {},
                   r"batches\[1\] holds input, batches\[0\] input, labels"),
    "other shapes": (lambda: [samples(), (torch.randn(9, 7), torch.zeros(9, dtype=torch.int64))], {},
                     r"batches\[1\]: the inputs are \[9, 7\].*batches\[0\] \[480, 8\].*pad or crop"),
    "tuples": (lambda: [((torch.randn(9, 8), torch.randn(9, 8)), torch.zeros(9, dtype=torch.int64))], {},
               r"batches\[0\]: inputs are a tuple"),
    "few samples": (lambda: [samples(40)], {}, "hold 40 samples; a probe needs at least 64"),
    "small budget": (lambda: [samples()], {"budget": 1e-3}, "budget=0.001 of a sweep is too small.*at least"),
    "no budget": (lambda: [samples()], {"budget": 0}, "budget is 0"),
    "budget of words": (lambda: [samples()], {"budget": "5%"}, "budget is '5%'"),
    "unknown layer": (lambda: [samples()], {"layers": ["nowhere"]}, "no layer is named 'nowhere'"),
    "the head alone": (lambda: [samples()], {"layers": ["7"]}, "nothing beside the head"),
    "NaN": (lambda: [(samples()[0] * float("nan"), samples()[1])], {}, "not finite|nan"),
    "unequal": (lambda: [(torch.randn(9, 8), torch.zeros(8, dtype=torch.int64))], {},
                "different numbers of samples"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    batches, options, message = BAD[case]
    model = trained(0)
    before, random_state = state_of(model), torch.get_rng_state()
    arguments = batches()
    random_state = torch.get_rng_state()
    with pytest.raises((ValueError, TypeError), match=message):
        zest_fast.probe(model, arguments, progress=False, **options)
    assert_untouched(model, before, random_state)


def test_a_loss_that_rises_in_every_probe_is_said() -> None:
    """Directions are of the one loss, scores of another: whatever is added is punished by the square."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    inputs = torch.randn(96, 8)

    def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
        moved = output - targets
        return (moved * model[1].weight.sum(1)).mean() if torch.is_grad_enabled() else moved.square().mean()

    targets = model(inputs).detach()
    with pytest.warns(UserWarning, match="the loss rose in every probe"):
        found = zest_fast.probe(model, [(inputs, targets)], loss_fn=loss_fn, layers=["0"], budget=1.0, progress=False)
    assert "rose in every probe" in repr(found) and (found.gains < 0).all()


def test_sizes_keep_to_budget_and_samples() -> None:
    for count in (64, 100, 256, 1024, 5000):
        for budget in (0.02, 0.05, 0.3, 1.0):
            for fits_head in (True, False):
                sizes = sizes_for(count, budget, 30, passes=2, fits_head=fits_head)
                assert sizes.head + sizes.directions + sizes.scored <= count
                assert sizes.units(30, 2) <= budget * sweep_units() * 30
                assert min(sizes.directions, sizes.scored) >= 16 and (sizes.head > 0) == fits_head
