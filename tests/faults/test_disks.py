"""Disks that are full or may only be read, and two writers on one file, for everything that the library writes.

With root's rights the disk is a tmpfs of 1 MiB; without them a limit on the size of files, and a folder without rights.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from profiles import make_profile
from reuse_models import VECTORS, Chain, make_splits
from small_models import Mlp, assert_same, snapshot
from synthetic_records import make_records, write_sweep
from torch import nn
from watched_runs import make_step

from zest_fast import PrefixCache, SelectiveBackward, sink_for
from zest_fast.finetuning.delta_files import read_delta
from zest_fast.finetuning.delta_use import merge_delta
from zest_fast.ranking.ranker import Ranker
from zest_fast.ranking.ranking import rank
from zest_fast.sweeping.records import RecordFile, read_records
from zest_fast.sweeping.tables import consolidate
from zest_fast.watching.logs.watch_log import load_watch

pytestmark = pytest.mark.usefixtures("one_thread")
HEADER = {"model": "tiny", "dataset": "toys", "family": "toys", "recipe": {"seeds": [0]}, "layers": ["a"]}


class Disk:
    """A folder on a disk of 1 MiB."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        options = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
        self.mounted = os.geteuid() == 0 and not subprocess.run(options, capture_output=True).returncode
        self._limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, left: int = 0) -> None:
        """But for so many bytes."""
        if not self.mounted:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (left + 1, self._limit[1]))
            return
        with suppress(OSError), open(self.folder / "filling", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        if left:
            os.truncate(self.folder / "filling", (self.folder / "filling").stat().st_size - left)

    def forbid(self) -> None:
        """Writing."""
        if self.mounted:
            subprocess.run(["mount", "-o", "remount,ro", str(self.folder)], check=True)
        elif os.geteuid() == 0:
            pytest.skip("nothing is forbidden to root, who cannot mount here")
        else:
            self.folder.chmod(0o500)

    def give_back(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._limit)
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.folder)], check=True)
        else:
            self.folder.chmod(0o700)


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    (tmp_path / "disk").mkdir()
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.give_back()


def tuned_model() -> tuple[nn.Module, SelectiveBackward]:
    torch.manual_seed(0)
    model = Mlp()
    return model, SelectiveBackward(model, ["a"])


def save_run(folder: Path) -> Callable[[Path], Any]:
    _, tuned = tuned_model()
    optimizer = torch.optim.AdamW(tuned.parameters())
    return lambda path: tuned.save_run(path, optimizer)


def merge(folder: Path) -> Callable[[Path], Any]:
    model, tuned = tuned_model()
    delta = tuned.save(folder / "delta")
    return lambda path: merge_delta(model, delta, path)


def save_ranker(folder: Path) -> Callable[[Path], Any]:
    import gzip

    old = Path(__file__).parents[1] / "data" / "ranker_v2.json.gz"
    (folder / "old.json").write_bytes(gzip.decompress(old.read_bytes()))
    return Ranker.load(folder / "old.json").save


def save_table(folder: Path) -> Callable[[Path], Any]:
    rows = make_records(("tower",), ("cats",), blocks=2, seeds=1, states=("fresh",))
    sweep = write_sweep(rows, folder / "sweep.jsonl")

    def save(path: Path) -> None:
        consolidate([sweep], path)

    return save


PROFILE = make_profile({f"layer{number}": 1.0 for number in range(100)})
WRITERS: dict[str, Callable[[Path], Callable[[Path], Any]]] = {
    "delta.safetensors": lambda _: tuned_model()[1].save,
    "merged.safetensors": merge,
    "run.pt": save_run,
    "profile.json": lambda _: PROFILE.save,
    "profile.parquet": lambda _: PROFILE.save,
    "ranking.json": lambda _: rank(PROFILE, by="snip").save,
    "ranker.json": save_ranker,
    "records.parquet": save_table,
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("there", ["an old file", "nothing"])
def test_a_full_disk_leaves_what_was_there_and_says_which_file(tmp_path, disk, name, there) -> None:
    write, path = WRITERS[name](tmp_path), disk.folder / name
    if there == "an old file" and name != "records.parquet":  # which only makes new ones
        write(path)
    before = {entry.name: entry.read_bytes() for entry in disk.folder.iterdir()}
    disk.fill()
    with pytest.raises(OSError) as caught:
        write(path)
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG) and caught.value.filename == str(path)
    (disk.folder / "filling").unlink(missing_ok=True)
    assert {entry.name: entry.read_bytes() for entry in disk.folder.iterdir()} == before


@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_may_only_be_read(tmp_path, disk, name) -> None:
    write, path = WRITERS[name](tmp_path), disk.folder / name
    if name != "records.parquet":
        write(path)
    before = {entry.name: entry.read_bytes() for entry in disk.folder.iterdir()}
    disk.forbid()
    with pytest.raises(OSError) as caught:
        write(path)
    assert caught.value.errno in (errno.EROFS, errno.EACCES) and caught.value.filename == str(path)
    assert {entry.name: entry.read_bytes() for entry in disk.folder.iterdir()} == before


def test_records_on_a_full_disk_go_on_when_there_is_room(disk) -> None:
    path = disk.folder / "records.jsonl"
    record = {"record": "layer", "seed": 0, "loss": 0.5, "accuracy": 0.5}
    written = 0
    with RecordFile(path, HEADER) as file:
        disk.fill(left=8192 if disk.mounted else path.stat().st_size + 2000)
        with pytest.raises(RuntimeError, match=r"records\.jsonl' cannot be written .*make room and run the same sweep"):
            for number in range(1000):
                file.append({**record, "layer": f"l{number}"})
                written += 1
    assert written > 5
    names = [one["layer"] for one in read_records(path)[1]]
    assert names == [f"l{number}" for number in range(written)]
    disk_is_empty_again(disk)
    with RecordFile(path, HEADER) as file:
        file.append({**record, "layer": "more"})
    assert [one["layer"] for one in read_records(path)[1]] == [*names, "more"]


def disk_is_empty_again(disk: Disk) -> None:
    (disk.folder / "filling").unlink(missing_ok=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, disk._limit)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_watch_logs_on_a_full_disk(disk, ending) -> None:
    path = disk.folder / f"run.{ending}"
    sink = sink_for(path)
    sink(make_step(0, full=True))
    size = sum(entry.stat().st_size for entry in disk.folder.iterdir())
    disk.fill(left=8192 if disk.mounted else size + 4000)
    there = 1
    with pytest.raises(OSError, match=rf"run\.{ending}"):
        for step in range(1, 1000):
            sink(make_step(step, full=True))
            there += 1
    disk_is_empty_again(disk)
    sink(make_step(5000, full=True))
    sink.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps = [step.step for step in load_watch(path).steps]
    assert steps == [*range(there), 5000]


def test_a_cache_on_a_full_disk_trains_on(disk) -> None:
    inputs, targets = make_splits(VECTORS)["head"]

    def trained(cache: PrefixCache | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        model = Chain(nn.GELU()).eval()
        with SelectiveBackward(model, ["third"], head="head", cache=cache) as tuned:
            optimizer = torch.optim.SGD(tuned.parameters(), lr=0.05)
            for at in (*range(0, 24, 4), *range(0, 24, 4)):
                nn.functional.cross_entropy(model(inputs[at : at + 4]), targets[at : at + 4]).backward()
                optimizer.step()
                optimizer.zero_grad()
            return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    plain = trained(None)
    disk.fill(left=8192 if disk.mounted else 800)
    cache = PrefixCache(disk.folder)
    if not disk.mounted:
        with pytest.warns(UserWarning, match="is full; what is kept is used"):
            found = trained(cache)
        assert 0 < cache.kept < 24
    else:
        disk.fill()
        with pytest.warns(UserWarning, match="is full; what is kept is used"):
            found = trained(cache)
    assert all(torch.equal(plain[name], tensor) for name, tensor in found.items())


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "records.parquet"])
def test_a_device_is_not_written_to(tmp_path, name) -> None:
    write, path = WRITERS[name](tmp_path), tmp_path / f"link-{name}"
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="a device") as caught:
        write(path)
    assert caught.value.filename == str(path) and path.is_symlink()


# Two writers


def test_two_processes_that_save_one_file(tmp_path) -> None:
    """Each file that is ever seen is one of the two, and nothing else is left."""
    path = tmp_path / "delta.safetensors"
    writers = []
    for value in (0.0, 1.0):
        _, tuned = tuned_model()
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.fill_(value)
        tuned.save(path)
        process = os.fork()
        if not process:
            with suppress(BaseException):
                for _ in range(100):
                    tuned.save(path)
                os._exit(0)
            os._exit(1)
        writers.append(process)
    seen = set()
    for process in writers:
        while not (ended := os.waitpid(process, os.WNOHANG))[0]:
            seen.add(float(read_delta(path).parameters["a.weight"].unique()))
        assert ended[1] == 0
    assert seen <= {0.0, 1.0} and [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_second_writer_of_records_and_logs_is_refused(tmp_path) -> None:
    with RecordFile(tmp_path / "r.jsonl", HEADER), pytest.raises(RuntimeError, match="in use by another sweep"):
        RecordFile(tmp_path / "r.jsonl", HEADER)
    for ending in ("jsonl", "parquet"):
        sink = sink_for(tmp_path / f"w.{ending}")
        sink(make_step(0))
        with pytest.raises(RuntimeError, match=rf"w\.{ending}.*' is in use by"):
            sink_for(tmp_path / f"w.{ending}")(make_step(1))
        sink.close()
        assert [step.step for step in load_watch(tmp_path / f"w.{ending}").steps] == [0]


def test_a_model_is_as_it_was_when_its_delta_could_not_be_saved(disk) -> None:
    model, tuned = tuned_model()
    before = snapshot(model)
    disk.fill()
    with pytest.raises(OSError):
        tuned.save(disk.folder / "d.safetensors")
    assert_same(before, snapshot(model))
