"""Records -> what a Ranker knows. What only this needs (LightGBM, pandas, SciPy) is imported from here on. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas

from zest_fast.ranking.architectures import architectures_of
from zest_fast.ranking.features import FEATURE_SETS, METRICS, ON_REQUEST
from zest_fast.ranking.groups import IDENTITY
from zest_fast.ranking.learning.boosted_trees import STRENGTH
from zest_fast.ranking.learning.contributions import OUTCOMES, check_sweeps, pairs_of
from zest_fast.ranking.learning.selection import Selection, fit_base, fit_trees, select
from zest_fast.ranking.learning.training_rows import training_rows
from zest_fast.ranking.model import Model
from zest_fast.ranking.probed import PROBED


def fit_model(
    records: pandas.DataFrame, sweeps: Sequence[Mapping[str, Any]] | None, *, features: str, seed: int
) -> tuple[Model, dict[str, Any]]:
    """The model and the metadata of its Ranker; arguments and errors are those of `Ranker` and `Ranker.fit`."""
    if sweeps is not None:
        check_sweeps(sweeps)
    pairs = pairs_of(records)
    architectures = architectures_of(pairs)
    names = FEATURE_SETS[features]
    rows = training_rows(pairs, architectures, known=features == "all")
    chosen = select(rows, features=names, seed=seed)
    model = Model(
        features=names,
        base=fit_base(rows, rows.views, names, chosen.penalties),
        strength=STRENGTH,
        trees=fit_trees(rows, rows.views, names, STRENGTH * chosen.base, rounds=chosen.rounds, seed=seed),
        known=chosen.known,
        new=chosen.new,
        architectures=tuple(architectures) if features == "all" else (),
        metrics=tuple(m for m in METRICS if m not in ON_REQUEST and _defined(records, m)),
        probed=chosen.probed,
    )
    return model, _metadata(records, sweeps, chosen, pairs=[pair.name for pair in pairs])


def _defined(records: pandas.DataFrame, metric: str) -> bool:
    return metric in records and bool(records[metric].notna().any())


def _metadata(
    records: pandas.DataFrame,
    sweeps: Sequence[Mapping[str, Any]] | None,
    chosen: Selection,
    pairs: Sequence[str],
) -> dict[str, Any]:
    import lightgbm

    sweeps = list(sweeps or ())
    return {
        "pairs": list(pairs),
        "records": records_hash(records),
        "recipes": {sweep["model"]: sweep["recipe_hash"] for sweep in sweeps},
        "definitions": next((sweep.get("versions", {}).get("definitions") for sweep in sweeps), None),
        "settings": {
            "penalties": list(chosen.penalties),
            "rounds": chosen.rounds,
        },
        "versions": {"lightgbm": lightgbm.__version__, "numpy": np.__version__},
    }


def records_hash(records: pandas.DataFrame) -> str:
    """Sixteen hexadecimal digits of what is learned from, whatever the order of the rows."""
    columns = [c for c in (*IDENTITY, "family", "layer", *OUTCOMES, *METRICS, PROBED) if c in records]
    rows = records[columns].sort_values([*IDENTITY, "layer"], kind="stable")
    return hashlib.sha256(rows.to_csv(index=False).encode()).hexdigest()[:16]
