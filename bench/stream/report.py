"""The tables that docs/results.md shows of stream.json, stream_compared.json and stream_pair.json."""

from __future__ import annotations

from zest_fast.foundation.text_table import markdown_table

STREAM_LEGEND = (
    "A step of a LLaMA with random weights, five layers from half of the depth up, batch 1: forward, backward and "
    "fused AdamW inside of backward. *Resident*: peak of the whole process (VmHWM), with Python, torch, scratch of the "
    "kernels, and mapped pages for as long as they are resident; the page cache, which the system takes back, is not "
    "in it. *Planned*: tensors alone, by `zest_fast.plan(stream=True)`. *Read*: from the disk in that step; 0 where "
    "the page cache held the files. *As in memory*: gradients equal, bit for bit, those of the same blocks with all "
    "weights in memory. The 70B took one step, in which AdamW's states arise: the plan counts them from the start. "
    "Seconds of one thread on a shared machine, other jobs beside it: rough."
)
COMPARED_LEGEND = (
    "Steps interleaved in one process, files warm in the page cache, medians with the interval; peaks are those of a "
    "process for each arm. *Plain freezing*: `requires_grad_(False)` and nothing else. *accelerate, disk*: "
    "`dispatch_model` with the frozen blocks on disk. *Cached*: a step that reads its activations at the cut."
)


def stream_text(document: dict) -> str:
    """A row for each case."""
    rows = []
    for row in document["results"]:
        name = f"{row['model']}, {row['frozen'] or 'bfloat16'}, {row['tokens']} tokens"
        check = row.get("check", {})
        rows.append(
            [
                name + (", checkpointed" if row["checkpoint"] else ""),
                f"{row['files_gib']:.1f}",
                f"{row['planned_gib']:.2f}" if "planned_gib" in row else "",
                f"**{row['peak_gib']:.2f}**",
                f"{row['largest_anonymous_gib']:.2f}",
                f"{min(row['seconds']):.0f}",
                f"{row['read_gib'][row['seconds'].index(min(row['seconds']))]:.1f}",
                {True: "yes", False: "no"}.get(check.get("equal_to_resident"), ""),
            ]
        )
    head = [
        "a step of",
        "files, GiB",
        "planned, GiB",
        "resident, GiB",
        "of it anonymous",
        "s",
        "read, GiB",
        "as in memory",
    ]
    return f"{markdown_table(head, rows)}\n\n{STREAM_LEGEND}"


def compared_text(document: dict) -> str:
    """A row for each arm."""
    rows = []
    for row in document["results"]:
        to = row["to_resident"]
        times = f"{to['median']:.2f} ({to['low']:.2f} to {to['high']:.2f})"
        rows.append([row["arm"], f"{row['seconds']['median']:.2f}", times, f"{row['peak_gib']:.2f}"])
    table = markdown_table(["LLaMA, 1.1 B, bfloat16", "s", "x resident", "peak of the process, GiB"], rows)
    return f"{table}\n\n{COMPARED_LEGEND}"


def pair_text(document: dict) -> str:
    """A row for each choice of layers and arm."""
    rows = []
    for row in document["results"]:
        times = [row["to_resident"], row["to_full"]]
        rows.append(
            [
                f"{row['choice']}, {row['arm']}",
                *(f"{to['median']:.2f} ({to['low']:.2f} to {to['high']:.2f})" for to in times),
                f"{100 * row['accuracy']:.2f}",
                f"{row['loss']:.6f}",
                "yes" if row["equal_to_resident"] else "no",
            ]
        )
    head = ["five layers", "a step, x resident", "x full", "accuracy, %", "loss", "weights as resident, to the bit"]
    settings = document["settings"]
    legend = (
        f"{settings['pair']}: the same {settings['samples']} samples over {settings['epochs']} epochs from the same "
        "seed, then steps interleaved, of one thread; *cached*: a step that reads its activations at the cut."
    )
    return f"{markdown_table(head, rows)}\n\n{legend}"
