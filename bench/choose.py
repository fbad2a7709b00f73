"""What `choose(prefer="cheap-cut")` saves on the records, and what it costs in gain.

python -m bench.choose                 # every pair of the shipped records; needs the packages of bench.data
python -m bench.choose --n 5 --models minilm

Each profile is ranked by a Ranker that was fitted without its family of data sets. FLOPs are planned for the model and
batch of the sweep. The gain of a set of layers is the mean of what each brings alone (loss of head only minus loss,
mean over seeds); recovered = 0 for layers drawn at random, 1 for the best n. PRICE, the one constant of the choice,
stands in zest_fast/finetuning/choose.py and was fixed on simulated rankings before any record was looked at; the JSON
has other prices as well, for whoever asks how much hangs on it. "possible" is what no choice among the same sets (the n
best of the ranking above a cut) can exceed, even if it knew what every layer brings.
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
from zest_fast.foundation.text_table import markdown_table
from zest_fast.planning import choose
from zest_fast.planning.step_costs import StepCosts, measured_costs
from zest_fast.profiling.layer_profile import LayerProfile
from zest_fast.profiling.metrics import METRICS
from zest_fast.ranking.ranking import rank
from zest_fast.sweeping.tables import load_records

INFO = ("numel", "kind", "depth", "uses", "shape", "head", "trainable", "shared_with", "parameter", "module")
OTHER_PRICES = (0.5, 1.0, 4.0)
BATCH = 32  # samples; the ratio of FLOPs does not depend on it
HEAD_STATE = "fresh"  # as users profile
GAIN_LOST = 0.02
"""Of the recovered gain: for so much a fifth of the FLOPs was asked for."""


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
    possible = {n: round(possible_saving(rows, n), 4) for n in arguments.n}
    for row in rows:
        del row["sets"]
    settings = {
        "price": choose.PRICE,
        "head_state": HEAD_STATE,
        "pairs": len({(r["model"], r["dataset"]) for r in rows}),
    }
    settings["mean"] = {f"n={n}, price={price}": summary(rows, n, price) for n in arguments.n for price in _prices()}
    settings["possible"] = {f"n={n}": possible[n] for n in arguments.n} | {"gain_lost": GAIN_LOST}
    path = write_result("choose", settings, rows, arguments.out)
    for n in arguments.n:
        print(f"n={n}: {summary(rows, n, choose.PRICE)}; possible: {possible[n]}")
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
                    row = {"model": model, "dataset": dataset, "family": family, "n": n, "price": price}
                    yield row | found.drop(columns="sets").mean().round(6).to_dict() | {"sets": found.sets.tolist()}


def _compare(ranking: Any, n: int, costs: StepCosts, gain: pandas.Series, price: float) -> dict[str, Any]:
    candidates = choose.Candidates(ranking, n, costs, price)
    sets, cheap = candidates.sets(), candidates.cheap_cut()
    top = sets[0]
    return {
        "flops_saved": 1 - costs.step(cheap) / costs.step(top),
        "recovered_top": recovered(top, gain),
        "recovered_cheap": recovered(cheap, gain),
        "step_top": costs.step(top) / costs.full,
        "step_cheap": costs.step(cheap) / costs.full,
        "exchanged": len(set(top) - set(cheap)),
        "sets": np.array([(costs.step(names) / costs.full, recovered(names, gain)) for names in sets]),
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


def possible_saving(rows: list[dict[str, Any]], n: int, lost: float = GAIN_LOST) -> float:
    """No choice of one set for each ranking saves more of the FLOPs, as `summary` counts them, for `lost` of the gain.

    By weak duality: whatever a unit of gain is priced at, the best saving net of that price is a bound; the least such
    bound is returned.
    """
    rankings = [(sets, 1 / len(row["sets"])) for row in rows if row["n"] == n and row["price"] == choose.PRICE
                for sets in row["sets"]]  # fmt: skip
    pairs = sum(share for _, share in rankings)
    top = sum(share * sets[0, 0] for sets, share in rankings) / pairs

    def bound(price: float) -> float:
        net = sum(
            share * ((sets[0, 0] - sets[:, 0]) / top - price * (sets[0, 1] - sets[:, 1])).max()
            for sets, share in rankings
        )
        return net / pairs + price * lost

    return min(map(bound, np.geomspace(0.01, 100, 400)))


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


def choose_text(document: dict) -> str:
    """The table of docs/results.md."""
    means, possible = document["settings"]["mean"], document["settings"]["possible"]
    rows = []
    for n in (key for key in possible if key.startswith("n=")):
        mean = means[f"{n}, price={document['settings']['price']}"]
        lost = f"{mean['gain_lost']:.3f} ({mean['gain_lost_low']:.3f} to {mean['gain_lost_high']:.3f})"
        rows.append([n[2:], f"{mean['flops_saved']:.1%}", lost, f"{mean['recovered_top']:.2f}", f"{possible[n]:.1%}"])
    lost = f"possible for {possible['gain_lost']:.2f}"
    table = markdown_table(["n", "FLOPs saved", "recovered gain lost", "recovered by the n best", lost], rows)
    return (
        f"{table}\n\nMeans over {document['settings']['pairs']} pairs, ranked by Rankers that had not seen the data "
        "set; gain: 0 = layers at random, 1 = the best n. *Possible*: what no choice among the n best above any cut "
        "can exceed, even one that knew what every layer brings: a step costs its forward pass in any case, and these "
        "models have good layers far down."
    )


def _prices() -> tuple[float, ...]:
    return (choose.PRICE, *OTHER_PRICES)


if __name__ == "__main__":
    main()
