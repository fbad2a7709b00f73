"""What is lost when a delta becomes a LoRA adapter: rank, error and accuracy, on the tasks of the demo.

python -m bench.adapters [--tasks minilm lite0]      # writes bench/results/adapters.json

Five layers by the Ranker that ships and the head are trained (AdamW, a rate for the layers and one for the head, both
falling to zero), and the delta is exported at several ranks and errors. Every adapter is loaded by PEFT onto the base,
and scored on the split "test", as the delta is.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bench.measure import write_result
from zest_fast import SelectiveBackward, adamw, apply_delta, delta_to_lora, profile, rank
from zest_fast.demo.task import Task
from zest_fast.foundation.text_table import markdown_table

TASKS = ("minilm", "lite0")
STEPS, BATCH, RATE, HEAD_RATE = 150, 32, 3e-4, 1e-2
WANTED: tuple[dict[str, Any], ...] = (
    *({"rank": value} for value in (4, 16, 64)),
    *({"error": value} for value in (0.3, 0.1)),
)


def measure(task: Task, seed: int) -> list[dict[str, Any]]:
    """Rows: the base, the delta, and each adapter with its rank, error and bytes."""
    from peft import PeftModel

    base = task.model.eval()
    tuned, folder = copy.deepcopy(base), Path(tempfile.mkdtemp())
    train = task.splits["train"]
    layers = rank(profile(base, train.batch(slice(task.budget.profile_batch)))).top(5)
    with SelectiveBackward(tuned, layers, head=task.head) as wrapped:
        names = wrapped.trainable_names
        rates = [HEAD_RATE if name.startswith(f"{task.head}.") else RATE for name in names]
        groups = [{"params": [p], "lr": r} for p, r in zip(wrapped.parameters(), rates, strict=True)]
        optimizer = adamw(groups, weight_decay=0.0)
        generator = torch.Generator().manual_seed(seed)
        for step in range(STEPS):
            inputs, labels = train.batch(torch.randint(len(train), (BATCH,), generator=generator))
            for group, full in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = full * (1 - step / STEPS)
            F.cross_entropy(tuned(inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        delta = wrapped.save(folder / "delta.safetensors")
    said = {"task": task.name, "seed": seed, "layers": list(layers)}
    whole = copy.deepcopy(base)
    apply_delta(whole, delta)
    rows = [
        {**said, "form": "base", "accuracy": accuracy(base, task)},
        {**said, "form": "delta", "accuracy": accuracy(whole, task), "bytes": delta.stat().st_size, "error": 0.0},
    ]
    for number, wanted in enumerate(WANTED):
        export = delta_to_lora(delta, base, folder / f"adapter-{number}", **wanted)
        adapted = PeftModel.from_pretrained(copy.deepcopy(base), str(export.path)).eval()
        rows.append(
            {
                **said,
                "form": "adapter",
                "wanted": wanted,
                "accuracy": accuracy(adapted, task),
                "bytes": export.bytes,
                "error": export.error,
                "errors": [one.error for one in export.layers],
                "ranks": [one.rank for one in export.layers],
                "full_ranks": [one.full_rank for one in export.layers],
            }
        )
    return rows


@torch.no_grad()
def accuracy(model: nn.Module, task: Task) -> float:
    test = task.splits["test"]
    right = 0
    for rows in torch.arange(len(test)).split(64):
        inputs, labels = test.batch(rows)
        right += int((model(inputs).argmax(1) == labels).sum())
    return right / len(test)


def adapters_text(document: dict[str, Any]) -> str:
    """A row for each form, of all tasks."""
    rows = []
    for row in document["results"]:
        if row["form"] == "base":
            continue
        ranks, full = row.get("ranks"), row.get("full_ranks")
        span = "" if ranks is None else " to ".join(map(str, sorted({min(ranks), max(ranks)})))
        of = "" if ranks is None else f"{span} of {max(full)}"
        asked = ", ".join(f"{key}={value}" for key, value in row.get("wanted", {}).items())
        rows.append(
            [
                f"{row['task']}: {asked or 'delta'}",
                of,
                f"{row['error']:.3f}",
                "" if not row.get("errors") else f"{max(row['errors']):.3f}",
                f"{100 * row['accuracy']:.1f}",
                f"{row['bytes'] / 2**20:.2f}",
            ]
        )
    return markdown_table(["", "ranks", "error of all", "of the worst layer", "accuracy, %", "MiB"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.adapters", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    results = []
    for name in arguments.tasks:
        found = measure(import_module(f"zest_fast.demo.{name}").load(seed=arguments.seed), arguments.seed)
        results += found
        for row in found:
            print(json.dumps(row), flush=True)
    settings = {"steps": STEPS, "batch": BATCH, "rate": RATE, "head_rate": HEAD_RATE, "seed": arguments.seed}
    write_result("adapters", settings, results)


if __name__ == "__main__":
    main()
