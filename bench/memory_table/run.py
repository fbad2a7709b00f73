"""Table 4, memory: what a training step of each method needs, on the models and shapes of the paper.

    python -m bench.memory_table                    # a minute and a half of dry runs
    python -m bench.memory_table --check            # the CPU-sized models are run, counted and timed as well: minutes
    python -m bench.memory_table --only llama-7b
    python -m bench.memory_table --add              # dry runs of the methods that the JSON lacks; its other rows stay

`peak_bytes` and `flops` are those of a dry run (tensors, without the CUDA context). With --check, `counted_bytes` are
what a real step on the CPU held, and `seconds` the processor time of the faster of two more. `memory_to_full` and the
like are relative to full fine-tuning. The five layers are stand-ins: evenly spread from the middle block up, because
memory depends on the lowest of them and on their sizes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.measure import RESULTS, write_result
from zest_fast.benchmarking.real_steps import counted_and_timed_step
from zest_fast.foundation.replacing import replacing
from zest_fast.planning.batches import make_batch
from zest_fast.planning.blocks import layout_of
from zest_fast.planning.plan import Plan, plan
from zest_fast.planning.skeletons import named_model

LAYERS = 5


@dataclass(frozen=True)
class Shape:
    """A model of the paper with one batch. on_cpu: whether a real step of it fits a CPU."""

    model: str
    sizes: dict[str, int]
    on_cpu: bool = True

    @property
    def language(self) -> bool:
        return "sequence_length" in self.sizes

    def __str__(self) -> str:
        return f"{self.model} {' x '.join(map(str, self.sizes.values()))}"


SHAPES = (
    Shape("llama-7b", {"batch_size": 1, "sequence_length": 512}, on_cpu=False),
    Shape("llama-7b", {"batch_size": 2, "sequence_length": 2048}, on_cpu=False),  # torchtune's
    Shape("bert-base", {"batch_size": 1, "sequence_length": 512}),
    Shape("mobilenet-v2", {"batch_size": 32, "image_size": 224}),
    Shape("resnet-50", {"batch_size": 32, "image_size": 224}),
    Shape("efficientnet-b0", {"batch_size": 32, "image_size": 224}),
)
TINY = (Shape("resnet-50", {"batch_size": 2, "image_size": 64}),)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.memory_table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="the rows whose model has this name")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--check", action="store_true", help="run, count and time real CPU steps beside the dry runs")
    parser.add_argument("--threads", type=int, default=1, help="of the real steps")
    parser.add_argument("--quick", action="store_true", help="one toy shape")
    parser.add_argument("--out", type=Path, help="folder, in place of bench/results")
    parser.add_argument("--add", action="store_true", help="plan what the JSON lacks, and leave its rows as they are")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.add:
        print(add_missing((options.out or RESULTS) / "memory_table.json", options.only))
        return
    settings = {"layers": LAYERS, "lowest": "middle block", "source": "dry run on fake tensors", "optimizer": "adamw"}
    results: list[dict] = []
    for shape in TINY if options.quick else SHAPES:
        if options.only in (None, shape.model):
            for dtype in options.dtypes:
                results += rows(shape, dtype, check=options.check)
                path = write_result("memory_table", settings, results, options.out)
    print(path)


def add_missing(path: Path, only: str | None = None) -> Path:
    """Rows of methods that the file lacks, for the models and dtypes that it has, each written when it is there.

    only: a model's name. What the file held stays as it was, head included; an added row says its own date.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    results: list[dict] = document["results"]
    for shape in (*SHAPES, *TINY):
        dtypes = dict.fromkeys(row["dtype"] for row in results if row["model"] == str(shape))
        for dtype in dtypes if only in (None, shape.model) else ():
            there = {row["method"]: row for row in results if (row["model"], row["dtype"]) == (str(shape), dtype)}
            for row in rows(shape, dtype, known=there):
                row["date"] = datetime.now(UTC).date().isoformat()
                last = max(place for place, other in enumerate(results) if other in there.values())
                results.insert(last + 1, row)
                there[row["method"]] = row
                with replacing(path) as temporary:
                    temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    return path


def rows(shape: Shape, dtype: str, *, check: bool = False, known: dict[str, dict] | None = None) -> Iterator[dict]:
    """A row for each method: peak bytes and FLOPs, and relative to full fine-tuning; with `check` a real step's too.

    known: rows by method that are there already, and are not made again.
    """
    full = (known or {}).get("full")
    for method, make in _methods(shape, dtype):
        if method in (known or {}):
            continue
        planned = make()
        row: dict[str, Any] = {"model": str(shape), "dtype": dtype, "method": method, "source": "dry run"}
        row |= {"peak_bytes": planned.peak_bytes, "flops": planned.flops, "breakdown": planned.breakdown}
        row |= {"fits_gb": list(planned.fits), "peak_tensor": str(planned.peak_tensor)}
        if check and shape.on_cpu and planned.setting.layers:  # without layers they are adapters
            row["counted_bytes"], row["seconds"] = _real(shape, planned)
        full = full or row
        for name, key in (("memory", "peak_bytes"), ("flops", "flops"), ("time", "seconds")):
            if key in row:
                row[f"{name}_to_full"] = row[key] / full[key]
        counted = f", counted {row['counted_bytes'] / 2**30:6.2f}, {row['seconds']:.2f} s" if "seconds" in row else ""
        print(f"{row['model']:28} {dtype:9} {method:27} {planned.peak_bytes / 2**30:7.2f} GiB{counted}", flush=True)
        yield row


def _methods(shape: Shape, dtype: str) -> Iterator[tuple[str, Callable[[], Plan]]]:
    layout = layout_of(named_model(shape.model)[1])
    five = layout.stand_ins(LAYERS, len(layout.blocks) // 2)

    def step(layers: Any = five, model: Any = shape.model, **options: Any) -> Callable[[], Plan]:
        return lambda: plan(model, layers, **{"dtype": dtype, **shape.sizes, **options})

    yield "full", step("all")
    yield "full, in backward", step("all", optimizer="adamw-in-backward")
    yield "zest@5, plain", step(lean=False)
    yield "zest@5, lean", step(lean=True)
    yield "zest@5, lean, in backward", step(optimizer="adamw-in-backward")
    yield "zest@5, above-cut", step(checkpoint="above-cut")
    if shape.language:
        yield "zest@5, int8", step(frozen="int8")
        yield "zest@5, nf4", step(frozen="nf4")
        yield "zest@5, nf4, above-cut", step(frozen="nf4", checkpoint="above-cut")
        # adapted models are built when it is their turn
        yield "lora r8", lambda: step(None, _lora(shape.model, dtype), dtype=None)()
        yield "qlora r8", lambda: step(None, _lora(shape.model, dtype), dtype=None, frozen="nf4")()
        yield "lora r8, checkpointed", lambda: step(None, _lora(shape.model, dtype, checkpointed=True), dtype=None)()
        yield (
            "qlora r8, checkpointed",
            lambda: step(None, _lora(shape.model, dtype, checkpointed=True), dtype=None, frozen="nf4")(),
        )


def _lora(name: str, dtype: str, *, checkpointed: bool = False) -> nn.Module:
    """The model on the meta device with adapters of rank 8 on every linear layer, in float32 as PEFT makes them.

    checkpointed: with the gradient checkpointing of transformers, every block of it.
    """
    import peft

    _, model = named_model(name)
    if checkpointed:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return peft.get_peft_model(model.to(getattr(torch, dtype)), peft.LoraConfig(r=8, target_modules="all-linear"))


def _real(shape: Shape, planned: Plan) -> tuple[int, float]:
    """Bytes that a real step held, and its processor time."""
    setting = planned.setting
    assert setting.layers is not None
    skeleton = named_model(shape.model)[1]
    torch.manual_seed(0)
    model = type(skeleton)(skeleton.config).to(getattr(torch, str(setting.dtype))).train()
    options = {} if setting.layers == "all" else {"lean": setting.lean, "checkpoint": setting.checkpoint}
    options |= {"frozen": setting.frozen} if setting.frozen else {}
    return counted_and_timed_step(model, make_batch(model, setting), setting.layers, str(setting.optimizer), **options)
