"""A real pair of bench.finetune from the same seeds: all weights in memory, frozen ones on disk, and with a cache.

SmolLM2 (135 M, real weights) and TREC's questions; two choices of five layers, as in bench.prefix_cache. Each arm
trains over epochs of the same samples; losses, accuracies and trained weights are held against the resident model's.
"""

from __future__ import annotations

import copy
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zest_fast
from bench.finetune.arms import Arm, Trained
from bench.packages.classifiers import Classifier, SentenceEncoder
from bench.prefix_cache import EPOCHS, RATE, ROUNDS, SAMPLES, Measured
from zest_fast.benchmarking.timing import interleave, median, ratio

PAIR = "smollm2/trec"
ZEST, UPPER = "ZEST@5", "upper half"
ARMS = (
    (ZEST, "resident"),
    (ZEST, "streamed"),
    (UPPER, "resident"),
    (UPPER, "streamed"),
    (UPPER, "resident, cached"),
    (UPPER, "streamed, cached"),
)


def pair_rows(folder: Path) -> list[dict[str, Any]]:
    """A row for each arm. folder: where the weights and the activations are written."""
    return _StreamedPair(folder).rows()


class _StreamedPair(Measured):
    def __init__(self, folder: Path) -> None:
        super().__init__(PAIR, EPOCHS)
        self._scratch, self._folder = folder, folder / "pair"

    def rows(self) -> list[dict[str, Any]]:
        self._load()
        self._fit_head()
        self._count = SAMPLES[self.model_name]
        self._save()
        choices = self._choices()
        full = Arm("full", None)
        rows, ends = [], {}
        steps = {"full": self._trains(Trained(self.model, self.head, full), full)}
        for choice, kind in ARMS:
            arm = Arm(choice, choices[choice])
            trained = self._trained_as(kind, arm)
            steps[f"{choice}, {kind}"] = step = self._trains(trained, arm)
            began = time.process_time()
            for number in range(self._epochs):
                for samples in self._epoch(number):
                    step(samples)
            seconds = time.process_time() - began
            loss, accuracy = self._evaluate(trained.model, "score")
            ends[choice, kind] = [parameter.detach().clone() for parameter in trained.parameters.values()]
            rows.append(
                {
                    "choice": choice,
                    "arm": kind,
                    "layers": arm.layers,
                    "loss": loss,
                    "accuracy": accuracy,
                    "run_seconds": seconds,
                    "equal_to_resident": all(map(torch.equal, ends[choice, kind], ends[choice, "resident"])),
                }
            )
            print(f"{choice}, {kind}: accuracy {accuracy:.4f}, {seconds:.0f} s", flush=True)
        seconds = interleave({name: partial(s, self._epoch(0)[0]) for name, s in steps.items()}, ROUNDS, warmup=2)
        for row in rows:
            name = f"{row['choice']}, {row['arm']}"
            row["seconds"] = median(seconds[name]).as_dict()
            row["to_full"] = ratio(seconds, name, "full").as_dict()
            row["to_resident"] = ratio(seconds, name, f"{row['choice']}, resident").as_dict()
        return rows

    def _save(self) -> None:
        encoder: Any = self.model.get_submodule("body.encoder")
        encoder.set_attn_implementation("sdpa")  # what a model of a folder has
        config = copy.deepcopy(encoder.config)
        del config.quantization_config  # of the file that it came from, which save_pretrained refuses
        plain = type(encoder)(config)
        plain.load_state_dict(encoder.state_dict())
        plain.save_pretrained(self._folder)

    def _trains(self, trained: Trained, arm: Arm) -> Any:
        step = self._steps(trained, arm, RATE)
        return lambda samples: step(samples, 1.0)

    def _trained_as(self, kind: str, arm: Arm) -> Trained:
        cache = None
        if "cached" in kind:
            cache = zest_fast.PrefixCache(self._scratch / f"pair {kind}", samples=self._count)
        if kind.startswith("resident"):
            return Trained(self.model, self.head, arm, cache)
        return Trained(self._streamed(arm.layers or ()), self.head, arm, cache, copied=False)

    def _streamed(self, layers: tuple[str, ...]) -> nn.Module:
        """The same classifier around a model of the folder."""
        names = [name.removeprefix("body.encoder.") for name in layers]
        encoder = zest_fast.open_streamed(self._folder, train=names, head=None)
        head: Any = self.model.get_submodule(self.head)
        classifier = Classifier(SentenceEncoder(encoder), head.in_features, head.out_features).eval()
        classifier.head = copy.deepcopy(head)
        return classifier
