"""Passes that meet the end of memory, other threads, forks, and five hundred of their kind.

`pytest -m slow tests/faults/test_passes.py` starts whole processes, and the five hundred.
"""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from kills import said_by
from small_models import Mlp, assert_same, snapshot
from torch import nn
from typer.testing import CliRunner

import zest_fast
from zest_fast.cli import app

MIB = 2**20
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="limits and sizes of processes as Linux has them")


def in_a_process(program: str, *, threads: int = 1, timeout: float = 120) -> str:
    """What it prints; its end is the test's."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "support")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Memory ends


class Wide(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(64, width), nn.Linear(width, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.second(self.first(x)))


@LINUX
@pytest.mark.parametrize(("room", "place"), [(100, "in 'first'"), (200, "in the backward pass of 'second'")])
def test_memory_that_ends_in_a_pass(one_thread, room, place) -> None:
    """The output of `first` has 128 MiB, and so has the gradient of it."""
    rows, width = 4096, 8192
    model, labels = Wide(width), torch.zeros(rows, dtype=torch.long)
    zest_fast.profile(Wide(8), (torch.randn(rows, 64), labels))  # what is imported and allocated once

    def work() -> str:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        batch = torch.randn(rows, 64), labels
        before, gradients = snapshot(model), [p.grad for p in model.parameters()]
        resource.setrlimit(resource.RLIMIT_AS, (bytes_of_this_process(0) + room * MIB, resource.RLIM_INFINITY))
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            zest_fast.profile(model, batch)
        assert_same(before, snapshot(model))
        assert all(p.grad is g and (g == 1).all() for p, g in zip(model.parameters(), gradients, strict=True))
        assert not model.first._forward_hooks
        zest_fast.profile(model, (batch[0][:64], labels[:64]))  # what there is memory for
        return "; ".join([str(caught.value), *caught.value.__notes__])

    said = said_by(work)
    assert place in said and f"{rows * width * 4} bytes more" in said and "the model is as it was" in said, said


def bytes_of_this_process(which: int) -> int:
    """0: of addresses, 1: in memory."""
    return int(Path("/proc/self/statm").read_text().split()[which]) * resource.getpagesize()


def test_the_command_says_it_in_its_line(monkeypatch, tmp_path) -> None:
    (tmp_path / "zest_ends_memory.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.body, self.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)\n"
        "    def forward(self, x):\n"
        "        return self.head(self.body(x) if len(x) < 2 else self.body(torch.empty(2**58)))\n"
        "def batches():\n"
        "    data = torch.utils.data.TensorDataset(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))\n"
        "    return torch.utils.data.DataLoader(data, batch_size=4)\n"
    )
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["profile", "zest_ends_memory:Net", "zest_ends_memory:batches"])
    (line,) = result.stderr.splitlines()[-1:]
    assert result.exit_code == 2 and line.startswith("error: ") and f"{2**60} bytes" in line
    assert "memory ended in the model's own forward" in line and "take a smaller batch" in line


def test_memory_that_ends_after_the_pass_names_no_layer_of_it() -> None:
    losses = []

    def loss(output, target):
        losses.append(nn.functional.cross_entropy(output, target))
        if len(losses) > 1:  # of a pass that grasp takes
            torch.empty(2**58)
        return losses[-1]

    with pytest.raises(RuntimeError) as caught:
        zest_fast.profile(
            Mlp(), (torch.randn(3, 4), torch.zeros(3, dtype=torch.long)), loss_fn=loss, metrics=["snip", "grasp"]
        )
    (note,) = caught.value.__notes__
    assert note.startswith(f"memory ended outside of any layer, which wanted {2**60} bytes more")


def test_other_errors_get_no_note() -> None:
    class Fails(Mlp):
        def forward(self, x):
            raise RuntimeError("a word about memory")

    with pytest.raises(RuntimeError) as caught:
        zest_fast.profile(Fails(), (torch.randn(3, 4), torch.zeros(3, dtype=torch.long)))
    assert not hasattr(caught.value, "__notes__")


@LINUX
@pytest.mark.parametrize("profiles", [100, pytest.param(500, marks=pytest.mark.slow)])
def test_profiles_in_a_row_keep_memory_flat(one_thread, profiles) -> None:
    """Activations have 130 KiB in each, and a profile that stayed would have some."""
    layers = nn.Linear(64, 256), nn.ReLU(), nn.Unflatten(1, (1, 256)), nn.Conv1d(1, 4, 3), nn.Flatten()
    model, batch = nn.Sequential(*layers, nn.Linear(4 * 254, 3)), (torch.randn(32, 64), torch.arange(32) % 3)

    def work() -> int:
        for _ in range(30):
            zest_fast.profile(model, batch)
        gc.collect()
        before, objects = bytes_of_this_process(1), len(gc.get_objects())
        for _ in range(profiles):
            zest_fast.profile(model, batch)
        gc.collect()
        assert len(gc.get_objects()) - objects < 100
        return bytes_of_this_process(1) - before

    assert int(said_by(work)) < 2 * MIB


# Threads and processes


def test_two_models_from_two_threads(one_thread) -> None:
    def subject(seed: int) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, 3))
        return model, (torch.randn(64, 8), torch.arange(64) % 3)

    subjects = [subject(seed) for seed in (0, 1)]
    alone = [zest_fast.profile(model, batch).values for model, batch in subjects]
    before = [snapshot(model) for model, _ in subjects]
    found: list[list[np.ndarray]] = [[], []]
    errors: list[BaseException] = []
    start = threading.Barrier(2)

    def run(number: int) -> None:
        model, batch = subjects[number]
        start.wait()
        try:
            for _ in range(15):
                found[number].append(zest_fast.profile(model, batch).values)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    for expected, values in zip(alone, found, strict=True):
        assert len(values) == 15
        for one in values:
            np.testing.assert_array_equal(one, expected)
    for kept, (model, _) in zip(before, subjects, strict=True):
        assert_same(kept, snapshot(model))


SWEEP = """
import sys, torch
from dataclasses import replace
from sweeping_models import RECIPE, Residual, make
import zest_fast
from zest_fast.sweeping import local_workers
from zest_fast.sweeping.sweep import sweep
if __name__ == "__main__":
    torch.set_num_threads({threads})
    big = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.Linear(512, 3))
    zest_fast.profile(big, (torch.randn(512, 512), torch.arange(512) % 3))  # OpenMP's threads are there now
    methods = []
    pool = local_workers.LocalPool.__init__
    def seen(self, *arguments):
        pool(self, *arguments)
        methods.append(self._context.get_start_method())
    local_workers.LocalPool.__init__ = seen
    model, splits = make(Residual)
    recipe = replace(RECIPE, seeds=(0,), steps=1)
    frame = sweep(model, splits, out={path!r}, recipe=recipe, layers=["stem", "blocks.0.first"], workers=2)
    print(*sorted(set(frame.layer)), *set(methods))
"""


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize(("threads", "method"), [(2, "fork"), (4, "spawn")])
def test_workers_after_the_threads_of_openmp(tmp_path, threads, method) -> None:
    """A forked process has none of the threads that OpenMP believes in: it may use one only."""
    program = tmp_path / "program.py"  # spawned processes import it again
    program.write_text(SWEEP.format(threads=threads, path=str(tmp_path / "records.jsonl")))
    said = in_a_process(
        f"import runpy; runpy.run_path({str(program)!r}, run_name='__main__')", threads=threads, timeout=600
    )
    assert said.split() == ["blocks.0.first", "stem", method]


FORKED = """
import os, signal, torch, zest_fast
torch.set_num_threads(2)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.Linear(512, 3))
batch = torch.randn(512, 512), torch.arange(512) % 3
expected = zest_fast.profile(model, batch, metrics="all").values
child = os.fork()
if not child:
    signal.alarm(60)
    torch.set_num_threads(1)
    found = zest_fast.profile(model, batch, metrics="all").values
    import numpy
    numpy.testing.assert_allclose(found, expected, rtol=1e-4, equal_nan=True)
    os._exit(0)
print(os.waitpid(child, 0)[1])
"""


@LINUX
@pytest.mark.slow
def test_a_forked_process_profiles_with_one_thread() -> None:
    assert in_a_process(FORKED, threads=2).split() == ["0"]
