"""What the errors of a Ranker were where layers were held out. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Errors:
    """Of layers with a layer prior, or of those without, where they were held out."""

    slope: float
    """From the raw score to a position."""
    span: tuple[float, float]
    """What is added to a score for the ends of its interval; NaN where nothing was held out."""
    tau: float
    """Kendall's tau with the gains, mean over pairs; NaN where nothing was held out."""
    pairs: int
