"""Files that were damaged, or edited with their checksums renewed: an error that names the file, and nothing changed.

Each file is loaded in a child process, which survives neither a crash nor an endless loop: both are found then.
"""

from __future__ import annotations

import contextlib
import copy
import json
import multiprocessing
import os
import queue
import random
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from zest_fast.finetuning.delta_files import checksum as delta_checksum
from zest_fast.finetuning.delta_use import DeltaSwitch, apply_delta, merge_delta
from zest_fast.finetuning.run_state import checksum as run_checksum
from zest_fast.finetuning.selective_backward import SelectiveBackward

DATA = Path(__file__).parents[1] / "data"
SLOWEST = 5.0  # seconds of computing for an answer: others may use the machine


class Job:
    """A model, what trains in it, and the objects of its run; also that of the files in tests/data."""

    def __init__(self):
        self.model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_((torch.arange(p.numel()) / 8 - 0.5).view(p.shape))
        self.base = copy.deepcopy(self.model)
        self.tuned = SelectiveBackward(self.model, ["1"], head=["2", "4"])
        self.optimizer = torch.optim.AdamW(self.tuned.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [1, 3])
        self.step()

    def step(self):
        self.model(torch.linspace(-1, 2, 12).view(4, 3)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()

    def resume(self, path):
        return self.tuned.resume(path, self.optimizer, self.scheduler)

    def state(self):
        tensors = {**self.model.state_dict(), **{f"base.{n}": t for n, t in self.base.state_dict().items()}}
        generators = (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate())
        states = (str(self.optimizer.state_dict()), str(self.scheduler.state_dict()))
        return {name: tensor.tolist() for name, tensor in tensors.items()}, generators, states


# Damages


def damaged(data, rng):
    """Bits flipped, a byte of any value, a piece lost, doubled or overwritten, the end lost, more at the end."""
    data = bytearray(data)
    at = rng.randrange(len(data))
    to = min(len(data), at + rng.choice([1, 2, 8, 64, 512]))
    kind = rng.randrange(8)
    if kind == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        for _ in range(rng.randrange(2, 9)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        data[at] = (data[at] + rng.randrange(1, 256)) % 256
    elif kind == 3:
        del data[at:to]
    elif kind == 4:
        data[at:at] = data[at:to]
    elif kind == 5:
        data[at:to] = bytes(255 - byte for byte in data[at:to])
    elif kind == 6:
        del data[at:]
    else:
        data += bytes(rng.randrange(256) for _ in range(rng.choice([1, 8, 100])))
    return bytes(data)


NUMBERS = (0, -1, 1, 2**31, 2**63, 2**64, 2**200, -(2**63), 1.5, float("nan"), float("inf"))
VALUES = (*NUMBERS, None, True, "", "a", "\ud800", "é" * 50, [], {}, [[]], {"a": {}}, ["0"], b"x", (), (1, 2, 3))


def edited(value, rng, depth=0):
    """`value` with one part exchanged for something else, left out, or doubled."""
    parts = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list | tuple) else ()
    if not parts or (depth and rng.random() < 0.2):
        if isinstance(value, torch.Tensor):
            return edited_tensor(value, rng)
        return rng.choice(VALUES)
    key = rng.choice(list(parts))
    kind = type(value)
    changed = value.copy() if isinstance(value, dict) else list(value)
    deed = rng.random()
    if deed < 0.7:
        changed[key] = edited(value[key], rng, depth + 1)
    elif deed < 0.85:
        del changed[key]
    elif isinstance(changed, dict):
        changed[rng.choice(["state_dict", "step", "new", 7])] = changed[key]
    else:
        changed.append(changed[key])
    return changed if isinstance(value, dict) else kind(changed)


def edited_tensor(tensor, rng):
    changes = (
        lambda t: t.flatten(),
        lambda t: t.double(),
        lambda t: t.to(torch.int8),
        lambda t: t.flatten()[:0],
        lambda t: torch.cat([t.flatten(), t.flatten()]),
        lambda t: torch.full_like(t.float(), torch.nan),
        lambda t: torch.empty(t.shape, device="meta"),
        lambda t: torch.zeros(1).expand(1 << 40),
        lambda t: t.to_sparse() if t.dim() and t.dtype != torch.uint8 else t.float(),
        lambda t: torch.randint(0, 255, (2,)),
        lambda t: None,
        lambda t: -torch.ones_like(t.double()).long(),
    )
    return rng.choice(changes)(tensor)


def edited_delta(path, rng, out):
    """Tensors or metadata changed, the checksum renewed; or the header as JSON, with its length."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    kind = rng.randrange(4)
    if kind == 0:
        key = rng.choice(list(metadata))
        text = ["[" * 50_000, "{", "null", "[1]", '"a"', "[[]]", "NaN", "9" * 5000, '["a", "a"]', "0" * 64, "\x00", "2"]
        with contextlib.suppress(ValueError, TypeError):
            text.append(json.dumps(edited(json.loads(metadata[key]), rng)))
        metadata[key] = rng.choice(text)
        if rng.random() < 0.2:
            del metadata[key]
    elif kind == 1:
        name = rng.choice(list(tensors))
        changed = edited_tensor(tensors.pop(name), rng)
        if changed is not None and not changed.is_meta and not changed.is_sparse and changed.numel() < 1 << 20:
            tensors[rng.choice([name, name, "0.weight", "x"])] = changed.contiguous()
    if kind < 2:
        save_file(tensors, out, {**metadata, "checksum": delta_checksum(metadata, tensors)})
        return
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = edited(json.loads(data[8 : 8 + length]), rng)
    text = json.dumps(header, default=str).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        text = b"{" * 30_000
    length = rng.choice([len(text)] * 8 + [0, 2**40, 2**64 - 1])
    out.write_bytes(struct.pack("<Q", length) + text + data[8 + struct.unpack("<Q", data[:8])[0] :])


def edited_run(path, rng, out):
    content = edited(torch.load(path, weights_only=True), rng)
    if isinstance(content, dict) and rng.random() < 0.9:
        with contextlib.suppress(Exception):  # of a tensor without contents
            content["checksum"] = run_checksum(content)
    torch.save(content, out)


# A child that loads


def load(kind, path):
    """What came of it where the file is taken; "refused" for a ValueError that names it, and nothing has changed."""
    job = Job()
    before = job.state()
    calls = [job.resume] if kind == "run" else [job.tuned.load, lambda p: apply_delta(job.base, p)]
    if kind == "delta":
        out = path.with_suffix(".merged")
        calls += [lambda p: merge_delta(job.base, p, out), lambda p: DeltaSwitch(job.base).use(p)]
    answers = []
    for call in calls:
        try:
            call(path)
        except ValueError as error:
            if str(path) not in str(error):
                return f"ValueError that does not name the file: {error}"
            answers.append("refused")
        except Exception as error:
            return f"raw {type(error).__name__}: {error}"
        else:
            answers.append("taken")
        if answers[-1] == "refused" and job.state() != before:
            return "refused, and something has changed"
        if answers[-1] == "taken":
            answers[-1] += f" {zlib.crc32(str(job.state()).encode()):08x}"
            if kind == "run":
                job.step()  # what was taken can be used
                torch.rand(1), np.random.rand(), random.random()
            job = Job()
            before = job.state()
    # One may be refused and another taken: only a wrapped model has layers of its own that can be other ones.
    return " ".join(dict.fromkeys(answers))


def child(tasks, answers):
    torch.set_num_threads(1)
    while (task := tasks.get()) is not None:
        began = time.process_time()
        try:
            answer = load(task[0], Path(task[1]))
        except Exception as error:
            answer = f"cannot be used when it was taken: {type(error).__name__}: {error}"
        answers.put((answer, time.process_time() - began))


class Child:
    """A process that loads files, and is made anew when one of them has killed it."""

    def __init__(self):
        self.process = None

    def load(self, kind, path):
        if self.process is None:
            context = multiprocessing.get_context("fork")
            self.tasks, self.answers = context.Queue(), context.Queue()
            self.process = context.Process(target=child, args=(self.tasks, self.answers), daemon=True)
            self.process.start()
        self.tasks.put((kind, str(path)))
        until = time.monotonic() + 30
        while True:
            try:
                answer, seconds = self.answers.get(timeout=0.5)
                return answer if seconds < SLOWEST else f"{answer} after {seconds:.1f} s"
            except queue.Empty:
                if self.process.is_alive() and time.monotonic() < until:
                    continue
                code = self.process.exitcode
                self.end()
                return f"the process died: {code}" if code is not None else "no answer in 30 s"

    def end(self):
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


@pytest.fixture
def loader():
    child = Child()
    yield child
    child.end()


def mutate(kind, count, seed, folder, loader):
    """Answers by what was done to the file: a histogram, and the bad ones."""
    job = Job()
    path = folder / f"good.{kind}"
    if kind == "delta":
        job.tuned.save(path, recipe={"rate": 0.01}, class_names=["a", "b"], data={"task": None})
    else:
        job.tuned.save_run(path, job.optimizer, job.scheduler, progress={"step": 1})
    good = loader.load(kind, path)
    assert good.startswith("taken")
    data, found, bad = path.read_bytes(), {}, []
    for number in range(count):
        rng = random.Random(f"{kind} {seed} {number}")
        target = folder / f"bad.{kind}"
        how = "damaged" if number % 2 else "edited"
        if how == "damaged":
            target.write_bytes(damaged(data, rng))
        else:
            (edited_delta if kind == "delta" else edited_run)(path, rng, target)
        answer = loader.load(kind, target)
        if answer not in ("refused", good) and (
            how == "damaged" or not answer.startswith(("taken ", "refused taken "))
        ):
            bad.append((number, how, answer))
        found[how, answer[:7]] = found.get((how, answer[:7]), 0) + 1
    return found, bad


@pytest.mark.parametrize("kind", ["delta", "run"])
def test_damaged_and_edited_files(kind, tmp_path, loader):
    found, bad = mutate(kind, 100, 0, tmp_path, loader)
    assert not bad, bad[:5]
    assert found["damaged", "refused"] >= 30 and found["edited", "refused"] >= 30, found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["delta", "run"])
def test_damaged_and_edited_files_by_the_thousand(kind, tmp_path, loader):
    found, bad = mutate(kind, 3200, 1, tmp_path, loader)
    assert not bad, (len(bad), bad[:5])
    assert found["damaged", "refused"] >= 1000 and found["edited", "refused"] >= 1000, found


@pytest.mark.parametrize("kind", ["delta", "run"])
def test_no_flipped_bit_of_the_tensors_is_taken(kind, tmp_path):
    job = Job()
    path = tmp_path / "file"
    if kind == "delta":
        job.tuned.save(path)
    else:
        job.tuned.save_run(path, job.optimizer, job.scheduler)
    data = path.read_bytes()
    weight = job.model[1].weight.detach().numpy().tobytes()
    start = data.index(weight)
    for bit in range(0, 8 * len(weight), 9):
        flipped = bytearray(data)
        flipped[start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        other = Job()
        before = other.state()
        with pytest.raises(ValueError, match=r"file' is no .*its contents do not have its checksum"):
            other.tuned.load(path) if kind == "delta" else other.resume(path)
        assert other.state() == before


@pytest.mark.parametrize(
    ("delta", "run"),
    [
        ("delta_v2.safetensors", "run_v1.pt"),
        ("delta_v3.safetensors", "run_v2.pt"),
        ("delta_v4.safetensors", "run_v2.pt"),
    ],
    ids=["without a checksum", "with one", "with classes"],
)
def test_files_of_versions_before_load(delta, run):
    job = Job()
    assert job.tuned.load(DATA / delta) is job.tuned
    loaded = {name: tensor.clone() for name, tensor in job.model.state_dict().items()}
    other = Job()
    assert other.resume(DATA / run) == {"step": 2}
    for name, tensor in other.model.state_dict().items():
        assert torch.equal(tensor, loaded[name]), name
    assert other.scheduler.last_epoch == 2 and other.optimizer.state_dict()["state"][0]["step"] == 2
    assert apply_delta(job.base, DATA / delta).recipe == {"rate": 0.01}


def test_what_is_no_file_is_not_read(tmp_path):
    job, pipe = Job(), tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, what in ((pipe, "a pipe"), ("/dev/zero", "a device"), (tmp_path, "a folder")):
        for read in (job.tuned.load, job.resume, lambda p: apply_delta(job.base, p)):
            with pytest.raises(OSError, match=what) as caught:
                read(path)
            assert caught.value.filename == str(path)
