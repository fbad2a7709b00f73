"""A Ranker on disk: one JSON document, LightGBM's text inside it, and a checksum over the rest. No pickle."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from zest_fast.profiling.nearest import some
from zest_fast.profiling.replacing import replacing
from zest_fast.ranking.architectures import Architecture
from zest_fast.ranking.boosted_trees import trees_from
from zest_fast.ranking.features import FEATURES
from zest_fast.ranking.linear_base import LinearBase
from zest_fast.ranking.model import Model
from zest_fast.ranking.selection import Errors

FORMAT = "zest_fast.Ranker"
VERSION = 1


def save_ranker(
    path: str | os.PathLike[str], settings: Mapping[str, Any], model: Model, metadata: Mapping[str, Any]
) -> Path:
    document = {
        "format": FORMAT,
        "version": VERSION,
        "settings": dict(settings),
        "metadata": {**metadata, "features": list(FEATURES)},
        "model": _model_document(model),
    }
    document["checksum"] = _checksum(document)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(document, allow_nan=False) + "\n", encoding="utf-8")
    return Path(path)


def load_ranker(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Model, dict[str, Any]]:
    """Settings, model and metadata. Raises ValueError, naming the file, where it cannot be used."""
    text = Path(path).read_bytes()
    try:
        document = json.loads(text.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is torn or no Ranker ({error}); fit one and save it again") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{str(path)!r} is no Ranker; name a file that Ranker.save wrote")
    if document.get("version") != VERSION:
        raise ValueError(
            f"{str(path)!r} has format version {document.get('version')}, this zest_fast reads {VERSION}: "
            "fit the Ranker again, or install the zest_fast that wrote it"
        )
    if document.pop("checksum", None) != _checksum(document):
        raise ValueError(f"{str(path)!r}: the checksum does not match; the file is damaged, fit the Ranker again")
    metadata = document["metadata"]
    features = metadata.pop("features")
    if features != list(FEATURES):
        odd = sorted(set(features) ^ set(FEATURES)) or ["their order"]
        raise ValueError(
            f"{str(path)!r} was fitted to other features than this zest_fast computes (differing: {some(odd)}); "
            "fit the Ranker again"
        )
    return document["settings"], _model_from(document["model"]), metadata


def _checksum(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _model_document(model: Model) -> dict[str, Any]:
    return {
        "features": list(model.features),
        "base": {
            which: {name: value for name, value in zip(FEATURES, coefficients.tolist(), strict=True) if value}
            for which, coefficients in (("known", model.base.known), ("new", model.base.new))
        },
        "strength": model.strength,
        "trees": model.trees.model_to_string(),
        "known": _errors_document(model.known),
        "new": _errors_document(model.new),
        "architectures": [_architecture_document(architecture) for architecture in model.architectures],
        "metrics": list(model.metrics),
    }


def _model_from(document: Mapping[str, Any]) -> Model:
    base = {
        which: np.array([coefficients.get(name, 0.0) for name in FEATURES])
        for which, coefficients in document["base"].items()
    }
    return Model(
        features=tuple(document["features"]),
        base=LinearBase(**base),
        strength=document["strength"],
        trees=trees_from(document["trees"]),
        known=_errors_from(document["known"]),
        new=_errors_from(document["new"]),
        architectures=tuple(_architecture_from(entry) for entry in document["architectures"]),
        metrics=tuple(document["metrics"]),
    )


def _errors_document(errors: Errors) -> dict[str, Any]:
    """JSON has no NaN: null."""
    low, high = (_finite(end) for end in errors.span)
    return {"slope": errors.slope, "span": [low, high], "tau": _finite(errors.tau), "pairs": errors.pairs}


def _errors_from(document: Mapping[str, Any]) -> Errors:
    low, high = (_number(end) for end in document["span"])
    return Errors(document["slope"], (low, high), _number(document["tau"]), document["pairs"])


def _architecture_document(architecture: Architecture) -> dict[str, Any]:
    return {
        "model": architecture.model,
        "families": list(architecture.families),
        "layers": [
            {
                "name": name,
                "kind": str(architecture.kinds[row]),
                "depth": float(architecture.depths[row]),
                "shape": list(architecture.shapes[row]),
                "positions": _nested(architecture.positions[:, row]),
                "usual": _nested(architecture.usual[:, row]),
            }
            for row, name in enumerate(architecture.names)
        ],
    }


def _architecture_from(document: Mapping[str, Any]) -> Architecture:
    layers = document["layers"]
    return Architecture(
        model=document["model"],
        names=tuple(layer["name"] for layer in layers),
        kinds=np.array([layer["kind"] for layer in layers]),
        depths=np.array([layer["depth"] for layer in layers], dtype=np.float64),
        shapes=tuple(tuple(layer["shape"]) for layer in layers),
        families=tuple(document["families"]),
        positions=np.stack([np.array(layer["positions"], dtype=np.float64) for layer in layers], axis=1),
        usual=np.stack([np.array(layer["usual"], dtype=np.float64) for layer in layers], axis=1),
    )


def _nested(values: np.ndarray) -> list[Any]:
    """Lists with null for NaN, which NumPy reads back as NaN."""
    nested = values.astype(object)
    nested[np.isnan(values)] = None
    return nested.tolist()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
