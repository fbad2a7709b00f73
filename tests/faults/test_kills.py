"""Processes killed (SIGKILL) at random moments: nothing is lost or doubled, and what goes on ends as if undisturbed.

A few kills of each kind by default; `pytest -m slow tests/faults/test_kills.py` takes fifty, with moments of their own.
"""

from __future__ import annotations

import gzip
import itertools
import random
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from kills import Killer
from profiles import make_profile
from reuse_models import VECTORS, Chain, make_splits
from safetensors.torch import load_file
from small_models import Mlp
from sweeping_models import RECIPE, Residual, make
from synthetic_records import make_records, write_sweep
from torch import nn
from typer.testing import CliRunner
from watched_runs import make_step

from zest_fast import LayerProfile, PrefixCache, SelectiveBackward
from zest_fast.cli import app
from zest_fast.finetuning.delta_files import read_delta
from zest_fast.finetuning.delta_use import merge_delta
from zest_fast.ranking.ranker import Ranker
from zest_fast.ranking.ranking import Ranking, rank
from zest_fast.sweeping.records import RecordFile, read_records
from zest_fast.sweeping.sweep import sweep
from zest_fast.sweeping.tables import consolidate, load_records
from zest_fast.watching.logs.sinks import sink_for
from zest_fast.watching.logs.watch_log import load_watch

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(sys.platform != "linux", reason="processes are forked and killed"),
]
FEW, MANY = 2, 50
KEY = ("record", "seed", "layer", "head_state")


@pytest.fixture(params=[FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def kills(request) -> int:
    return request.param


def lines_of(path: Path) -> list[str]:
    """The records of a sweep that are there, as they stand in the file."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


# What goes on from what is there


@pytest.mark.slow  # starts many processes
def test_sweeps_with_workers(tmp_path, kills) -> None:
    recipe, layers = replace(RECIPE, steps=2), ["stem", "blocks.0.first", "blocks.2.second"]

    def work(path: Path) -> None:
        model, splits = make(Residual)
        sweep(model, splits, out=path, recipe=recipe, layers=layers, workers=2)

    killer = Killer(kills)
    killer.undisturbed(lambda: work(tmp_path / "whole.jsonl"), lambda: work(tmp_path / "again.jsonl"))
    model, splits = make(Residual)
    whole = sweep(model, splits, out=tmp_path / "whole.jsonl", recipe=recipe, layers=layers)
    for number in itertools.count():
        path, kept = tmp_path / f"{number}.jsonl", []
        while killer.kills < kills and killer.killed(lambda path=path: work(path)):
            now = lines_of(path)
            assert now[: len(kept)] == kept  # what was recorded stays
            kept = now
            if kept:
                keys = [tuple(r.get(key) for key in KEY) for r in read_records(path)[1]]
                assert len(keys) == len(set(keys))
        if not path.exists():
            continue
        frame = sweep(model, splits, out=path, recipe=recipe, layers=layers)
        columns = ["layer", "seed", "loss", "accuracy"]
        order = ["layer", "seed"]
        pandas.testing.assert_frame_equal(
            frame[columns].sort_values(order, ignore_index=True),
            whole[columns].sort_values(order, ignore_index=True),
            check_exact=True,
        )
        if killer.kills == kills:
            break
    assert not [entry.name for entry in tmp_path.iterdir() if entry.suffix != ".jsonl"]


class Run:
    """A model with dropout that trains for `STEPS` steps, the run saved after each."""

    STEPS = 12

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        self.tuned = SelectiveBackward(self.model, ["0"], head=["1", "3"])
        self.optimizer = torch.optim.AdamW(self.tuned.parameters(), lr=0.01)

    def train(self, path: Path) -> None:
        done = self.tuned.resume(path, self.optimizer)["step"] if path.exists() else 0
        for step in range(done + 1, self.STEPS + 1):
            self.model(torch.randn(5, 6) + np.random.rand()).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.tuned.save_run(path, self.optimizer, progress={"step": step})


def test_runs_that_are_saved_after_each_step(tmp_path, kills) -> None:
    def work(path: Path) -> None:
        np.random.seed(0)
        Run().train(path)

    killer = Killer(kills)
    killer.undisturbed(lambda: work(tmp_path / "whole.run"), lambda: work(tmp_path / "again.run"))

    def state(path: Path) -> dict[str, torch.Tensor]:
        run = Run()
        assert run.tuned.resume(path, run.optimizer) == {"step": Run.STEPS}
        return run.model.state_dict()

    whole = state(tmp_path / "whole.run")
    for number in itertools.count():
        path = tmp_path / f"{number}.run"
        step = 0
        while killer.kills < kills and killer.killed(lambda path=path: work(path)):
            if path.exists():
                run = Run()
                now = run.tuned.resume(path, run.optimizer)["step"]
                assert now >= step
                step = now
        work(path)
        assert all(torch.equal(whole[name], tensor) for name, tensor in state(path).items())
        if killer.kills == kills:
            break
    assert not [entry.name for entry in tmp_path.iterdir() if entry.suffix != ".run"]


USER_MODULE = """
import random
import torch
from torch.utils.data import DataLoader, Dataset

class Noisy(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        return torch.full((4,), index / 20) + torch.randn(4) * 0.1 + random.random() * 0.1, index % 2

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = torch.nn.Linear(4, 6), torch.nn.Linear(6, 6), torch.nn.Linear(6, 2)
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x):
        return self.head(self.drop(self.b(self.a(x).relu()).relu()))

def net():
    torch.manual_seed(1)
    return Net()

def noisy():
    return DataLoader(Noisy(), batch_size=4, shuffle=True)
"""


@pytest.mark.slow  # starts many processes
def test_the_command_finetune(tmp_path, monkeypatch, kills) -> None:
    (tmp_path / "zest_kills_user.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    start = ("finetune", "zest_kills_user:net", "zest_kills_user:noisy", "--layers", "a", "--epochs", "3")

    def work(out: str) -> None:
        random.seed(11)  # which the command leaves to whoever uses it
        run = f"{out}.run.pt"
        words = (*start[:3], "--resume", run) if Path(run).exists() else (*start, "--save-every", "1")
        result = CliRunner().invoke(app, [*words, "--out", f"{out}.safetensors"])
        assert result.exit_code == 0, result.stderr

    killer = Killer(kills)
    killer.undisturbed(lambda: work("whole"), lambda: work("again"))
    whole = read_delta("whole.safetensors")
    for number in itertools.count():
        while killer.kills < kills and killer.killed(lambda number=number: work(str(number))):
            pass
        if not Path(f"{number}.safetensors").exists():
            work(str(number))
        found = read_delta(f"{number}.safetensors")
        assert all(torch.equal(tensor, found.parameters[name]) for name, tensor in whole.parameters.items())
        if killer.kills == kills:
            break


def test_prefix_caches(tmp_path, kills) -> None:
    inputs, targets = make_splits(VECTORS)["head"]
    batches = [(inputs[at : at + 4], targets[at : at + 4]) for at in range(0, 24, 4)]

    def trained(cache: PrefixCache | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        model = Chain(nn.GELU()).eval()
        with SelectiveBackward(model, ["third"], head="head", cache=cache) as tuned:
            optimizer = torch.optim.SGD(tuned.parameters(), lr=0.05)
            for x, y in batches * 2:
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
            return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    plain = trained(None)
    killer = Killer(kills)
    killer.undisturbed(
        lambda: trained(PrefixCache(tmp_path / "whole")), lambda: trained(PrefixCache(tmp_path / "again"))
    )
    read = 0
    for number in itertools.count():
        folder = tmp_path / str(number)
        while killer.killed(lambda folder=folder: trained(PrefixCache(folder))) and killer.kills < kills:
            if killer.kills % 3 == 0:
                break  # or several processes leave something in one folder
        cache = PrefixCache(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing of it is damaged
            found = trained(cache)
        assert all(torch.equal(plain[name], tensor) for name, tensor in found.items())
        assert cache.kept == 24
        read += 24 - cache.computed
        if killer.kills == kills:
            break
    assert read > 0  # some of what killed processes left was used


# Files that grow


def test_record_files_and_their_tables(tmp_path, kills) -> None:
    header = {"model": "tiny", "dataset": "toys", "family": "toys", "recipe": {"seeds": [0]}, "layers": ["a"]}
    rows = make_records(("tower",), ("cats",), blocks=2, seeds=1, states=("fresh",))
    finished = write_sweep(rows, tmp_path / "finished.jsonl")
    consolidate([finished], tmp_path / "all.parquet")
    expected = load_records(tmp_path / "all.parquet")

    def work(path: Path) -> None:
        with RecordFile(path, header) as file:
            for number in range(len(file.records), 60):
                file.append({"record": "layer", "seed": 0, "layer": f"l{number}", "loss": 0.5, "accuracy": 0.5})
                if number % 10 == 0:
                    (tmp_path / "all.parquet").unlink(missing_ok=True)
                    consolidate([finished], tmp_path / "all.parquet")

    killer = Killer(kills)
    killer.undisturbed(lambda: work(tmp_path / "whole.jsonl"), lambda: work(tmp_path / "again.jsonl"))
    for number in itertools.count():
        path, there = tmp_path / f"{number}.jsonl", 0
        while killer.kills < kills and killer.killed(lambda path=path: work(path)):
            if lines_of(path):
                now = [record["layer"] for record in read_records(path)[1]]
                assert len(now) >= there and now == [f"l{at}" for at in range(len(now))]
                there = len(now)
            if (tmp_path / "all.parquet").exists():
                pandas.testing.assert_frame_equal(load_records(tmp_path / "all.parquet"), expected)
        work(path)
        assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
        if killer.kills == kills:
            break


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_watch_logs(tmp_path, kills, ending) -> None:
    def work(path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a line that is torn, which is taken away
            done = len(load_watch(path).steps) if path.exists() and path.stat().st_size else 0
            sink = sink_for(path)
        for step in range(done, 40):
            sink(make_step(step, full=True))
        sink.close()

    killer = Killer(kills)
    killer.undisturbed(lambda: work(tmp_path / f"whole.{ending}"), lambda: work(tmp_path / f"again.{ending}"))
    whole = load_watch(tmp_path / f"whole.{ending}").to_pandas()
    for number in itertools.count():
        path, there = tmp_path / f"{number}.{ending}", 0
        while killer.kills < kills and killer.killed(lambda path=path: work(path)):
            if path.exists() and path.stat().st_size:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    steps = [step.step for step in load_watch(path).steps]
                assert steps == list(range(len(steps))) and len(steps) >= there
                there = len(steps)
        work(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pandas.testing.assert_frame_equal(load_watch(path).to_pandas(), whole)
        if killer.kills == kills:
            break


# Files that are replaced


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return Mlp()


def delta_saver(value: float) -> Callable[[Path], object]:
    tuned = SelectiveBackward(mlp(), ["a"])
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.fill_(value)
    return tuned.save


def merger(value: float) -> Callable[[Path], object]:
    save = delta_saver(value)

    def merge(path: Path) -> None:
        delta = path.with_name(f"of-{value}.delta")
        if not delta.exists():
            save(delta)
        merge_delta(mlp(), delta, path)

    return merge


def profile_of(value: float) -> LayerProfile:
    return make_profile({"a": value, "b": 2.0, "head": 0.0}, heads=("head",))


def ranker_saver(value: float) -> Callable[[Path], object]:
    old = Path(__file__).parents[1] / "data" / f"ranker_v{1 + int(value)}.json.gz"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ranker.json"
        path.write_bytes(gzip.decompress(old.read_bytes()))
        return Ranker.load(path).save


def what_ranker(path: Path) -> object:
    Ranker.load(path)
    return path.read_bytes()


# By name: what makes a function that saves, and what reads the file and says what is in it.
REPLACED: dict[str, tuple[Callable[[float], Callable[[Path], object]], Callable[[Path], object]]] = {
    "delta.safetensors": (delta_saver, lambda path: str(read_delta(path).parameters)),
    "merged.safetensors": (merger, lambda path: str(load_file(path))),
    "profile.json": (lambda value: profile_of(value).save, lambda path: str(LayerProfile.load(path).values)),
    "profile.parquet": (lambda value: profile_of(value).save, lambda path: str(LayerProfile.load(path).values)),
    "ranking.json": (lambda value: rank(profile_of(value), by="snip").save, lambda path: Ranking.load(path).plain()),
    "ranker.json": (ranker_saver, what_ranker),
}


@pytest.mark.parametrize("name", REPLACED)
def test_files_that_are_replaced(tmp_path, kills, name) -> None:
    make_saver, read = REPLACED[name]
    savers = [make_saver(value) for value in (0.0, 1.0)]
    path = tmp_path / name
    contents = []
    for save in savers:
        save(path)
        contents.append(read(path))
    assert contents[0] != contents[1]
    there = {entry.name for entry in tmp_path.iterdir()}

    def work() -> None:
        for save in savers * 3:
            save(path)

    killer = Killer(kills)
    killer.undisturbed(work, work)
    while killer.kills < kills:
        killer.killed(work)
        assert read(path) in contents
    savers[1](path)
    assert {entry.name for entry in tmp_path.iterdir()} == there  # whatever the killed ones left is gone


def test_a_write_that_is_no_replacement_is_torn(tmp_path) -> None:
    """So the moments do fall into writing, and the tests above can fail."""
    path, text = tmp_path / "torn.json", "x" * 20_000_000

    def work() -> None:
        for _ in range(5):
            path.write_text(text)

    killer = Killer(1)
    killer.undisturbed(work, work)
    for _ in range(100):
        killer.killed(work)
        if path.stat().st_size < len(text):
            return
    pytest.fail("no write was torn by 100 kills")
