"""The one table of README.md: what five layers by ZEST are worth, and what they cost, beside the usual ways."""

from __future__ import annotations

import statistics

from bench.finetune.report import above, means
from zest_fast.foundation.text_table import markdown_table

GIB = 2**30
SHAPE, DTYPE = "llama-7b 2 x 2048", "bfloat16"

ROWS: dict[str, tuple[str, str, str]] = {
    "ZEST@5": ("**five layers by ZEST**", "zest@5, lean", "zest@5, nf4, above-cut"),
    "full": ("all layers", "full", ""),
    "LoRA r8": ("LoRA r8 on every layer", "lora r8", "qlora r8, checkpointed"),
    "largest@5": ("the five largest layers", "", ""),
    "middle@5": ("five layers in the middle", "", ""),
    "random@5": ("five layers at random", "", ""),
    "last@5": ("the last five layers", "", ""),
    "head only": ("the head only", "", ""),
}
"""Arm of finetune.json -> what the table calls it, its method in memory_table.json, and the one with a packed base."""

LEGEND = (
    "*Accuracy*, *time* and *memory* (of a step, beyond weights and batch): measured on a CPU, means over {pairs} "
    "pairs of model and data set with {models} models of up to 135 M parameters, whose architectures the Ranker knows "
    "from other data; ± is the standard error over the pairs. *LLaMA-7B*: planned by a dry run in bfloat16 with AdamW, "
    "tensors without CUDA's context; five layers evenly spread from the middle block up. The last column packs what is "
    "frozen in nf4 and checkpoints: ZEST the blocks above the cut, LoRA every block, for {flops:.1f} times the FLOPs."
)


def landing_text(finetuned: dict, planned: dict) -> str:
    """The documents are finetune.json and memory_table.json."""
    pairs = finetuned["results"]
    methods = {row["method"]: row for row in planned["results"] if (row["model"], row["dtype"]) == (SHAPE, DTYPE)}
    rows = []
    for arm, (words, method, packed) in ROWS.items():
        trained = [pair["arms"][arm] for pair in pairs if arm in pair["arms"]]
        if not trained:
            continue
        accuracy, _, time, memory = means(trained)
        if len(trained) < len(pairs):
            accuracy = f"({len(trained)} pairs)"  # a mean over others than the rest of the column
        lead = "" if arm == "ZEST@5" else _lead(above(pairs, arm))
        peaks = [f"{methods[name]['peak_bytes'] / GIB:.2f}" if name else "" for name in (method, packed)]
        rows.append([words, accuracy, lead, time, memory, *peaks])
    head = ["what trains", "accuracy, %", "ZEST above it", "x time of all", "x memory of all"]
    table = markdown_table([*head, "LLaMA-7B, 2 x 2048 tokens, GiB", "same, nf4 and checkpointed, GiB"], rows)
    flops = methods["qlora r8, checkpointed"]["flops"] / methods["zest@5, nf4, above-cut"]["flops"]
    models = {pair["pair"].partition("/")[0] for pair in pairs}
    return f"{table}\n\n{LEGEND.format(pairs=len(pairs), models=len(models), flops=flops)}"


def _lead(points: list[float]) -> str:
    error = f" ± {statistics.stdev(points) / len(points) ** 0.5:.1f}" if len(points) > 1 else ""
    return f"{statistics.mean(points):+.1f}{error}"
