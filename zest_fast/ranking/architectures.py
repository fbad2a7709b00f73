"""What records know of each architecture, and how the layers of a profile find themselves in it. No torch.

An architecture is recognised by the names and shapes of its layers, so that a wrapper ("body.", "bert.") or another
head changes nothing; where every name differs, by the sequence of shapes.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from zest_fast.ranking.features import metric_z
from zest_fast.ranking.groups import Group, Shape, Traits

if TYPE_CHECKING:
    from zest_fast.ranking.learning.contributions import Pair

KNOWN_FROM = 0.8
"""The share of layers, of the profile's or of the records', that must match for an architecture to be recognised."""
COVERED_FROM = 0.75
"""The share of the profile's layers that a sweep must have scored for what is said of known models to hold of it.
Figures of known models are of orders in which each layer has a prior of its own: of 0.75 of the layers that is more
than half (0.56) of the pairs that are ordered, and what is between them can be interpolated; of fewer it is not."""
_KIN_FROM = 0.5
_CANDIDATES = 4


@dataclass(frozen=True)
class Architecture:
    """The layers that sweeps scored, by depth, and where they stood for each family of data sets."""

    model: str
    names: tuple[str, ...]
    kinds: np.ndarray
    depths: np.ndarray
    shapes: tuple[Shape, ...]
    families: tuple[str, ...]
    positions: np.ndarray
    """float [families, layers]: mean position in (0, 1) over the data sets of the family, NaN where not swept."""
    usual: np.ndarray
    """float [families, layers, DYNAMIC_METRICS]: mean of `metric_z` over the profiles of the family."""

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def traits(self) -> Traits:
        return Traits.of(self.kinds, self.depths, self.shapes)

    @cached_property
    def row_of(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.names)}

    @cached_property
    def roles(self) -> frozenset[str]:
        return frozenset(".".join(role(name).split(".")[-2:]) for name in self.names)

    def mean_positions(self, without_family: str | None = None) -> np.ndarray:
        """[layers]: mean over the families but one; NaN where none is left."""
        return nan_mean(self.positions[[family != without_family for family in self.families]])

    def is_kin_of(self, other: Architecture) -> bool:
        """Whether both are built of blocks of the same names, as the sizes of one family of models are."""
        shared = len(self.roles & other.roles)
        return shared >= _KIN_FROM * len(self.roles | other.roles)


@dataclass(frozen=True)
class Match:
    architecture: Architecture
    rows: np.ndarray
    """int [layers of the profile]: the row of each in the architecture, -1 where it has none."""
    renamed: tuple[str, ...]
    """The names of the profile's layers as the architecture spells them; "" outside the wrapper of the others."""

    @property
    def share(self) -> float:
        """Of the profile's layers, those that the architecture has."""
        return float((self.rows >= 0).mean())

    @property
    def covers(self) -> bool:
        """Whether the architecture is recognised and nearly all of the profile's layers were swept."""
        return self.known and self.share >= COVERED_FROM

    @property
    def known(self) -> bool:
        """Whether this is the architecture, as far as it was swept."""
        matched = int((self.rows >= 0).sum())
        return matched >= KNOWN_FROM * min(len(self.rows), len(self.architecture))


def role(name: str) -> str:
    """A layer's name without the numbers of its blocks."""
    return re.sub(r"\d+", "#", name)


def find(group: Group, architectures: Iterable[Architecture]) -> list[Match]:
    """The architectures that most layers of `group` match, the same under several names; none where no layer does."""
    matches = [match for match in (_match(group, architecture) for architecture in architectures) if match.share]
    best = max(((match.known, match.share) for match in matches), default=None)
    return [match for match in matches if (match.known, match.share) == best]


def _match(group: Group, architecture: Architecture) -> Match:
    best = Match(architecture, np.full(len(group), -1), group.names)
    for theirs, ours in _prefixes(group.names, group.shapes, architecture):
        renamed = tuple(theirs + name[len(ours) :] if name.startswith(ours) else "" for name in group.names)
        found = [architecture.row_of.get(name, -1) for name in renamed]
        same = [r >= 0 and architecture.shapes[r] == shape for r, shape in zip(found, group.shapes, strict=True)]
        match = Match(architecture, np.where(same, found, -1), renamed)
        if match.share > best.share:
            best = match
    if not best.known and group.shapes == architecture.shapes and (group.kinds == architecture.kinds).all():
        return Match(architecture, np.arange(len(group)), architecture.names)
    return best


def _prefixes(names: Sequence[str], shapes: Sequence[Shape], architecture: Architecture) -> list[tuple[str, str]]:
    """Candidates (prefix there, prefix here) that may turn the one's names into the other's, the likeliest first.

    The n-th layers of each shape are compared: what is left of their names before the dotted end that they share.
    """
    there: dict[Shape, list[str]] = defaultdict(list)
    for name, shape in zip(architecture.names, architecture.shapes, strict=True):
        there[shape].append(name)
    seen: Counter[Shape] = Counter()
    votes: Counter[tuple[str, str]] = Counter()
    for name, shape in zip(names, shapes, strict=True):
        place, seen[shape] = seen[shape], seen[shape] + 1
        if place < len(there.get(shape, ())):
            votes[_before_shared_end(there[shape][place], name)] += 1
    voted = [prefixes for prefixes, _ in votes.most_common(_CANDIDATES)]
    return [("", ""), *(prefixes for prefixes in voted if prefixes != ("", ""))]


def _before_shared_end(a: str, b: str) -> tuple[str, str]:
    left, right = a.split("."), b.split(".")
    shared = 0
    while shared < min(len(left), len(right)) and left[-1 - shared] == right[-1 - shared]:
        shared += 1
    return (
        "".join(f"{part}." for part in left[: len(left) - shared]),
        "".join(f"{part}." for part in right[: len(right) - shared]),
    )


def architectures_of(pairs: Sequence[Pair]) -> list[Architecture]:
    """One for each model, by name. Raises ValueError where a layer of a model has two shapes."""
    models = sorted({pair.model for pair in pairs})
    return [_architecture([pair for pair in pairs if pair.model == model]) for model in models]


def _architecture(pairs: Sequence[Pair]) -> Architecture:
    """Of pairs of one model."""
    layers: dict[str, tuple[float, str, Shape]] = {}
    for pair in pairs:
        for group in pair.views:
            for name, depth, kind, shape in zip(group.names, group.depths, group.kinds, group.shapes, strict=True):
                if name in pair.positions.index and layers.setdefault(name, (depth, kind, shape))[2] != shape:
                    raise ValueError(
                        f"{pair.model}: layer {name!r} has shape {list(layers[name][2])} in one record and "
                        f"{list(shape)} in another; give different models different names"
                    )
    names = sorted(layers, key=lambda name: (layers[name][0], name))
    families = sorted({pair.family for pair in pairs})
    return Architecture(
        model=pairs[0].model,
        names=tuple(names),
        kinds=np.array([layers[name][1] for name in names]),
        depths=np.array([layers[name][0] for name in names]),
        shapes=tuple(layers[name][2] for name in names),
        families=tuple(families),
        positions=np.stack([_mean_positions([p for p in pairs if p.family == f], names) for f in families]),
        usual=np.stack([_mean_metrics([p for p in pairs if p.family == f], names) for f in families]),
    )


def _mean_positions(pairs: Sequence[Pair], names: Sequence[str]) -> np.ndarray:
    return nan_mean(np.stack([pair.positions.reindex(list(names)).to_numpy() for pair in pairs]))


def _mean_metrics(pairs: Sequence[Pair], names: Sequence[str]) -> np.ndarray:
    import pandas

    tables = [
        pandas.DataFrame(metric_z(group), index=list(group.names)).reindex(list(names)).to_numpy()
        for pair in pairs
        for group in pair.views
    ]
    return nan_mean(np.stack(tables))


def nan_mean(values: np.ndarray) -> np.ndarray:
    """[n, ...] -> mean of what is defined, [...]; NaN where nothing is."""
    counts = (~np.isnan(values)).sum(axis=0)
    return np.where(counts > 0, np.nansum(values, axis=0) / np.maximum(1, counts), np.nan)
