"""Fitted contestants, kept on disk for the next run, which then fits what is new alone.

Pickles of one's own, in a folder of one's own: never load somebody else's.
"""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Mapping
from pathlib import Path

import joblib
import pandas

from bench.layerbench import profiles
from bench.layerbench.baselines import Contestant, ProbedRanker
from bench.measure import ROOT
from zest_fast.foundation.replacing import replacing

_WORTH_KEEPING = 2.0
"""Seconds."""


def fit(contestants: Mapping[str, Contestant], train: pandas.DataFrame, kept: Path | None) -> dict[str, Contestant]:
    """All of them, fitted to `train`; read from the folder `kept` where the same code fitted the same, else kept."""
    if kept is None:
        return {name: contestant.fit(train) for name, contestant in contestants.items()}
    data = joblib.hash(train)
    fitted = {}
    for name, contestant in contestants.items():
        if isinstance(contestant, ProbedRanker):
            fitted[name] = ProbedRanker(fitted["ranker"])  # type: ignore[arg-type]
            continue
        path = kept / f"{type(contestant).__name__}-{_key(contestant, data)}.pickle"
        if path.exists():
            fitted[name] = joblib.load(path)
            continue
        began = time.perf_counter()
        fitted[name] = contestant.fit(train)
        if time.perf_counter() - began >= _WORTH_KEEPING:
            kept.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                joblib.dump(fitted[name], temporary)
    return fitted


def _key(contestant: Contestant, data: str) -> str:
    """Of the data, the settings, and the code that fits."""
    kind = type(contestant)
    files = {inspect.getsourcefile(kind), inspect.getsourcefile(profiles)}
    files |= {str(path) for path in (ROOT / "zest_fast" / "ranking").rglob("*.py")}
    code = hashlib.sha256(b"".join(Path(file).read_bytes() for file in sorted(filter(None, files))))
    return joblib.hash((kind.__qualname__, vars(contestant), code.hexdigest(), data))
