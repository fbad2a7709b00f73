"""Table 4, memory: what a training step of each method needs, by dry run, on the models and shapes of the paper.

    python -m bench.memory_table                    # every row; with --check the CPU-sized ones are run and counted too
    python -m bench.memory_table --only llama-7b

All figures are dry runs (peak of tensors, without the CUDA context), labelled so in the JSON. The five layers are
stand-ins: evenly spread from the middle block up, because memory depends on the lowest of them and on their sizes.
FLOPs are those of a step relative to full fine-tuning. (`bench.memory` is about profile(), hence the name.)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import models
from bench.measure import write_result
from bench.real_steps import counted_step, in_dtype
from zest_fast.finetuning.plan import Plan, plan
from zest_fast.finetuning.planning.blocks import layout_of
from zest_fast.finetuning.planning.models import named_model

LAYERS = 5


@dataclass(frozen=True)
class Shape:
    """A model of the paper with one batch. build: the same for real, where it fits a CPU."""

    model: str
    sizes: dict[str, int]
    language: bool = True
    build: Callable[[], tuple[nn.Module, models.Batch]] | None = None

    def __str__(self) -> str:
        return f"{self.model} {' x '.join(map(str, self.sizes.values()))}"


SHAPES = (
    Shape("llama-7b", {"batch_size": 1, "sequence_length": 512}),
    Shape("llama-7b", {"batch_size": 2, "sequence_length": 2048}),  # torchtune's
    Shape(
        "bert-base",
        {"batch_size": 1, "sequence_length": 512},
        build=lambda: models.bert(1, 512, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1),
    ),
    Shape("mobilenet-v2", {"batch_size": 32, "image_size": 224}, language=False),
    Shape("resnet-50", {"batch_size": 32, "image_size": 224}, language=False, build=lambda: models.resnet50(32, 224)),
    Shape("efficientnet-b0", {"batch_size": 32, "image_size": 224}, language=False),
)
TINY = (Shape("resnet-50", {"batch_size": 2, "image_size": 64}, language=False, build=lambda: models.resnet50(2, 64)),)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="the rows whose model has this name")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--check", action="store_true", help="run and count real CPU steps beside the dry runs")
    parser.add_argument("--quick", action="store_true", help="one toy shape")
    parser.add_argument("--out", help="folder, in place of bench/results")
    arguments = parser.parse_args()
    results: list[dict] = []
    for shape in TINY if arguments.quick else SHAPES:
        if arguments.only in (None, shape.model):
            for dtype in arguments.dtypes:
                results += rows(shape, dtype, check=arguments.check)
    settings = {"layers": LAYERS, "lowest": "middle block", "source": "dry run on fake tensors", "optimizer": "adamw"}
    print(write_result("memory_table", settings, results, Path(arguments.out) if arguments.out else None))


def rows(shape: Shape, dtype: str, *, check: bool = False) -> list[dict]:
    """A row for each method: peak bytes and FLOPs, also relative to full fine-tuning; `counted_bytes` of a real step
    where asked for.
    """
    found, full = [], None
    for method, make in _methods(shape, dtype):
        row: dict[str, Any] = {"model": str(shape), "dtype": dtype, "method": method, "source": "dry run"}
        try:
            planned = make()
        except NotImplementedError as error:
            found.append({**row, "missing": str(error)})
            continue
        full = full or planned
        row |= {"peak_bytes": planned.peak_bytes, "memory_to_full": planned.peak_bytes / full.peak_bytes}
        row |= {"flops": planned.flops, "flops_to_full": planned.flops / full.flops, "breakdown": planned.breakdown}
        row |= {"fits_gb": list(planned.fits), "peak_tensor": str(planned.peak_tensor)}
        if check and _runs_for_real(shape, planned):
            row["counted_bytes"] = _counted(shape, planned)
        print(f"{row['model']:28} {dtype:9} {method:24} {planned.peak_bytes / 2**30:7.2f} GiB", flush=True)
        found.append(row)
    return found


def _methods(shape: Shape, dtype: str) -> Iterator[tuple[str, Callable[[], Plan]]]:
    layout = layout_of(named_model(shape.model)[1])
    five = layout.stand_ins(LAYERS, len(layout.blocks) // 2)

    def step(layers: Any = five, model: Any = shape.model, **options: Any) -> Callable[[], Plan]:
        return lambda: plan(model, layers, dtype=dtype, **shape.sizes, **options)

    yield "full", step("all")
    yield "full, in backward", step("all", optimizer="adamw-in-backward")
    yield "zest@5, plain", step(lean=False)
    yield "zest@5, lean", step(lean=True)
    yield "zest@5, above-cut", step(checkpoint="above-cut")
    if shape.language:
        yield "zest@5, int8", step(frozen="int8")
        yield "zest@5, nf4", step(frozen="nf4")
        yield "lora r8", lambda: step(None, _lora(shape.model))()  # built when it is its turn
        yield "qlora r8", lambda: step(None, _lora(shape.model), frozen="nf4")()


def _lora(name: str) -> nn.Module:
    """The model on the meta device with adapters of rank 8 on every linear layer."""
    import peft

    _, model = named_model(name)
    return peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear"))


def _runs_for_real(shape: Shape, planned: Plan) -> bool:
    """Whether a plain loop on this CPU does the same: no adapters, nothing quantised, one update behind backward."""
    setting = planned.setting
    return bool(shape.build and setting.layers and not setting.frozen and "in-backward" not in str(setting.optimizer))


def _counted(shape: Shape, planned: Plan) -> int:
    assert shape.build is not None
    dtype = getattr(torch, planned.setting.dtype or "float32")
    model, batch = in_dtype(*shape.build(), dtype)
    layers = planned.setting.layers
    assert layers is not None
    return counted_step(model, batch, layers, str(planned.setting.optimizer))


if __name__ == "__main__":
    main()
