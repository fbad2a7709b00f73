"""Probes of the pairs in the records: what `zest_fast.probe` says of the layers that sweeps have scored.

python -m bench.probes --out probes.jsonl                       # every pair; run it again and it goes on
python -m bench.probes --out probes.jsonl --pairs minilm/trec   # only these
python -m bench.probes --out probes.jsonl --into zest_fast/sweeping/data/records.parquet   # as columns of the records

The samples are drawn from the split that layers are trained on in a sweep; what a sweep scores is not looked at. The
classifier has a fresh head, as a user's has; the probe fits its own.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import pandas
import pyarrow
import torch
from pyarrow import parquet

from bench.data import MODELS, load_pair
from bench.sweeps import MATMUL_PRECISION
from zest_fast import load_records, probe, sweeps_of
from zest_fast.foundation.replacing import replacing
from zest_fast.prefix.inputs import rows_of
from zest_fast.ranking.probed import PROBED
from zest_fast.sweeping.trials import draw

SAMPLES = 1024
BUDGET = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a JSON document a line for each pair and seed")
    parser.add_argument("--pairs", nargs="+", metavar="MODEL/DATASET", help="default: all in the records")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=BUDGET)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--into", type=Path, metavar="PARQUET", help="write what is in --out into these records")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.into is not None:
        return add(arguments.into, _lines(arguments.out))
    done = {(line["pair"], line["seed"]) for line in _lines(arguments.out)}
    for pair in arguments.pairs or _pairs():
        if (pair, arguments.seed) in done:
            continue
        line = measure(pair, seed=arguments.seed, budget=arguments.budget, samples=arguments.samples)
        with arguments.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        words = f"{len(line['layers'])} layers, {line['seconds']:.0f} s, {line['cost']:.1%} of a sweep"
        print(f"{pair}: {words}", flush=True)


def measure(
    pair: str,
    *,
    seed: int,
    budget: float,
    samples: int,
    shuffled: bool = False,
    records: pandas.DataFrame | None = None,
) -> dict[str, Any]:
    """One pair's probe, ready for JSON.

    shuffled: with its labels in another order, for a control. records: of the sweep, whose layers are probed; None =
    those that ship.
    """
    model_name, dataset_name = pair.split("/")
    model, splits = load_pair(model_name, dataset_name)
    records = load_records() if records is None else records
    swept = set(records.layer[(records.model == model_name) & (records.dataset == dataset_name)])
    inputs, targets = splits["train"]
    rows = draw(len(targets), min(samples, len(targets)), seed)
    labels = targets[rows]
    if shuffled:
        labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(MATMUL_PRECISION.get(MODELS[model_name].family, "highest"))
    try:
        began = time.perf_counter()
        found = probe(
            model,
            [(rows_of(inputs, rows), labels)],
            layers=sorted(swept),
            budget=budget,
            seed=seed,
            progress=False,
        )
        seconds = time.perf_counter() - began
    finally:
        torch.set_float32_matmul_precision(before)
    return {
        "pair": pair,
        "seed": seed,
        "cost": found.cost,
        "seconds": round(seconds, 2),
        "start": found.start,
        "settings": dict(found.settings),
        "notes": list(found.notes),
        "rate": found.rate,
        "by_rate": {
            f"{rate:g}": [[float(f"{value:.5g}") for value in row] for row in values]
            for rate, values in found.by_rate.items()
        },
        "layers": {
            name: [float(score), float(gain), float(error)]
            for name, score, gain, error in zip(found.names, found.scores, found.gains, found.errors, strict=True)
        },
    }


def add(path: Path, lines: list[dict[str, Any]]) -> None:
    """Write the scores into the records at `path`, as their column "probe_score": the mean over the seeds of a pair.

    Raises ValueError where a probe is of other layers than the records.
    """
    table = parquet.read_table(path)
    keys = list(zip(*(table.column(name).to_pylist() for name in ("model", "dataset", "layer")), strict=True))
    scores: dict[tuple[str, ...], list[float]] = {}
    for line in lines:
        pair = tuple(line["pair"].split("/"))
        swept = {layer for *of, layer in keys if tuple(of) == pair}
        if swept and swept != set(line["layers"]):
            raise ValueError(f"{line['pair']}: the probe is of other layers than the records: {sorted(swept)[:3]} ...")
        for layer, (score, *_) in line["layers"].items():
            scores.setdefault((*pair, layer), []).append(score)
    means = {key: sum(values) / len(values) for key, values in scores.items()}
    column = pyarrow.array([means.get(key) for key in keys], pyarrow.float64())
    if PROBED in table.schema.names:
        table = table.drop_columns([PROBED])
    with replacing(path) as temporary:
        parquet.write_table(table.append_column(PROBED, column), temporary, compression="zstd")


def _pairs() -> list[str]:
    """Small models first."""
    return [
        f"{sweep['model']}/{sweep['dataset']}" for sweep in sorted(sweeps_of(), key=lambda s: s["model"] == "smollm2")
    ]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    main()
