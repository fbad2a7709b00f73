"""Whole profiles on a GPU: time against plain forward + backward, memory under caps, and what waits for the device.

A cap is a limit on what the process may allocate, as a card of that size would set; what does not fit is recorded as
"out of memory". Memory counts the model. The peer for memory drops each gradient as soon as it is there, as LOMO does.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import zest_fast
from bench.gpu.site import GB, Site
from bench.measure import ROOT
from bench.profile import peers
from zest_fast.benchmarking import models
from zest_fast.benchmarking.models import Batch, Case
from zest_fast.benchmarking.timing import interleave, median, ratio

CAPS = (24, 40, 80)  # GB
LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
CASES = (
    (Case("llama", "4x512", partial(models.llama, 4, 512)), torch.bfloat16),
    (Case("bert", "16x128", partial(models.bert, 16, 128)), torch.bfloat16),
    (Case("bert", "16x128", partial(models.bert, 16, 128)), torch.float32),
    (Case("resnet50", "32x224²", partial(models.resnet50, 32, 224)), torch.float32),
    (Case("llama-7b", "1x512", partial(models.llama, 1, 512, **LLAMA_7B)), torch.bfloat16),
)
LARGE = {"llama-7b"}
LARGE_BYTES = 16.5 * GB  # what a profile of it may take
LARGE_ROUNDS = 3


def measure(site: Site) -> Iterator[dict[str, object]]:
    """A row for each model that the device can hold."""
    dry_cases = [(case, torch.float32) for case in models.TINY if case.model in ("llama", "resnet50")]
    for case, dtype in dry_cases if site.dry else CASES:
        row: dict[str, object] = {
            "section": "profiles",
            "model": case.model,
            "shape": case.shape,
            "dtype": str(dtype).removeprefix("torch."),
        }
        if case.model in LARGE and torch.cuda.get_device_properties(site.device).total_memory < LARGE_BYTES:
            yield row | {"failed": {"model": "does not fit this device"}}
            continue
        yield row | _case(site, case, dtype)
        if not site.dry:
            torch.cuda.empty_cache()


def _case(site: Site, case: Case, dtype: torch.dtype) -> dict[str, object]:
    model, batch = _on(site, case, dtype)
    backend = "triton" if site.dry else "auto"
    runs: dict[str, Callable[[], object]] = {
        "plain": partial(peers.plain, model, batch),
        "profile": partial(zest_fast.profile, model, batch, backend=backend),
        "drop_gradients": partial(peers.drop_gradients, model, batch),
        "hook_and_drop": partial(peers.hook_reductions, model, batch),
    }
    failed: dict[str, str] = {}
    for name in list(runs):
        reason = _why_not(runs[name], model)
        if reason:
            failed[name] = reason
            del runs[name]
    rounds = min(LARGE_ROUNDS, site.rounds) if case.model in LARGE else site.rounds
    times = interleave({name: _waiting(site, run) for name, run in runs.items()}, rounds)
    profile = runs["profile"]() if "profile" in runs else None
    return {
        "layers": len(peers.profiled_layers(model)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "backend": profile.backend if profile else None,
        "seconds": {name: median(values).as_dict() for name, values in times.items()},
        "ratio_to_plain": {name: ratio(times, name, "plain").as_dict() for name in times if "plain" in times},
        "peak_bytes": {f"{cap} GB": _peaks(site, cap, runs, model) for cap in CAPS},
        "waits": _waits(site, runs["profile"]) if "profile" in runs else None,
        "waits_of_plain": _waits(site, runs["plain"]) if "plain" in runs else None,
        "failed": failed,
    }


def _on(site: Site, case: Case, dtype: torch.dtype) -> tuple[nn.Module, Batch]:
    """The model on the device, made there in its dtype: 7B parameters never exist in float32."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with site.device:
            model, batch = case.build()
    finally:
        torch.set_default_dtype(default)
    inputs = {k: v.to(site.device, dtype) if v.is_floating_point() else v.to(site.device) for k, v in batch.items()}
    return model.to(site.device), inputs


def _why_not(run: Callable[[], object], model: nn.Module) -> str:
    """Runs it once, which also compiles; whatever it raises is the finding."""
    try:
        run()
    except Exception as error:
        model.zero_grad(set_to_none=True)
        return _in_words(error)
    return ""


def _in_words(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _waiting(site: Site, run: Callable[[], object]) -> Callable[[], None]:
    def timed() -> None:
        run()
        site.synchronize()

    return timed


def _peaks(site: Site, cap: int, runs: dict[str, Callable[[], object]], model: nn.Module) -> dict[str, int | str]:
    """Most bytes of each run under the cap, or why it did not get through."""
    found: dict[str, int | str] = {}
    with site.capped(cap):
        for name, run in runs.items():
            try:
                found[name] = site.peak_bytes(run)
            except Exception as error:
                found[name] = _in_words(error)
                model.zero_grad(set_to_none=True)
    return found


def _waits(site: Site, run: Callable[[], object]) -> dict[str, object]:
    """Where the host waits for the device: how often each line does; and whether the pass gets through when it may not.

    On a GPU torch's own synchronisation debug mode says so: "error" is the proof, "warn" the list. A dry run counts
    what reads a number from a tensor, which on a GPU would wait.
    """
    places: dict[str, int] = {}
    if site.dry:
        with _ReadsNumbers(places):
            run()
        return {"refused_at": None, "places": places}
    with _sync_debug_mode("error"):
        try:
            run()
            refused = None
        except Exception as error:  # torch raises RuntimeError; a model's own code may dress it up
            refused = f"{_place(traceback.extract_tb(error.__traceback__))}: {_in_words(error)}"
    with _sync_debug_mode("warn"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    for warning in caught:
        if "synchroniz" in str(warning.message):
            place = f"{_short(warning.filename)}:{warning.lineno}"
            places[place] = places.get(place, 0) + 1
    return {"refused_at": refused, "places": places}


@contextmanager
def _sync_debug_mode(mode: str) -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class _ReadsNumbers(TorchDispatchMode):
    """Counts, for each line, the numbers that are read from tensors (item, bool, float)."""

    def __init__(self, places: dict[str, int]) -> None:
        super().__init__()
        self._places = places

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            place = _place(traceback.extract_stack()[:-1])
            self._places[place] = self._places.get(place, 0) + 1
        return func(*args, **(kwargs or {}))


def _place(stack: traceback.StackSummary | list[traceback.FrameSummary]) -> str:
    """The innermost line outside of torch."""
    own = [frame for frame in stack if "/torch/" not in frame.filename and not frame.filename.startswith("<")]
    return f"{_short(own[-1].filename)}:{own[-1].lineno}" if own else "unknown"


def _short(filename: str) -> str:
    return filename.removeprefix(f"{ROOT}/").rpartition("site-packages/")[2]
