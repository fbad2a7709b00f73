"""wandb, TensorBoard and trackio, by small stand-ins of what they document; the real ones where they are installed."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from watched_runs import LAYERS, make_step

from zest_fast import sink_for
from zest_fast.watching.logs.trackers import TensorBoardLog, TrackioLog, WandbLog
from zest_fast.watching.watched_step import WatchedStep


class Histogram:
    def __init__(self, sequence=None, np_histogram=None) -> None:
        counts, edges = np_histogram
        assert sequence is None and len(counts) + 1 == len(edges) and len(counts) <= 512
        self.counts, self.edges = np.asarray(counts), np.asarray(edges)


class Run:
    """Of wandb and of trackio: `step` has to be passed by name, and keys are strings."""

    def __init__(self) -> None:
        self.logged: list[tuple[int | None, dict]] = []
        self.defined: list[tuple] = []

    def log(self, data=None, step=None, commit=None, metrics=None) -> None:
        self.logged.append((step, data if metrics is None else metrics))

    def define_metric(self, name, step_metric=None) -> None:
        self.defined.append((name, step_metric))


class SummaryWriter:
    made: ClassVar[list[SummaryWriter]] = []

    def __init__(self, log_dir=None, purge_step=None) -> None:
        self.log_dir, self.purge_step = log_dir, purge_step
        self.scalars: dict[tuple[str, int], float] = {}
        self.histograms: dict[tuple[str, int], dict] = {}
        self.flushed, self.closed = 0, False
        self.made.append(self)

    def add_scalar(self, tag, scalar_value, global_step=None, walltime=None) -> None:
        self.scalars[tag, global_step] = scalar_value

    def add_histogram_raw(
        self, tag, min, max, num, sum, sum_squares, bucket_limits, bucket_counts, global_step=None, walltime=None
    ) -> None:
        assert len(bucket_limits) == len(bucket_counts)
        sums = (min, max, num, sum, sum_squares)
        self.histograms[tag, global_step] = (sums, bucket_limits, bucket_counts)

    def flush(self) -> None:
        self.flushed += 1

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    module = types.SimpleNamespace(run=Run(), Histogram=Histogram)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    run = Run()
    module = types.SimpleNamespace(log=lambda metrics, step=None: run.log(metrics, step), run=run, Histogram=Histogram)
    monkeypatch.setitem(sys.modules, "trackio", module)
    return module


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch) -> type[SummaryWriter]:
    monkeypatch.setattr(SummaryWriter, "made", [])
    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return SummaryWriter


def expected(step: WatchedStep, prefix: str = "") -> dict[str, float]:
    """Tag -> value, by the rule of the docstring."""
    found = {f"{name}/{metric}": step.profile[name][metric] for name in step.profile for metric in step.profile.metrics}
    found |= {"all layers/loss": step.profile.loss, "all layers/overflow": float(step.overflow)}
    found |= {f"all layers/{name}": value for name, value in step.totals.items()}
    return {prefix + tag: value for tag, value in found.items() if not math.isnan(value)}


def test_wandb_gets_an_axis_of_its_own(wandb) -> None:
    sink = sink_for("wandb")
    made = [make_step(7, full=True), make_step(107, overflow=True)]
    for step in made:
        sink(step)
    assert wandb.run.defined == [("zest/step", None), ("zest/*", "zest/step")]
    assert [step for step, _ in wandb.run.logged] == [None, None]
    histogram = wandb.run.logged[0][1].pop(f"zest/{LAYERS[0]}/weight")
    assert histogram.counts.tolist() == [1, 0, 5] and histogram.edges.tolist() == [-1.0, 0.1, 0.2, 3.0]
    for (_, found), step in zip(wandb.run.logged, made, strict=True):
        assert found == {"zest/step": step.step, **expected(step, "zest/")}
    assert wandb.run.logged[1][1]["zest/all layers/overflow"] == 1.0
    assert "zest/blocks.0.q/grad_norm" not in wandb.run.logged[1][1]  # NaN
    assert wandb.run.logged[1][1]["zest/blocks.0.q/rgn"] == math.inf


def test_wandb_with_the_steps_of_the_script(wandb) -> None:
    run = Run()
    sink = WandbLog(run, prefix="", shared_steps=True)
    sink(make_step(7))
    assert run.logged == [(7, expected(make_step(7)))] and run.defined == [] and wandb.run.logged == []


def test_wandb_without_a_run(wandb) -> None:
    wandb.run = None
    with pytest.raises(RuntimeError, match=r"call wandb.init\(\)"):
        sink_for("wandb")


def test_histograms_of_more_bins_than_wandb_takes(wandb) -> None:
    counts, edges = np.arange(1300), np.linspace(-1.0, 1.0, 1301)
    step = make_step(0)
    sink_for("wandb")(
        WatchedStep(
            0, step.profile, 0.0, False, (), histograms={"head": {"gradient": (counts, edges), "weight": ([], [0])}}
        )
    )
    found = wandb.run.logged[0][1]
    histogram = found["zest/head/gradient"]
    assert histogram.counts.sum() == counts.sum() and len(histogram.counts) == 434
    assert histogram.edges[0] == -1 and histogram.edges[-1] == 1 and set(histogram.edges) <= set(edges)
    assert histogram.counts[0] == 0 + 1 + 2 and histogram.edges[1] == edges[3]
    assert "zest/head/weight" not in found  # without bins


def test_trackio_gets_steps_and_histograms(trackio) -> None:
    sink = sink_for("trackio")
    step = make_step(7, full=True)
    sink(step)
    ((number, found),) = trackio.run.logged
    assert found.pop(f"{LAYERS[0]}/weight").counts.tolist() == [1, 0, 5]
    assert number == 7 and found == expected(step)


def test_an_older_trackio_and_a_run_that_is_passed(trackio) -> None:
    del trackio.Histogram
    run = types.SimpleNamespace(log=lambda metrics, step: kept.append((step, metrics)))
    kept: list = []
    TrackioLog(run, prefix="zest/")(make_step(7, full=True))
    assert kept == [(7, expected(make_step(7, full=True), "zest/"))]


def test_tensorboard_gets_scalars_and_histograms(tensorboard) -> None:
    sink = sink_for("tensorboard:runs/first")
    made = [make_step(20, full=True), make_step(30)]
    for step in made:
        sink(step)
    (writer,) = tensorboard.made
    assert writer.log_dir == "runs/first" and writer.purge_step == 20 and writer.flushed == 2 and not writer.closed
    assert writer.scalars == {(tag, step.step): value for step in made for tag, value in expected(step).items()}
    sums, limits, counts = writer.histograms.pop((f"{LAYERS[0]}/weight", 20))
    assert sums == (-1.0, 3.0, 6, pytest.approx(-0.45 + 8.0), pytest.approx(0.45**2 + 5 * 1.6**2))
    assert limits == [0.1, 0.2, 3.0] and counts == [1, 0, 5] and not writer.histograms
    sink.close()
    assert writer.closed
    sink.close()
    sink(make_step(40))
    assert len(tensorboard.made) == 2


def test_a_writer_that_is_passed_stays_open(tensorboard) -> None:
    writer = SummaryWriter()
    sink = TensorBoardLog(writer, prefix="zest/")
    sink(make_step(7))
    sink.close()
    assert not writer.closed and writer.scalars == {
        (tag, 7): value for tag, value in expected(make_step(7), "zest/").items()
    }


@pytest.mark.parametrize(
    ("what", "module", "words"),
    [
        ("wandb", "wandb", "logging to wandb needs the package wandb: pip install wandb"),
        ("trackio", "trackio", "pip install trackio"),
        ("tensorboard:runs", "torch.utils.tensorboard", "TensorBoard needs the package tensorboard: pip install tens"),
    ],
)
def test_a_package_that_is_missing_is_named(
    what: str, module: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=words):
        sink_for(what)


def test_the_real_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = sink_for(f"tensorboard:{tmp_path}")
    made = [make_step(20, full=True), make_step(30, overflow=True)]
    for step in made:
        sink(step)
    sink.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    for step in made:
        for tag, value in expected(step).items():
            assert np.float32(value) in [event.value for event in found.Scalars(tag) if event.step == step.step]
    assert len(found.Tags()["scalars"]) == len({tag for step in made for tag in expected(step)})
    assert found.Histograms(f"{LAYERS[0]}/weight")[0].histogram_value.num == 6
