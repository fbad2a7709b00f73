"""What options may be, before a model or data are opened: an hour later would be late."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from zest_fast.cli.options import option
from zest_fast.foundation.byte_counts import memory_bytes
from zest_fast.foundation.nearest import nearest
from zest_fast.foundation.options import Backend, Checkpoint, Frozen, MetricName, Preference

TASKS = (
    "text-classification",
    "regression",
    "multi-label",
    "token-classification",
    "causal-lm",
    "seq2seq-lm",
    "image-classification",
)
_AMONG = {
    "dtype": ("float32", "bfloat16", "float16"),
    "schedule": ("constant", "linear", "cosine"),
    "task": TASKS,
    "by": get_args(MetricName),
    "prefer": get_args(Preference),
    "checkpoint": get_args(Checkpoint),
    "frozen": get_args(Frozen),
    "backend": get_args(Backend),
}
_SIZES = ("max_memory", "cache_limit")
_RATES = ("lr", "layer_lr_factor", "head_lr")


def check_options(params: Mapping[str, Any]) -> None:
    """Raises ValueError that names the option, what was found and what it may be; ImportError for what it needs."""
    for name, allowed in _AMONG.items():
        _among(name, params.get(name), allowed)
    for name in _SIZES:
        if params.get(name) is not None:
            _size(name, params[name])
    for name in _RATES:
        rate = params.get(name)
        if rate is not None and not math.isfinite(rate):  # which the bounds of an option let through
            raise ValueError(f"{option(name)} {rate:g} is no rate: a finite number is needed")
    warmup = params.get("warmup") or 0.0
    if not 0 <= warmup < 1:
        raise ValueError(f"--warmup {warmup:g} is a share of the steps, from 0 to below 1")
    if params.get("dtype") is not None and params.get("stream"):
        raise ValueError(
            "--dtype changes weights as they are loaded, and --stream reads them as they are: leave one out"
        )
    if params.get("frozen") == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("--frozen nf4 needs bitsandbytes: pip install 'zest_fast[quant]'")
    if params.get("device") not in (None, "auto"):
        from zest_fast.cli.jobs.job import pick_device

        pick_device(params["device"])


def _among(name: str, value: str | None, allowed: Iterable[str]) -> None:
    if value is not None and value not in tuple(allowed):
        raise ValueError(f"{option(name)} {value!r} is unknown; {nearest(value, allowed)}")


def _size(name: str, value: str) -> None:
    try:
        memory_bytes(value)
    except ValueError:
        raise ValueError(f"{option(name)} {value!r} is no size; write 16GB (10^9 bytes) or 16GiB (2^30)") from None
