"""How far a probe is to be trusted beside what a Ranker knows without it. No torch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from zest_fast.ranking.errors import Errors
from zest_fast.ranking.features import positions


@dataclass(frozen=True)
class Mixing:
    """score = 1/2 + ranker x (score without the probe - 1/2) + probe x evidence; neither weight is negative."""

    ranker: float
    probe: float
    errors: Errors
    """Of the mixed score, where its weights had not seen the pair."""

    def apply(self, scores: np.ndarray, found: np.ndarray) -> np.ndarray:
        """scores: without the probe, [layers]. found: `evidence`, [layers]."""
        return 0.5 + self.ranker * (scores - 0.5) + self.probe * found


def evidence(gains: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Where each layer stands in a probe, minus 1/2, times the share of the gains' variance that is no noise, [layers].

    gains: [layers], NaN where the loss was not finite: these stand last. errors: their standard errors.
    """
    finite = np.isfinite(gains)
    if finite.sum() < 2:
        return np.zeros(len(gains))
    variance = gains[finite].var()
    noise = float(np.nanmean(np.square(errors[finite]))) if np.isfinite(errors[finite]).any() else 0.0
    share = min(1.0, max(0.0, 1 - noise / variance)) if variance > 0 else 0.0
    places = positions(np.where(finite, gains, gains[finite].min() - 1.0)[:, None])[:, 0]
    return share * (places - 0.5)


def fit_weights(scores: np.ndarray, found: np.ndarray, places: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Non-negative least squares of `places` - 1/2 on scores - 1/2 and evidence; all [rows]."""
    from scipy.optimize import nnls

    root = np.sqrt(weights)
    design = np.column_stack([scores - 0.5, found]) * root[:, None]
    ranker, probe = nnls(design, (places - 0.5) * root)[0].tolist()
    return ranker, probe


def mixed_without_own(
    scores: np.ndarray, found: np.ndarray, places: np.ndarray, weights: np.ndarray, groups: Sequence[Hashable]
) -> np.ndarray:
    """The mixed scores of each group by weights that the other groups gave, [rows]; those of all where there is one."""
    keys = np.array([str(group) for group in groups])
    mixed = np.empty(len(scores))
    for group in np.unique(keys):
        own = keys == group
        rest = ~own if not own.all() else own
        ranker, probe = fit_weights(scores[rest], found[rest], places[rest], weights[rest])
        mixed[own] = 0.5 + ranker * (scores[own] - 0.5) + probe * found[own]
    return mixed
