"""Which layers of this model should I fine-tune, and how do I do that on the card I have?"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__all__ = [
    "Choice",
    "DeltaSwitch",
    "Fit",
    "LayerProfile",
    "LoraExport",
    "MasterWeights",
    "NoiseScale",
    "Plan",
    "PrefixCache",
    "Probe",
    "Ranker",
    "Ranking",
    "Recipe",
    "Reselect",
    "SelectiveBackward",
    "WatchLog",
    "WatchedStep",
    "WeightUpdates",
    "__version__",
    "adamw",
    "apply_delta",
    "apply_lean",
    "choose",
    "consolidate",
    "delta_to_lora",
    "fit_memory",
    "kernels",
    "load_records",
    "load_watch",
    "merge_delta",
    "model_card",
    "noise_scale",
    "open_streamed",
    "optimizer_in_backward",
    "pack",
    "plan",
    "plan_probe",
    "plan_profile",
    "planned_peak",
    "probe",
    "profile",
    "rank",
    "sink_for",
    "sweep",
    "sweeps_of",
    "watch",
    "weight_updates",
]

# The public names are imported at their first use: `zest-fast --help` and whoever only reads profiles and ranks layers
# do not wait for torch. (zest_fast.kernels imports torch before the extension: whichever comes first decides which
# OpenMP runtime both use.)
if TYPE_CHECKING:
    from zest_fast import kernels
    from zest_fast.finetuning.delta_use import DeltaSwitch, apply_delta, merge_delta
    from zest_fast.finetuning.selective_backward import SelectiveBackward
    from zest_fast.integrations.sharing.lora import LoraExport, delta_to_lora
    from zest_fast.integrations.sharing.model_cards import model_card
    from zest_fast.integrations.sharing.weight_updates import WeightUpdates, weight_updates
    from zest_fast.lean.apply import apply_lean
    from zest_fast.lean.master_weights import MasterWeights
    from zest_fast.lean.optimizer import adamw, optimizer_in_backward
    from zest_fast.planning.choose import Choice, choose
    from zest_fast.planning.plan import plan, plan_profile, planned_peak
    from zest_fast.planning.report import Plan
    from zest_fast.planning.savings import Fit, fit_memory
    from zest_fast.prefix.cache import PrefixCache
    from zest_fast.probing.plan import plan_probe
    from zest_fast.probing.probe import probe
    from zest_fast.profiling.layer_profile import LayerProfile
    from zest_fast.profiling.profile import profile
    from zest_fast.ranking.probed import Probe
    from zest_fast.ranking.ranker import Ranker
    from zest_fast.ranking.ranking import Ranking, rank
    from zest_fast.streaming.opening import open_streamed
    from zest_fast.streaming.packing import pack
    from zest_fast.sweeping.recipe import Recipe
    from zest_fast.sweeping.sweep import sweep
    from zest_fast.sweeping.tables import consolidate, load_records, sweeps_of
    from zest_fast.watching.logs.sinks import sink_for
    from zest_fast.watching.logs.watch_log import WatchLog, load_watch
    from zest_fast.watching.noise_scale import NoiseScale, noise_scale
    from zest_fast.watching.reselect import Reselect
    from zest_fast.watching.watch import watch
    from zest_fast.watching.watched_step import WatchedStep

    __version__: str
else:
    _HOMES = {
        "Choice": "zest_fast.planning.choose",
        "DeltaSwitch": "zest_fast.finetuning.delta_use",
        "Fit": "zest_fast.planning.savings",
        "LayerProfile": "zest_fast.profiling.layer_profile",
        "LoraExport": "zest_fast.integrations.sharing.lora",
        "MasterWeights": "zest_fast.lean.master_weights",
        "NoiseScale": "zest_fast.watching.noise_scale",
        "Plan": "zest_fast.planning.report",
        "PrefixCache": "zest_fast.prefix.cache",
        "Probe": "zest_fast.ranking.probed",
        "Ranker": "zest_fast.ranking.ranker",
        "Ranking": "zest_fast.ranking.ranking",
        "Recipe": "zest_fast.sweeping.recipe",
        "Reselect": "zest_fast.watching.reselect",
        "SelectiveBackward": "zest_fast.finetuning.selective_backward",
        "WatchLog": "zest_fast.watching.logs.watch_log",
        "WatchedStep": "zest_fast.watching.watched_step",
        "WeightUpdates": "zest_fast.integrations.sharing.weight_updates",
        "__version__": "zest_fast.foundation.version",
        "adamw": "zest_fast.lean.optimizer",
        "apply_delta": "zest_fast.finetuning.delta_use",
        "apply_lean": "zest_fast.lean.apply",
        "choose": "zest_fast.planning.choose",
        "consolidate": "zest_fast.sweeping.tables",
        "delta_to_lora": "zest_fast.integrations.sharing.lora",
        "fit_memory": "zest_fast.planning.savings",
        "load_records": "zest_fast.sweeping.tables",
        "load_watch": "zest_fast.watching.logs.watch_log",
        "merge_delta": "zest_fast.finetuning.delta_use",
        "model_card": "zest_fast.integrations.sharing.model_cards",
        "noise_scale": "zest_fast.watching.noise_scale",
        "open_streamed": "zest_fast.streaming.opening",
        "optimizer_in_backward": "zest_fast.lean.optimizer",
        "pack": "zest_fast.streaming.packing",
        "plan": "zest_fast.planning.plan",
        "plan_profile": "zest_fast.planning.plan",
        "planned_peak": "zest_fast.planning.plan",
        "plan_probe": "zest_fast.probing.plan",
        "probe": "zest_fast.probing.probe",
        "profile": "zest_fast.profiling.profile",
        "rank": "zest_fast.ranking.ranking",
        "sink_for": "zest_fast.watching.logs.sinks",
        "sweep": "zest_fast.sweeping.sweep",
        "sweeps_of": "zest_fast.sweeping.tables",
        "watch": "zest_fast.watching.watch",
        "weight_updates": "zest_fast.integrations.sharing.weight_updates",
    }

    _ROOMS = (
        "kernels",
        "profiling",
        "ranking",
        "lean",
        "finetuning",
        "streaming",
        "planning",
        "sweeping",
        "probing",
        "watching",
        "integrations",
    )

    def __getattr__(name):
        if name in _ROOMS:
            return importlib.import_module(f"zest_fast.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module 'zest_fast' has no attribute {name!r}")
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
