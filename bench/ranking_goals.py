"""What the evaluation was asked to reach, and whether it did: set before anything was fitted."""

from __future__ import annotations

import pandas

KNOWN, NEW = "known models", "new models"
NO_BASELINES = ("ranker", "ranker, metrics only")


def goals(summary: dict[str, dict[str, dict]], results: pandas.DataFrame) -> list[dict[str, object]]:
    """Each goal in words, its value, its bar and whether it is met, for profiles with a fresh head."""
    found = []
    if KNOWN in summary:
        found += _of_known_models(summary[KNOWN]["fresh"], results)
    if NEW in summary:
        found += _of_new_models(summary[NEW]["fresh"])
    return found


def _of_known_models(part: dict, results: pandas.DataFrame) -> list[dict[str, object]]:
    means = {name: found["tau"]["mean"] for name, found in part["contestants"].items()}
    tau, attainable = means["ranker"], part["attainable_tau"]
    others = {name: mean for name, mean in means.items() if name not in (*NO_BASELINES, "layer prior")}
    rival = max(others, key=others.__getitem__)
    headline = results[(results.setting == KNOWN) & (results.head_state == "fresh") & (results.contestant == "ranker")]
    minilm = headline[headline.pair.str.startswith("minilm/")].tau
    top = part["contestants"]["ranker"]["top_5"]["mean"]
    found = [
        _at_least(0.60, tau, "mean tau"),
        _at_least(0.85, tau / attainable, f"share of the attainable tau of {attainable:.2f} (a target)"),
        _at_least(-0.02, tau - means["layer prior"], "tau beyond the layer prior's"),
        _above(0.0, tau - others[rival], f"tau beyond that of every other baseline, the best of which is {rival}"),
        _at_least(0.80, top, "share of the best 5's gain that the top 5 recover"),
    ]
    if len(minilm):
        found.insert(4, _at_least(0.75, float(minilm.mean()), "mean tau of MiniLM's pairs"))
    return [{"setting": KNOWN} | goal for goal in found]


def _of_new_models(part: dict) -> list[dict[str, object]]:
    means = {name: found["tau"]["mean"] for name, found in part["contestants"].items()}
    lead = part["contestants"]["best single metric"]["ranker_ahead"]["tau"]
    found = [
        _above(0.0, lead["interval"][0], f"lower end of tau beyond the best single metric's, {lead['mean']:+.2f}"),
        *(_above(0.0, means["ranker"] - means[name], f"tau beyond that of {name}") for name in ("depth", "kind prior")),
        _at_least(
            0.50, part["contestants"]["ranker"]["top_5"]["mean"], "share of the best 5's gain that the top 5 recover"
        ),
    ]
    return [{"setting": NEW} | goal for goal in found]


def _at_least(bar: float, value: float, words: str) -> dict[str, object]:
    return {"goal": f"{words}: at least {bar:.2f}", "value": round(value, 4), "met": bool(value >= bar)}


def _above(bar: float, value: float, words: str) -> dict[str, object]:
    return {"goal": f"{words}: above {bar:.2f}", "value": round(value, 4), "met": bool(value > bar)}
