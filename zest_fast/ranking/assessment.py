"""What a Ranker says of a profile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from zest_fast.foundation.nearest import some
from zest_fast.foundation.text_table import printable
from zest_fast.ranking.features import KIND_PRIOR, LAYER_PRIOR, STRUCTURE, is_of_weights

if TYPE_CHECKING:
    import pandas

_LAYER, _KIND, _BATCH, _PROBE = _SOURCES = (
    *("this layer on other data", "kind, size and weights", "this batch", "the probe"),
)


def _source(part: str) -> str:
    """Of a column of `Ranker.explain`."""
    if part == "probe":
        return _PROBE
    if part in ("base_layer_prior", LAYER_PRIOR):
        return _LAYER
    if part in ("base_kind_prior", "base_structure", "base_weights", KIND_PRIOR, *STRUCTURE):
        return _KIND
    return _KIND if is_of_weights(part) else _BATCH


class Known(NamedTuple):
    """How much of an architecture the records hold."""

    share: float
    """Of the profile's layers (the head apart), those that match a swept architecture by name and shape, 0..1."""
    model: str | None
    """The name under which it was swept; None where the profile is of no known architecture, or where so few of its
    layers were swept that it ranks as a new one."""


@dataclass(frozen=True)
class Assessment:
    """Of one profile; arrays in its row order, NaN for the head."""

    scores: np.ndarray
    intervals: np.ndarray
    known: Known
    expected_tau: float
    """Kendall's tau that the Ranker reached on held-out records of this sort; NaN where it was never tested."""
    parts: Callable[[], Mapping[str, np.ndarray]]
    """What adds up to score - 1/2, by the columns of `Ranker.explain`, computed when called; [layers] without the head,
    in row order."""
    layers: tuple[str, ...]
    """These layers."""
    partly: tuple[str, int, int] | None = None
    """Of an architecture of which too few layers were swept: its name, how many were, and how many there are."""
    ignored: tuple[str, ...] = ()
    """Metrics of the profile that no Ranker knows."""
    probed: bool = False
    """Whether a probe is mixed in."""
    unmeasured: int = 0
    """Layers of which no metric is a number: their scores come from what they are, not from this batch."""

    def explain(self) -> pandas.DataFrame:
        """The parts as a table, a row for each layer but the head."""
        import pandas

        return pandas.DataFrame(self.parts(), index=pandas.Index(self.layers, name="layer"))

    def rests_on(self) -> dict[str, float]:
        """The share of each source in how the scores differ between layers: of the sum of the variances of their parts.

        "this layer on other data" (layer prior), "kind, size and weights" (what the model alone tells), "this batch",
        and "the probe".
        """
        sums: dict[str, np.ndarray] = {}
        for name, values in self.parts().items():
            source = _source(name)
            sums[source] = sums.get(source, 0.0) + values
        variances = {source: float(np.var(sums[source])) for source in _SOURCES if source in sums}
        total = sum(variances.values())
        return {source: value / total for source, value in variances.items()} if total else {}

    @property
    def note(self) -> str:
        """One line: whether the architecture is known, or how much of it, how sure the scores are, and what they rest
        on."""
        if self.known.model is not None:
            text = f"knows {printable(self.known.model)} ({self.known.share:.0%} of the layers)"
            test = "on other data"
        else:
            text, test = "has not seen this architecture", "on other architectures"
        if self.partly is not None:
            name, swept, layers = self.partly
            seen = f"{swept} of the {layers} layers of {printable(name)} ({self.known.share:.0%})"
            text = f"has seen {seen}, and ranks it as new"
        if self.probed:
            text += ", probed"
        if np.isfinite(self.expected_tau):
            text += f", held-out tau {self.expected_tau:.2f} {test}"
        widths = self.intervals[:, 1] - self.intervals[:, 0]
        defined = widths[np.isfinite(widths)]
        text += f", 80% intervals {np.median(defined):.2f} wide" if len(defined) else ""
        shares = [f"{source} {share:.0%}" for source, share in self.rests_on().items() if share >= 0.005]
        text += f", rests on {', '.join(shares)}" if shares else ""
        unread = f"{self.unmeasured} layer{'s' if self.unmeasured > 1 else ''} without any metric"
        text += f", {unread}: placed by what is known of such layers alone" if self.unmeasured else ""
        return text + (f", does not read {some(map(repr, self.ignored))}" if self.ignored else "")
