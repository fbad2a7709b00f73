"""What a contestant makes of a batch that says nothing; `controls.py` makes the profiles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas
from pyarrow import parquet

from bench.layerbench.baselines import Contestant
from bench.layerbench.protocol import CONTROLLED
from bench.measure import RESULTS

LABELS, INPUTS = CONTROLS = ("shuffled labels", "noise inputs")
PATH = RESULTS / "control_profiles.parquet"
_SUFFIXES = {LABELS: "labels shuffled", INPUTS: "noise inputs"}
NAMES = tuple(f"{name}, {suffix}" for name in CONTROLLED for suffix in _SUFFIXES.values())

ControlProfiles = dict[tuple[str, str, str, str], pandas.DataFrame]
"""(control, model, data set, state of the head) -> rows, by layer."""


def control_profiles(path: Path = PATH) -> ControlProfiles:
    """Of whatever pairs the file holds; empty without it."""
    if not path.exists():
        return {}
    frame = parquet.read_table(path).to_pandas(ignore_metadata=True)
    keys = ["control", "model", "dataset", "head_state"]
    return {key: rows.drop(columns="control").set_index("layer", drop=False) for key, rows in frame.groupby(keys)}


def shown_controls(profile: pandas.DataFrame, controls: ControlProfiles) -> dict[str, pandas.DataFrame]:
    """control -> the profile that stands in for this one: its layers, columns and order; where there is one.

    What a probe found is no part of it.
    """
    first = profile.iloc[0]
    shown = {}
    for control in CONTROLS:
        rows = controls.get((control, first.model, first.dataset, first.head_state))
        if rows is not None:
            rows = rows.reindex(profile.layer).assign(seed=first.seed)
            shown[control] = rows.reindex(columns=profile.columns).set_axis(profile.index)
    return shown


def control_scores(
    fitted: dict[str, Contestant], profile: pandas.DataFrame, controls: ControlProfiles
) -> dict[str, np.ndarray]:
    """The scores of CONTROLLED on every control of this profile, by the name of the contest's entry."""
    return {
        f"{name}, {_SUFFIXES[control]}": fitted[name].predict(rows)
        for control, rows in shown_controls(profile, controls).items()
        for name in CONTROLLED
        if name in fitted
    }
