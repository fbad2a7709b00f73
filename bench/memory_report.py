"""The tables that docs/results.md shows of bench/results/memory_table.json, lean.json and llama7b.json."""

from __future__ import annotations

from typing import Any

from bench.markdown import markdown_table

MIB, GIB = 2**20, 2**30
NEAR = 0.02  # of the counted bytes

MEMORY_LEGEND = (
    "Peak GiB of a training step with AdamW (no foreach), by dry run: tensors, without CUDA's context. *zest@5*: five "
    "layers, evenly spread from the middle block up. *int8*, *nf4*: what is frozen is quantised. *lora*, *qlora*: on "
    "every linear layer, with adapters in float32 as PEFT makes them; the base of *qlora* in nf4. "
    "*above-cut*: the blocks above the cut are checkpointed; *checkpointed*: every block is."
)
TIME_LEGEND = "Relative to full fine-tuning: FLOPs of the step, and where the step fits this CPU its measured time."
LLAMA_LEGEND = (
    "Peak of resident memory (VmHWM: Python, torch and scratch of the kernels included) with random bfloat16 weights, "
    "batch 1; *planned*: tensors alone. A step: forward, backward and fused AdamW on five layers that `rank(profile)` "
    "chose from the profile of 128 tokens. Packing starts from the plain weights, 13 GiB resident, which the peaks of "
    "*int8* and *nf4* leave out. The machine was shared, so the times are rough. Seconds are those of the faster of "
    "two runs, also relative to the fastest forward + dX pass of the plain model with all weights frozen."
)
LEAN_LEGEND = (
    "Counted in real steps: five layers and the head train, the lowest at half the depth or (*whole depth*) the first "
    "of the model, with AdamW; against full fine-tuning in the same rounds. *Peak* is beyond weights and batch, *kept* "
    "is what autograd saves."
)

_LEAN_ARMS = {
    "cut": "plain",
    "lean": "lean",
    "bottom_cut": "plain, whole depth",
    "bottom_lean": "lean, whole depth",
}


def lean_text(document: dict) -> str:
    """Memory and time of a step of convolutional networks, plain and lean."""
    rows = []
    for row in document["results"]:
        for arm, words in _LEAN_ARMS.items() if "peak_bytes" in row else ():
            kept, peak = (f"{row[f'{what}_bytes'][arm] / MIB:.0f}" for what in ("kept", "peak"))
            time = row["time_to_full"][arm]
            share = f"{time['median']:.2f} ({time['low']:.2f} to {time['high']:.2f})"
            rows.append(
                [f"{row['model']} {row['shape']}, {words}", kept, peak, f"{row['peak_to_full'][arm]:.2f}", share]
            )
    head = ["model, batch, saving", "kept, MiB", "peak, MiB", "x full", "CPU time, x full"]
    return f"{markdown_table(head, rows)}\n\n{LEAN_LEGEND}"


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
