"""Records of sweeps that never ran, with a known truth: what a ranker should find in them, and what it cannot."""

from __future__ import annotations

import numpy as np
import pandas

from zest_fast.ranking.features import METRICS, ON_REQUEST

KINDS = (("conv2d", (64, 32, 1, 1)), ("depthwise", (64, 1, 3, 3)), ("conv2d", (32, 64, 1, 1)), ("linear", (48, 48)))
EFFECTS = {"layer": 1.0, "kind": 0.7, "metric": 0.7, "unseen": 0.3, "noise": 0.2}
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
    the family "x" and has its metric and unseen effects.
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
                    seen = metric + 0.3 * of_seed.normal(size=len(layers))
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
    return chosen.drop(columns=["accuracy", "loss", "head_accuracy", "head_loss"])


def true_gains(records: pandas.DataFrame, model: str, dataset: str) -> pandas.Series:
    """Layer -> mean gain over the seeds."""
    rows = records[(records.model == model) & (records.dataset == dataset)]
    return (rows.head_loss - rows.loss).groupby(rows.layer).mean()
