"""The picture of a run: one metric, layer down, logged step across.

Colour is the rank among all values of the picture, as in the heat map of a profile: over layers and steps a metric
spans many orders of magnitude. Layers stand in the order of first use, steps at equal distances; a mark above a step
says that its gradient overflowed.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zest_fast.foundation.nearest import nearest
from zest_fast.foundation.text_table import printable, shorten
from zest_fast.profiling.heat_map import (
    COLOURS,
    FRAME,
    GREY,
    INK,
    UNDEFINED,
    WIDTH,
    colour_ranks,
    figure_class,
    save_figure,
    value_range,
)

if TYPE_CHECKING:
    from zest_fast.watching.logs.watch_log import WatchLog

_ROW, _MOST_HEIGHT, _LABELS = 0.19, 24.0, 110  # inches of a row and of all of them; labels beside them
_TICKS = 12


def draw(log: WatchLog, path: str | os.PathLike[str], metric: str) -> Path:
    """Draw `metric` of the log into `path`, whose suffix says the format; returns the path."""
    return save_figure(run_map(log, metric), path)


def run_map(log: WatchLog, metric: str) -> Any:
    """The figure, of matplotlib. Raises ValueError for a log without a step or the metric."""
    make = figure_class()
    if not len(log) or not log.layers:
        raise ValueError(f"there is nothing to plot: {str(log.path)!r} holds no step of a layer yet")
    if metric not in log.metrics:
        raise ValueError(f"metric={metric!r}: the log has no such metric; {nearest(metric, log.metrics)}")
    values = log.column(metric).T
    order = np.argsort([_depth(log, name) for name in log.layers], kind="stable")
    values, names = values[order], [log.layers[row] for row in order]
    height = min(max(len(names) * _ROW, 1.2), _MOST_HEIGHT)
    figure = make(figsize=(WIDTH, height + 1.6), layout="constrained")
    axes = figure.subplots()
    picture = np.ma.masked_invalid(colour_ranks(values.ravel()).reshape(values.shape))
    axes.set_facecolor(UNDEFINED)
    image = axes.pcolormesh(
        np.arange(values.shape[1] + 1) - 0.5, np.arange(len(names) + 1) - 0.5, picture, cmap=COLOURS, vmin=0, vmax=1
    )
    axes.set_title(metric, loc="left", fontsize=10, fontweight="bold", color=INK, pad=18)
    corner = {"xy": (0, 1), "xycoords": "axes fraction", "xytext": (0, 7), "textcoords": "offset points"}
    axes.annotate(value_range(values), **corner, fontsize=7.5, color=GREY)
    every = max(1, math.ceil(len(names) / _LABELS))
    labels = [shorten(printable(name), 40) for name in names[::every]]
    axes.set_yticks(range(0, len(names), every), labels, fontsize=8, color=INK, parse_math=False)
    between = max(1, math.ceil(len(log) / _TICKS))
    shown = range(0, len(log), between)
    axes.set_xticks(shown, [str(log.logged[place].step) for place in shown], fontsize=8, color=INK)
    axes.set_xlabel("step · grey: undefined · mark: overflow", fontsize=8, color=GREY)
    overflows = [place for place, step in enumerate(log.logged) if step.overflow]
    axes.plot(overflows, [1.0] * len(overflows), "v", color=FRAME, transform=axes.get_xaxis_transform(), clip_on=False)
    axes.set_xlim(-0.5, len(log) - 0.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, location="top", shrink=0.25, aspect=30, ticks=[0, 1], anchor=(1.0, 0.0))
    bar.ax.set_xticklabels(["lowest", "highest"], fontsize=8, color=INK)
    bar.set_label("rank among all layers and steps", fontsize=8, color=INK, labelpad=-9)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    return figure


def _depth(log: WatchLog, name: str) -> float:
    """Of the last step that has the layer: earlier ones may have watched fewer."""
    for step in reversed(log.logged):
        if name in step.layout.info:
            return float(step.layout.info[name].get("depth", math.inf))
    return math.inf
