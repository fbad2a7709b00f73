"""What a PrefixCache saves on the pairs of bench.finetune: time of a step, of a run over epochs, and accuracy.

    python -m bench.prefix_cache                       # four pairs, ten minutes
    python -m bench.prefix_cache --pairs minilm/trec --epochs 8

Two choices of five layers each: ZEST's, as bench.finetune trained them, and five evenly spread from the middle of the
depth up. A step reads what an earlier epoch has written (the files are in the page cache of the system) and is held
against the same step without the cache and against one of full fine-tuning, interleaved. Then each arm trains over
epochs from the same seed, with the cache and without; the run's time is that of all its steps, the first epoch's
computing and writing among them. Below the cut everything is in eval mode, with the cache and without: these models are
trained so in bench.finetune. "At best" is the step without the time of its forward pass up to the cut, measured in the
same rounds: reading that took no time would leave so much. Each pair is written when it is done, and a later call goes
on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.finetune.arms import Arm, Trained
from bench.finetune.run import FOLDER, Pair
from bench.measure import RESULTS, write_result
from zest_fast import PrefixCache
from zest_fast.benchmarking.timing import interleave, median, ratio
from zest_fast.foundation.text_table import markdown_table
from zest_fast.prefix.inputs import rows_of
from zest_fast.profiling.layers import find_layers
from zest_fast.profiling.loss import call_model

PAIRS = ("efficientnet-lite0/mnist", "minilm/trec", "mobilenet-v2/fashion", "smollm2/trec")
LAYERS = 5
ROUNDS = 9
EPOCHS = 4
SAMPLES = {"smollm2": 128}
"""Of the training split, in an epoch; 512 for the others."""
RATE = 3e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), metavar="MODEL/DATASET")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="measure what the JSON has already")
    parser.add_argument("--out", type=Path, help="folder of the JSON, in place of bench/results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = (arguments.out or RESULTS) / "prefix_cache.json"
    rows = {row["pair"]: row for row in json.loads(path.read_text())["results"]} if path.exists() else {}
    for pair in arguments.pairs:
        if pair in rows and not arguments.again:
            continue
        rows[pair] = Measured(pair, arguments.epochs).row()
        write_result(
            "prefix_cache", {"layers": LAYERS, "rounds": ROUNDS, "rate": RATE}, list(rows.values()), arguments.out
        )
        for name, arm in rows[pair]["arms"].items():
            print(f"{pair}: {name}: a step {arm['to_plain']['median']:.2f} of the same without the cache", flush=True)


class Measured(Pair):
    """The model, the data and the head of a pair of bench.finetune; nothing is written to its file."""

    def __init__(self, pair: str, epochs: int) -> None:
        super().__init__(pair, FOLDER)
        self._epochs = epochs

    def row(self) -> dict[str, Any]:
        self._load()
        self._fit_head()
        self._count = min(SAMPLES.get(self.model_name, 512), len(self.splits["train"][1]))
        return {
            "pair": self.name,
            "epochs": self._epochs,
            "samples": self._count,
            "batch_size": self.settings["batch_size"],
            "arms": {name: self._measured(name, layers) for name, layers in self._choices().items()},
        }

    def _choices(self) -> dict[str, tuple[str, ...]]:
        runs = [run for run in self._tested("ZEST@5") if run["seed"] == 0]
        upper = self._upper_half()
        places = [round(place * (len(upper) - 1) / (LAYERS - 1)) for place in range(LAYERS)]
        return {"ZEST@5": tuple(runs[0]["layers"]), "upper half": tuple(upper[place] for place in places)}

    def _upper_half(self) -> list[str]:
        """Layers but the head, by the order of modules, which in these models is that of use."""
        rows = [row for row in find_layers(dict(self.model.named_modules())) if not row.is_embedding]
        names = [row.name for row in rows if row.name != self.head]
        return names[len(names) // 2 :]

    def _measured(self, name: str, layers: tuple[str, ...]) -> dict[str, Any]:
        arm = Arm(name, layers)
        plain, cached, full = self._run_over_epochs(arm), {}, self._run_over_epochs(Arm("full", None))
        with tempfile.TemporaryDirectory() as folder:
            cache = PrefixCache(folder, samples=self._count)
            cached = self._run_over_epochs(arm, cache)
            steps = {
                "plain": self._one_step(arm),
                "cached": self._one_step(arm, again := PrefixCache(folder, samples=self._count)),
                "full": self._one_step(Arm("full", None)),
                "below": self._below(arm, cached["cut"]),
            }
            seconds = interleave(steps, ROUNDS, warmup=2)
            text, kept = str(cache), cache.bytes_kept
            if again.computed:
                raise RuntimeError(f"{again.computed} samples were computed in what should be read")
        return {
            "layers": layers,
            "cut": cached["cut"],
            "seconds": {which: median(values).as_dict() for which, values in seconds.items()},
            "to_plain": ratio(seconds, "cached", "plain").as_dict(),
            "to_full": ratio(seconds, "cached", "full").as_dict(),
            "below_to_plain": ratio(seconds, "below", "plain").as_dict(),
            "run_seconds": {"plain": plain["seconds"], "cached": cached["seconds"], "full": full["seconds"]},
            "accuracy": {"plain": plain["accuracy"], "cached": cached["accuracy"], "full": full["accuracy"]},
            "loss": {"plain": plain["loss"], "cached": cached["loss"]},
            "bytes": kept,
            "cache": text,
        }

    def _one_step(self, arm: Arm, cache: PrefixCache | None = None) -> Any:
        """On the first batch, every time."""
        step = self._steps(Trained(self.model, self.head, arm, cache), arm, RATE)
        return partial(step, self._epoch(0)[0], 1.0)

    def _below(self, arm: Arm, cut: str) -> Callable[[], None]:
        """The forward pass of the same batch, ended where the layer of the cut is called."""
        model, inputs = Trained(self.model, self.head, arm).model, self.splits["train"][0]
        samples = rows_of(inputs, self._epoch(0)[0])

        def ends(*_: Any) -> None:
            raise _AtTheCut

        model.get_submodule(cut).register_forward_pre_hook(ends)

        def run() -> None:
            with suppress(_AtTheCut):
                call_model(model, samples)

        return run

    def _epoch(self, number: int) -> list[torch.Tensor]:
        """Row numbers: the same samples in another order, in the first epoch as they lie."""
        order = torch.arange(self._count)
        if number:
            order = torch.randperm(self._count, generator=torch.Generator().manual_seed(number))
        return list(order.split(self.settings["batch_size"]))

    def _run_over_epochs(self, arm: Arm, cache: PrefixCache | None = None) -> dict[str, Any]:
        trained = Trained(self.model, self.head, arm, cache)
        step = self._steps(trained, arm, RATE)
        total = self._epochs * len(self._epoch(0))
        done, began = 0, time.process_time()
        for number in range(self._epochs):
            for rows in self._epoch(number):
                step(rows, 1 - done / total)
                done += 1
        seconds = time.process_time() - began
        loss, accuracy = self._evaluate(trained.model, "score")
        return {"seconds": seconds, "loss": loss, "accuracy": accuracy, "cut": _cut(trained.model)}


class _AtTheCut(Exception):
    """Nothing more of this pass is wanted."""


def _cut(model: nn.Module) -> str:
    """The first module with a parameter that trains."""
    return next(name for name, p in model.named_parameters() if p.requires_grad).rpartition(".")[0]


def cache_text(document: dict) -> str:
    """The table of docs/results.md: a row for each choice of layers of a pair."""
    rows = []
    for row in document["results"]:
        for name, arm in row["arms"].items():
            runs, accuracy = arm["run_seconds"], arm["accuracy"]
            rows.append(
                [
                    f"{row['pair']}, {name}",
                    arm["cut"].removeprefix("body."),
                    f"{arm['to_plain']['median']:.2f}",
                    f"{1 - arm['below_to_plain']['median']:.2f}",
                    f"{arm['to_full']['median']:.2f}",
                    f"{runs['cached'] / runs['plain']:.2f}",
                    f"{runs['cached'] / runs['full']:.2f}",
                    f"{100 * accuracy['plain']:.1f}",
                    f"{100 * accuracy['cached']:.1f}",
                    f"{arm['bytes'] / row['samples'] / 1024:.0f}",
                ]
            )
    head = ["pair, five layers", "cut", "a step, x without", "at best", "x full", "4 epochs, x without", "x full"]
    return markdown_table([*head, "accuracy without", "with", "KiB a sample"], rows)


if __name__ == "__main__":
    main()
