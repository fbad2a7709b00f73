"""The gradient noise scale against gradients of single samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from untouched import changes, state_of

import zest_fast
from zest_fast.watching import noise

DRAWS = 20


def model_of():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))


def population():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, 5, generator=generator)
    return x, torch.stack([x[:, 0] * x[:, 1], x[:, 2]], 1) + 0.5 * torch.randn(256, 2, generator=generator) + 1


def mean_square(output, targets):
    return (output - targets).square().mean()


def per_sample(model):
    """tr(Σ) / |G|² of each weight and of both, from the gradient of every sample of the population."""
    x, y = population()
    weights = [model[0].weight, model[2].weight]
    rows = []
    for one, target in zip(x.split(1), y.split(1), strict=True):
        found = torch.autograd.grad(mean_square(model(one), target), weights)
        rows.append([g.double().flatten() for g in found])
    gradients = [torch.stack(column) for column in zip(*rows, strict=True)]
    traces = [float((g - g.mean(0)).square().sum(1).mean()) for g in gradients]
    squares = [float(g.mean(0).square().sum()) for g in gradients]
    return [t / s for t, s in zip(traces, squares, strict=True)], sum(traces) / sum(squares)


def drawn(count, size, seed):
    x, y = population()
    rows = torch.randint(len(x), (count, size), generator=torch.Generator().manual_seed(seed))
    return [(x[row], y[row]) for row in rows]


def test_it_is_that_of_single_samples_within_5_percent_of_the_mean_of_20_draws(one_thread):
    model = model_of()
    layers, total = per_sample(model)
    found = [zest_fast.noise_scale(model, drawn(24, 16, seed), loss_fn=mean_square) for seed in range(DRAWS)]
    values, totals = np.array([f.values for f in found]), np.array([f.total for f in found])
    assert values.mean(0) == pytest.approx(layers, rel=0.05)
    assert totals.mean() == pytest.approx(total, rel=0.05)
    # The standard error is what the draws scatter by: 20 of them know their own scatter to a sixth, 1 / sqrt(2 * 19).
    spread = totals.std(ddof=1)
    assert np.mean([f.error for f in found]) == pytest.approx(spread, rel=0.5)
    assert abs(totals.mean() - total) < 3 * spread / math.sqrt(DRAWS)
    assert found[0].batch_size == round(found[0].total) and found[0].layers == ("0", "2") and found[0].batches == 24


def test_a_watch_finds_the_same_from_micro_batches(one_thread):
    model = model_of()
    layers, total = per_sample(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    totals, errors = [], []
    for seed in range(DRAWS):
        with zest_fast.watch(model, every=1, noise=True) as watched:
            for step in range(30):
                for x, y in drawn(4, 16, 1000 * seed + step):
                    (mean_square(model(x), y) / 4).backward()
                optimizer.step()
                optimizer.zero_grad()
        totals.append(watched.last.totals["noise_scale"])
        errors.append(watched.last.totals["noise_scale_error"])
        if seed == 0:
            column = watched.last.profile.column("noise_scale")
            error = watched.last.profile.column("noise_scale_error")
            assert (abs(column - layers) < 4 * error).all() and (error > 0).all()
            assert watched.last.totals["batch_size"] == round(totals[0])
    assert np.mean(totals) == pytest.approx(total, rel=0.05)
    assert np.mean(errors) == pytest.approx(np.std(totals, ddof=1), rel=0.5)


def test_estimates_are_without_bias_for_parts_of_different_sizes():
    """|g_i|² = G² + t/b_i in the mean; the estimator gets G² and t back from those means exactly."""
    square, trace, sizes = 3.0, 40.0, [4, 8, 8, 16]
    squares = [square + trace / b for b in sizes]
    for copies in (1, 3):
        of_mean = square + trace * sum(1 / b for b in sizes) / len(sizes) ** 2 / copies
        found = noise.estimate(squares * copies, of_mean, sizes * copies)
        assert (found.square, found.trace) == pytest.approx((square, trace))


def one_logged(train, **options):
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with zest_fast.watch(model, every=1, noise=True, **options) as watched:
        train(model)
        optimizer.step()
    return watched.last


@pytest.mark.parametrize(
    ("train", "why"),
    [
        (lambda model: model(torch.ones(3, 5)).sum().backward(), "two or more micro-batches"),
        (
            lambda model: [setattr(model[0].weight, "grad", torch.ones(6, 5)), *backward_twice(model)],
            "gradients of before were not cleared",
        ),
        (lambda model: [model[2](model[0](torch.ones(3, 5))).sum().backward() for _ in range(2)], "pass samples="),
    ],
)
def test_what_cannot_be_told_is_said(train, why):
    step = one_logged(train)
    assert math.isnan(step.totals["noise_scale"]) and math.isnan(step.totals["batch_size"])
    assert any("noise_scale has nothing new" in note and why in note for note in step.notes)


def backward_twice(model):
    return [model(1 + torch.randn(3, 5)).square().mean().backward() for _ in range(2)]


def test_samples_can_be_told():
    step = one_logged(backward_twice)
    assert step.totals["noise_scale"] > 0 and math.isnan(step.totals["noise_scale_error"])
    assert one_logged(backward_twice, samples=3).totals == pytest.approx(step.totals, nan_ok=True)
    twice = one_logged(backward_twice, samples=lambda args, kwargs: 2 * len(args[0])).totals
    assert twice["noise_scale"] == pytest.approx(2 * step.totals["noise_scale"])


def test_noise_scale_leaves_the_model_as_it_was_and_refuses_by_name():
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
    model[0].weight.grad = torch.ones(6, 5)
    model[3].weight.requires_grad_(False)
    before = state_of(model)
    found = zest_fast.noise_scale(model, drawn(5, 8, 0), loss_fn=mean_square)
    assert not changes(before, state_of(model)) and found.layers == ("0", "3")
    for batches, error, message in (
        (drawn(2, 8, 0), ValueError, "2 of them; three or more"),
        (torch.ones(3), TypeError, "batches is a Tensor"),
        ([(3.0, None)] * 3, ValueError, r"batches\[0\]: no tensor"),
    ):
        with pytest.raises(error, match=message):
            zest_fast.noise_scale(model, batches, loss_fn=mean_square)
    with pytest.raises(ZeroDivisionError):
        zest_fast.noise_scale(model, drawn(3, 8, 0), loss_fn=lambda *_: 1 / 0)
    assert not changes(before, state_of(model))
