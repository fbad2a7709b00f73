"""What a fitted Ranker knows, and how it scores a group of layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zest_fast.foundation.nearest import some
from zest_fast.ranking.architectures import Architecture, Match, find
from zest_fast.ranking.assessment import Assessment, Known
from zest_fast.ranking.errors import Errors
from zest_fast.ranking.features import (
    FEATURES,
    KIND_PRIOR,
    LAYER_PRIOR,
    STRUCTURE,
    columns_of,
    features_of,
    is_of_weights,
)
from zest_fast.ranking.groups import Group
from zest_fast.ranking.kind_prior import kind_prior
from zest_fast.ranking.layer_prior import layer_prior, usual_metrics
from zest_fast.ranking.linear_base import LinearBase, has_prior
from zest_fast.ranking.mixing import Mixing
from zest_fast.ranking.trees import Tree, explain_trees, predict_trees


@dataclass(frozen=True)
class Model:
    """score = 1/2 + slope x (strength x base + trees, minus the mean of the group)."""

    features: tuple[str, ...]
    base: LinearBase
    strength: float
    trees: tuple[Tree, ...]
    """Over the columns of `features`."""
    known: Errors
    new: Errors
    architectures: tuple[Architecture, ...]
    metrics: tuple[str, ...]
    """Those that a profile must hold."""
    probed: tuple[Mixing | None, Mixing | None] = (None, None)
    """Weights of a probe, for known and for new architectures; None where it learned from none."""

    def assess(self, group: Group, probe: np.ndarray | None = None) -> Assessment:
        """probe: the scores of a Probe, [layers of the group].

        Raises ValueError where the group lacks metrics, or none of them is a number for any layer, and for a probe
        where the Ranker learned from none.
        """
        missing = [metric for metric in self.metrics if metric not in group.metrics]
        if missing:
            raise ValueError(
                f"the profile lacks {some(missing)}, which this Ranker learned from; profile with metrics=None, "
                "or rank by one metric (a column that holds text is no metric)"
            )
        unmeasured = self._unmeasured(group)
        matches = find(group, self.architectures)
        values = self._values(group, matches)
        prior = has_prior(values)
        whole = [slice(0, len(group))]
        raw = self.strength * self.base.predict(values, whole)
        raw = raw + predict_trees(self.trees, values[:, columns_of(self.features)])
        scores = 0.5 + _centred(self._slopes(prior) * raw)
        known = bool(matches) and matches[0].covers
        errors = self.known if known else self.new
        mixing, found = None, np.zeros(len(group))
        intervals = None
        if probe is not None:
            mixing, found = self._mixing(known), probe
            scores, errors = mixing.apply(scores, found), mixing.errors
            intervals = _within(scores, np.broadcast_to(errors.span, (len(group), 2)))
        else:
            intervals = self._intervals(scores, prior & known)
        partly = None
        if matches and matches[0].known and not known:
            partly = (matches[0].architecture.model, int((matches[0].rows >= 0).sum()), len(group))
        return Assessment(
            scores=group.in_table(scores),
            intervals=group.in_table(intervals),
            known=Known(matches[0].share if matches else 0.0, matches[0].architecture.model if known else None),
            expected_tau=errors.tau,
            parts=lambda: self._parts(group, values, mixing, found),
            layers=tuple(group.names[row] for row in np.argsort(group.rows)),
            probed=mixing is not None,
            partly=partly,
            unmeasured=int(unmeasured.sum()),
        )

    def _mixing(self, known: bool) -> Mixing:
        mixing = self.probed[0] if known and self.probed[0] is not None else self.probed[1] or self.probed[0]
        if mixing is None:
            raise ValueError(
                "this Ranker learned from records without probes and cannot say how far to trust one: rank by the "
                "probe alone (by=probe), or fit a Ranker to records with a column probe_score"
            )
        return mixing

    def _unmeasured(self, group: Group) -> np.ndarray:
        """bool [layers]: those of which no metric is a number."""
        if not self.metrics:
            return np.zeros(len(group), dtype=bool)
        found = ~np.isfinite(np.stack([group.metrics[metric] for metric in self.metrics])).any(axis=0)
        if found.all():
            raise ValueError(
                f"the profile has no finite value of any metric that this Ranker reads, in none of its {len(group)} "
                f"layers (such as {group.names[0]!r}): there is nothing to rank by; look for NaN or infinities in the "
                "batch, the weights or the loss, and profile again"
            )
        return found

    def _values(self, group: Group, matches: Sequence[Match]) -> np.ndarray:
        """As in training: the kind prior of a known architecture comes from others."""
        own = [match.architecture for match in matches if match.known]
        others = [a for a in self.architectures if not any(a.is_kin_of(known) for known in own)]
        usual = usual_metrics(group, matches)
        return features_of(group, layer_prior(group, matches), kind_prior(group.traits, others), usual)

    def _slopes(self, prior: np.ndarray) -> np.ndarray:
        return np.where(prior, self.known.slope, self.new.slope)

    def _intervals(self, scores: np.ndarray, prior: np.ndarray) -> np.ndarray:
        """[layers, 2], within 0..1 as far as the score is; what is known less is never narrower."""
        known, new = np.array(self.known.span), np.array(self.new.span)
        new = np.array([np.fmin(new[0], known[0]), np.fmax(new[1], known[1])]) if self.new.pairs else new
        return _within(scores, np.where(prior[:, None], known, new))

    def _parts(
        self, group: Group, values: np.ndarray, mixing: Mixing | None, found: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The columns of `Ranker.explain`, [layers] each, in the order of the caller's table."""
        base = self.strength * self.base.parts(values, [slice(0, len(group))])
        columns = {f"base_{name}": base[:, list(index)].sum(axis=1) for name, index in _PARTS.items()}
        trees = explain_trees(self.trees, values[:, columns_of(self.features)])
        columns |= {name: trees[:, column] for column, name in enumerate(self.features)}
        slopes = self._slopes(has_prior(values)) * (1.0 if mixing is None else mixing.ranker)
        parts = {name: _centred(slopes * part) for name, part in columns.items()}
        if mixing is not None:
            parts = {"probe": _centred(mixing.probe * found), **parts}
        order = np.argsort(group.rows)
        return {name: part[order] for name, part in parts.items()}


_PARTS = {
    "layer_prior": [FEATURES.index(LAYER_PRIOR)],
    "kind_prior": [FEATURES.index(KIND_PRIOR)],
    "structure": [FEATURES.index(name) for name in STRUCTURE],
    "weights": [column for column, name in enumerate(FEATURES) if is_of_weights(name)],
    "metrics": [
        column
        for column, name in enumerate(FEATURES)
        if name not in (LAYER_PRIOR, KIND_PRIOR, *STRUCTURE) and not is_of_weights(name)
    ],
}


def _within(scores: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """[layers, 2]: the ends, within 0..1 as far as the score is."""
    low = np.maximum(scores + spans[:, 0], np.minimum(scores, 0.0))
    high = np.minimum(scores + spans[:, 1], np.maximum(scores, 1.0))
    return np.column_stack([low, high])


def _centred(values: np.ndarray) -> np.ndarray:
    return values - values.mean()
