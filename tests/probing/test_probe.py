"""Each layer trained alone in a quadratic model: what it gains, what is refused, and that nothing of it stays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zest_fast
from zest_fast.probing import budget as budgets
from zest_fast.probing import probe as probing
from zest_fast.probing.budget import BATCH, bytes_of, sizes_for, sweep_units
from zest_fast.probing.quadratic import saved
from zest_fast.probing.quadratic import trained as trained_in_quadratic


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
        found = zest_fast.probe(model, [samples(2000)], budget=0.6, progress=False)
        assert found.top(1) == (name,)
        assert found.gains.max() > 2 * found.errors[found.gains.argmax()]
        inputs, targets = samples(2000)
        shuffled = targets[torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))]
        noise = zest_fast.probe(model, [(inputs, shuffled)], budget=0.6, progress=False)
        assert noise.gains.max() < 0.25 * found.gains.max()


def seen_of(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, count: int, **options: Any
) -> tuple[Any, list[Any], nn.Module]:
    """A probe of so many samples, what it observed of each layer, and a copy of the model with the head it fitted."""
    jobs: list[Any] = []
    observed: list[Any] = []
    fitted: list[nn.Module] = []
    create, observe = probing._Probing, probing._Probing._observe

    class Seen(create):  # type: ignore[misc, valid-type]
        def __init__(self, *fields: Any) -> None:
            super().__init__(*fields)
            jobs.append(self)

        def _observe(self, group: Any, bar: Any) -> list[Any]:
            fitted.append(copy.deepcopy(self._model))
            observed.extend(observe(self, group, bar))
            return list(observed)

    with monkeypatch.context() as patch:
        patch.setattr(probing, "_Probing", Seen)
        zest_fast.probe(model, [samples(count)], progress=False, **options)
    return jobs[0], observed, fitted[0].requires_grad_(True)


def test_slopes_and_curvature_are_those_of_plain_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ways from class-sorted batches of each half, slopes of each batch of eight; Gauss-Newton within its noise."""
    job, observed, copied = seen_of(trained(50), monkeypatch, 3000, layers=["0", "5"], budget=1.0)
    inputs, targets = job._probed.inputs, job._probed.targets
    halves = torch.arange(len(targets)).chunk(2)
    for name, found in zip(("0", "5"), observed, strict=True):
        weight = copied.get_submodule(name).weight

        def gradient(rows: Tensor, weight: Tensor = weight) -> Tensor:
            loss = nn.functional.cross_entropy(copied(inputs[rows]), targets[rows])
            return torch.autograd.grad(loss, weight)[0].flatten()

        ways = []
        for half, gram in zip(halves, found.grams, strict=True):
            by_class = half[torch.argsort(targets[half], stable=True)]
            gradients = torch.stack([gradient(rows) for rows in by_class.tensor_split(8)])
            rms = gradients.square().mean(0).sqrt()
            ways.append(gradients / (rms + 1e-3 * rms.square().mean().sqrt()))
            assert gram.numpy() == pytest.approx((gradients @ ways[-1].T).double().numpy(), rel=1e-3, abs=1e-6)
        every = torch.cat(ways)
        slopes = torch.stack([every @ gradient(rows) for rows in torch.arange(len(targets)).split(BATCH)])
        assert found.slopes.numpy() == pytest.approx(slopes.double().numpy(), rel=1e-3, abs=1e-5)

        def logits(shares: Tensor, weight: Tensor = weight, name: str = name, every: Tensor = every) -> Tensor:
            moved = {f"{name}.weight": weight + (shares @ every).view_as(weight)}
            return torch.func.functional_call(copied, moved, (inputs,))

        jacobian = torch.func.jacfwd(logits)(torch.zeros(len(every))).detach()  # [samples, classes, ways]
        chances = logits(torch.zeros(len(every))).softmax(-1).detach()
        middle = jacobian - (chances[:, :, None] * jacobian).sum(1, keepdim=True)
        exact = torch.einsum("nc,nca,ncb->ab", chances, middle, middle) / len(inputs)
        drawn = (found.curved.T @ found.curved / len(found.curved)).float()
        assert float((drawn - exact).norm() / exact.norm()) < 0.4  # some 190 batches of drawn labels


def test_gains_are_those_of_real_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer at a time by Adam on one half, scored on the other; at a rate where a quadratic says enough."""
    model = trained(50)
    job, _, copied = seen_of(model, monkeypatch, 3000, budget=1.0)
    found = zest_fast.probe(model, [samples(3000)], budget=1.0, progress=False)
    inputs, targets = job._probed.inputs, job._probed.targets
    halves = torch.arange(len(targets)).chunk(2)
    gains = []
    for name in found.names:
        saved_losses = []
        for train, score in (halves, halves[::-1]):
            learner = copy.deepcopy(copied)
            weight = learner.get_submodule(name).weight
            rate = 0.3 * zest_fast.Recipe().layer_lr(float(weight.detach().square().mean().sqrt()))
            optimizer = torch.optim.Adam([weight], lr=rate)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 32)
            before = nn.functional.cross_entropy(learner(inputs[score]), targets[score]).item()
            for step in range(32):
                rows = train[torch.arange(step * 32, step * 32 + 32) % len(train)]
                optimizer.zero_grad()
                nn.functional.cross_entropy(learner(inputs[rows]), targets[rows]).backward()
                optimizer.step()
                schedule.step()
            after = nn.functional.cross_entropy(learner(inputs[score]), targets[score]).item()
            saved_losses.append(before - after)
        gains.append(np.mean(saved_losses))
    predicted = found.by_rate[0.3][0]
    assert np.argsort(predicted).tolist() == np.argsort(gains).tolist()
    assert predicted.max() == pytest.approx(max(gains), rel=0.25)


def test_steps_in_a_quadratic() -> None:
    """One step along one way goes as far as its rate, many steps to the minimum; what is saved is the parabola's."""
    recipe = zest_fast.Recipe(steps=1, batch_size=8, seeds=(0,))
    gram = torch.tensor([[2.0, 0.3], [0.3, 1.0]], dtype=torch.float64)
    none = torch.zeros(2, 2, dtype=torch.float64)
    shares = trained_in_quadratic(gram[:1], none, gram, 1e-2, recipe, batch=8)
    assert shares.tolist() == pytest.approx([-1e-2, 0.0])
    curvature = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    slope = torch.tensor([[0.5, -1.0]], dtype=torch.float64)
    longer = zest_fast.Recipe(steps=2000, batch_size=8, seeds=(0,))
    shares = trained_in_quadratic(slope, curvature, gram, 1e-1, longer, batch=8)
    best = -torch.linalg.solve(curvature, slope[0])
    assert shares.tolist() == pytest.approx(best.tolist(), abs=1e-4)
    gain, error = saved(slope.repeat(3, 1), curvature, shares)
    assert gain == pytest.approx(float(-0.5 * slope[0] @ best)) and error == 0
    lost, error = saved(torch.stack([slope[0], -slope[0]]), curvature, shares)
    assert lost < 0 and error == pytest.approx(float((slope[0] @ shares).abs()))


def test_the_rate_below_the_best_counts() -> None:
    gains = np.array([[0.1, 0.1], [0.3, 0.2], [0.5, 0.1], [-3.0, 0.2]])
    assert probing._cautious(gains) == 1
    assert probing._cautious(-gains[:3]) == 0
    gains[3] = np.nan
    assert probing._cautious(gains) == 0  # nothing is finite at all rates
    found = zest_fast.probe(trained(50), [samples()], budget=0.3, progress=False)
    means = [values[0].mean() for values in found.by_rate.values()]
    place = list(found.by_rate).index(found.rate)
    assert place == max(0, int(np.argmax(means)) - 1)
    assert np.array_equal(found.by_rate[found.rate], [found.gains, found.errors])


def test_weights_come_in_groups_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(50)
    whole = zest_fast.probe(model, [samples()], budget=0.9, progress=False)
    monkeypatch.setattr(budgets, "MEMORY", bytes_of(24 * 24, 8))
    parts = zest_fast.probe(model, [samples()], budget=0.9, progress=False)
    assert whole.settings["passes"] == 1 and parts.settings["passes"] == 3
    assert parts.settings["probed_samples"] == whole.settings["probed_samples"]
    assert parts.gains == pytest.approx(whole.gains, rel=1e-3, abs=1e-6)


def test_where_passes_cost_too_much_there_are_fewer_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "MEMORY", bytes_of(24 * 24, 4))
    found = zest_fast.probe(trained(50), [samples()], budget=0.2, progress=False)
    assert (found.settings["directions"], found.settings["passes"]) == (2, 2) and np.isfinite(found.gains).all()


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
        if failure is not None and calls == 20:
            raise failure
        return nn.functional.cross_entropy(output, targets)

    if failure is None:
        zest_fast.probe(model, [samples()], loss_fn=loss_fn, progress=False)
        assert calls > 20
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
    small, large = (zest_fast.probe(model, [samples(2000)], budget=b, progress=False) for b in (0.1, 0.5))
    assert small.cost <= 0.1 and large.cost <= 0.5
    assert large.settings["probed_samples"] > 2 * small.settings["probed_samples"]


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
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    rows = order[: found.settings["probed_samples"]]
    with torch.no_grad():
        start = nn.functional.mse_loss(model(inputs[rows]), targets[rows])
    assert found.start == pytest.approx(start.item(), rel=1e-5) and np.isfinite(found.gains).all()


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
    """What lowers the loss of one half of the samples raises that of the other."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    inputs, signs = torch.randn(8, 8).repeat(12, 1), torch.empty(96)
    signs[torch.randperm(96, generator=torch.Generator().manual_seed(0))] = torch.tensor([1.0, -1.0]).repeat_interleave(
        48
    )
    inputs = inputs[torch.arange(96) % 8]

    def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
        return (output.mean(1).square() * targets).mean()

    with pytest.warns(UserWarning, match="the loss rises in every probe"):
        found = zest_fast.probe(model, [(inputs, signs)], loss_fn=loss_fn, layers=["0"], budget=1.0, progress=False)
    assert "rises in every probe" in repr(found) and (found.gains < 0).all()


def test_sizes_keep_to_budget_and_samples() -> None:
    for count in (80, 100, 256, 1024, 5000):
        for budget in (0.05, 0.3, 1.0):
            for fits_head in (True, False):
                sizes = sizes_for(count, budget, [10_000_000] * 30, fits_head=fits_head)
                assert sizes.head + sizes.probed <= count and sizes.probed % (2 * BATCH) == 0
                assert sizes.units <= budget * sweep_units() * 30
                assert sizes.probed >= 32 and (sizes.head > 0) == fits_head
                assert sorted(sum(sizes.groups, ())) == list(range(30))
