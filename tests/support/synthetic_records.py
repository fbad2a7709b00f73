"""Records of sweeps that never ran, with a known truth: what a ranker should find in them, and what it cannot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas

from zest_fast.profiling.layer_profile import LayerProfile
from zest_fast.ranking.features import METRICS, ON_REQUEST
from zest_fast.ranking.learning.contributions import OUTCOMES
from zest_fast.sweeping.records import RecordFile

KINDS = (("conv2d", (64, 32, 1, 1)), ("depthwise", (64, 1, 3, 3)), ("conv2d", (32, 64, 1, 1)), ("linear", (48, 48)))
EFFECTS = {"layer": 1.0, "kind": 0.7, "metric": 0.7, "unseen": 0.3, "noise": 0.2, "constant": 0.0}
BLOCK = ("expand", "depthwise", "project", "mix")


def make_records(
    models=("tower", "castle", "bridge"),
    datasets=("digits", "shirts", "cats", "cars"),
    *,
    blocks: int = 5,
    seeds: int = 2,
    states=("fresh", "warm"),
    seed: int = 0,
    **effects: float,
) -> pandas.DataFrame:
    """The gain of a layer is the sum of effects, each a standard normal times its factor (EFFECTS):

    layer: of the model, whatever the data; kind: of the kind of layer, and of its depth, in every model alike; metric:
    of the pair, and seen in grad_norm and rgn; unseen: of the pair; noise: of the seed. A data set "x-corrupted" is of
    the family "x" and has its metric and unseen effects. The metrics of a layer also have a constant of the model,
    which tells nothing of its gain (its factor is constant=).
    """
    factors = EFFECTS | effects
    of_kinds = np.random.default_rng(seed).normal(size=len(KINDS))
    tables = []
    for m, model in enumerate(models):
        layers = _layers(model, m, blocks + m)  # models differ in their depth and width
        chance = np.random.default_rng([seed, 1, m])
        gains = factors["layer"] * chance.normal(size=len(layers))
        gains = gains + factors["kind"] * (of_kinds[layers.kind_number] + np.linspace(-1, 1, len(layers)))
        sizes = np.exp(chance.normal(size=len(layers)))
        constant = factors["constant"] * chance.normal(size=len(layers))
        for dataset in datasets:
            family = dataset.removesuffix("-corrupted")
            metric, unseen = np.random.default_rng([seed, 2, m, *family.encode()]).normal(size=(2, len(layers)))
            of_pair = gains + factors["metric"] * metric + factors["unseen"] * unseen
            for s in range(seeds):
                of_seed = np.random.default_rng([seed, 3, m, s, *dataset.encode()])
                gain = of_pair + factors["noise"] * of_seed.normal(size=len(layers)) + of_seed.normal()
                for state in states:
                    leading = {"model": model, "dataset": dataset, "family": family, "seed": s, "head_state": state}
                    outcomes = {"accuracy": 0.5, "loss": 5 - 0.1 * gain, "head_accuracy": 0.5, "head_loss": 5.0}
                    seen = constant + metric + 0.3 * of_seed.normal(size=len(layers))
                    tables.append(layers.assign(**leading, **outcomes, **_metrics(sizes, seen, of_seed)))
    return pandas.concat(tables, ignore_index=True).drop(columns="kind_number")


def _layers(model: str, number: int, blocks: int) -> pandas.DataFrame:
    rows = []
    for block in range(blocks):
        for k, (part, (kind, (outputs, *rest))) in enumerate(zip(BLOCK, KINDS, strict=True)):
            shape = [outputs + number, *rest]
            row = {"layer": f"{model}.{block}.{part}_of_{model}", "kind": kind, "shape": shape, "kind_number": k}
            rows.append(row | {"numel": int(np.prod(shape)), "depth": len(rows), "head": False})
    return pandas.DataFrame(rows)


def _metrics(sizes: np.ndarray, seen: np.ndarray, chance: np.random.Generator) -> dict[str, np.ndarray]:
    values = {name: sizes * np.exp(chance.normal(size=len(sizes))) for name in METRICS if name not in ON_REQUEST}
    values |= {name: np.full(len(sizes), np.nan) for name in ON_REQUEST}
    return values | {"grad_norm": np.exp(seen), "rgn": np.exp(seen)}


def one_profile(records: pandas.DataFrame, model: str, dataset: str, seed: int = 0, state: str = "fresh"):
    """The rows of one profile, without what the sweep found."""
    chosen = records[
        (records.model == model) & (records.dataset == dataset) & (records.seed == seed) & (records.head_state == state)
    ]
    return chosen.drop(columns=list(OUTCOMES))


def true_gains(records: pandas.DataFrame, model: str, dataset: str) -> pandas.Series:
    """Layer -> mean gain over the seeds."""
    rows = records[(records.model == model) & (records.dataset == dataset)]
    return (rows.head_loss - rows.loss).groupby(rows.layer).mean()


def profile_of(rows: pandas.DataFrame, *, head: bool = True, prefix: str = "") -> LayerProfile:
    """The profile that `one_profile` gave the rows of, with a head if wanted, the layers' names after `prefix`."""
    metrics = [metric for metric in METRICS if metric in rows and rows[metric].notna().any()]
    names = [prefix + name for name in rows.layer]
    info = {
        name: {key: row[key] for key in ("numel", "kind", "depth", "shape", "head")}
        for name, row in zip(names, rows.to_dict("records"), strict=True)
    }
    values = rows[metrics].to_numpy()
    if head:
        names, values = [*names, "head"], np.vstack([values, np.ones(len(metrics))])
        info["head"] = {"numel": 640, "kind": "linear", "depth": 99, "shape": [10, 64], "head": True}
    return LayerProfile(names, metrics, values, info=info, loss=1.0, backend="reference", uncovered={})


def write_sweep(records: pandas.DataFrame, path: Path, *, recipe: str = "aa", definitions: int = 1) -> Path:
    """The records of one model on one data set as a sweep would have written them."""
    first = records.iloc[0]
    seeds = sorted(records.seed.unique().tolist())
    header = {name: str(first[name]) for name in ("model", "dataset", "family")}
    header |= {"recipe": {"seeds": seeds}, "recipe_hash": recipe, "layers": list(dict.fromkeys(records.layer))}
    with RecordFile(path, {**header, "versions": {"definitions": definitions}}) as file:
        for seed, of_seed in records.groupby("seed"):
            file.append({"record": "head", "seed": seed, "accuracy": 0.5, "loss": float(first.head_loss)})
            for state, rows in of_seed.groupby("head_state"):
                columns = rows.drop(columns=["model", "dataset", "family", "seed", "head_state", *OUTCOMES])
                layers = {row.pop("layer"): row for row in columns.to_dict("records")}
                kind = {"record": "profile", "seed": seed, "head_state": state, "backend": "cpu"}
                file.append({**kind, "layers": layers})
            for layer, loss in of_seed.drop_duplicates("layer").set_index("layer").loss.items():
                file.append({"record": "layer", "seed": seed, "layer": layer, "accuracy": 0.5, "loss": float(loss)})
    return path
