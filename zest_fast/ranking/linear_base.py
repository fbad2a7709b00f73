"""The smooth part of a score: ridge regression of the position on priors and features. NumPy only.

Trees of few leaves coarsen a prior that is good as it stands, so they start from this and correct it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zest_fast.ranking.features import EXPECTED_RANKS, FEATURES, KIND_PRIOR, LAYER_PRIOR, PRIORS

PENALTIES = (30.0, 3.0, 0.3)
"""Of squared coefficients of features of unit variance, beside a mean squared error; 30 leaves little but priors."""
FOR_NEW_LAYERS = (KIND_PRIOR, "numel_rank", *EXPECTED_RANKS)
"""What the base may use for layers without a layer prior. A hundred features of a dozen families fit these families:
held out, all of them had a tau of .33, these .39 and the number of parameters alone .36 (45 pairs)."""
_PRIOR_PENALTY = 1e-2
_SHARE_OF_EXPECTED = 1e-2
"""Of the penalty, for what theory expects to matter: one of a hundred features should not have to shout."""
_NOTHING = 1e-9  # the variance of a feature that never varies


@dataclass(frozen=True)
class LinearBase:
    """position - 1/2 of a layer = Σ coefficient x (feature - its mean in the group); an undefined feature adds nothing.

    Two sets of coefficients, each [FEATURES]: for layers with a layer prior and for those without.
    """

    known: np.ndarray
    new: np.ndarray

    def parts(self, values: np.ndarray, groups: Sequence[slice]) -> np.ndarray:
        """[rows, FEATURES] -> what each feature adds to each row, [rows, FEATURES]."""
        return design(values, groups) * np.where(has_prior(values)[:, None], self.known, self.new)

    def of_design(self, x: np.ndarray, values: np.ndarray) -> np.ndarray:
        """As `predict`, for rows of which the design is at hand."""
        return (x * np.where(has_prior(values)[:, None], self.known, self.new)).sum(axis=1)

    def predict(self, values: np.ndarray, groups: Sequence[slice]) -> np.ndarray:
        """[rows, FEATURES] -> position - 1/2, [rows]."""
        return self.parts(values, groups).sum(axis=1)


def for_new_layers(features: Sequence[str]) -> tuple[str, ...]:
    """Those of FOR_NEW_LAYERS that are among `features`; all where none is, as in an ablation."""
    return tuple(name for name in features if name in FOR_NEW_LAYERS) or tuple(features)


def has_prior(values: np.ndarray) -> np.ndarray:
    """bool [rows]"""
    return ~np.isnan(values[:, FEATURES.index(LAYER_PRIOR)])


def design(values: np.ndarray, groups: Sequence[slice]) -> np.ndarray:
    """Features centred within each group, 0 where undefined."""
    centred = np.empty_like(values)
    for group in groups:
        block = values[group]
        defined = ~np.isnan(block)
        means = np.where(defined, block, 0.0).sum(axis=0) / np.maximum(1, defined.sum(axis=0))
        centred[group] = np.where(defined, block - means, 0.0)
    return centred


def fit_ridge(
    x: np.ndarray, positions: np.ndarray, weights: np.ndarray, *, features: Sequence[str], penalty: float
) -> np.ndarray:
    """Rows of `design` and where their layers stood -> coefficients, [FEATURES]; 0 for those not among `features`
    and all 0 without rows."""
    if not len(x):
        return np.zeros(len(FEATURES))
    used = [column for column, name in enumerate(FEATURES) if name in features]
    weighted = x[:, used] * (weights / weights.sum())[:, None]
    gram = weighted.T @ x[:, used]
    penalties = np.array([_penalty(FEATURES[column], penalty) for column in used])
    ridge = np.diag(penalties * (gram.diagonal() + _NOTHING))
    coefficients = np.zeros(len(FEATURES))
    coefficients[used] = np.linalg.solve(gram + ridge, weighted.T @ (positions - 0.5))
    return coefficients


def _penalty(feature: str, penalty: float) -> float:
    if feature in PRIORS:
        return _PRIOR_PENALTY
    return _SHARE_OF_EXPECTED * penalty if feature in EXPECTED_RANKS else penalty
