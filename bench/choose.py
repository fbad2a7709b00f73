"""What `choose(prefer="cheap-cut")` saves on the records, and what it costs in gain.

python -m bench.choose                 # every pair of the shipped records; needs the packages of bench.data
python -m bench.choose --n 5 --models minilm

Each profile is ranked by a Ranker that was fitted without its family of data sets. FLOPs are planned for the model and
batch of the sweep. The gain of a set of layers is the mean of what each brings alone (loss of head only minus loss,
mean over seeds); recovered = 0 for layers drawn at random, 1 for the best n. PRICE, the one constant of the choice,
stands in zest_fast/finetuning/choose.py and was fixed on simulated rankings before any record was looked at; the JSON
has other prices as well, for whoever asks how much hangs on it.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch

from bench.data import IMAGE_SIZE, MODELS
from bench.measure import write_result
from zest_fast.finetuning import choose
from zest_fast.finetuning.step_costs import StepCosts, measured_costs
from zest_fast.profiling.layer_profile import LayerProfile
from zest_fast.profiling.metrics import METRICS
from zest_fast.ranking.ranking import rank
from zest_fast.sweeping.tables import load_records

INFO = ("numel", "kind", "depth", "uses", "shape", "head", "trainable", "shared_with", "parameter", "module")
OTHER_PRICES = (0.5, 1.0, 4.0)
BATCH = 32  # samples; the ratio of FLOPs does not depend on it
HEAD_STATE = "fresh"  # as users profile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, help="a Parquet file of records instead of the shipped ones")
    parser.add_argument("--models", nargs="+", help="only these models are evaluated; all are trained on")
    parser.add_argument("--n", nargs="+", type=int, default=[3, 5, 10])
    parser.add_argument("--out", type=Path, help="folder of the JSON instead of bench/results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    from zest_fast import Ranker

    records = load_records(arguments.records)
    rows = list(evaluate(records, Ranker, planned_costs, arguments.n, arguments.models))
    settings = {
        "price": choose.PRICE,
        "head_state": HEAD_STATE,
        "pairs": len({(r["model"], r["dataset"]) for r in rows}),
    }
    settings["mean"] = {f"n={n}, price={price}": summary(rows, n, price) for n in arguments.n for price in _prices()}
    path = write_result("choose", settings, rows, arguments.out)
    for n in arguments.n:
        print(f"n={n}: {summary(rows, n, choose.PRICE)}")
    print(path)


def evaluate(
    records: pandas.DataFrame,
    make_ranker: Callable[[], Any],
    costs_of: Callable[[str], StepCosts],
    sizes: list[int],
    models: list[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """A row for each pair, n and price, means over the seeds.

    make_ranker: an unfitted Ranker. costs_of: of a model, at the size of its sweeps.
    """
    gains = records[records.head_state == HEAD_STATE].assign(gain=lambda rows: rows.head_loss - rows.loss)
    contribution = gains.groupby(["model", "dataset", "layer"]).gain.mean()
    for family, held_out in records.groupby("family"):
        ranker = make_ranker().fit(records[records.family != family])
        for (model, dataset), pair in held_out[held_out.head_state == HEAD_STATE].groupby(["model", "dataset"]):
            if models and model not in models:
                continue
            costs, gain = costs_of(model), contribution[model, dataset]
            rankings = [rank(profile_of(rows), by=ranker) for _, rows in pair.groupby("seed")]
            for n in (n for n in sizes if n <= len(gain)):
                for price in _prices():
                    found = pandas.DataFrame([_compare(ranking, n, costs, gain, price) for ranking in rankings])
                    means = found.mean().round(6).to_dict()
                    yield {"model": model, "dataset": dataset, "family": family, "n": n, "price": price, **means}


def _compare(ranking: Any, n: int, costs: StepCosts, gain: pandas.Series, price: float) -> dict[str, float]:
    candidates = choose.Candidates(ranking, n, costs, price)
    top, cheap = candidates.sets()[0], candidates.cheap_cut()
    return {
        "flops_saved": 1 - costs.step(cheap) / costs.step(top),
        "recovered_top": recovered(top, gain),
        "recovered_cheap": recovered(cheap, gain),
        "step_top": costs.step(top) / costs.full,
        "step_cheap": costs.step(cheap) / costs.full,
        "exchanged": len(set(top) - set(cheap)),
    }


def recovered(names: tuple[str, ...], gain: pandas.Series) -> float:
    """Share of the best n layers' gain: 0 as layers at random, 1 as the best."""
    at_random, best = gain.mean(), gain.nlargest(len(names)).mean()
    return float((gain[list(names)].mean() - at_random) / (best - at_random))


def summary(rows: list[dict[str, Any]], n: int, price: float) -> dict[str, float]:
    """Means over the pairs; the gain lost has a 95 % interval from resampling pairs."""
    frame = pandas.DataFrame(rows)
    frame = frame[(frame.n == n) & (frame.price == price)]
    lost = (frame.recovered_top - frame.recovered_cheap).to_numpy()
    draws = np.random.default_rng(0).integers(len(lost), size=(2000, len(lost)))
    low, high = np.quantile(lost[draws].mean(axis=1), [0.025, 0.975])
    saved = 1 - frame.step_cheap.mean() / frame.step_top.mean()
    means = {"flops_saved": saved, "gain_lost": lost.mean(), "gain_lost_low": low, "gain_lost_high": high}
    means |= {"recovered_top": frame.recovered_top.mean(), "recovered_cheap": frame.recovered_cheap.mean()}
    return {name: round(float(value), 4) for name, value in means.items()}


def profile_of(rows: pandas.DataFrame) -> LayerProfile:
    """The profile that the records of one model, data set, seed and head hold."""
    rows = rows.sort_values("depth")
    metrics = [name for name in METRICS if name in rows and rows[name].notna().any()]
    info = {row["layer"]: {name: row[name] for name in INFO if name in row} for row in rows.to_dict("records")}
    return LayerProfile(
        rows.layer.tolist(),
        metrics,
        rows[metrics].to_numpy(),
        info=info,
        loss=float(rows.head_loss.iloc[0]),
        backend="records",
        uncovered={},
    )


@functools.cache
def planned_costs(name: str) -> StepCosts:
    """Of a model of bench.data at the size of its sweeps; the number of classes changes the head alone."""
    model = MODELS[name]
    samples = (
        ["a"] * BATCH if model.kind == "text" else torch.zeros(BATCH, IMAGE_SIZE, IMAGE_SIZE, 3, dtype=torch.uint8)
    )
    return measured_costs(model.load(2), (model.prepare(samples), torch.zeros(BATCH, dtype=torch.long)))


def _prices() -> tuple[float, ...]:
    return (choose.PRICE, *OTHER_PRICES)


if __name__ == "__main__":
    main()
