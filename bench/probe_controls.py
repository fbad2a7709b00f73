"""Probes whose labels say nothing, held against what layers really gain: `python -m bench.probe_controls`.

What a probe with shuffled labels still orders, it did not read from the labels. Beside it, the probe with its own
labels (bench/results/probes.jsonl) and the number of parameters, which reads nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.layerbench.measures import tau_b
from bench.measure import RESULTS, write_result
from bench.probes import BUDGET, SAMPLES, measure
from zest_fast import load_records
from zest_fast.foundation.text_table import markdown_table

PAIRS = (
    "splade-tiny/trec",
    "nanoguard/trec",
    "face-resnet/fashion",
    "mobilenet-v3/mnist",
    "dense-landmarks/mnist",
    "mobilenet-v2/mnist",
    "tiny-xception/animals",
    "thin-resnet50/fashion",
    "efficientnet-lite0/fashion",
    "minilm/trec",
)
COLUMNS = {"probe": "the probe", "shuffled": "labels shuffled", "numel": "number of parameters"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", default=PAIRS, metavar="MODEL/DATASET")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = [json.loads(line) for line in (RESULTS / "probes.jsonl").read_text().splitlines()]
    own = {line["pair"]: line for line in lines if line["seed"] == 0}
    results = []
    for pair in options.pairs:
        control = measure(pair, seed=0, budget=BUDGET, samples=SAMPLES, shuffled=True)
        results.append({"pair": pair, **taus(pair, own[pair]["layers"], control["layers"])})
        print(results[-1], flush=True)
        write_result("probe_controls", {"samples": SAMPLES, "budget": BUDGET}, results, options.out)


def taus(pair: str, probed: dict[str, list[float]], shuffled: dict[str, list[float]]) -> dict[str, float]:
    """Kendall's tau of each with the mean gain of the layers; of a probe, layer -> score, gain and error."""
    model, _, dataset = pair.partition("/")
    records = load_records()
    by_layer = records[(records.model == model) & (records.dataset == dataset)].groupby("layer")
    names = list(probed)
    gains = -by_layer.loss.mean()[names].to_numpy()
    scores = {
        name: np.array([found[layer][0] for layer in names])
        for name, found in (("probe", probed), ("shuffled", shuffled))
    }
    scores["numel"] = by_layer.numel.first()[names].to_numpy()
    return {name: round(tau_b(values, gains), 4) for name, values in scores.items()}


def controls_text(document: dict[str, Any]) -> str:
    """The table of docs/probe.md."""
    rows = [[row["pair"], *(f"{row[name]:.2f}" for name in COLUMNS)] for row in document["results"]]
    means = [f"{statistics.mean(row[name] for row in document['results']):.2f}" for name in COLUMNS]
    return markdown_table(["tau", *COLUMNS.values()], [*rows, ["mean", *means]])


if __name__ == "__main__":
    main()
