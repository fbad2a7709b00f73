"""Settings chosen inside `fit`, by cross-validation within the training records, and what the errors were there.

Held out are families of data sets, for profiles of known architectures, and architectures with their kin, for profiles
as of a new one. The grid is small and fixed: PENALTIES and ROUNDS.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import kendalltau

from zest_fast.ranking.errors import Errors
from zest_fast.ranking.features import columns_of
from zest_fast.ranking.learning.boosted_trees import ROUNDS, STRENGTH, train_trees
from zest_fast.ranking.learning.training_rows import Rows, View
from zest_fast.ranking.linear_base import PENALTIES, LinearBase, fit_ridge, for_new_layers, has_prior
from zest_fast.ranking.mixing import Mixing, fit_weights, mixed_without_own
from zest_fast.ranking.trees import Tree, predict_trees

FOLDS = 5
DIGITS = 9  # of what trees start from: the last bits differ between machines
_TAIL = 0.1  # on each side of an interval of 80 %
_LEAST_SLOPE = 0.1


@dataclass(frozen=True)
class Selection:
    penalties: tuple[float, float]
    """For known and for new architectures."""
    rounds: int
    base: np.ndarray
    """The base's prediction for each row by a fit that has not seen it, [rows]: what the final trees start from."""
    known: Errors
    new: Errors
    probed: tuple[Mixing | None, Mixing | None]
    """Of known and of new architectures; None where no pair of the sort was probed."""


@dataclass(frozen=True)
class _Fold:
    train: list[View]
    test: list[View]


def select(rows: Rows, *, features: Sequence[str], seed: int) -> Selection:
    """Where nothing can be held out (one pair), the first, most cautious setting of each grid."""
    folds = _folds(rows)
    tested = [view for fold in folds for view in fold.test]
    known, new = [view for view in tested if view.known], [view for view in tested if not view.known]

    bases = {penalty: _held_out_base(rows, folds, features, penalty) for penalty in PENALTIES}
    penalties = (
        max(PENALTIES, key=lambda penalty: _score(rows, bases[penalty], known)),
        max(PENALTIES, key=lambda penalty: _score(rows, bases[penalty], new)),
    )
    base = np.where(has_prior(rows.values), bases[penalties[0]], bases[penalties[1]])

    trees = _held_out_trees(rows, folds, features, STRENGTH * base, seed)
    raw = {rounds: STRENGTH * base + added for rounds, added in trees.items()}
    rounds = max(raw, key=lambda rounds: _score(rows, raw[rounds], known, new))
    errors = _errors(rows, raw[rounds], known), _errors(rows, raw[rounds], new)
    probed = (
        _mixing(rows, raw[rounds], known, errors[0].slope, rows.families),
        _mixing(rows, raw[rounds], new, errors[1].slope, rows.kin),
    )
    return Selection(penalties, rounds, base, *errors, probed)


def fit_base(rows: Rows, views: Sequence[View], features: Sequence[str], penalties: tuple[float, float]) -> LinearBase:
    """penalties: for layers with a layer prior and for those without."""
    index = rows.of(views)
    prior = has_prior(rows.values[index])
    known, new = (
        fit_ridge(rows.design[chosen], rows.positions[chosen], rows.weights[chosen], features=names, penalty=penalty)
        for chosen, penalty, names in zip(
            (index[prior], index[~prior]), penalties, (features, for_new_layers(features)), strict=True
        )
    )
    return LinearBase(known, new)


def fit_trees(
    rows: Rows, views: Sequence[View], features: Sequence[str], initial: np.ndarray, *, rounds: int, seed: int
) -> tuple[Tree, ...]:
    """initial: the score to start from, of all rows."""
    index = rows.of(views)
    return train_trees(
        rows.values[index],
        rows.levels[index],
        rows.weights[index],
        initial[index],
        [view.rows.stop - view.rows.start for view in views],
        features=features,
        rounds=rounds,
        seed=seed,
    )


def mean_tau(rows: Rows, scores: np.ndarray, views: Sequence[View]) -> float:
    """Kendall's tau-b between scores and positions, mean over the profiles of a pair, then over pairs; NaN for none."""
    taus = defaultdict(list)
    for view in views:
        tau = kendalltau(scores[view.rows], rows.positions[view.rows]).statistic
        taus[view.pair].append(0.0 if np.isnan(tau) else tau)
    return float(np.mean([np.mean(found) for found in taus.values()])) if taus else float("nan")


def split(groups: Sequence[Hashable], most: int) -> list[set[Hashable]]:
    """Distribute groups over at most `most` folds of about as many members, the same way every time."""
    counts = {group: sum(other == group for other in groups) for group in groups}
    folds: list[set[Hashable]] = [set() for _ in range(min(most, len(counts)))]
    sizes = [0] * len(folds)
    for group in sorted(counts, key=lambda group: (-counts[group], str(group))):
        smallest = sizes.index(min(sizes))
        folds[smallest].add(group)
        sizes[smallest] += counts[group]
    return folds


def _folds(rows: Rows) -> list[_Fold]:
    """Those with something to train on and something to test; no view is tested twice.

    The priors of the training rows have seen the family that is held out. That touches what is learned of how far to
    trust a prior, not the held-out rows, whose own priors have not seen it.
    """
    found = []
    for known, group_of_pair in ((True, rows.families), (False, rows.kin)):
        for held_out in split(group_of_pair, FOLDS):
            train = [view for view in rows.views if group_of_pair[view.pair] not in held_out]
            test = [v for v in rows.views if group_of_pair[v.pair] in held_out and v.known == known]
            if train and test:
                found.append(_Fold(train, test))
    return found


def _held_out_base(rows: Rows, folds: Sequence[_Fold], features: Sequence[str], penalty: float) -> np.ndarray:
    """[rows]; rows that no fold tests are predicted by the fit to all of them."""
    predicted = fit_base(rows, rows.views, features, (penalty, penalty)).of_design(rows.design, rows.values)
    for fold in folds:
        test = rows.of(fold.test)
        base = fit_base(rows, fold.train, features, (penalty, penalty))
        predicted[test] = base.of_design(rows.design[test], rows.values[test])
    return np.round(predicted, DIGITS)


def _held_out_trees(
    rows: Rows, folds: Sequence[_Fold], features: Sequence[str], initial: np.ndarray, seed: int
) -> dict[int, np.ndarray]:
    """For each number of rounds what the trees add to each row, [rows]; 0 for rows that no fold tests."""
    added = {rounds: np.zeros(len(rows.values)) for rounds in ROUNDS}
    for fold in folds:
        trees = fit_trees(rows, fold.train, features, initial, rounds=max(ROUNDS), seed=seed)
        test = rows.of(fold.test)
        for rounds in ROUNDS:
            added[rounds][test] = predict_trees(trees[:rounds], rows.values[test][:, columns_of(features)])
    return added


def _score(rows: Rows, scores: np.ndarray, *views: Sequence[View]) -> float:
    """Mean tau of known and of new architectures, both counting alike where both were held out."""
    taus = [mean_tau(rows, scores, some) for some in views if some]
    return float(np.mean(taus)) if taus else 0.0


def _mixing(
    rows: Rows, raw: np.ndarray, views: Sequence[View], slope: float, groups: Sequence[Hashable]
) -> Mixing | None:
    """Weights of held-out scores and of probes, and the errors of scores by weights that have not seen the group."""
    views = [view for view in views if np.isfinite(rows.probe[view.rows]).all()]
    if not views:
        return None
    index = rows.of(views)
    scores = np.concatenate([0.5 + slope * (raw[view.rows] - raw[view.rows].mean()) for view in views])
    found, places, weights = rows.probe[index], rows.positions[index], rows.weights[index]
    group_of_row = [groups[view.pair] for view in views for _ in range(view.rows.stop - view.rows.start)]
    mixed = np.zeros(len(raw))
    mixed[index] = mixed_without_own(scores, found, places, weights, group_of_row)
    ranker, probe = fit_weights(scores, found, places, weights)
    return Mixing(ranker, probe, _errors(rows, mixed, views, slope=1.0))


def _errors(rows: Rows, raw: np.ndarray, views: Sequence[View], slope: float | None = None) -> Errors:
    """slope: where the scores are positions already."""
    if not views:
        return Errors(1 / STRENGTH, (np.nan, np.nan), np.nan, 0)
    index = rows.of(views)
    centred = np.concatenate([raw[view.rows] - raw[view.rows].mean() for view in views])
    positions, weights = rows.positions[index] - 0.5, rows.weights[index]
    variance = float(weights @ centred**2)
    if slope is None:
        slope = float(weights @ (centred * positions)) / variance if variance else 0.0
        slope = max(slope, _LEAST_SLOPE / STRENGTH)  # a score never turns the order around
    pairs = len({view.pair for view in views})
    tail = _TAIL * pairs / (pairs + 1)  # few pairs have not shown their extremes
    span = _quantiles(positions - slope * centred, weights, (tail, 1 - tail))
    return Errors(slope, (min(span[0], 0.0), max(span[1], 0.0)), mean_tau(rows, raw, views), pairs)


def _quantiles(values: np.ndarray, weights: np.ndarray, shares: tuple[float, float]) -> tuple[float, float]:
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[order]) / weights.sum()
    places = np.minimum(np.searchsorted(reached, np.array(shares)), len(values) - 1)
    low, high = values[order][places].tolist()
    return low, high
