"""The tables and the plot that docs/results.md shows of bench/results/layerbench.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import pictures
from bench.layerbench.control_contestants import NAMES as CONTROLS
from bench.layerbench.goals import PROBED
from bench.layerbench.protocol import SETTINGS
from zest_fast.foundation.text_table import markdown_table

KNOWN, NEW, OTHER = SETTINGS
NAMES = {
    PROBED: "**Ranker, probed**",
    "probe alone": "the probe alone",
    "ranker": "**Ranker, one batch**",
    "ranker, labels shuffled": "*control:* Ranker, labels shuffled",
    "ranker, noise inputs": "*control:* Ranker, noise for inputs",
    "ranker, metrics only": "Ranker without static features",
    "ranker, metrics only, labels shuffled": "*control:* the same, labels shuffled",
    "ranker, metrics only, noise inputs": "*control:* the same, noise for inputs",
    "layer prior": "layer prior",
    "kind prior": "prior of the kind of layer",
    "number of parameters": "*no batch:* number of parameters",
    "middle": "*no batch:* middle first",
    "uniform": "*no batch:* evenly spaced",
    "depth": "*no batch:* depth, sign learned",
    "step gain": "first-order gain of a step (nothing learned)",
    "step gain, labels shuffled": "*control:* the same, labels shuffled",
    "step gain, noise inputs": "*control:* the same, noise for inputs",
    "mlp on pairs": "the paper's MLP on pairs",
    "ridge": "ridge",
    "best single metric": "best single metric of the training pairs",
    "resnorm": "resnorm (Layer Card)",
    "normalised gradient": "normalised gradient norm",
    "grass": "GRASS (mean gradient norm of the block)",
    "adagradselect": "AdaGradSelect (gradient norm of the block)",
    "lisa weight norm": "LISA (norm of the weight)",
    "rgn": "RGN",
    "spectrum": "Spectrum (signal to noise)",
    "kappatune": "KappaTune (condition number)",
    "random": "random",
}
"""Rows of the table. Single metrics are in the plot and in the JSON."""
_APART = (PROBED, "ranker", "layer prior", "number of parameters", "middle", "step gain", *CONTROLS[:2])
"""Of which the pairs of version 1 are shown apart."""
_BESIDE_PROBES = (PROBED, "probe alone", *_APART[1:6])
"""What stands beside probes on the pairs that have one."""
LEGEND = (
    "*Tau*: Kendall's, between a ranking of the layers and what fine-tuning each of them alone gains; mean over pairs "
    "of model and data set, with its 95 % bootstrap interval over them. *Known models*: families of data sets held "
    "out; *new models*: families of models held out; *other modality*: trained on vision, tested on text, and the "
    "reverse. Profiles with a fresh head, as at the start; *warm head*: tau where it was trained before. *Weighted*: "
    "mean tau weighted by the reliability of each pair's gains. *Top 5 recover*: of the mean gain of the best possible "
    "five layers, where random layers have 0. *Kept*: the gain of the first five over that of the best five, both "
    "counted from the head retrained alone. *Blocks*: tau between blocks. *Attainable*: by a perfect predictor, given "
    "the noise of the gains. *Controls*: the same contestant shown a batch that says nothing; what it keeps it did not "
    "read from the batch. What full fine-tuning gains is not in the records, so no layer's share of it is shown. In "
    "the plot: the Ranker in red, controls in orange, single metrics (signs learned on training pairs) in grey. "
    "Protocol: [bench/layerbench/protocol.py](../bench/layerbench/protocol.py)."
)


def layerbench_text(document: dict[str, Any]) -> str:
    """The headline, the plot, the tables, and in words which goals were met."""
    plot = "![Kendall's tau of every ranking, by setting](../bench/results/layerbench.svg)"
    apart = [
        _apart(document[key], words, names)
        for key, words, names in (
            ("summary_of_probed_pairs", "The {} pairs alone that were probed:", _BESIDE_PROBES),
            (
                "summary_of_version_1_pairs",
                "The {} pairs alone that version 1 of the protocol judged; what is fitted was fitted to all pairs:",
                _APART,
            ),
        )
        if document.get(key)
    ]
    words = [_goals(document["must_reach"]), _worst(document["diagnosis"])]
    return "\n\n".join([_headline(document["summary"]), plot, layerbench_table(document), LEGEND, *apart, *words])


def layerbench_table(document: dict[str, Any]) -> str:
    """Tau with its interval, the Ranker's lead and what the first layers are worth; of the other modality tau alone."""
    summary = document["summary"]
    columns = {
        KNOWN: ("tau", "Ranker ahead by", "top 5 recover"),
        NEW: ("tau", "warm head", "weighted", "Ranker ahead by", "top 5 recover", "kept", "blocks"),
        OTHER: ("tau",),
    }
    settings = [name for name in SETTINGS if name in summary]
    head = ["layers ranked by"]
    for setting in settings:
        first, *rest = columns[setting]
        head += [f"{setting}: {first}", *rest]
    names = [name for name in NAMES if any(name in summary[s]["fresh"]["contestants"] for s in settings)]
    rows = [[NAMES[name], *(cell for s in settings for cell in _cells(summary[s], name, columns[s]))] for name in names]
    last = ["*attainable*"]
    for setting in settings:
        attainable = {"tau": f"{summary[setting]['fresh']['attainable_tau']:.2f}", "top 5 recover": "1.00"}
        last += [attainable.get(column, "") for column in columns[setting]]
    return markdown_table(head, [*rows, last])


def _cells(of_setting: dict[str, Any], name: str, columns: tuple[str, ...]) -> list[str]:
    fresh = of_setting["fresh"]["contestants"].get(name)
    if fresh is None:
        return [""] * len(columns)
    warm = of_setting.get("warm", {}).get("contestants", {}).get(name, {}).get("tau", {})
    cells = {
        "tau": _with_interval(fresh["tau"]),
        "warm head": _number(warm.get("mean")),
        "weighted": _number(fresh["tau"].get("weighted_mean")),
        "Ranker ahead by": "" if name == "ranker" else _with_interval(fresh["ranker_ahead"]["tau"], "+.2f"),
        "top 5 recover": _number(fresh["top_5"].get("mean")),
        "kept": _number(fresh["kept_5"].get("mean")),
        "blocks": _number(fresh["block_tau"].get("mean")),
    }
    return [cells[column] for column in columns]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _with_interval(value: dict[str, Any], form: str = ".2f") -> str:
    """With the number of pairs where it is not that of the setting."""
    if "mean" not in value:
        return ""
    low, high = value["interval"]
    fewer = f", {value['pairs']} pairs" if "pairs" in value else ""
    return f"{value['mean']:{form}} ({low:{form}} to {high:{form}}{fewer})"


def _headline(summary: dict[str, Any]) -> str:
    """Tau of the Ranker on new models, or on what there is, beside what saw no batch or a batch that says nothing."""
    setting = NEW if NEW in summary else next(iter(summary))
    contestants = summary[setting]["fresh"]["contestants"]
    parts = {
        "ranker": "the Ranker",
        "ranker, labels shuffled": "with the batch's labels shuffled",
        "ranker, noise inputs": "with noise for inputs",
        "number of parameters": "number of parameters alone",
        "middle": "middle layers first",
        PROBED: "the Ranker with a probe",
    }
    found = []
    for name, words in parts.items():
        tau = contestants.get(name, {}).get("tau", {})
        if "pairs" in tau and "mean" in tau:  # of fewer pairs: beside the Ranker on the same ones
            ahead = contestants[name]["ranker_ahead"]["tau"]["mean"]
            found.append(
                f"{words} {tau['mean']:.2f} on {tau['pairs']} pairs, where the Ranker has {tau['mean'] + ahead:.2f}"
            )
        elif "mean" in tau:
            found.append(f"{words} {tau['mean']:.2f}")
    return f"**One batch, {setting}** ({summary[setting]['fresh']['pairs']} pairs), mean tau: {'; '.join(found)}."


def _apart(summary: dict[str, Any], words: str, names: tuple[str, ...]) -> str:
    """Means over some of the pairs alone. words: with a place for their number."""
    settings = [name for name in SETTINGS if name in summary]
    rows = []
    for name in names:
        found = [summary[setting]["fresh"]["contestants"].get(name) for setting in settings]
        if any(found):
            cells = [
                ("", "") if one is None else (_with_interval(one["tau"]), _number(one["top_5"].get("mean")))
                for one in found
            ]
            rows.append([NAMES[name], *(cell for pair in cells for cell in pair)])
    head = ["layers ranked by", *(part for s in settings for part in (f"{s}: tau", "top 5 recover"))]
    last = [f"{summary[s]['fresh']['attainable_tau']:.2f}" for s in settings]
    rows.append(["*attainable*", *(cell for tau in last for cell in (tau, "1.00"))])
    return f"{words.format(summary[settings[-1]]['fresh']['pairs'])}\n\n{markdown_table(head, rows)}"


def _goals(goals: list[dict[str, Any]]) -> str:
    lines = ["What was asked for, and what came out:", ""]
    for goal in goals:
        met = "met" if goal["met"] else "**missed**"
        lines.append(f"- {goal['setting']}, {goal['goal']}: {goal['value']:.2f}, {met}")
    return "\n".join(lines)


def _worst(diagnosis: list[dict[str, Any]]) -> str:
    """Pairs of known models that stay far below what is attainable, with what stands out about them."""
    far = [entry for entry in diagnosis if entry["setting"] == KNOWN and entry["stands_out"]]
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
    order = sorted(first, key=lambda name: first[name]["tau"].get("mean", -1.0))
    with pictures.figure(4 * len(settings) + 1, 0.2 * len(order) + 1) as figure:
        panels = figure.subplots(1, len(settings), sharey=True, squeeze=False)[0]
        for axes, setting in zip(panels, settings, strict=True):
            _panel(axes, summary[setting]["fresh"], order)
            axes.set_title(f"{setting} ({summary[setting]['fresh']['pairs']} pairs)")
        pictures.save(figure, source, path)


def _panel(axes: Any, part: dict[str, Any], order: list[str]) -> None:
    for row, name in enumerate(order):
        tau = part["contestants"].get(name, {}).get("tau", {})
        if "mean" not in tau:
            continue
        axes.plot(tau["interval"], [row, row], color=_colour(name), linewidth=1.5)
        axes.plot(tau["mean"], row, "o", color=_colour(name), markersize=4)
    axes.axvline(part["attainable_tau"], color="black", linestyle=":", linewidth=1)
    axes.axvline(0, color="black", linewidth=0.5)
    axes.set_yticks(range(len(order)), order)
    axes.set_xlabel("Kendall's tau, fresh head; dotted: attainable")


def _colour(name: str) -> str:
    if name in CONTROLS:
        return "C1"
    return "C3" if name.startswith("ranker") else "C7" if name.startswith("metric ") else "C0"
