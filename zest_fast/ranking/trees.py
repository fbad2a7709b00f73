"""Regression trees that add up to a score, evaluated with NumPy alone. No LightGBM: that only grows them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

MOST_TREES, MOST_LEAVES = 1000, 64
NOT_MISSING, ZERO_IS_MISSING, NAN_IS_MISSING = 0, 1, 2
"""What a split takes for missing; where NaN is not, it counts as 0."""
LARGEST = float(np.finfo(np.float64).max)
"""What an infinity counts as, in a table and as a threshold."""
_ZERO = float(np.float32(1e-35))  # LightGBM's: what is closer to 0 is 0


@dataclass(frozen=True)
class Tree:
    """Nodes 0, 1, ... with the root first; a tree without nodes is its one leaf.

    Of the nodes [nodes]: `features` column of the table, `thresholds` (at most that goes left), `missing`,
    `default_left` (where what is missing goes), `left` and `right`, the children: a later node, or -1 - leaf.
    Of the leaves [leaves]: `values`, and `counts`, the training rows that ended there (>= 1).
    Raises ValueError, naming the entry, for anything that is no such tree.
    """

    features: np.ndarray
    thresholds: np.ndarray
    missing: np.ndarray
    default_left: np.ndarray
    left: np.ndarray
    right: np.ndarray
    values: np.ndarray
    counts: np.ndarray

    def __post_init__(self) -> None:
        leaves = len(self.values)
        if not 1 <= leaves <= MOST_LEAVES:
            raise ValueError(f"values: expected 1 to {MOST_LEAVES} leaves, found {leaves}")
        for name in ("features", "thresholds", "missing", "default_left", "left", "right", "counts"):
            wanted = leaves if name == "counts" else leaves - 1
            if getattr(self, name).shape != (wanted,):
                raise ValueError(f"{name}: expected {wanted} entries, found {list(getattr(self, name).shape)}")
        for name in ("thresholds", "values"):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"{name}: expected finite numbers")
        if not np.isin(self.missing, (NOT_MISSING, ZERO_IS_MISSING, NAN_IS_MISSING)).all():
            raise ValueError("missing: expected 0, 1 or 2")
        if (self.features < 0).any():
            raise ValueError("features: expected columns, 0 or more")
        if (self.counts < 1).any():
            raise ValueError("counts: expected 1 or more rows in each leaf")
        # Every node but the root and every leaf is a child once, and children come later: no cycle, nothing apart.
        children = np.concatenate([self.left, self.right])
        if sorted(children.tolist()) != [*range(-leaves, 0), *range(1, leaves - 1)] and leaves > 1:
            raise ValueError("left, right: expected every node but the first and every leaf exactly once")
        nodes = np.arange(leaves - 1)
        for name in ("left", "right"):
            child = getattr(self, name)
            if ((child >= 0) & (child <= nodes)).any():
                raise ValueError(f"{name}: expected children behind their node")

    def leaves(self, table: np.ndarray) -> np.ndarray:
        """float [rows, columns] -> the leaf of each row, int [rows]."""
        at = np.full(len(table), 0 if len(self.left) else -1)
        while (inside := np.flatnonzero(at >= 0)).size:
            node = at[inside]
            left = self._goes_left(table[inside, self.features[node]], node)
            at[inside] = np.where(left, self.left[node], self.right[node])
        return -1 - at

    def _goes_left(self, values: np.ndarray, node: np.ndarray | int) -> np.ndarray:
        missing, nan = self.missing[node], np.isnan(values)
        values = np.where((nan & (missing != NAN_IS_MISSING)) | (np.abs(values) <= _ZERO), 0.0, values)
        values = np.clip(values, -LARGEST, LARGEST)
        lacks = ((missing == ZERO_IS_MISSING) & (values == 0)) | ((missing == NAN_IS_MISSING) & nan)
        return np.where(lacks, self.default_left[node], values <= self.thresholds[node])

    @cached_property
    def _paths(self) -> list[list[tuple[int, bool, float]]]:
        """Of each leaf the splits above it: node, whether its left child, and the share of the node's rows there."""
        nodes = len(self.left)
        counts = dict(zip(range(-1, -1 - len(self.counts), -1), self.counts.tolist(), strict=True))
        for node in reversed(range(nodes)):
            counts[node] = counts[int(self.left[node])] + counts[int(self.right[node])]
        above: dict[int, list[tuple[int, bool, float]]] = {0: []}
        for node in range(nodes):
            for child, left in ((int(self.left[node]), True), (int(self.right[node]), False)):
                above[child] = [*above[node], (node, left, counts[child] / counts[node])]
        return [above.get(-1 - leaf, []) for leaf in range(len(self.counts))]

    def contributions(self, table: np.ndarray) -> np.ndarray:
        """float [rows, columns] -> SHAP values, [rows, columns]; their sum is the value less its mean over the counts.

        A leaf is reached where all features of its path agree, so that its value is shared by a game of few players
        (Lundberg et al. 2020, path-dependent).
        """
        added = np.zeros(table.shape)
        left = [self._goes_left(table[:, self.features[node]], node) for node in range(len(self.left))]
        for value, path in zip(self.values.tolist(), self._paths, strict=True):
            agrees: dict[int, np.ndarray] = {}
            shares: dict[int, float] = {}
            for node, goes_left, share in path:
                feature = int(self.features[node])
                here = left[node] == goes_left
                agrees[feature] = agrees[feature] & here if feature in agrees else here
                shares[feature] = shares.get(feature, 1.0) * share
            for feature, agree in agrees.items():
                others = [(agrees[f].astype(np.float64), shares[f]) for f in agrees if f != feature]
                added[:, feature] += value * (agree - shares[feature]) * _expected_product(others, len(table))
        return added


def _expected_product(others: Sequence[tuple[np.ndarray, float]], rows: int) -> np.ndarray:
    """Mean over the orders in which players join of Π (agrees of those before, shares of those after), [rows]."""
    by_size = [np.ones(rows)]  # of coalitions: the sums over those of each size
    for agree, share in others:
        without = [part * share for part in by_size] + [np.zeros(rows)]
        with_it = [np.zeros(rows)] + [part * agree for part in by_size]
        by_size = [a + b for a, b in zip(without, with_it, strict=True)]
    players = len(others) + 1
    return sum(
        (part / (players * math.comb(players - 1, size)) for size, part in enumerate(by_size)), start=np.zeros(rows)
    )


def predict_trees(trees: Sequence[Tree], table: np.ndarray) -> np.ndarray:
    """float [rows, columns] -> what the trees add to each row, [rows]: added up in their order, as LightGBM does."""
    added = np.zeros(len(table))
    for tree in trees:
        added += tree.values[tree.leaves(table)]
    return added


def explain_trees(trees: Sequence[Tree], table: np.ndarray) -> np.ndarray:
    """What each column adds through the trees (SHAP values), [rows, columns]; without the constant."""
    return sum((tree.contributions(table) for tree in trees), start=np.zeros(table.shape))
