"""The table that docs/results.md shows of bench/results/lean.json."""

from __future__ import annotations

from zest_fast.foundation.text_table import markdown_table

MIB = 2**20

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
