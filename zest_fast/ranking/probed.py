"""What a probe found: how much a few steps on each layer alone gained. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from zest_fast.foundation.nearest import some
from zest_fast.foundation.text_table import number, shorten, text_table
from zest_fast.profiling.layer_profile import LayerProfile
from zest_fast.ranking.features import positions

if TYPE_CHECKING:
    import pandas


PROBED = "probe_score"
"""The column that records may have: the score that a probe gave a layer, in all rows of it."""


_LEAST_SHARE = 0.05


@dataclass(frozen=True, eq=False)
class Probe:
    """Gains of layers that were each trained alone for a few steps, measured on samples that they did not train on.

    Args:
        names: the layers.
        scores: float64 [layers], -1/2 to 1/2: where each layer stands among the others, as far as its gains can be told
            from noise (see `evidence`). This is what ranks.
        gains: float64 [layers], loss of the head trained alone minus loss with the layer, at the learning rate that
            gained most; NaN where no loss was finite.
        errors: float64 [layers], standard errors of the gains over the scored samples (and over rounds, where there are
            several). Luck of the few training samples is not in them.
        rounds: int [layers], how often each layer was trained.
        start: loss before anything was trained.
        head: loss after the head was trained alone; `start` where there is no head to train.
        cost: share of a sweep by the default recipe that it took.
        by_rate: learning rate, as a share of RMS(W) -> gains and their errors at this rate, float64 [2, layers].
        settings: how it was measured.
        notes: what should be known of it, in sentences.

    Examples:
        >>> import numpy as np, zest_fast
        >>> gains, errors = np.array([0.1, 0.3]), np.array([0.02, 0.02])
        >>> scores = np.array([-0.25, 0.25])
        >>> found = zest_fast.Probe(("a", "b"), scores, gains, errors, np.array([1, 1]), start=1.0, head=0.9)
        >>> found.top(1)
        ('b',)
    """

    names: tuple[str, ...]
    scores: np.ndarray
    gains: np.ndarray
    errors: np.ndarray
    rounds: np.ndarray
    start: float
    head: float
    cost: float = float("nan")
    by_rate: Mapping[float, np.ndarray] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def top(self, n: int) -> tuple[str, ...]:
        """The `n` layers with the largest scores, best first.

        Args:
            n: how many.

        Raises:
            ValueError: `n` below 1, or more than there are layers with a gain.
        """
        order = [row for row in np.argsort(-self.scores, kind="stable") if np.isfinite(self.gains[row])]
        if not 1 <= n <= len(order):
            raise ValueError(f"n={n}, but {len(order)} of the {len(self.names)} probed layers have a gain")
        return tuple(self.names[row] for row in order[:n])

    def of(self, names: tuple[str, ...], heads: frozenset[str] = frozenset()) -> np.ndarray:
        """Scores in the order of `names`, float64 [names]; NaN for `heads`.

        Args:
            names: layers.
            heads: those of them that no probe trains alone.

        Raises:
            ValueError: a layer that was not probed, or a probed one that is not among `names`.
        """
        rows = {name: row for row, name in enumerate(self.names)}
        missing = [name for name in names if name not in rows and name not in heads]
        unknown = sorted(set(self.names).difference(names))
        if missing or unknown:
            what = f"has nothing of {some(missing)}" if missing else f"is of layers that are not there: {some(unknown)}"
            raise ValueError(f"the probe {what}; probe the model that was profiled, and the same layers of it")
        return np.array([self.scores[rows[name]] if name in rows else np.nan for name in names])

    def predict(self, profile: LayerProfile) -> np.ndarray:
        """The scores, in the order of `profile.names`: `rank(profile, by=probe)` ranks by the probe alone.

        Args:
            profile: of the same layers.

        Raises:
            ValueError: where the layers are others.
        """
        return self.of(tuple(profile.names), heads_of(profile))

    def to_pandas(self) -> pandas.DataFrame:
        """Columns score, gain, error and rounds; the index, named "layer", in the order of `names`."""
        import pandas

        columns = {"score": self.scores, "gain": self.gains, "error": self.errors, "rounds": self.rounds}
        return pandas.DataFrame(columns, index=pandas.Index(self.names, name="layer"))

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        losses = f"loss {number(self.start)} at the start, {number(self.head)} with the head alone"
        head = f"Probe of {len(self)} layers: {losses}"
        head += f", for {self.cost:.1%} of a sweep" if np.isfinite(self.cost) else ""
        order = np.argsort(-self.scores, kind="stable")[:10]
        rows = [
            [str(i + 1), shorten(self.names[row]), number(float(self.gains[row])), number(float(self.errors[row]))]
            for i, row in enumerate(order)
        ]
        table = text_table(["", "layer", "gain", "± 1 SE"], rows, left=2)
        rest = f"\n… and {len(self) - len(order)} more" if len(self) > len(order) else ""
        return "\n".join([head, *self.notes, table]) + rest


def evidence(gains: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """What gains at several learning rates say of the order of the layers, float64 [layers], -1/2 to 1/2.

    At each rate: where a layer stands among the others, minus 1/2, times the share of the variance of the gains that is
    no noise, 1 - median squared error / variance. There a loss counts as no gain: steps that break layers order them by
    how they break. The share is at least 0.05, so that equal scores stand for equal gains alone. The mean over the rates.

    Args:
        gains: [rates, layers]; NaN where the loss was not finite: these stand last.
        errors: their standard errors; NaN where they are not known, which counts as 0.
    """
    total = np.zeros(gains.shape[1])
    for own, noise in zip(gains, errors, strict=True):
        finite = np.isfinite(own)
        if finite.sum() < 2:
            continue
        variance = np.maximum(own[finite], 0.0).var()
        known = noise[finite & np.isfinite(noise)]
        squared = float(np.median(known**2)) if len(known) else 0.0
        share = max(_LEAST_SHARE, 1 - squared / variance) if variance > 0 else _LEAST_SHARE
        places = positions(np.where(finite, own, own[finite].min() - 1.0)[:, None])[:, 0]
        total += share * (places - 0.5)
    return total / len(gains)


def heads_of(profile: LayerProfile) -> frozenset[str]:
    """The rows that are the head."""
    return frozenset(name for name in profile.names if profile.info[name].get("head"))
