"""The table and the curves that docs/results.md shows of bench/results/finetune.json."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from bench import pictures
from zest_fast.foundation.text_table import markdown_table

LEGEND = (
    "Accuracy on the test split in percent, mean over the seeds ± its standard error over them; every seed is in the "
    "JSON. *contribution@n*: the layers that a sweep of this very pair found best, which no prediction can know. "
    "*ZEST@n*: the Ranker's, fitted without that family of data sets; *ZEST probed@5*: with a probe of 1,024 training "
    "samples mixed in. *largest@5*: by number of parameters; *middle@5*: nearest to the middle of the depth; "
    "*random@5*: two draws a seed. *joint@5*: of 25 sets of five among the 15 that a sweep found best the one that was "
    "best together on the validation split, which takes 25 trainings. rsLoRA, DoRA, SHiRA and MiSS as PEFT has them, "
    "with as many parameters as LoRA r8 on the same layers, or nearly; SHiRA and MiSS know linear layers alone. Where "
    "an arm has no figure for a pair, its costs are means over the others. "
    "*Last columns*: means over the pairs; a step's time and peak memory (beyond weights and batch) relative to full "
    "fine-tuning in "
    "the same rounds. All arms: same start (the head fitted on its own split), same batches, the learning rate chosen "
    "on the validation split from one grid; 64 steps, SmolLM2 32."
)
RIVALS = (
    "ZEST probed@5",
    "head only",
    "full",
    "LoRA r8",
    "rsLoRA r8",
    "DoRA r8",
    "SHiRA r8",
    "MiSS r8",
    "last@5",
    "random@5",
    "largest@5",
    "middle@5",
    "RGN@5",
    "Spectrum@5",
    "contribution@5",
    "joint@5",
)
PANELS = 4
"""In a row of the plot."""

CURVES = {
    "full": "black",
    "head only": "C7",
    "contribution@5": "C2",
    "ZEST@5": "C3",
    "random@5": "C1",
    "last@5": "C4",
    "LoRA r8": "C0",
}
"""Arms in the plot, by colour."""


def finetune_text(document: dict) -> str:
    plot = "![Accuracy on the validation split by step, for each pair](../bench/results/finetune.svg)"
    parts = [finetune_table(document), LEGEND, differences_table(document), DIFFERENCES]
    if any("forgetting" in pair for pair in document["results"]):
        parts += [forgetting_table(document), FORGETTING]
    return "\n\n".join([*parts, plot])


DIFFERENCES = (
    "Points of test accuracy that ZEST@5 is above the arm, in the mean over the seeds; the last column with the "
    "standard error over the pairs."
)


FORGETTING = (
    "What is left of what a text model could before, mean over the seeds ± its standard error, on 300 sentences of "
    "other data sets: for MiniLM the rank correlation of the similarities of all pairs of sentences with those before "
    "(higher is better), for SmolLM2 the perplexity of the sentences (lower is better)."
)


def forgetting_table(document: dict) -> str:
    """A row for each arm, a column for each pair whose model has a first task to forget."""
    pairs = [pair for pair in document["results"] if "forgetting" in pair]
    noted = [{"as it came": [pair["forgetting"]["before"]], **_by_arm(pair["forgetting"]["arms"])} for pair in pairs]
    names = dict.fromkeys(name for arms in noted for name in arms)
    head = ["what trains", *(f"{pair['pair']}, {pair['forgetting']['score']}" for pair in pairs)]
    rows = [[name, *(_mean_of(arms[name]) if name in arms else "–" for arms in noted)] for name in names]
    return markdown_table(head, rows)


def _by_arm(runs: dict[str, dict[str, float]]) -> dict[str, list[float]]:
    """Draws of random layers are counted as seeds."""
    found: dict[str, list[float]] = {}
    for run, seeds in runs.items():
        found.setdefault(run.partition(" draw ")[0], []).extend(seeds.values())
    return found


def _mean_of(values: list[float]) -> str:
    places = 3 if max(values) <= 1 else 1
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.{places}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{places}f}{error}"


def differences_table(document: dict) -> str:
    """ZEST@5 minus each rival, by pair and in the mean over the pairs; of random draws, the mean of a seed."""
    pairs = document["results"]
    rows = []
    for rival in RIVALS:
        found = above(pairs, rival)
        if not found:
            continue
        cells = iter(found)
        error = f" ± {statistics.stdev(found) / len(found) ** 0.5:.1f}" if len(found) > 1 else ""
        rows.append(
            [
                rival,
                *(f"{next(cells):+.1f}" if rival in pair["arms"] else "–" for pair in pairs),
                f"{statistics.mean(found):+.1f}{error}",
            ]
        )
    return markdown_table(["ZEST@5 above", *(pair["pair"] for pair in pairs), "mean"], rows)


def above(pairs: list[dict[str, Any]], rival: str) -> list[float]:
    """Points of accuracy that ZEST@5 is above the rival, by pair that has both."""
    both = [pair["arms"] for pair in pairs if rival in pair["arms"]]
    return [100 * (_mean(arms["ZEST@5"]) - _mean(arms[rival])) for arms in both]


def _mean(arm: dict[str, Any]) -> float:
    return statistics.mean(arm["test_accuracy"])


def draw(source: bytes, path: Path) -> None:
    """Accuracy on the validation split by step (Figure 3 of the paper), a panel for each pair; source: the JSON."""
    pairs = json.loads(source)["results"]
    columns = min(PANELS, len(pairs))
    rows = -(-len(pairs) // columns)
    with pictures.figure(3.2 * columns + 1.5, 3 * rows) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes in panels[len(pairs) :]:
            axes.remove()
        for axes, pair in zip(panels[: len(pairs)], pairs, strict=True):
            for name, colour in CURVES.items():
                if name not in pair["arms"]:
                    continue
                steps, _, accuracies = zip(*pair["arms"][name]["curve"], strict=True)
                axes.plot(steps, [100 * accuracy for accuracy in accuracies], "o-", color=colour, label=name, ms=3)
            axes.set_title(pair["pair"])
            axes.set_xlabel("step")
        figure.axes[0].set_ylabel("accuracy on the validation split, %")
        figure.axes[len(pairs) - 1].legend(loc="lower right", fontsize=7)
        pictures.save(figure, source, path)


def finetune_table(document: dict) -> str:
    """A row for each arm: its accuracy on each pair, then accuracy, parameters, time and memory in the mean."""
    pairs = document["results"]
    head = ["arm", *(pair["pair"] for pair in pairs), "mean", "parameters trained", "x full time", "x full memory"]
    rows = []
    for name in dict.fromkeys(name for pair in pairs for name in pair["arms"]):
        arms = [pair["arms"].get(name) for pair in pairs]
        there = [arm for arm in arms if arm]
        accuracy, *costs = means(there)
        if len(there) < len(pairs):
            accuracy = (
                "(1 pair)" if len(there) == 1 else f"({len(there)} pairs)"
            )  # a mean over others than the rest of the column
        rows.append([name, *(_accuracy(arm) if arm else "–" for arm in arms), accuracy, *costs])
    return markdown_table(head, rows)


def _accuracy(arm: dict[str, Any]) -> str:
    values = arm["test_accuracy"]  # of random layers, draws are counted as seeds
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * error:.1f}"


def means(arms: list[dict[str, Any]]) -> list[str]:
    """Over the pairs: accuracy in percent, parameters trained, time and peak memory relative to full fine-tuning."""

    def mean(values: list[float]) -> float:
        return statistics.mean(values)

    return [
        f"{100 * mean([mean(arm['test_accuracy']) for arm in arms]):.1f}",
        f"{mean([arm['trained'] for arm in arms]):,.0f}",
        f"{mean([arm['to_full']['median'] for arm in arms]):.2f}",
        f"{mean([arm['peak_bytes'] / arm['peak_bytes_full'] for arm in arms]):.2f}",
    ]
