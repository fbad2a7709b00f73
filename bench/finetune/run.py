"""Accuracy, time and memory of fine-tuning a few layers, on real data: Table 3 and Figure 3 of the paper, and more.

python -m bench.finetune                                       # every pair; run it again and it goes on
python -m bench.finetune --pairs minilm/trec --threads 1
python -m bench.finetune --arms "ZEST@5" "LoRA r8" full        # only these; the others can follow
python -m bench.finetune --costs                               # time and count the steps of finished pairs again
python -m bench.finetune --cached                              # ZEST@5 of finished pairs again, with a prefix cache
python -m bench.finetune --cached --epochs 4                   # the same, over a quarter of the samples four times
python -m bench.finetune --forgetting                          # of finished pairs: what a text model has forgotten
python -m bench.finetune --collect                             # finetune.json from what is there

Protocol. Every arm of a pair starts from the same weights (the head fitted on its own split), takes the same number of
steps on the same batches of the split "train" (AdamW, linear decay, no weight decay) and runs in eval mode. The rate is
the one of RATES with the least loss on the split "score" after the first seed; the head's rate is the same in every arm
but "head only", which has it from RATES too. Then every seed is trained at that rate, and the split "test" is looked at
once for each; the curves are those of the last seed. ZEST ranks the profile of one batch of the seed's training samples
with a Ranker that was fitted without that family of data sets; "ZEST probed" mixes in a probe of its first 1,024
training samples, at 5 % of a sweep. "contribution" ranks by the records of the sweep, which are losses on "score": what
a ranking could reach at best; "joint" trains 25 sets of five of its best layers with the first seed at its rate and
takes the one with the least loss on "score". Random layers are drawn twice for each seed. Seconds and peak bytes of a
step are relative to full fine-tuning in the same rounds. --cached trains ZEST@5 of each seed at its rate with a
PrefixCache and without, and full, each once, and notes accuracies and the processor time of the whole run.
Its runs are one epoch, in which nothing is read: with --epochs 4 all three take as many steps over a quarter of the
samples, in another order each time. --forgetting trains the tested runs of FORGETTING once more and scores what
is left of the model's first task (forgetting.py).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from torch import Tensor, nn

from bench.data import DATASETS, load_pair
from bench.finetune.arms import ADAPTERS, NAMES, RANK, Arm, Orders, Trained, adapter_of, arms, joint_sets
from bench.finetune.forgetting import score_of
from bench.layerbench.baselines import Spectrum
from bench.measure import RESULTS, describe_versions, write_result
from bench.spectra import load_spectra
from zest_fast import PrefixCache
from zest_fast.benchmarking.machine import describe_machine
from zest_fast.benchmarking.timing import interleave, median, ratio
from zest_fast.foundation.replacing import replacing
from zest_fast.planning.counted_memory import peak_bytes
from zest_fast.prefix.inputs import logits_of, rows_of
from zest_fast.probing.collecting import SAMPLES
from zest_fast.probing.probe import probe
from zest_fast.profiling.loss import call_model
from zest_fast.profiling.profile import profile
from zest_fast.ranking.ranker import Ranker
from zest_fast.ranking.ranking import rank
from zest_fast.sweeping.head import choose_strength, classifier_of, features_of, fit_head
from zest_fast.sweeping.objectives import Classification
from zest_fast.sweeping.reused_prefix import ReusedPrefix
from zest_fast.sweeping.tables import load_records, sweeps_of
from zest_fast.sweeping.trials import evaluate, set_head

PAIRS = (
    "efficientnet-lite0/mnist",
    "minilm/trec",
    "mobilenet-v2/fashion",
    "smollm2/trec",
    "efficientnet-lite0/animals",
    "minilm/movie-sentiment",
    "mobilenet-v2/animals",
    "efficientnet-lite0/fashion",
    "minilm/amazon-sentiment",
    "smollm2/sms-spam",
)
SEEDS = (0, 1, 2)
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
CURVE_SAMPLES = 400
PROFILED = 64
ROUNDS = 7
"""Of timed steps."""
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)
CACHED = "ZEST@5"
FORGETTING = ("full", "ZEST@5", "random@5", "largest@5", *(f"{adapter} r{RANK}" for adapter in ADAPTERS))
FOLDER = RESULTS / "finetune"
SETTINGS = {
    "image": {"batch_size": 32, "steps": 64, "head_rate": 5e-4},
    "text": {"batch_size": 16, "steps": 64, "head_rate": 5e-3},
    "smollm2": {"batch_size": 16, "steps": 32, "head_rate": 5e-3},  # a step takes ten times one of MiniLM
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.finetune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), metavar="MODEL/DATASET")
    parser.add_argument("--arms", nargs="+", default=list(NAMES), choices=NAMES, metavar="ARM", help="only these")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="one file for each pair, written after every run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--costs", action="store_true", help="only measure the steps of finished pairs again")
    parser.add_argument("--cached", action="store_true", help="only train ZEST@5 of finished pairs with a prefix cache")
    parser.add_argument("--epochs", type=int, default=1, help="of --cached: so many times a part of the samples")
    parser.add_argument(
        "--forgetting", action="store_true", help="only score what finished pairs of text have forgotten"
    )
    parser.add_argument("--collect", action="store_true", help="only write finetune.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.collect:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        for name in arguments.pairs:
            pair = Pair(name, arguments.folder, arguments.arms)
            cached = partial(pair.run_cached, arguments.epochs)
            chosen = {"cached": cached, "costs": pair.measure_costs, "forgetting": pair.score_forgetting}
            next((do for option, do in chosen.items() if getattr(arguments, option)), pair.run)()
    print(collect(arguments.folder))


def collect(folder: Path, out: Path | None = None) -> Path:
    """finetune.json from the files of the pairs; of arms that were added since, those that are done."""
    documents = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    keys = ("pair", "tests", "arms", "forgetting")
    results = [{key: d[key] for key in keys if key in d} for d in documents if "arms" in d]
    settings = {"rates": RATES, "seeds": SEEDS, **SETTINGS}
    return write_result("finetune", settings, results, out)


class Pair:
    """The runs of one model on one data set; what is done is in the file, and is not done again."""

    def __init__(self, pair: str, folder: Path, names: Sequence[str] | None = None) -> None:
        self.name = pair
        self.names = NAMES if names is None else names
        self.path = folder / f"{pair.replace('/', '--')}.json"
        self.model_name, _, self.dataset = pair.partition("/")
        self.document: dict[str, Any] = {"pair": pair, "runs": {}}
        if self.path.exists():
            self.document = json.loads(self.path.read_text())

    def run(self) -> None:
        """Everything that is left to do: of a finished pair, the arms that were added since."""
        left = self._left()
        if not left:
            return
        self._load()
        self._ends: dict[tuple[Arm, int, float], list[Tensor]] = {}
        self._fit_head()
        orders = {seed: self._orders(seed) for seed in SEEDS}
        summaries = self.document.get("arms", {})
        for name in left:
            if name == "joint@5":
                best = self._best_together(orders[SEEDS[0]])
                orders = {seed: replace(found, by={**found.by, "joint": best}) for seed, found in orders.items()}
            if not arms(name, orders[SEEDS[0]], self.model, SEEDS[0]):
                self.document.setdefault("left_out", []).append(name)
                print(f"{self.name}: {name} is left out: PEFT can adapt no layer of this model so", flush=True)
                continue
            self._arm(name, orders)
            summaries[name] = self._summary(name, orders)
            print(f"{self.name}: {name} {self._mean_accuracy(name):.3f}", flush=True)
            if "arms" in self.document:
                self._write()
        self.document["arms"] = {name: summaries[name] for name in NAMES if name in summaries}
        self.document["tests"] = len(self.splits["test"][1])
        self._write()

    def _left(self) -> list[str]:
        done = {*self.document.get("arms", {}), *self.document.get("left_out", ())}
        return [name for name in self.names if name not in done]

    def measure_costs(self) -> None:
        """Time and memory of the steps once more, where the pair is finished: on an idle machine, say."""
        if "arms" not in self.document:
            return
        self._load()
        for name, summary in self.document["arms"].items():
            run = self._tested(name)[0]
            summary |= self._cost(_arm_of(run))
        self._write()

    def run_cached(self, epochs: int = 1) -> None:
        """The arm CACHED of each seed beside itself without a cache and full fine-tuning, where all are tested."""
        done = self.document.setdefault("cached" if epochs == 1 else f"cached, {epochs} epochs", {})
        left = [run for run in self._tested(CACHED) if str(run["seed"]) not in done]
        if not left or "arms" not in self.document:
            return
        self._load()
        self._fit_head()
        for run in left:
            arm, full = Arm(CACHED, tuple(run["layers"])), Arm("full", None)
            batches = self._repeated(run["seed"], epochs)
            with tempfile.TemporaryDirectory() as folder:
                cache = PrefixCache(folder, samples=len(torch.cat(batches).unique()))
                done[str(run["seed"])] = found = {
                    "full": self._timed(full, batches, self.document["arms"]["full"]["rate"]),
                    "plain": self._timed(arm, batches, run["rate"]),
                    "cached": self._timed(arm, batches, run["rate"], cache),
                }
                found["cache"] = str(cache)
            self._write()
            ours, theirs = (found[which]["test_accuracy"] for which in ("cached", "plain"))
            seconds = {which: found[which]["seconds"] for which in ("full", "plain", "cached")}
            print(f"{self.name}: seed {run['seed']}: {ours} with the cache, {theirs} without; {seconds}", flush=True)

    def _repeated(self, seed: int, epochs: int) -> list[Tensor]:
        """Of a run, the batches: those of its first steps, then their samples again and again in other orders."""
        batches = list(self._batches(seed))
        if epochs < 1 or len(batches) % epochs:
            raise ValueError(f"--epochs {epochs}: {self.name} takes {len(batches)} steps; give a divisor of that")
        first = batches[: len(batches) // epochs]
        samples, size = torch.cat(first), len(first[0])
        orders = [torch.randperm(len(samples), generator=torch.Generator().manual_seed(n)) for n in range(1, epochs)]
        return [*first, *(rows for order in orders for rows in samples[order].split(size))]

    def _timed(
        self, arm: Arm, batches: list[Tensor], rate: float, cache: PrefixCache | None = None
    ) -> dict[str, float]:
        """One run; seconds of the processor, without loading and testing."""
        trained = Trained(self.model, self.head, arm, cache)
        began = time.process_time()
        step = self._steps(trained, arm, rate)
        for number, rows in enumerate(batches):
            step(rows, 1 - number / len(batches))
        seconds = time.process_time() - began
        loss, accuracy = self._evaluate(trained.model, "test")
        return {"seconds": seconds, "test_loss": loss, "test_accuracy": accuracy}

    def score_forgetting(self) -> None:
        """What the tested runs of FORGETTING leave of what a text model could before."""
        found = score_of(self.model_name, self.dataset)
        if found is None or "arms" not in self.document:
            return
        name, score = found
        noted = self.document.setdefault("forgetting", {"score": name, "arms": {}})
        for run in (run for arm in FORGETTING for run in self._tested(arm)):
            done = noted["arms"].setdefault(run["arm"], {})
            if str(run["seed"]) in done:
                continue
            if not hasattr(self, "model"):
                self._load()
                self._fit_head()
                noted["before"] = score(self.model, self.model)
            arm = _arm_of(run)
            trained = Trained(self.model, self.head, arm)
            self._run(trained, arm, run["seed"], run["rate"], ())
            done[str(run["seed"])] = score(self.model, trained.model)
            self._write()
            print(f"{self.name}: {run['arm']}, seed {run['seed']}: {name} {done[str(run['seed'])]:.3f}", flush=True)

    # What every arm starts from

    def _load(self) -> None:
        self.model, self.splits = load_pair(self.model_name, self.dataset)
        kind = "text" if isinstance(self.splits["train"][0], Mapping) else "image"
        self.settings = SETTINGS.get(self.model_name, SETTINGS[kind])
        self.head, _ = classifier_of(self.model)

    def _fit_head(self) -> None:
        head = self.model.get_submodule(self.head)
        inputs, targets = self.splits["head"]
        features = features_of(self.model, head, inputs)
        strength = choose_strength(features, targets, head.out_features, STRENGTHS)
        weight, bias = fit_head(features, targets, head.out_features, strength)
        set_head(head, weight, bias)

    def _orders(self, seed: int) -> Orders:
        inputs, targets = self.splits["train"]
        rows = self._order(seed)[:PROFILED]
        table = profile(self.model, (rows_of(inputs, rows), targets[rows]))
        body = [name for name in table.names if not table.info[name]["head"]]
        by = {"ZEST": rank(table, by=self._ranker), "RGN": rank(table, by="rgn")}
        if "ZEST probed@5" in self._left():
            more = self._order(seed)[:SAMPLES]
            found = probe(self.model, [(rows_of(inputs, more), targets[more])], layers=body, progress=False)
            by["ZEST probed"] = rank(table, by=self._ranker, probe=found)
        orders = {name: ranking.top(len(table) - 1) for name, ranking in by.items()}
        orders["Spectrum"] = self._by_spectrum(body)
        orders["contribution"] = self._contributions()
        orders["largest"] = tuple(sorted(body, key=lambda name: -table.info[name]["numel"]))
        used = tuple(sorted(body, key=lambda name: table.info[name]["depth"]))
        orders["middle"] = tuple(sorted(used, key=lambda name: abs(used.index(name) - (len(used) - 1) / 2)))
        return Orders(orders, used)

    @cached_property
    def _ranker(self) -> Ranker:
        records = load_records()
        return Ranker().fit(records[records.family != DATASETS[self.dataset].family], sweeps=sweeps_of())

    def _by_spectrum(self, body: list[str]) -> tuple[str, ...]:
        layers = pandas.DataFrame({"model": self.model_name, "layer": body})
        scores = Spectrum(load_spectra([self.model_name])).predict(layers)
        return tuple(layers.layer[np.argsort(-scores, kind="stable")])

    def _contributions(self) -> tuple[str, ...]:
        records = load_records()
        own = records[(records.model == self.model_name) & (records.dataset == self.dataset)]
        return tuple(own.groupby("layer").loss.mean().sort_values().index)

    # Runs

    def _arm(self, name: str, orders: Mapping[int, Orders]) -> None:
        """The rate by the first seed, then every seed at that rate, tested once."""
        self._ends.clear()
        first = arms(name, orders[SEEDS[0]], self.model, SEEDS[0])
        losses = {rate: statistics.mean(self._train(arm, SEEDS[0], rate)["loss"] for arm in first) for rate in RATES}
        rate = min(losses, key=losses.__getitem__)
        for seed in SEEDS:
            for arm in arms(name, orders[seed], self.model, seed):
                self._train(arm, seed, rate, test=True)

    def _best_together(self, orders: Orders) -> tuple[str, ...]:
        (first, *_) = self._tested("contribution@5") or [None]
        if first is None:
            raise ValueError(f"{self.name}: joint@5 trains at the rate of contribution@5, which is not tested yet")
        losses = {
            layers: self._train(Arm(f"joint@5 set {number}", layers), SEEDS[0], first["rate"])["loss"]
            for number, layers in enumerate(joint_sets(orders))
        }
        return min(losses, key=losses.__getitem__)

    def _train(self, arm: Arm, seed: int, rate: float, *, test: bool = False) -> dict[str, Any]:
        key = f"{arm.name} | seed {seed} | rate {rate:g}" + (" | test" if test else "")
        if key not in self.document["runs"]:
            self.document["runs"][key] = self._trained(arm, seed, rate, test)
            self._write()
        return self.document["runs"][key]

    def _trained(self, arm: Arm, seed: int, rate: float, test: bool) -> dict[str, Any]:
        trained = Trained(self.model, self.head, arm)
        run = {"arm": arm.name, "layers": arm.layers, "seed": seed, "rate": rate}
        run["trained"] = sum(p.numel() for p in trained.parameters.values())
        if (arm, seed, rate) in self._ends:  # the first seed has been there to find the rate
            with torch.no_grad():
                for parameter, end in zip(trained.parameters.values(), self._ends[arm, seed, rate], strict=True):
                    parameter.copy_(end)
        else:
            curve = self._run(trained, arm, seed, rate, self._curve_steps if test and seed == SEEDS[-1] else ())
            run |= {"curve": curve} if curve else {}
        run["loss"], run["accuracy"] = self._evaluate(trained.model, "score")
        if test:
            run["test_loss"], run["test_accuracy"] = self._evaluate(trained.model, "test")
        else:
            self._ends[arm, seed, rate] = [parameter.detach() for parameter in trained.parameters.values()]
        return run

    def _run(
        self, trained: Trained, arm: Arm, seed: int, rate: float, looks: Collection[int]
    ) -> list[tuple[int, float, float]]:
        """Train; [step, loss, accuracy] on the validation split after each number of steps in `looks`."""
        step = self._steps(trained, arm, rate)
        curve = [(0, *self._start)] if looks else []
        for number, rows in enumerate(self._batches(seed), start=1):
            step(rows, 1 - (number - 1) / self.settings["steps"])
            if number in looks:
                curve.append((number, *self._evaluate(trained.model, "score", CURVE_SAMPLES)))
        return curve

    @property
    def _curve_steps(self) -> tuple[int, ...]:
        return tuple(self.settings["steps"] * part // 8 for part in (1, 2, 4, 8))

    @cached_property
    def _start(self) -> tuple[float, float]:
        """The first point of every curve: all arms start from the same weights."""
        return self._evaluate(self.model, "score", CURVE_SAMPLES)

    def _steps(self, trained: Trained, arm: Arm, rate: float) -> Callable[[Tensor, float], None]:
        """A function that takes one step on the training samples with these numbers, at a share of the rates."""
        head_rate = rate if arm.name == "head only" else self.settings["head_rate"]
        rates = [head_rate if name in trained.head_names else rate for name in trained.parameters]
        groups = [{"params": [p], "lr": r} for p, r in zip(trained.parameters.values(), rates, strict=True)]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        inputs, targets = self.splits["train"]

        def step(rows: Tensor, scale: float) -> None:
            for group, full in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = full * scale
            logits = logits_of(call_model(trained.model, rows_of(inputs, rows)))
            nn.functional.cross_entropy(logits, targets[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def _order(self, seed: int) -> Tensor:
        return torch.randperm(len(self.splits["train"][1]), generator=torch.Generator().manual_seed(seed))

    def _batches(self, seed: int) -> Iterator[Tensor]:
        size, order = self.settings["batch_size"], self._order(seed)
        samples = self.settings["steps"] * size
        return iter(order.repeat(-(-samples // len(order)))[:samples].split(size))

    def _evaluate(self, model: nn.Module, split: str, samples: int | None = None) -> tuple[float, float]:
        """Mean loss and accuracy."""
        inputs, targets = self.splits[split]
        targets = targets[:samples]
        inputs = rows_of(inputs, torch.arange(len(targets)))
        score = evaluate(ReusedPrefix(model, inputs, limit=0, folder=Path()), Classification(targets))
        return score["loss"], score["accuracy"]

    # Results

    def _summary(self, name: str, orders: Mapping[int, Orders]) -> dict[str, Any]:
        runs = self._tested(name)
        first = arms(name, orders[SEEDS[0]], self.model, SEEDS[0])[0]
        return {
            "test_accuracy": [run["test_accuracy"] for run in runs],
            "test_loss": [run["test_loss"] for run in runs],
            "rate": runs[0]["rate"],
            "trained": statistics.mean(run["trained"] for run in runs),
            "curve": runs[-1]["curve"],
            **self._cost(first),
        }

    def _tested(self, name: str) -> list[dict[str, Any]]:
        runs = self.document["runs"].values()
        return [run for run in runs if run["arm"].split(" draw ")[0] == name and "test_accuracy" in run]

    def _mean_accuracy(self, name: str) -> float:
        return statistics.mean(run["test_accuracy"] for run in self._tested(name))

    def _cost(self, arm: Arm) -> dict[str, Any]:
        """Seconds and peak bytes (beyond model and batch) of a step, and of full fine-tuning in the same rounds."""
        rows = next(self._batches(SEEDS[0]))
        steps = {
            which: partial(self._steps(Trained(self.model, self.head, a), a, RATES[0]), rows, 1.0)
            for which, a in (("arm", arm), ("full", Arm("full", None)))
        }
        seconds = interleave(steps, ROUNDS)
        peaks = {which: peak_bytes(step) for which, step in steps.items()}
        return {
            "seconds": median(seconds["arm"]).as_dict(),
            "to_full": ratio(seconds, "arm", "full").as_dict(),
            "peak_bytes": peaks["arm"],
            "peak_bytes_full": peaks["full"],
        }

    def _write(self) -> None:
        self.document |= {"machine": describe_machine(), "versions": describe_versions()}
        with replacing(self.path) as temporary:
            temporary.write_text(json.dumps(self.document, indent=1) + "\n")


def _arm_of(run: Mapping[str, Any]) -> Arm:
    """What a noted run trained."""
    layers = None if run["layers"] is None else tuple(run["layers"])
    return Arm(run["arm"], layers, adapter_of(run["arm"]))
