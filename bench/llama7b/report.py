"""The table that docs/results.md shows of bench/results/llama7b.json."""

from __future__ import annotations

from zest_fast.foundation.text_table import markdown_table

LLAMA_LEGEND = (
    "Peak of resident memory (VmHWM: Python, torch and scratch of the kernels included) with random bfloat16 weights, "
    "batch 1; *planned*: tensors alone. A step: forward, backward and fused AdamW on five layers that `rank(profile)` "
    "chose from the profile of 128 tokens. Packing starts from the plain weights, 13 GiB resident, which the peaks of "
    "*int8* and *nf4* leave out. The machine was shared, so the times are rough. Seconds are those of the faster of "
    "two runs, also relative to the fastest forward + dX pass of the plain model with all weights frozen."
)


def llama7b_text(document: dict) -> str:
    """A row for each case."""
    passes: dict[int, float] = {}  # of the plain model: the same in every case of so many tokens
    for row in document["results"]:
        passes[row["tokens"]] = min(*row["forward_dx_seconds"], passes.get(row["tokens"], float("inf")))
    lines = []
    for row in document["results"]:
        name = (
            "profile" if row["kind"] == "profile" else "ZEST@5 step" + (f", {row['frozen']}" if row["frozen"] else "")
        )
        seconds = min(row["seconds"])
        lines.append(
            [
                f"{name}, {row['tokens']} tokens",
                f"{row['weights_gib']:.2f}",
                f"{row['planned_gib']:.2f}",
                f"{row['peak_gib']:.2f}",
                f"{row['goal_gib']}" if row["goal_gib"] else "",
                f"{seconds:.1f}",
                f"{seconds / passes[row['tokens']]:.2f}",
            ]
        )
    head = ["LLaMA-7B", "weights, GiB", "planned, GiB", "resident, GiB", "goal", "s", "x forward + dX"]
    return f"{markdown_table(head, lines)}\n\n{LLAMA_LEGEND}"
