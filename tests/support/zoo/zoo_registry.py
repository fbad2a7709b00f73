"""Where the entries of the zoo are registered, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Built = tuple[nn.Module, Callable[..., Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Entry:
    """layers: what to profile where that is not the default; rounded: half precision is part of the case.

    undefined: row -> metrics that have no meaning there: they are NaN, and the row's note says why. refusal: a pattern
    of the message by which the case may be refused instead; empty where it may not. optional: as undefined, but the
    value itself is right as well.
    """

    make: Callable[[], Built]
    layers: tuple[str, ...] | None = None
    rounded: bool = False
    undefined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    optional: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    refusal: str = ""


ZOO: dict[str, Entry] = {}
REFUSABLE: dict[str, Entry] = {}


def entry(
    *,
    layers: tuple[str, ...] | None = None,
    rounded: bool = False,
    undefined: Mapping[str, tuple[str, ...]] | None = None,
    optional: Mapping[str, tuple[str, ...]] | None = None,
    refusal: str = "",
) -> Callable:
    def register(make: Callable[[], Built]) -> Callable[[], Built]:
        registry = REFUSABLE if refusal else ZOO
        assert make.__name__ not in registry
        registry[make.__name__] = Entry(make, layers, rounded, undefined or {}, optional or {}, refusal)
        return make

    return register


def mean_square(model: nn.Module, *inputs: Tensor) -> Tensor:
    return model(*inputs).float_power(2).mean()


def classify(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


class own_loss:
    """The loss that a transformers model computes itself; names: argument -> which tensor of the data."""

    def __init__(self, **names: int) -> None:
        self.names = names

    def __call__(self, model: nn.Module, *data: Tensor) -> Tensor:
        return model(**self.batch(data)).loss

    def batch(self, data: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return {name: data[i] for name, i in self.names.items()}


def images(n: int = 3, size: int = 8, channels: int = 3) -> Tensor:
    return torch.randn(n, channels, size, size)


def tokens(n: int = 3, length: int = 7, vocabulary: int = 100) -> Tensor:
    return torch.randint(vocabulary, (n, length))


def noise_like(x: Tensor) -> Tensor:
    """Standard normal numbers, which do not depend on the precision of x."""
    return torch.randn(x.shape).to(x.dtype)
