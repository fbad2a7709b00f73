"""The picture of a ranking: a dot for the score of each of the best layers, best at the top, with its interval."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from zest_fast.foundation.text_table import printable, shorten
from zest_fast.profiling.heat_map import ACCENT, GREY, INK, figure_class

if TYPE_CHECKING:
    from zest_fast.ranking.ranking import Ranking

_ROW, _WIDTH = 0.24, 7.0  # inches of a layer and of the picture


def drawable(ranking: Ranking) -> list[int]:
    """The places of the layers that have a score which can be drawn, but for the head."""
    scored = zip(ranking.names, ranking.scores.tolist(), strict=True)
    heads = set(ranking.heads)
    return [place for place, (name, score) in enumerate(scored) if math.isfinite(score) and name not in heads]


def ranking_chart(ranking: Ranking, n: int = 20) -> Any:
    """The figure, of matplotlib. Raises ValueError for n below 1 and where no layer has a score."""
    n = operator.index(n)
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    places = drawable(ranking)[:n]
    if not places:
        raise ValueError(f"there is nothing to plot: no layer has a score by {ranking.by}")
    names = [ranking.names[place] for place in places]
    label = "score, with its 80 % interval" if ranking.note else ranking.by
    return scores_chart(names, ranking.scores[places], ranking.intervals[places], label)


def scores_chart(names: Sequence[str], scores: np.ndarray, intervals: np.ndarray, label: str) -> Any:
    """The same of finite scores [n] and intervals [n, 2], NaN for none."""
    rows = np.arange(len(names))
    below, above = np.abs(intervals.T - scores)
    figure = figure_class()(figsize=(_WIDTH, len(names) * _ROW + 0.8), layout="constrained")
    axes = figure.subplots()
    if np.isfinite([below, above]).all():
        axes.errorbar(scores, rows, xerr=[below, above], fmt="none", ecolor=GREY, elinewidth=1.2, capsize=2)
    axes.plot(scores, rows, "o", color=ACCENT, markersize=5)
    labels = [shorten(printable(name)) for name in names]
    axes.set_yticks(rows, labels, fontsize=8, color=INK, parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(label, fontsize=8, color=INK, parse_math=False)
    axes.tick_params(labelsize=8, labelcolor=INK, length=0)
    axes.grid(axis="x", color=GREY, alpha=0.25, linewidth=0.6)
    axes.spines[:].set_visible(False)
    return figure
