"""Fine-tuning in pure bfloat16 with and without float32 masters, beside float32, on a pair of bench.finetune.

python -m bench.masters [--pair efficientnet-lite0/mnist] [--seeds 10]      # writes bench/results/masters.json

Every arm starts from the same weights and takes the same steps on the same batches, with the layers and the rate that
the arm "ZEST@5" of bench.finetune has (its three seeds' layers in turn); then the same at RATE of the README, where
bfloat16 rounds most steps away. Accuracy is on the split "test". `moved` is the share of the chosen weights that are
not where they were: of the masters, where there are some.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bench.finetune.run import FOLDER, SEEDS, Pair
from bench.measure import write_result
from zest_fast.finetuning.selective_backward import SelectiveBackward
from zest_fast.lean.master_weights import MasterWeights
from zest_fast.lean.optimizer import adamw
from zest_fast.prefix.inputs import logits_of, rows_of
from zest_fast.profiling.loss import call_model

RATE = 2e-5  # of the README
ARMS = ("float32", "bfloat16", "bfloat16 with masters")


class Job(Pair):
    """The pair with its head fitted, and one model in each type."""

    def __init__(self, pair: str) -> None:
        super().__init__(pair, FOLDER)
        self._load()
        self._fit_head()
        self.model.eval()

    def found(self) -> list[dict[str, Any]]:
        """The tested runs of ZEST@5: layers, rate, seed, accuracy."""
        return [run for run in self._tested("ZEST@5") if run["seed"] in SEEDS]

    def train(self, arm: str, layers: tuple[str, ...], rate: float, head_rate: float, seed: int) -> dict[str, Any]:
        model = copy.deepcopy(self.model)
        low = arm != "float32"
        if low:
            model.bfloat16()
        with SelectiveBackward(model, layers, head=self.head) as tuned:
            names = list(tuned.trainable_names)
            parameters = list(tuned.parameters())
            before = [p.detach().clone() for p in parameters]
            in_head = [name.startswith(f"{self.head}.") for name in names]
            rates = [head_rate if head else rate for head in in_head]
            groups = [{"params": [p], "lr": r} for p, r in zip(parameters, rates, strict=True)]
            build = MasterWeights if arm.endswith("masters") else adamw
            optimizer: Any = build(groups, weight_decay=0.0)
            for number, rows in enumerate(self._batches(seed)):
                for group, full in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = full * (1 - number / self.settings["steps"])
                self._loss(model, "train", rows).backward()
                optimizer.step()
                optimizer.zero_grad()
            held = [optimizer.master_of(p) if isinstance(optimizer, MasterWeights) else p for p in parameters]
            apart = [(h != b).flatten() for h, b, head in zip(held, before, in_head, strict=True) if not head]
            moved = float(torch.cat(apart).float().mean())
        return {"arm": arm, "seed": seed, "rate": rate, "moved": moved, **self._score(model)}

    def _loss(self, model: nn.Module, split: str, rows: Tensor) -> Tensor:
        inputs, targets = self.splits[split]
        inputs = _cast(rows_of(inputs, rows), next(model.parameters()).dtype)
        return nn.functional.cross_entropy(logits_of(call_model(model, inputs)).float(), targets[rows])

    @torch.no_grad()
    def _score(self, model: nn.Module) -> dict[str, float]:
        inputs, targets = self.splits["test"]
        right = 0
        for rows in torch.arange(len(targets)).split(64):
            batch = _cast(rows_of(inputs, rows), next(model.parameters()).dtype)
            right += int((logits_of(call_model(model, batch)).argmax(1) == targets[rows]).sum())
        return {"test_accuracy": right / len(targets), "tests": len(targets)}


def _cast(inputs: Any, dtype: torch.dtype) -> Any:
    return inputs.to(dtype) if isinstance(inputs, Tensor) and inputs.is_floating_point() else inputs


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.masters", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pair", default="efficientnet-lite0/mnist", metavar="MODEL/DATASET")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    job, results = Job(arguments.pair), []
    for rate in (None, RATE):
        for seed in range(arguments.seeds):
            run = job.found()[seed % len(SEEDS)]
            for arm in ARMS:
                head_rate = job.settings["head_rate"] if rate is None else rate
                results.append(job.train(arm, tuple(run["layers"]), rate or run["rate"], head_rate, seed))
                print(json.dumps(results[-1]), flush=True)
    means = list(_means(results))
    for row in means:
        print(json.dumps(row))
    settings = {"pair": arguments.pair, "seeds": arguments.seeds, "readme_rate": RATE, **job.settings}
    write_result("masters", settings, [*means, *results])


def _means(results: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of each arm and rate, and its distance from float32 with the standard error over the seeds."""
    for rate in dict.fromkeys(row["rate"] for row in results):
        found = {arm: [row for row in results if (row["rate"], row["arm"]) == (rate, arm)] for arm in ARMS}
        for arm, rows in found.items():
            accuracies = [row["test_accuracy"] for row in rows]
            pairs = zip(rows, found["float32"], strict=True)
            apart = [row["test_accuracy"] - other["test_accuracy"] for row, other in pairs]
            yield {
                "mean of": arm,
                "rate": rate,
                "test_accuracy": statistics.mean(accuracies),
                "standard_error": statistics.stdev(accuracies) / len(accuracies) ** 0.5,
                "to_float32": statistics.mean(apart),
                "to_float32_standard_error": statistics.stdev(apart) / len(apart) ** 0.5,
                "moved": statistics.mean(row["moved"] for row in rows),
            }


if __name__ == "__main__":
    main()
