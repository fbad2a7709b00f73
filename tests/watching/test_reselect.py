"""Reselect: what trains is exchanged in the model and in the optimizer, or in neither, and a run without exchanges is
that without Reselect."""

from __future__ import annotations

import copy
import itertools
import signal
import warnings

import numpy as np
import pytest
import torch
from small_models import llama
from torch import distributed, multiprocessing, nn

import zest_fast
from zest_fast.finetuning.cut import Cut
from zest_fast.finetuning.selective_backward import SelectiveBackward
from zest_fast.lean.apply import LeanHandle
from zest_fast.watching.reselect import Exchange, Reselect

HIDDEN = ("0", "2", "4", "6")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Order:
    """Scores that go down along the names given; the others are below all of them."""

    def __init__(self, *names):
        self.names = names

    def predict(self, profile):
        return np.array([-self.names.index(n) if n in self.names else -10.0 for n in profile.names], dtype=float)


def net(bias=True):
    sizes = (6, 8, 8, 8, 8)
    hidden = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b, bias=bias), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Dropout(0.3), nn.Linear(8, 3))


def batches(count):
    x = torch.randn(count, 16, 6, generator=torch.Generator().manual_seed(1))
    return [(one, one[:, :3].argmax(1)) for one in x]


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def train(model, optimizer, data, reselect=None, scheduler=None):
    for batch in data:
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        if reselect is not None:
            reselect.step(batch)


def adamw(tuned, **options):
    return torch.optim.AdamW(tuned.parameters(), lr=1e-2, **options)


def lean_of(tuned):
    lean = tuned._lean
    return lean and ({kind: {*names} for kind, names in lean.applied.items()}, dict(lean.skipped))


def states_of(optimizer):
    return [value for p in optimizer.param_groups[0]["params"] for _, value in sorted(optimizer.state[p].items())]


# Without exchanges


@pytest.mark.parametrize("margin", [0.0, 0.25])
def test_a_run_without_exchanges_is_the_run_without_reselect(margin):
    ends = []
    for reselects in (False, True):
        torch.manual_seed(0)
        model = net()
        tuned = SelectiveBackward(model, ["2", "6"])
        optimizer = adamw(tuned)
        reselect = Reselect(tuned, optimizer, every=2, by=Order("2", "6"), margin=margin) if reselects else None
        train(model, optimizer, batches(7), reselect)
        if reselect is not None:
            assert reselect.exchanges == [] and reselect.ranking is not None and reselect.steps == 7
        ends.append([*model.state_dict().values(), *states_of(optimizer), torch.get_rng_state()])
        tuned.verify()
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_better_layer_enters_by_more_than_the_margin_only():
    """Scores 0 .. -3 have a standard deviation of 1.118."""
    for margin, entered in ((0.8, ("0",)), (0.95, ())):
        tuned = SelectiveBackward(net(), ["2"])
        reselect = Reselect(tuned, adamw(tuned), every=1, by=Order(*HIDDEN), margin=margin)
        done = reselect.step(batches(1)[0])
        assert (done.entered if done else ()) == entered and tuned.layers == (entered or ("2",))


def test_the_worst_leaves_for_the_best_and_pairs_end_where_nothing_is_won():
    tuned = SelectiveBackward(net(), ["6", "2"])
    reselect = Reselect(tuned, adamw(tuned), every=1, by=Order("0", "2", "4", "6"), margin=0)
    assert reselect.step(batches(1)[0]) == Exchange(1, ("6",), ("0",))
    assert tuned.layers == ("0", "2") and tuned.former_layers == ()  # it never trained
    assert str(reselect.exchanges[0]) == "step 1: 0 for 6"
    assert reselect.step(batches(1)[0]) is None


def test_layers_without_a_finite_score_stay_where_they_are():
    class Partly:
        def predict(self, profile):
            scores = {"0": np.inf, "2": np.nan, "4": 1.0, "6": 0.0}
            return np.array([scores.get(name, 5.0) for name in profile.names])

    tuned = SelectiveBackward(net(), ["2", "6"])
    reselect = Reselect(tuned, adamw(tuned), every=1, by=Partly(), margin=0)
    assert reselect.step(batches(1)[0]) == Exchange(1, ("6",), ("4",)) and tuned.layers == ("2", "4")


# After an exchange


@pytest.mark.parametrize(("first", "second"), [(["2", "6"], ["4", "6"]), (["6"], ["0"]), (["0"], ["6"])])
@pytest.mark.parametrize("lean", [True, False])
def test_gradients_and_steps_are_those_of_a_fresh_wrapping_from_there(first, second, lean):
    model = net()
    tuned = SelectiveBackward(model, first, lean=lean)
    optimizer = adamw(tuned)
    train(model, optimizer, batches(3))
    tuned.exchange(second)
    other = net()
    other.load_state_dict(model.state_dict())
    fresh = SelectiveBackward(other, second, lean=lean)
    assert tuned.trainable_names == fresh.trainable_names and lean_of(tuned) == lean_of(fresh)
    for one in (model, other):
        torch.manual_seed(7)
        loss_of(one, batches(1)[0]).backward()
    assert tuned.cut == fresh.cut and tuned._cut.skipped == fresh._cut.skipped
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == (name not in tuned.trainable_names), name
        assert p.grad is None or torch.equal(p.grad, q.grad)
        assert p.requires_grad == q.requires_grad == (name in tuned.trainable_names)


@pytest.mark.parametrize("checkpoint", [None, "above-cut"])
def test_the_same_of_a_llama(checkpoint):
    ids = torch.randint(40, (2, 9))
    layers = ["model.layers.2.mlp.gate_proj", "model.layers.1.self_attn.q_proj"]
    lower = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
    model = llama().train()
    tuned = SelectiveBackward(model, layers, checkpoint=checkpoint)
    other = llama().train()
    for chosen in (lower, layers, lower):
        optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        tuned.exchange(chosen)
        other.load_state_dict(model.state_dict())
        with SelectiveBackward(other, chosen, checkpoint=checkpoint) as fresh:
            assert lean_of(fresh) == lean_of(tuned)
            found = []
            for one in (model, other):
                one.zero_grad()
                loss = one(input_ids=ids, labels=ids).loss
                loss.backward()
                found.append([loss.detach(), *(p.grad for p in one.parameters() if p.grad is not None)])
            assert fresh.cut == tuned.cut and len(found[0]) == 3
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
            other.zero_grad()
            model.zero_grad()
    tuned.remove()
    assert all(p.requires_grad for p in model.parameters()) and "forward" not in vars(model)
    assert not any("forward" in vars(module) for module in model.modules())
    assert model.is_gradient_checkpointing is False


def test_the_prefix_cache_learns_the_new_cut(tmp_path):
    torch.manual_seed(0)
    data = [(x, y) for x, y in batches(2)] * 4
    ends = []
    for cached in (False, True):
        torch.manual_seed(0)
        model = net().eval()
        cache = zest_fast.PrefixCache(tmp_path) if cached else None
        tuned = SelectiveBackward(model, ["6"], cache=cache)
        optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for step, batch in enumerate(data):
                if step == 4:
                    tuned.exchange(["4"])
                    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
                if step == 6:  # below it now is what has trained in the meantime
                    tuned.exchange(["6"])
                    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
                loss_of(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
        if cached:
            assert cache.read > 0 and not cache.plain
            assert cache.computed == 3 * 32  # every cut, and the last anew: the weights below it have moved
        ends.append(list(model.state_dict().values()))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)  # kernels round other batch sizes otherwise


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_code_follows(in_place):
    model, plain = net(), net()
    plain.load_state_dict(model.state_dict())
    for one in (model, plain):
        one.eval()
    tuned, other = SelectiveBackward(model, ["6"]), SelectiveBackward(plain, ["6"])
    whole = model if in_place else torch.compile(model, backend="aot_eager")
    for module in model if in_place else ():
        module.compile(backend="aot_eager")
    for layers in (["6"], ["2"], ["4"]):
        tuned.exchange(layers), other.exchange(layers)
        for one in (whole, plain):
            one.zero_grad()
            loss_of(one, batches(1)[0]).backward()
        for name, p in model.named_parameters():
            assert (p.grad is not None) == (name in tuned.trainable_names), name
        for p, q in zip(tuned.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7)


# The optimizer


def groups_of(tuned):
    """The decay of weights, none of biases, another rate for the head."""
    named = dict(zip(tuned.trainable_names, tuned.parameters(), strict=True))
    body = {name: p for name, p in named.items() if not name.startswith("9.")}
    return [
        {"params": [(n, p) for n, p in body.items() if p.dim() > 1], "weight_decay": 0.1, "lr": 1e-2},
        {"params": [(n, p) for n, p in body.items() if p.dim() < 2], "weight_decay": 0.0, "lr": 2e-2},
        {"params": [(n, p) for n, p in named.items() if n.startswith("9.")], "lr": 3e-2},
    ]


def test_a_layer_that_enters_has_the_groups_of_the_one_that_leaves_and_schedules_go_on():
    model = net()
    tuned = SelectiveBackward(model, ["2", "6"])
    optimizer = torch.optim.AdamW(groups_of(tuned))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    reselect = Reselect(tuned, optimizer, every=2, by=Order("0", "2"), margin=0)
    settings = [
        {k: v for k, v in g.items() if k not in ("params", "param_names", "lr")} for g in optimizer.param_groups
    ]
    train(model, optimizer, batches(5), reselect, scheduler)
    assert reselect.exchanges == [Exchange(2, ("6",), ("0",))]
    names = {id(p): n for n, p in model.named_parameters()}
    found = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    assert found == [["2.weight", "0.weight"], ["2.bias", "0.bias"], ["9.weight", "9.bias"]]
    assert [group["param_names"] for group in optimizer.param_groups] == found
    assert [group["lr"] for group in optimizer.param_groups] == [rate * 0.5**5 for rate in (1e-2, 2e-2, 3e-2)]
    assert scheduler.base_lrs == [1e-2, 2e-2, 3e-2]
    assert settings == [
        {k: v for k, v in g.items() if k not in ("params", "param_names", "lr")} for g in optimizer.param_groups
    ]
    assert {names[id(p)] for p in optimizer.state} == set(tuned.trainable_names)
    assert float(optimizer.state[model[0].weight]["step"]) == 3 and float(optimizer.state[model[2].weight]["step"]) == 5
    assert len(optimizer.state_dict()["state"]) == 6  # nothing of what has left
    tuned.summary(optimizer)


def test_a_group_for_each_parameter_and_layers_without_a_bias():
    model = net()
    model[4] = nn.Linear(8, 8, bias=False)
    tuned = SelectiveBackward(model, ["2", "6"])
    optimizer = torch.optim.SGD(
        [{"params": [p], "lr": 0.1 + i} for i, p in enumerate(tuned.parameters())], momentum=0.9
    )
    reselect = Reselect(tuned, optimizer, every=1, margin=0, by="snip")
    names = {id(p): n for n, p in model.named_parameters()}
    placed = lambda: [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]  # noqa: E731
    before = placed()
    assert before[:4] == [["2.weight"], ["2.bias"], ["6.weight"], ["6.bias"]]
    for order, expected in (
        (("2", "4"), [["2.weight"], ["2.bias"], ["4.weight"], []]),
        (("2", "0"), [["2.weight"], ["2.bias"], ["0.weight"], ["0.bias"]]),  # the group that was left empty
        (("6", "0"), [["6.weight"], ["6.bias"], ["0.weight"], ["0.bias"]]),
    ):
        reselect._by = Order(*order)
        train(model, optimizer, batches(1), reselect)
        assert placed()[:4] == expected and placed()[4:] == before[4:]


def test_states_come_back_with_the_layer_where_they_are_kept():
    for states in ("keep", "drop"):
        torch.manual_seed(0)
        model = net()
        tuned = SelectiveBackward(model, ["6"])
        optimizer = adamw(tuned)
        reselect = Reselect(tuned, optimizer, every=3, by=Order("0"), margin=0, states=states)
        train(model, optimizer, batches(2), reselect)
        before = {key: value.clone() for key, value in optimizer.state[model[6].weight].items()}
        loss_of(model, batches(3)[2]).backward()
        left = copy.deepcopy(dict(optimizer.state[model[6].weight]))
        reselect.step(batches(1)[0])  # with gradients in place: those of what leaves go
        assert tuned.layers == ("0",) and model[6].weight.grad is None and model[9].weight.grad is not None
        assert model[6].weight not in optimizer.state
        reselect._by = Order("6")
        train(model, optimizer, batches(3), reselect)
        assert tuned.layers == ("6",) and tuned.former_layers == ("0",)
        found = optimizer.state.get(model[6].weight)
        if states == "drop":
            assert found is None
        else:
            assert all(torch.equal(found[key], left[key]) and torch.equal(left[key], before[key]) for key in before)
        train(model, optimizer, batches(1))
        assert float(optimizer.state[model[6].weight]["step"]) == (3 if states == "keep" else 1)


def test_layers_that_somebody_else_exchanged_are_found_in_their_groups():
    model = net()
    tuned = SelectiveBackward(model, ["6"])
    optimizer = torch.optim.AdamW(groups_of(tuned))
    reselect = Reselect(tuned, optimizer, every=1, by=Order("0"), margin=0)
    tuned.exchange(["2"])
    with pytest.raises(ValueError, match=r"lacks '2\.weight'"):
        reselect.step(batches(1)[0])
    for group, own in zip(optimizer.param_groups, groups_of(tuned), strict=True):
        group["params"][:] = [p for _, p in own["params"]]
        group["param_names"][:] = [name for name, _ in own["params"]]
    assert reselect.step(batches(1)[0]).entered == ("0",)
    assert [group["param_names"][0] for group in optimizer.param_groups] == ["0.weight", "0.bias", "9.weight"]


def test_the_ranker_that_ships_chooses_where_nothing_else_is_said():
    tuned = SelectiveBackward(net(), ["6"])
    reselect = Reselect(tuned, adamw(tuned), every=1, margin=0)
    reselect.step(batches(1)[0])
    assert reselect.ranking.by == "Ranker" and tuned.layers == reselect.ranking.top(1)


# Whole or not at all


def picture(tuned, optimizer):
    model = tuned.model
    return (
        tuned.layers,
        tuned.former_layers,
        tuned.trainable_names,
        [p.requires_grad for p in model.parameters()],
        [[id(p) for p in group["params"]] for group in optimizer.param_groups],
        {id(p): {k: v.clone() for k, v in state.items()} for p, state in optimizer.state.items()}.keys(),
        [None if p.grad is None else p.grad.clone().tolist() for p in model.parameters()],
        lean_of(tuned),
    )


@pytest.mark.parametrize(
    ("place", "name"), [(Cut, "follow"), (LeanHandle, "follow"), (LeanHandle, "put_in"), (Cut, "_plan")]
)
def test_an_error_in_the_middle_leaves_everything_as_it_was(monkeypatch, place, name):
    model = net()
    tuned = SelectiveBackward(model, ["6"])
    optimizer = adamw(tuned)
    reselect = Reselect(tuned, optimizer, every=1, by=Order("0"), margin=0)
    train(model, optimizer, batches(2))
    loss_of(model, batches(1)[0]).backward()
    before = picture(tuned, optimizer)
    original, calls = getattr(place, name), []

    def once(*args):
        calls.append(args)
        if len(calls) == 1:
            raise MemoryError("no room")
        return original(*args)

    monkeypatch.setattr(place, name, once)
    with pytest.raises(MemoryError, match="no room"):
        reselect.step(batches(1)[0])
    assert len(calls) >= 2 and picture(tuned, optimizer) == before and reselect.exchanges == []
    monkeypatch.undo()
    optimizer.zero_grad()
    train(model, optimizer, batches(2), reselect)  # and it goes on
    assert tuned.layers == ("0",) and "(2 that trained" in tuned.verify()


def test_ctrl_c_waits_for_the_end_of_an_exchange(monkeypatch):
    model = net()
    tuned = SelectiveBackward(model, ["6"])
    optimizer = adamw(tuned)
    train(model, optimizer, batches(1))
    reselect = Reselect(tuned, optimizer, every=1, by=Order("0"), margin=0)
    original = Cut.follow

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(Cut, "follow", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reselect.step(batches(1)[0])
    assert tuned.layers == ("0",)
    tuned.summary(optimizer)  # holds what trains, and nothing else
    assert {id(p) for p in optimizer.state} == {id(model[9].weight), id(model[9].bias)}
    train(model, optimizer, batches(1))
    tuned.verify()


# What was trained, once an exchange is over


def exchanged_run():
    model = net()
    base = copy.deepcopy(model)
    tuned = SelectiveBackward(model, ["6"])
    optimizer = adamw(tuned)
    reselect = Reselect(tuned, optimizer, every=2, by=Order("0"), margin=0)
    train(model, optimizer, batches(4), reselect)
    assert tuned.layers == ("0",) and tuned.former_layers == ("6",)
    return base, model, tuned, optimizer


def test_the_delta_holds_every_layer_that_was_ever_trained(tmp_path):
    base, model, tuned, _ = exchanged_run()
    path = tuned.save(tmp_path / "delta.safetensors")
    delta = zest_fast.apply_delta(base, path)
    assert delta.layers == ("0", "6") and set(delta.parameters) == {
        f"{layer}.{name}" for layer in ("0", "6", "9") for name in ("weight", "bias")
    }
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), model.parameters(), strict=True))
    trained = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in (model[0].weight, model[6].weight):
            p.zero_()
    tuned.load(path)
    assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters())
    tuned.verify()


def test_verify_holds_what_left_against_the_moment_that_it_left():
    _, model, tuned, _ = exchanged_run()
    assert "(2 that trained before an exchange: as when they left)" in tuned.verify()
    with torch.no_grad():
        model[6].bias.add_(1)
    with pytest.raises(RuntimeError, match=r"frozen, but changed: '6\.bias'"):
        tuned.verify()
    with torch.no_grad():
        model[6].bias.sub_(1)
        model[2].weight.add_(1)
    with pytest.raises(RuntimeError, match=r"frozen, but changed: .*'2\.weight'"):
        tuned.verify()


def test_verify_right_after_an_exchange_says_that_nothing_was_trained_yet():
    model = net()
    tuned = SelectiveBackward(model, ["6"])
    optimizer = adamw(tuned)
    train(model, optimizer, batches(2))
    tuned.exchange(["0"])
    assert (
        "not trained yet, since there was no backward pass after the exchange: '0.weight', '0.bias'" in tuned.verify()
    )
    loss_of(model, batches(1)[0]).backward()
    with pytest.raises(RuntimeError, match=r"chosen, but did not move .*'0\.weight'"):
        tuned.verify()


def test_a_layer_that_left_without_having_trained_is_not_in_the_delta():
    tuned = SelectiveBackward(net(), ["6"])
    tuned.exchange(["4"]).exchange(["2"])
    assert tuned.former_layers == () and tuned.layers == ("2",)


def test_former_layers_are_known_after_parameters_were_replaced(tmp_path):
    base, model, tuned, _ = exchanged_run()
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    tuned.exchange(["2"])
    assert set(tuned.former_layers) == {"0", "6"} and not model[6].weight.requires_grad
    zest_fast.apply_delta(base, tuned.save(tmp_path / "delta.safetensors"))
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), model.parameters(), strict=True))


def test_what_a_run_file_could_not_give_back_is_not_written(tmp_path):
    _, _, tuned, optimizer = exchanged_run()
    with pytest.raises(RuntimeError, match=r"save_run: '6' trained before an exchange"):
        tuned.save_run(tmp_path / "run.pt", optimizer)
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="resume: layers were exchanged"):
        tuned.resume(tmp_path / "run.pt", optimizer)


def test_the_weights_in_low_precision_that_moved_are_counted_of_all_that_trained():
    model = net().bfloat16()
    tuned = SelectiveBackward(model, ["6"], head=None)
    for layers in (["6"], ["0"]):
        tuned.exchange(layers)
        optimizer = torch.optim.SGD(tuned.parameters(), lr=10.0)
        nn.functional.cross_entropy(model(batches(1)[0][0].bfloat16()).float(), batches(1)[0][1]).backward()
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned.verify()


# Refused


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"every": 0}, ValueError, "every=0"),
        ({"every": True}, ValueError, "every=True"),
        ({"margin": -1.0}, ValueError, "margin=-1.0"),
        ({"margin": float("nan")}, ValueError, "margin=nan"),
        ({"states": "reset"}, ValueError, "states must be 'drop' or 'keep'"),
        ({"by": 3}, TypeError, "by must be a metric name"),
        ({"batch": (1, 2), "closure": lambda: None}, ValueError, "batch and closure were both given"),
    ],
)
def test_arguments_that_do_not_fit(changes, error, message):
    tuned = SelectiveBackward(net(), ["6"])
    with pytest.raises(error, match=message):
        Reselect(tuned, adamw(tuned), **changes)


def test_steps_without_a_batch_are_refused_at_the_first():
    tuned = SelectiveBackward(net(), ["6"])
    with pytest.raises(ValueError, match="no batch to profile"):
        Reselect(tuned, adamw(tuned), every=100).step()


def test_a_fixed_batch_or_a_closure_stands_for_the_batch():
    fixed = batches(1)[0]
    for options in ({"batch": fixed}, {"closure": True}):
        model = net()
        tuned = SelectiveBackward(model, ["6"])
        if "closure" in options:
            options = {"closure": lambda model=model: loss_of(model, fixed)}
        reselect = Reselect(tuned, adamw(tuned), every=1, by=Order("0"), margin=0, **options)
        assert reselect.step() == Exchange(1, ("6",), ("0",))


@pytest.mark.parametrize("kind", ["LBFGS", "Adagrad", "Muon"])
def test_optimizers_that_take_no_new_parameters_are_named(kind):
    tuned = SelectiveBackward(net(bias=False), ["6"], head=None)
    with pytest.raises(NotImplementedError, match=f"optimizer: {kind}"):
        Reselect(tuned, getattr(torch.optim, kind)(tuned.parameters()))


def test_optimizers_that_would_go_astray_are_named():
    class ScheduleFree(torch.optim.SGD):
        def train(self): ...

        def eval(self): ...

    model = net()
    tuned = SelectiveBackward(model, ["6"])
    with pytest.raises(NotImplementedError, match="ScheduleFree keeps other weights"):
        Reselect(tuned, ScheduleFree(tuned.parameters(), lr=0.1))
    with pytest.raises(NotImplementedError, match="MasterWeights holds a float32 master"):
        Reselect(tuned, zest_fast.MasterWeights(tuned.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"lacks '6\.weight'"):
        Reselect(tuned, torch.optim.SGD(model[9].parameters(), lr=0.1))
    with pytest.raises(ValueError, match="which are frozen"):
        Reselect(tuned, torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer = adamw(tuned)
    reselect = Reselect(tuned, optimizer, every=1)
    with (
        zest_fast.optimizer_in_backward(optimizer),
        pytest.raises(NotImplementedError, match=r"'6\.weight' is stepped within the backward pass"),
    ):
        reselect.step(batches(1)[0])
    assert tuned.layers == ("6",)


def test_models_that_cannot_exchange_are_named():
    pytest.importorskip("zest_fast._native")
    tuned = SelectiveBackward(net(), ["6"], frozen="int8")
    with pytest.raises(NotImplementedError, match="frozen='int8'"):
        Reselect(tuned, adamw(tuned))
    tuned = SelectiveBackward(net(), ["6"])
    reselect = Reselect(tuned, adamw(tuned), every=1)
    tuned.model[4].register_forward_hook(lambda *_: tuned.exchange(["0"]))
    with pytest.raises(RuntimeError, match="within a forward pass"):
        tuned.model(batches(1)[0][0])
    tuned.remove()
    with pytest.raises(RuntimeError, match="not wrapped any more"):
        reselect.step(batches(1)[0])
    with pytest.raises(ValueError, match="nothing to exchange"):
        headed = SelectiveBackward(net(), [])
        Reselect(headed, adamw(headed))


def test_unknown_layers_change_nothing():
    tuned = SelectiveBackward(net(), ["6"])
    with pytest.raises(ValueError, match=r"no layer '7\.weight'"):
        tuned.exchange(["7.weight"])
    assert tuned.layers == ("6",) and tuned.trainable_names[0] == "6.weight"


def test_a_weight_that_is_tied_to_the_head_never_enters():
    model = llama(tie_word_embeddings=True)
    tuned = SelectiveBackward(model, ["model.layers.2.mlp.up_proj"], head="lm_head")
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
    ids = torch.randint(40, (2, 9))
    names = ("lm_head", "model.embed_tokens", "model.layers.0.mlp.up_proj")
    reselect = Reselect(tuned, optimizer, every=1, by=Order(*names), margin=0, batch={"input_ids": ids, "labels": ids})
    assert reselect.step().entered == ("model.layers.0.mlp.up_proj",)


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")
def test_several_processes_are_refused(tmp_path):
    multiprocessing.spawn(refused_in_a_process, (str(tmp_path),), nprocs=2)


def refused_in_a_process(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        tuned = SelectiveBackward(net(), ["6"])
        with pytest.raises(NotImplementedError, match="one of 2 processes"):
            Reselect(tuned, adamw(tuned))
    finally:
        distributed.destroy_process_group()


# Beside a watch


def test_a_watch_follows_an_exchange_and_sees_none_of_the_profiles():
    model = net()
    tuned = SelectiveBackward(model, ["6"])
    optimizer = adamw(tuned)
    reselect = Reselect(tuned, optimizer, every=2, by=Order("0"), margin=0)
    logged = []
    with zest_fast.watch(model, every=1, metrics="all", log=logged.append):
        train(model, optimizer, batches(4), reselect)
    assert [step.step for step in logged] == [0, 1, 2, 3]
    trained = [{n for n in step.profile.names if np.isfinite(step.profile[n]["grad_norm"])} for step in logged]
    assert trained == [{"6", "9"}, {"6", "9"}, {"9"}, {"0", "9"}]
    assert logged[2].notes == ("6: no gradient reached it",)  # the watch of a step begins where the one before ends
    assert any("watched from this step on: 0" in note for note in logged[3].notes)
