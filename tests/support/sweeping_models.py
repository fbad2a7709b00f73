"""Tiny classifiers and data sets for the tests of sweeps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

from zest_fast.sweeping.recipe import Recipe

RECIPE = Recipe(
    steps=3, batch_size=8, seeds=(0, 1), head_samples=None, train_samples=16, profile_samples=8, head_strengths=(0.01,)
)


class Residual(nn.Module):
    """Blocks with a skip connection, one activation shared by all of them, in place, and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.blocks = nn.ModuleList(Block(6, self.act) for _ in range(3))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.act(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Block(nn.Module):
    def __init__(self, channels, act):
        super().__init__()
        self.act = act
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x + self.second(self.act(self.norm(self.first(x))))


class Preactivated(nn.Module):
    """Its activation writes into the block's input, which the skip connection then adds: what a module returned is no
    longer what the model goes on with."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 6)
        self.act = nn.ReLU(inplace=True)
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.inner(self.act(x)))


class Attention(nn.Module):
    """nn.MultiheadAttention uses its out_proj without calling it; masks and keywords go past the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.dropout = nn.Dropout(0.5)
        self.mlp = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens, mask):
        x = self.embedding(tokens)
        x = x + self.attention(x, x, x, key_padding_mask=mask == 0)[0]
        x = x + self.dropout(self.mlp(x)).relu()
        return self.head(x.mean(1))


class PeeksAhead(nn.Module):
    """What lies below its layer uses the weight of that layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.layer = nn.Linear(5, 5)
        self.peek = Peek(self.layer)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.layer(self.peek(self.first(x))))


class Peek(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.other = (layer,)  # a tuple, so that it is no submodule

    def forward(self, x):
        return (x @ self.other[0].weight).tanh()


class Mortal(nn.Module):
    """Kills the process that trains it, unless that is the one that made it, so many times altogether."""

    def __init__(self, inner, folder, lives):
        super().__init__()
        self.inner, self.folder, self.lives, self.parent = inner, Path(folder), lives, os.getpid()

    def forward(self, x):
        if os.getpid() != self.parent and torch.is_grad_enabled():
            for life in range(self.lives):
                mark = self.folder / f"died-{life}"
                if not mark.exists():
                    mark.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
        return self.inner(x)


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.layer(x).relu())


def make(kind):
    """A seeded model with separable data: (model, splits)."""
    torch.manual_seed(3)
    model = kind()
    shape = {Residual: (1, 6, 6)}.get(kind, (5,))
    splits = {}
    for split, samples in (("head", 24), ("train", 40), ("score", 21)):
        targets = torch.arange(samples) % 3
        if kind is Attention:
            tokens = torch.randint(0, 8, (samples, 4)) + targets[:, None]
            inputs = {"tokens": tokens, "mask": (torch.arange(4) < 3).long().expand(samples, 4).contiguous()}
        else:
            inputs = torch.randn(samples, *shape) + targets.view(-1, *(1 for _ in shape))
        splits[split] = (inputs, targets)
    return model, splits


def child(program: str) -> subprocess.Popen:
    """A process that runs `program` and finds the modules that this one finds."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[2], env=environment)


def kill_after(program: str, path: Path, layers: int) -> None:
    """Run a program that sweeps into `path`, and kill it once so many layers are recorded."""
    process = child(program)
    try:
        deadline = time.monotonic() + 60
        while not path.exists() or path.read_bytes().count(b'"record":"layer"') < layers:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
