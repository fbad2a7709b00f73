"""The Ranker and the probe that ship, on pairs that neither has seen: `python -m bench.probe_blind --records NEW`.

NEW: a Parquet file of what `python -m bench.sweeps --out FOLDER --pairs MODEL/DATASET` swept after both were fixed,
consolidated.
Pairs that the shipped records hold are refused: they are not blind.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch

from bench.layerbench.measures import recovered_gain, reliability, tau_b
from bench.layerbench.protocol import OUTCOMES
from bench.layerbench.rivals import Middle
from bench.measure import RESULTS, write_result
from bench.probes import BUDGET, SAMPLES, measure
from zest_fast import Probe, Ranker, load_records
from zest_fast.foundation.text_table import markdown_table
from zest_fast.ranking.shipped import shipped_ranker

NAMES = {
    "probed": "the Ranker with a probe",
    "probe": "the probe alone",
    "ranker": "the Ranker, one batch",
    "numel": "number of parameters",
    "middle": "middle first",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, required=True, help="sweeps of other pairs than those that ship")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    swept, shipped = load_records(options.records), load_records()
    ranker = shipped_ranker("there is nothing to judge without it")
    results = []
    for (model, dataset), rows in swept.groupby(["model", "dataset"]):
        if ((shipped.model == model) & (shipped.dataset == dataset)).any():
            raise ValueError(f"{model}/{dataset} is among the records that ship: its layers are not unseen")
        line = measure(f"{model}/{dataset}", seed=0, budget=BUDGET, samples=SAMPLES, records=swept)
        results.append({"pair": f"{model}/{dataset}", "cost": line["cost"], **judged(rows, line, ranker)})
        print(results[-1], flush=True)
        write_result("probe_blind", {"samples": SAMPLES, "budget": BUDGET}, results, options.out)


def judged(rows: pandas.DataFrame, line: dict[str, Any], ranker: Ranker) -> dict[str, Any]:
    """Tau and the top 5's share of the best 5's gain of each of NAMES, mean over the seeds' profiles with a fresh head.

    Args:
        rows: records of one pair.
        line: its probe, as `bench.probes.measure` has it.
        ranker: fitted to others.
    """
    fresh = rows[rows.head_state == "fresh"]
    by_seed = -fresh.pivot(index="seed", columns="layer", values="loss")
    names = tuple(line["layers"])
    scores, gains, errors = (np.array([line["layers"][name][part] for name in names]) for part in range(3))
    probe = Probe(names, scores, gains, errors, rate=line["rate"], start=line["start"])
    taus: dict[str, list[float]] = {name: [] for name in NAMES}
    tops: dict[str, list[float]] = {name: [] for name in NAMES}
    for _, profile in fresh.groupby("seed"):
        seen = profile.drop(columns=list(OUTCOMES), errors="ignore").set_index("layer", drop=False)
        truth = by_seed.mean()[list(seen.layer)].to_numpy()
        found = {
            "probed": ranker.predict(seen, probe),
            "probe": probe.of(tuple(seen.layer)),
            "ranker": ranker.predict(seen),
            "numel": seen.numel.to_numpy(np.float64),
            "middle": Middle().predict(seen),
        }
        for name, values in found.items():
            taus[name].append(tau_b(values, truth))
            tops[name].append(recovered_gain(values, truth, 5))
    return {
        "layers": len(names),
        "reliability": round(reliability(by_seed.to_numpy()), 3),
        "tau": {name: round(float(np.mean(values)), 3) for name, values in taus.items()},
        "top_5": {name: round(float(np.mean(values)), 3) for name, values in tops.items()},
    }


def blind_text(document: dict[str, Any]) -> str:
    """The table of docs/probe.md."""
    rows = [
        [row["pair"], what, f"{row['tau'][name]:.2f}", f"{row['top_5'][name]:.2f}"]
        for row in document["results"]
        for name, what in NAMES.items()
    ]
    return markdown_table(["pair", "layers ranked by", "tau", "top 5 recover"], rows)


if __name__ == "__main__":
    main()
