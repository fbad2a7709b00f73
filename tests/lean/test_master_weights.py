"""Float32 masters against a float32 optimizer beside the model: the same bits, in every loop that takes them."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings

import pytest
import torch
from torch import nn

from zest_fast import MasterWeights, SelectiveBackward, adamw, optimizer_in_backward, plan
from zest_fast.planning.optimizers import EightBitAdamW

LOW = [torch.bfloat16, torch.float16]
RATE = 2e-5  # of the README


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small(dtype=torch.bfloat16):
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model.to(dtype)


def batches(dtype=torch.bfloat16, count=6):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 32, generator=generator).to(dtype) for _ in range(count)]


def loss_of(model, x):
    return model(x).float().square().mean() + model(x).float().mean()


class Beside:
    """What is expected: a plain optimizer of float32 copies, whose rounded values are written into the model."""

    def __init__(self, parameters, kind, **options):
        self.parameters = list(parameters)
        self.copies = [nn.Parameter(p.detach().float().clone()) for p in self.parameters]
        self.optimizer = kind(self.copies, **options)

    @torch.no_grad()
    def step(self):
        for parameter, copied in zip(self.parameters, self.copies, strict=True):
            copied.grad = parameter.grad.float()
        self.optimizer.step()
        for parameter, copied in zip(self.parameters, self.copies, strict=True):
            parameter.copy_(copied)

    def zero_grad(self):
        for parameter in self.parameters:
            parameter.grad = None


KINDS = [
    (torch.optim.AdamW, {"lr": RATE, "foreach": False}),
    (torch.optim.Adam, {"lr": 1e-3, "amsgrad": True}),
    (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True}),
    (torch.optim.RMSprop, {"lr": 1e-4, "centered": True}),
    (torch.optim.Adafactor, {"lr": 1e-3}),  # not of those that are stepped one by one
]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_bit_for_bit_a_float32_optimizer_beside_the_model(kind, options, dtype):
    one, other = small(dtype), small(dtype)
    other.load_state_dict(one.state_dict())
    ours, theirs = MasterWeights(one.parameters(), kind, **options), Beside(other.parameters(), kind, **options)
    for x in batches(dtype):
        for model, optimizer in ((one, ours), (other, theirs)):
            loss_of(model, x).backward()
            optimizer.step()
            optimizer.zero_grad()
    for a, b, copied in zip(one.parameters(), other.parameters(), theirs.copies, strict=True):
        assert a.dtype == dtype and torch.equal(a, b)
        assert torch.equal(ours.master_of(a), copied) and torch.equal(a, ours.master_of(a).to(dtype))
    assert all(parameter.grad is None for parameter in ours.inner.param_groups[0]["params"])


def test_every_weight_moves_where_a_third_did_in_bfloat16():
    moved = {}
    for name, build in (("plain", torch.optim.AdamW), ("masters", MasterWeights)):
        model = small()
        tuned = SelectiveBackward(model, ["2"], head="4")
        optimizer = build(tuned.parameters(), lr=RATE)
        before = [p.detach().float().clone() for p in tuned.parameters()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for x in batches(count=20):
                loss_of(model, x).backward()
                optimizer.step()
                optimizer.zero_grad()
        held = optimizer.master_of if name == "masters" else lambda parameter: parameter.float()
        apart = [(held(p) != b).flatten() for p, b in zip(tuned.parameters(), before, strict=True)]
        moved[name] = float(torch.cat(apart).float().mean())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert tuned.verify().startswith("verified")
            summary = tuned.summary(optimizer)
        assert bool(caught) == (name == "plain") == bool(summary.rounding)
        tuned.remove()
    assert moved["masters"] == 1.0 and moved["plain"] < 0.6, moved


def test_many_small_steps_arrive_where_float32_arrives():
    """Steps of 1e-5 in one direction: in bfloat16 alone a weight of 1.0 never moves."""
    weight = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = MasterWeights([weight], torch.optim.SGD, lr=1e-5)
    for _ in range(2000):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert torch.allclose(weight.float(), torch.full((8,), 0.98), atol=2**-9)  # half of a last digit below 1


def test_parameters_of_other_types_are_stepped_as_they_are():
    model = nn.Sequential(nn.Linear(32, 32).bfloat16(), nn.Linear(32, 4))
    plain = copy.deepcopy(model)
    x = batches()[0]
    ours, theirs = MasterWeights(model.parameters(), lr=1e-3), torch.optim.AdamW(plain.parameters(), lr=1e-3)
    for one, optimizer in ((model, ours), (plain, theirs)):
        one[1](one[0](x).float()).square().mean().backward()
        optimizer.step()
    assert torch.equal(model[1].weight, plain[1].weight) and ours.master_of(model[1].weight) is model[1].weight
    assert ours.master_bytes == 4 * (32 * 32 + 32)
    with pytest.raises(KeyError):
        ours.master_of(torch.ones(2, dtype=torch.bfloat16))


def test_groups_schedulers_and_named_parameters():
    model = small()
    named = list(model.named_parameters())
    groups = [{"params": named[:2], "lr": 1e-2, "weight_decay": 0.0}, {"params": named[2:]}]
    optimizer = MasterWeights(groups, torch.optim.AdamW, lr=1e-3)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-3]
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias"]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    loss_of(model, batches()[0]).backward()
    optimizer.step()
    scheduler.step()
    after = copy.deepcopy(model.state_dict())
    masters = [optimizer.master_of(p).clone() for p in model.parameters()]
    loss_of(model, batches()[1]).backward()
    optimizer.step()  # at a rate of 0
    assert all(torch.equal(after[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(a, optimizer.master_of(p)) for a, p in zip(masters, model.parameters(), strict=True))
    extra = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer.add_param_group({"params": [("extra", extra)], "lr": 0.5})
    extra.grad = torch.ones_like(extra)
    optimizer.step()
    assert (extra != 1).all() and len(optimizer.inner.param_groups) == 3
    assert all(group["lr"] == rate for group, rate in zip(optimizer.param_groups, (0.0, 0.0, 0.5), strict=True))


def test_in_the_backward_pass():
    one, other = small(), small()
    other.load_state_dict(one.state_dict())
    ours, theirs = MasterWeights(one.parameters(), lr=RATE), MasterWeights(other.parameters(), lr=RATE)
    with optimizer_in_backward(ours):
        for x in batches():
            loss_of(one, x).backward()
            ours.step()
            loss_of(other, x).backward()
            theirs.step()
            theirs.zero_grad()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert a.grad is None and torch.equal(ours.master_of(a), theirs.master_of(b))


def test_what_somebody_else_writes_into_a_weight_is_taken_over():
    model = small()
    weight = model[0].weight
    nn.init.uniform_(weight, 0.01, 0.02)
    optimizer = MasterWeights(model.parameters(), torch.optim.SGD, lr=0.0)
    optimizer.master_of(weight).data += 1e-6  # below a last digit: the weight is still what it rounds to
    master = optimizer.master_of(weight).clone()
    assert torch.equal(master.bfloat16(), weight) and not torch.equal(master, weight.float())
    with torch.no_grad():
        weight[0] = 3.0
        weight[1, 1] = float("nan")
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert (weight[0] == 3.0).all() and weight[1, 1].isnan()
    now = optimizer.master_of(weight)
    assert torch.equal(now[2:], master[2:]) and (now[0] == 3.0).all()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adafactor])
def test_states_are_put_back_to_the_bit(kind, tmp_path):
    model = small()
    optimizer = MasterWeights(model.parameters(), kind, lr=RATE)
    first, second = batches()[:3], batches()[3:]
    for x in first:
        loss_of(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again = small()
    again.load_state_dict(saved["model"])
    other = MasterWeights(again.parameters(), kind, lr=1.0)
    other.load_state_dict(saved["optimizer"])
    assert other.param_groups[0]["lr"] == RATE
    for x in second:
        for one, its in ((model, optimizer), (again, other)):
            loss_of(one, x).backward()
            its.step()
            its.zero_grad()
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(optimizer.master_of(a), other.master_of(b)) and torch.equal(a, b)


def test_states_that_do_not_fit_change_nothing():
    model = small()
    optimizer = MasterWeights(model.parameters(), lr=RATE)
    loss_of(model, batches()[0]).backward()
    optimizer.step()
    good = copy.deepcopy(optimizer.state_dict())
    plain = torch.optim.AdamW(model.parameters(), lr=1.0)
    plain.step()
    lost = copy.deepcopy(good)
    lost["state"][0]["master"] = lost["state"][0]["master"][:3]
    fewer = MasterWeights(list(model.parameters())[:2], lr=1.0).state_dict()
    for state, message in (
        (plain.state_dict(), "has no float32 master"),
        (lost, "has no float32 master of shape"),
        (fewer, "other numbers of parameters"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
    now = optimizer.state_dict()
    assert str(now) == str(good)


def test_a_run_is_resumed_with_its_masters(tmp_path):
    def job():
        torch.manual_seed(3)
        model = small()
        tuned = SelectiveBackward(model, ["2"], head="4")
        return model, tuned, MasterWeights(tuned.parameters(), lr=RATE)

    def train(model, optimizer, data):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for x in data:
                loss_of(model, x).backward()
                optimizer.step()
                optimizer.zero_grad()

    model, tuned, optimizer = job()
    train(model, optimizer, batches()[:3])
    path = tuned.save_run(tmp_path / "run.pt", optimizer, progress={"step": 3})
    train(model, optimizer, batches()[3:])
    fresh, again, other = job()
    assert again.resume(path, other) == {"step": 3}
    train(fresh, other, batches()[3:])
    for a, b in zip(tuned.parameters(), again.parameters(), strict=True):
        assert torch.equal(optimizer.master_of(a), other.master_of(b)) and torch.equal(a, b)
    plain = torch.optim.AdamW(again.parameters(), lr=RATE)
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(ValueError, match="the optimizer was a MasterWeights, and here is a AdamW"):
        again.resume(path, plain)
    assert all(torch.equal(before[name], value) for name, value in fresh.state_dict().items())


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_hold_masters_of_their_own(how):
    model = small()
    optimizer = MasterWeights(model.parameters(), lr=1e-2)
    model2, optimizer2 = how((model, optimizer))
    for x in batches()[:2]:
        for one, its in ((model, optimizer), (model2, optimizer2)):
            loss_of(one, x).backward()
            its.step()
            its.zero_grad()
    for a, b in zip(model.parameters(), model2.parameters(), strict=True):
        assert torch.equal(a, b) and optimizer.master_of(a) is not optimizer2.master_of(b)
        assert torch.equal(optimizer.master_of(a), optimizer2.master_of(b))


def test_an_error_in_the_step_leaves_the_groups_as_they_were():
    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("broken")

    model = small()
    optimizer = MasterWeights(model.parameters(), Broken, lr=1.0)
    groups = optimizer.inner.param_groups
    loss_of(model, batches()[0]).backward()
    with pytest.raises(RuntimeError, match="broken"):
        optimizer.step()
    assert optimizer.inner.param_groups is groups
    assert all(optimizer.master_of(p).grad is None for p in model.parameters())


def test_closures_and_what_is_refused():
    model = small()
    optimizer = MasterWeights(model.parameters(), lr=RATE)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, batches()[0])
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    with pytest.raises(ValueError, match="LBFGS"):
        MasterWeights(small().parameters(), torch.optim.LBFGS)
    with pytest.raises(TypeError, match="not a list"):
        MasterWeights(small().parameters(), lambda parameters: list(parameters))
    with pytest.raises(ValueError, match="there are none"):
        MasterWeights([], lr=1.0)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adamw-in-backward"])
def test_the_plan_counts_them(optimizer):
    """Masters take 4 bytes for each weight that trains, and states are float32; in float32 there are none."""
    from zest_fast.benchmarking.models import bert
    from zest_fast.benchmarking.real_steps import counted_step

    model, batch = bert(2, 64, num_hidden_layers=2, vocab_size=500)
    layers = ["bert.encoder.layer.1.output.dense"]
    name, _, how = optimizer.partition("-")
    masters = f"{name}-masters{'-' if how else ''}{how}"
    sizes = {"batch_size": 2, "sequence_length": 64}
    plain, ours = (plan(model, layers, **sizes, dtype="bfloat16", optimizer=o) for o in (optimizer, masters))
    assert ours.breakdown["optimizer"] >= plain.breakdown["optimizer"] + 4 * ours.trainable_parameters
    same = [
        plan(model, layers, **sizes, dtype="float32", optimizer=o).breakdown["weights"] for o in (optimizer, masters)
    ]
    assert same[0] == same[1]
    if not how:
        low = model.bfloat16()
        build = adamw if name == "adamw" else torch.optim.SGD
        counted = counted_step(low, batch, layers, lambda p: MasterWeights(p, build, lr=1e-3))
        assert plan(
            low, layers, **sizes, dtype=None, optimizer=lambda p: MasterWeights(p, build, lr=1e-3)
        ).peak_bytes == (pytest.approx(counted, rel=0.02))


def test_the_first_step_of_a_loop_of_ones_own_says_what_was_rounded_away():
    model = small()
    tuned = SelectiveBackward(model, ["2"], head="4")
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=RATE)
    with pytest.warns(
        UserWarning, match=r"the first step: .*cannot move at a learning rate of 2e-05.*MasterWeights"
    ) as caught:
        for x in batches():
            loss_of(model, x).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(caught) == 1  # once
    tuned.remove()


@pytest.mark.parametrize("how", ["float32", "masters", "rate", "summary", "removed", "another", "copied"])
def test_nothing_is_said_where_there_is_nothing_to_say(how):
    model = small(torch.float32 if how == "float32" else torch.bfloat16)
    tuned = SelectiveBackward(model, ["2"], head="4")
    rate = 0.1 if how == "rate" else RATE
    held = small().parameters() if how == "another" else tuned.parameters()
    optimizer = MasterWeights(held, lr=rate) if how == "masters" else torch.optim.AdamW(held, lr=rate)
    if how == "summary":
        with pytest.warns(UserWarning):
            tuned.summary(optimizer)
    if how == "removed":
        tuned.remove()
    if how == "copied":  # has no optimizer of its own
        optimizer = torch.optim.AdamW(copy.deepcopy(model)[2].parameters(), lr=rate)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(model, batches(model[0].weight.dtype)[0]).backward()
        optimizer.step()
    tuned.remove()


def test_no_hook_is_left_behind():
    from torch.optim import optimizer as hooks

    def count():
        return len(hooks._global_optimizer_post_hooks)

    gc.collect()
    SelectiveBackward(small(), ["2"], head="4").remove()  # takes out those of models that are gone
    before = count()
    tuned = SelectiveBackward(small(), ["2"], head="4")
    assert count() == before + 1
    tuned.remove()
    assert count() == before
    lost = SelectiveBackward(small(), ["2"], head="4")
    assert count() == before + 1
    del lost
    gc.collect()
    other = nn.Parameter(torch.ones(1))
    other.grad = torch.ones(1)
    torch.optim.SGD([other], lr=0.1).step()  # the hook of a model that is gone says nothing
    with SelectiveBackward(small(), ["2"], head="4"):
        assert count() == before + 1  # and is taken out when another is put in
    SelectiveBackward(small(torch.float32), ["2"], head="4")
    assert count() == before  # there is nothing to wait for


def test_eight_bit_states_of_the_plan_take_masters_too():
    optimizer = MasterWeights(small().parameters(), EightBitAdamW)
    assert optimizer.master_bytes == 4 * sum(p.numel() for p in small().parameters())
