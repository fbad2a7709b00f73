"""A few real steps on each layer alone: what they gain, what is refused, and that nothing of them stays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zest_fast
from zest_fast.probing import probe as probing
from zest_fast.probing.budget import LAYER_LR_FACTORS, STEPS, sizes_for, sweep_units
from zest_fast.sweeping.trials import Trials


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
        found = zest_fast.probe(model, [samples()], budget=0.2, progress=False)
        assert found.top(1) == (name,)
        assert found.gains.max() > 4 * found.errors[found.gains.argmax()]
        inputs, targets = samples()
        shuffled = targets[torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))]
        noise = zest_fast.probe(model, [(inputs, shuffled)], budget=0.2, progress=False)
        assert noise.gains.max() < 0.25 * found.gains.max()


def test_gains_are_those_of_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same head, samples and batches, without reuse of what lies below a layer."""
    seen: list[Trials] = []
    create = probing.Trials
    monkeypatch.setattr(probing, "Trials", lambda **fields: seen.append(create(**fields)) or seen[-1])
    model = trained()
    found = zest_fast.probe(model, [samples()], layers=["0", "5"], progress=False)
    (trials,) = seen
    inputs, objective = trials.train
    scored, score = trials.score

    def losses_after(layer: str | None, factor: float) -> Tensor:
        copied = copy.deepcopy(model)
        weight, bias = trials.heads[0]
        with torch.no_grad():
            copied[-1].weight.copy_(weight)
            copied[-1].bias.copy_(bias)
        groups = [{"params": list(copied[-1].parameters()), "lr": trials.recipe.head_lr}]
        if layer is not None:
            module = copied.get_submodule(layer)
            rate = factor * min(0.2, float(module.weight.detach().square().mean().sqrt()))
            groups.append({"params": list(module.parameters()), "lr": rate})
        optimizer = torch.optim.Adam(groups)
        rates = [group["lr"] for group in groups]
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
        size = trials.recipe.batch_size
        for step in range(STEPS):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - step / STEPS)
            rows = order[step * size : (step + 1) * size]
            optimizer.zero_grad()
            nn.functional.cross_entropy(copied(inputs[rows]), objective.targets[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            return nn.functional.cross_entropy(copied(scored).double(), score.targets, reduction="none")

    alone = losses_after(None, 0.0)
    for row, name in enumerate(found.names):
        saved = [alone - losses_after(name, factor) for factor in LAYER_LR_FACTORS]
        best = max(saved, key=lambda losses: float(losses.mean()))
        assert found.gains[row] == pytest.approx(float(best.mean()), abs=1e-6)
        assert found.errors[row] == pytest.approx(float(best.std() / len(best) ** 0.5), abs=1e-6)
    assert found.head == pytest.approx(float(alone.mean()), abs=1e-6)


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
        if failure is not None and calls == 60:
            raise failure
        return nn.functional.cross_entropy(output, targets)

    if failure is None:
        zest_fast.probe(model, [samples()], loss_fn=loss_fn, progress=False)
        assert calls > 60
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


def test_what_the_budget_leaves_goes_to_the_undecided() -> None:
    found = zest_fast.probe(trained(), [samples(2000)], budget=0.5, top=1, progress=False)
    assert found.rounds.max() > 1
    assert found.cost <= 0.5
    one = zest_fast.probe(trained(), [samples(2000)], top=1, progress=False)
    assert one.rounds.max() == 1 and one.cost <= 0.05


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
    assert found.start == found.head
    assert np.isfinite(found.gains).all() and np.isfinite(found.errors).all()
    assert_untouched(model, before, random_state)


def test_regression_trains_the_head_that_is_there() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    inputs, _ = samples()
    targets = inputs[:, :1].sin()
    found = zest_fast.probe(model, [(inputs, targets)], loss_fn=nn.functional.mse_loss, budget=0.1, progress=False)
    assert found.settings["head_samples"] == 0
    assert found.head != found.start


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
    "few samples": (lambda: [samples(40)], {}, "hold 40 samples; a probe needs at least 48"),
    "small budget": (lambda: [samples()], {"budget": 1e-3}, "budget=0.001 of a sweep is too small.*at least"),
    "no budget": (lambda: [samples()], {"budget": 0}, "budget is 0"),
    "budget of words": (lambda: [samples()], {"budget": "5%"}, "budget is '5%'"),
    "no top": (lambda: [samples()], {"top": 0}, "top is 0"),
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


class Overdone(nn.Module):
    """Whose layer is at its best: whatever is added to it is punished by the square."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8, bias=False)
        self.last = nn.Linear(8, 8, bias=False)
        self.register_buffer("best", self.layer.weight.detach().clone())

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.layer(inputs) - inputs @ self.best.T)


def test_a_loss_that_rises_in_every_probe_is_said() -> None:
    model = Overdone()
    inputs = torch.randn(96, 8)
    pushed = inputs @ torch.randn(8, 8)  # what the steps go for, and the scores do not hold

    def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
        return (output * targets).mean() if torch.is_grad_enabled() else output.square().mean()

    with pytest.warns(UserWarning, match="the loss rose in every probe"):
        found = zest_fast.probe(model, [(inputs, pushed)], loss_fn=loss_fn, layers=["layer"], progress=False)
    assert "rose in every probe" in repr(found) and (found.gains < 0).all()


def test_sizes_keep_to_budget_and_samples() -> None:
    for count in (48, 100, 256, 640, 5000):
        for budget in (0.02, 0.05, 0.3, 1.0):
            for fits_head in (True, False):
                sizes = sizes_for(count, budget, 30, fits_head=fits_head)
                assert sizes.head + sizes.trained + sizes.scored <= count
                assert sizes.round_units(30) <= budget * sweep_units() * 30
                assert min(sizes.trained, sizes.scored) >= sizes.batch > 0 and (sizes.head > 0) == fits_head
