"""A small model around one layer of random sizes, for tests of what its profile has to answer when it is changed; and a
comparison of two rows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from oracle import METRICS, TOLERANCE, relative_error
from torch import Tensor, nn

SAMPLES, CLASSES = 6, 3
BOTH_SIDES = 2 * TOLERANCE  # either profile may be off by TOLERANCE


class Probed(nn.Module):
    """Layer, tanh, head. ``before`` scales what enters the layer, ``after`` what leaves it."""

    def __init__(self, layer: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.before = self.after = 1.0
        self.layer = layer
        with torch.no_grad():
            width = self.features(x).shape[1]
        self.head = nn.Linear(width, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        y = called(self.layer, x, x if self.before == 1 else x * self.before)
        return torch.tanh(y if self.after == 1 else y * self.after).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def called(layer: nn.Module, x: Tensor, scaled: Tensor) -> Tensor:
    if isinstance(layer, nn.MultiheadAttention):
        return layer(scaled, scaled, scaled, need_weights=False)[0]
    if isinstance(layer, nn.RNNBase):
        return layer(scaled)[0]
    return layer(scaled, x) if isinstance(layer, nn.Bilinear) else layer(scaled)


@dataclass
class Case:
    """A model in the midst of its life, a batch, and the parameters of the layer that a scale can be moved to."""

    model: Probed
    x: Tensor
    target: Tensor
    entered: tuple[str, ...]
    """Parameters that the input is multiplied with: c times these, and the input by c, is the same function."""
    left: tuple[str, ...]
    """Parameters of which the output is a multiple."""


Made = tuple[nn.Module, Tensor, tuple[str, ...], tuple[str, ...]]
_AS_A_LINEAR = (("weight",), ("weight", "bias"))


def linear(chance: random.Random) -> Made:
    width, positions = chance.randint(1, 12), [chance.randint(1, 5) for _ in range(chance.randrange(3))]
    layer = nn.Linear(width, chance.randint(2, 12), bias=chance.random() < 0.7)
    return layer, torch.randn(SAMPLES, *positions, width), *_AS_A_LINEAR


def convolution(dims: int, transposed: bool = False) -> Callable[[random.Random], Made]:
    """Of random groups, kernel, stride, dilation, padding and its mode."""

    def made(chance: random.Random) -> Made:
        groups, kernel = chance.choice((1, 1, 2, 3)), [chance.randint(1, 3) for _ in range(dims)]
        inputs, outputs = groups * chance.randint(1, 3), groups * chance.randint(2, 3)
        stride, dilation = chance.randint(1, 3), chance.randint(1, 2)
        common = {"stride": stride, "dilation": dilation, "groups": groups, "bias": chance.random() < 0.7}
        x = torch.randn(SAMPLES, inputs, *(chance.randint(5, 8) for _ in range(dims)))
        if transposed:
            kinds, extra = (nn.ConvTranspose1d, nn.ConvTranspose2d), {"output_padding": chance.randrange(stride)}
        else:
            kinds, extra = (nn.Conv1d, nn.Conv2d, nn.Conv3d), {"padding": chance.randint(0, 2)}
            extra["padding_mode"] = chance.choice(("zeros", "zeros", "circular", "replicate"))
        return kinds[dims - 1](inputs, outputs, kernel, **common, **extra), x, *_AS_A_LINEAR

    return made


def embedding(chance: random.Random) -> Made:
    rows = chance.randint(3, 20)
    layer = nn.Embedding(rows, chance.randint(2, 9), padding_idx=chance.choice((None, 0)), sparse=chance.random() < 0.3)
    return layer, torch.randint(rows, (SAMPLES, chance.randint(1, 7))), (), ("weight",)


def bilinear(chance: random.Random) -> Made:
    width = chance.randint(2, 6)
    return nn.Bilinear(width, width, chance.randint(2, 6)), torch.randn(SAMPLES, width), *_AS_A_LINEAR


def recurrent(kind: type[nn.RNNBase]) -> Callable[[random.Random], Made]:
    def made(chance: random.Random) -> Made:
        width, both = chance.randint(1, 5), chance.random() < 0.5
        layers = chance.randint(1, 2)
        layer = kind(width, chance.randint(2, 6), layers, batch_first=True, bidirectional=both)
        entered = ("weight_ih_l0", *(("weight_ih_l0_reverse",) if both else ()))
        return layer, torch.randn(SAMPLES, chance.randint(1, 6), width), entered, ()

    return made


def attention(chance: random.Random) -> Made:
    heads = chance.randint(1, 3)
    width = heads * chance.randint(2, 4)
    layer = nn.MultiheadAttention(width, heads, batch_first=True, bias=chance.random() < 0.7)
    left = ("out_proj.weight", "out_proj.bias")
    return layer, torch.randn(SAMPLES, chance.randint(2, 6), width), ("in_proj_weight",), left


KINDS: dict[str, Callable[[random.Random], Made]] = {
    "linear": linear,
    "conv1d": convolution(1),
    "conv2d": convolution(2),
    "conv3d": convolution(3),
    "conv_transpose1d": convolution(1, transposed=True),
    "conv_transpose2d": convolution(2, transposed=True),
    "embedding": embedding,
    "bilinear": bilinear,
    "lstm": recurrent(nn.LSTM),
    "gru": recurrent(nn.GRU),
    "attention": attention,
}


def case(kind: str, key: str) -> Case:
    """Equal calls give equal cases."""
    chance = random.Random(f"{kind} {key}")
    torch.manual_seed(chance.getrandbits(32))
    layer, x, entered, left = KINDS[kind](chance)
    return Case(Probed(layer, x), x, torch.randint(CLASSES, (len(x),)), entered, left)


def assert_row(
    found: Mapping[str, float], expected: Mapping[str, float], numel: int, metrics: Sequence[str] = METRICS
) -> None:
    """Two rows of a layer with a weight of so many entries agree, each metric in the unit of its error."""
    wrong = {
        metric: (found[metric], expected[metric])
        for metric in metrics
        if relative_error(metric, found[metric], expected, numel) > BOTH_SIDES
    }
    assert not wrong
