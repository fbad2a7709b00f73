"""The Ranker that ships with the library, read at its first use."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zest_fast.ranking.ranker import Ranker

SHIPPED = Path(__file__).parent / "data" / "ranker.json"


def shipped_ranker(instead: str) -> Ranker:
    """Raises NotImplementedError, with what to do `instead`, where none is installed."""
    if not SHIPPED.exists():
        raise NotImplementedError(f"no Ranker ships with this version yet; {instead}")
    return _load(SHIPPED)


@functools.cache
def _load(path: Path) -> Ranker:
    from zest_fast.ranking.ranker import Ranker

    return Ranker.load(path)
