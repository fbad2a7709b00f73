"""`zest-fast watch`: a run that is logged, drawn in the terminal while it goes on. Needs no torch."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zest_fast.cli import show
from zest_fast.cli.app import app
from zest_fast.cli.options import Json, check_readable, compiled, typed

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from zest_fast.watching.logs.drift import RankingDrift
    from zest_fast.watching.logs.lines import LoggedStep
    from zest_fast.watching.logs.watch_log import LogFollower, WatchLog

_METRIC = "grad_norm"
_TOP_OF_DRIFT = 5


@app.command()
def watch(
    ctx: typer.Context,
    log_file: Annotated[
        Path,
        typer.Argument(help="What `zest_fast.watch(..., log=...)` writes: .jsonl or .parquet.", show_default=False),
    ],
    metric: Annotated[str, typer.Option(help="The metric that is drawn, and by which layers are ranked.")] = _METRIC,
    layers: Annotated[str | None, typer.Option(help="A regular expression that matches whole layer names.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many layers to draw, those of the largest values.")] = 15,
    follow: Annotated[
        bool | None,
        typer.Option(
            "--follow/--once",
            help="Go on as the file grows, until Ctrl-C, or draw what is there and end. By default a terminal follows.",
            show_default=False,
        ),
    ] = None,
    interval: Annotated[float, typer.Option(min=0.05, help="Seconds between two looks at the file.")] = 1.0,
    as_json: Json = False,
) -> None:
    """Draw a watched run in the terminal, while it trains or afterwards."""
    from zest_fast.watching.logs.watch_log import LogFollower, read_log

    if as_json and follow:
        raise ValueError("--json prints one document and --follow goes on: leave one of them out")
    view = _View(metric, "metric" in typed(ctx), compiled(layers), top)
    if as_json or follow is False or (follow is None and not sys.stdout.isatty()):
        _check_log(log_file)
        view.once(read_log(log_file), as_json)
    elif sys.stdout.isatty():
        _draw(LogFollower(log_file), view, interval)
    else:
        _print(LogFollower(log_file), view, interval)


def _check_log(path: Path) -> None:
    """ValueError where there is neither the file nor, of a Parquet file, its journal."""
    from zest_fast.watching.logs.parquet_log import journal_of

    if path.suffix.lower() != ".parquet" or not journal_of(path).exists():
        check_readable(path, "log")


class _View:
    """What of a log is looked at."""

    def __init__(self, metric: str, written: bool, pattern: re.Pattern[str] | None, top: int) -> None:
        self._metric, self._written, self._pattern, self._top = metric, written, pattern, top

    def metric_of(self, log: WatchLog) -> str:
        """The one that was asked for; without asking, another one where the log lacks the usual one."""
        if self._metric in log.metrics:
            return self._metric
        if self._written or not log.metrics:
            from zest_fast.foundation.nearest import nearest

            raise ValueError(
                f"--metric {self._metric!r}: the log has no such metric; {nearest(self._metric, log.metrics)}"
            )
        return log.metrics[0]

    def layers_of(self, log: WatchLog) -> list[str]:
        from zest_fast.cli.run_picture import chosen_layers

        return chosen_layers(log, self._pattern)

    def once(self, log: WatchLog, as_json: bool) -> None:
        from zest_fast.cli.run_picture import document

        console = show.results()
        if not as_json:
            console.print(self.picture(log, console, fits=False))
        elif not len(log) or not log.layers:
            show.json_document(document(log, "", [], None))
        else:
            metric, drift = self.metric_of(log), self._drift(log)
            of_last: dict[str, Any] = {"by": drift.by, "top": drift.top}
            for name in ("tau_to_first", "tau_to_previous", "overlap_with_first", "overlap_with_previous"):
                of_last[name] = getattr(drift, name)[-1] if len(drift.steps) else None
            show.json_document(document(log, metric, self.layers_of(log), of_last))

    def picture(self, log: WatchLog, console: Console, *, fits: bool, waiting: str = "") -> RenderableType:
        from zest_fast.cli.run_picture import picture

        if not len(log) or not log.layers:
            return show.cell(f"{log.path}: no step of a layer yet")
        metric, layers, drift = self.metric_of(log), self.layers_of(log), str(self._drift(log))
        return picture(log, metric, layers, console, top=self._top, fits=fits, drift=drift, waiting=waiting)

    def line(self, log: WatchLog, step: LoggedStep) -> str:
        from zest_fast.cli.run_picture import line

        return line(step, self.metric_of(log), self.layers_of(log))

    def _drift(self, log: WatchLog) -> RankingDrift:
        from zest_fast.watching.logs.drift import latest_drift

        return latest_drift(log.steps, self.metric_of(log), _TOP_OF_DRIFT)


def _draw(follower: LogFollower, view: _View, interval: float) -> None:
    """On a terminal: the picture is drawn anew where the file or the size of the terminal has changed."""
    from rich.live import Live

    console = show.results()
    log: WatchLog | None = None
    drawn: object = None
    with Live(console=console, auto_refresh=False) as live:
        while True:
            new, waiting = _poll(follower)
            log = new or log
            state = (console.size, waiting, len(log) if log else None)
            if new is not None or state != drawn:
                whole = show.cell(waiting) if log is None else view.picture(log, console, fits=True, waiting=waiting)
                live.update(whole, refresh=True)
                drawn = state
            time.sleep(interval)


def _print(follower: LogFollower, view: _View, interval: float) -> None:
    """Into a file or a pipe: the picture of what is there, then a line for each step."""
    console = show.results()
    told = ""
    last: LoggedStep | None = None
    while True:
        log, waiting = _poll(follower)
        if waiting and waiting != told:
            print(show.printable(waiting), file=sys.stderr, flush=True)
        told = waiting
        if log is not None and len(log):
            if last is None:
                console.print(view.picture(log, console, fits=False))
            else:
                for step in _after(last, log):
                    print(view.line(log, step), flush=True)
            console.file.flush()
            last = log.logged[-1]
        time.sleep(interval)


def _poll(follower: LogFollower) -> tuple[WatchLog | None, str]:
    """What is new, and why one waits."""
    from zest_fast.integrations.references import nearest_path

    try:
        return follower.poll(), ""
    except FileNotFoundError:
        return None, f"waiting for {str(follower.path)!r}, which is not there ({nearest_path(follower.path)})"


def _after(last: LoggedStep, log: WatchLog) -> list[LoggedStep]:
    """The steps that came after one that was printed; where that one has been replaced, those of the last start."""
    known = (last.step, last.seconds)
    for place in reversed(range(len(log))):
        if (log.logged[place].step, log.logged[place].seconds) == known:
            return list(log.logged[place + 1 :])
    return log.segments[-1].steps
