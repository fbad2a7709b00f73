"""What a probe takes of a sweep's time, on the same layers and samples: `python -m bench.probe_share`.

The sweep is by the default recipe with prefix reuse; of one seed, one part in SHARE of its steps, training samples and
scored samples is timed, and multiplied. The sweep's head and profiles are made before the clock starts, the probe's
head counts. Processor seconds, interleaved, so that other jobs beside it matter little.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.data import load_pair
from bench.measure import RESULTS, write_result
from bench.probes import BUDGET, SAMPLES
from zest_fast.benchmarking.timing import interleave, median, ratio
from zest_fast.foundation.text_table import markdown_table
from zest_fast.prefix.inputs import rows_of
from zest_fast.probing.probe import probe
from zest_fast.sweeping.recipe import Recipe
from zest_fast.sweeping.sweep import sweep
from zest_fast.sweeping.trials import draw

PAIRS = ("minilm/trec", "efficientnet-lite0/fashion", "mobilenet-v2/mnist", "face-resnet/fashion")
SHARE = 4
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", default=PAIRS, metavar="MODEL/DATASET")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {"share_of_a_seed": SHARE, "rounds": ROUNDS, "samples": SAMPLES, "budget": BUDGET, "clock": "processor"}
    results: list[dict[str, Any]] = []
    for pair in options.pairs:
        results.append(measure(pair))
        write_result("probe_share", settings, results, options.out)


def measure(pair: str) -> dict[str, Any]:
    """Seconds of a probe and of the timed part of a sweep, and what the whole sweep takes, multiplied."""
    model, splits = load_pair(*pair.split("/"))
    inputs, targets = splits["train"]
    rows = draw(len(targets), min(SAMPLES, len(targets)), 0)
    batches = [(rows_of(inputs, rows), targets[rows])]
    scored, labels = splits["score"]
    few = torch.arange(len(labels) // SHARE)
    splits = {**splits, "score": (rows_of(scored, few), labels[few])}
    whole = Recipe()
    assert whole.train_samples is not None
    part = replace(whole, seeds=(0,), steps=whole.steps // SHARE, train_samples=whole.train_samples // SHARE)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "records.jsonl")
        frame = sweep(model, splits, recipe=part, out=path)
        begun = [line for line in path.read_bytes().splitlines(True) if b'"record":"layer"' not in line]

        def swept() -> None:
            path.write_bytes(b"".join(begun))
            sweep(model, splits, recipe=part, out=path)

        runs = {"probe": lambda: probe(model, batches, budget=BUDGET, progress=False), "sweep": swept}
        times = interleave(runs, ROUNDS, warmup=0, clock=time.process_time)
    found = ratio(times, "probe", "sweep").as_dict()
    times_of_part = SHARE * len(whole.seeds)  # in a whole sweep
    result = {
        "pair": pair,
        "layers": int(frame.layer.nunique()),
        "seconds": {name: median(values).as_dict() for name, values in times.items()},
        "share": {key: found[key] / times_of_part for key in ("median", "low", "high")},
    }
    print(f"{pair}: {result['share']['median']:.1%} of a sweep's time", flush=True)
    return result


def share_text(document: dict[str, Any]) -> str:
    """The table of docs/probe.md."""
    times = document["settings"]["share_of_a_seed"] * len(Recipe().seeds)
    rows = [
        [
            row["pair"],
            str(row["layers"]),
            f"{row['seconds']['probe']['median']:.1f}",
            f"{times * row['seconds']['sweep']['median']:.0f}",
            f"{row['share']['median']:.1%}",
        ]
        for row in document["results"]
    ]
    return markdown_table(["pair", "layers", "probe, s", "sweep, s (a part of it timed)", "share"], rows)


if __name__ == "__main__":
    main()
