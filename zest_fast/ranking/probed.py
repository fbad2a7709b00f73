"""What a probe found: how much a few steps on each layer alone gained. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from zest_fast.foundation.nearest import some
from zest_fast.foundation.text_table import number, shorten, text_table
from zest_fast.profiling.layer_profile import LayerProfile

if TYPE_CHECKING:
    import pandas


PROBED = ("probe_gain", "probe_error")
"""Columns that records may have: the gain and its standard error that a probe found, for all rows of a layer."""


@dataclass(frozen=True, eq=False)
class Probe:
    """Gains of layers that were each trained alone for a few steps, measured on samples that they did not train on.

    Args:
        names: the layers.
        gains: float64 [layers], loss of the head trained alone minus loss with the layer; the larger the better, NaN
            where the loss was not finite.
        errors: float64 [layers], standard errors of the gains over the scored samples (and over rounds, where there are
            several). Luck of the few training samples is not in them.
        rounds: int [layers], how often each layer was trained.
        start: loss before anything was trained.
        head: loss after the head was trained alone; `start` where there is no head to train.
        cost: share of a sweep by the default recipe that it took.
        settings: how it was measured.
        notes: what should be known of it, in sentences.

    Examples:
        >>> import numpy as np, zest_fast
        >>> gains, errors = np.array([0.1, 0.3]), np.array([0.02, 0.02])
        >>> found = zest_fast.Probe(("a", "b"), gains, errors, np.array([1, 1]), start=1.0, head=0.9)
        >>> found.top(1)
        ('b',)
    """

    names: tuple[str, ...]
    gains: np.ndarray
    errors: np.ndarray
    rounds: np.ndarray
    start: float
    head: float
    cost: float = float("nan")
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def top(self, n: int) -> tuple[str, ...]:
        """The `n` layers with the largest gains, best first.

        Args:
            n: how many.

        Raises:
            ValueError: `n` below 1, or more than there are layers with a gain.
        """
        order = [row for row in np.argsort(-self.gains, kind="stable") if np.isfinite(self.gains[row])]
        if not 1 <= n <= len(order):
            raise ValueError(f"n={n}, but {len(order)} of the {len(self.names)} probed layers have a gain")
        return tuple(self.names[row] for row in order[:n])

    def of(self, names: tuple[str, ...], heads: frozenset[str] = frozenset()) -> tuple[np.ndarray, np.ndarray]:
        """Gains and standard errors in the order of `names`, float64 [names] each; NaN for `heads`.

        Args:
            names: layers.
            heads: those of them that no probe trains alone.

        Raises:
            ValueError: a layer that was not probed, or a probed one that is not among `names`.
        """
        missing = [name for name in names if name not in self._rows and name not in heads]
        unknown = [name for name in self.names if name not in set(names)]
        if missing or unknown:
            what = f"has nothing of {some(missing)}" if missing else f"is of layers that are not there: {some(unknown)}"
            raise ValueError(f"the probe {what}; probe the model that was profiled, and the same layers of it")
        rows = np.array([self._rows.get(name, -1) for name in names])
        return tuple(np.where(rows >= 0, values[rows], np.nan) for values in (self.gains, self.errors))  # type: ignore[return-value]

    def predict(self, profile: LayerProfile) -> np.ndarray:
        """The gains, in the order of `profile.names`: `rank(profile, by=probe)` ranks by the probe alone.

        Args:
            profile: of the same layers.

        Raises:
            ValueError: where the layers are others.
        """
        return self.of(tuple(profile.names), heads_of(profile))[0]

    def to_pandas(self) -> pandas.DataFrame:
        """Columns gain, error and rounds; the index, named "layer", in the order of `names`."""
        import pandas

        columns = {"gain": self.gains, "error": self.errors, "rounds": self.rounds}
        return pandas.DataFrame(columns, index=pandas.Index(self.names, name="layer"))

    @property
    def _rows(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        losses = f"loss {number(self.start)} at the start, {number(self.head)} with the head alone"
        head = f"Probe of {len(self)} layers: {losses}"
        head += f", for {self.cost:.1%} of a sweep" if np.isfinite(self.cost) else ""
        order = np.argsort(-np.nan_to_num(self.gains, nan=-np.inf), kind="stable")[:10]
        rows = [
            [str(i + 1), shorten(self.names[row]), number(float(self.gains[row])), number(float(self.errors[row]))]
            for i, row in enumerate(order)
        ]
        table = text_table(["", "layer", "gain", "± 1 SE"], rows, left=2)
        rest = f"\n… and {len(self) - len(order)} more" if len(self) > len(order) else ""
        return "\n".join([head, *self.notes, table]) + rest


def heads_of(profile: LayerProfile) -> frozenset[str]:
    """The rows that are the head."""
    return frozenset(name for name in profile.names if profile.info[name].get("head"))
