"""bench.watch and bench.reselect: what is measured is what its name says, runs go on where they stopped, and tables say
what the figures say."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch
from torch import nn

from bench import readme
from bench import reselect as reselected
from bench.watch import __main__ as command
from bench.watch.loops import LOOPS, Watched, loops_of
from bench.watch.report import watch_text
from zest_fast.benchmarking import models
from zest_fast.finetuning.selective_backward import SelectiveBackward

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def loops():
    model, batch = models.TINY[0].build()
    return loops_of(model, batch)


def test_the_loops_of_others_find_what_a_watch_finds(loops):
    for name in ("watch", "watch, all metrics", "reductions", "cache, reduced", "histograms"):
        with loops[name] as loop:
            loop.step()
    watched, every = loops["watch"].last.profile, loops["watch, all metrics"].last.profile
    for peer, expected in (("reductions", watched), ("cache, reduced", every)):
        table = loops[peer].table
        assert set(table) == set(expected.names)
        for layer, row in table.items():
            assert set(row) == set(expected.metrics)
            found = expected[layer]
            sizes = {"plain": found["snip"] / loops["plain"].model.get_submodule(layer).weight.numel()}
            for metric, value in row.items():  # means cancel: torch's in float32 as far as their terms allow
                size = sizes.get(metric, found[metric.replace("mean", "std")])
                assert value == pytest.approx(found[metric], rel=1e-4, abs=1e-5 * abs(size)), (layer, metric)
    model = loops["plain"].model
    assert set(loops["histograms"].log) == {name for name, _ in model.named_parameters()}
    for name, (counts, edges) in loops["histograms"].log.items():
        assert sum(counts) == model.get_parameter(name).numel() and len(edges) in (2, 65), name


def test_loops_leave_no_hook_and_no_gradient(loops):
    model = loops["plain"].model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for loop in loops.values():
        with loop:
            loop.step()
        assert all(p.grad is None and not p._backward_hooks for p in model.parameters())
        assert not any(m._forward_hooks or m._backward_hooks or m._forward_pre_hooks for m in model.modules())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter, before[name], rtol=0, atol=1e-6
        )  # a rate of 1e-9: all time the same model


def test_a_step_that_is_not_logged_logs_nothing(loops):
    with loops["watch, not logged"] as loop:
        for _ in range(3):
            loop.step()
    assert isinstance(loop, Watched) and loop.last is None
    with loops["histograms, not logged"] as other:
        other.step()
    assert other.log == {}


def test_the_mean_overhead_is_that_of_the_steps_in_between_and_of_the_logged_one():
    times = {name: [4.0, 8.0] for name in LOOPS}
    times |= {"plain": [2.0, 4.0], "watch, not logged": [2.2, 4.4], "watch": [4.0, 8.0]}
    found = command.summary(times)
    assert found["to_plain"]["watch"]["median"] == 2.0
    assert found["at_every"]["watch"]["10"]["median"] == pytest.approx((2 + 9 * 1.1) / 10)
    assert found["at_every"]["watch, all metrics"]["100"]["median"] == pytest.approx((2 + 99 * 1.1) / 100)
    assert found["at_every"]["reductions"]["10"]["median"] == pytest.approx((2 + 9) / 10)  # nothing in between
    assert "histograms, not logged" not in found["at_every"]


def test_the_benchmark_goes_on_where_it_stopped_and_ends_in_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench.watch", "--tiny", "--rounds", "1", "--processes", "--out", str(tmp_path)])
    measured = []

    def once(case, rounds):
        measured.append(str(case))
        if len(measured) == 2:
            raise KeyboardInterrupt
        return {"model": case.model, "shape": case.shape, **command.summary(dict.fromkeys(LOOPS, [1.0] * rounds))}

    monkeypatch.setattr(command, "measure", once)
    with pytest.raises(KeyboardInterrupt):
        command.main()
    assert len(json.loads((tmp_path / "watch.json").read_text())["results"]) == 1
    command.main()
    assert measured == [*map(str, models.TINY[:2]), *map(str, models.TINY[1:])]
    assert "measured already" in capsys.readouterr().out
    document = json.loads((tmp_path / "watch.json").read_text())
    text = watch_text(document)
    assert text.count("| bert 2x8 |") == 4 and "| +0.0 (+0.0 to +0.0) |" in text
    assert readme.BLOCKS["watch"][-1] is watch_text


def test_a_model_is_really_measured():
    found = command.measure(models.TINY[0], 1)
    assert set(found["seconds"]) == set(LOOPS) and all(row["n"] == 1 for row in found["seconds"].values())
    assert found["parameters"] > 0 and all(math.isfinite(row["median"]) for row in found["to_plain"].values())


@pytest.mark.slow
def test_processes_are_measured_together():
    found = command.measure_processes(2, 1, tiny=True)
    assert found["processes"] == 2 and set(found["seconds"]) == set(LOOPS)


# bench.reselect


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(*(part for _ in range(8) for part in (nn.Linear(6, 6), nn.Tanh())))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.body(x))


class Fitted:
    """Stands in for the Ranker that has not seen the family."""

    def predict(self, profile):
        return -torch.arange(float(len(profile))).double().numpy()


def test_a_pair_is_run_at_the_rate_of_each_arm_and_goes_on(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = Classifier().eval()
    inputs = torch.randn(96, 6)
    splits = dict.fromkeys(("head", "train", "score", "test"), (inputs, (inputs[:, 0] > 0).long()))
    monkeypatch.setattr("bench.finetune.run.load_pair", lambda *_: (model, splits))
    monkeypatch.setattr("bench.finetune.run.SETTINGS", {"image": {"batch_size": 4, "steps": 8, "head_rate": 1e-3}})
    monkeypatch.setattr(reselected.ReselectedPair, "_ranker", Fitted())
    monkeypatch.setattr(reselected, "RATES", (1e-3, 1e-2))
    monkeypatch.setattr(reselected, "PROFILED", 8)
    trained, train = [], reselected.ReselectedPair._reselected

    def counted(self, arm, seed, rate):
        if len(trained) == 12:
            raise KeyboardInterrupt
        trained.append((arm, seed, rate))
        return train(self, arm, seed, rate)

    monkeypatch.setattr(reselected.ReselectedPair, "_reselected", counted)
    with pytest.raises(KeyboardInterrupt):
        reselected.ReselectedPair("toy/digits", tmp_path).run()
    monkeypatch.setattr(
        reselected.ReselectedPair,
        "_reselected",
        lambda self, *a: trained.append(a) or train(self, *a),  # type: ignore
    )
    reselected.ReselectedPair("toy/digits", tmp_path).run()
    assert len(trained) == len(set(trained)) == len(reselected.ARMS) * (2 + 2)
    runs = json.loads((tmp_path / "toy--digits.json").read_text())["runs"]
    for arm in reselected.ARMS:
        own = [runs[f"{arm} | seed {seed}"] for seed in reselected.SEEDS]
        assert len({run["rate"] for run in own}) == 1 and all(len(run["layers"]) == 5 for run in own)
        assert all(bool(run["former_layers"]) <= bool(run["exchanged"]) for run in own)
    assert not any(runs[f"{reselected.STATIC} | seed {seed}"]["exchanged"] for seed in reselected.SEEDS)
    assert any(runs[f"again at random | seed {seed}"]["exchanged"] for seed in reselected.SEEDS)
    monkeypatch.setattr(reselected, "PAIRS", ("toy/digits",))
    document = json.loads(reselected.collect(tmp_path, tmp_path / "out").read_text())
    text = readme.BLOCKS["reselect"][-1](document)
    assert f"| {reselected.STATIC} |" in text and "| – | – | 0.0 |" in text


def runs_of(**accuracies):
    return [
        {"arm": arm, "seed": seed, "test_accuracy": value, "exchanged": 0}
        for arm, values in accuracies.items()
        for seed, value in enumerate(values)
    ]


def test_the_finding_is_what_the_figures_say():
    level = dict.fromkeys(reselected.ARMS, (0.5, 0.6, 0.7))
    said = partial(lambda **change: reselected.finding([{"pair": "a/b", "runs": runs_of(**{**level, **change})}]))
    assert said().startswith("No arm that chooses again is better")
    assert said(**{"again by RGN": (0.6, 0.7, 0.81)}) == "Better than the static choice: again by RGN."
    assert "worse: again at random" in said(**{"again at random": (0.4, 0.5, 0.61)})


def test_the_head_has_a_group_of_its_own():
    tuned = SelectiveBackward(Classifier(), ["body.0"], head="head")
    body, head = reselected._by_group(tuned)
    assert [p.shape for p in body] == [(6, 6), (6,)] and [p.shape for p in head] == [(2, 6), (2,)]
