"""Classifiers whose forward passes are hard to take up in the middle, with their data, for the tests of sweeps.

The inputs of a sample are [5] (vectors), [4, 6] (sequences), [1, 8, 8] (images) or four tokens with a mask.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor, nn

VECTORS, SEQUENCES, IMAGES, TOKENS = "vectors", "sequences", "images", "tokens"
_SHAPES = {VECTORS: (5,), SEQUENCES: (4, 6), IMAGES: (1, 8, 8)}


def make_splits(kind: str, sizes: tuple[int, int, int] = (24, 40, 21)) -> dict:
    """Separable data of three classes."""
    torch.manual_seed(11)
    splits = {}
    for split, samples in zip(("head", "train", "score"), sizes, strict=True):
        targets = torch.arange(samples) % 3
        if kind == TOKENS:
            tokens = torch.randint(3, 13, (samples, 4)) + targets[:, None]
            lengths = torch.randint(2, 5, (samples, 1))
            inputs = {"input_ids": tokens, "attention_mask": (torch.arange(4) < lengths).long()}
        else:
            shape = _SHAPES[kind]
            inputs = torch.randn(samples, *shape) + targets.view(-1, *(1 for _ in shape))
        splits[split] = (inputs, targets)
    return splits


class Chain(nn.Module):
    """first, then what is between, second and the head: the parts in a row."""

    def __init__(self, *between: nn.Module, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(5, width)
        self.between = nn.Sequential(*between)
        self.second = nn.Linear(width, width)
        self.third = nn.Linear(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.third(self.second(self.between(self.first(x)).relu()).relu()).relu())


# Rows that depend on their batch


class BatchMean(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class BatchSize(nn.Module):
    def forward(self, x):
        return x / x.shape[0] ** 0.5


class BatchMaximum(nn.Module):
    """The rows are scaled by the largest entry of the batch, where that is large: few batches show it."""

    def __init__(self, limit: float = 1.0) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x):
        largest = x.detach().abs().max()
        return x / largest * self.limit if largest > self.limit else x


class BatchAttention(nn.Module):
    """Samples attend to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(6, 6)

    def forward(self, x):
        return x + (self.query(x) @ x.T).softmax(1) @ x


class Contrastive(nn.Module):
    """Each row minus the one before it in the batch."""

    def forward(self, x):
        return x - 0.5 * x.roll(1, 0)


class FirstRow(nn.Module):
    """The first sample of the batch is a reference for the others and stays as it is."""

    def forward(self, x):
        return torch.cat([x[:1], x[1:] - x[:1]])


class StubbornBatchNorm(nn.BatchNorm1d):
    """Stays in train mode whatever it is told."""

    def train(self, mode: bool = True):
        return super().train(True)


class SortsRows(nn.Module):
    """Gives the rows in another order than it gets them; what follows puts them back."""

    def forward(self, x):
        return x[x[:, 0].argsort()]


class Sorted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.sort = nn.Linear(5, 6), SortsRows()
        self.second, self.third, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(x)
        back = x[:, 0].argsort().argsort()
        return self.head(self.third(self.second(self.sort(x)).relu())[back].relu())


# Ways through the model that depend on the data


class Branch(nn.Module):
    """A second layer for what is large: one row in a hundred has it run for the whole batch."""

    def __init__(self, threshold: float = 3.5) -> None:
        super().__init__()
        self.threshold = threshold
        self.first, self.extra = nn.Linear(5, 6), nn.Linear(6, 6)
        self.second, self.third, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        rare = x.abs().max() > self.threshold
        x = self.first(x)
        if rare:
            x = self.extra(x)
        return self.head(self.third(self.second(x.relu()).relu()).relu())


class LooksBack(nn.Module):
    """Adds an early activation, but only where some row is large."""

    def __init__(self, threshold: float = 3.5) -> None:
        super().__init__()
        self.threshold = threshold
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 6)
        self.third, self.fourth, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        early = self.first(x)
        y = self.third(self.second(early).relu()).relu()
        y = self.fourth(y)
        if x.abs().max() > self.threshold:
            y = y + early
        return self.head(y.relu())


class LooksBackForgivingly(LooksBack):
    """The same, and a NaN would not be seen."""

    def forward(self, x):
        early = self.first(x)
        y = self.fourth(self.third(self.second(early).relu()).relu())
        if x.abs().max() > self.threshold:
            y = y + early.nan_to_num(1.0)
        return self.head(y.relu())


class LooksBackByBranch(LooksBack):
    """What it does where some row is large depends on the sign of an early activation."""

    def forward(self, x):
        early = self.first(x)
        y = self.fourth(self.third(self.second(early).relu()).relu())
        if x.abs().max() > self.threshold:
            y = y * 2 if early.sum() < 1e9 else y / 2
        return self.head(y.relu())


class Noting(nn.Linear):
    """Leaves the size of its output behind."""

    seen = 0.0

    def forward(self, x):
        y = super().forward(x)
        self.seen = float(y.detach().abs().mean())
        return y


class LooksAsideInLargeBatches(LooksBack):
    """What an early layer has left behind is looked at in batches of so many samples."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.first = size, Noting(5, 6)

    def forward(self, x):
        y = self.fourth(self.third(self.second(self.first(x)).relu()).relu())
        if len(x) >= self.size:
            y = y * (1 + 5 * self.first.seen)
        return self.head(y.relu())


class Overwrites(LooksBack):
    """Writes an early activation over a part of a late one."""

    def forward(self, x):
        early = self.first(x)
        y = self.fourth(self.third(self.second(early).relu()).relu())
        if x.abs().max() > self.threshold:
            y = y.clone()
            y[:, :2] = early[:, :2]
        return self.head(y.relu())


class Forgiving(Branch):
    """Whatever fails in the extra layer, it does without."""

    def forward(self, x):
        rare = x.abs().max() > self.threshold
        x = self.first(x)
        with suppress(Exception):
            x = self.extra(x) if rare else x
        return self.head(self.third(self.second(x.relu()).relu()).relu())


class EarlyExit(nn.Module):
    """Skips a layer where the whole batch is small."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.optional, self.second = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.third, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(x)
        if x.mean() > 0.05:
            x = self.optional(x).relu()
        return self.head(self.third(self.second(x).relu()).relu())


class Routed(nn.Module):
    """A mixture of experts: each row goes to its best one, experts without rows are not called."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 3)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        score, choice = self.gate(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (choice == number).nonzero()[:, 0]
            if len(rows):
                y = y.index_add(0, rows, expert(x[rows]) * score[rows, None])
        return x + y


class TopTwo(nn.Module):
    """Experts that see their tokens flattened, as in Mixtral."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 4, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width)) for _ in range(4)
        )

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(flat).softmax(-1).topk(2, -1)
        y = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows, slots = (chosen == number).nonzero(as_tuple=True)
            if len(rows):
                y.index_add_(0, rows, expert(flat[rows]) * weights[rows, slots, None])
        return y.view_as(x)


class TokenMixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norms = nn.Linear(6, 6), nn.ModuleList(nn.LayerNorm(6) for _ in range(2))
        self.mixtures = nn.ModuleList(TopTwo() for _ in range(2))
        self.top, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        for norm, mixture in zip(self.norms, self.mixtures, strict=True):
            x = x + mixture(norm(x))
        return self.head(self.top(x).relu().mean(1))


# Weights that are used twice, and not as they are


class UsesLayer(nn.Module):
    """What lies below `second` uses its weight in some way."""

    def __init__(self, use: Callable[[nn.Linear, Tensor], Tensor], zero: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.peek = Peek(self, use)
        if zero:
            nn.init.zeros_(self.second.weight)

    def forward(self, x):
        x = self.peek(self.first(x))
        return self.head(self.second(x).relu() + x)


class Peek(nn.Module):
    def __init__(self, model: UsesLayer, use: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.use = (model,), use  # a tuple, so that it is no submodule

    def forward(self, x):
        return self.use(self.model[0], x)


def by_direction(model, x):
    return x @ (model.second.weight / model.second.weight.norm())


def by_cosine(model, x):
    return nn.functional.cosine_similarity(x[:, None], model.second.weight[None], dim=2)


def by_sign(model, x):
    return x @ model.second.weight.sign()


def by_plain_product(model, x):
    return x + x @ model.second.weight


def by_bias(model, x):
    return x * (1 + model.second.bias)


def by_head(model, x):
    return x + x @ model.head.weight.T @ model.head.weight


def by_gradient_alone(model, x):
    """No value depends on it, a gradient does."""
    y = x @ model.second.weight
    return x + (y - y.detach())


class TiedLayers(nn.Module):
    """One weight in two layers, one of them upside down."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.encode, self.decode = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.decode.weight = self.encode.weight
        self.middle, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.decode(self.middle(self.encode(self.stem(x)).relu()).relu()).relu())


# What goes past the outputs of modules


class Remembers(nn.Module):
    """Leaves what it computed on itself, for a later module."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 6)

    def forward(self, x):
        self.kept = self.linear(x)
        return self.kept.relu()


class SideChannel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Remembers()
        self.second, self.third, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.third(self.second(self.first(x)).relu())
        return self.head((x + self.first.kept).relu())


class CountsItsPasses(nn.Module):
    """A buffer that every pass moves, and that the output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("average", torch.zeros(6))

    def forward(self, x):
        with torch.no_grad():
            self.average.mul_(0.9).add_(0.1 * x.mean(0))
        return self.linear(x) - self.average


class MaskedClass(nn.Module):
    """One logit is minus infinity; the layer below peeks at the weight above."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = UsesLayer(by_plain_product)
        self.inner.head = nn.Linear(6, 4)
        with torch.no_grad():
            self.inner.head.bias[3] = -math.inf

    def forward(self, x):
        return self.inner(x)


class HugeLogit(nn.Module):
    """A logit of -10,000 beside ordinary ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.peek = nn.Linear(5, 6), nn.Linear(6, 6), Peek(self, by_plain_product)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        x = self.second(self.peek(self.first(x))).relu()
        return self.head(torch.cat([x, torch.full_like(x[:, :1], 1e4)], 1))


# Chance


class AlwaysDrops(nn.Module):
    """Forgets that dropout is for training."""

    def forward(self, x):
        return nn.functional.dropout(x, 0.3)


class ScalesByPythonsChance(nn.Module):
    def forward(self, x):
        return x * random.choice((0.5, 1.0, 2.0))


# Layouts and modules of torch


class SequenceFirst(nn.Module):
    """[tokens, samples, width], by default as in torch."""

    def __init__(self, layer: nn.Module, last: Callable[[object], Tensor] = lambda y: y, width: int = 6) -> None:
        super().__init__()
        self.stem, self.inner, self.last = nn.Linear(6, 6), layer, last
        self.top, self.head = nn.Linear(width, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.last(self.inner(self.stem(x.transpose(0, 1))))
        return self.head(self.top(x).relu().mean(0))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], *, state: bool = False, **options) -> None:
        super().__init__()
        self.stem, self.state = nn.Linear(6, 6), state
        self.rnn = kind(6, 5, **options)
        width = 10 if options.get("bidirectional") else 5
        self.top, self.head = nn.Linear(width, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        if not self.rnn.batch_first:
            x = x.transpose(0, 1)
        y, state = self.rnn(x)
        y = y.mean(1 if self.rnn.batch_first else 0)
        if self.state:
            hidden = state[0] if isinstance(state, tuple) else state
            y = y + torch.cat(list(hidden[-(y.shape[1] // 5) :]), 1)
        return self.head(self.top(y).relu())


class Encoder(nn.Module):
    def __init__(self, *, masked: bool = False, layers: int = 2, nested: bool = True, **options) -> None:
        super().__init__()
        self.embedding, self.masked = nn.Embedding(20, 8), masked
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=nested)
        self.top, self.head = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, input_ids, attention_mask):
        padding = (attention_mask == 0) if self.masked else None
        x = self.encoder(self.embedding(input_ids), src_key_padding_mask=padding)
        return self.head(self.top(x).relu().mean(1))


class Translator(nn.Module):
    """nn.Transformer, sequence first, with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.inner = nn.Transformer(8, 2, 1, 2, 16)
        self.top, self.head = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, input_ids, attention_mask):
        x = self.embedding(input_ids).transpose(0, 1)
        mask = nn.Transformer.generate_square_subsequent_mask(len(x))
        padding = (attention_mask == 0).to(x.dtype) * -1e9
        y = self.inner(x, x, tgt_mask=mask, src_key_padding_mask=padding)
        return self.head(self.top(y).relu().mean(0))


class Images(nn.Module):
    """Upsampling, pixel shuffle, group norm, one-dimensional and transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.group = nn.GroupNorm(2, 8)
        self.shuffle = nn.PixelShuffle(2)
        self.wide = nn.Conv2d(2, 4, 3, stride=2)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2)
        self.instance = nn.InstanceNorm2d(4)
        self.along = nn.Conv1d(4, 5, 3)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = self.shuffle(self.group(self.stem(x)).relu())
        x = self.instance(self.up(self.wide(x).relu()))
        return self.head(self.along(x.flatten(2)).relu().mean(2))


class Patches(nn.Module):
    """A small ViT: class token, learnt positions, relative position bias, permuted patches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = PatchEmbedding()
        self.blocks = nn.ModuleList(BiasedAttention() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class PatchEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv2d(1, 8, 4, 4)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))

    def forward(self, x):
        x = self.project(x).flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position


class RelativeBias(nn.Module):
    """Rows of no sample: [1, heads, tokens, tokens]."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 2)

    def forward(self, tokens):
        place = torch.arange(tokens)
        return self.table(place[:, None] - place + 4).permute(2, 0, 1)[None]


class BiasedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.bias, self.out = nn.LayerNorm(8), nn.Linear(8, 24), RelativeBias(), nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 8))

    def forward(self, x):
        samples, tokens, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(samples, tokens, 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, self.bias(tokens))
        x = x + self.out(y.transpose(1, 2).reshape(samples, tokens, width))
        return x + self.mlp(x)


class Permutes(nn.Module):
    """Its output is a view that only the model that made it can take apart again."""

    def forward(self, x):
        return x.transpose(1, 2)


class ViewsWhatItPermuted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.permute = nn.Linear(6, 6), Permutes()
        self.second, self.head = nn.Linear(24, 6), nn.Linear(6, 3)

    def forward(self, x):
        y = self.permute(self.stem(x))
        return self.head(self.second(y.transpose(1, 2).view(len(x), -1)).relu())


class NestedOutputs(nn.Module):
    """Tuples, lists, dictionaries and a number between the modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.split = nn.Linear(5, 6), Splits()
        self.second, self.third, self.head = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        parts = self.split(self.first(x))
        y = self.second(parts["half"][0]) * parts["factor"]
        return self.head(self.third(y.relu()) + parts["whole"])


class Bytes(nn.Module):
    """Kept between its layers: bytes, complex numbers and booleans."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.codes = nn.Linear(5, 6), Codes()
        self.second, self.third, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        codes, positive, spectrum = self.codes(self.first(x))
        y = self.second(codes.float() / 8).masked_fill(positive, 0.1)
        return self.head(self.third(y).relu() + spectrum.abs())


class Codes(nn.Module):
    def forward(self, x):
        return (x * 8).clamp(0, 255).to(torch.uint8), x > 0, torch.view_as_complex(torch.stack([x, x.sin()], 2))


class Splits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        y = self.inner(x)
        return {"half": (y[:, :3], [y[:, 3:]]), "whole": y, "factor": 0.5, "mask": torch.ones(2, 2), "nothing": None}


class TwoForOne(nn.Module):
    """Windows: two rows for each sample inside, as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.top, self.head = (
            nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        )  # fmt: skip

    def forward(self, x):
        windows = self.stem(x).view(-1, 2, 6)
        windows = self.top(self.inner(windows).relu()).relu()
        return self.head(windows.view(-1, 4, 6).mean(1))


REUSED = {
    "batch norm without running statistics": (lambda: Chain(nn.BatchNorm1d(6, track_running_stats=False)), VECTORS),
    "batch norm in train mode": (lambda: Chain(StubbornBatchNorm(6)), VECTORS),
    "minus the mean of the batch": (lambda: Chain(BatchMean()), VECTORS),
    "by the size of the batch": (lambda: Chain(BatchSize()), VECTORS),
    "by the largest of the batch": (lambda: Chain(BatchMaximum()), VECTORS),
    "attention between samples": (lambda: Chain(BatchAttention()), VECTORS),
    "minus the neighbour": (lambda: Chain(Contrastive()), VECTORS),
    "minus the first row": (lambda: Chain(FirstRow()), VECTORS),
    "rows sorted": (Sorted, VECTORS),
    "experts": (lambda: Chain(Routed(), Routed()), VECTORS),
    "experts of tokens": (TokenMixture, SEQUENCES),
    "tied layers": (TiedLayers, VECTORS),
    "dropout that is always on": (lambda: Chain(AlwaysDrops()), VECTORS),
    "Python's chance": (lambda: Chain(ScalesByPythonsChance()), VECTORS),
    "GRU, two layers, sequence first": (lambda: Recurrent(nn.GRU, num_layers=2), SEQUENCES),
    "LSTM, two layers": (lambda: Recurrent(nn.LSTM, num_layers=2, batch_first=True), SEQUENCES),
    "LSTM, bidirectional": (
        lambda: Recurrent(nn.LSTM, bidirectional=True, batch_first=True, state=True), SEQUENCES,
    ),
    "LSTM, bidirectional, two layers, sequence first": (
        lambda: Recurrent(nn.LSTM, bidirectional=True, num_layers=2, state=True), SEQUENCES,
    ),
    "encoder layer, sequence first": (lambda: SequenceFirst(nn.TransformerEncoderLayer(6, 2, 8)), SEQUENCES),
    "linear layers, sequence first": (
        lambda: SequenceFirst(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))), SEQUENCES,
    ),
    "encoder": (Encoder, TOKENS),
    "encoder, norm first": (lambda: Encoder(norm_first=True, nested=False), TOKENS),
    "encoder, norm first, masked": (lambda: Encoder(norm_first=True, masked=True, nested=False), TOKENS),
    "encoder, masked": (lambda: Encoder(masked=True, nested=False), TOKENS),
    "encoder and decoder": (Translator, TOKENS),
    "convolutions": (Images, IMAGES),
    "ViT with relative positions": (Patches, IMAGES),
    "a view of a permuted output": (ViewsWhatItPermuted, SEQUENCES),
    "nested outputs": (NestedOutputs, VECTORS),
    "windows": (TwoForOne, SEQUENCES),
    "bytes": (Bytes, VECTORS),
}  # fmt: skip

RECOMPUTED = {
    "branches": (Branch, VECTORS),
    "early exit": (EarlyExit, VECTORS),
    "by the direction of the weight": (lambda: UsesLayer(by_direction), VECTORS),
    "by its cosine": (lambda: UsesLayer(by_cosine), VECTORS),
    "by its signs": (lambda: UsesLayer(by_sign), VECTORS),
    "by a weight of zeros": (lambda: UsesLayer(by_plain_product, zero=True), VECTORS),
    "by the bias": (lambda: UsesLayer(by_bias), VECTORS),
    "by the head": (lambda: UsesLayer(by_head), VECTORS),
    "a gradient without a value": (lambda: UsesLayer(by_gradient_alone), VECTORS),
    "beside a class at minus infinity": (MaskedClass, VECTORS),
    "beside a huge logit": (HugeLogit, VECTORS),
    "an attribute that a later module reads": (SideChannel, VECTORS),
    "a moving average": (lambda: Chain(CountsItsPasses()), VECTORS),
}
