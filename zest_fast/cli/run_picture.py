"""A watched run as a table of lines of blocks, and as one JSON document. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Column, Table
from rich.text import Text

from zest_fast.cli.show import cell, printable

if TYPE_CHECKING:
    from zest_fast.watching.logs.lines import LoggedStep
    from zest_fast.watching.logs.watch_log import WatchLog

_BLOCKS, _ASCII = "▁▂▃▄▅▆▇█", "_.-=+*%#"
_UNDEFINED, _INFINITE = " ", "!"
_NARROWEST, _WIDEST = 8, 60  # of a line of blocks
_OTHER_COLUMNS = 44  # characters of last value, changes and what is between columns
_AROUND_ROWS = 5  # lines of the table that are no rows, and one for the cursor
_MOST_NOTES = 5


def picture(
    log: WatchLog,
    metric: str,
    layers: Sequence[str],
    console: Console,
    *,
    top: int,
    fits: bool,
    drift: str,
    waiting: str = "",
) -> Group:
    """The last step, a row for each of the `top` largest of `layers`, and what is to be said in words.

    fits: whether it has to fit into the terminal. waiting: for what, where the file is not there.
    """
    last = log.logged[-1]
    columns = dict(zip(log.layers, log.column(metric).T, strict=True))
    order = largest(log, metric, layers)
    below = [_text(line, fits) for line in (*_notes(last), *_of_the_run(log), drift, waiting) if line]
    above = _text(title(log), fits)
    if fits:
        words = Group(above, _legend(len(order)), *below)
        top = max(1, min(top, console.height - _AROUND_ROWS - len(console.render_lines(words, pad=False))))
    chosen = order[:top]
    blocks = _BLOCKS if "utf" in console.encoding else _ASCII
    longest = max(len(printable(name)) for name in chosen)
    names = min(longest, console.width // 3) if fits else longest
    width = min(_WIDEST, max(_NARROWEST, console.width - names - _OTHER_COLUMNS))
    clip: Any = "fold" if not fits else "ellipsis" if blocks is _BLOCKS else "crop"
    table = Table(
        Column("layer", overflow=clip, no_wrap=fits, max_width=names if fits else None),
        Column(metric, no_wrap=True, overflow="crop"),
        box=SIMPLE_HEAD,
    )
    for heading in ("last", "to before", "to first"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in chosen:
        values = columns[name]
        earlier = values[:-1][~np.isnan(values[:-1])]
        before, first = (earlier[-1], earlier[0]) if len(earlier) else (math.nan, math.nan)
        line_of_blocks = Text(sparkline(values, width, blocks))
        table.add_row(
            cell(name), line_of_blocks, _value(values[-1]), change(values[-1], before), change(values[-1], first)
        )
    return Group(above, table, _legend(len(order) - len(chosen)), *below)


def _text(words: str, fits: bool) -> Text:
    """Wrapped on a terminal, as it is in a file."""
    return Text(printable(words)) if fits else Text(printable(words), no_wrap=True, overflow="ignore")


def _legend(hidden: int) -> Text:
    words = f"each line from its own lowest to its highest value; {_INFINITE} infinite, blank undefined"
    return Text(words + (f"; {hidden} more with smaller values" if hidden else ""), style="dim")


def title(log: WatchLog) -> str:
    last = log.logged[-1]
    steps = f"{len(log)} steps logged" if len(log) > 1 else "1 step logged"
    loss = "loss unknown" if math.isnan(last.loss) else f"loss {last.loss:.4g}"
    first = next((step.loss for step in log.logged if not math.isnan(step.loss)), math.nan)
    loss += f" (first {first:.4g})" if len(log) > 1 and not math.isnan(first) else ""
    return f"{log.path}: step {last.step:,}, {loss}, {_duration(last.seconds)}, {steps}"


def line(step: LoggedStep, metric: str, layers: Sequence[str]) -> str:
    """One step in words, for what is no terminal."""
    text = f"step {step.step}: " + ("loss unknown" if math.isnan(step.loss) else f"loss {step.loss:.4g}")
    names = [name for name in step.layout.names if name in set(layers)]
    if metric in step.layout.metrics and names:
        column = dict(zip(step.layout.names, step.values[:, step.layout.metrics.index(metric)].tolist(), strict=True))
        defined = {name: column[name] for name in names if not math.isnan(column[name])}
        if defined:
            low, high = min(defined, key=defined.__getitem__), max(defined, key=defined.__getitem__)
            text += f", {metric} {defined[low]:.4g} ({low}) to {defined[high]:.4g} ({high})"
        else:
            text += f", {metric} undefined"
    text += ", overflow" if step.overflow else ""
    return printable("\n".join([text, *(f"  {note}" for note in step.notes)]))


def document(log: WatchLog, metric: str, layers: Sequence[str], drift: dict[str, Any] | None) -> dict[str, Any]:
    columns = dict(zip(log.layers, log.column(metric).T.tolist(), strict=True)) if metric else {}
    last = log.logged[-1] if len(log) else None
    return {
        "steps": [step.step for step in log.logged],
        "loss": [step.loss for step in log.logged],
        "overflow": [step.overflow for step in log.logged],
        "seconds": None if last is None else last.seconds,
        "notes": [] if last is None else list(last.notes),
        "totals": {} if last is None else last.totals,
        "metric": metric,
        "layers": [{"name": name, "values": columns[name]} for name in (largest(log, metric, layers) if last else [])],
        "drift": drift,
        "log": list(log.notes),
    }


def chosen_layers(log: WatchLog, pattern: re.Pattern[str] | None) -> list[str]:
    """Those whose name, or whose module's, matches as a whole. Raises ValueError where none does."""
    if pattern is None:
        return log.layers
    layouts = {id(step.layout): step.layout for step in log.logged}.values()
    modules = {name: str(layout.info[name].get("module", name)) for layout in layouts for name in layout.names}
    found = [name for name in log.layers if pattern.fullmatch(name) or pattern.fullmatch(modules[name])]
    if not found:
        from zest_fast.foundation.nearest import nearest

        raise ValueError(
            f"--layers {pattern.pattern!r} matches no layer of the log (the whole name must match); "
            f"{nearest(pattern.pattern, log.layers)}"
        )
    return found


def largest(log: WatchLog, metric: str, layers: Sequence[str]) -> list[str]:
    """By the last value that is defined, the largest first; the order of the model where they are equal."""
    values = log.column(metric)
    place = {name: column for column, name in enumerate(log.layers)}
    last = {}
    for name in layers:
        defined = values[~np.isnan(values[:, place[name]]), place[name]]
        last[name] = defined[-1] if len(defined) else -math.inf
    return sorted(layers, key=lambda name: -last[name])


def sparkline(values: np.ndarray, width: int, blocks: str = _BLOCKS) -> str:
    """One character a step, from the lowest to the highest value.

    Of more steps than characters those that share one show the value that is furthest from the median: an outlier of
    one step stays visible.
    """
    finite = values[np.isfinite(values)]
    low, high, middle = (finite.min(), finite.max(), np.median(finite / 2) * 2) if len(finite) else (0.0, 0.0, 0.0)
    parts = np.array_split(values, max(1, min(width, len(values))))
    return "".join(_character(part, float(low), float(high), float(middle), blocks) for part in parts if len(part))


def _character(part: np.ndarray, low: float, high: float, middle: float, blocks: str) -> str:
    if np.isinf(part).any():
        return _INFINITE
    part = part[~np.isnan(part)]
    if not len(part):
        return _UNDEFINED
    value = float(part[np.argmax(np.abs(part / 2 - middle / 2))])
    if low == high:
        return blocks[0] if value == 0 else blocks[len(blocks) // 2]
    share = (value / 2 - low / 2) / (high / 2 - low / 2)  # halves: the difference of two large floats may overflow
    return blocks[min(len(blocks) - 1, int(share * len(blocks)))]


def change(now: float, then: float) -> str:
    """From one value to another, in percent or as a multiple."""
    if not (math.isfinite(now) and math.isfinite(then)):
        return ""
    if now == then:
        return "0 %"
    if then == 0:
        return "from 0"
    percent = (now / then - 1) * 100 * (1 if then > 0 else -1)
    return f"{percent:+.1f} %" if abs(percent) < 1000 else f"x {now / then:.3g}"


def _value(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{value:.4g}"


def _notes(step: LoggedStep) -> list[str]:
    found = list(dict.fromkeys(step.notes))
    rest = [f"and {len(found) - _MOST_NOTES} more notes"] if len(found) > _MOST_NOTES else []
    return found[:_MOST_NOTES] + rest


def _of_the_run(log: WatchLog) -> list[str]:
    last = log.logged[-1]
    lines = []
    if last.totals:
        lines.append("all layers: " + ", ".join(f"{name} {_value(value)}" for name, value in last.totals.items()))
    overflows = [step.step for step in log.logged if step.overflow]
    if overflows:
        lines.append(f"{len(overflows)} of {len(log)} logged steps overflowed, the last one at step {overflows[-1]}")
    return [*lines, *log.notes]


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "time unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
