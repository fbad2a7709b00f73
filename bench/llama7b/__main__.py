"""LLaMA-7B in bfloat16 for real, on a CPU: resident memory and time of a profile and of a fine-tuning step.

    python -m bench.llama7b profile             # 128 and 512 tokens
    python -m bench.llama7b finetune            # 5 layers that rank(profile) chose; makes the profile if there is none
    python -m bench.llama7b finetune --frozen int8

Weights are random: memory and time do not depend on them, and the choice of layers is a stand-in. They are built one by
one, never in two copies. Each case runs in a process of its own, so that VmHWM, the kernel's high-water mark of
resident memory, is that case's; it holds Python, torch and scratch of the kernels as well. A step is a forward and a
backward pass with AdamW inside of backward. Times are those of the faster of two runs, and stand beside the plain
model's own forward + dX pass, all weights frozen, timed afterwards in the same process. Each case is written to the
JSON when it is done, and a later call goes on from there.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import zest_fast
from bench.measure import RESULTS, ROOT, write_result
from zest_fast.lean.optimizer import adamw, optimizer_in_backward
from zest_fast.planning.plan import plan, plan_profile

GIB = 2**30
LAYERS = 5
RUNS = 2
SPARE = (
    2.5  # GiB that must be available beyond the plan: Python, torch, scratch of kernels; else the machine would swap
)
GOALS = {("profile", 128, None): 14.5, ("finetune", 128, None): 15.0}  # GiB
TINY = {
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 500,
}


@dataclass(frozen=True)
class Case:
    """kind: "profile" or "finetune". layers: what trains, of the latter. frozen: as for SelectiveBackward."""

    kind: str
    tokens: int
    frozen: str | None = None
    tiny: bool = False
    threads: int = 1
    layers: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, int, str | None]:
        return self.kind, self.tokens, self.frozen


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.llama7b", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=["profile", "finetune"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--frozen", choices=["int8", "nf4"], help="frozen weights quantised (finetune)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="measure what the JSON has already")
    parser.add_argument("--tiny", action="store_true", help="a toy of the same make, to see that it runs")
    parser.add_argument("--out", type=Path, help="folder of the JSON, in place of bench/results")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # how this starts itself
    options = parser.parse_args()
    if options.case:
        case = json.loads(options.case)
        print(json.dumps(measure(Case(**{**case, "layers": tuple(case["layers"])}))))
        return
    results = _Results(options.out)
    for tokens in options.tokens:
        case = Case(options.kind, tokens, options.frozen, options.tiny, options.threads)
        if options.again or case.key not in results.rows:
            results.add(_run(case if case.kind == "profile" else _with_layers(case, results)))


class _Results:
    """The rows of the JSON, by case."""

    def __init__(self, out: Path | None) -> None:
        self._out = out
        path = (out or RESULTS) / "llama7b.json"
        found = json.loads(path.read_text())["results"] if path.exists() else []
        self.rows: dict[tuple, dict] = {(row["kind"], row["tokens"], row["frozen"]): row for row in found}

    def add(self, row: dict) -> None:
        key = row["kind"], row["tokens"], row["frozen"]
        self.rows[key] = row
        rows = [
            self.rows[key] for key in sorted(self.rows, key=lambda key: (key[0] != "profile", key[2] or "", key[1]))
        ]
        settings: dict[str, object] = {"dtype": "bfloat16", "batch": 1, "layers": LAYERS, "runs": RUNS}
        write_result("llama7b", {**settings, "optimizer": "fused adamw in backward"}, rows, self._out)
        goal = f" (goal {row['goal_gib']})" if row["goal_gib"] else ""
        name = " ".join(map(str, filter(None, key)))
        times = f"{min(row['seconds']):.1f} s; forward + dX {min(row['forward_dx_seconds']):.1f} s"
        print(f"{name} tokens: {row['peak_gib']:.2f} GiB{goal}, {times}", flush=True)


def _with_layers(case: Case, results: _Results) -> Case:
    """The case with the layers that the profile with the fewest tokens chose."""
    if not any(kind == "profile" for kind, _, _ in results.rows):
        results.add(_run(Case("profile", case.tokens, None, case.tiny, case.threads)))
    profiles = {tokens: row for (kind, tokens, _), row in results.rows.items() if kind == "profile"}
    return replace(case, layers=tuple(profiles[min(profiles)]["layers"]))


def _run(case: Case) -> dict:
    """The case in a process of its own, if there is memory for it; what is quantised needs the plain weights first."""
    needed = _planned_gib(replace(case, frozen=None)) + SPARE
    available = _status("/proc/meminfo", "MemAvailable") / GIB
    if available < needed:
        sys.exit(f"{case}: {needed:.1f} GiB of memory must be available, and {available:.1f} are; nothing was started")
    command = [sys.executable, "-m", "bench.llama7b", case.kind, "--case", json.dumps(asdict(case))]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return {**json.loads(done.stdout), "planned_gib": _planned_gib(case)}


def _planned_gib(case: Case) -> float:
    sizes: dict[str, Any] = {"batch_size": 1, "sequence_length": case.tokens}
    if case.kind == "profile":
        planned = plan_profile(_config(case.tiny), **sizes)
    else:
        planned = plan(
            _config(case.tiny), case.layers, optimizer="adamw-fused-in-backward", frozen=case.frozen, **sizes
        )
    return planned.peak_bytes / GIB


def measure(case: Case) -> dict:
    """One case, in this process, which should do nothing else."""
    torch.set_num_threads(case.threads)
    with Progress(console=Console(stderr=True)) as progress:
        model = build(case.tiny, progress)
        resident = _status("/proc/self/status", "VmRSS")
        ids = torch.randint(model.config.vocab_size, (1, case.tokens), generator=torch.Generator().manual_seed(0))
        batch = {"input_ids": ids, "labels": ids}
        bar = progress.add_task(f"{case.kind}, {case.tokens} tokens", total=2 * RUNS)
        run = _profile if case.kind == "profile" else _finetune
        row = run(model, batch, case, lambda: progress.advance(bar))
        forward_dx = [_timed(lambda: _forward_dx(model, batch), lambda: progress.advance(bar)) for _ in range(RUNS)]
    return {
        "kind": case.kind,
        "tokens": case.tokens,
        "frozen": case.frozen,
        "weights_gib": _weights_gib(model),
        "resident_when_built_gib": resident / GIB,
        "goal_gib": None if case.tiny else GOALS.get(case.key),
        "forward_dx_seconds": forward_dx,
        "load_average": os.getloadavg()[0],
        **row,
    }


def build(tiny: bool, progress: Progress) -> Any:
    """LLaMA-7B with random weights: on the meta device first, then parameter by parameter."""
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = _config(tiny)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # computed, not trained
    torch.manual_seed(0)
    bar = progress.add_task("weights", total=sum(p.numel() for p in model.parameters()))
    for module in model.modules():
        for name, empty in module._parameters.items():
            if empty is not None:
                made = torch.empty(empty.shape, dtype=empty.dtype)
                made.normal_(0, config.initializer_range) if made.dim() > 1 else made.fill_(1)
                module._parameters[name] = nn.Parameter(made)
                progress.advance(bar, made.numel())
    return model.train()


def _config(tiny: bool) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**(TINY if tiny else {}), use_cache=False)


def _profile(model: nn.Module, batch: dict[str, Tensor], case: Case, advance: Callable[[], None]) -> dict:
    profiles: list[Any] = []

    def run() -> None:
        profiles.clear()
        profiles.append(zest_fast.profile(model, batch))

    seconds = [_timed(run, advance) for _ in range(RUNS)]
    peak = _peak_gib()
    layers = zest_fast.rank(profiles[0]).top(LAYERS)
    return {"peak_gib": peak, "seconds": seconds, "layers": layers}


def _finetune(model: nn.Module, batch: dict[str, Tensor], case: Case, advance: Callable[[], None]) -> dict:
    started = time.perf_counter()
    tuned = zest_fast.SelectiveBackward(model, case.layers, frozen=case.frozen)
    gc.collect()
    wrapping = time.perf_counter() - started
    _forget_peak()  # quantising began with the plain weights
    optimizer = adamw(tuned.parameters(), lr=1e-4, fused=True)
    losses: list[float] = []

    def run() -> None:
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())

    with optimizer_in_backward(optimizer):
        seconds = [_timed(run, advance) for _ in range(RUNS)]
    peak = _peak_gib()
    tuned.verify()
    row = {"cut": tuned.cut, "losses": losses, "wrapping_seconds": wrapping, "layers": case.layers}
    row["weights_gib"] = _weights_gib(model)  # quantised
    tuned.remove()
    return {"peak_gib": peak, "seconds": seconds, **row}


def _weights_gib(model: nn.Module) -> float:
    return sum(parameter.nbytes for parameter in model.parameters()) / GIB


def _forward_dx(model: Any, batch: dict[str, Tensor]) -> None:
    """Forward, and backward to the embeddings' output with every weight frozen."""
    model.requires_grad_(False)
    embedded = model.get_input_embeddings()(batch["input_ids"]).requires_grad_(True)
    model(inputs_embeds=embedded, labels=batch["labels"]).loss.backward()


def _timed(run: Callable[[], None], advance: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    elapsed = time.perf_counter() - started
    advance()
    return elapsed


def _peak_gib() -> float:
    return _status("/proc/self/status", "VmHWM") / GIB


def _forget_peak() -> None:
    """Let VmHWM begin anew at what is resident now (Linux 4.0)."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(path: str, key: str) -> int:
    """Bytes of a line such as "VmHWM:  123 kB"."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path(path).read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{path} has no {key}: this benchmark needs Linux")
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
