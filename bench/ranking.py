"""Rankings against contribution records: the protocol of bench/ranking_protocol.py, run over every fold.

python -m bench.ranking                          # the records that ship; seven minutes on one thread
python -m bench.ranking --records mine.parquet   # as `bench.sweeps --consolidate` writes them
python -m bench.readme                           # its table and plot into docs/results.md

Writes bench/results/ranking.json: every pair, contestant, setting and state of the head, their means with intervals,
the goals with met or missed, and what explains each pair.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas
import torch
from joblib import Parallel, delayed

from bench.measure import RESULTS, describe_machine, describe_versions
from bench.ranking_baselines import Contestant, SignedMetric, Spectra, contestants
from bench.ranking_diagnosis import diagnose, targets
from bench.ranking_goals import goals
from bench.ranking_measures import Bootstrap, recovered_gain, tau_b
from bench.ranking_protocol import (
    DRAWS,
    HEAD_STATES,
    OUTCOMES,
    SEED,
    TOP,
    Fold,
    Pair,
    folds,
    pairs_in,
    protocol_hash,
    rows_of,
)
from bench.ranking_protocol import __doc__ as PROTOCOL
from bench.ranking_records import mean_gain, profiles
from bench.spectra import CACHE, load_spectra
from zest_fast.foundation.replacing import replacing
from zest_fast.sweeping.tables import SHIPPED, load_records, sweeps_of

MEASURES = ("tau", *(f"top_{n}" for n in TOP))
Contest = Callable[[pandas.DataFrame, Spectra], dict[str, Contestant]]


def main(arguments: list[str] | None = None, contest: Contest = contestants) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=SHIPPED, help="a Parquet file of contribution records")
    parser.add_argument("--spectra", type=Path, default=CACHE, help="spectra of the models; what it lacks is computed")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of ranking.json")
    parser.add_argument("--jobs", type=int, default=1, help="folds at a time; a thread each")
    options = parser.parse_args(arguments)
    records = load_records(options.records)
    spectra = load_spectra(sorted(records.model.unique()), options.spectra)
    document = _origin(options.records) | evaluate(records, spectra, contest, jobs=options.jobs)
    options.out.mkdir(parents=True, exist_ok=True)
    write(document, options.out / "ranking.json")
    for goal in document["must_reach"]:
        print(f"{'met   ' if goal['met'] else 'MISSED'} {goal['setting']}, {goal['goal']}: {goal['value']:.3f}")


def evaluate(
    records: pandas.DataFrame, spectra: Spectra, contest: Contest = contestants, *, jobs: int = 1
) -> dict[str, object]:
    """Every fold of the protocol -> the parts of the document that the records decide.

    Raises ValueError where the records hold no pair of the protocol, or too few to hold one out.
    """
    began = time.perf_counter()
    pairs, left_out = pairs_in(records)
    every = list(folds(pairs))
    if not every:
        raise ValueError(f"records of {[pair.name for pair in pairs]}: there is nothing to hold out, sweep more pairs")
    runs = Parallel(n_jobs=jobs, return_as="generator")(
        delayed(_timed_fold)(fold, records, spectra, contest) for fold in every
    )
    rows = []
    for fold, (of_fold, seconds) in zip(every, runs, strict=True):
        print(f"{fold.setting}, {fold.held_out} held out: {len(fold.test)} pairs, {seconds:.0f} s", flush=True)
        rows += of_fold
    results = pandas.DataFrame(rows)
    truth = targets(records, pairs)
    summary = summarise(results, truth)
    return {
        "left_out": left_out,
        "not_known": sorted({pair.name for pair in pairs} - set(results[results.setting == "known models"].pair)),
        "seconds": round(time.perf_counter() - began, 1),
        "must_reach": goals(summary, results),
        "summary": summary,
        "diagnosis": diagnose(truth, results),
        "results": _nested(results),
    }


def _timed_fold(*arguments) -> tuple[list[dict], float]:
    """`run_fold` on one thread, and its seconds."""
    began, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run_fold(*arguments), time.perf_counter() - began
    finally:
        torch.set_num_threads(threads)


def run_fold(fold: Fold, records: pandas.DataFrame, spectra: Spectra, contest: Contest) -> list[dict]:
    """Fit every contestant on the training pairs; a row for each contestant, test pair and state of the head."""
    train, test = rows_of(records, fold.train), rows_of(records, fold.test)
    gains = mean_gain(test)
    unseen = test.drop(columns=list(OUTCOMES))
    fitted = {name: contestant.fit(train) for name, contestant in contest(records, spectra).items()}
    if fold.setting != "known models":
        fitted.pop("layer prior", None)  # it has nothing to say of a model without records
    families = {(pair.model, pair.dataset): pair for pair in fold.test}
    values = []
    for (model, dataset, _, state), profile in profiles(unseen):
        truth = gains[profile.index].to_numpy()
        for name, contestant in fitted.items():
            place = _place(fold, families[model, dataset], state, name, contestant)
            values.append(place | measure(contestant.predict(profile), truth))
    keys = [key for key in values[0] if key not in MEASURES]
    return pandas.DataFrame(values).groupby(keys, sort=False, dropna=False).mean().reset_index().to_dict("records")


def _place(fold: Fold, pair: Pair, state: str, name: str, contestant: Contestant) -> dict[str, str]:
    """What identifies a value, and which metric was chosen where there was a choice."""
    several = isinstance(contestant, SignedMetric) and len(contestant.candidates) > 1
    return {
        "setting": fold.setting,
        "held_out": fold.held_out,
        "pair": pair.name,
        "head_state": state,
        "contestant": name,
        "chosen": contestant.choice(pair.model, state)[0] if several else "",
    }


def measure(scores: np.ndarray, gains: np.ndarray) -> dict[str, float]:
    """Tau and recovered gains of one profile's scores; both [layers]. Raises ValueError where their shapes differ."""
    if np.shape(scores) != gains.shape:
        raise ValueError(f"{len(gains)} layers were to be scored, the scores have shape {list(np.shape(scores))}")
    return {"tau": tau_b(scores, gains)} | {f"top_{n}": recovered_gain(scores, gains, n) for n in TOP}


def summarise(results: pandas.DataFrame, truth: pandas.DataFrame) -> dict[str, dict[str, dict]]:
    """setting -> state of the head -> attainable tau, and each contestant's means, intervals and the Ranker's lead."""
    summary: dict[str, dict[str, dict]] = {}
    for setting in results.setting.unique():
        for state in HEAD_STATES:
            part = results[(results.setting == setting) & (results.head_state == state)]
            summary.setdefault(setting, {})[state] = _summary(part, truth)
    return summary


def _summary(part: pandas.DataFrame, truth: pandas.DataFrame) -> dict[str, object]:
    tables = {name: part.pivot(index="pair", columns="contestant", values=name) for name in MEASURES}
    pairs = tables["tau"].index
    folds_of = part.drop_duplicates("pair").set_index("pair").held_out[pairs].tolist()
    draws = {
        "interval": Bootstrap(len(pairs), draws=DRAWS, seed=SEED),
        "interval_over_folds": Bootstrap(len(pairs), draws=DRAWS, seed=SEED, clusters=folds_of),
    }

    def described(values: pandas.Series) -> dict[str, object]:
        found = values.to_numpy()
        return {"mean": _rounded(found.mean())} | {
            name: [_rounded(end) for end in bootstrap.interval(found)] for name, bootstrap in draws.items()
        }

    return {
        "pairs": len(pairs),
        "folds": len(set(folds_of)),
        "attainable_tau": _rounded(truth.attainable_tau[pairs].mean()),
        "contestants": {
            contestant: {name: described(table[contestant]) for name, table in tables.items()}
            | {"ranker_ahead": {n: described(t["ranker"] - t[contestant]) for n, t in tables.items()}}
            for contestant in part.contestant.unique()
        },
    }


def _nested(results: pandas.DataFrame) -> list[dict]:
    """One entry for each setting, pair and state: measure -> contestant -> value."""
    entries = []
    for (setting, held_out, pair, state), part in results.groupby(["setting", "held_out", "pair", "head_state"]):
        names = part.contestant
        values = {m: {n: _rounded(v) for n, v in zip(names, part[m], strict=True)} for m in MEASURES}
        chosen = dict(part[part.chosen != ""][["contestant", "chosen"]].itertuples(index=False))
        place = {"setting": setting, "held_out": held_out, "pair": pair, "head_state": state}
        entries.append(place | {"chosen": chosen} | values)
    return entries


def _rounded(value: float) -> float:
    return round(float(value), 4)


def _origin(path: Path) -> dict[str, object]:
    sweeps = sweeps_of(path)
    return {
        "benchmark": "ranking",
        "command": " ".join(["python", "-m", "bench.ranking", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": describe_machine(),
        "versions": describe_versions()
        | {name: version(name) for name in ("lightgbm", "scikit-learn", "scipy", "pandas")},
        "protocol": {"file": "bench/ranking_protocol.py", "sha256": protocol_hash(), "text": PROTOCOL},
        "records": {
            "file": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "pairs": len(sweeps),
            "recipes": {sweep["model"]: sweep["recipe_hash"] for sweep in sweeps},
        },
    }


def write(document: dict[str, object], path: Path) -> None:
    """JSON with a line for each entry of the results, which are thousands of numbers."""
    lines = [json.dumps(entry, allow_nan=False) for entry in document["results"]]
    text = json.dumps(document | {"results": []}, indent=1, allow_nan=False, ensure_ascii=False)
    head, empty, tail = text.rpartition('"results": []')
    with replacing(path) as temporary:
        temporary.write_text(head + empty[:-1] + "\n" + ",\n".join(lines) + "\n ]" + tail + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
