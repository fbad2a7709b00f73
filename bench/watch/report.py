"""The tables that docs/results.md shows of bench/results/watch.json."""

from __future__ import annotations

from typing import Any

from zest_fast.foundation.text_table import markdown_table

SHOWN = {
    "watch": "**watch**",
    "watch, all metrics": "**watch**, all metrics",
    "watch, histograms": "**watch**, histograms",
    "histograms": "wandb-style histograms",
    "reductions": "torch reductions",
    "cache": "cache, nothing computed",
    "cache, reduced": "cache, reduced",
}


def watch_text(document: dict) -> str:
    rows = document["results"]
    parts = [_logged(rows), LEGEND, _mean(rows), MEANS]
    return "\n\n".join(parts)


LEGEND = (
    "Processor time of a step that is logged, as a multiple of a plain one (forward, backward, AdamW), with the "
    "interval of the median. *watch*: ten metrics of each weight and its gradient; *torch reductions*: the same ten, "
    "one expression each; *all metrics*: outputs and fisher too, as *cache, reduced* takes them from outputs and "
    "gradients that module hooks have kept (TransformerLens' way; *cache* keeps and computes nothing). Histograms: a "
    "watch's of weights and gradients of the layers beside its ten metrics, wandb's of the gradients of all "
    "parameters. Processes share the cores of one machine, and are measured by the clock."
)
MEANS = (
    "Mean overhead where each k-th step is logged, in percent of a plain step, and that of a step between: a watch "
    "counts there, wandb-style hooks do so for each parameter; the others cost nothing then."
)


def _logged(rows: list[dict[str, Any]]) -> str:
    body = [
        [_name(row), f"{row['seconds']['plain']['median']:.2f}", *(_interval(row["to_plain"][name]) for name in SHOWN)]
        for row in rows
    ]
    return markdown_table(["model, batch", "plain, s", *SHOWN.values()], body)


def _mean(rows: list[dict[str, Any]]) -> str:
    body = []
    for row in rows:
        for name in ("watch", "watch, all metrics", "histograms"):
            between = row["to_plain"].get(f"{name.split(',')[0]}, not logged")
            cells = [_percent(row["at_every"][name][str(k)]) for k in (1, 10, 100)]
            body.append([_name(row), SHOWN[name], *cells, _percent(between) if between else ""])
    return markdown_table(["model, batch", "", "k = 1", "k = 10", "k = 100", "a step between"], body)


def _name(row: dict[str, Any]) -> str:
    processes = f", {row['processes']} processes" if "processes" in row else ""
    return f"{row['model']} {row['shape']}{processes}"


def _interval(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['low']:.2f} to {spread['high']:.2f})"


def _percent(spread: dict[str, float]) -> str:
    median, low, high = (100 * (spread[key] - 1) for key in ("median", "low", "high"))
    return f"{median:+.1f} ({low:+.1f} to {high:+.1f})"
