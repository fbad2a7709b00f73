"""The tables that docs/results.md shows of bench/results/memory_table.json."""

from __future__ import annotations

from typing import Any

from zest_fast.foundation.text_table import markdown_table

GIB = 2**30
NEAR = 0.02  # of the counted bytes

MEMORY_LEGEND = (
    "Peak GiB of a training step with AdamW (no foreach), by dry run: tensors, without CUDA's context. *zest@5*: five "
    "layers, evenly spread from the middle block up. *int8*, *nf4*: what is frozen is quantised. *lora*, *qlora*: on "
    "every linear layer, with adapters in float32 as PEFT makes them; the base of *qlora* in nf4. "
    "*above-cut*: the blocks above the cut are checkpointed; *checkpointed*: every block is."
)
TIME_LEGEND = "Relative to full fine-tuning: FLOPs of the step, and where the step fits this CPU its measured time."


def memory_text(document: dict) -> str:
    """Peaks of every method, then FLOPs and time where full fine-tuning is 1."""
    results = document["results"]
    peaks = _by_method(results, lambda row: f"{row['peak_bytes'] / GIB:.2f}")
    legend = " ".join(filter(None, [MEMORY_LEGEND, _counted(results)]))
    return "\n\n".join([peaks, legend, _by_method(results, _share), TIME_LEGEND])


def _counted(results: list[dict]) -> str:
    """How far dry runs are from real steps; only convolutions are far, whose scratch no dry run sees."""
    apart = {id(row): row["counted_bytes"] / row["peak_bytes"] - 1 for row in results if "counted_bytes" in row}
    if not apart:
        return ""
    near = sum(abs(share) <= NEAR for share in apart.values())
    text = f"{len(apart)} of the figures were counted in real steps on the CPU, too: {near} within {100 * NEAR:.0f} %"
    far = [row["model"] for row in results if abs(apart.get(id(row), 0)) > NEAR]
    if not far:
        return f"{text}."
    return (
        f"{text}, the others ({', '.join(dict.fromkeys(far))}) up to {100 * max(apart.values()):.0f} % above: a "
        "convolution on the CPU holds a second copy of its output while it runs, which a plan for a GPU leaves out."
    )


def _share(row: dict) -> str:
    flops = f"{row['flops_to_full']:.2f}"
    return f"{flops}, time {row['time_to_full']:.2f}" if "time_to_full" in row else flops


def _by_method(results: list[dict], cell: Any) -> str:
    """A row for each model and dtype, a column for each method."""
    methods = list(dict.fromkeys(row["method"] for row in results))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for row in results:
        rows.setdefault((row["model"], row["dtype"]), {})[row["method"]] = cell(row)
    lines = [
        [f"{model}, {dtype}", *(cells.get(method, "") for method in methods)] for (model, dtype), cells in rows.items()
    ]
    return markdown_table(["model, batch, dtype", *methods], lines)
