"""The table and the plot that docs/results.md shows of bench/results/ranking.json."""

from __future__ import annotations

import json
from pathlib import Path

from bench import pictures
from bench.markdown import markdown_table

SETTINGS = ("known models", "new models", "other modality")
NAMES = {
    "ranker": "**Ranker**",
    "ranker, metrics only": "Ranker without static features",
    "mlp on pairs": "the paper's MLP on pairs",
    "ridge": "ridge",
    "layer prior": "layer prior",
    "kind prior": "prior of the kind of layer",
    "best single metric": "best single metric of the training pairs",
    "step gain": "first-order gain of a step (nothing learned)",
    "depth": "depth",
    "rgn": "RGN",
    "spectrum": "Spectrum (signal to noise)",
    "kappatune": "KappaTune (condition number)",
    "random": "random",
}
"""Rows of the table. Single metrics are in the plot and in the JSON."""
LEGEND = (
    "*Tau*: Kendall's, between a ranking of the layers and what fine-tuning each of them alone gains; mean over pairs "
    "of model and data set, with its 95 % bootstrap interval over them. *Known models*: families of data sets held "
    "out; *new models*: families of models held out; *other modality*: trained on vision, tested on text, and the "
    "reverse. Profiles with a fresh head, as at the start; *warm head*: tau where it was trained before. *Top 5 "
    "recover*: of the mean gain of the best possible five layers, where random layers have 0. *Attainable*: by a "
    "perfect predictor, given the noise of the gains. In the plot: the Ranker in red, single metrics (signs learned on "
    "training pairs) in grey. The protocol was committed before the first fit: "
    "[bench/ranking_protocol.py](../bench/ranking_protocol.py)."
)


def ranking_text(document: dict) -> str:
    """The plot, the table, and in words which goals were met."""
    plot = "![Kendall's tau of every ranking, by setting](../bench/results/ranking.svg)"
    words = [_goals(document["must_reach"]), _worst(document["diagnosis"])]
    return "\n\n".join([plot, ranking_table(document), LEGEND, *words])


def ranking_table(document: dict) -> str:
    """Tau with its interval, the Ranker's lead and what the top 5 recover; of the other modality tau alone."""
    summary = document["summary"]
    settings = [name for name in SETTINGS if name in summary]
    head = ["layers ranked by"]
    for setting in settings:
        head += [f"{setting}: tau", "warm head", "Ranker ahead by", "top 5 recover"][: _columns(setting)]
    rows = [[words] for words in NAMES.values()]
    last = ["*attainable*"]
    for setting in settings:
        for name, row in zip(NAMES, rows, strict=True):
            row += _cells(summary[setting], name)[: _columns(setting)]
        last += [f"{summary[setting]['fresh']['attainable_tau']:.2f}", "", "", "1.00"][: _columns(setting)]
    return markdown_table(head, [*rows, last])


def _columns(setting: str) -> int:
    return 1 if setting == "other modality" else 4


def _cells(of_setting: dict, name: str) -> list[str]:
    fresh = of_setting["fresh"]["contestants"].get(name)
    if fresh is None:
        return [""] * 4
    warm = of_setting["warm"]["contestants"][name]
    ahead = "" if name == "ranker" else _with_interval(fresh["ranker_ahead"]["tau"], "+.2f")
    return [_with_interval(fresh["tau"]), f"{warm['tau']['mean']:.2f}", ahead, f"{fresh['top_5']['mean']:.2f}"]


def _with_interval(value: dict, form: str = ".2f") -> str:
    low, high = value["interval"]
    return f"{value['mean']:{form}} ({low:{form}} to {high:{form}})"


def _goals(goals: list[dict]) -> str:
    lines = ["What was asked for, and what came out:", ""]
    for goal in goals:
        met = "met" if goal["met"] else "**missed**"
        lines.append(f"- {goal['setting']}, {goal['goal']}: {goal['value']:.2f}, {met}")
    return "\n".join(lines)


def _worst(diagnosis: list[dict]) -> str:
    """Pairs of known models that stay far below what is attainable, with what stands out about them."""
    far = [entry for entry in diagnosis if entry["setting"] == SETTINGS[0] and entry["stands_out"]]
    if not far:
        return "No pair of a known model stays far below (under 0.6 of) its attainable tau."
    lines = ["Pairs of known models that stay far below (under 0.6 of) their attainable tau:", ""]
    for entry in far:
        taus = f"{entry['tau_ranker']:.2f} of {entry['attainable_tau']:.2f}"
        lines.append(f"- {entry['pair']}, {taus}: {'; '.join(entry['stands_out'])}")
    return "\n".join(lines)


def draw(source: bytes, path: Path) -> None:
    """Tau of every contestant with its interval, a panel for each setting; source: the JSON."""
    summary = json.loads(source)["summary"]
    settings = [name for name in SETTINGS if name in summary]
    first = summary[settings[0]]["fresh"]["contestants"]
    order = sorted(first, key=lambda name: first[name]["tau"]["mean"])
    with pictures.figure(4 * len(settings) + 1, 0.22 * len(order) + 1) as figure:
        panels = figure.subplots(1, len(settings), sharey=True, squeeze=False)[0]
        for axes, setting in zip(panels, settings, strict=True):
            _panel(axes, summary[setting]["fresh"], order)
            axes.set_title(f"{setting} ({summary[setting]['fresh']['pairs']} pairs)")
        pictures.save(figure, source, path)


def _panel(axes, part: dict, order: list[str]) -> None:
    for row, name in enumerate(order):
        if name not in part["contestants"]:
            continue
        tau = part["contestants"][name]["tau"]
        colour = "C3" if name.startswith("ranker") else "C7" if name.startswith("metric ") else "C0"
        axes.plot(tau["interval"], [row, row], color=colour, linewidth=1.5)
        axes.plot(tau["mean"], row, "o", color=colour, markersize=4)
    axes.axvline(part["attainable_tau"], color="black", linestyle=":", linewidth=1)
    axes.axvline(0, color="black", linewidth=0.5)
    axes.set_yticks(range(len(order)), order)
    axes.set_xlabel("Kendall's tau, fresh head; dotted: attainable")
