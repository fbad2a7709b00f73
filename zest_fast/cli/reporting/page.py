"""The page: one file of HTML with its own style and figures, that reads in light and dark, on a screen and a phone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from zest_fast.cli.jobs.record import FIGURES
from zest_fast.cli.reporting.contents import Contents, Curve, Ranked, Row
from zest_fast.cli.reporting.sources import WHAT, Sources
from zest_fast.foundation.html_parts import escaped, html_table, paragraph
from zest_fast.foundation.text_table import number
from zest_fast.foundation.version import __version__

if TYPE_CHECKING:
    from zest_fast.watching.logs.watch_log import WatchLog

_SHOWN = 20  # layers of a ranking before the whole one is folded away
_MOST_STEPS = 60  # rows of a folded table of steps
_LAYERS_OF_A_LOG = 200

_REASONS = " Reasons: the parts of a score that count most, and what they add to it."
_PARTS = {
    "base_layer_prior": "this layer on other data",
    "base_kind_prior": "its kind",
    "base_structure": "size and shape",
    "base_weights": "its weights",
    "base_metrics": "this batch",
}

_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1f2328; --muted: #57606a; --line: #d0d7de; --panel: #f6f8fa;
  --accent: #0b5c8f; --undefined: #d9d9d9; --warn: #8a3a00; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171c; --ink: #e6e9ee; --muted: #a3adb8; --line: #3a424d;
  --panel: #1c2128; --accent: #6cb6ff; --undefined: #4a525d; --warn: #ffb27a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
header, nav, main, footer { max-width: 70rem; margin: 0 auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { margin: 1.5rem 0 .25rem; font-size: 1.75rem; line-height: 1.2; }
h2 { margin: 2.5rem 0 .5rem; font-size: 1.3rem; border-top: 1px solid var(--line); padding-top: 1rem; }
p { margin: .5rem 0; max-width: 46rem; }
.muted, figcaption, caption { color: var(--muted); font-size: .9rem; text-align: left; }
.warn { color: var(--warn); }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1rem; padding: 0; list-style: none; }
a { color: var(--accent); }
nav a { display: inline-block; padding: .25rem 0; }
figure { margin: 1rem 0; }
.scroll { overflow-x: auto; max-width: 100%; margin: .5rem 0; }
.scroll:focus-visible, summary:focus-visible, a:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
svg { display: block; max-width: 100%; height: auto; font-family: system-ui, sans-serif; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { padding: .25rem 0; }
th, td { padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th, td { white-space: nowrap; }
th { font-weight: 600; }
tbody th { font-weight: 500; }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .25rem 1.5rem; margin: .75rem 0; }
dt { color: var(--muted); }
dd { margin: 0; }
details { margin: .75rem 0; background: var(--panel); border: 1px solid var(--line); border-radius: .4rem; }
summary { cursor: pointer; padding: .5rem .75rem; }
details > div, details > p { padding: 0 .75rem .5rem; }
footer { margin-top: 3rem; padding-bottom: 2rem; color: var(--muted); font-size: .9rem; }
@media (max-width: 30rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; } }
@media print { details > * { display: block; } nav { display: none; } }
""".strip()


def page(sources: Sources, contents: Contents) -> str:
    """The document."""
    draw = _Figures()
    sections = [
        ("in-short", "In short", _facts(contents)),
        ("ranking", "Ranking", _ranking(contents.ranked, draw)),
        ("profile", "Profile", _profile(sources, draw)),
        ("memory", "Memory", _memory(contents, draw)),
        ("training", "Training", _training(contents.curve, draw)),
        ("watch", "Watched run", _watch(sources, draw)),
        ("files", "Files", _files(sources)),
    ]
    title = "zest_fast report" + (f": {dict(contents.facts)['model']}" if "model" in dict(contents.facts) else "")
    links = "".join(f'<li><a href="#{name}">{escaped(heading)}</a></li>' for name, heading, _ in sections)
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-heading"><h2 id="{name}-heading">{escaped(heading)}</h2>'
        f"{inside}</section>\n"
        for name, heading, inside in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n"
        f"<header><h1>{escaped(title)}</h1></header>\n"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n<main>\n{body}</main>\n'
        f"<footer>Written by zest_fast {escaped(__version__)}. This file needs nothing from elsewhere.</footer>\n"
        "</body>\n</html>\n"
    )


class _Figures:
    """Draws where matplotlib is installed, and says what to install where it is not."""

    def __init__(self) -> None:
        from zest_fast.profiling.heat_map import can_draw

        self._can = can_draw()

    def __call__(self, name: str, make: Callable[[], Any], label: str, caption: str = "") -> str:
        """name: an id of its own."""
        if not self._can:
            return _muted("No figure: it needs matplotlib, pip install 'zest_fast[plot]'. Its numbers are below.")
        from zest_fast.cli.reporting.figures import svg

        below = f"<figcaption>{escaped(caption)}</figcaption>" if caption else ""
        return f"<figure>{_scrolling(svg(make(), name, label), label)}{below}</figure>"


def _scrolling(inside: str, label: str) -> str:
    """What may be wider than a phone scrolls by itself, with the keyboard, too."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escaped(label)}">{inside}</div>'


def _folded(summary: str, table: str) -> str:
    return f"<details><summary>{escaped(summary)}</summary><div>{_scrolling(table, summary)}</div></details>"


def _muted(text: str) -> str:
    return f'<p class="muted">{escaped(text)}</p>'


def _facts(contents: Contents) -> str:
    if not contents.facts:
        return _muted("Nothing is known of a training.")
    lines = "".join(
        f"<dt>{escaped(what)}</dt><dd>{'<br>'.join(map(escaped, said.splitlines()))}</dd>"
        for what, said in contents.facts
    )
    return f"<dl>{lines}</dl>"


def _ranking(ranked: Ranked | None, draw: _Figures) -> str:
    if ranked is None:
        return _muted("No ranking: the files hold none, and no profile to rank (zest-fast profile --out).")
    parts = [
        paragraph(f"By {ranked.by}" + (f": {ranked.note}" if ranked.note else "")),
        _muted(f"From {ranked.source}"),
    ]
    scored = [row for row in ranked.rows if math.isfinite(row.score) and not row.info.get("head")]
    best = scored[:_SHOWN]
    if best:
        from zest_fast.ranking.picture import scores_chart

        label = "Scores of the best layers" + (" with 80 % intervals" if ranked.note else "")
        scores, ends = np.array([row.score for row in best]), np.array([[row.low, row.high] for row in best])
        axis = "score, with its 80 % interval" if ranked.note else ranked.by
        names = [row.name for row in best]
        parts.append(draw("scores", lambda: scores_chart(names, scores, ends, axis), label, "Best at the top."))
    reasons = any(row.reasons for row in ranked.rows)
    parts.append(_muted("What trains is marked." + (_REASONS if reasons else "")))
    shown = ranked.rows[:_SHOWN]
    parts.append(_scrolling(_ranking_table(shown, ranked, reasons), f"The best {len(shown)} layers"))
    if len(ranked.rows) > len(shown):
        parts.append(_folded(f"All {len(ranked.rows)} layers", _ranking_table(ranked.rows, ranked, reasons)))
    return "".join(parts)


def _ranking_table(rows: Sequence[Row], ranked: Ranked, reasons: bool) -> str:
    with_ends, known = bool(ranked.note), any("kind" in row.info for row in rows)
    header = ["rank", "layer", *(["kind"] if known else []), "score", *(["low", "high"] if with_ends else [])]
    left = header.index("score")
    header += [*(["weights", "depth"] if known else []), *(["reasons"] if reasons else [])]
    lines = []
    for place, row in enumerate(rows, start=1):
        cells = [str(place), _marked(row), *([str(row.info.get("kind", ""))] if known else []), _score(row.score)]
        cells += [_score(row.low), _score(row.high)] if with_ends else []
        cells += [f"{row.info.get('numel', 0):,}", str(row.info.get("depth", ""))] if known else []
        cells += [", ".join(f"{_part(part)} {added:+.3f}" for part, added in row.reasons)] if reasons else []
        lines.append(cells)
    prose = [len(header) - 1] if reasons else []
    return html_table(header, lines, left=left, name=1, prose=prose)


def _part(name: str) -> str:
    """Of a column of `Ranker.explain`."""
    return _PARTS.get(name, name.replace("_", " "))


def _marked(row: Row) -> str:
    words = [word for word, holds in (("head", row.info.get("head")), ("trains", row.trains)) if holds]
    return row.name + (f" ({', '.join(words)})" if words else "")


def _score(value: float) -> str:
    return "" if math.isnan(value) else number(value)


def _profile(sources: Sources, draw: _Figures) -> str:
    profile = sources.profile
    if profile is None:
        return _muted("No profile: zest-fast profile MODEL DATA --out profile.json makes one.")
    from zest_fast.profiling.heat_map import heat_map

    parts = [_muted(f"From {sources.paths['profile']}")]
    if len(profile) and profile.metrics:
        label = f"Heat map of {len(profile.metrics)} metrics of {len(profile)} layers"
        caption = "A panel for each metric, layer type down, depth across. Colour is the rank among all layers."
        parts.append(draw("heat", lambda: heat_map(profile), label, caption))
    of = "" if profile.spread is None else f", means of {profile.spread.batches} batches ± standard deviation"
    lines = []
    for place, name in enumerate(profile):
        cells = [number(value) for value in profile.values[place].tolist()]
        if profile.spread is not None:
            apart = profile.spread.deviations[place].tolist()
            cells = [f"{cell} ± {deviation:.2g}" for cell, deviation in zip(cells, apart, strict=True)]
        lines.append([name, str(profile.info[name].get("kind", "")), *cells])
    table = html_table(["layer", "kind", *profile.metrics], lines, left=2, caption=f"In the order of first use{of}")
    parts.append(_folded(f"The {len(profile)} layers as a table", table))
    if profile.uncovered:
        rows = [[name, reason] for name, reason in profile.uncovered.items()]
        table = html_table(["parameter", "why"], rows, left=2, caption="Parameters without a row")
        parts.append(_folded(f"{len(rows)} parameters without a row", table))
    return "".join(parts)


def _memory(contents: Contents, draw: _Figures) -> str:
    if contents.plan is None:
        return _muted("No plan: zest-fast finetune writes one into its delta, zest-fast plan --json prints one.")
    from zest_fast.planning.report import sized

    plan, source = contents.plan
    sizes = {kind: int(size) for kind, size in plan["breakdown"].items() if size}
    said = f"A step holds {sized(int(plan['peak_bytes']))} of tensors at its peak, by a dry run, not by measuring"
    said += f", and takes {plan['flops'] / 1e9:,.3g} GFLOP" if "flops" in plan else ""
    said += f"; backward ends at {plan['cut']}" if plan.get("cut") else ""
    table = html_table(["part of the peak", "bytes", "size"], [[k, f"{v:,}", sized(v)] for k, v in sizes.items()])
    parts = [paragraph(f"{said}."), _muted(f"From {source}")]
    if sizes:
        from zest_fast.cli.reporting.figures import memory_chart

        parts.append(draw("parts", lambda: memory_chart(sizes), "Parts of the peak memory of a step"))
    return "".join([*parts, _folded("The parts as a table", table)])


def _training(curve: Curve | None, draw: _Figures) -> str:
    if curve is None:
        return _muted("No learning curve: a delta of zest-fast finetune holds one, and what finetune --json prints.")
    parts = [_muted(f"From {curve.source}")]
    scores = {"before": curve.before, "after": curve.after}
    names = [name for name in FIGURES if any(name in score for score in scores.values() if score)]
    lines = [[when, *_cells_of(score, names)] for when, score in scores.items() if score]
    if lines:
        header = ["validation", "loss", *(name.replace("_", " ") for name in names), "predictions"]
        parts.append(_scrolling(html_table(header, lines, caption="On data that were held out"), "Validation scores"))
    else:
        parts.append(_muted("No score: no data were held out, or the file does not say."))
    if not curve.steps:
        return "".join([*parts, _muted("No step was done.")])
    from zest_fast.cli.reporting.figures import loss_chart

    label = f"Training loss over {curve.steps[-1]} steps, {number(curve.losses[0])} to {number(curve.losses[-1])}"
    parts.append(draw("loss", lambda: loss_chart(curve.steps, curve.losses), label))
    places = _evenly(len(curve.steps), _MOST_STEPS)
    lines = [[f"{curve.steps[place]:,}", number(curve.losses[place])] for place in places]
    parts.append(_folded("The loss as a table", html_table(["step", "loss"], lines, left=0)))
    return "".join(parts)


def _cells_of(score: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """names: of the figures beside the loss."""
    figures = {name: score.get(name) for name in ("loss", *names)}
    cells = [
        "" if value is None else f"{value:.1%}" if name == "accuracy" else number(value)
        for name, value in figures.items()
    ]
    return [*cells, f"{score['predictions']:,}"]


def _evenly(count: int, most: int) -> list[int]:
    """Places from the first to the last."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most)).tolist()})


def _watch(sources: Sources, draw: _Figures) -> str:
    log = sources.watch
    if log is None:
        return _muted("No log of a watched run: zest_fast.watch(model, log='run.jsonl') writes one.")
    parts = [_muted(f"From {sources.paths['watch']}")]
    if not len(log) or not log.layers:
        return "".join([*parts, _muted("It holds no step of a layer yet.")])
    from zest_fast.cli.reporting.figures import run_loss_chart
    from zest_fast.watching.logs.picture import run_map

    last = log.logged[-1]
    overflows = sum(step.overflow for step in log.logged)
    metric = "grad_norm" if "grad_norm" in log.metrics else log.metrics[0]
    said = f"{len(log)} steps logged, {log.logged[0].step:,} to {last.step:,}, {len(log.layers)} layers"
    parts.append(paragraph(said + (f"; {overflows} overflowed" if overflows else "") + "."))
    if any(math.isfinite(step.loss) for step in log.logged):
        parts.append(draw("watched-loss", lambda: run_loss_chart(log), "Loss of the logged steps"))
    label = f"Heat map of {metric}: {len(log.layers)} layers, {len(log)} logged steps"
    parts.append(draw("watched", lambda: run_map(log, metric), label))
    parts.append(_folded(f"{metric} of the layers, and the loss, as a table", _watch_table(log, metric)))
    if last.totals:
        rows = [[name, number(value)] for name, value in last.totals.items()]
        parts.append(
            _scrolling(html_table(["over all layers", f"step {last.step:,}"], rows), "Totals of the last step")
        )
    notes = list(dict.fromkeys([*last.notes, *log.notes]))
    parts += [f"<ul>{''.join(f'<li>{escaped(note)}</li>' for note in notes)}</ul>"] if notes else []
    return "".join(parts)


def _watch_table(log: WatchLog, metric: str) -> str:
    places = _evenly(len(log), 8)
    values, names = log.column(metric), log.layers[:_LAYERS_OF_A_LOG]
    rows = [["loss", *(number(log.logged[place].loss) for place in places)]]
    rows += [[name, *(number(values[place, row]) for place in places)] for row, name in enumerate(names)]
    rest = len(log.layers) - len(names)
    caption = f"{metric}; the columns are steps" + (f"; {rest} more layers are not shown" if rest else "")
    return html_table(["layer", *(f"{log.logged[place].step:,}" for place in places)], rows, caption=caption)


def _files(sources: Sources) -> str:
    rows = [[str(path), WHAT[kind]] for kind, path in sources.paths.items()]
    parts = [_scrolling(html_table(["file", "what it is"], rows, left=2), "Files that were read")]
    parts += [f'<p class="warn">{escaped(text)}</p>' for text in sources.warnings]
    return "".join([*parts, *(_muted(note) for note in sources.notes)])
