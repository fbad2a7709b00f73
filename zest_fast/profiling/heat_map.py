"""The picture of a profile: a panel for each metric, layer type down, depth across.

Colour is the rank among all layers of the model: metrics such as snip and fisher span many orders of magnitude, where a
linear scale shows one bright cell and a logarithm fails on signs. The smallest and the largest value stand in the title
of the panel, and the five layers of the largest values are framed.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zest_fast.foundation.nearest import nearest
from zest_fast.foundation.replacing import replacing
from zest_fast.foundation.text_table import number, printable, shorten

if TYPE_CHECKING:
    from zest_fast.profiling.layer_profile import LayerProfile

FRAMED = 5
COLOURS, UNDEFINED, INK, GREY, FRAME = "viridis", "#d9d9d9", "#333333", "#777777", "#e4572e"
ACCENT = "#2a6f97"  # of dots and lines that stand alone
WIDTH, GAP, MAX_CELL, MIN_HEIGHT = 13.0, 0.35, 0.34, 0.19  # inches; a row must be high enough for its label


def draw(profile: LayerProfile, path: str | os.PathLike[str], metrics: Sequence[str] | None = None) -> Path:
    """Draw `metrics` (None = all) of `profile` into `path`, whose suffix says the format; returns the path."""
    return save_figure(heat_map(profile, metrics), path)


def heat_map(profile: LayerProfile, metrics: Sequence[str] | None = None) -> Any:
    """The figure, of matplotlib. Raises ValueError for a metric that is not there, ImportError without matplotlib."""
    make = figure_class()
    metrics = list(profile.metrics if metrics is None else metrics)
    for metric in metrics:
        if metric not in profile.metrics:
            raise ValueError(f"metrics: the profile has no metric {metric!r}; {nearest(metric, profile.metrics)}")
    if not metrics or not len(profile):
        raise ValueError("there is nothing to plot: the profile has no layer or no metric")
    return _figure(make, profile, metrics)


def save_figure(figure: Any, path: str | os.PathLike[str]) -> Path:
    """Write a figure whole or not at all; returns the path. Raises ValueError for a path without a suffix."""
    path = Path(path)
    if not path.suffix:
        raise ValueError(f"{str(path)!r} has no suffix that says the format, such as .png, .svg or .pdf")
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=150, bbox_inches="tight", pad_inches=0.15)
    return path


def layer_types(names: Iterable[str]) -> dict[str, list[str]]:
    """Group layer names by type: label -> names, both in order of first appearance.

    The type is the last component that is no number: `model.layers.3.self_attn.q_proj` is a `q_proj`. Where one block
    holds several layers of that type (the three `dense` of BERT), the label grows to the left until they differ.
    """
    by_last: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        parts = [part for part in name.split(".") if not part.isdigit()] or ["#"]
        place = ".".join([*(re.sub(r"\d+", "#", part) for part in parts[:-1]), parts[-1]])
        by_last[parts[-1]][place].append(name)
    groups: dict[str, list[str]] = {}
    for last, places in by_last.items():
        repeated = sum(len(members) > 1 for members in places.values())
        if repeated < 2:  # a stem beside the blocks is the first of its row, no row of its own
            groups[last] = [name for members in places.values() for name in members]
        else:
            groups |= {_label(place, places): members for place, members in places.items()}
    return groups


def _label(place: str, places: Iterable[str]) -> str:
    """The shortest end of `place` that no other place shares."""
    parts = place.split(".")
    for count in range(1, len(parts) + 1):
        label = ".".join(parts[-count:])
        if not any(other != place and ("." + other).endswith("." + label) for other in places):
            return label
    return place


def figure_class() -> Any:
    """matplotlib's Figure. Raises ImportError that says how to get it."""
    try:
        from matplotlib.figure import Figure  # not pyplot: no window, no global state
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install 'zest_fast[plot]'") from error
    return Figure


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def _figure(make: Any, profile: LayerProfile, metrics: list[str]) -> Any:
    by_depth = sorted(profile.names, key=lambda name: profile.info[name].get("depth", profile.names.index(name)))
    groups = layer_types(by_depth)
    rows, columns = len(groups), max(map(len, groups.values()))
    high, wide = _grid(len(metrics), columns)
    cell = min(MAX_CELL, (WIDTH / wide - GAP) / columns)
    panel = max(columns * cell, 1.9), rows * max(cell, MIN_HEIGHT)
    size = wide * (panel[0] + GAP) + 1.0, high * (panel[1] + 0.62) + 0.9
    figure = make(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.05, hspace=0.0, wspace=0.02)
    grid = figure.subplots(high, wide, squeeze=False)
    image = None
    for index, axes in enumerate(grid.flat):
        if index >= len(metrics):
            axes.set_axis_off()
            continue
        labelled, bottom = index % wide == 0, index + wide >= len(metrics)
        image = _panel(axes, profile, metrics[index], groups, labelled, bottom)
    bar = figure.colorbar(image, ax=grid, location="top", shrink=min(0.8, 3.2 / size[0]), aspect=30, ticks=[0, 1])
    bar.ax.set_xticklabels(["lowest", "highest"], fontsize=8, color=INK)
    bar.set_label("rank among all layers", fontsize=8, color=INK, labelpad=-9)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    figure.supxlabel("framed: the five largest beside the head · hatched: undefined", fontsize=8, color=GREY)
    return figure


def _grid(panels: int, columns: int) -> tuple[int, int]:
    """Panels down and across, so that the cells of deep models stay visible and the rows are equally full."""
    most = 5 if columns <= 8 else 3 if columns <= 32 else 2 if columns <= 64 else 1
    high = math.ceil(panels / min(most, panels))
    return high, math.ceil(panels / high)


def _panel(
    axes: Any, profile: LayerProfile, metric: str, groups: dict[str, list[str]], labelled: bool, bottom: bool
) -> Any:
    ranks = dict(zip(profile.names, colour_ranks(profile.column(metric)), strict=True))
    columns = max(map(len, groups.values()))
    picture = np.ma.masked_all((len(groups), columns))
    for row, members in enumerate(groups.values()):
        for column, name in enumerate(members):
            if math.isnan(ranks[name]):
                _cell(axes, row, column, facecolor=UNDEFINED, edgecolor="white", hatch="////", linewidth=0)
            else:
                picture[row, column] = ranks[name]
    image = axes.pcolormesh(
        np.arange(columns + 1) - 0.5,
        np.arange(len(groups) + 1) - 0.5,
        picture,
        cmap=COLOURS,
        vmin=0,
        vmax=1,
        edgecolors="white",
        linewidth=0.6,
    )
    _frame_largest(axes, profile, metric, groups)
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_title(metric, loc="left", fontsize=10, fontweight="bold", color=INK, pad=14)
    at_corner = {"xy": (0, 1), "xycoords": "axes fraction", "xytext": (0, 4), "textcoords": "offset points"}
    axes.annotate(value_range(profile.column(metric)), **at_corner, fontsize=7.5, color=GREY)
    labels = [shorten(printable(label), 30) for label in groups]
    axes.set_yticks(
        range(len(groups)), labels if labelled else [""] * len(groups), fontsize=8, color=INK, parse_math=False
    )
    step = max(1, math.ceil(columns / 8))
    axes.set_xticks(range(0, columns, step))
    axes.tick_params(length=0, labelsize=8, labelcolor=INK, labelbottom=bottom)
    if bottom:
        axes.set_xlabel("depth within the type", fontsize=8, color=GREY)
    axes.spines[:].set_visible(False)
    return image


def _frame_largest(axes: Any, profile: LayerProfile, metric: str, groups: dict[str, list[str]]) -> None:
    values = profile.column(metric)
    order = [profile.names[i] for i in np.argsort(-values, kind="stable") if not math.isnan(values[i])]
    # The head is tuned anyway and often the largest: framing it would hide a candidate.
    largest = [name for name in order if not profile.info[name].get("head")][:FRAMED]
    for row, members in enumerate(groups.values()):
        for column, name in enumerate(members):
            if name in largest:
                _cell(axes, row, column, facecolor="none", edgecolor=FRAME, linewidth=1.8, zorder=3, clip_on=False)


def _cell(axes: Any, row: int, column: int, **style: Any) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **style))


def colour_ranks(values: np.ndarray) -> np.ndarray:
    """[layers] -> rank of each value in 0..1, equal values alike; NaN stays NaN."""
    ranks = np.full(len(values), np.nan)
    defined = ~np.isnan(values)
    different, position, counts = np.unique(values[defined], return_inverse=True, return_counts=True)
    below = np.cumsum(counts) - counts
    middle = below + (counts - 1) / 2
    ranks[defined] = middle[position] / max(1, defined.sum() - 1) if len(different) > 1 else 0.5
    return ranks


def value_range(values: np.ndarray) -> str:
    """The smallest and the largest value that is defined, in words."""
    defined = values[~np.isnan(values)]
    return f"{number(defined.min())} … {number(defined.max())}" if len(defined) else "undefined"
