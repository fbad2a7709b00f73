"""How far the ranking of layers moves while a run goes on. SciPy is imported by the function. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from zest_fast.foundation.text_table import printable
from zest_fast.ranking.ranking import Ranking, Scorer, rank
from zest_fast.watching.watched_step import WatchedStep

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class RankingDrift:
    """Each logged step's ranking beside the first one and the one before; what `WatchLog.drift` returns.

    Two rankings are compared over the layers that both have a score for, without the head. A step that overflowed, or
    whose scores are all NaN or all the same, has no ranking: it is NaN, and no other step is compared with it.

    Attributes:
        by: the metric or the Ranker.
        top: how many layers the overlap is of.
        steps: int64 [steps].
        tau_to_first: Kendall's tau-b, 1 for the same order, -1 for the reverse one; NaN for less than two layers.
        tau_to_previous: the same to the last step before that has a ranking.
        overlap_with_first: share of the first ranking's best layers that are among this one's.
        overlap_with_previous: the same with the ranking before.
    """

    by: str
    top: int
    steps: np.ndarray
    tau_to_first: np.ndarray
    tau_to_previous: np.ndarray
    overlap_with_first: np.ndarray
    overlap_with_previous: np.ndarray

    def to_pandas(self) -> pandas.DataFrame:
        """A row for each step (the index)."""
        import pandas

        names = ("tau_to_first", "tau_to_previous", "overlap_with_first", "overlap_with_previous")
        return pandas.DataFrame(
            {name: getattr(self, name) for name in names}, index=pandas.Index(self.steps, name="step")
        )

    def __str__(self) -> str:
        ranked = np.flatnonzero(~np.isnan(self.overlap_with_first))
        if len(ranked) < 2:
            return f"ranking by {printable(self.by)}: fewer than two steps to compare"
        first, last = ranked[0], ranked[-1]
        kept = round(float(self.overlap_with_first[last]) * self.top)
        return (
            f"ranking by {printable(self.by)} at step {self.steps[last]}: tau {self.tau_to_first[last]:.2f} to step "
            f"{self.steps[first]}, {self.tau_to_previous[last]:.2f} to the one before; {kept} of its top {self.top} "
            "are still there"
        )


def ranking_drift(steps: Iterable[WatchedStep], by: str | Scorer | None, top: int) -> RankingDrift:
    """Raises ValueError as `rank`, and for `top` below 1."""
    if top < 1:
        raise ValueError(f"top must be at least 1, not {top}")
    numbers: list[int] = []
    rows: list[list[float]] = []
    first: dict[str, float] = {}
    before: dict[str, float] = {}
    name, most = str(by), top
    for step in steps:
        name, scores = _ranked(step, by)
        numbers.append(step.step)
        if not scores:
            rows.append([np.nan] * 4)
            continue
        if not first:
            first = before = scores
            most = min(top, len(first))
        taus = [_tau(one, scores) for one in (first, before)]
        rows.append([*taus, *(_overlap(one, scores, most) for one in (first, before))])
        before = scores
    columns = np.array(rows, dtype=np.float64).reshape(len(rows), 4).T
    return RankingDrift(name, most, np.array(numbers, dtype=np.int64), *columns)


def latest_drift(steps: Sequence[WatchedStep], by: str | Scorer | None, top: int) -> RankingDrift:
    """The same of the first step that has a ranking and the last two, which is what `str` shows of it."""
    places = [next((place for place in range(len(steps)) if _has_ranking(steps[place], by)), None)]
    for place in reversed(range(len(steps))):
        if len(places) == 3:
            break
        if _has_ranking(steps[place], by):
            places.append(place)
    chosen = sorted({place for place in places if place is not None})
    return ranking_drift([steps[place] for place in chosen], by, top)


def _has_ranking(step: WatchedStep, by: str | Scorer | None) -> bool:
    return bool(_ranked(step, by)[1])


def _ranked(step: WatchedStep, by: str | Scorer | None) -> tuple[str, dict[str, float]]:
    """By what, and the scores; none where the step has no ranking."""
    ranking = rank(step.profile, by)
    scores = {} if step.overflow else _scores(ranking)
    several = len(set(scores.values())) > 1 or len(scores) == 1
    return ranking.by, scores if several else {}


def _scores(ranking: Ranking) -> dict[str, float]:
    """Of the layers beside the head that have one, best first."""
    pairs = zip(ranking.names, ranking.scores.tolist(), strict=True)
    heads = set(ranking.heads)
    return {name: score for name, score in pairs if name not in heads and not np.isnan(score)}


def _tau(one: dict[str, float], other: dict[str, float]) -> float:
    from scipy.stats import kendalltau

    common = [name for name in one if name in other]
    if len(common) < 2:
        return float("nan")
    return float(kendalltau([one[name] for name in common], [other[name] for name in common]).statistic)


def _overlap(one: dict[str, float], other: dict[str, float], top: int) -> float:
    best = list(one)[:top]
    return len({*best} & {*list(other)[:top]}) / len(best)
