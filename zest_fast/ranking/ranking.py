"""Layers in the order in which they are worth fine-tuning. NumPy only."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from zest_fast.foundation.nearest import nearest
from zest_fast.foundation.text_table import number, printable, shorten, text_table
from zest_fast.profiling.layer_profile import LayerProfile
from zest_fast.ranking.assessment import Assessment
from zest_fast.ranking.probed import Probe
from zest_fast.ranking.shipped import shipped_ranker

if TYPE_CHECKING:
    import pandas


@runtime_checkable
class Scorer(Protocol):
    """What can score the layers of a profile, such as a Ranker."""

    def predict(self, profile: LayerProfile) -> np.ndarray:
        """Scores, float64 [layers], in the order of `profile.names`; larger is better."""


def rank(profile: LayerProfile, by: str | Scorer | None = None, *, probe: Probe | None = None) -> Ranking:
    """Order the layers of `profile`, best first.

    Args:
        profile: of the model and a batch of the task.
        by: the name of a metric of the profile (larger is better), a Ranker or another object with `.predict(profile)`
            that returns a score for each row, or None = the Ranker that ships.
        probe: what `zest_fast.probe` found of the same layers: a Ranker mixes it with what it knows, by weights that it
            learned where both were held out. `by=probe` ranks by the probe alone.

    Returns:
        A Ranking, whose `.top(n)` SelectiveBackward takes.

    Raises:
        ValueError: a metric that the profile does not hold, or scores of another shape; a probe of other layers, or
            beside something else than a Ranker.
        TypeError: no LayerProfile, no Probe, or nothing that can score a profile.
        NotImplementedError: by=None where no Ranker ships.

    Examples:
        >>> import torch, zest_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> profile = zest_fast.profile(model, (torch.randn(6, 4), torch.randint(3, (6,))))
        >>> ranking = zest_fast.rank(profile, by="snip")
        >>> sorted(ranking.top(2))
        ['0', '2']
    """
    if not isinstance(profile, LayerProfile):
        raise TypeError(f"profile must be a LayerProfile, not {type(profile).__name__}")
    if probe is not None and not isinstance(probe, Probe):
        raise TypeError(f"probe must be what zest_fast.probe returns, not {type(probe).__name__}")
    if probe is not None and by is not None and not hasattr(by, "assess"):
        raise ValueError("probe= is for a Ranker, which mixes it in; to rank by the probe alone pass by=probe")
    if isinstance(by, str):
        if by not in profile.metrics:
            raise ValueError(f"by={by!r} is no metric of this profile; {nearest(by, profile.metrics)}")
        return Ranking(profile, profile.column(by), by=by)
    if by is None:
        by = shipped_ranker(f"pass by= with a metric of the profile: {', '.join(profile.metrics)}")
    if not isinstance(by, Scorer):
        raise TypeError(f"by must be a metric name or have .predict(profile), not {type(by).__name__}")
    name = type(by).__name__
    if hasattr(by, "assess"):
        assessment = by.assess(profile) if probe is None else by.assess(profile, probe)
        return Ranking(profile, assessment.scores, by=name, assessment=assessment)
    return Ranking(profile, by.predict(profile), by=name)


class Ranking:
    """Layers, best first: largest score first, NaN last, equal scores by depth.

    Args:
        profile: whose rows are ranked.
        scores: float [layers], in the order of `profile.names`.
        by: the metric or the Ranker that gave the scores.
        assessment: what a Ranker says beyond the scores, in the same order.

    Attributes:
        names: every row of the profile, the head included.
        scores: float64 [layers] in the order of `names`.
        intervals: float64 [layers, 2], the lower and the upper end of each score (80 %, of a Ranker); NaN where nothing
            estimates them, as for a single metric of one batch.
        by: as above.

    Raises:
        ValueError: scores of another shape.

    Examples:
        >>> import torch, zest_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> profile = zest_fast.profile(model, (torch.randn(6, 4), torch.randint(3, (6,))))
        >>> ranking = zest_fast.Ranking(profile, profile.column("fisher"), by="my score")
        >>> ranking.heads
        ('4',)
        >>> ranking.explain()["rank"].tolist()
        [1, 2, 3]
    """

    def __init__(
        self, profile: LayerProfile, scores: np.ndarray, *, by: str, assessment: Assessment | None = None
    ) -> None:
        scores = np.asarray(scores, dtype=np.float64)
        if scores.shape != (len(profile),):
            raise ValueError(
                f"by={by}: scores must have shape [{len(profile)}], a score a layer, not {list(scores.shape)}"
            )
        depths = [profile.info[name].get("depth", row) for row, name in enumerate(profile.names)]
        order = np.lexsort((depths, -scores, np.isnan(scores)))  # the last key decides first
        self.by = by
        self.names = [profile.names[row] for row in order]
        self.scores = scores[order]
        self.intervals = np.full((len(order), 2), np.nan) if assessment is None else assessment.intervals[order]
        self._assessment = assessment
        self._info = [profile.info[name] for name in self.names]
        for array in (self.scores, self.intervals):
            array.setflags(write=False)

    def top(self, n: int) -> tuple[str, ...]:
        """The best layers. The head is never among them: it is tuned anyway.

        Args:
            n: how many.

        Returns:
            Their names, best first.

        Raises:
            ValueError: `n` below 1, or fewer layers with a score (a NaN is no score).
        """
        n = operator.index(n)
        candidates = [(name, score) for name, score, info in self._rows() if not info.get("head")]
        scored = [name for name, score in candidates if not np.isnan(score)]
        if n < 1:
            raise ValueError(f"n must be at least 1, not {n}")
        if n > len(candidates):
            raise ValueError(f"n={n}, but there are only {len(candidates)} layers beside the head")
        if n > len(scored):
            unscored = [name for name, score in candidates if np.isnan(score)]
            raise ValueError(
                f"n={n}, but {self.by} is NaN for {len(unscored)} of the {len(candidates)} layers (such as "
                f"{unscored[0]!r}; profile.info says why): ask for at most {len(scored)}, or rank by another metric"
            )
        return tuple(scored[:n])

    @property
    def heads(self) -> tuple[str, ...]:
        """The rows that are the head, which `top` leaves out."""
        return tuple(name for name, _, info in self._rows() if info.get("head"))

    def explain(self) -> pandas.DataFrame:
        """Where each layer stands, in the order of `names` (the index, named "layer").

        rank: 1 = best. percentile: how many of the other scored layers it beats, in percent (half of a tie). z_score:
        distance from the mean score in standard deviations. depth, kind, numel and head: as in the profile.
        Of a Ranker also low and high, the interval, and what each part of the base (base_...) and each feature adds to
        the score (see Ranker.explain); features that add nothing to any layer are left out.
        """
        import pandas

        defined = self.scores[np.isfinite(self.scores)]
        deviation = defined.std() if len(defined) else np.nan
        with np.errstate(invalid="ignore", divide="ignore"):  # equal scores: 0 / 0, there is no distance to speak of
            z_scores = (self.scores - defined.mean()) / deviation if len(defined) else np.full(len(self), np.nan)
        columns: dict[str, object] = {
            "score": self.scores,
            "rank": np.arange(1, len(self) + 1),
            "percentile": _percentiles(self.scores),
            "z_score": z_scores,
        }
        for key in ("depth", "kind", "numel", "head"):
            columns[key] = [info.get(key) for info in self._info]
        frame = pandas.DataFrame(columns, index=pandas.Index(self.names, name="layer"))
        if self._assessment is None:
            return frame
        frame["low"], frame["high"] = self.intervals.T
        added = self._assessment.explain()
        return frame.join(added.loc[:, (added != 0).any()])

    @property
    def is_new(self) -> bool:
        """Whether a Ranker ranked, and has not seen the architecture."""
        return self._assessment is not None and self._assessment.known.model is None

    @property
    def note(self) -> str:
        """Of a Ranker whether it knows the architecture, and how sure it is; "" of anything else."""
        return "" if self._assessment is None else self._assessment.note

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __repr__(self) -> str:
        head = f"Ranking of {len(self)} layers by {printable(self.by)}"
        missing = sum(np.isnan(score) and not info.get("head") for _, score, info in self._rows())
        head += f", {missing} of them without a score" if missing else ""
        head += f": {self.note}" if self.note else ""
        if not self.names:
            return head
        header = ["", "layer", "kind", "score", *(["low", "high"] if self.note else [])]
        shown = list(self._rows())[:10]
        rows = [self._cells(place, *row)[: len(header)] for place, row in enumerate(shown)]
        rest = f"\n… and {len(self) - len(shown)} more" if len(self) > len(shown) else ""
        return f"{head}\n{text_table(header, rows, left=3)}{rest}"

    def _cells(self, place: int, name: str, score: float, info: dict[str, Any]) -> list[str]:
        label = shorten(name) + (" (head)" if info.get("head") else "")
        ends = [number(end) for end in self.intervals[place].tolist()]
        return [str(place + 1), label, str(info.get("kind", "")), number(score), *ends]

    def _rows(self) -> Iterator[tuple[str, float, dict[str, Any]]]:
        return zip(self.names, self.scores.tolist(), self._info, strict=True)


def _percentiles(scores: np.ndarray) -> np.ndarray:
    """[layers] -> percent of the other defined scores that each one beats, a tie counting half; NaN stays NaN."""
    defined = np.sort(scores[~np.isnan(scores)])
    below, upto = np.searchsorted(defined, scores, "left"), np.searchsorted(defined, scores, "right")
    beaten = (below + upto - 1) / 2
    return np.where(np.isnan(scores), np.nan, 100 * beaten / max(1, len(defined) - 1))
