"""A sweep gives the scores of the naive loop, does no work twice, and leaves the model as it was."""

from __future__ import annotations

import errno
import os
import warnings
from dataclasses import replace

import pandas
import pytest
import torch
from small_models import assert_same, snapshot
from sweeping_models import RECIPE, Attention, OneLayer, PeeksAhead, Preactivated, Residual, kill_after, make
from torch import nn

import zest_fast
from zest_fast import profile
from zest_fast.finetuning.selective_backward import SelectiveBackward
from zest_fast.prefix.boundaries import trace_calls
from zest_fast.prefix.inputs import rows_of, take
from zest_fast.profiling.loss import call_model
from zest_fast.profiling.metrics import ALL_METRIC_NAMES, METRIC_NAMES
from zest_fast.sweeping import sweep as sweep_module
from zest_fast.sweeping import trials as trials_module
from zest_fast.sweeping.head import choose_strength, fit_head
from zest_fast.sweeping.recipe import Recipe
from zest_fast.sweeping.records import read_records
from zest_fast.sweeping.reused_prefix import ReusedPrefix, find_boundary
from zest_fast.sweeping.sweep import sweep
from zest_fast.sweeping.trials import Trials, draw


def run(kind, path, **arguments):
    model, splits = make(kind)
    return sweep(model, splits, out=path, **{"recipe": RECIPE, **arguments})


def test_the_public_name_is_this_sweep() -> None:
    assert zest_fast.sweep is sweep and zest_fast.Recipe is Recipe


def warm(frame):
    return frame[frame.head_state == "warm"].set_index(["seed", "layer"])


@pytest.mark.parametrize("kind", [Residual, Attention, OneLayer], ids=lambda kind: kind.__name__)
def test_reused_prefixes_give_the_scores_of_the_plain_forward_pass(kind, tmp_path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every layer but the lowest is reused
        reused = run(kind, tmp_path / "reused.jsonl")
    plain = run(kind, tmp_path / "plain.jsonl", reuse=False)
    pandas.testing.assert_frame_equal(reused, plain, rtol=0, atol=1e-6)


def test_prefixes_on_disk_give_the_same_scores_and_leave_nothing_behind(tmp_path) -> None:
    reused = run(Residual, tmp_path / "memory.jsonl")
    mapped = run(Residual, tmp_path / "disk.jsonl", cache_bytes=0)
    pandas.testing.assert_frame_equal(reused, mapped, rtol=0, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.jsonl", "memory.jsonl"]


def test_a_full_disk_under_the_prefixes_is_named_and_loses_nothing(tmp_path, monkeypatch) -> None:
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RuntimeError, match=r"No space left on device.*reuse=False"):
        run(Residual, tmp_path / "records.jsonl", cache_bytes=0)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]
    resumed = run(Residual, tmp_path / "records.jsonl")
    pandas.testing.assert_frame_equal(resumed, run(Residual, tmp_path / "whole.jsonl"))


def test_a_cache_finds_any_boundary_from_any_other(tmp_path) -> None:
    model, splits = make(Residual)
    model.eval()
    inputs = splits["train"][0]
    trace = trace_calls(model, inputs[:5])
    cache = ReusedPrefix(model, inputs, limit=1 << 20, folder=tmp_path, batch_size=7)
    rows = torch.tensor([30, 2, 17])
    with torch.no_grad():
        expected = model(inputs)[rows]
    layers = [model.blocks[2].second, model.blocks[0].second, model.blocks[1].first, model.blocks[1].second]
    for layer in layers:
        trained = (layer.weight, *model.head.parameters())
        boundary = find_boundary(model, trace, trace.first_call(layer), trained, inputs, 1 << 20)
        assert boundary.skipped
        cache.advance(boundary)
        with torch.no_grad():
            torch.testing.assert_close(cache.run(rows), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [Preactivated, PeeksAhead], ids=lambda kind: kind.__name__)
def test_a_prefix_that_cannot_be_reused_is_recomputed_and_said_so(kind, tmp_path) -> None:
    with pytest.warns(UserWarning, match="cannot be reused"):
        reused = run(kind, tmp_path / "reused.jsonl")
    plain = run(kind, tmp_path / "plain.jsonl", reuse=False)
    pandas.testing.assert_frame_equal(reused, plain, rtol=0, atol=1e-6)


def test_layers_above_run_nothing_of_what_lies_below(tmp_path) -> None:
    model, splits = make(Residual)
    samples = []
    convolve = model.stem._conv_forward
    model.stem._conv_forward = lambda x, *rest: (samples.append(len(x)), convolve(x, *rest))[1]
    recipe = replace(RECIPE, steps=30)
    sweep(model, splits, out=tmp_path / "records.jsonl", recipe=recipe, layers=["blocks.2.second"])
    reused = sum(samples)
    samples.clear()
    sweep(model, splits, out=tmp_path / "plain.jsonl", recipe=recipe, layers=["blocks.2.second"], reuse=False)
    # For each of two seeds 30 steps of 8 and 21 to score; or once 21 and the 32 training samples, and once more to
    # compare. Then the probes, a batch of each split to compare with a full pass, and nothing else.
    probes = 60
    assert sum(samples) - reused >= 2 * (30 * 8 + 21) - 2 * (21 + 32) - (8 + 21) - probes


def test_scores_are_those_of_a_loop_that_a_user_would_write(tmp_path) -> None:
    frame = run(Residual, tmp_path / "records.jsonl")
    model, splits = make(Residual)
    model.eval()
    seed, layer = 1, "blocks.1.first"
    _, records = read_records(tmp_path / "records.jsonl")
    head = next(record for record in records if record["record"] == "head" and record["seed"] == seed)
    with torch.no_grad():
        model.head.weight.copy_(sweep_module._decode(head["weight"]).view_as(model.head.weight))
        model.head.bias.copy_(sweep_module._decode(head["bias"]))

    def score():
        with torch.no_grad():
            logits = model(splits["score"][0])
        return nn.functional.cross_entropy(logits, splits["score"][1]).item()

    rows = draw(40, 16, seed)
    head_loss = score()
    rate = min(RECIPE.layer_lr_factor * model.blocks[1].first.weight.square().mean().sqrt().item(), RECIPE.max_layer_lr)
    with SelectiveBackward(model, [layer]):
        optimizer = torch.optim.Adam(
            [
                {"params": list(model.blocks[1].first.parameters()), "lr": rate},
                {"params": list(model.head.parameters()), "lr": RECIPE.head_lr},
            ]
        )
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 3)
        for batch in trials_module._batches_of(rows, 3, 8, seed):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(splits["train"][0][batch]), splits["train"][1][batch]).backward()
            optimizer.step()
            decay.step()
    row = warm(frame).loc[(seed, layer)]
    assert row.loss == pytest.approx(score(), abs=1e-6)
    assert row.head_loss == pytest.approx(head_loss, abs=1e-6)


def test_rows_hold_the_profiles_with_the_warm_and_the_fresh_head(tmp_path) -> None:
    frame = run(Residual, tmp_path / "records.jsonl", model_name="tiny", dataset_name="toys", family="playthings")
    assert list(frame.columns[:10]) == [
        "model", "dataset", "family", "seed", "layer", "accuracy", "loss", "head_accuracy", "head_loss", "head_state",
    ]  # fmt: skip
    assert frame.groupby(["model", "dataset", "family", "seed", "layer", "head_state"]).size().eq(1).all()
    assert len(frame) == 7 * 2 * 2 and set(frame.head_state) == {"warm", "fresh"}
    assert "head" not in set(frame.layer)
    model, splits = make(Residual)
    model.eval()
    rows = draw(40, 16, 0)[:8]
    torch.manual_seed(0)
    model.head.reset_parameters()
    expected = profile(model, (splits["train"][0][rows], splits["train"][1][rows]), metrics="all").to_pandas()
    fresh = frame[(frame.head_state == "fresh") & (frame.seed == 0)].set_index("layer")
    assert list(fresh.columns[9:]) == list(expected.columns)
    pandas.testing.assert_frame_equal(fresh[expected.columns], expected.loc[fresh.index], check_dtype=False)


def test_the_head_is_better_than_chance_and_training_a_layer_is_better_still(tmp_path) -> None:
    recipe = replace(RECIPE, steps=30, layer_lr_factor=0.1, max_layer_lr=0.1, train_samples=None)
    frame = run(OneLayer, tmp_path / "records.jsonl", recipe=recipe)
    assert (frame.head_loss < 1.0).all()  # log 3 = 1.10
    assert (frame.loss < frame.head_loss).all()


def test_the_head_is_the_minimum_of_its_penalised_loss() -> None:
    _, splits = make(OneLayer)
    features, targets = splits["train"]
    for biased in (True, False):
        weight, bias = fit_head(features, targets, 3, 0.1, biased=biased)
        scale = features.square().mean().sqrt()
        w = (weight * scale).double().requires_grad_()
        b = bias.double().requires_grad_()
        loss = nn.functional.cross_entropy((features / scale).double() @ w.T + b, targets) + 0.05 * w.square().sum()
        loss.backward()
        assert w.grad.abs().max() < 1e-5
        assert b.grad.abs().max() < 1e-5 if biased else not bias.any()


def test_the_strength_of_the_head_is_the_best_on_every_fifth_sample() -> None:
    torch.manual_seed(0)
    noise, targets = torch.randn(60, 20), torch.arange(60) % 3
    assert choose_strength(noise, targets, 3, (1e-4, 10.0)) == 10.0  # nothing to learn: the larger penalty harms less
    telling = nn.functional.one_hot(targets, 3).float() * 5
    assert choose_strength(telling, targets, 3, (1e-4, 10.0)) == 1e-4


def test_the_test_split_is_never_looked_at(tmp_path) -> None:
    class Guarded(dict):
        def __getitem__(self, key):
            assert key != "test"
            return super().__getitem__(key)

        def items(self):
            raise AssertionError("looks at every split")

        values = items

    model, splits = make(OneLayer)
    frame = sweep(model, Guarded(splits, test=object()), out=tmp_path / "records.jsonl", recipe=RECIPE)
    assert len(frame) == 4


def test_seeds_differ_and_each_is_the_same_again(tmp_path) -> None:
    first = run(Residual, tmp_path / "first.jsonl")
    torch.manual_seed(99)  # the caller's random state is no part of it
    alone = run(Residual, tmp_path / "second.jsonl", recipe=replace(RECIPE, seeds=(1,)))
    losses = warm(first).loss
    assert (losses.loc[0] != losses.loc[1]).all()
    pandas.testing.assert_series_equal(losses.loc[1], warm(alone).loss.loc[1], rtol=0, atol=0)


def test_seeds_train_on_disjoint_samples_as_far_as_there_are_enough() -> None:
    draws = [set(draw(40, 16, seed).tolist()) for seed in range(3)]
    assert not draws[0] & draws[1]
    assert all(len(draw) == 16 for draw in draws) and draws[2] not in draws[:2]


def test_the_model_is_afterwards_as_it_was(tmp_path) -> None:
    model, splits = make(Residual)
    model.train()
    model.blocks[1].eval()
    model.blocks[0].first.weight.requires_grad_(False)
    model.stem.weight.grad = torch.ones_like(model.stem.weight)
    before, state = snapshot(model), torch.get_rng_state()
    sweep(model, splits, out=tmp_path / "records.jsonl", recipe=RECIPE)
    assert_same(before, snapshot(model))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(model.stem.weight.grad, torch.ones_like(model.stem.weight))
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_model_is_as_it_was_after_an_error_in_the_middle(tmp_path, monkeypatch) -> None:
    model, splits = make(Residual)
    before = snapshot(model)
    train = Trials._train

    def fail_later(self, part, *arguments):
        train(self, part, *arguments)
        if part.name == "blocks.1.second":
            raise MemoryError

    monkeypatch.setattr(Trials, "_train", fail_later)
    with pytest.raises(MemoryError):
        sweep(model, splits, out=tmp_path / "records.jsonl", recipe=RECIPE)
    assert_same(before, snapshot(model))


def test_a_finished_sweep_is_read_without_running_the_model(tmp_path) -> None:
    first = run(Residual, tmp_path / "records.jsonl")
    model, splits = make(Residual)
    model.register_forward_hook(lambda *_: pytest.fail("work was done twice"))
    again = sweep(model, splits, out=tmp_path / "records.jsonl", recipe=RECIPE)
    pandas.testing.assert_frame_equal(first, again)


@pytest.mark.usefixtures("one_thread")
def test_a_sweep_that_was_killed_goes_on_and_loses_nothing(tmp_path) -> None:
    # One thread, as the other process has: more sum gradients of gradients in another order.
    path = tmp_path / "records.jsonl"
    program = (
        "import time, torch; torch.set_num_threads(1)\n"
        "from sweeping_models import RECIPE, Residual, make\n"
        "from zest_fast.sweeping import sweep as module, trials\n"
        "evaluate = trials.evaluate\n"
        "trials.evaluate = lambda *a: (time.sleep(0.2), evaluate(*a))[1]\n"
        "model, splits = make(Residual)\n"
        f"module.sweep(model, splits, recipe=RECIPE, out={str(path)!r})\n"
    )
    kill_after(program, path, layers=4)
    before = path.read_bytes()
    done = before.count(b'"record":"layer"')
    assert 4 <= done < 14
    path.write_bytes(before + b'1234abcd {"record":"layer","se')  # and the line that was being written
    resumed = run(Residual, path)
    assert path.read_bytes().startswith(before)
    lines = [
        line.split(b',"accuracy"')[0][9:] for line in path.read_bytes().splitlines() if b'"record":"layer"' in line
    ]
    assert len(lines) == len(set(lines)) == 14
    pandas.testing.assert_frame_equal(resumed, run(Residual, tmp_path / "whole.jsonl"), rtol=0, atol=1e-6)


def test_new_metrics_take_new_profiles_and_no_training(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sweep_module, "ALL_METRIC_NAMES", METRIC_NAMES)
    full = profile

    def few(model, batch, metrics):
        return full(model, batch, metrics=METRIC_NAMES)

    monkeypatch.setattr(sweep_module, "profile", few)
    old = run(OneLayer, tmp_path / "records.jsonl")
    monkeypatch.undo()
    monkeypatch.setattr(Trials, "_train", lambda *_: pytest.fail("a layer was trained again"))
    new = run(OneLayer, tmp_path / "records.jsonl")
    later = [name for name in ALL_METRIC_NAMES if name not in METRIC_NAMES]
    assert not set(later) & set(old) and new[later].notna().all(axis=None)
    assert list(new.loss) == list(old.loss)


def test_a_layer_that_the_loss_does_not_reach_has_no_record(tmp_path) -> None:
    model, splits = make(OneLayer)
    model.unused = nn.Linear(2, 2)
    model.head = model._modules.pop("head")  # the head comes last
    frame = sweep(model, splits, out=tmp_path / "records.jsonl", recipe=RECIPE)
    assert set(frame.layer) == {"layer"}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dataset": {}}, ValueError, "no split 'head'"),
        ({"dataset": []}, TypeError, "dataset is a list"),
        ({"recipe": "fast"}, TypeError, "recipe is a str"),
        ({"layers": ["head"]}, ValueError, "nothing beside the head"),
        ({"layers": ["layr"]}, ValueError, "'layer'"),
        ({"model": nn.Sequential(nn.Linear(5, 3), nn.Conv1d(1, 3, 3))}, ValueError, "head"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, error, message, tmp_path) -> None:
    model, splits = make(OneLayer)
    arguments = {"model": model, "dataset": splits, "recipe": RECIPE, "out": tmp_path / "records.jsonl", **change}
    with pytest.raises(error, match=message):
        sweep(arguments.pop("model"), arguments.pop("dataset"), **arguments)
    assert not list(tmp_path.iterdir())


def test_classes_that_the_head_does_not_have_are_named(tmp_path) -> None:
    model, splits = make(OneLayer)
    splits["score"] = (splits["score"][0], splits["score"][1] + 1)
    with pytest.raises(ValueError, match=r"dataset\['score'\] has classes 1..3, the model's head has 3 outputs"):
        sweep(model, splits, out=tmp_path / "records.jsonl", recipe=RECIPE)


def test_a_model_whose_logits_are_not_its_last_linear_is_refused(tmp_path) -> None:
    model, splits = make(OneLayer)
    with pytest.raises(ValueError, match="not the output of its last"):
        sweep(nn.Sequential(model, nn.Tanh()), splits, out=tmp_path / "records.jsonl", recipe=RECIPE)


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"batch_size": 1.5}, {"head_lr": 0}, {"layer_lr_factor": float("nan")}, {"optimizer": "sgd"},
     {"seeds": ()}, {"seeds": (1, 1)}, {"head_strengths": (0,)}],
)  # fmt: skip
def test_a_recipe_that_cannot_be_is_refused_by_name(wrong) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Recipe(**wrong)


def test_a_recipe_comes_back_from_its_dictionary_and_its_hash_tells_recipes_apart() -> None:
    assert Recipe.from_dict(RECIPE.to_dict()) == RECIPE
    assert Recipe.from_dict(RECIPE.to_dict()).hash == RECIPE.hash != replace(RECIPE, note="other").hash
    with pytest.raises(ValueError, match="'warmup'"):
        Recipe.from_dict({"warmup": 3})


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_rows_keep_values_and_memory_format(layout) -> None:
    images = torch.randn(6, 3, 4, 5).to(memory_format=layout)
    taken = take(images, torch.tensor([4, 0, 4]))
    assert torch.equal(taken, images[[4, 0, 4]]) and taken.is_contiguous(memory_format=layout)
    assert taken.data_ptr() != images.data_ptr()  # a model may write into what it gets
    with pytest.raises(IndexError):
        take(images, torch.tensor([6]))


def test_inputs_are_taken_by_rows() -> None:
    model, splits = make(Attention)
    model.eval()
    rows = torch.tensor([4, 0])
    whole = call_model(model, splits["score"][0])
    torch.testing.assert_close(call_model(model, rows_of(splits["score"][0], rows)), whole[rows])


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("/home/me/a=b/films.jsonl", "films.jsonl"),
        ("--out=/home/me/records.jsonl", "--out=records.jsonl"),
        ("folder=/home/me/jobs", "folder=jobs"),
        ("name=a/b", "name=a/b"),
        ("films.jsonl", "films.jsonl"),
    ],
)
def test_the_command_in_the_records_names_no_folder(word, kept, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/bin/zest-fast", "sweep", word])
    assert sweep_module._command() == f"zest-fast sweep {kept}"
