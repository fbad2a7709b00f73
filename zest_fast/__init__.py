"""Which layers of this model should I fine-tune, and how do I do that on the card I have?"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zest_fast import kernels
    from zest_fast.finetuning.selective_backward import SelectiveBackward
    from zest_fast.profiling.layer_profile import LayerProfile
    from zest_fast.profiling.profile import profile
    from zest_fast.ranking.ranking import Ranking, rank

__all__ = ["LayerProfile", "Ranking", "SelectiveBackward", "kernels", "profile", "rank"]

# Where the public names live. Each is imported at its first use: `zest-fast --help` and whoever only reads profiles
# and ranks layers do not wait for torch. (zest_fast.kernels imports torch before the extension: whichever comes first
# decides which OpenMP runtime both use.)
_HOMES = {
    "LayerProfile": "zest_fast.profiling.layer_profile",
    "Ranking": "zest_fast.ranking.ranking",
    "SelectiveBackward": "zest_fast.finetuning.selective_backward",
    "profile": "zest_fast.profiling.profile",
    "rank": "zest_fast.ranking.ranking",
}


def __getattr__(name: str) -> Any:
    if name == "kernels":
        return importlib.import_module("zest_fast.kernels")
    if name not in _HOMES:
        raise AttributeError(f"module 'zest_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
