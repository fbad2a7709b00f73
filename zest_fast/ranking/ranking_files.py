"""A Ranking on disk: one JSON document, best layer first, with all that the Ranker said of it. No pickle.

Floats are exact; what JSON does not know is written as in a profile ("NaN", "Infinity", "-Infinity").
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from zest_fast.foundation.documents import (
    Flag,
    Keys,
    ListOf,
    MapOf,
    Null,
    Number,
    Text,
    parse_json,
    shown,
    text_of,
    whole_file,
)
from zest_fast.foundation.replacing import replacing
from zest_fast.profiling.layer_profile import LayerProfile
from zest_fast.profiling.profile_files import INFO, VALUE, NewerVersionError, plain_value, refuse_newer, strict_number
from zest_fast.ranking.assessment import Assessment, Known
from zest_fast.ranking.ranking import Ranking

FORMAT, VERSION = "zest_fast.Ranking", 1
_MOST_LAYERS, _LARGEST = 1_000_000, 2**53
_LARGEST_PART = 1e6  # of a score between 0 and 1
_LAYER = Keys({"name": Text(), "score": VALUE, "interval": ListOf(VALUE, least=2, most=2), "info": INFO})
_COUNT = Number(0, _LARGEST, integer=True)
_ASSESSMENT = Keys(
    {
        "known": Keys({"share": Number(0, 1), "model": Null(Text())}),
        "partly": Null(Keys({"model": Text(), "swept": _COUNT, "layers": _COUNT})),
        "expected_tau": VALUE,
        "parts": MapOf(ListOf(Number(-_LARGEST_PART, _LARGEST_PART), most=_MOST_LAYERS), most=1_000),
        "layers": ListOf(Text(), most=_MOST_LAYERS, unique=True),
        "ignored": ListOf(Text(), most=1_000),
        "probed": Flag(),
        "unmeasured": _COUNT,
    }
)
_RANKING = Keys(
    {
        "format": Text(among=(FORMAT,)),
        "version": Number(1, VERSION, integer=True),
        "by": Text(),
        "layers": ListOf(_LAYER, most=_MOST_LAYERS),
        "assessment": Null(_ASSESSMENT),
    }
)


def save_ranking(ranking: Ranking, path: str | os.PathLike[str]) -> Path:
    path = _json(path)
    rows = zip(ranking.names, ranking.scores.tolist(), ranking.intervals.tolist(), ranking.info, strict=True)
    document = {
        "format": FORMAT,
        "version": VERSION,
        "by": ranking.by,
        "layers": [
            {"name": name, "score": strict_number(score), "interval": _numbers(ends), "info": info}
            for name, score, ends, info in rows
        ],
        "assessment": None if ranking.assessment is None else _plain(ranking.assessment),
    }
    try:
        text = json.dumps(document, allow_nan=False, indent=1, default=plain_value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"info must hold what strict JSON can: {error}") from error
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def load_ranking(path: str | os.PathLike[str]) -> Ranking:
    path = _json(path)
    try:
        return _ranking(parse_json(text_of(whole_file(path))), path)
    except NewerVersionError:
        raise
    except ValueError as error:
        raise ValueError(
            f"{str(path)!r} is no ranking that can be read ({error}): torn, or written by something else; rank again, "
            "or name a file that Ranking.save wrote"
        ) from error


def _json(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix.lower() != ".json":
        raise ValueError(f"{str(path)!r} ends in {path.suffix!r}; a ranking is a .json file")
    return path


def _plain(assessment: Assessment) -> dict[str, Any]:
    partly = assessment.partly
    return {
        "known": {"share": assessment.known.share, "model": assessment.known.model},
        "partly": None if partly is None else dict(zip(("model", "swept", "layers"), partly, strict=True)),
        "expected_tau": strict_number(assessment.expected_tau),
        "parts": {name: values.tolist() for name, values in assessment.parts().items()},
        "layers": list(assessment.layers),
        "ignored": list(assessment.ignored),
        "probed": assessment.probed,
        "unmeasured": assessment.unmeasured,
    }


def _ranking(document: Any, path: Path) -> Ranking:
    Keys({"format": Text(), "version": Number(1, 10**6, integer=True)}, others=True).check(document, "")
    if document["format"] == FORMAT:
        refuse_newer(path, document["version"], VERSION)
    _RANKING.check(document, "")
    layers = document["layers"]
    names = [layer["name"] for layer in layers]
    scores = np.array([float(layer["score"]) for layer in layers])
    profile = LayerProfile(
        names,
        [],
        np.empty((len(names), 0)),
        info={layer["name"]: layer["info"] for layer in layers},
        loss=float("nan"),
        backend="",
        uncovered={},
    )
    assessment = None
    if document["assessment"] is not None:
        intervals = np.array([[float(end) for end in layer["interval"]] for layer in layers]).reshape(-1, 2)
        assessment = replace(_assessment(document["assessment"], names), scores=scores, intervals=intervals)
    ranking = Ranking(profile, scores, by=document["by"], assessment=assessment)
    if ranking.names != names:
        moved = next(name for name, other in zip(names, ranking.names, strict=True) if name != other)
        raise ValueError(f"layers: {shown(moved)} does not stand where its score belongs")
    return ranking


def _assessment(document: dict[str, Any], names: list[str]) -> Assessment:
    layers, partly, known = document["layers"], document["partly"], document["known"]
    if unknown := sorted(set(layers) - set(names)):
        raise ValueError(f"assessment.layers: {shown(unknown[0])} is none of the layers")
    for name, values in document["parts"].items():
        if len(values) != len(layers):
            raise ValueError(f"assessment.parts.{name}: expected {len(layers)} entries, found {len(values)}")
    parts = {name: np.array([float(value) for value in values]) for name, values in document["parts"].items()}
    return Assessment(
        scores=np.empty(0),
        intervals=np.empty((0, 2)),
        known=Known(known["share"], known["model"]),
        expected_tau=float(document["expected_tau"]),
        parts=lambda: parts,
        layers=tuple(layers),
        partly=None if partly is None else (partly["model"], partly["swept"], partly["layers"]),
        ignored=tuple(document["ignored"]),
        probed=document["probed"],
        unmeasured=document["unmeasured"],
    )


def _numbers(values: list[float]) -> list[float | str]:
    return [strict_number(value) for value in values]
