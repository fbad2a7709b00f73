"""Loops in which `zest_fast.watch` gave a wrong figure without a word: each is right now, or says so."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from training_loops import batches, loss_of, net

import zest_fast
from zest_fast.watching.histograms import histogram


def norms_of(model: nn.Module) -> list[float]:
    """Of the gradients as they are now, in float64, layer by layer."""
    return [math.nan if m.weight.grad is None else m.weight.grad.double().norm().item() for m in linear_layers(model)]


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def has_note(step, words: str) -> bool:
    return any(words in note for note in step.notes)


# Loss scales


def test_the_scaler_of_another_models_loss_scales_nothing_here():
    model, other, scaler = net(), net(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer, of_the_other = sgd(model), sgd(other)
    (x, y), log = batches(1)[0], []
    with zest_fast.watch(model, every=1, metrics="all", parts=True, log=log.append):
        scaler.scale(loss_of(other, x, y)).backward()
        scaler.step(of_the_other)
        loss = loss_of(model, x, y)
        loss.backward()
        expected = norms_of(model)
        scaler.update()
        optimizer.step()
    assert [(step.step, step.overflow) for step in log] == [(0, False)]
    assert log[0].profile.column("grad_norm") == pytest.approx(expected, rel=1e-6)
    assert log[0].parts[0].column("grad_norm") == pytest.approx(expected, rel=1e-6)
    assert log[0].profile.loss == log[0].parts[0].loss == loss.item()


def test_an_unscaled_loss_after_a_scaled_one_is_said():
    model, scaler = net(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = sgd(model)
    (x, y), (x2, y2) = batches(2)
    with zest_fast.watch(model, every=1) as watched:
        scaler.scale(loss_of(model, x, y)).backward()
        loss_of(model, x2, y2).backward()
        optimizer.step()
    assert all(map(math.isnan, watched.last.profile.column("grad_norm")))
    assert has_note(watched.last, "different loss scales")


@pytest.mark.parametrize("container", [list, tuple, iter])
def test_losses_that_are_scaled_together(container):
    model, scaler = net().eval(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer, (x, y) = sgd(model), batches(1)[0]
    with zest_fast.watch(model, every=1) as watched:
        output = model(x)
        losses = scaler.scale(container([nn.functional.cross_entropy(output, y), output.square().mean()]))
        sum(losses).backward()
        expected = [norm / 1024 for norm in norms_of(model)]
        scaler.step(optimizer)
        scaler.update()
    assert watched.last.profile.column("grad_norm") == pytest.approx(expected, rel=1e-6)


def test_the_scale_is_known_after_a_step_that_its_user_skipped():
    model, scaler, log = net(), torch.amp.GradScaler("cpu", init_scale=1024.0), []
    optimizer = sgd(model)
    with zest_fast.watch(model, every=1, log=log.append):
        for i, (x, y) in enumerate(batches(2)):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, x, y)).backward()
            expected = [norm / 1024 for norm in norms_of(model)]
            if i:
                scaler.step(optimizer)
                scaler.update()
    assert [step.step for step in log] == [0, 0] and has_note(log[0], "its gradients were cleared")
    assert log[1].profile.column("grad_norm") == pytest.approx(expected, rel=1e-6)


def test_an_optimizer_of_ones_own_beside_a_scaler_does_not_overflow():
    class ByHand:
        def __init__(self, parameters):
            self.param_groups = [{"params": list(parameters)}]

        @torch.no_grad()
        def step(self):
            for p in self.param_groups[0]["params"]:
                p -= 0.1 * p.grad

    model, scaler, log = net(), torch.amp.GradScaler("cpu", init_scale=1024.0), []
    optimizer = ByHand(model.parameters())
    with zest_fast.watch(model, every=1, log=log.append) as watched:
        for x, y in batches(3):
            model.zero_grad()
            scaler.scale(loss_of(model, x, y)).backward()
            scaler.step(optimizer)
            scaler.update()
            watched.step()
    assert [(step.step, step.overflow, step.notes) for step in log] == [(i, False, ()) for i in range(3)]


# Optimizers


class Lookahead(torch.optim.Optimizer):
    """Takes a step of another optimizer, and goes half of the way (Zhang et al. 2019, with k = 1)."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    @torch.no_grad()
    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = [p.clone() for p in parameters]
        self.inner.step()
        for p, old in zip(parameters, before, strict=True):
            p.lerp_(old, 0.5)


@pytest.mark.parametrize("every", [1, 2])
def test_an_optimizer_that_steps_another_takes_one_step(every):
    model, log, expected = net(), [], []
    optimizer = Lookahead(sgd(model))
    with zest_fast.watch(model, every=every, updates=True, log=log.append) as watched:
        for i, (x, y) in enumerate(batches(4)):
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            before = [m.weight.detach().double() for m in linear_layers(model)]
            optimizer.step()
            moved = [m.weight.detach().double() for m in linear_layers(model)]
            if i % every == 0:
                expected.append([float((a - b).norm() / b.norm()) for a, b in zip(moved, before, strict=True)])
    assert watched.steps == 4 and [step.step for step in log] == list(range(0, 4, every))
    for step, ratios in zip(log, expected, strict=True):
        assert step.profile.column("update_ratio") == pytest.approx(ratios, rel=1e-5)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("several", [False, True])
def test_backward_passes_of_another_model_end_no_step(several, every):
    """Its backward pass comes between the optimizers of a step, or before a call of watched.step() that is one too
    many."""
    model, other, log = net(), net(), []
    optimizers = [sgd(model[:3]), sgd(model[3:])] if several else [sgd(model)]
    with zest_fast.watch(model, every=every, log=log.append) as watched:
        for x, y in batches(6):
            model.zero_grad()
            loss_of(model, x, y).backward()
            optimizers[0].step()
            loss_of(other, x, y).backward()
            for optimizer in optimizers[1:]:
                optimizer.step()
            watched.step()
    assert watched.steps == 6
    assert [(step.step, step.notes) for step in log] == [(i, ()) for i in range(0, 6, every)]


# Gradients that somebody clears, keeps or replaces


def head_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        features = model[:5](x)
    return nn.functional.cross_entropy(model[5](features), y)


def test_gradients_that_are_cleared_between_two_passes():
    model, (x, y) = net(), batches(1)[0]
    optimizer = sgd(model)
    with zest_fast.watch(model, every=1, noise=True, samples=8) as watched:
        loss_of(model, x, y).backward()
        model[:5].zero_grad()
        head_of(model, x, y).backward()
        expected = norms_of(model)
        optimizer.step()
    assert watched.last.profile.column("grad_norm") == pytest.approx(expected, rel=1e-6, nan_ok=True)
    assert has_note(watched.last, "0, 3: the gradient was cleared between two backward passes")
    assert math.isnan(watched.last.totals["noise_scale"])


def test_a_skipped_step_of_an_optimizer_that_holds_the_head_only():
    model = net()
    optimizer = sgd(model[5])
    with zest_fast.watch(model, every=1) as watched:
        for i, (x, y) in enumerate(batches(2)):
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            if i:
                optimizer.step()
    assert has_note(watched.last, "5: the gradient was cleared between two backward passes of the step; loss")


def test_gradients_that_are_cleared_before_the_step():
    model, (x, y) = net(), batches(1)[0]
    optimizer = sgd(model)
    with zest_fast.watch(model, every=1) as watched:
        loss_of(model, x, y).backward()
        model[0].zero_grad()
        expected = norms_of(model)
        optimizer.step()
    assert watched.last.profile.column("grad_norm") == pytest.approx(expected, rel=1e-6, nan_ok=True)
    assert has_note(watched.last, "0: gradient undefined: it was cleared before the step")


def test_gradients_that_are_replaced_are_said():
    """Gradient surgery: the optimizer takes another gradient than the backward pass left."""
    model, (x, y) = net(), batches(1)[0]
    optimizer = sgd(model)
    with zest_fast.watch(model, every=1) as watched:
        loss_of(model, x, y).backward()
        left = norms_of(model)
        for p in model.parameters():
            p.grad = 2 * p.grad
        optimizer.step()
    assert watched.last.profile.column("grad_norm") == pytest.approx(left, rel=1e-6)
    assert has_note(watched.last, "0, 3, 5: another gradient was put into .grad")


def test_gradients_of_before_the_step_are_said():
    """The watch begins in the middle of accumulation, or nobody clears gradients."""
    model, log = net(), []
    optimizer, (first, *rest) = sgd(model), batches(3)
    loss_of(model, *first).backward()
    with zest_fast.watch(model, every=1, log=log.append):
        for i, (x, y) in enumerate(rest):
            loss_of(model, x, y).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=i == 1)
    assert has_note(log[0], "gradients of before were not cleared") and not log[1].notes


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_pass_through_the_model_while_nothing_of_it_trains_is_no_part_of_its_step(set_to_none):
    """The step of a generator goes through the discriminator."""
    torch.manual_seed(0)
    generator, discriminator, log = nn.Linear(6, 6), net().eval(), []
    optimizer, (x, y) = torch.optim.SGD(discriminator.parameters(), lr=0.0), batches(1)[0]
    reference = zest_fast.profile(discriminator, (x, y))
    with zest_fast.watch(discriminator, every=1, metrics="all", log=log.append):
        for _ in range(2):
            discriminator.requires_grad_(False)
            loss_of(discriminator, generator(x), y).backward()
            discriminator.requires_grad_(True)
            loss_of(discriminator, x, y).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none)
    assert [(step.step, step.notes) for step in log] == [(0, ()), (1, ())]
    for step in log:
        assert step.profile.loss == pytest.approx(reference.loss, rel=1e-6)
        for metric in reference.metrics:
            assert step.profile.column(metric) == pytest.approx(reference.column(metric), rel=2e-5, abs=1e-9), metric


def test_a_layer_that_is_unfrozen_before_its_step_is_not_said_to_be_frozen():
    model, log = net(), []
    model[0].requires_grad_(False)
    optimizer = sgd(model)
    with zest_fast.watch(model, every=1, frozen=True, log=log.append):
        for i, (x, y) in enumerate(batches(3)):
            model[0].requires_grad_(i > 0)
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            optimizer.step()
    words = [step.profile.info["0"]["note"] for step in log]
    assert "does not train" in words[0] and "frozen when the step before ended" in words[1] and not words[2]


# Histograms


@pytest.mark.parametrize("entries", [[-3e38, 3e38], [-1e300, 0.0, 1e300]])
def test_histograms_of_a_wide_range_hold_every_entry(entries):
    x = torch.tensor(entries, dtype=torch.float32 if max(entries) < 1e39 else torch.float64)
    counts, edges = histogram(x)
    assert counts.sum() == len(entries) and counts[0] == counts[-1] == 1
    assert edges[0] == x[0].item() and edges[-1] == x[-1].item()


# A cache of what is below the cut


def test_passes_by_which_a_cache_is_held_against_the_model_do_not_count(tmp_path):
    """At the first steps the cache runs the model several times within one call of it."""

    def train(cache):
        torch.manual_seed(0)
        model, log = nn.Sequential(*[nn.Linear(6, 6) for _ in range(4)], nn.Linear(6, 3)).eval(), []
        with zest_fast.SelectiveBackward(model, ["2"], cache=cache) as tuned:
            optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
            with zest_fast.watch(model, every=1, metrics="all", frozen=True, log=log.append):
                for _ in range(3):
                    for x, y in batches(2):
                        (loss_of(model, x, y) / 2).backward()
                    optimizer.step()
                    optimizer.zero_grad()
        return log

    for found, plain in zip(train(zest_fast.PrefixCache(tmp_path)), train(None), strict=True):
        for layer in ("2", "3", "4"):
            for metric in plain.profile.metrics:
                expected = float(plain.profile[layer][metric])
                assert float(found.profile[layer][metric]) == pytest.approx(expected, rel=1e-6, nan_ok=True), metric
            assert found.profile.info[layer]["uses"] == 1
        assert math.isnan(found.profile["0"]["act_std"]) and "act" in found.profile.info["0"]["note"]
