"""What the evaluation was asked to reach, and whether it did: set before anything was fitted."""

from __future__ import annotations

from typing import Any

import pandas

from bench.layerbench.control_contestants import NAMES as CONTROLS
from bench.layerbench.protocol import SETTINGS

KNOWN, NEW, _ = SETTINGS
PROBED = "ranker, probed"
OF_PROBES = (PROBED, "probe alone")
"""Contestants that say nothing of a pair that was not probed."""
NO_BASELINES = ("ranker", "ranker, metrics only", *OF_PROBES, *CONTROLS)

Goal = dict[str, Any]


def goals(
    summary: dict[str, dict[str, dict]], of_probed_pairs: dict[str, dict[str, dict]], results: pandas.DataFrame
) -> list[Goal]:
    """Each goal in words, its value, its bar and whether it is met, for profiles with a fresh head."""
    found = []
    if KNOWN in summary:
        found += _of_known_models(summary[KNOWN]["fresh"], results)
    if NEW in summary:
        found += _of_new_models(summary[NEW]["fresh"])
    for setting, tau, top in ((KNOWN, 0.70, 0.90), (NEW, 0.70, 0.85)):
        if setting in of_probed_pairs:
            found += _of_probes(setting, of_probed_pairs[setting]["fresh"], tau, top, results)
    return found


def _of_probes(setting: str, part: dict, tau: float, top: float, results: pandas.DataFrame) -> list[Goal]:
    if PROBED not in part["contestants"]:
        return []
    probed = part["contestants"][PROBED]
    alone = part["contestants"]["probe alone"]["tau"]["mean"]
    found = [
        _at_least(tau, probed["tau"]["mean"], "probed: mean tau"),
        _at_least(top, probed["top_5"]["mean"], "probed: share of the best 5's gain that the top 5 recover"),
        _above(0.0, probed["tau"]["mean"] - alone, "probed: tau beyond that of the probe alone"),
        *(_of_minilm(results, PROBED, "probed: ") if setting == KNOWN else []),
    ]
    return [{"setting": setting} | goal for goal in found]


def _of_known_models(part: dict, results: pandas.DataFrame) -> list[Goal]:
    means = {name: found["tau"]["mean"] for name, found in part["contestants"].items()}
    tau, attainable = means["ranker"], part["attainable_tau"]
    others = {name: mean for name, mean in means.items() if name not in (*NO_BASELINES, "layer prior")}
    rival = max(others, key=others.__getitem__)
    top = part["contestants"]["ranker"]["top_5"]["mean"]
    found = [
        _at_least(0.60, tau, "mean tau"),
        _at_least(0.85, tau / attainable, f"share of the attainable tau of {attainable:.2f} (a target)"),
        _at_least(-0.02, tau - means["layer prior"], "tau beyond the layer prior's"),
        _above(0.0, tau - others[rival], f"tau beyond that of every other baseline, the best of which is {rival}"),
        _at_least(0.80, top, "share of the best 5's gain that the top 5 recover"),
        *_of_minilm(results, "ranker", ""),
    ]
    return [{"setting": KNOWN} | goal for goal in found]


def _of_minilm(results: pandas.DataFrame, contestant: str, begin: str) -> list[Goal]:
    chosen = results[(results.setting == KNOWN) & (results.head_state == "fresh") & (results.contestant == contestant)]
    taus = chosen[chosen.pair.str.startswith("minilm/")].tau.dropna()
    return [_at_least(0.75, float(taus.mean()), f"{begin}mean tau of MiniLM's pairs")] if len(taus) else []


def _of_new_models(part: dict) -> list[Goal]:
    contestants = part["contestants"]
    ahead = {name: found["ranker_ahead"]["tau"] for name, found in contestants.items()}
    found = [_at_least(0.55, contestants["ranker"]["tau"]["mean"], "one batch: mean tau")]
    for name, bar in (("number of parameters", 0.08), ("middle", 0.25)):
        if name in ahead:
            found += [
                _at_least(bar, ahead[name]["mean"], f"one batch: tau beyond that of {name}"),
                _above(0.0, ahead[name]["interval"][0], f"one batch: lower end of tau beyond that of {name}"),
            ]
    found += [
        _at_least(0.15, ahead[name]["mean"], f"one batch: what the tau falls by with {name.removeprefix('ranker, ')}")
        for name in CONTROLS
        if name.startswith("ranker, ") and "metrics only" not in name and name in ahead
    ]
    lead = ahead["best single metric"]
    found += [
        _above(0.0, lead["interval"][0], f"lower end of tau beyond the best single metric's, {lead['mean']:+.2f}"),
        *(_above(0.0, ahead[name]["mean"], f"tau beyond that of {name}") for name in ("depth", "kind prior")),
        _at_least(0.50, contestants["ranker"]["top_5"]["mean"], "share of the best 5's gain that the top 5 recover"),
    ]
    return [{"setting": NEW} | goal for goal in found]


def _at_least(bar: float, value: float, words: str) -> Goal:
    return {"goal": f"{words}: at least {bar:.2f}", "value": round(value, 4), "met": bool(value >= bar)}


def _above(bar: float, value: float, words: str) -> Goal:
    return {"goal": f"{words}: above {bar:.2f}", "value": round(value, 4), "met": bool(value > bar)}
