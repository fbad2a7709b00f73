"""What a ranking is worth: agreement with the target, what could be attained, what its first layers recover."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from scipy import stats


def tau_b(scores: np.ndarray, gains: np.ndarray) -> float:
    """Kendall's tau-b between scores and gains, both [layers]; ties in either are corrected for.

    Scores that are NaN stand below all others, tied. Where all scores or all gains are equal there is no order to agree
    with: 0, what a random order has in expectation.
    """
    found = stats.kendalltau(_filled(scores), gains, variant="b", method="asymptotic").statistic
    return 0.0 if np.isnan(found) else float(found)


def recovered_gain(scores: np.ndarray, gains: np.ndarray, n: int) -> float:
    """Share of the best n layers' mean gain that the n with the largest scores have, above the mean of all layers.

    (mean gain of the ranking's n - mean gain of all) / (mean gain of the best n - mean gain of all), both [layers]:
    random layers have 0 in expectation, the best n have 1, worse than random is below 0. Equal scores stand in random
    order, and the value is the expectation over these orders; NaN stands below all others. 1 where all gains are equal:
    there is nothing to lose. Gains are estimates, so "the best" is partly luck that no ranking can foresee; a layer
    that training breaks lowers the mean of all, and with it the bar.
    """
    n = min(n, len(gains))
    mean, best = gains.mean(), np.sort(gains)[-n:].mean()
    if best <= mean:
        return 1.0
    scores = _filled(scores)
    threshold = np.sort(scores)[-n]
    above, tied = scores > threshold, scores == threshold
    reached = gains[above].sum() + (n - above.sum()) * gains[tied].mean()
    return float((reached / n - mean) / (best - mean))


def kept_gain(scores: np.ndarray, gains: np.ndarray, n: int) -> float:
    """Gain of the n layers with the largest scores over that of the best n, both [layers]; between -1 and 1.

    Ties and NaN as in `recovered_gain`. 1 where the best n gain nothing: there is nothing to lose.
    """
    n = min(n, len(gains))
    best = np.sort(gains)[-n:].mean()
    if best <= 0:
        return 1.0
    mean = gains.mean()
    reached = mean + recovered_gain(scores, gains, n) * (best - mean)
    return float(np.clip(reached / best, -1, 1))


def reliability(gains: np.ndarray) -> float:
    """Of the mean over seeds: the share of its variance that is no noise. gains: [seeds, layers].

    The mean correlation r between two seeds, stepped up to k of them by Spearman and Brown: k r / (1 + (k - 1) r). It
    is the correlation of normal scores, since tau sees orders only and a layer that diverges must not decide. Seeds
    share the samples that are scored, so what these have of luck counts as signal: an upper bound. NaN for one seed.
    """
    if len(gains) < 2:
        return float("nan")
    normal = stats.norm.ppf(stats.rankdata(gains, axis=1) / (gains.shape[1] + 1))
    between = [_correlation(normal[a], normal[b]) for a, b in combinations(range(len(gains)), 2)]
    r, k = max(0.0, float(np.mean(between))), len(gains)
    return k * r / (1 + (k - 1) * r)


def attainable_tau(reliability: float) -> float:
    """Tau between the noisy target and a perfect predictor of what it measures: (2/π) asin(√reliability).

    For normal variables tau = (2/π) asin(correlation), and the truth correlates with its noisy measurement by the root
    of the reliability.
    """
    return 2 / np.pi * float(np.arcsin(np.sqrt(reliability)))


def tau_between_seeds(gains: np.ndarray) -> float:
    """Mean tau of two seeds' gains, [seeds, layers]. NaN for one seed."""
    between = [tau_b(gains[a], gains[b]) for a, b in combinations(range(len(gains)), 2)]
    return float(np.mean(between)) if between else float("nan")


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """0 where one is constant."""
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else 0.0


def _filled(scores: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(scores), -np.inf, scores)


class Bootstrap:
    """Means over pairs with their intervals; every mean and difference under the same draws.

    clusters: for each pair what it is drawn together with; None = every pair by itself.
    """

    def __init__(self, pairs: int, *, draws: int, seed: int, clusters: list[str] | None = None) -> None:
        names, member = np.unique(clusters if clusters is not None else np.arange(pairs), return_inverse=True)
        generator = np.random.default_rng(seed)
        counts = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
        self._counts = counts[:, member]

    def interval(self, values: np.ndarray, weights: np.ndarray | None = None) -> tuple[float, float]:
        """95 % percentile interval of the (weighted) mean of `values`, [pairs] in the order of the constructor.

        Values that are NaN are left out of every draw; NaN where all are.
        """
        weights = np.ones(len(values)) if weights is None else weights
        known = np.where(np.isnan(values), 0.0, weights)
        total = self._counts @ known
        means = (self._counts @ (known * np.nan_to_num(values)))[total > 0] / total[total > 0]
        if not len(means):
            return float("nan"), float("nan")
        low, high = np.percentile(means, (2.5, 97.5))
        return float(low), float(high)
