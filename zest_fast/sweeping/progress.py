"""A bar on the terminal with an estimate of the time left that knows that late layers cost less than early ones."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any


class Progress:
    """Tells how many of `total` pieces are done and how long the rest takes, from what the finished ones took.

    Nothing is shown where standard error is no terminal.
    """

    def __init__(self, title: str, total: int, show: bool) -> None:
        self._title = title
        self._total = total
        self._show = show and sys.stderr.isatty()
        self._bar: Any = None
        self._costs_left = 0.0
        self._costs_done = 0.0
        self._pieces_left = 0

    def __enter__(self) -> Progress:
        if self._show:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[left]}"),
            )
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total, left="")
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def plan(self, costs: Sequence[float]) -> None:
        """Relative costs of the pieces that are still to be done; the clock starts."""
        self._costs_left = sum(costs)
        self._pieces_left = len(costs)
        self._began = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._total - len(costs))

    def advance(self, cost: float) -> None:
        """One piece of this cost is done."""
        self._costs_left -= cost
        self._costs_done += cost
        self._pieces_left -= 1
        if self._bar is not None:
            self._bar.update(self._task, completed=self._total - self._pieces_left, left=_words(self.seconds_left))

    @property
    def seconds_left(self) -> float:
        """The costs left at the pace of those done."""
        if not self._costs_done:
            return float("inf")
        return max(0.0, self._costs_left) / self._costs_done * (time.monotonic() - self._began)


def _words(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"about {minutes} min left" if minutes else f"about {round(seconds)} s left"
