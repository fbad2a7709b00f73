"""Results as rows of cells, as Markdown, and as a picture."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from zest_fast.benchmarking.results import Case, Measured, Result
from zest_fast.foundation.text_table import markdown_table, printable
from zest_fast.profiling.heat_map import GREY, INK, figure_class, save_figure

Column = tuple[str, Callable[[Case, Measured], str]]
_COLOURS = ("#2a6f97", "#e4572e", "#7a9e3f", "#b07aa1", "#edae49", "#777777")


def _figure(name: str, form: str) -> Callable[[Case, Measured], str]:
    return lambda case, one: format(one.figures[name], form) if name in one.figures else ""


def _share(name: str, roof: str) -> Callable[[Case, Measured], str]:
    def of(case: Case, one: Measured) -> str:
        return f"{one.figures[name] / case.figures[roof]:.0%}" if name in one.figures and roof in case.figures else ""

    return of


_COLUMNS: dict[str, tuple[Column, ...]] = {
    "kernels": (
        ("GB/s", _figure("gb_per_s", ".1f")),
        ("of read", _share("gb_per_s", "read_gb_per_s")),
        ("GFLOP/s", _figure("gflop_per_s", ".0f")),
        ("of mm", _share("gflop_per_s", "mm_gflop_per_s")),
    ),
    "profile": (("peak MiB", _figure("peak_mib", ".1f")),),
    "step": (("x FLOPs", _figure("flops_share", ".3f")), ("peak MiB", _figure("peak_mib", ".1f"))),
    "plan": (("peak MiB", _figure("peak_mib", ".1f")),),
}


def table_of(command: str, case: Case) -> tuple[list[str], list[list[str]]]:
    """Head and rows of one case; columns that nobody fills are left out."""
    columns = [(head, of) for head, of in _COLUMNS[command] if any(of(case, one) for one in case.measured)]
    head = ["", "Match", "ms", "95 % interval", f"x {case.baseline}", *(head for head, _ in columns)]
    rows = [[*_common(one), *(of(case, one) for _, of in columns)] for one in case.measured]
    return head, rows


def _common(one: Measured) -> list[str]:
    match = "" if one.match is None else "yes" if one.match else "NO"
    if one.seconds is None:
        return [one.name, match, "not timed", "", ""]
    found = one.seconds
    interval = f"{_ms(found.low)} to {_ms(found.high)}"
    return [one.name, match, _ms(found.median), interval, f"{one.ratio.median:.3g}" if one.ratio else ""]


def _ms(seconds: float) -> str:
    """Four digits, without an exponent."""
    value = seconds * 1e3
    return f"{value:.4f}" if value < 1 else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def remarks_of(case: Case) -> Iterator[str]:
    """What stands below the table: roofs, who is not timed and why, and what looks impossible."""
    names = {"read_gb_per_s": "read bandwidth of this run: {:.1f} GB/s", "mm_gflop_per_s": "torch.mm: {:.0f} GFLOP/s"}
    if roofs := [text.format(case.figures[name]) for name, text in names.items() if name in case.figures]:
        yield "; ".join(roofs)
    for one in case.measured:
        if one.why:
            yield f"{one.name}: not timed: {one.why}"
    for warning in case.warnings:
        yield f"WARNING: {warning}"


def where(result: Result) -> str:
    """Machine and versions in one line, in plain text."""
    machine, versions = result.machine, result.versions
    gpu = f"{machine['gpu']}; " if "gpu" in machine else ""
    found = f"{gpu}{machine.get('cpu')}; {machine.get('cores')} cores; {machine.get('vector')}"
    return f"{found}; torch {versions.get('torch')}; zest_fast {versions.get('zest_fast')}; {result.date}"


def markdown_of(result: Result) -> str:
    """All cases, each with its table and its remarks."""
    parts = [f"### zest-fast bench {result.command}", where(result)]
    for case in result.cases:
        head, rows = table_of(result.command, case)
        parts += [
            f"**{_escaped(case.name)}**",
            markdown_table(head, [[_escaped(cell) for cell in row] for row in rows]),
        ]
        if remarks := [f"- {_escaped(text)}" for text in remarks_of(case)]:
            parts.append("\n".join(remarks))
    return "\n\n".join(parts)


def _escaped(text: str) -> str:
    """Names of users' models and what their code raises: no cell of a table ends in them, and no tag begins."""
    return printable(text).replace("|", "\\|").replace("<", "&lt;")


def draw(result: Result, path: str | os.PathLike[str]) -> Path:
    """A line for each case with the median of each candidate and its interval, in ms; returns the path.

    Raises ImportError without matplotlib, ValueError for a path without a suffix.
    """
    make = figure_class()
    names = list(dict.fromkeys(one.name for case in result.cases for one in case.measured if one.seconds))
    figure: Any = make(figsize=(9.0, 1.4 + 0.42 * len(result.cases)), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(names):
        found = [
            (row, one.seconds)
            for row, case in enumerate(result.cases)
            for one in case.measured
            if one.name == name and one.seconds is not None
        ]
        middles = [1e3 * seconds.median for _, seconds in found]
        below = [1e3 * (seconds.median - seconds.low) for _, seconds in found]
        above = [1e3 * (seconds.high - seconds.median) for _, seconds in found]
        places = [row + 0.5 * ((number + 0.5) / len(names) - 0.5) for row, _ in found]
        style = {"fmt": "o", "markersize": 4, "color": _COLOURS[number % len(_COLOURS)], "label": printable(name)}
        axes.errorbar(middles, places, xerr=[below, above], **style)
    labels = [printable(case.name) for case in result.cases]
    axes.set_yticks(range(len(labels)), labels, fontsize=8, color=INK, parse_math=False)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    _plain_logarithms(axes)
    axes.set_xlabel("ms, median and 95 % interval", fontsize=8, color=GREY)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axes.grid(axis="x", color="#e5e5e5")
    return save_figure(figure, path)


def _plain_logarithms(axes: Any) -> None:
    """0.1, 0.2, 0.5, 1: without powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=8, labelcolor=INK)
