"""What a Ranker says of a profile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from zest_fast.foundation.nearest import some
from zest_fast.foundation.text_table import printable

if TYPE_CHECKING:
    import pandas


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
    explain: Callable[[], pandas.DataFrame]
    """Contributions of the features, computed when called."""
    partly: tuple[str, int, int] | None = None
    """Of an architecture of which too few layers were swept: its name, how many were, and how many there are."""
    ignored: tuple[str, ...] = ()
    """Metrics of the profile that no Ranker knows."""
    probed: float | None = None
    """The share of a probe in the scores, beside the rest of the Ranker; None without one."""
    unmeasured: int = 0
    """Layers of which no metric is a number: their scores come from what they are, not from this batch."""

    @property
    def note(self) -> str:
        """One line: whether the architecture is known, or how much of it, and how sure the scores are."""
        if self.known.model is not None:
            text = f"knows {printable(self.known.model)} ({self.known.share:.0%} of the layers)"
            test = "on other data"
        else:
            text, test = "has not seen this architecture", "on other architectures"
        if self.partly is not None:
            name, swept, layers = self.partly
            seen = f"{swept} of the {layers} layers of {printable(name)} ({self.known.share:.0%})"
            text = f"has seen {seen}, and ranks it as new"
        if self.probed is not None:
            text += f", probed (the probe weighs {self.probed:.0%})"
        if np.isfinite(self.expected_tau):
            text += f", held-out tau {self.expected_tau:.2f} {test}"
        widths = self.intervals[:, 1] - self.intervals[:, 0]
        defined = widths[np.isfinite(widths)]
        text += f", 80% intervals {np.median(defined):.2f} wide" if len(defined) else ""
        unread = f"{self.unmeasured} layer{'s' if self.unmeasured > 1 else ''} without any metric"
        text += f", {unread}: placed by what is known of such layers alone" if self.unmeasured else ""
        return text + (f", does not read {some(map(repr, self.ignored))}" if self.ignored else "")
