"""What the sources say, in the form in which the page shows it, whichever file it comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zest_fast.cli.jobs.record import SCORE, thinned
from zest_fast.foundation.documents import Keys, ListOf, MapOf, Null, Number, OneOf, Text

if TYPE_CHECKING:
    from zest_fast.cli.reporting.sources import Sources
    from zest_fast.ranking.ranking import Ranking

_ANY = Number(finite=False)
_LOSS = Null(_ANY)
_NAMES = ListOf(Text(), unique=True)
_PART = ListOf(OneOf((Text(), _ANY)), least=2, most=2)
_RANKING = Keys(
    {"by": Text(), "names": _NAMES, "scores": ListOf(_LOSS)},
    {"note": Text(), "intervals": ListOf(ListOf(_LOSS, least=2, most=2)), "reasons": MapOf(ListOf(_PART))},
)
_PLAN = Keys({"peak_bytes": Number(0), "breakdown": MapOf(Number(0)), "flops": Number(0)}, others=True)
_CURVE = Keys({"steps": ListOf(Number(0, integer=True)), "losses": ListOf(_LOSS)})
_RECORD = Keys({"plan": Null(_PLAN), "before": Null(SCORE), "curve": _CURVE})


@dataclass(frozen=True)
class Row:
    """A layer of a ranking; numbers are NaN where there are none. reasons: parts of the score, the largest first."""

    name: str
    score: float
    low: float
    high: float
    info: Mapping[str, Any]
    reasons: tuple[tuple[str, float], ...]
    trains: bool


@dataclass(frozen=True)
class Ranked:
    by: str
    note: str
    rows: tuple[Row, ...]
    source: str


@dataclass(frozen=True)
class Curve:
    """losses: NaN where one was not finite. before, after: scores on the validation data, None where there are none."""

    steps: list[int]
    losses: list[float]
    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None
    source: str


@dataclass(frozen=True)
class Contents:
    """None where nothing is known. facts: (what, said). plan: with where it comes from."""

    facts: tuple[tuple[str, str], ...]
    ranked: Ranked | None
    plan: tuple[Mapping[str, Any], str] | None
    curve: Curve | None


class _Reader:
    """notes: gets what cannot be shown, and why."""

    def __init__(self, sources: Sources) -> None:
        self._sources, self.notes = sources, sources.notes
        delta, run, report = sources.delta, sources.run, sources.finetuning
        recipe = delta.recipe if delta is not None and isinstance(delta.recipe, Mapping) else {}
        self.recipe: Mapping[str, Any] = recipe
        self.record: Mapping[str, Any] = self._fitting(_RECORD, recipe.get("record"), "delta", "record of its training")
        self.layers: list[str] = []
        self.head: list[str] = []
        for found in (delta, run):
            if found is not None and not self.layers and not self.head:
                self.layers, self.head = list(found.layers), list(found.head)
        if not self.layers and report is not None:
            self.layers = list(report["layers"])
        self._look_for_strangers()

    def _look_for_strangers(self) -> None:
        """Files of different models or trainings on one page would mislead without a word."""
        profile, report, paths = self._sources.profile, self._sources.finetuning, self._sources.paths
        if profile is not None:
            known = {*profile.names, *(str(info.get("module", "")) for info in profile.info.values())}
            if strange := [name for name in self.layers if name not in known]:
                text = f"{paths['profile']} has no layer {strange[0]!r}, which trains: is it of another model?"
                self._sources.warnings.append(text)
        if report is not None and set(report["layers"]) != set(self.layers):
            self._sources.warnings.append(f"{paths['finetuning']} is of a training of other layers than the one shown")

    def _fitting(self, form: Keys, value: Any, kind: str, what: str) -> Mapping[str, Any]:
        """What a user may have filled with something else; empty where it is not there or of another form."""
        if value is None:
            return {}
        try:
            form.check(value, what)
            _check_lengths(value, ("names", "scores", "intervals"))
            _check_lengths(value.get("curve", {}), ("steps", "losses"))
        except ValueError as error:
            self.notes.append(f"{self._sources.paths[kind]}: its {what} has another form ({error}), and is not shown")
            return {}
        return dict(value)

    def ranked(self) -> Ranked | None:
        sources = self._sources
        if sources.ranking is not None:
            return self._of_object(sources.ranking, str(sources.paths["ranking"]))
        for kind, holder in (("delta", sources.delta), ("run", sources.run)):
            plain = self._fitting(_RANKING, getattr(holder, "ranking", None), kind, "ranking")
            if plain:
                return self._of_document(plain, str(sources.paths[kind]))
        if sources.profile is None:
            return None
        from zest_fast.ranking.ranking import rank

        try:
            ranking = rank(sources.profile)
        except (ValueError, NotImplementedError) as error:  # a profile that lacks metrics, or no Ranker that ships
            self.notes.append(f"{sources.paths['profile']} cannot be ranked: {error}")
            return None
        return self._of_object(ranking, f"{sources.paths['profile']}, ranked for this page")

    def _of_object(self, ranking: Ranking, source: str) -> Ranked:
        infos = dict(zip(ranking.names, ranking.info, strict=True))
        document = {"names": ranking.names, "scores": ranking.scores.tolist(), "intervals": ranking.intervals.tolist()}
        document |= {"by": ranking.by, "note": ranking.note, "reasons": ranking.reasons()}
        return self._of_document(document, source, infos)

    def _of_document(self, found: Mapping[str, Any], source: str, infos: Mapping[str, Any] | None = None) -> Ranked:
        profile = self._sources.profile
        infos = infos or (profile.info if profile is not None else {})
        names, reasons = found["names"], found.get("reasons", {})
        ends = found.get("intervals") or [[None, None]] * len(names)
        rows = tuple(
            Row(
                name=name,
                score=_number(score),
                low=_number(low),
                high=_number(high),
                info=infos.get(name, {"head": name in self.head}),
                reasons=tuple((str(part), float(added)) for part, added in reasons.get(name, ())),
                trains=name in self.layers or name in self.head,
            )
            for name, score, (low, high) in zip(names, found["scores"], ends, strict=True)
        )
        return Ranked(found["by"], found.get("note", ""), rows, source)

    def plan(self) -> tuple[Mapping[str, Any], str] | None:
        sources = self._sources
        run, report = sources.run, sources.finetuning
        candidates = [
            ("plan", sources.plan),
            ("delta", self.record.get("plan")),
            ("finetuning", None if report is None else report.get("plan")),
            ("run", None if run is None else run.planned),
        ]
        for kind, value in candidates:
            if plan := self._fitting(_PLAN, value, kind, "plan"):
                return plan, str(sources.paths[kind])
        return None

    def curve(self) -> Curve | None:
        """Of the file that knows most: the figures of the whole training, then the delta, then a run that was saved."""
        sources = self._sources
        if sources.finetuning is not None:
            report = sources.finetuning
            points = thinned([_number(loss) for loss in report["training_loss"]])
            scores = report.get("before"), report.get("after")
            return Curve(points["steps"], points["losses"], *scores, str(sources.paths["finetuning"]))
        if self.record.get("curve", {}).get("steps"):
            curve = self.record["curve"]
            losses = [_number(loss) for loss in curve["losses"]]
            return Curve(curve["steps"], losses, self.record["before"], None, str(sources.paths["delta"]))
        if sources.run is not None:
            points = thinned(sources.run.losses)
            return Curve(points["steps"], points["losses"], sources.run.before, None, str(sources.paths["run"]))
        return None

    def facts(self, plan: Mapping[str, Any], curve: Curve | None) -> tuple[tuple[str, str], ...]:
        sources, facts = self._sources, []
        profile, delta, report = sources.profile, sources.delta, sources.finetuning or {}
        model = self.recipe.get("model") or (sources.plan or {}).get("model")
        facts.append(("model", str(model or "")))
        facts.append(("layers that train", "\n".join(self.layers)))
        facts.append(("head", "\n".join(self.head)))
        facts.append(("classes", ", ".join(delta.class_names) if delta is not None else ""))
        trains = report.get("trainable_parameters") or plan.get("trainable_parameters")
        whole = f" of {report['parameters']:,}" if report.get("parameters") else ""
        facts.append(("parameters that train", f"{trains:,}{whole}" if trains else ""))
        settings = [f"{key.replace('_', ' ')} {self.recipe[key]}" for key in ("optimizer", "lr") if key in self.recipe]
        if curve is not None:
            settings.append(f"{curve.steps[-1]} steps" if curve.steps else "no step")
        if self.recipe.get("interrupted"):
            settings.append(f"interrupted: {self.recipe.get('planned_steps')} were planned")
        facts.append(("training", ", ".join(settings)))
        facts.append(("profile", _of_the_profile(profile) if profile is not None else ""))
        return tuple((what, said) for what, said in facts if said)


def _check_lengths(document: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Raises ValueError where lists that belong together are not equally long."""
    lengths = {key: len(document[key]) for key in keys if key in document}
    if len(set(lengths.values())) > 1:
        raise ValueError(", ".join(f"{length} {key}" for key, length in lengths.items()))


def _of_the_profile(profile: Any) -> str:
    of = f"means of {profile.spread.batches} batches" if profile.spread is not None else "one batch"
    return f"{len(profile)} layers, {len(profile.metrics)} metrics, {of}, loss {profile.loss:.4g}"


def contents_of(sources: Sources) -> Contents:
    """Adds to `sources.notes` what cannot be shown."""
    reader = _Reader(sources)
    plan, curve = reader.plan(), reader.curve()
    return Contents(reader.facts(plan[0] if plan else {}, curve), reader.ranked(), plan, curve)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
