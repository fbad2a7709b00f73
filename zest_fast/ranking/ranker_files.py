"""A Ranker on disk: one JSON document with a checksum over the rest. No pickle, and nothing that others parse.

Version 1 held the trees as LightGBM's text, which is read without LightGBM. Whatever the checksum says, every entry is
checked for its type and its bounds before it is used.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from zest_fast.foundation.documents import (
    Keys,
    ListOf,
    MapOf,
    Null,
    Number,
    OneOf,
    Text,
    json_hash,
    parse_json,
    shown,
    text_of,
    whole_file,
)
from zest_fast.foundation.nearest import some
from zest_fast.foundation.replacing import replacing
from zest_fast.ranking.architectures import Architecture
from zest_fast.ranking.errors import Errors
from zest_fast.ranking.features import DYNAMIC_METRICS, FEATURE_SETS, FEATURES, METRICS
from zest_fast.ranking.lightgbm_text import trees_from_text
from zest_fast.ranking.linear_base import LinearBase
from zest_fast.ranking.mixing import Mixing
from zest_fast.ranking.model import Model
from zest_fast.ranking.trees import MOST_LEAVES, MOST_TREES, NAN_IS_MISSING, Tree

FORMAT = "zest_fast.Ranker"
VERSION = 2
_READ = (1, 2)
_MOST_BYTES = 2**26
_MOST_LAYERS, _MOST_FAMILIES, _MOST_ARCHITECTURES = 100_000, 1_000, 10_000
_MOST_SIZE = 2**48  # of one dimension of a weight

_NODES, _LEAVES = MOST_LEAVES - 1, MOST_LEAVES
_CHILDREN = ListOf(Number(-MOST_LEAVES, MOST_LEAVES, integer=True), most=_NODES)
_TREE = Keys({
    "features": ListOf(Number(0, len(FEATURES) - 1, integer=True), most=_NODES),
    "thresholds": ListOf(Number(), most=_NODES),
    "missing": ListOf(Number(0, NAN_IS_MISSING, integer=True), most=_NODES),
    "default_left": ListOf(Number(0, 1, integer=True), most=_NODES),
    "left": _CHILDREN,
    "right": _CHILDREN,
    "values": ListOf(Number(-1e6, 1e6), least=1, most=_LEAVES),
    "counts": ListOf(Number(1, 2**40, integer=True), least=1, most=_LEAVES),
})  # fmt: skip
_ERRORS = Keys({
    "slope": Number(0, 1e3),
    "span": ListOf(Null(Number(-10, 10)), least=2, most=2),
    "tau": Null(Number(-1, 1)),
    "pairs": Number(0, 10**9, integer=True),
})  # fmt: skip
_MIXING = Keys({"ranker": Number(0, 1e3), "probe": Number(0, 1e3), "errors": _ERRORS})
_POSITION = Null(Number(0, 1))
_LAYER = Keys({
    "name": Text(),
    "kind": Text(100),
    "depth": Number(0, 1),
    "shape": ListOf(Number(0, _MOST_SIZE, integer=True), least=2, most=8),
    "positions": ListOf(_POSITION, least=1, most=_MOST_FAMILIES),
    "usual": ListOf(
        ListOf(Null(Number(-100, 100)), least=len(DYNAMIC_METRICS), most=len(DYNAMIC_METRICS)),
        least=1, most=_MOST_FAMILIES,
    ),
})  # fmt: skip
_ARCHITECTURE = Keys({
    "model": Text(),
    "families": ListOf(Text(), least=1, most=_MOST_FAMILIES, unique=True),
    "layers": ListOf(_LAYER, least=1, most=_MOST_LAYERS),
})  # fmt: skip
_COEFFICIENTS = MapOf(Number(-1e6, 1e6), names=Text(among=FEATURES))
_MODEL = Keys({
    "features": ListOf(Text(among=FEATURES), least=1, most=len(FEATURES), unique=True),
    "base": Keys({"known": _COEFFICIENTS, "new": _COEFFICIENTS}),
    "strength": Number(0, 1e3),
    "trees": OneOf((Text(2**24), ListOf(_TREE, most=MOST_TREES))),
    "known": _ERRORS,
    "new": _ERRORS,
    "architectures": ListOf(_ARCHITECTURE, most=_MOST_ARCHITECTURES),
    "metrics": ListOf(Text(among=METRICS), most=len(METRICS), unique=True),
}, {"probed": Keys({"known": Null(_MIXING), "new": Null(_MIXING)})})  # fmt: skip
_DOCUMENT = Keys({
    "format": Text(among=(FORMAT,)),
    "version": Number(min(_READ), max(_READ), integer=True),
    "settings": Keys({"seed": Number(-(2**63), 2**63 - 1, integer=True), "features": Text(among=tuple(FEATURE_SETS))}),
    "metadata": Keys({"pairs": ListOf(Text(), least=1)}, others=True),
    "model": _MODEL,
})  # fmt: skip


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
    document["checksum"] = json_hash(document)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(document, allow_nan=False) + "\n", encoding="utf-8")
    return Path(path)


def load_ranker(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Model, dict[str, Any]]:
    """Settings, model and metadata. Raises ValueError, naming the file, where it cannot be used."""
    contents = whole_file(path, _MOST_BYTES)
    try:
        document = parse_json(text_of(contents))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is torn or no Ranker ({error}); fit one and save it again") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{str(path)!r} is no Ranker; name a file that Ranker.save wrote")
    if document.get("version") not in _READ:
        raise ValueError(
            f"{str(path)!r} has format version {shown(document.get('version'))}, this zest_fast reads "
            f"{' and '.join(map(str, _READ))}: fit the Ranker again, or install the zest_fast that wrote it"
        )
    if document.pop("checksum", None) != json_hash(document):
        raise ValueError(f"{str(path)!r}: the checksum does not match; the file is damaged, fit the Ranker again")
    features = document["metadata"].pop("features", None) if isinstance(document.get("metadata"), dict) else None
    if features != list(FEATURES):
        odd = [str(name)[:60] for name in features] if isinstance(features, list) else []
        odd = sorted(set(odd) ^ set(FEATURES)) or ["their order"]
        raise ValueError(
            f"{str(path)!r} was fitted to other features than this zest_fast computes (differing: {some(odd)}); "
            "fit the Ranker again"
        )
    try:
        _DOCUMENT.check(document, "")
        return document["settings"], _model_from(document["model"]), document["metadata"]
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no whole Ranker: {error}; fit one and save it again") from error


def _model_document(model: Model) -> dict[str, Any]:
    return {
        "features": list(model.features),
        "base": {
            which: {name: value for name, value in zip(FEATURES, coefficients.tolist(), strict=True) if value}
            for which, coefficients in (("known", model.base.known), ("new", model.base.new))
        },
        "strength": model.strength,
        "trees": [_tree_document(tree) for tree in model.trees],
        "known": _errors_document(model.known),
        "new": _errors_document(model.new),
        "architectures": [_architecture_document(architecture) for architecture in model.architectures],
        "metrics": list(model.metrics),
    } | (
        {"probed": dict(zip(("known", "new"), map(_mixing_document, model.probed), strict=True))}
        if any(model.probed)
        else {}
    )


def _model_from(document: Mapping[str, Any]) -> Model:
    """Of entries of the right types. Raises ValueError where they do not fit together."""
    base = {
        which: np.array([coefficients.get(name, 0.0) for name in FEATURES], dtype=np.float64)
        for which, coefficients in document["base"].items()
    }
    features, trees = tuple(document["features"]), document["trees"]
    return Model(
        features=features,
        base=LinearBase(**base),
        strength=float(document["strength"]),
        trees=_trees_of_text(trees, features) if isinstance(trees, str) else _trees_from(trees, features),
        known=_errors_from(document["known"], "model.known"),
        new=_errors_from(document["new"], "model.new"),
        architectures=tuple(
            _architecture_from(entry, f"model.architectures[{place}]")
            for place, entry in enumerate(document["architectures"])
        ),
        metrics=tuple(document["metrics"]),
        probed=(_mixing_from(document, "known"), _mixing_from(document, "new")),
    )


def _tree_document(tree: Tree) -> dict[str, Any]:
    return {name: (getattr(tree, name) + 0).tolist() for name in _TREE.needed}  # flags as 0 and 1


def _trees_from(documents: list[dict[str, Any]], features: tuple[str, ...]) -> tuple[Tree, ...]:
    trees = []
    for place, document in enumerate(documents):
        try:
            entries: dict[str, Any] = {
                name: np.array(document[name], dtype=_DTYPES.get(name, np.int64)) for name in _TREE.needed
            }
            if (entries["features"] >= len(features)).any():
                raise ValueError(f"features: expected columns below {len(features)}")
            trees.append(Tree(**entries))
        except ValueError as error:
            raise ValueError(f"model.trees[{place}].{error}") from error
    return tuple(trees)


_DTYPES = {"thresholds": np.float64, "values": np.float64, "default_left": np.bool_}


def _trees_of_text(text: str, features: tuple[str, ...]) -> tuple[Tree, ...]:
    try:
        return trees_from_text(text, features)
    except ValueError as error:
        raise ValueError(f"model.trees: {error}") from error


def _mixing_document(mixing: Mixing | None) -> dict[str, Any] | None:
    if mixing is None:
        return None
    return {"ranker": mixing.ranker, "probe": mixing.probe, "errors": _errors_document(mixing.errors)}


def _mixing_from(document: Mapping[str, Any], which: str) -> Mixing | None:
    found = document.get("probed", {}).get(which)
    if found is None:
        return None
    errors = _errors_from(found["errors"], f"model.probed.{which}.errors")
    return Mixing(float(found["ranker"]), float(found["probe"]), errors)


def _errors_document(errors: Errors) -> dict[str, Any]:
    """JSON has no NaN: null."""
    low, high = (_finite(end) for end in errors.span)
    return {"slope": errors.slope, "span": [low, high], "tau": _finite(errors.tau), "pairs": errors.pairs}


def _errors_from(document: Mapping[str, Any], key: str) -> Errors:
    low, high = (_number(end) for end in document["span"])
    if low > 0 or high < 0:
        raise ValueError(f"{key}.span: expected an interval around 0, found {low:g} to {high:g}")
    return Errors(float(document["slope"]), (low, high), _number(document["tau"]), document["pairs"])


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


def _architecture_from(document: Mapping[str, Any], key: str) -> Architecture:
    layers, families = document["layers"], document["families"]
    seen = set()
    for place, layer in enumerate(layers):
        for name in ("positions", "usual"):
            if len(layer[name]) != len(families):
                raise ValueError(
                    f"{key}.layers[{place}].{name}: expected an entry for each of {len(families)} families, "
                    f"found {len(layer[name])}"
                )
        if layer["name"] in seen:
            raise ValueError(f"{key}.layers[{place}].name: {shown(layer['name'])} occurs more than once")
        seen.add(layer["name"])
    return Architecture(
        model=document["model"],
        names=tuple(layer["name"] for layer in layers),
        kinds=np.array([layer["kind"] for layer in layers]),
        depths=np.array([layer["depth"] for layer in layers], dtype=np.float64),
        shapes=tuple(tuple(layer["shape"]) for layer in layers),
        families=tuple(families),
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
