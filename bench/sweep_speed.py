"""What a sweep saves by reusing frozen prefixes, beside the naive loop: the same recipe and head, no reuse.

`python -m bench.sweeps --speed`. Head and profiles, the same in both, are made before the clock starts; planning (the
comparisons with the full forward pass) and the passes that fill the caches count.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas
import torch

from bench.data import load_pair
from bench.measure import write_result
from zest_fast.benchmarking.timing import interleave, median, ratio
from zest_fast.prefix.inputs import rows_of
from zest_fast.sweeping import sweep as sweep_module
from zest_fast.sweeping import trials as trials_module
from zest_fast.sweeping.recipe import Recipe
from zest_fast.sweeping.reused_prefix import ReusedPrefix
from zest_fast.sweeping.sweep import sweep
from zest_fast.sweeping.trials import Trials

PHASES: dict[str, tuple[Any, str]] = {
    "planning": (sweep_module, "plan"),
    "caches": (Trials, "_caches_at"),
    "checks": (ReusedPrefix, "check"),
    "training, forward": (Trials, "_train"),  # and the optimizer: less than one in a hundred
    "training, backward": (torch.Tensor, "backward"),
    "scoring": (trials_module, "evaluate"),
}
"""What is timed as which part of a sweep; a part that runs inside another one does not count there."""
OVERHEAD = ("planning", "caches", "checks")
"""Parts that the naive loop does not have."""
SHARE = 4  # of the steps, the training samples and the scored samples of one seed, one part in so many
ROUNDS = 2


def measure(recipes: Mapping[str, Recipe], out: Path) -> None:
    """Time these pairs (MODEL/DATASET -> recipe) and write sweep_speed.json."""
    settings = {
        "share_of_a_seed": f"1/{SHARE} of the steps, training samples and scored samples",
        "rounds": ROUNDS,
        "clock": "processor seconds of the process, interleaved; other sweeps may run beside it",
        "counted": "planning, prefix passes, training and scoring of every layer; not head and profiles",
    }
    results: list[dict] = []
    for pair, recipe in recipes.items():
        results.append(_measure_pair(pair, recipe))
        write_result(
            "sweep_speed", settings, results, out, module="sweeps"
        )  # what is measured stays, whatever comes next


def _measure_pair(pair: str, recipe: Recipe) -> dict:
    model, splits = load_pair(*pair.split("/"))
    inputs, targets = splits["score"]
    few = torch.arange(len(targets) // SHARE)
    splits = {**splits, "score": (rows_of(inputs, few), targets[few])}
    assert recipe.train_samples is not None
    recipe = replace(
        recipe, seeds=recipe.seeds[:1], steps=recipe.steps // SHARE, train_samples=recipe.train_samples // SHARE
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "records.jsonl")
        sweep(model, splits, recipe=recipe, out=path)
        # All but the layers: what is timed goes on from there.
        begun = [line for line in path.read_bytes().splitlines(True) if b'"record":"layer"' not in line]
        frames: dict[bool, pandas.DataFrame] = {}
        phases = {name: dict.fromkeys(PHASES, 0.0) for name in ("reuse", "naive")}

        def run(reuse: bool) -> None:
            path.write_bytes(b"".join(begun))
            with _timed_phases(phases["reuse" if reuse else "naive"]):
                frames[reuse] = sweep(model, splits, recipe=recipe, out=path, reuse=reuse)

        times = interleave(
            {"reuse": lambda: run(True), "naive": lambda: run(False)}, ROUNDS, warmup=0, clock=time.process_time
        )
    result = {
        "pair": pair,
        "layers": frames[True].layer.nunique(),
        "seconds": {name: median(values).as_dict() for name, values in times.items()},
        "phases": {name: {part: total / ROUNDS for part, total in parts.items()} for name, parts in phases.items()},
        "ratio": ratio(times, "reuse", "naive").as_dict(),
        "largest_difference_of_a_score": float((frames[True].loss - frames[False].loss).abs().max()),
    }
    print(
        f"{pair}: {result['layers']} layers, {median(times['reuse']).median:.1f} s with reuse, "
        f"{median(times['naive']).median:.1f} s without ({ratio(times, 'reuse', 'naive').median:.2f}x); scores differ "
        f"by {result['largest_difference_of_a_score']:.1e} at most",
        flush=True,
    )
    return result


@contextmanager
def _timed_phases(seconds: dict[str, float]) -> Iterator[None]:
    """Adds the processor seconds of each of PHASES that run inside."""
    inside = [0.0]  # of the parts that run within each one that is under way

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            inside.append(0.0)
            began = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.process_time() - began
                seconds[part] += took - inside.pop()
                inside[-1] += took

        return run

    with ExitStack() as patches:
        for part, (owner, name) in PHASES.items():
            patches.enter_context(patch.object(owner, name, timed(part, getattr(owner, name))))
        yield
