"""`python -m bench.start_up`: what a user waits for before anything is computed, each in a fresh process.

Processes run interleaved, one at a time. A plan is timed in its process without the imports of torch and transformers,
and as the command with them. `--wheel` also builds wheels, each in a new folder, as often as `--builds` says.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from bench.measure import ROOT, write_result
from zest_fast.benchmarking import models
from zest_fast.benchmarking.timing import interleave, median
from zest_fast.foundation.text_table import markdown_table

PLAN = """
import time, torch, transformers
from transformers.models.llama import modeling_llama
from zest_fast.planning.plan import plan
config = transformers.LlamaConfig({changes})
began = time.perf_counter()
found = plan(config, {layers!r}, batch_size=1, sequence_length=512)
{table}
print(time.perf_counter() - began)
"""
LARGE = (
    "hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, "
    "vocab_size=32000"
)
PLANS = {
    "plan of LLaMA-7B, five layers": PLAN.format(changes="", layers=5, table=""),
    "plan of LLaMA-7B, all layers": PLAN.format(changes="", layers="all", table=""),
    "plan of LLaMA-70B, five layers": PLAN.format(changes=LARGE, layers=5, table=""),
    "plan of LLaMA-70B, all layers": PLAN.format(changes=LARGE, layers="all", table=""),
    "plan and table of LLaMA-7B, 12 rows": PLAN.format(changes="", layers=5, table="found.table()"),
}
IMPORTS = {"torch": "import torch", "profile": "import torch; from zest_fast import profile"}
BEYOND = "import of zest_fast.profile beyond torch"
WHEELS = {"build of a wheel without nvcc": "OFF", "build of a wheel with nvcc": "ON"}
LIMITS = {
    "zest-fast --help": 0.3,
    "zest-fast rank profile.json": 1.0,
    BEYOND: 0.3,
    "plan of LLaMA-7B, five layers": 2.0,
    "plan of LLaMA-7B, all layers": 2.0,
    "plan of LLaMA-70B, five layers": 4.0,
    "plan of LLaMA-70B, all layers": 4.0,
    "plan and table of LLaMA-7B, 12 rows": 10.0,
    "build of a wheel without nvcc": 60.0,
    "build of a wheel with nvcc": 120.0,
}
"""Seconds that issue 20 of the project asks for, on an idle core."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.start_up", description="seconds until something happens")
    parser.add_argument("--rounds", type=int, default=7, help="fresh processes of each kind")
    parser.add_argument("--wheel", action="store_true", help="build wheels too; needs the build requirements installed")
    parser.add_argument("--builds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for the JSON; by default bench/results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(Path(folder), options.rounds, options.builds if options.wheel else 0)
    results = [{"what": what, "seconds": median(found).as_dict()} for what, found in seconds.items()]
    write_result("start_up", {"rounds": options.rounds, "builds": options.builds}, results, options.out)


def measure(folder: Path, rounds: int, builds: int) -> dict[str, list[float]]:
    """Seconds of each, a value a round; `folder` gets a profile to rank and the wheels."""
    import zest_fast

    model, batch = models.bert(2, 64)
    zest_fast.profile(model, batch).save(folder / "profile.json")
    within: dict[str, list[float]] = {what: [] for what in PLANS}
    commands = {
        "zest-fast --help": ["--help"],
        "zest-fast rank profile.json": ["rank", str(folder / "profile.json")],
        "zest-fast plan llama-7b": ["plan", "llama-7b", "--sequence-length", "512"],
    }
    runs: dict[str, Callable[[], object]] = {
        what: _process("-m", "zest_fast", *words) for what, words in commands.items()
    }
    runs |= {what: _process("-c", code) for what, code in IMPORTS.items()}
    runs |= {what: _timed_within(code, within[what]) for what, code in PLANS.items()}
    if builds:
        runs |= {what: _build(folder, cuda) for what, cuda in WHEELS.items()}
    limits = dict.fromkeys(WHEELS if builds else (), builds)
    whole = interleave(runs, rounds, limits=limits)
    beyond = [profile - torch for profile, torch in zip(whole["profile"], whole["torch"], strict=True)]
    seconds = {what: whole[what] for what in commands} | {BEYOND: beyond}
    seconds |= {what: found[-rounds:] for what, found in within.items()}  # the first is the warm-up
    return seconds | {what: whole[what] for what in limits}


def _process(*arguments: str) -> Callable[[], str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def run() -> str:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout

    return run


def _build(folder: Path, cuda: str) -> Callable[[], str]:
    """Nothing of an earlier build is used."""
    words = ("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder))

    def run() -> str:
        new = tempfile.mkdtemp(dir=folder)
        return _process(*words, "-C", f"build-dir={new}", "-C", f"cmake.define.ZEST_CUDA={cuda}", ".")()

    return run


def _timed_within(code: str, seconds: list[float]) -> Callable[[], None]:
    run = _process("-c", code)
    return lambda: seconds.append(float(run()))


def start_up_text(document: dict) -> str:
    """Seconds of each with their interval, and what was asked for."""
    rows = []
    for row in document["results"]:
        found, limit = row["seconds"], LIMITS.get(row["what"])
        cell = f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})"
        rows.append([row["what"], cell, "" if limit is None else f"{limit:g}"])
    return markdown_table(["what", "s", "asked for, at most"], rows)


if __name__ == "__main__":
    main()
