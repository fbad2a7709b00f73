"""The table that README.md shows of bench/results/finetune.json."""

from __future__ import annotations

import statistics
from typing import Any

LEGEND = (
    "Accuracy on the test split in percent, mean over the seeds ± its standard error over them; every seed is in the "
    "JSON. *contribution@n*: the layers that a sweep of this very pair found best, which no prediction can know. "
    "*ZEST@n*: the Ranker's, fitted without that family of data sets. *random@5*: two draws a seed. *Last columns*: "
    "means over the pairs; a step's time and peak memory (beyond weights and batch) relative to full fine-tuning in "
    "the same rounds. All arms: same start (the head fitted on its own split), same batches, the learning rate chosen "
    "on the validation split from one grid."
)


def finetune_text(document: dict) -> str:
    return "\n\n".join([finetune_table(document), LEGEND])


def finetune_table(document: dict) -> str:
    """A row for each arm: its accuracy on each pair, then accuracy, parameters, time and memory in the mean."""
    pairs = document["results"]
    head = ["arm", *(pair["pair"] for pair in pairs), "mean", "parameters trained", "x full time", "x full memory"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name in pairs[0]["arms"] if pairs else ():
        arms = [pair["arms"][name] for pair in pairs]
        lines.append([name, *(_accuracy(arm) for arm in arms), *_means(arms)])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _accuracy(arm: dict[str, Any]) -> str:
    values = arm["test_accuracy"]
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * error:.1f}"


def _means(arms: list[dict[str, Any]]) -> list[str]:
    def mean(values: list[float]) -> float:
        return statistics.mean(values)

    return [
        f"{100 * mean([mean(arm['test_accuracy']) for arm in arms]):.1f}",
        f"{mean([arm['trained'] for arm in arms]):,.0f}",
        f"{mean([arm['to_full']['median'] for arm in arms]):.2f}",
        f"{mean([arm['peak_bytes'] / arm['peak_bytes_full'] for arm in arms]):.2f}",
    ]
