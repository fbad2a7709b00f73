"""Layers that are chosen again during a run (`zest_fast.Reselect`) against those that were chosen once.

python -m bench.reselect                            # every pair; run it again and it goes on
python -m bench.reselect --pairs minilm/trec
python -m bench.reselect --collect                  # reselect.json from what is there

Protocol: that of bench.finetune: same start, same batches, same steps, eval mode, linear decay, and for each arm a rate
of its own, with the least loss on the split "score" after the first seed; then every seed at that rate, tested once.
All arms begin with the five layers that the Ranker, fitted without that family of data sets, takes from a batch of the
seed. Choices are made after a quarter, a half and three quarters of the steps, on the 64 training samples that come
next, with the default margin, but with none where the Ranker chooses. "random": scores drawn anew at every choice.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.finetune.run import PROFILED, RATES, SEEDS, SETTINGS, Pair
from bench.measure import RESULTS, write_result
from zest_fast.finetuning.selective_backward import SelectiveBackward
from zest_fast.foundation.text_table import markdown_table
from zest_fast.prefix.inputs import logits_of, rows_of
from zest_fast.profiling.layer_profile import LayerProfile
from zest_fast.profiling.loss import call_model
from zest_fast.profiling.profile import profile
from zest_fast.ranking.ranking import rank
from zest_fast.watching.reselect import MARGIN, Reselect

PAIRS = ("efficientnet-lite0/mnist", "mobilenet-v2/fashion", "minilm/trec")
STATIC = "ZEST@5, static"
AGAIN = {
    "again by ZEST, no margin": ("ZEST", 0.0),
    "again by RGN": ("rgn", MARGIN),
    "again by snip": ("snip", MARGIN),
    "again at random": ("random", MARGIN),
}
"""Of an arm: what scores the layers, and the margin."""
ARMS = (STATIC, *AGAIN)
CHOICES = 4  # in a run, the one before it included
FOLDER = RESULTS / "reselect"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.reselect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), metavar="MODEL/DATASET")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="one file for each pair, written after every run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--collect", action="store_true", help="only write reselect.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.collect:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        for name in arguments.pairs:
            ReselectedPair(name, arguments.folder).run()
    print(collect(arguments.folder))


def collect(folder: Path, out: Path | None = None) -> Path:
    """reselect.json from the files of the pairs, in the order of PAIRS."""
    documents = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    documents.sort(key=lambda document: (*PAIRS, document["pair"]).index(document["pair"]))
    results = [{"pair": document["pair"], "runs": list(document["runs"].values())} for document in documents]
    settings = {"seeds": SEEDS, "rates": RATES, "choices": CHOICES, "margin": MARGIN, "profiled": PROFILED, **SETTINGS}
    return write_result("reselect", settings, results, out)


class Drawn:
    """Scores at random, others at every choice."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)

    def predict(self, profile: LayerProfile) -> np.ndarray:
        return self._generator.standard_normal(len(profile))


class ReselectedPair(Pair):
    """The runs of one model on one data set; what is done is in the file, and is not done again."""

    def run(self) -> None:
        left = [(seed, arm) for seed in SEEDS for arm in ARMS if f"{arm} | seed {seed}" not in self.document["runs"]]
        if not left:
            return
        self._load()
        self._fit_head()
        for seed, arm in left:
            if seed == SEEDS[0]:
                tried = [self._reselected(arm, seed, rate) for rate in RATES]
                losses = [self._evaluate(tuned.model, "score")[0] for tuned, _ in tried]
                tuned, run = tried[int(np.nanargmin(losses))]
            else:
                rate = self.document["runs"][f"{arm} | seed {SEEDS[0]}"]["rate"]
                tuned, run = self._reselected(arm, seed, rate)
            run["test_loss"], run["test_accuracy"] = self._evaluate(tuned.model, "test")
            self.document["runs"][f"{arm} | seed {seed}"] = run
            self._write()
            print(
                f"{self.name}: {arm}, seed {seed}: {run['test_accuracy']:.3f}, {run['exchanged']} exchanged", flush=True
            )

    def _reselected(self, arm: str, seed: int, rate: float) -> tuple[SelectiveBackward, dict[str, Any]]:
        order, (inputs, targets) = self._order(seed), self.splits["train"]

        def batch(start: int) -> tuple[Any, torch.Tensor]:
            rows = order.roll(-start)[:PROFILED]
            return rows_of(inputs, rows), targets[rows]

        layers = rank(profile(self.model, batch(0)), by=self._ranker).top(5)
        tuned = SelectiveBackward(copy.deepcopy(self.model), layers, head=self.head)
        body, head = _by_group(tuned)
        rates = (rate, self.settings["head_rate"])
        groups = [{"params": part, "lr": full} for part, full in zip((body, head), rates, strict=True)]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        steps, size = self.settings["steps"], self.settings["batch_size"]
        reselect = None
        if arm in AGAIN:
            name, margin = AGAIN[arm]
            by = {"ZEST": self._ranker, "random": Drawn(seed)}.get(name, name)
            reselect = Reselect(tuned, optimizer, every=steps // CHOICES, by=by, margin=margin)
        for number, rows in enumerate(self._batches(seed), start=1):
            for group, full in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = full * (1 - (number - 1) / steps)
            logits = logits_of(call_model(tuned.model, rows_of(inputs, rows)))
            nn.functional.cross_entropy(logits, targets[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
            if reselect is not None and number < steps:
                reselect.step(batch(number * size))
        tuned.verify()
        return tuned, {
            "arm": arm,
            "seed": seed,
            "rate": rate,
            "layers": tuned.layers,
            "former_layers": tuned.former_layers,
            "exchanged": sum(len(done.entered) for done in reselect.exchanges) if reselect else 0,
        }


def _by_group(tuned: SelectiveBackward) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What trains in the layers, and in the head."""
    named = dict(zip(tuned.trainable_names, tuned.parameters(), strict=True))
    in_head = {name for name in named if name.startswith(tuple(f"{head}." for head in tuned.head))}
    return [p for n, p in named.items() if n not in in_head], [p for n, p in named.items() if n in in_head]


# The table of docs/results.md


def reselect_text(document: dict) -> str:
    pairs = document["results"]
    rows = []
    for arm in ARMS:
        cells = [_accuracy([run["test_accuracy"] for run in _runs(pair, arm)]) for pair in pairs]
        exchanged = statistics.mean(run["exchanged"] for pair in pairs for run in _runs(pair, arm))
        above = above_static(pairs, arm)
        better, worse = sum(value > 0 for value in above), sum(value < 0 for value in above)
        counts = f"{better} / {worse} of {len(above)}" if arm in AGAIN else "–"
        rows.append([arm, *cells, _difference(above), counts, f"{exchanged:.1f}"])
    head = ["arm", *(pair["pair"] for pair in pairs), "above static, points", "runs better / worse", "layers exchanged"]
    return "\n\n".join([markdown_table(head, rows), LEGEND, finding(pairs)])


LEGEND = (
    "Accuracy on the test split in percent, mean over three seeds ± its standard error over them. *Above static*: the "
    "difference of the two runs of a seed, mean over seeds and pairs ± its standard error over all of these, and how "
    "many are above and below 0. *Layers exchanged*: in a run, of five that train, at three choices."
)


def finding(pairs: list[dict[str, Any]]) -> str:
    """What the figures say: who is above the static choice by more than twice the standard error."""
    found = {arm: above_static(pairs, arm) for arm in AGAIN}
    better = [arm for arm, values in found.items() if statistics.mean(values) > 2 * _error(values)]
    worse = [arm for arm, values in found.items() if statistics.mean(values) < -2 * _error(values)]
    said = [f"better than the static choice: {', '.join(better)}" * bool(better)]
    said.append(f"worse: {', '.join(worse)}" * bool(worse))
    if not better:
        said.insert(0, "no arm that chooses again is better than the static choice by twice the standard error")
    text = "; ".join(part for part in said if part)
    return f"{text[0].upper()}{text[1:]}."


def above_static(pairs: list[dict[str, Any]], arm: str) -> list[float]:
    """Points of accuracy, by pair and seed."""
    return [
        100 * (again["test_accuracy"] - static["test_accuracy"])
        for pair in pairs
        for again, static in zip(_runs(pair, arm), _runs(pair, STATIC), strict=True)
    ]


def _runs(pair: Mapping[str, Any], arm: str) -> list[dict[str, Any]]:
    return sorted((run for run in pair["runs"] if run["arm"] == arm), key=lambda run: run["seed"])


def _accuracy(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):.1f} ± {100 * _error(values):.1f}"


def _difference(values: list[float]) -> str:
    return f"{statistics.mean(values):+.1f} ± {_error(values):.1f}" if any(values) else "–"


def _error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
