"""What the same layer of the same architecture showed on other families of data sets. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from zest_fast.ranking.architectures import Match, nan_mean, role
from zest_fast.ranking.features import DYNAMIC_METRICS
from zest_fast.ranking.groups import Group

_BANDWIDTH = 0.1  # of relative depth, between blocks


def layer_prior(group: Group, matches: Sequence[Match], without_family: str | None = None) -> np.ndarray:
    """Expected position in (0, 1) of each layer, [layers]; NaN where nothing is known.

    matches: what `find` gave. A layer that no sweep scored takes the positions of its neighbours, the same role and
    shape in the blocks around it, where nearly all others were scored (`Match.covers`).
    without_family: what the family that a training group belongs to must not tell it.
    """
    rows = [_positions(group, match, without_family) for match in matches if match.known]
    return nan_mean(np.concatenate(rows)) if rows else np.full(len(group), np.nan)


def usual_metrics(group: Group, matches: Sequence[Match], without_family: str | None = None) -> np.ndarray:
    """What `metric_z` is on average for each layer, [layers, DYNAMIC_METRICS]; NaN where nothing is known."""
    tables = []
    for match in matches:
        architecture = match.architecture
        kept = architecture.usual[[family != without_family for family in architecture.families]]
        if match.known:
            tables.append(np.where((match.rows >= 0)[:, None], kept[:, match.rows], np.nan))
    return nan_mean(np.concatenate(tables)) if tables else np.full((len(group), len(DYNAMIC_METRICS)), np.nan)


def _positions(group: Group, match: Match, without_family: str | None) -> np.ndarray:
    """[families, layers of the group]"""
    architecture = match.architecture
    kept = architecture.positions[[family != without_family for family in architecture.families]]
    found = np.where(match.rows >= 0, kept[:, match.rows], np.nan)
    for layer in np.flatnonzero(match.rows < 0) if match.covers else ():
        weights = _neighbours(group, match, int(layer))
        defined = weights * ~np.isnan(kept)
        total = defined.sum(axis=1)
        found[:, layer] = np.where(
            total > 0, (defined * np.nan_to_num(kept)).sum(axis=1) / np.where(total > 0, total, 1), np.nan
        )
    return found


def _neighbours(group: Group, match: Match, layer: int) -> np.ndarray:
    """How much each layer of the architecture tells of one that it has not, [layers of the architecture]."""
    architecture, own = match.architecture, role(match.renamed[layer])
    alike = [
        shape == group.shapes[layer] and role(name) == own
        for name, shape in zip(architecture.names, architecture.shapes, strict=True)
    ]
    distance = (architecture.depths - group.depths[layer]) / _BANDWIDTH
    return np.array(alike) * np.exp(-0.5 * distance**2)
