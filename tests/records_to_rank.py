"""Contribution records of models that do not exist: gains that follow the layer and one metric, with noise."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas

PAIRS = {
    "efficientnet-lite0": {"mnist": "mnist", "mnist-corrupted": "mnist", "fashion": "fashion"},
    "efficientnet-lite1": {"fashion": "fashion"},
    "mobilenet-v2": {"mnist": "mnist", "fashion": "fashion"},
    "minilm": {"trec": "trec", "sms-spam": "sms-spam"},
}
METRICS = ("weight_std", "act_std", "grad_norm", "grad_mean", "plain", "snip", "fisher", "rgn", "grasp")
LAYERS = 12


def synthetic_records(*, seeds: int = 2, noise: float = 0.1, seed: int = 0) -> pandas.DataFrame:
    """Columns of `load_records()`. `snip` tells the part of a gain that the data set decides, in every model.

    A layer's gain is a part of its own (the same on all data sets of a model), a part of its data set, and noise.
    """
    generator = np.random.default_rng(seed)
    parts = []
    for model, datasets in PAIRS.items():
        of_layer = generator.normal(size=LAYERS)
        static = generator.normal(size=LAYERS)
        for dataset, family in datasets.items():
            of_dataset = generator.normal(size=LAYERS)
            for number in range(seeds):
                gain = 0.1 * (of_layer + of_dataset) + noise * 0.1 * generator.normal(size=LAYERS)
                for state in ("warm", "fresh"):
                    metrics = {name: generator.normal(size=LAYERS) for name in METRICS}
                    metrics |= {"weight_std": np.exp(static), "snip": np.exp(of_dataset)}
                    parts.append(_profile(model, dataset, family, number, state, gain, metrics))
    return pandas.concat(parts, ignore_index=True)


def _profile(model, dataset, family, seed, state, gain, metrics) -> pandas.DataFrame:
    kinds = ["linear"] * LAYERS if model == "minilm" else ["conv2d", "depthwise"] * (LAYERS // 2)
    names = [f"body.layers.{place // 2}.{'ab'[place % 2]}" for place in range(LAYERS)]
    leading = {"model": model, "dataset": dataset, "family": family, "seed": seed, "layer": names}
    outcomes = {"accuracy": 0.7 + gain / 10, "loss": 1 - gain, "head_accuracy": 0.7, "head_loss": 1.0}
    info = {
        "numel": 64 * (1 + np.arange(LAYERS)),
        "kind": kinds,
        "depth": np.arange(LAYERS),
        "uses": 1,
        "shape": [[8, 8 * (1 + place)] for place in range(LAYERS)],
        "head": False,
        "trainable": True,
        "shared_with": [[] for _ in range(LAYERS)],
        "parameter": [f"{name}.weight" for name in names],
        "module": names,
        "nonfinite": 0,
        "note": "",
    }
    return pandas.DataFrame(leading | outcomes | {"head_state": state} | metrics | info)


def synthetic_spectra(records: pandas.DataFrame) -> dict[str, dict[str, dict[str, float | None]]]:
    """A few layers have no noise (None)."""
    return {
        model: {
            layer: {"snr": None if re.search(r"\.0\.a$", layer) else 1.0 + place, "condition_number": 2.0 + place}
            for place, layer in enumerate(rows.layer.unique())
        }
        for model, rows in records.groupby("model")
    }


def write_parquet(records: pandas.DataFrame, path: Path) -> Path:
    """As `consolidate` writes them, with the least that it says of each sweep."""
    import pyarrow
    from pyarrow import parquet

    pairs = records[["model", "dataset", "family"]].drop_duplicates().to_dict("records")
    sweeps = [pair | {"recipe": {}, "recipe_hash": "0" * 16, "versions": {"definitions": 1}} for pair in pairs]
    table = pyarrow.Table.from_pandas(records, preserve_index=False)
    parquet.write_table(table.replace_schema_metadata({b"zest_fast.records": json.dumps(sweeps).encode()}), path)
    return path
