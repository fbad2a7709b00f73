"""A ranking of yours, judged by the protocol of bench/layerbench/protocol.py; less than a minute beside your own time.

python -m bench.layerbench score scores.csv     # columns model, dataset, layer, score; also seed, head_state
python -m bench.layerbench score ranking.py     # score(profile) -> an array, and fit(train) if it learns; it is run
python -m bench.layerbench score scores.csv --records mine.parquet --out mine.json

Prints Kendall's tau and what the first layers recover, setting by setting, beside random, number of parameters, middle
and the first-order gain of a step, and beside what bench/results/layerbench.json has of the Ranker. A file of scores
(or code without `fit`) learns nothing here: its settings differ in their pairs alone, and nobody can see what it was
made with. Intervals are 95 %, bootstrapped over the pairs; "ahead" is yours minus the other's, pair by pair.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas

from bench.layerbench.baselines import Random, StepGain
from bench.layerbench.diagnosis import targets
from bench.layerbench.evaluation import RESULT, Description, measure, reliability_weights
from bench.layerbench.profiles import mean_gain, profiles, with_start_losses
from bench.layerbench.protocol import HEAD_STATES, OUTCOMES, VERSION, Fold, folds, pairs_in, protocol_hash, rows_of
from bench.layerbench.rivals import Middle, NumberOfParameters
from bench.layerbench.submissions import RankingFile, ScoresFile, check_records
from zest_fast.foundation.replacing import replacing
from zest_fast.foundation.text_table import text_table
from zest_fast.sweeping.tables import SHIPPED, load_records, sweeps_of

YOURS = "yours"
SHOWN = {"tau": "tau", "top_3": "top 3", "top_5": "top 5", "top_10": "top 10"}
PUBLISHED = ("ranker", "ranker, probed")


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, print the tables; exit status 2 and one line where the input is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.layerbench score",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ranking", type=Path, help="scores.csv, or ranking.py, which is run")
    parser.add_argument("--records", type=Path, default=SHIPPED, help="a Parquet file of contribution records")
    parser.add_argument("--published", type=Path, default=RESULT, help="layerbench.json, for the Ranker's figures")
    parser.add_argument("--head-state", choices=HEAD_STATES, default=HEAD_STATES[0], help="of the judged profiles")
    parser.add_argument("--partial", action="store_true", help="leave pairs out that scores.csv lacks")
    parser.add_argument("--out", type=Path, help="write every figure into this JSON")
    options = parser.parse_args(arguments)
    try:
        document = score(
            options.ranking,
            options.records,
            published=options.published,
            head_state=options.head_state,
            partial=options.partial,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(tables(document))
    if options.out:
        with replacing(options.out) as temporary:
            temporary.write_text(json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n", "utf-8")


def score(
    ranking: Path,
    records_path: Path = SHIPPED,
    *,
    published: Path = RESULT,
    head_state: str = "fresh",
    partial: bool = False,
) -> dict[str, Any]:
    """Every fold -> settings with means, intervals and what the ranking is ahead by; and the values of every pair.

    Raises ValueError for a file or for records that cannot be judged, FileNotFoundError where there is none.
    """
    began = time.perf_counter()
    sweeps = sweeps_of(records_path)
    check_records(sweeps, _recipes(), _definitions())
    records, lacking_heads = with_start_losses(load_records(records_path), sweeps)
    pairs, left_out = pairs_in(records)
    if not pairs:
        raise ValueError(f"{str(records_path)!r} holds no pair of the protocol; it has {', '.join(left_out)}")
    judged = rows_of(records, pairs)
    method: ScoresFile | RankingFile
    if ranking.suffix == ".py":
        method = RankingFile(ranking)
    else:
        method = ScoresFile(ranking, judged, head_state=head_state, partial=partial)
    tested = [pair for pair in pairs if pair.name not in method.lacking]
    every = [_without(fold, method.lacking) for fold in folds(pairs)]
    if not any(fold.test for fold in every):
        raise ValueError(f"{str(records_path)!r}: there is nothing to hold out of {[pair.name for pair in pairs]}")
    others = {"step gain": StepGain(), "number of parameters": NumberOfParameters(), "middle": Middle()}
    judge = _Judge(judged, head_state, {YOURS: method, **others, "random": Random()})
    rows = [row for fold in every if fold.test for row in judge.fold(fold)]
    ranker, why = _published(published, records_path, head_state)
    names = {pair.name for pair in tested}
    rows += [row for row in ranker if row["pair"] in names]
    results = pandas.DataFrame(rows)
    truth = targets(judged, pairs)
    return {
        "benchmark": "layerbench score",
        "ranking": {"file": ranking.name, "sha256": _sha256(ranking), "learns": method.learns},
        "records": {"file": records_path.name, "sha256": _sha256(records_path), "head_not_retrained": lacking_heads},
        "protocol": {"version": VERSION, "sha256": protocol_hash()},
        "head_state": head_state,
        "left_out": [*left_out, *method.lacking],
        "ranker": why,
        "seconds": round(time.perf_counter() - began, 1),
        "settings": {
            setting: _setting(part, truth) for setting, part in results.groupby("setting", sort=False) if len(part)
        },
        "results": [
            {"setting": setting, "pair": pair}
            | {name: {row.contestant: _number(getattr(row, name)) for row in part.itertuples()} for name in SHOWN}
            for (setting, pair), part in results.groupby(["setting", "pair"], sort=False)
        ],
    }


class _Judge:
    """Measures every contestant on the test pairs of a fold; what learns nothing is asked once for each profile."""

    def __init__(self, records: pandas.DataFrame, head_state: str, contestants: dict[str, Any]) -> None:
        self._records = records
        self._head_state = head_state
        self._contestants = contestants
        self._known: dict[tuple, dict[str, float]] = {}

    def fold(self, fold: Fold) -> list[dict[str, Any]]:
        test = rows_of(self._records, fold.test)
        test = test[test.head_state == self._head_state].reset_index(drop=True)
        gains = mean_gain(test)
        unseen = test.drop(columns=list(OUTCOMES))
        learning = {name for name, contestant in self._contestants.items() if getattr(contestant, "learns", False)}
        for name in learning:
            self._contestants[name].fit(rows_of(self._records, fold.train))
        values = []
        for key, profile in profiles(unseen):
            truth = gains[profile.index].to_numpy()
            for name, contestant in self._contestants.items():
                place = (name, *key)
                if name in learning or place not in self._known:
                    self._known[place] = measure(contestant.predict(profile), truth, list(profile.layer))
                pair = {"setting": fold.setting, "pair": f"{key[0]}/{key[1]}", "contestant": name}
                values.append(pair | {measured: self._known[place][measured] for measured in SHOWN})
        means = pandas.DataFrame(values).groupby(["setting", "pair", "contestant"], sort=False).mean().reset_index()
        return means.to_dict("records")


def _setting(part: pandas.DataFrame, truth: pandas.DataFrame) -> dict[str, Any]:
    tables = {name: part.pivot(index="pair", columns="contestant", values=name) for name in SHOWN}
    pairs = tables["tau"].index
    described = Description(list(pairs), reliability_weights(truth, pairs))
    contestants = {
        name: {measured: _interval(described(table[name])) for measured, table in tables.items()}
        | {"yours_ahead": _interval(described(tables["tau"][YOURS] - tables["tau"][name]))}
        for name in dict.fromkeys(part.contestant)
    }
    attainable = float(truth.attainable_tau[pairs].mean())
    return {
        "pairs": len(pairs),
        "attainable_tau": None if np.isnan(attainable) else round(attainable, 4),
        "contestants": contestants,
    }


def _interval(described: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in described.items() if name != "interval_over_folds"}


def tables(document: dict[str, Any]) -> str:
    """A table for each setting, and in words what is not in it."""
    parts = []
    for setting, found in document["settings"].items():
        rows = []
        for name in _order(found["contestants"]):
            contestant = found["contestants"][name]
            low, high = contestant["tau"]["interval"]
            cells = [f"{contestant['tau']['mean']:.3f}", f"{low:.3f} to {high:.3f}"]
            cells += [f"{contestant[measured]['mean']:.3f}" for measured in SHOWN if measured != "tau"]
            ahead = contestant["yours_ahead"]
            ends = f"{ahead['interval'][0]:+.3f} to {ahead['interval'][1]:+.3f}"
            rows.append([name, *cells, "" if name == YOURS else f"{ahead['mean']:+.3f} ({ends})"])
        head = ["ranking", "tau", "95 %", "top 3", "top 5", "top 10", "yours ahead by"]
        attainable = found["attainable_tau"]
        title = f"{setting}: {found['pairs']} pairs" + (f", attainable tau {attainable:.3f}" if attainable else "")
        parts.append(f"{title}\n\n{text_table(head, rows)}")
    notes = [document["ranker"]] if document["ranker"] else []
    if document["left_out"]:
        notes.append(f"left out: {', '.join(document['left_out'])}")
    if not document["ranking"]["learns"]:
        notes.append("yours learns nothing here: its settings differ in their pairs alone")
    notes.append(
        f"{document['head_state']} head; protocol {document['protocol']['version']} "
        f"({document['protocol']['sha256'][:12]}), records {document['records']['sha256'][:12]}; "
        f"{document['seconds']:.0f} s"
    )
    return "\n\n".join([*parts, "\n".join(notes)])


def _order(contestants: dict[str, Any]) -> list[str]:
    return sorted(contestants, key=lambda name: -contestants[name]["tau"]["mean"])


def _published(path: Path, records: Path, head_state: str) -> tuple[list[dict[str, Any]], str]:
    """The Ranker's values by setting and pair, and, where they do not compare, why there are none."""
    if not path.exists():
        return [], f"the Ranker's figures are missing: there is no {path.name}"
    document = json.loads(path.read_text(encoding="utf-8"))
    for what, ours in (("records", _sha256(records)), ("protocol", protocol_hash())):
        theirs = document[what]["sha256"]
        if theirs != ours:
            return (
                [],
                f"the Ranker's figures are missing: {path.name} is of other {what} ({theirs[:12]}, not {ours[:12]})",
            )
    return [
        {"setting": entry["setting"], "pair": entry["pair"], "contestant": f"{name} (published)"}
        | {measured: entry[measured][name] for measured in SHOWN}
        for entry in document["results"]
        if entry["head_state"] == head_state
        for name in PUBLISHED
        if name in entry["tau"]
    ], ""


def _recipes() -> dict[str, str]:
    from bench.data import MODELS
    from bench.sweeps import RECIPES

    return {name: RECIPES[model.family].hash for name, model in MODELS.items()}


def _definitions() -> int:
    from zest_fast.sweeping.sweep import DEFINITIONS

    return DEFINITIONS


def _without(fold: Fold, lacking: Any) -> Fold:
    return Fold(fold.setting, fold.held_out, fold.train, tuple(pair for pair in fold.test if pair.name not in lacking))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _number(value: float) -> float:
    return round(float(value), 4)


if __name__ == "__main__":
    main()
