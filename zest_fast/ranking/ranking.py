"""Layers in the order in which they are worth fine-tuning. NumPy only."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, overload, runtime_checkable

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
        >>> ranking[0] == ranking.names[0] and len(ranking[:2]) == 2
        True
        >>> ranking.save("ranking.json").name
        'ranking.json'
        >>> zest_fast.Ranking.load("ranking.json").names == ranking.names
        True
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

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[str, ...]: ...
    def __getitem__(self, place: int | slice) -> str | tuple[str, ...]:
        """Names by place, best first, as `names` has them: `ranking[0]`, `ranking[:3]`. The head has a place, too;
        `top` leaves it out."""
        return tuple(self.names[place]) if isinstance(place, slice) else self.names[operator.index(place)]

    def to_pandas(self) -> pandas.DataFrame:
        """A row for each layer (the index, named "layer"), best first: rank, score, low and high (the interval, NaN
        where nothing estimates it), depth, kind, numel and head. `explain` says why."""
        import pandas

        low, high = self.intervals.T
        columns = {"rank": np.arange(1, len(self) + 1), "score": self.scores, "low": low, "high": high}
        return pandas.DataFrame(columns | self._of_the_model(), index=pandas.Index(self.names, name="layer"))

    def _of_the_model(self) -> dict[str, Any]:
        return {key: [info.get(key) for info in self._info] for key in ("depth", "kind", "numel", "head")}

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
        frame = pandas.DataFrame(columns | self._of_the_model(), index=pandas.Index(self.names, name="layer"))
        if self._assessment is None:
            return frame
        frame["low"], frame["high"] = self.intervals.T
        added = self._assessment.explain()
        return frame.join(added.loc[:, (added != 0).any()])

    def reasons(self, most: int = 3) -> dict[str, list[tuple[str, float]]]:
        """What moves each layer's score most, of a Ranker.

        Args:
            most: how many parts of a layer.

        Returns:
            Layer -> (part, what it adds to the score), the largest effects first, by the columns of `explain`. Empty
            for a single metric, and without the head, which has no score.

        Raises:
            ValueError: `most` below 1.
        """
        if most < 1:
            raise ValueError(f"most must be at least 1, not {most}")
        if self._assessment is None:
            return {}
        parts = self._assessment.parts()
        found = {}
        for row, name in enumerate(self._assessment.layers):
            added = [(part, float(values[row])) for part, values in parts.items() if values[row]]
            found[name] = sorted(added, key=lambda one: -abs(one[1]))[:most]
        return found

    def plain(self) -> dict[str, Any]:
        """As strict JSON, the form in which a delta carries it: by, names, scores (null for none); of a Ranker note,
        intervals and reasons, too."""
        document: dict[str, Any] = {"by": self.by, "names": list(self.names), "scores": _or_none(self.scores)}
        if self.note:
            intervals = [_or_none(ends) for ends in self.intervals]
            document |= {"note": self.note, "intervals": intervals, "reasons": self.reasons()}
        return document

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the ranking whole or not at all, with intervals, note and explanation; exact to the bit.

        Args:
            path: a .json file.

        Returns:
            The path.

        Raises:
            ValueError: another ending, or info that JSON cannot hold.
        """
        from zest_fast.ranking.ranking_files import save_ranking

        return save_ranking(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ranking:
        """Read what `save` wrote.

        Args:
            path: the file.

        Returns:
            The ranking.

        Raises:
            ValueError: it is torn, foreign or of a newer format; the message names it.
        """
        from zest_fast.ranking.ranking_files import load_ranking

        return load_ranking(path)

    def plot(self, path: str | os.PathLike[str], n: int = 20) -> Path:
        """Draw the scores of the best layers, with their intervals. Needs `pip install 'zest_fast[plot]'`.

        Args:
            path: ending in .png, .svg or .pdf.
            n: how many layers at most; the head and layers without a score are left out.

        Returns:
            The path.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: another ending, `n` below 1, or no layer that has a score.
        """
        from zest_fast.profiling.heat_map import save_figure
        from zest_fast.ranking.picture import ranking_chart

        return save_figure(ranking_chart(self, n), path)

    @property
    def assessment(self) -> Assessment | None:
        """All that a Ranker said; None of a metric or another scorer."""
        return self._assessment

    @property
    def info(self) -> list[dict[str, Any]]:
        """What the profile says of each layer beside its metrics, in the order of `names`."""
        return [dict(info) for info in self._info]

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
        if not self.names:
            return self._title()
        header, rows, rest = self._shown()
        return f"{self._title()}\n{text_table(header, rows, left=3)}" + (f"\n{rest}" if rest else "")

    def _repr_html_(self) -> str:
        """For notebooks: the table of `repr`, and the scores as a chart where matplotlib is installed."""
        from zest_fast.foundation.html_parts import html_table, inline_image, paragraph
        from zest_fast.profiling.heat_map import can_draw
        from zest_fast.ranking.picture import drawable, ranking_chart

        if not self.names:
            return paragraph(self._title())
        header, rows, rest = self._shown()
        parts = [html_table(header, rows, left=3, caption=self._title(), name=1), paragraph(rest) if rest else ""]
        if can_draw() and drawable(self):
            alt = "Scores of the best layers, best at the top" + (", with 80 % intervals" if self.note else "")
            parts.append(inline_image(ranking_chart(self), alt))
        return "".join(parts)

    def _title(self) -> str:
        head = f"Ranking of {len(self)} layers by {printable(self.by)}"
        missing = sum(np.isnan(score) and not info.get("head") for _, score, info in self._rows())
        head += f", {missing} of them without a score" if missing else ""
        return head + (f": {self.note}" if self.note else "")

    def _shown(self) -> tuple[list[str], list[list[str]], str]:
        """Header and rows of a table that fits on a screen, and what is left out of it."""
        header = ["", "layer", "kind", "score", *(["low", "high"] if self.note else [])]
        shown = list(self._rows())[:10]
        rows = [self._cells(place, *row)[: len(header)] for place, row in enumerate(shown)]
        return header, rows, f"… and {len(self) - len(shown)} more" if len(self) > len(shown) else ""

    def _cells(self, place: int, name: str, score: float, info: dict[str, Any]) -> list[str]:
        label = shorten(name) + (" (head)" if info.get("head") else "")
        ends = [number(end) for end in self.intervals[place].tolist()]
        return [str(place + 1), label, str(info.get("kind", "")), number(score), *ends]

    def _rows(self) -> Iterator[tuple[str, float, dict[str, Any]]]:
        return zip(self.names, self.scores.tolist(), self._info, strict=True)


def _or_none(values: np.ndarray) -> list[float | None]:
    """For JSON, which knows neither NaN nor infinity."""
    return [value if np.isfinite(value) else None for value in values.tolist()]


def _percentiles(scores: np.ndarray) -> np.ndarray:
    """[layers] -> percent of the other defined scores that each one beats, a tie counting half; NaN stays NaN."""
    defined = np.sort(scores[~np.isnan(scores)])
    below, upto = np.searchsorted(defined, scores, "left"), np.searchsorted(defined, scores, "right")
    beaten = (below + upto - 1) / 2
    return np.where(np.isnan(scores), np.nan, 100 * beaten / max(1, len(defined) - 1))
