"""Fitted contestants, kept on disk for the next run: an evaluation with one more contestant, or with other test columns,
then fits nothing anew. Pickles of one's own, in a folder of one's own: never load somebody else's."""

from __future__ import annotations

import hashlib
import inspect
import time
from pathlib import Path

import joblib
import pandas

from bench.layerbench import profiles
from bench.layerbench.baselines import Contestant
from bench.measure import ROOT
from zest_fast.foundation.replacing import replacing

_WORTH_KEEPING = 2.0
"""Seconds."""


def fit(contestant: Contestant, train: pandas.DataFrame, kept: Path | None) -> Contestant:
    """Fitted to `train`: read from the folder `kept` if the same was fitted there by the same code, else written."""
    if kept is None:
        return contestant.fit(train)
    path = kept / f"{type(contestant).__name__}-{_key(contestant, train)}.pickle"
    if path.exists():
        return joblib.load(path)
    began = time.perf_counter()
    contestant = contestant.fit(train)
    if time.perf_counter() - began >= _WORTH_KEEPING:
        kept.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            joblib.dump(contestant, temporary)
    return contestant


def _key(contestant: Contestant, train: pandas.DataFrame) -> str:
    """Of the data, the settings, and the code that fits."""
    kind = type(contestant)
    files = {inspect.getsourcefile(kind), inspect.getsourcefile(profiles)}
    files |= {str(path) for path in (ROOT / "zest_fast" / "ranking").glob("*.py")}
    code = hashlib.sha256(b"".join(Path(file).read_bytes() for file in sorted(filter(None, files))))
    return joblib.hash((kind.__qualname__, vars(contestant), code.hexdigest(), joblib.hash(train)))
