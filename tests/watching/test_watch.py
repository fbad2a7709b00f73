"""`zest_fast.watch` in loops of every kind: bit-equal to none, right where it can be, said where it cannot."""

from __future__ import annotations

import math
import signal
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.optim import optimizer as global_hooks
from torch.utils.checkpoint import checkpoint
from training_loops import LOOPS, batches, loss_of, net
from untouched import bits, changes, state_of

import zest_fast
from zest_fast.profiling.engine import Watching
from zest_fast.watching import loss_scales

EVERYTHING = {"metrics": "all", "parts": True, "histograms": True, "updates": True, "noise": True}


def left_by(train, model, watched=None):
    """All that training leaves: weights, gradients, optimizer states, random state."""
    torch.manual_seed(3)
    optimizers = train(model, watched)
    left = [bits(p) for p in model.parameters()]
    left += [b"" if p.grad is None else bits(p.grad) for p in model.parameters()]
    for optimizer in optimizers:
        for state in optimizer.state_dict()["state"].values():
            left += [bits(v) if isinstance(v, torch.Tensor) else repr(v) for v in state.values()]
    return [*left, bits(torch.get_rng_state())]


def watched_run(name, every=1, **options):
    model, log = net(), []
    with zest_fast.watch(model, every=every, log=log.append, **options) as watched:
        left_by(LOOPS[name], model, watched)
    return log, watched


def hooks_of_optimizers():
    """Of all optimizers: a SelectiveBackward of another test may have one, too."""
    return {*global_hooks._global_optimizer_pre_hooks, *global_hooks._global_optimizer_post_hooks}


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("name", LOOPS)
def test_training_is_bit_equal_and_nothing_stays(name, every):
    alone, model = left_by(LOOPS[name], net()), net()
    before = state_of(model)
    scale, hooks = torch.amp.GradScaler.scale, hooks_of_optimizers()
    with zest_fast.watch(model, every=every, **EVERYTHING) as watched:
        assert hooks_of_optimizers() != hooks
        assert left_by(LOOPS[name], model, watched) == alone
    assert watched.last is not None
    left = [label for label in changes(before, state_of(model)) if "bits" not in label and "gradient" not in label]
    assert left == ["random state"]
    assert hooks_of_optimizers() == hooks
    assert not Watching._spectators and not loss_scales._listeners
    assert torch.amp.GradScaler.scale is scale


STEPS = {
    "accumulated_clipped_and_scheduled": [0, 1, 2],
    "scaled_with_overflow": [0, 0, 1, 2, 2, 3],
    "skipped_by_the_user": [0, 1, 2, 2, 3],
    "plain": [0, 1, 2, 3, 4],
}


@pytest.mark.parametrize("name", LOOPS)
def test_steps_are_counted_once(name):
    log, watched = watched_run(name)
    assert [step.step for step in log] == STEPS.get(name, [0, 1, 2, 3])
    assert watched.steps == max(step.step for step in log) + 1
    log, _ = watched_run(name, every=2)
    assert [step.step for step in log] == [step for step in STEPS.get(name, [0, 1, 2, 3]) if step % 2 == 0]


def test_overflow_is_marked_and_scales_are_taken_off():
    log, _ = watched_run("scaled_with_overflow", metrics="all")
    assert [step.overflow for step in log] == [True, False, False, True, False, False]
    model = net()
    torch.manual_seed(3)
    model(torch.randn(0, 6))
    scaled, plain = log[1].profile, None
    found = []
    other = net()
    with zest_fast.watch(other, every=1, metrics="all", log=found.append):
        torch.manual_seed(3)
        optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2)
        for i, (x, y) in enumerate(batches(6)):
            loss = loss_of(other, x, y)
            if i in (0, 3):
                continue  # the same random numbers, and no step
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(other.parameters(), 1.0)
            optimizer.step()
    plain = found[0].profile
    assert scaled.loss == pytest.approx(plain.loss, rel=1e-6)
    for metric in plain.metrics:
        assert scaled.column(metric) == pytest.approx(plain.column(metric), rel=1e-4, abs=1e-9), metric


def test_a_scaler_that_is_handed_over_is_taken():
    class Scaler:
        def get_scale(self):
            return 8.0

    model, (x, y) = net().eval(), batches(1)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reference = zest_fast.profile(model, (x, y))
    with zest_fast.watch(model, every=1, grad_scaler=Scaler(), metrics="all") as watched:
        (8 * loss_of(model, x, y)).backward()
        optimizer.step()
    for metric in reference.metrics:
        assert watched.last.profile.column(metric) == pytest.approx(reference.column(metric), rel=2e-5, abs=1e-9)


def test_different_scales_within_a_step_are_said():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    (x, y), (x2, y2) = batches(2)
    with zest_fast.watch(model, every=1) as watched:
        loss_of(model, x, y).backward()
        scaler.scale(loss_of(model, x2, y2)).backward()
        optimizer.step()
    assert all(map(math.isnan, watched.last.profile.column("grad_norm")))
    assert any("different loss scales" in note for note in watched.last.notes)


def conv_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 3)
    )


class Twice(nn.Module):
    """A layer that is used twice, and one whose weight is another's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.c.weight = self.b.weight

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))))


MODELS = {
    "dense": (lambda: net().eval(), (torch.randn(12, 6), torch.arange(12) % 3)),
    "convolutions": (conv_net, (torch.randn(12, 2, 6, 6), torch.arange(12) % 3)),
    "used_twice_and_tied": (Twice, (torch.randn(12, 6), torch.arange(12) % 6)),
}


@pytest.mark.parametrize("order", ["one after another", "forwards first"])
@pytest.mark.parametrize("name", MODELS)
def test_micro_batches_are_one_batch(name, order):
    make, (x, y) = MODELS[name]
    model = make()
    reference = zest_fast.profile(model, (x, y))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    parts = list(zip(x.split(4), y.split(4), strict=True))
    with zest_fast.watch(model, every=1, metrics="all", parts=True) as watched:
        if order == "forwards first":
            for loss in [loss_of(model, *part) / 3 for part in parts]:
                loss.backward()
        else:
            for part in parts:
                (loss_of(model, *part) / 3).backward()
        optimizer.step()
    step = watched.last
    assert not step.notes and step.profile.names == reference.names
    assert step.profile.loss == pytest.approx(reference.loss, rel=1e-6)
    for metric in reference.metrics:
        assert step.profile.column(metric) == pytest.approx(reference.column(metric), rel=2e-5, abs=1e-8), metric
    for part, of_part in zip(parts, step.parts, strict=True):
        alone = zest_fast.profile(model, closure=lambda part=part: loss_of(model, *part) / 3)
        assert len(of_part.metrics) == 10
        for metric in of_part.metrics:
            assert of_part.column(metric) == pytest.approx(alone.column(metric), rel=2e-5, abs=1e-8), metric


def test_gradients_are_those_before_clipping():
    log, _ = watched_run("accumulated_clipped_and_scheduled")
    assert log[0].totals["grad_norm"] > 0.11  # clipped to 0.1
    assert log[0].totals["grad_norm"] == pytest.approx(math.hypot(*log[0].profile.column("grad_norm")))


def test_what_is_not_part_of_the_step_does_not_count():
    """Validation, forwards without a backward pass, a profile, a backward pass that failed."""
    reference, _ = watched_run("validated_in_between", metrics="all", every=4)
    model, (x, y) = net(), batches(4)[0]
    torch.manual_seed(3)
    model.eval()(100 * x)
    expected = zest_fast.profile(model.train(), (x, y))  # the same mask of dropout: eval draws none
    for metric in expected.metrics:
        assert reference[0].profile.column(metric) == pytest.approx(expected.column(metric), rel=2e-5), metric
    again, _ = watched_run("profiled_in_between", metrics="all", every=4)
    assert reference[0].profile.loss == pytest.approx(again[0].profile.loss)
    assert (reference[0].profile.column("act_std") == again[0].profile.column("act_std")).all()
    failed, _ = watched_run("out_of_memory_and_tried_again", metrics="all")
    assert any("a backward pass of this step failed" in note for note in failed[1].notes)
    assert "failed" not in " ".join(failed[2].notes)


def test_two_backward_passes_through_one_graph_say_so():
    log, _ = watched_run("two_losses_with_a_retained_graph", metrics="all")
    assert all(map(math.isnan, log[0].profile.column("fisher")))
    assert not any(map(math.isnan, log[0].profile.column("act_mean")))
    assert any("two backward passes went through one output" in note for note in log[0].notes)


@pytest.mark.parametrize("name", ["in_backward", "in_backward_as_torch_has_it", "with_a_closure", "by_hand"])
def test_gradients_are_the_same_wherever_the_step_is_taken(name):
    (first, *_), _ = watched_run(name, metrics="all")
    (plain, *_), _ = watched_run("two_optimizers", metrics="all")
    for metric in plain.profile.metrics:
        assert first.profile.column(metric) == pytest.approx(plain.profile.column(metric), rel=1e-5), metric


def test_gradients_assigned_by_hand_are_read_and_said():
    log, _ = watched_run("gradients_assigned_by_hand")
    plain, _ = watched_run("two_optimizers")
    assert log[0].profile.column("grad_norm") == pytest.approx(plain[0].profile.column("grad_norm"), rel=1e-6)
    assert any("no backward pass was seen" in note for note in log[0].notes)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize(
    "name",
    ["plain", "in_backward", "in_backward_as_torch_has_it", "two_optimizers", "with_a_closure", "by_hand"],
)
def test_update_ratios(name, every):
    model, found = net(), []
    ratios = []

    def note(step):
        found.append(step)
        now = [model[i].weight.detach().clone() for i in (0, 3, 5)]
        moved = [float((a - b).double().norm() / b.double().norm()) for a, b in zip(now, before, strict=True)]
        before[:] = now
        ratios.append(moved)

    before = [model[i].weight.detach().clone() for i in (0, 3, 5)]
    with zest_fast.watch(model, every=1, log=note) as watched:
        left_by(LOOPS[name], model, watched)
    found, model = [], net()
    with zest_fast.watch(model, every=every, updates=True, log=found.append) as watched:
        left_by(LOOPS[name], model, watched)
    for step, expected in zip(found, ratios[::every], strict=True):
        column = step.profile.column("update_ratio")
        if name == "by_hand":
            assert all(map(math.isnan, column)) and any("update_ratio undefined" in note for note in step.notes)
        else:
            assert column == pytest.approx(expected, rel=1e-5)


def test_histograms_hold_every_entry():
    log, _ = watched_run("accumulated_clipped_and_scheduled", histograms=True)
    for name, found in log[1].histograms.items():
        numel = log[1].profile.info[name]["numel"]
        assert found.keys() == {"weight", "gradient"}
        for counts, edges in found.values():
            assert counts.sum() == numel and len(edges) == len(counts) + 1


def test_frozen_layers_have_rows_on_request():
    model = net().eval()
    model[:4].requires_grad_(False)
    model[0].requires_grad_(True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    x, y = batches(1)[0]
    reference = zest_fast.profile(model, (x, y))
    for frozen in (False, True):
        with zest_fast.watch(model, every=1, metrics="all", frozen=frozen) as watched:
            loss_of(model, x, y).backward()
            optimizer.step()
        profile = watched.last.profile
        assert profile.names == (["0", "3", "5"] if frozen else ["0", "5"])
        for name in profile.names:
            for metric in ("act_mean", "act_std", "fisher", "weight_std"):
                assert profile[name][metric] == pytest.approx(reference[name][metric], rel=2e-5), (name, metric)
        assert not frozen or math.isnan(profile["3"]["grad_norm"])
        assert frozen or profile.uncovered["3.weight"].startswith("it does not train")
        optimizer.zero_grad()


def test_below_the_cut_fisher_is_undefined_by_name():
    model = net().eval()
    model[:5].requires_grad_(False)
    optimizer = torch.optim.SGD(model[5].parameters(), lr=0.1)
    x, y = batches(1)[0]
    with zest_fast.watch(model, every=1, metrics="all", frozen=True) as watched:
        loss_of(model, x, y).backward()
        optimizer.step()
    profile = watched.last.profile
    assert math.isnan(profile["0"]["fisher"]) and profile["0"]["act_std"] > 0
    assert "not part of the graph" in profile.info["0"]["note"]


def test_a_sink_that_fails_is_said_once_and_counted():
    model, got = net(), []

    def broken(step):
        raise OSError("no space left on device")

    with (
        pytest.warns(RuntimeWarning, match=r"log: .*broken failed at step 0 \(OSError: no space") as said,
        zest_fast.watch(model, every=1, log=[broken, got.append]) as watched,
    ):
        left_by(LOOPS["plain"], model)
    assert len(said) == 1 and watched.failures == 5 and len(got) == 5


def test_refusals_name_what_is_wrong():
    model = net()
    with pytest.raises(ValueError, match=r"metrics: grasp, synflow take passes of their own"):
        zest_fast.watch(model, metrics=["grasp", "synflow"])
    with pytest.raises(ValueError, match="every is 0"):
        zest_fast.watch(model, every=0)
    with pytest.raises(TypeError, match="model is a Linear"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn, "Module", nn.Conv2d)
        zest_fast.watch(model[0])
    with pytest.raises(TypeError, match="log: 3 is no sink"):
        zest_fast.watch(model, log=3)
    with pytest.raises(TypeError, match="grad_scaler is a str"):
        zest_fast.watch(model, grad_scaler="scaler")
    with pytest.raises(ValueError, match="samples is 0"):
        zest_fast.watch(model, samples=0)
    with pytest.raises(ValueError, match="no layer is named 'x'"):
        zest_fast.watch(model, layers=["x"])
    with pytest.raises(ValueError, match="none of the chosen layers requires a gradient"):
        zest_fast.watch(net().requires_grad_(False))
    with zest_fast.watch(model), pytest.raises(RuntimeError, match="is watched already"), zest_fast.watch(model[3:]):
        pass
    with zest_fast.watch(model):
        pass


def test_lbfgs_is_refused_at_its_first_step():
    model, (x, y) = net(), batches(1)[0]
    before = state_of(model)
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(RuntimeError, match="LBFGS runs the model several times"), zest_fast.watch(model):
        optimizer.step(lambda: loss_of(model, x, y))
    assert not changes(before, state_of(model))


def test_an_optimizer_that_runs_the_model_twice_is_said():
    class Sharpness(torch.optim.SGD):
        def step(self, closure):
            closure()
            closure()
            return super().step()

    model, (x, y) = net(), batches(1)[0]
    optimizer = Sharpness(model.parameters(), lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss_of(model, x, y).backward()

    with zest_fast.watch(model, every=1) as watched:
        optimizer.step(closure)
    assert watched.steps == 1
    assert any("2 backward passes within its step" in note for note in watched.last.notes)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_takes_every_hook_away(error):
    model, (x, y) = net(), batches(1)[0]
    model[0].weight.register_post_accumulate_grad_hook(lambda p: None)
    before = state_of(model)
    with pytest.raises(error), zest_fast.watch(model, every=1, **EVERYTHING):
        loss_of(model, x, y)
        raise error
    assert changes(before, state_of(model)) in ([], ["random state"])
    assert not global_hooks._global_optimizer_pre_hooks and not Watching._spectators and not loss_scales._listeners


def test_a_model_that_changes_is_followed_and_said():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        x, y = batches(1)[0]
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()

    log = []
    with zest_fast.watch(model, every=1, metrics="all", log=log.append):
        step()
        model[3].requires_grad_(False)
        step()  # seen at the beginning of the next logged step
        step()
        model[3].requires_grad_(True)
        model[5] = nn.Linear(12, 3)
        optimizer.add_param_group({"params": model[5].parameters()})
        step()
        step()
    assert "no gradient reached it" in log[1].profile.info["3"]["note"]
    assert log[2].profile.names == ["0", "5"] and any("not watched any more: 3" in note for note in log[2].notes)
    assert "it was replaced during the step" in log[3].profile.info["5"]["note"]
    assert all(map(math.isnan, log[3].profile["5"].values()))
    assert log[4].profile.names == ["0", "3", "5"] and not math.isnan(log[4].profile["5"]["grad_norm"])
    notes = " ".join(log[4].notes)
    assert "watched from this step on: 3" in notes and "have other weights now: 5" in notes


def test_a_new_optimizer_for_new_weights_is_seen():
    model = net()
    with zest_fast.watch(model, every=1) as watched:
        model[5] = nn.Linear(12, 3)
        optimizer = torch.optim.SGD(model[5].parameters(), lr=0.1)
        x, y = batches(1)[0]
        for _ in range(2):
            loss_of(model, x, y).backward()
            optimizer.step()
    assert watched.steps == 2 and not math.isnan(watched.last.profile["5"]["grad_norm"])


def test_an_unseen_optimizer_is_said():
    model, (x, y) = net(), batches(1)[0]
    said = r"saw 1 backward passes and no step .* call watched\.step\(\)"
    with pytest.warns(RuntimeWarning, match=said), zest_fast.watch(model):
        loss_of(model, x, y).backward()


def test_optimizers_of_other_models_do_not_count():
    model, other = net(), net()
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (other, model)]
    log = []
    with zest_fast.watch(model, every=1, log=log.append) as watched:
        for x, y in batches(3):
            for one, optimizer in zip((other, model), optimizers, strict=True):
                optimizer.zero_grad()
                loss_of(one, x, y).backward()
                optimizer.step()
    assert watched.steps == 3 and [step.step for step in log] == [0, 1, 2]
    assert all(step.profile.loss < 5 for step in log)


def test_not_logged_steps_have_no_hooks():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = state_of(model)
    x, y = batches(1)[0]
    with zest_fast.watch(model, every=3, **EVERYTHING):
        for i in range(4):
            loss_of(model, x, y).backward()
            optimizer.step()
            hooked = [label for label in changes(before, state_of(model)) if "hooks" in label]
            assert bool(hooked) == (i == 2), i
            optimizer.zero_grad()


def test_nothing_warns_in_an_ordinary_run():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watched_run("plain", **EVERYTHING)


@pytest.mark.parametrize("way", ["wrapped", "in place", "a part", "passed without its wrapper"])
def test_compiled_code_is_left_alone(way):
    import torch._dynamo as dynamo

    def run(watching):
        dynamo.reset()
        dynamo.utils.counters.clear()
        model = net().eval()
        called = model
        if way == "in place":
            model.compile(backend="aot_eager")
        elif way == "a part":
            model[3] = torch.compile(model[3], backend="aot_eager")
        else:
            called = torch.compile(model, backend="aot_eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        log = []

        def train():
            for x, y in batches(5):
                optimizer.zero_grad()
                loss_of(called, x, y).backward()
                optimizer.step()

        if watching:
            metrics = None if way == "passed without its wrapper" else "all"
            watched = model if way == "passed without its wrapper" else called
            others = {"updates": True, "noise": True, "parts": True, "samples": 8}
            with zest_fast.watch(watched, every=2, metrics=metrics, log=log.append, **others):
                train()
        else:
            train()
        return dict(dynamo.utils.counters["stats"]), [bits(p) for p in model.parameters()], log

    graphs, weights, _ = run(False)
    watched_graphs, watched_weights, log = run(True)
    assert watched_graphs == graphs and watched_weights == weights
    for step in log:
        profile = step.profile
        compiled = [name for name in profile.names if way != "a part" or name.startswith("3")]
        assert not any(math.isnan(profile[name]["grad_norm"]) for name in profile.names)
        if "fisher" in profile.metrics:
            for name in profile.names:
                assert math.isnan(profile[name]["fisher"]) == (name in compiled), name
                assert ("compiled code sees no hooks" in profile.info[name]["note"]) == (name in compiled)


def test_a_compiled_step_is_not_seen_and_that_is_said():
    import torch._dynamo as dynamo

    dynamo.reset()
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = torch.compile(lambda: optimizer.step(), backend="aot_eager")
    with pytest.warns(RuntimeWarning) as said, zest_fast.watch(model, every=1) as watched:
        for x, y in batches(4):
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            step()
    assert watched.steps == 0 and watched.last.step == 0
    assert sum("compiled ones, call watched.step()" in str(one.message) for one in said) == 1
    log = []
    with zest_fast.watch(model, every=1, log=log.append) as watched:
        for x, y in batches(4):
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            step()
            watched.step()
    assert [one.step for one in log] == [0, 1, 2, 3]


def test_calls_of_step_beside_an_optimizer_count_nothing():
    model, log = net(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with zest_fast.watch(model, every=1, log=log.append) as watched:
        for x, y in batches(3):
            loss_of(model, x, y).backward()
            optimizer.step()
            watched.step()
            optimizer.zero_grad()
    assert watched.steps == 3 and [step.step for step in log] == [0, 1, 2]


def test_a_run_that_is_taken_up_again_goes_on_counting():
    model, log = net(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with zest_fast.watch(model, every=4, first_step=6, log=log.append) as watched:
        for x, y in batches(7):
            loss_of(model, x, y).backward()
            optimizer.step()
    assert watched.steps == 13 and [step.step for step in log] == [8, 12]


def test_attacks_on_the_input_are_no_part_of_the_step():
    model, (x, y) = net().eval(), batches(1)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    reference = zest_fast.profile(model, (x, y))
    with zest_fast.watch(model, every=1, metrics="all") as watched:
        attacked = (10 * x).requires_grad_()
        loss_of(model, attacked, y).backward(inputs=[attacked])
        loss_of(model, x, y).backward()
        optimizer.step()
    for metric in reference.metrics:
        assert watched.last.profile.column(metric) == pytest.approx(reference.column(metric), rel=1e-5), metric


def test_gradients_of_zero_are_not_taken_for_cleared_ones():
    model = net().eval()
    nn.init.constant_(model[0].bias, -100.0)
    model[5].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    nn.init.zeros_(model[5].weight)
    log = []
    with zest_fast.watch(model, every=1, parts=True, log=log.append):
        for _ in range(2):
            for x, y in batches(3):
                loss_of(model, x, y).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    assert [len(step.parts) for step in log] == [3, 3] and not log[0].profile.column("grad_norm").any()


def test_where_only_biases_train_frozen_layers_are_watched():
    model, log = net().requires_grad_(False), []
    biases = [p.requires_grad_() for name, p in model.named_parameters() if name.endswith("bias")]
    optimizer = torch.optim.SGD(biases, lr=0.1)
    with zest_fast.watch(model, every=1, frozen=True, metrics="all", log=log.append):
        for x, y in batches(3):
            for _ in range(2):
                (loss_of(model, x, y) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [step.step for step in log] == [0, 1, 2] and not log[0].notes
    assert (log[0].profile.column("fisher") > 0).all()


def test_sparse_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 2))
    x = torch.arange(6).reshape(2, 3)
    reference = zest_fast.profile(model, closure=lambda: model(x).square().mean(), layers=["0", "1"])
    optimizers = [torch.optim.SparseAdam(model[0].parameters()), torch.optim.Adam(model[1].parameters())]
    with zest_fast.watch(model, every=1, layers=["0", "1"], **EVERYTHING) as watched:
        for part in x.split(1):
            (model(part).square().mean() / 2).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert not watched.last.notes and watched.last.histograms["0"]["gradient"][0].sum() == 40
    for metric in reference.metrics:
        assert watched.last.profile.column(metric) == pytest.approx(reference.column(metric), rel=2e-5), metric


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_selective_backward_of_a_language_model(reentrant):
    """Lean logits are computed when someone looks at them: the watch does not, and says so."""
    from small_models import llama

    ids = torch.arange(64).reshape(4, 16) % 40

    def train(watching):
        torch.manual_seed(0)
        model = llama().train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        tuned = zest_fast.SelectiveBackward(model, ["model.layers.1.mlp.up_proj"])
        reference = zest_fast.profile(model, {"input_ids": ids, "labels": ids, "use_cache": False})
        optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-3)
        log = []

        def steps():
            for _ in range(2):
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

        if watching:
            with zest_fast.watch(model, every=1, frozen=True, log=log.append, **EVERYTHING):
                steps()
        else:
            steps()
        return [bits(p) for p in model.parameters()], log, reference

    (alone, _, reference), (watched, log, _) = train(False), train(True)
    assert watched == alone
    profile = log[0].profile
    assert "its output is a DeferredLogits" in profile.info["lm_head"]["note"]
    above = profile.names[profile.names.index("model.layers.1.mlp.up_proj") :]
    assert len(above) == 10 and profile["model.layers.1.mlp.up_proj"]["grad_norm"] > 0
    for name in profile.names:
        for metric in ("act_std", "act_mean", "fisher", "weight_std"):
            known = name != "lm_head" and (metric != "fisher" or name in above)
            if known or metric == "weight_std":
                assert profile[name][metric] == pytest.approx(reference[name][metric], rel=2e-5), (name, metric)
            else:
                assert math.isnan(profile[name][metric]), (name, metric)


def test_the_profile_of_a_step_is_ranked_and_saved_like_any_other(tmp_path):
    _, watched = watched_run("plain", updates=True)
    profile = watched.last.profile
    assert set(zest_fast.rank(profile, by="update_ratio").names) == set(profile.names)
    loaded = zest_fast.LayerProfile.load(profile.save(tmp_path / "step.json"))
    assert loaded.to_pandas().equals(profile.to_pandas())


class CtrlC:
    """Ctrl-C at the n-th line of the library that is run."""

    def __init__(self, at):
        self.at, self.lines = at, 0

    def __call__(self, frame, event, argument):
        name = frame.f_code.co_filename
        if "zest_fast" not in name or "/tests/" in name or (frame.f_code.co_name == "__exit__" and "watch.py" in name):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                signal.raise_signal(signal.SIGINT)
        return self


def test_ctrl_c_at_any_line_leaves_nothing():
    def run(at):
        model, trace = net(), CtrlC(at)
        model[0].weight.register_post_accumulate_grad_hook(lambda p: None)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before, hooks = state_of(model), hooks_of_optimizers()
        sys.settrace(trace)
        try:
            with zest_fast.watch(model, every=1, **EVERYTHING):
                for x, y in batches(2):
                    loss_of(model, x, y).backward()
                    optimizer.step()
                    optimizer.zero_grad()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        left = [label for label in changes(before, state_of(model)) if "bits" not in label and "gradient" not in label]
        assert left in ([], ["random state"]), (at, left)
        assert hooks_of_optimizers() == hooks, at
        assert not Watching._spectators and not loss_scales._listeners, at
        with zest_fast.watch(model):
            pass
        return trace.lines

    total = run(None)
    for at in range(1, total, 61):
        run(at)


class InTwoSegments(nn.Module):
    """Reentrant checkpointing runs a backward pass for each segment: the gradient of a weight comes in two parts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = x.clone().requires_grad_()
        for _ in range(2):
            x = checkpoint(lambda x: torch.tanh(self.a(x)), x, use_reentrant=True)
        return self.b(x)


def test_a_gradient_that_comes_in_parts_is_summed_from_the_second_step_on():
    model, (x, y), log = InTwoSegments(), batches(1)[0], []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    reference = zest_fast.profile(model, (x, y))
    halves = list(zip(x.split(4), y.split(4), strict=True))
    with zest_fast.watch(model, every=1, metrics="all", parts=True, noise=True, log=log.append):
        for _ in range(2):
            for half in halves:
                (loss_of(model, *half) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert math.isnan(log[0].parts[0]["a"]["grad_norm"]) and log[0].parts[0]["b"]["grad_norm"] > 0
    assert any("arrives in several parts" in note for note in log[0].notes) and not log[1].notes
    for step in log:
        for metric in reference.metrics:
            assert step.profile.column(metric) == pytest.approx(reference.column(metric), rel=2e-5, abs=1e-9), metric
    alone = zest_fast.profile(model, closure=lambda: loss_of(model, *halves[0]) / 2)
    assert log[1].parts[0].column("grad_norm") == pytest.approx(alone.column("grad_norm"), rel=1e-5)


def test_calls_of_parts_of_the_model_and_failed_forwards():
    """The loop calls parts, as Lightning's do; those that fail or are not differentiated do not count."""

    def fail(module, args):
        raise RuntimeError("out of memory")

    model, (x, y) = net().eval(), batches(1)[0]
    reference = zest_fast.profile(model, (x, y))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for whole in (False, True):
        with zest_fast.watch(model, every=1, metrics="all") as watched:
            handle = model[5].register_forward_pre_hook(fail)
            with pytest.raises(RuntimeError, match="out of memory"):
                model(100 * x) if whole else model[3:](model[:3](100 * x))
            handle.remove()
            output = model(x) if whole else model[3:](model[:3](x))
            nn.functional.cross_entropy(output, y).backward()
            optimizer.step()
            optimizer.zero_grad()
        for metric in reference.metrics:
            assert watched.last.profile.column(metric) == pytest.approx(reference.column(metric), rel=1e-6), metric


def test_a_graph_of_the_backward_pass_is_said():
    model, (x, y) = net(), batches(1)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.warns(UserWarning, match="create_graph=True"),
        zest_fast.watch(model, every=1, metrics="all") as watched,
    ):
        loss_of(model, x, y).backward(create_graph=True)
        optimizer.step()
    profile = watched.last.profile
    assert profile["0"]["grad_norm"] > 0 and profile["0"]["act_std"] > 0 and math.isnan(profile["0"]["fisher"])
    assert any("is differentiated by a backward pass" in note for note in watched.last.notes)
