"""What a probe found: how much training each layer alone would gain. No torch."""

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
    """What each layer gains, trained alone in a quadratic model of the loss, on samples that it was not trained on.

    Args:
        names: the layers.
        scores: float64 [layers], -1/2 to 1/2: where each layer stands among the others, as far as its gains can be told
            from noise (see `evidence`). This is what ranks.
        gains: float64 [layers], loss before minus loss after training; NaN where gradients were not finite.
        errors: float64 [layers], standard errors of the gains over the scored samples. Luck of the samples that were
            trained on is not in them.
        rate: what the default recipe's learning rates were multiplied by.
        start: loss before any step, with the head that the probe fitted, where it did.
        cost: share of a sweep by the default recipe that it took.
        by_rate: every rate that was tried -> gains and their errors, float64 [2, layers].
        settings: how it was measured.
        notes: what should be known of it, in sentences.

    Raises:
        ValueError: arrays that are not [layers].

    Examples:
        >>> import numpy as np, zest_fast
        >>> gains, errors = np.array([0.1, 0.3]), np.array([0.02, 0.02])
        >>> scores = np.array([-0.25, 0.25])
        >>> found = zest_fast.Probe(("a", "b"), scores, gains, errors, rate=1.0, start=1.0)
        >>> found.top(1)
        ('b',)
    """

    names: tuple[str, ...]
    scores: np.ndarray
    gains: np.ndarray
    errors: np.ndarray
    rate: float
    start: float
    cost: float = float("nan")
    by_rate: Mapping[float, np.ndarray] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("scores", "gains", "errors"):
            shape = np.shape(getattr(self, name))
            if shape != (len(self.names),):
                raise ValueError(
                    f"{name} has shape {list(shape)}; an entry for each of {len(self.names)} layers is needed"
                )

    def top(self, n: int) -> tuple[str, ...]:
        """The `n` layers with the largest scores, best first.

        Args:
            n: how many.

        Returns:
            Their names.

        Raises:
            ValueError: `n` below 1, or more than there are layers with a gain.
        """
        order = [row for row in np.argsort(-self.scores, kind="stable") if np.isfinite(self.gains[row])]
        if not 1 <= n <= len(order):
            raise ValueError(f"n={n}, but {len(order)} of the {len(self.names)} probed layers have a gain")
        return tuple(self.names[row] for row in order[:n])

    def of(self, names: tuple[str, ...], heads: frozenset[str] = frozenset()) -> np.ndarray:
        """The scores of some layers.

        Args:
            names: layers.
            heads: those of them that no probe moves.

        Returns:
            float64 [names]; NaN for `heads`.

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
        """The scores of a profile's layers: `rank(profile, by=probe)` ranks by the probe alone.

        Args:
            profile: of the same layers.

        Returns:
            float64 [layers], in the order of `profile.names`; NaN for the head.

        Raises:
            ValueError: where the layers are others.
        """
        return self.of(tuple(profile.names), heads_of(profile))

    def to_pandas(self) -> pandas.DataFrame:
        """Columns score, gain and error; the index, named "layer", in the order of `names`."""
        import pandas

        columns = {"score": self.scores, "gain": self.gains, "error": self.errors}
        return pandas.DataFrame(columns, index=pandas.Index(self.names, name="layer"))

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        head = f"Probe of {len(self)} layers: loss {number(self.start)} before any step"
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
    """What gains say of the order of the layers, float64 [layers], -1/2 to 1/2.

    Where a layer stands among the others, minus 1/2, times the share of the variance of the gains that is no noise,
    1 - median squared error / variance, in which losses count as no gain. The share is at least 0.05, so that equal
    scores stand for equal gains alone.

    Args:
        gains: [layers]; NaN where no loss was finite: these stand last.
        errors: [layers], their standard errors; NaN where they are not known, which counts as 0.
    """
    finite = np.isfinite(gains)
    if finite.sum() < 2:
        return np.zeros(len(gains))
    variance = np.maximum(gains[finite], 0.0).var()
    known = errors[finite & np.isfinite(errors)]
    noise = float(np.median(known**2)) if len(known) else 0.0
    share = max(_LEAST_SHARE, 1 - noise / variance) if variance > 0 else _LEAST_SHARE
    return share * (positions(np.where(finite, gains, gains[finite].min() - 1.0)[:, None])[:, 0] - 0.5)


def heads_of(profile: LayerProfile) -> frozenset[str]:
    """The rows that are the head."""
    return frozenset(name for name in profile.names if profile.info[name].get("head"))
