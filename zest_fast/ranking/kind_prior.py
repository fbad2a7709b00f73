"""The kind prior: where layers of the same kind, depth and proportions stood in other architectures. No torch."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from zest_fast.ranking.architectures import Architecture
from zest_fast.ranking.groups import Traits

_DEPTH, _WIDENING, _KERNEL_AREA = 0.15, 1.0, 1.5  # bandwidths, in units of the traits
_OTHER_KIND = 0.05
_PRIOR_WEIGHT = 0.01  # of the middle position, where one layer of a hundred in an architecture counts 0.01


def kind_prior(traits: Traits, architectures: Iterable[Architecture], without_family: str | None = None) -> np.ndarray:
    """Expected position in (0, 1) of each layer, [layers]; NaN where there is no other architecture.

    A mean over all layers of `architectures`, by a Gaussian of the distance in depth, widening and kernel; every
    architecture counts once. without_family: what the family that a training group belongs to must not tell it.
    """
    total = np.full(len(traits.depths), _PRIOR_WEIGHT)
    weighted = 0.5 * total
    seen = False
    for architecture in architectures:
        positions = architecture.mean_positions(without_family)
        defined = ~np.isnan(positions)
        if not defined.any():
            continue
        seen = True
        weights = _similarity(traits, architecture.traits) * defined / defined.sum()
        total += weights.sum(axis=1)
        weighted += weights @ np.nan_to_num(positions)
    return weighted / total if seen else np.full(len(traits.depths), np.nan)


def _similarity(ours: Traits, theirs: Traits) -> np.ndarray:
    """[our layers, their layers] in 0..1"""
    distance = sum(
        ((getattr(ours, name)[:, None] - getattr(theirs, name)) / bandwidth) ** 2
        for name, bandwidth in (("depths", _DEPTH), ("widening", _WIDENING), ("kernel_area", _KERNEL_AREA))
    )
    return np.exp(-0.5 * distance) * np.where(ours.kinds[:, None] == theirs.kinds, 1.0, _OTHER_KIND)
