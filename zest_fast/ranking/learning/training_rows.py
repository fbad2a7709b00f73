"""Pairs -> the rows that are fitted: every profile once with what is known of its layers and once as of a new model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from zest_fast.ranking.architectures import Architecture, find
from zest_fast.ranking.features import FEATURES, OF_KNOWN_LAYERS, features_of
from zest_fast.ranking.groups import Group
from zest_fast.ranking.kind_prior import kind_prior
from zest_fast.ranking.layer_prior import layer_prior, usual_metrics
from zest_fast.ranking.learning.contributions import Pair
from zest_fast.ranking.linear_base import design


@dataclass(frozen=True)
class View:
    """One profile of a pair, with or without its layer prior: a group of the ranking."""

    pair: int
    known: bool
    """Whether its rows hold the layer prior."""
    rows: slice


@dataclass(frozen=True)
class Rows:
    values: np.ndarray
    """float [rows, FEATURES]"""
    positions: np.ndarray
    levels: np.ndarray
    weights: np.ndarray
    """Of each row; those of a pair sum to 1, so that every pair counts once."""
    views: tuple[View, ...]
    families: tuple[str, ...]
    """Of each pair, as `kin` and `names`."""
    kin: tuple[int, ...]
    """Pairs of the same or of related architectures have the same number."""
    names: tuple[str, ...]
    probe: np.ndarray
    """The score of a probe of each row; NaN where the pair was not probed."""

    @cached_property
    def design(self) -> np.ndarray:
        """What the base sees, [rows, FEATURES]."""
        return design(self.values, [view.rows for view in self.views])

    def of(self, views: Sequence[View]) -> np.ndarray:
        """int: the rows of some views, in their order."""
        return np.concatenate([np.arange(view.rows.start, view.rows.stop) for view in views])


def training_rows(pairs: Sequence[Pair], architectures: Sequence[Architecture], *, known: bool = True) -> Rows:
    """No prior has seen the family of data sets of its row, and no kind prior its architecture or its kin.

    known: whether the layer prior is there at all; without it every profile is a view of a new model.
    """
    values, positions, levels, weights, views, probes = [], [], [], [], [], []
    own = {architecture.model: architecture for architecture in architectures}
    start = 0
    for number, pair in enumerate(pairs):
        others = [a for a in architectures if not a.is_kin_of(own[pair.model])]
        visible = architectures if known else []
        found = [table for group in pair.views for table in _tables(group, pair, visible, others)]
        share = 1 / sum(len(table) for _, table, _ in found)
        for has_prior, table, names in found:
            values.append(table)
            positions.append(pair.positions[names].to_numpy())
            levels.append(pair.levels[names].to_numpy())
            weights.append(np.full(len(table), share))
            probes.append(_probe(pair, names))
            views.append(View(number, has_prior, slice(start, start + len(table))))
            start += len(table)
    return Rows(
        np.concatenate(values),
        np.concatenate(positions),
        np.concatenate(levels),
        np.concatenate(weights),
        tuple(views),
        tuple(pair.family for pair in pairs),
        tuple(_kin(own[pair.model], architectures) for pair in pairs),
        tuple(pair.name for pair in pairs),
        np.concatenate(probes),
    )


def _tables(
    group: Group, pair: Pair, architectures: Sequence[Architecture], others: Sequence[Architecture]
) -> list[tuple[bool, np.ndarray, list[str]]]:
    """(known, [scored layers, FEATURES], their names) of one profile: with the layer prior, if any, and without."""
    scored = np.isin(group.names, pair.positions.index.to_numpy(str))
    names = [name for name, kept in zip(group.names, scored, strict=True) if kept]
    if not names:
        return []
    matches = find(group, architectures)
    layers = layer_prior(group, matches, without_family=pair.family)
    usual = usual_metrics(group, matches, without_family=pair.family)
    kinds = kind_prior(group.traits, others, without_family=pair.family)
    known = features_of(group, layers, kinds, usual)[scored]
    new = known.copy()
    new[:, [FEATURES.index(name) for name in OF_KNOWN_LAYERS]] = np.nan
    return [(False, new, names)] if np.isnan(layers).all() else [(True, known, names), (False, new, names)]


def _probe(pair: Pair, names: list[str]) -> np.ndarray:
    if pair.probe is None:
        return np.full(len(names), np.nan)
    return pair.probe[names].to_numpy(np.float64)


def _kin(architecture: Architecture, architectures: Sequence[Architecture]) -> int:
    return next(i for i, other in enumerate(architectures) if architecture.is_kin_of(other))
