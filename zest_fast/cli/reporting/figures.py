"""Figures of matplotlib as SVG that belongs to the page: its colours, its letters, nothing from elsewhere."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from zest_fast.foundation.html_parts import escaped
from zest_fast.planning.report import sized
from zest_fast.profiling.heat_map import ACCENT, GREY, INK, UNDEFINED, figure_class

if TYPE_CHECKING:
    from zest_fast.watching.logs.watch_log import WatchLog

_REM = 4 / 3 / 16  # of a point
_WIDTH = 4.8  # inches: three quarters of it are as wide as a phone
_OF_THE_PAGE = {
    INK: "var(--ink)",
    "#000000": "var(--ink)",
    GREY: "var(--muted)",
    ACCENT: "var(--accent)",
    UNDEFINED: "var(--undefined)",
    "#ffffff": "var(--paper)",
}


def svg(figure: Any, name: str, label: str) -> str:
    """An <svg> element. name: what its ids begin with, for a page has several. label: what is read out instead."""
    from matplotlib import rc_context

    drawn = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):  # letters stay letters, and ids the same
        figure.savefig(drawn, format="svg", transparent=True, metadata=nothing, bbox_inches="tight", pad_inches=0.05)
    text = drawn.getvalue()
    text = text[text.index("<svg") :]  # without the header of a file of its own
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub("|".join(_OF_THE_PAGE), lambda found: _OF_THE_PAGE[found[0]], text)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    rem = float(box[0].split()[2]) * _REM  # narrower than three quarters of this its letters cannot be read
    opening = (
        f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {box[0]} role="img" aria-label="{escaped(label)}" '
        f'style="width:{rem:.1f}rem;min-width:{0.75 * rem:.1f}rem">'
    )
    return re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1)


def loss_chart(steps: Sequence[int], losses: Sequence[float]) -> Any:
    figure, axes = _lines(2.4)
    axes.plot(steps, losses, color=ACCENT, linewidth=1.4, marker="o" if len(steps) < 30 else "", markersize=3)
    axes.set_xlabel("step", fontsize=9, color=INK)
    axes.set_ylabel("loss", fontsize=9, color=INK)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def memory_chart(parts: Mapping[str, int]) -> Any:
    figure, axes = _lines(0.32 * len(parts) + 0.5)
    rows = np.arange(len(parts))
    axes.barh(rows, list(parts.values()), color=ACCENT, height=0.6)
    for row, size in zip(rows, parts.values(), strict=True):
        axes.annotate(sized(size), (size, row), (4, 0), textcoords="offset points", va="center", fontsize=9, color=INK)
    axes.set_yticks(rows, list(parts), fontsize=9, color=INK)
    axes.set_xticks([])
    axes.set_ylim(len(parts) - 0.5, -0.5)
    axes.margins(x=0.25)
    axes.grid(False)
    return figure


def run_loss_chart(log: WatchLog) -> Any:
    return loss_chart([step.step for step in log.logged], [step.loss for step in log.logged])


def _lines(height: float) -> tuple[Any, Any]:
    figure = figure_class()(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.tick_params(labelsize=9, labelcolor=INK, length=0)
    axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
    axes.spines[:].set_visible(False)
    return figure, axes
