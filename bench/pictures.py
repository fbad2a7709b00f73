"""SVG files that say which results they were drawn from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def figure(width: float, height: float) -> Iterator[Figure]:
    """An empty figure, inches; the same drawing gives the same bytes. Raises ImportError without matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure  # no pyplot: it would keep global state

    with matplotlib.rc_context({"svg.hashsalt": "zest_fast", "svg.fonttype": "none", "font.size": 9}):
        yield Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, source: bytes, path: Path) -> None:
    """source: the JSON; its hash goes into the picture."""
    figure.savefig(path, format="svg", metadata={"Date": None, "Description": _mark(source, path)})


def is_drawn(source: bytes, path: Path) -> bool:
    """Whether the SVG was drawn from this JSON; whichever matplotlib drew it."""
    return path.exists() and _mark(source, path) in path.read_text(encoding="utf-8")


def _mark(source: bytes, path: Path) -> str:
    return f"drawn from {path.stem}.json, SHA-256 {hashlib.sha256(source).hexdigest()}"
