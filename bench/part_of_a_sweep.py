"""What a part of a sweep says of the rest of it: `python -m bench.part_of_a_sweep`, a minute, from the records alone.

A probe is to cost a twentieth of a sweep. What could be bought with more, or otherwise? Here the outcomes that a sweep
has under one seed are the measurement, and the mean gain under its other seeds is the truth, so that nothing is held
against itself: one seed of all layers is a third of a sweep of three. Where only some layers are measured, they are
evenly spaced in the order that probe and number of parameters give, and the others are filled in by kernel ridge
regression on what that order leaves unexplained (layers at the same depth, of the same role in their block, are alike).
A perfect predictor is one that knows the gain without its noise (measures.py has the formula).

The constants below were set by hand before the first run and not changed after it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from scipy import stats
from sklearn.kernel_ridge import KernelRidge

import zest_fast
from bench.layerbench.measures import Bootstrap, attainable_tau, recovered_gain, reliability, tau_b
from bench.layerbench.protocol import DRAWS, SEED
from bench.measure import RESULTS, write_result
from zest_fast.foundation.text_table import markdown_table

SHARES = (0.2, 0.5)  # of the layers
DRAWN = 8  # choices of the layers that are measured
SIZE = 0.5  # weight of the number of parameters beside the probe
WIDTH = 0.15  # of the kernel, in depths of the model
SAME_KIND, ANY_KIND = 0.51, 0.3  # of the kernel between layers of other roles, beside 1 for the same role
NOISE = 2 / 3  # variance of a measurement over that of what the prior leaves unexplained
SLOPE, SLOPE_WEIGHT = 0.45, 4.0  # of gain on the prior, both standardised, and for how many layers that belief counts
TOP = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    records = zest_fast.load_records()
    fresh = records[records.head_state == "fresh"]
    pairs = [judged(pair) | {"pair": "/".join(name)} for name, pair in fresh.groupby(["model", "dataset"], sort=True)]
    frame = pandas.DataFrame([{"pair": pair["pair"], **row} for pair in pairs for row in pair["ways"]])
    bootstrap = Bootstrap(len(pairs), draws=DRAWS, seed=SEED)
    results = []
    for way, rows in frame.groupby("way", sort=False):
        assert len(rows) == len(pairs)
        of_sweep, *means = (rows[name].to_numpy() for name in ("share", "tau", "top"))
        known = [None if np.isnan(v).all() else {"mean": v.mean(), "interval": bootstrap.interval(v)} for v in means]
        results.append(
            {
                "way": way,
                "share": None if np.isnan(of_sweep).all() else of_sweep.mean(),
                "tau": known[0],
                "top": known[1],
            }
            | {"pairs": dict(zip(rows.pair, rows.tau.round(4), strict=True))}
        )
    write_result("part_of_a_sweep", {"pairs": len(pairs), "top": TOP, "drawn": DRAWN}, results, options.out)
    print(part_text({"results": results, "settings": {"pairs": len(pairs)}}))


def judged(pair: pandas.DataFrame) -> dict[str, Any]:
    """Every way with its share of the sweep's trials, tau and recovered gain; means over the measured seeds."""
    layers = pair[pair.seed == pair.seed.min()].set_index("layer")
    gains = -pair.pivot(index="layer", columns="seed", values="loss").loc[layers.index].to_numpy().T  # [seeds, layers]
    found = [row for seed in range(len(gains)) for row in _ways(gains, seed, layers)]
    ways = pandas.DataFrame(found).groupby("way", sort=False).mean().reset_index()
    return {"ways": ways.to_dict("records")}


def _ways(gains: np.ndarray, seed: int, layers: pandas.DataFrame) -> Iterator[dict[str, Any]]:
    """Of one seed as the measurement and the mean of the others as the truth. gains: [seeds, layers]."""
    seeds = len(gains)
    measured, truth = gains[seed], np.delete(gains, seed, axis=0).mean(0)
    size = _standard(_normal(layers.numel.to_numpy()))
    probe = _standard(_normal(layers.probe_score.to_numpy()))
    prior = _standard(probe + SIZE * size)
    ways = {
        "number of parameters": (0.0, [size]),
        "probe": (0.05, [probe]),
        "probe and number of parameters": (0.05, [prior]),
    }
    kernel = _likeness(layers)
    for share in SHARES:
        filled = [_filled_in(prior, measured, kernel, chosen) for chosen in _chosen(prior, share)]
        ways[f"the same, and {share:.0%} of the layers trained under one seed"] = (0.05 + share / seeds, filled)
    ways["all layers trained under one seed"] = (1 / seeds, [measured])
    everything = np.arange(len(measured))
    both = [_filled_in(prior, measured, kernel, everything)]
    ways["the same, and probe and number of parameters"] = (0.05 + 1 / seeds, both)
    for way, (share, scores) in ways.items():
        tau = np.mean([tau_b(score, truth) for score in scores])
        top = np.mean([recovered_gain(score, truth, TOP) for score in scores])
        yield {"way": way, "share": share, "tau": tau, "top": top}
    yield {"way": "a perfect predictor", "share": np.nan, "tau": _perfect(gains), "top": np.nan}


def _perfect(gains: np.ndarray) -> float:
    """Tau of who knows the gain without its noise, with the mean of all seeds but one."""
    seeds, of_all = len(gains), reliability(gains)
    of_one = of_all / (seeds - (seeds - 1) * of_all)  # Spearman and Brown, backwards
    return attainable_tau((seeds - 1) * of_one / (1 + (seeds - 2) * of_one))


def _likeness(layers: pandas.DataFrame) -> np.ndarray:
    """[layers, layers]: how much the gain of one tells of another's, 1 for itself."""
    depth = layers.depth.to_numpy() / max(1, layers.depth.max())
    roles, kinds = np.array([_role(name) for name in layers.index]), np.array(layers["kind"].tolist())
    near = np.exp(-0.5 * ((depth[:, None] - depth) / WIDTH) ** 2)
    same_kind = np.where(kinds[:, None] == kinds, SAME_KIND, ANY_KIND)
    return near * np.where(roles[:, None] == roles, 1.0, same_kind)


def _role(layer: str) -> str:
    """What is behind the first number of a name, without numbers: encoder.layer.3.output.dense -> output.dense."""
    parts = layer.split(".")
    first = next((place for place, part in enumerate(parts) if part.isdigit()), -1)
    return re.sub(r"\d+", "#", ".".join(parts[first + 1 :]))


def _chosen(prior: np.ndarray, share: float) -> list[np.ndarray]:
    """DRAWN choices of layers: one at random from each of as many equal parts of the order by `prior`."""
    generator = np.random.default_rng(SEED)
    parts = np.array_split(np.argsort(prior), max(2, round(share * len(prior))))
    return [np.array([generator.choice(part) for part in parts]) for _ in range(DRAWN)]


def _filled_in(prior: np.ndarray, measured: np.ndarray, kernel: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Scores of all layers from the gains of those in `chosen`."""
    gain, known = _standard(measured[chosen]), prior[chosen] - prior[chosen].mean()
    slope = (known @ gain / len(gain) + SLOPE_WEIGHT / len(gain) * SLOPE * known.var()) / (
        known.var() * (1 + SLOPE_WEIGHT / len(gain))
    )
    expected = slope * (prior - prior[chosen].mean())
    ridge = KernelRidge(alpha=NOISE, kernel="precomputed")
    ridge.fit(kernel[np.ix_(chosen, chosen)], gain - expected[chosen])
    return expected + ridge.predict(kernel[:, chosen])


def _standard(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / (values.std() + 1e-12)


def _normal(values: np.ndarray) -> np.ndarray:
    """Normal scores: ranks alone count."""
    return stats.norm.ppf(stats.rankdata(values) / (len(values) + 1))


def part_text(document: dict[str, Any]) -> str:
    """The table of docs/results.md."""

    def cell(value: dict[str, Any] | None) -> str:
        if value is None:
            return ""
        low, high = value["interval"]
        return f"{value['mean']:.2f} ({low:.2f} to {high:.2f})"

    rows = [
        [
            result["way"],
            "" if result["share"] is None else f"{result['share']:.0%}",
            cell(result["tau"]),
            cell(result["top"]),
        ]
        for result in document["results"]
    ]
    return markdown_table(["what is known", "share of a sweep", "tau", "gain that the first five recover"], rows)


if __name__ == "__main__":
    main()
