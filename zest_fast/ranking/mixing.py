"""How far a probe is to be trusted beside what a Ranker knows without it. No torch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from zest_fast.ranking.errors import Errors


@dataclass(frozen=True)
class Mixing:
    """score = 1/2 + ranker x (score without the probe - 1/2) + probe x (score of the probe), no weight negative."""

    ranker: float
    probe: float
    errors: Errors
    """Of the mixed score, where its weights had not seen the pair."""

    def apply(self, scores: np.ndarray, found: np.ndarray) -> np.ndarray:
        """scores: without the probe, [layers]. found: of a Probe, [layers]."""
        return _mixed(scores, found, (self.ranker, self.probe))


def _mixed(scores: np.ndarray, found: np.ndarray, weights: tuple[float, float]) -> np.ndarray:
    ranker, probe = weights
    return 0.5 + ranker * (scores - 0.5) + probe * found


def fit_weights(scores: np.ndarray, found: np.ndarray, places: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Non-negative least squares of `places` - 1/2 on scores - 1/2 and the probe's scores; all [rows]."""
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
        fitted = fit_weights(scores[rest], found[rest], places[rest], weights[rest])
        mixed[own] = _mixed(scores[own], found[own], fitted)
    return mixed
