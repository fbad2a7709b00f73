"""What only other metrics need is not computed: a subset of metrics has the cells, rows and loss of the whole table."""

from __future__ import annotations

import math

import pytest
from model_zoo import ZOO, build, entry_of
from oracle import REACHABLE, TOLERANCE, relative_error
from test_metrics_against_autograd import plain_autograd, specification

import zest_fast

SUBSETS = (("weight_std",), ("act_mean", "act_abs_std"), ("fisher",), ("grad_norm",), ("plain",), ("plain", "fisher"))


@pytest.mark.parametrize("metrics", SUBSETS, ids="+".join)
@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if not entry.rounded])
def test_a_subset_has_the_cells_of_the_table(name: str, metrics: tuple[str, ...]) -> None:
    """Rows may differ where a subset cannot tell; then `uncovered` says so and does not blame the gradient."""
    expected, own = specification(name), plain_autograd(name)
    model, closure = build(name)
    profile = zest_fast.profile(model, closure=closure, layers=ZOO[name].layers, metrics=list(metrics))
    assert profile.loss == pytest.approx(own.loss, rel=TOLERANCE)
    assert [row for row in profile.names if row not in expected.values] == []
    missing = [row for row in expected.values if row not in profile.names]
    reasons = {row: profile.uncovered.get(expected.parameters[row], "") for row in missing}
    assert {row: why for row, why in reasons.items() if not why or "no gradient reached it" in why} == {}
    wrong = {}
    for row in profile.names:
        for metric in metrics:
            got, entry = float(profile[row][metric]), entry_of(name)
            if metric in entry.optional.get(row, ()) and math.isnan(got) and profile.info[row]["note"]:
                continue
            cell = (expected.values[row], expected.numel[row])
            reachable = relative_error(metric, own.values[row][metric], *cell) <= REACHABLE
            if reachable and relative_error(metric, got, *cell) > TOLERANCE:
                wrong[row, metric] = (got, expected.values[row][metric])
    assert wrong == {}
