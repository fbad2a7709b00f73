"""What a Ranker is worth on data sets that it has not seen, beside what comes for nothing. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas
from scipy.stats import kendalltau

from zest_fast.ranking.features import METRICS
from zest_fast.ranking.learning.contributions import Pair, pairs_of
from zest_fast.ranking.learning.selection import split
from zest_fast.ranking.ranker import Ranker


def cross_validate(
    records: pandas.DataFrame,
    *,
    folds: int = 5,
    sweeps: Sequence[Mapping[str, Any]] | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> pandas.DataFrame:
    """Kendall's tau with the gains, a row for each pair of model and data set.

    Whole families of data sets are held out, each once, in at most `folds` folds; a Ranker is fitted to the rest.
    Columns: model, dataset, family, ranker, layer_prior (mean position of the layer on the other families; NaN where
    the model has none) and best_metric (the metric, and its sign, with the largest mean tau on the pairs of the fit).
    The tau of a pair is the mean over its profiles. progress: called with what is being done.
    Raises ValueError where there are fewer than two families.
    """
    pairs = pairs_of(records)
    held_out = split([pair.family for pair in pairs], folds)
    if folds < 2 or len(held_out) < 2:
        raise ValueError(
            f"cross-validation needs at least two folds and two families of data sets; there are {folds} and "
            f"{len({pair.family for pair in pairs})}"
        )
    rows = []
    for number, families in enumerate(held_out, start=1):
        progress(f"fold {number} of {len(held_out)}: {', '.join(sorted(map(str, families)))} held out")
        train = [pair for pair in pairs if pair.family not in families]
        ranker = Ranker(seed=seed).fit(records[~records["family"].isin(families)], sweeps=sweeps)
        metric, sign = _best_metric(train)
        for pair in pairs:
            if pair.family not in families:
                continue
            prior = _prior(pair, train)
            contestants = {
                "ranker": [ranker.assess(view).scores[view.rows] for view in pair.views],
                "layer_prior": [prior.reindex(list(view.names)).to_numpy() for view in pair.views],
                "best_metric": [sign * scores for scores in _metric(pair, metric)],
            }
            taus = {name: _tau(pair, scores) for name, scores in contestants.items()}
            rows.append({"model": pair.model, "dataset": pair.dataset, "family": pair.family, **taus})
    return pandas.DataFrame(rows).sort_values(["model", "dataset"], ignore_index=True)


def _tau(pair: Pair, scores: Sequence[np.ndarray]) -> float:
    """scores: [layers] of each profile. NaN where nothing is scored; equal scores order nothing, which is 0."""
    taus = []
    for view, own in zip(pair.views, scores, strict=True):
        gains = pair.gains.reindex(list(view.names)).to_numpy()
        defined = ~np.isnan(own) & ~np.isnan(gains)
        if defined.any():
            tau = kendalltau(own[defined], gains[defined]).statistic
            taus.append(0.0 if np.isnan(tau) else float(tau))
    return float(np.mean(taus)) if taus else float("nan")


def _metric(pair: Pair, metric: str) -> list[np.ndarray]:
    return [view.metrics.get(metric, np.full(len(view), np.nan)) for view in pair.views]


def _best_metric(pairs: Sequence[Pair]) -> tuple[str, int]:
    """The metric with the largest mean |tau|, and the sign of it; of those that every pair has."""
    taus = {metric: np.mean([_tau(pair, _metric(pair, metric)) for pair in pairs]) for metric in METRICS}
    best = max(taus, key=lambda metric: np.nan_to_num(abs(taus[metric])))
    return best, 1 if taus[best] >= 0 else -1


def _prior(pair: Pair, train: Sequence[Pair]) -> pandas.Series:
    others = [other.positions for other in train if other.model == pair.model]
    return pandas.concat(others, axis=1).mean(axis=1) if others else pandas.Series(dtype=float)
