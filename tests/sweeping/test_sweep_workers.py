"""Several workers give the records of one process, also when some of them die."""

from __future__ import annotations

import errno
import importlib.util
import os
import subprocess
import sys
from dataclasses import replace

import pandas
import pytest
from small_models import assert_same, snapshot
from sweeping_models import RECIPE, Mortal, Residual, kill_after, make
from torch import nn

from zest_fast.sweeping import local_workers
from zest_fast.sweeping import records as records_module
from zest_fast.sweeping.records import read_records
from zest_fast.sweeping.sweep import sweep
from zest_fast.sweeping.trials import Trial
from zest_fast.sweeping.workers import Died, current_folder_not_first, distribute

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
SHORT = replace(RECIPE, seeds=(0,), steps=1)


pytestmark = pytest.mark.usefixtures("one_thread")


def run(path, workers, kind=Residual, recipe=RECIPE, **arguments):
    model, splits = make(kind)
    return sweep(model, splits, out=path, recipe=recipe, workers=workers, **arguments)


def trials_in(path):
    return [(record["layer"], record["seed"]) for record in read_records(path)[1] if record["record"] == "layer"]


def assert_each_once(path, expected):
    lines = path.read_text().count('"record":"layer"')
    assert lines == len(set(trials_in(path))) == expected


def test_two_processes_write_the_records_of_one(tmp_path) -> None:
    alone = run(tmp_path / "alone.jsonl", 1)
    shared = run(tmp_path / "shared.jsonl", 2)
    pandas.testing.assert_frame_equal(alone, shared, rtol=0, atol=1e-6)
    assert_each_once(tmp_path / "shared.jsonl", 14)


def test_a_pickled_model_gives_the_same_and_the_own_one_stays_as_it_was(tmp_path, monkeypatch) -> None:
    alone = run(tmp_path / "alone.jsonl", 1, recipe=SHORT)
    monkeypatch.setattr(local_workers, "_can_fork", lambda _: False)
    model, splits = make(Residual)
    before = snapshot(model)
    shared = sweep(model, splits, out=tmp_path / "shared.jsonl", recipe=SHORT, workers=2)
    pandas.testing.assert_frame_equal(alone, shared, rtol=0, atol=1e-6)
    assert_same(before, snapshot(model))


def test_a_model_that_cannot_be_pickled_is_named_where_it_has_to_be(tmp_path, monkeypatch) -> None:
    model, splits = make(Residual)
    model.blocks[0].register_forward_hook(lambda *_: None)
    sweep(model, splits, out=tmp_path / "forked.jsonl", recipe=SHORT, layers=["stem"], workers=2)
    monkeypatch.setattr(local_workers, "_can_fork", lambda _: False)
    with pytest.raises(ValueError, match=r"cannot be sent to other processes .*workers=1"):
        sweep(model, splits, out=tmp_path / "records.jsonl", recipe=SHORT, layers=["stem"], workers=2)


def test_processes_that_are_started_do_not_look_into_the_current_folder_first(monkeypatch) -> None:
    program = "import sys; print('' in sys.path[:1])"  # as multiprocessing starts its own, by `python -c`
    for before in (None, "1"):
        monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
        if before:
            monkeypatch.setenv("PYTHONSAFEPATH", before)
        with current_folder_not_first():
            said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert said.stdout.strip() == "False" and os.environ.get("PYTHONSAFEPATH") == before


def test_a_worker_that_is_killed_loses_nothing(tmp_path) -> None:
    plain = run(tmp_path / "plain.jsonl", 1)
    model, splits = make(Residual)
    mortal = Mortal(model, tmp_path, lives=1)
    frame = sweep(mortal, splits, out=tmp_path / "records.jsonl", recipe=RECIPE, workers=2)
    assert len(list(tmp_path.glob("died-*"))) == 1
    assert_each_once(tmp_path / "records.jsonl", 14)
    frame["layer"] = frame.layer.str.removeprefix("inner.")
    pandas.testing.assert_series_equal(frame.loss, plain.loss, rtol=0, atol=1e-6)


def test_a_trial_that_kills_every_worker_is_named_and_the_rest_is_kept(tmp_path) -> None:
    model, splits = make(Residual)
    with pytest.raises(RuntimeError, match=r"3 workers died .*'inner\.\S+' with seed \d \(.*killed by SIGKILL"):
        sweep(Mortal(model, tmp_path, lives=99), splits, out=tmp_path / "records.jsonl", recipe=SHORT, workers=2)
    kept = trials_in(tmp_path / "records.jsonl")
    sweep(Mortal(model, tmp_path, lives=0), splits, out=tmp_path / "records.jsonl", recipe=SHORT)
    assert trials_in(tmp_path / "records.jsonl")[: len(kept)] == kept
    assert_each_once(tmp_path / "records.jsonl", 7)


def test_a_full_disk_in_the_middle_loses_nothing(tmp_path, monkeypatch) -> None:
    write = records_module.write_fully

    def full(descriptor, data):
        if b'"record":"layer"' in data and (tmp_path / "records.jsonl").read_bytes().count(b'"record":"layer"') == 3:
            write(descriptor, data[:20])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(descriptor, data)

    monkeypatch.setattr(records_module, "write_fully", full)
    with pytest.raises(RuntimeError, match=r"No space left on device.*it goes on from there"):
        run(tmp_path / "records.jsonl", 2, recipe=SHORT)
    assert not local_workers.multiprocessing.active_children()
    monkeypatch.undo()
    kept = trials_in(tmp_path / "records.jsonl")
    run(tmp_path / "records.jsonl", 2, recipe=SHORT)
    assert len(kept) == 3 and trials_in(tmp_path / "records.jsonl")[:3] == kept
    assert_each_once(tmp_path / "records.jsonl", 7)


def test_what_a_trial_raises_arrives_as_it_is(tmp_path) -> None:
    class Picky(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.parent = inner, os.getpid()

        def forward(self, x):
            if os.getpid() != self.parent:
                raise ValueError("not in this process")
            return self.inner(x)

    model, splits = make(Residual)
    with pytest.raises(ValueError, match="not in this process"):
        sweep(Picky(model), splits, out=tmp_path / "records.jsonl", recipe=SHORT, workers=2)
    assert not local_workers.multiprocessing.active_children()


def test_workers_end_with_their_parent_and_free_the_file(tmp_path) -> None:
    path = tmp_path / "records.jsonl"
    program = (
        "import torch; torch.set_num_threads(1)\n"
        "from test_sweep_workers import RECIPE, run\n"
        "from zest_fast.sweeping import local_workers, trials\n"
        "import time\n"
        "evaluate = trials.evaluate\n"
        "trials.evaluate = lambda *a: (time.sleep(0.1), evaluate(*a))[1]\n"
        f"run({str(path)!r}, 2)\n"
    )
    kill_after(program, path, layers=2)
    run(path, 1)  # at once: no worker holds the lock
    assert_each_once(path, 14)


@pytest.mark.parametrize(("workers", "error"), [(0, ValueError), (True, TypeError), (1.5, TypeError), ("", ValueError)])
def test_workers_that_cannot_be_are_named(workers, error, tmp_path) -> None:
    with pytest.raises(error, match="workers is"):
        run(tmp_path / "records.jsonl", workers)


class Scripted:
    """A pool whose workers finish in turn, but for those that the script lets die."""

    def __init__(self, size, dying=()):
        self.size, self.dying, self.started, self.replaced = size, list(dying), [], []
        self.running = {}

    def start(self, worker, trial):
        self.started.append((worker, trial))
        self.running[worker] = trial

    def wait(self):
        worker = min(self.running)
        trial = self.running.pop(worker)
        if trial in self.dying:
            self.dying.remove(trial)
            return [(worker, Died("script"))]
        return [(worker, {"loss": 0.0})]

    def replace(self, worker):
        self.replaced.append(worker)


TRIALS = [Trial(layer, seed) for layer in "abc" for seed in (0, 1)]


def test_a_worker_stays_with_its_layer_and_others_begin_the_next() -> None:
    pool = Scripted(2)
    distribute(TRIALS, pool, lambda *_: None)
    assert pool.started[:3] == [(0, Trial("a", 0)), (1, Trial("b", 0)), (0, Trial("a", 1))]


def test_a_trial_is_done_again_only_where_its_worker_died() -> None:
    done = []
    pool = Scripted(2, dying=[TRIALS[2], TRIALS[2], TRIALS[5]])
    distribute(TRIALS, pool, lambda trial, _: done.append(trial))
    assert sorted(done) == TRIALS and len(pool.replaced) == 3


@needs_ray
@pytest.mark.slow  # pytest -m slow tests/sweeping/test_sweep_workers.py
def test_ray_writes_the_records_of_one_process_although_a_worker_is_killed(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "240")  # a busy machine starts it slowly
    import ray

    plain = run(tmp_path / "plain.jsonl", 1)
    model, splits = make(Residual)
    there = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}  # else no worker could import sweeping_models
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=there)
    try:
        mortal = Mortal(model, tmp_path, lives=1)
        frame = sweep(mortal, splits, out=tmp_path / "records.jsonl", recipe=RECIPE, workers="ray")
        assert ray.is_initialized()  # the connection was there before
    finally:
        ray.shutdown()
    assert len(list(tmp_path.glob("died-*"))) == 1
    assert_each_once(tmp_path / "records.jsonl", 14)
    pandas.testing.assert_series_equal(frame.loss, plain.loss, rtol=0, atol=1e-6)


def test_missing_ray_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'zest_fast\[ray\]'"):
        run(tmp_path / "records.jsonl", "ray", recipe=SHORT)
