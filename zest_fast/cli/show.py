"""Results as tables for people and as one JSON document for machines. Imports no torch."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from zest_fast.cli.options import option

if TYPE_CHECKING:
    import pandas

    from zest_fast.cli.jobs.job import Job
    from zest_fast.profiling.layer_profile import LayerProfile
    from zest_fast.ranking.ranking import Ranking

# Columns of the table where --metrics chose none: they do not all fit into a terminal.
_SHOWN = ("snip", "grad_norm", "fisher", "rgn")


def printable(text: str) -> str:
    """`text` with its control characters spelt out: names in files of others may hold the escapes of a terminal."""
    return "".join(
        character if character == "\n" or character.isprintable() else ascii(character)[1:-1] for character in text
    )


def cell(value: object) -> Text:
    """A cell of a table, as it is: "[bold]" in a name is no markup, and nothing in it moves the cursor."""
    return Text(printable(str(value)))


def results() -> Console:
    """A console on stdout, as wide as a layer name needs where no terminal limits it."""
    wide = None if sys.stdout.isatty() else 160
    return Console(file=sys.stdout, width=wide)


def json_document(document: Any) -> None:
    """Prints strict JSON: NaN and infinities become null, NumPy scalars numbers."""
    print(json.dumps(_plain(document), indent=2, allow_nan=False))


def profile_document(profile: LayerProfile) -> dict[str, Any]:
    rows = [
        {
            "name": name,
            "metrics": dict(zip(profile.metrics, values, strict=True)),
            "info": profile.info[name],
        }
        for name, values in zip(profile.names, profile.values.tolist(), strict=True)
    ]
    document = {"loss": profile.loss, "backend": profile.backend, "layers": rows, "uncovered": profile.uncovered}
    if profile.spread is not None:
        document["batches"] = profile.spread.batches
        for row, deviations, counts in zip(rows, profile.spread.deviations, profile.spread.counts, strict=True):
            row["deviations"] = dict(zip(profile.metrics, deviations, strict=True))
            row["counts"] = dict(zip(profile.metrics, counts, strict=True))
    return document


def _name_column() -> Column:
    return Column("layer", overflow="fold")  # a shortened name could not be copied


def profile_table(profile: LayerProfile, metrics: Sequence[str] | None) -> None:
    shown = [name for name in metrics or _SHOWN if name in profile.metrics]
    title = f"loss {profile.loss:.4f}, backend {profile.backend}"
    spread = profile.spread
    if spread is not None:
        title = f"means of {spread.batches} batches ± standard deviation between them, {title}"
    table = Table(_name_column(), "kind", box=SIMPLE_HEAD, title=cell(title))
    for name in ("weights", *shown):
        table.add_column(name, justify="right")
    for place, name in enumerate(profile.names):
        info = profile.info[name]
        values = [f"{profile[name][metric]:.3g}" for metric in shown]
        if spread is not None:
            apart = (spread.deviations[place, profile.metrics.index(metric)] for metric in shown)
            values = [f"{value} ± {deviation:.2g}" for value, deviation in zip(values, apart, strict=True)]
        table.add_row(cell(_marked(name, info)), cell(info["kind"]), f"{info['numel']:,}", *values)
    console = results()
    console.print(table)
    for name, reason in profile.uncovered.items():
        console.print(printable(f"not covered: {name} ({reason})"), highlight=False, markup=False)


def ranking_table(ranking: Ranking, profile: LayerProfile, chosen: Sequence[str]) -> None:
    title = f"by {ranking.by}: the {len(chosen)} layers to train"
    table = Table("rank", _name_column(), "kind", box=SIMPLE_HEAD, title=cell(title))
    score = "score" if ranking.note else ranking.by
    for name in ("depth", "weights", score, *(["80% interval"] if ranking.note else [])):
        table.add_column(name, justify="right")
    rows = {
        name: (score, ends) for name, score, ends in zip(ranking.names, ranking.scores, ranking.intervals, strict=True)
    }
    for place, name in enumerate(chosen, start=1):
        info, (score, (low, high)) = profile.info[name], rows[name]
        interval = [f"{low:.2f} to {high:.2f}"] if ranking.note else []
        cells = (str(info["depth"]), f"{info['numel']:,}", f"{score:.4g}", *interval)
        table.add_row(str(place), cell(name), cell(info["kind"]), *cells)
    console = results()
    console.print(table)
    if ranking.note:
        console.print(printable(ranking.note), highlight=False, markup=False)


def cross_validation_table(found: pandas.DataFrame, title: str) -> None:
    """found: what `cross_validate` gave; the last line is the mean over the pairs."""
    table = Table("model", "data set", box=SIMPLE_HEAD, title=cell(title))
    numbers = [str(name) for name in found.select_dtypes("number")]
    for name in numbers:
        table.add_column(name.replace("_", " "), justify="right")
    for row in found.to_dict("records"):
        table.add_row(cell(row["model"]), cell(row["dataset"]), *(_tau(row[name]) for name in numbers))
    table.add_section()
    table.add_row("mean", "", *(_tau(found[name].mean()) for name in numbers))
    results().print(table)


def _tau(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


def finetuning_table(report: Mapping[str, Any]) -> None:
    title = f"{report['steps']} steps on {report['device']}"
    table = Table("", Column(overflow="fold"), box=SIMPLE_HEAD, show_header=False, title=cell(title))
    share = report["trainable_parameters"] / report["parameters"]
    peak = report["peak_memory_bytes"]
    rows = {
        "layers": "\n".join(report["layers"]),
        "backward ends at": str(report["cut"]),
        "trainable parameters": f"{report['trainable_parameters']:,} of {report['parameters']:,} ({share:.1%})",
        "validation before": score_line(report["before"]),
        "validation after": score_line(report["after"]),
        "seconds per step": f"{report['seconds_per_step']:.3f}",
        "peak memory" if "cuda" in report["device"] else "peak memory of the process": "unknown"
        if peak is None
        else f"{peak / 2**20:,.0f} MiB",
        "saved": report["delta"],
        "verified": "what was chosen moved, all else is as it was" if report["verified"] else report["problem"],
    }
    if report["choice"] is not None:
        rows["layers"] = report["choice"]
    if report["saving"] is not None:
        rows["memory"] = report["saving"]["explanation"]
    if report["model"] is not None:
        rows["model"] = report["model"]
    if report["cache"] is not None:
        rows["cache"] = report["cache"]
    for label, value in rows.items():
        table.add_row(label, cell(value))
    results().print(table)


def sweep_table(document: Mapping[str, Any]) -> None:
    head = document["head"]
    title = f"{document['layers']} layers; the head alone: loss {head['loss']:.4f}, accuracy {head['accuracy']:.1%}"
    table = Table("rank", _name_column(), box=SIMPLE_HEAD, title=cell(title))
    for name in ("loss gained", "between seeds", "accuracy"):
        table.add_column(name, justify="right")
    for place, row in enumerate(document["best"], start=1):
        deviation = "" if math.isnan(row["deviation"]) else f"± {row['deviation']:.4f}"
        table.add_row(str(place), cell(row["layer"]), f"{row['gain']:+.4f}", deviation, f"{row['accuracy']:.1%}")
    console = results()
    console.print(table)
    console.print(printable(f"records: {document['records']}"), highlight=False, markup=False)


def notes(console: Console, job: Job, written: Collection[str] = ()) -> None:
    """What the user should know about model and data before the figures. written: parameters of the command line."""
    unused = [f"{option(name)} has no effect: {why}" for name, why in job.without_effect.items() if name in written]
    if job.loaders.taken:
        line(console, f"data: {job.loaders.taken}")
    for text in (*job.loaded.notes, *job.loaders.notes, *unused):
        note(console, text)


def note(console: Console, text: str) -> None:
    line(console, f"note: {text}")


def line(console: Console, text: str) -> None:
    """One line, as long as it is."""
    console.print(printable(text), highlight=False, markup=False, soft_wrap=True)


def _marked(name: str, info: Mapping[str, Any]) -> str:
    return f"{name} (head)" if info["head"] else name


def score_line(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "no validation data"
    parts = [
        f"{name} {value:.1%}" if name in _SHARES else f"{name.replace('_', ' ')} {value:.4f}"
        for name, value in score.items()
        if name != "predictions"
    ]
    return f"{', '.join(parts)} of {score['predictions']:,}"


_SHARES = ("accuracy",)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def doctor_table(found: Mapping[str, Any]) -> None:
    console = results()
    table = Table("backend", "", "", box=SIMPLE_HEAD)
    for name, state in found["backends"].items():
        table.add_row(name, "on" if state["on"] else "off", cell(state["why"]))
    console.print(table)
    for device, backend in found["auto"].items():
        console.print(f"backend='auto' on {device}: {backend}")
    for name, what in {**found["versions"], **found["optional"]}.items():
        console.print(f"{name}: {what}", highlight=False, markup=False)
