"""Rankings against contribution records: the protocol of bench/layerbench/protocol.py, run over every fold.

python -m bench.layerbench evaluate                          # the records that ship; half an hour on one thread
python -m bench.layerbench evaluate --records mine.parquet   # as `bench.sweeps --consolidate` writes them
python -m bench.readme                                       # its table and plot into docs/results.md

Writes bench/results/layerbench.json: every pair, contestant, setting and state of the head, their means with intervals,
the goals with met or missed, and what explains each pair.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from joblib import Parallel, delayed

from bench.layerbench.baselines import Contestant, SignedMetric, Spectra, contestants
from bench.layerbench.control_contestants import PATH as CONTROL_PROFILES
from bench.layerbench.control_contestants import ControlProfiles, control_profiles, control_scores
from bench.layerbench.diagnosis import diagnose, targets
from bench.layerbench.fitted import fit
from bench.layerbench.goals import OF_PROBES, goals
from bench.layerbench.measures import Bootstrap, kept_gain, recovered_gain, tau_b
from bench.layerbench.profiles import by_block, mean_gain, profiles, with_start_losses
from bench.layerbench.protocol import (
    DRAWS,
    HEAD_STATES,
    MIN_BLOCKS,
    OUTCOMES,
    SEED,
    SETTINGS,
    TOP,
    VERSION,
    VERSION_1_PAIRS,
    Fold,
    Pair,
    folds,
    pairs_in,
    protocol_hash,
    rows_of,
)
from bench.layerbench.protocol import __doc__ as PROTOCOL
from bench.measure import RESULTS, describe_versions
from bench.spectra import CACHE, load_spectra
from zest_fast.benchmarking.machine import describe_machine
from zest_fast.foundation.replacing import replacing
from zest_fast.ranking.probed import PROBED
from zest_fast.sweeping.tables import SHIPPED, load_records, sweeps_of

RESULT = RESULTS / "layerbench.json"
OF_LAYERS = ("tau", *(f"top_{n}" for n in TOP), "kept_5")
OF_BLOCKS = ("block_tau", "block_top_3")
MEASURES = (*OF_LAYERS, *OF_BLOCKS)
OF_SINGLE_METRICS = ("tau", "top_5")
"""What the results hold of the many single metrics."""
Contest = Callable[[pandas.DataFrame, Spectra], dict[str, Contestant]]


def main(arguments: list[str] | None = None, contest: Contest = contestants) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.layerbench evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--records", type=Path, default=SHIPPED, help="a Parquet file of contribution records")
    parser.add_argument("--spectra", type=Path, default=CACHE, help="spectra of the models; what it lacks is computed")
    parser.add_argument("--controls", type=Path, default=CONTROL_PROFILES, help="what bench.layerbench.controls wrote")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of layerbench.json")
    parser.add_argument("--fitted", type=Path, help="keep what takes long to fit in this folder, for the next run")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS, help="only these; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="folds at a time; a thread each")
    options = parser.parse_args(arguments)
    records, lacking = with_start_losses(load_records(options.records), sweeps_of(options.records))
    spectra = load_spectra(sorted(records.model.unique()), options.spectra)
    controls = control_profiles(options.controls)
    document = _origin(options.records) | {"head_not_retrained": lacking}
    more = {"controls": controls, "settings": options.settings, "jobs": options.jobs, "kept": options.fitted}
    document |= evaluate(records, spectra, contest, **more)
    options.out.mkdir(parents=True, exist_ok=True)
    write(document, options.out / RESULT.name)
    for goal in document["must_reach"]:
        print(f"{'met   ' if goal['met'] else 'MISSED'} {goal['setting']}, {goal['goal']}: {goal['value']:.3f}")


def evaluate(
    records: pandas.DataFrame,
    spectra: Spectra,
    contest: Contest = contestants,
    *,
    controls: ControlProfiles | None = None,
    settings: Sequence[str] = SETTINGS,
    jobs: int = 1,
    kept: Path | None = None,
) -> dict[str, Any]:
    """Every fold of the protocol -> the parts of the document that the records decide.

    Raises ValueError where the records hold no pair of the protocol, or too few to hold one out.
    """
    began = time.perf_counter()
    pairs, left_out = pairs_in(records)
    every = [fold for fold in folds(pairs) if fold.setting in settings]
    if not every:
        raise ValueError(f"records of {[pair.name for pair in pairs]}: there is nothing to hold out, sweep more pairs")
    runs = Parallel(n_jobs=jobs, return_as="generator")(
        delayed(_timed_fold)(fold, records, spectra, contest, controls or {}, kept) for fold in every
    )
    rows = []
    for fold, (of_fold, seconds) in zip(every, runs, strict=True):
        print(f"{fold.setting}, {fold.held_out} held out: {len(fold.test)} pairs, {seconds:.0f} s", flush=True)
        rows += of_fold
    results = pandas.DataFrame(rows)
    truth = targets(records, pairs)
    summary = summarise(results, truth)
    known = set(results[results.setting == SETTINGS[0]].pair)
    probed = [pair.name for pair in pairs if _is_probed(records, pair)]
    of_probed = summarise(results[results.pair.isin(probed)], truth)
    version_1 = {f"{model}/{dataset}" for model, dataset in VERSION_1_PAIRS}
    return {
        "pairs": [pair.name for pair in pairs],
        "left_out": left_out,
        "not_known": sorted({pair.name for pair in pairs} - known) if known else [],
        "controls_of": sorted({f"{model}/{dataset}" for _, model, dataset, _ in controls or {}}),
        "seconds": round(time.perf_counter() - began, 1),
        "must_reach": goals(summary, of_probed, results),
        "summary": summary,
        "probed": probed,
        "summary_of_probed_pairs": of_probed,
        "summary_of_version_1_pairs": summarise(results[results.pair.isin(version_1)], truth),
        "diagnosis": diagnose(truth, results),
        "results": _nested(results),
    }


def _is_probed(records: pandas.DataFrame, pair: Pair) -> bool:
    return PROBED in records and bool(rows_of(records, [pair])[PROBED].notna().all())


def _timed_fold(*arguments) -> tuple[list[dict], float]:
    """`run_fold` on one thread, and its seconds."""
    began, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run_fold(*arguments), time.perf_counter() - began
    finally:
        torch.set_num_threads(threads)


def run_fold(
    fold: Fold,
    records: pandas.DataFrame,
    spectra: Spectra,
    contest: Contest,
    controls: ControlProfiles | None = None,
    kept: Path | None = None,
) -> list[dict]:
    """Fit every contestant on the training pairs; a row for each contestant, test pair and state of the head."""
    train, test = rows_of(records, fold.train), rows_of(records, fold.test)
    gains = mean_gain(test)
    unseen = test.drop(columns=list(OUTCOMES), errors="ignore")
    fitted = fit(contest(records, spectra), train, kept)
    if fold.setting != "known models":
        fitted.pop("layer prior", None)  # it has nothing to say of a model without records
    families = {(pair.model, pair.dataset): pair for pair in fold.test}
    values = []
    for (model, dataset, _, state), profile in profiles(unseen):
        truth = gains[profile.index].to_numpy()
        scores = {name: contestant.predict(profile) for name, contestant in fitted.items()}
        scores |= control_scores(fitted, profile, controls or {})
        for name, of_profile in scores.items():
            place = _place(fold, families[model, dataset], state, name, fitted.get(name))
            silent = name in OF_PROBES and profile[PROBED].isna().any()
            measured = dict.fromkeys(MEASURES, np.nan) if silent else measure(of_profile, truth, list(profile.layer))
            values.append(place | measured)
    keys = [key for key in values[0] if key not in MEASURES]
    return pandas.DataFrame(values).groupby(keys, sort=False, dropna=False).mean().reset_index().to_dict("records")


def _place(fold: Fold, pair: Pair, state: str, name: str, contestant: Contestant | None) -> dict[str, str]:
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


def measure(scores: np.ndarray, gains: np.ndarray, layers: list[str]) -> dict[str, float]:
    """MEASURES of one profile's scores; all [layers]. Raises ValueError where their shapes differ.

    Those of blocks are NaN where there are too few.
    """
    if np.shape(scores) != gains.shape:
        raise ValueError(f"{len(gains)} layers were to be scored, the scores have shape {list(np.shape(scores))}")
    found = {"tau": tau_b(scores, gains)} | {f"top_{n}": recovered_gain(scores, gains, n) for n in TOP}
    found["kept_5"] = kept_gain(scores, gains, 5)
    of_blocks, blocks = by_block(layers, scores), by_block(layers, gains)
    enough = len(blocks) >= MIN_BLOCKS
    found["block_tau"] = tau_b(of_blocks, blocks) if enough else np.nan
    found["block_top_3"] = recovered_gain(of_blocks, blocks, 3) if enough else np.nan
    return found


def summarise(results: pandas.DataFrame, truth: pandas.DataFrame) -> dict[str, dict[str, dict]]:
    """setting -> state of the head -> attainable tau, and each contestant's means, intervals and the Ranker's lead."""
    summary: dict[str, dict[str, dict]] = {}
    for setting in results.setting.unique():
        for state in HEAD_STATES:
            part = results[(results.setting == setting) & (results.head_state == state)]
            if len(part):
                summary.setdefault(setting, {})[state] = _summary(part, truth)
    return summary


def _summary(part: pandas.DataFrame, truth: pandas.DataFrame) -> dict[str, Any]:
    tables = {name: part.pivot(index="pair", columns="contestant", values=name) for name in MEASURES}
    pairs = tables["tau"].index
    folds_of = part.drop_duplicates("pair").set_index("pair").held_out[pairs].tolist()
    described = Description(folds_of, reliability_weights(truth, pairs))
    return {
        "pairs": len(pairs),
        "folds": len(set(folds_of)),
        "attainable_tau": _rounded(truth.attainable_tau[pairs].mean()),
        "contestants": {
            contestant: {name: described(tables[name][contestant]) for name in _measures(contestant)}
            | {
                "ranker_ahead": {
                    name: described(tables[name]["ranker"] - tables[name][contestant]) for name in OF_SINGLE_METRICS
                }
            }
            for contestant in part.contestant.unique()
        },
    }


def reliability_weights(truth: pandas.DataFrame, pairs: pandas.Index) -> np.ndarray:
    """[pairs], by what the records say of their targets; one seed says nothing of it and gets the smallest."""
    found = truth.reliability[pairs]
    return found.fillna(found.min()).fillna(1.0).to_numpy()


class Description:
    """Means of pairs with their intervals, all under the same draws."""

    def __init__(self, folds_of: list[str], weights: np.ndarray) -> None:
        pairs = len(folds_of)
        self._weights = weights
        self._pairs = Bootstrap(pairs, draws=DRAWS, seed=SEED)
        self._folds = Bootstrap(pairs, draws=DRAWS, seed=SEED, clusters=folds_of)

    def __call__(self, values: pandas.Series) -> dict[str, Any]:
        """values: [pairs], NaN where there is none. "pairs" says how many there are where some lack."""
        found = values.to_numpy(np.float64)
        known = ~np.isnan(found)
        weights = np.where(known, self._weights, 0.0)
        described: dict[str, Any] = {} if known.all() else {"pairs": int(known.sum())}
        if not known.any():
            return described
        return described | {
            "mean": _rounded(np.mean(found[known])),
            "interval": _ends(self._pairs.interval(found)),
            "interval_over_folds": _ends(self._folds.interval(found)),
            "weighted_mean": _rounded(weights[known] @ found[known] / weights.sum()) if weights.sum() else None,
            "weighted_interval": _ends(self._pairs.interval(found, self._weights)),
        }


def _measures(contestant: str) -> tuple[str, ...]:
    return OF_SINGLE_METRICS if contestant.startswith("metric ") else MEASURES


def _nested(results: pandas.DataFrame) -> list[dict]:
    """One entry for each setting, pair and state: measure -> contestant -> value."""
    entries = []
    for (setting, held_out, pair, state), part in results.groupby(["setting", "held_out", "pair", "head_state"]):
        values = {
            measured: {
                name: _rounded(value)
                for name, value in zip(part.contestant, part[measured], strict=True)
                if measured in _measures(name) and not np.isnan(value)
            }
            for measured in MEASURES
        }
        chosen = dict(part[part.chosen != ""][["contestant", "chosen"]].itertuples(index=False))
        place = {"setting": setting, "held_out": held_out, "pair": pair, "head_state": state}
        entries.append(place | {"chosen": chosen} | values)
    return entries


def _ends(interval: tuple[float, float]) -> list[float | None]:
    return [None if np.isnan(end) else _rounded(end) for end in interval]


def _rounded(value: float) -> float:
    return round(float(value), 4)


def _origin(path: Path) -> dict[str, Any]:
    sweeps = sweeps_of(path)
    return {
        "benchmark": "layerbench",
        "command": " ".join(["python", "-m", "bench.layerbench", "evaluate", *sys.argv[2:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "versions": describe_versions()
        | {name: version(name) for name in ("lightgbm", "scikit-learn", "scipy", "pandas")},
        "protocol": {
            "file": "bench/layerbench/protocol.py",
            "version": VERSION,
            "sha256": protocol_hash(),
            "text": PROTOCOL,
        },
        "records": {
            "file": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "pairs": len(sweeps),
            "recipes": {sweep["model"]: sweep["recipe_hash"] for sweep in sweeps},
        },
    }


_LINE = 1500


def write(document: dict[str, Any], path: Path) -> None:
    """JSON with what is short on a line, and a line for each entry of the results, which are thousands of numbers."""
    results = ",\n  ".join(json.dumps(entry, allow_nan=False) for entry in document["results"])
    text = _laid_out(document | {"results": None}, "")
    with replacing(path) as temporary:
        temporary.write_text(text.replace('"results": null', f'"results": [\n  {results}\n ]') + "\n", encoding="utf-8")


def _laid_out(value: Any, indent: str) -> str:
    """JSON, broken into lines as deep as it takes to keep them short."""
    line = json.dumps(value, allow_nan=False, ensure_ascii=False)
    if (len(line) <= _LINE and indent) or not isinstance(value, dict | list) or not value:
        return line
    deeper = indent + " "
    if isinstance(value, dict):
        parts = [f"{json.dumps(key, ensure_ascii=False)}: {_laid_out(item, deeper)}" for key, item in value.items()]
        begin, end = "{", "}"
    else:
        parts = [_laid_out(item, deeper) for item in value]
        begin, end = "[", "]"
    return f"{begin}\n{deeper}" + f",\n{deeper}".join(parts) + f"\n{indent}{end}"
