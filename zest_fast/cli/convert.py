"""`zest-fast convert`: a delta as a LoRA adapter, or into a GGUF."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from zest_fast.cli import show
from zest_fast.cli.app import app
from zest_fast.cli.deltas import Base, DeltaFile
from zest_fast.cli.options import Json, check_new_folder, check_readable, check_writable, work
from zest_fast.foundation.nearest import nearest

if TYPE_CHECKING:
    from zest_fast.integrations.sharing.gguf_files import GgufPatch
    from zest_fast.integrations.sharing.lora import LoraExport

FORMS = ("lora", "gguf", "gguf-lora")


@app.command()
def convert(
    base: Base,
    delta: DeltaFile,
    to: Annotated[
        str,
        typer.Option(
            help="lora (a folder for PEFT), gguf (into a GGUF of the base) or gguf-lora (an adapter for llama.cpp).",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="A new folder (lora), or a file.", show_default=False)],
    rank: Annotated[int | None, typer.Option(min=1, help="Of the adapters, at most.")] = None,
    error: Annotated[
        float | None,
        typer.Option(help="The relative Frobenius error of what a layer learned, at most; the rank follows from it."),
    ] = None,
    gguf: Annotated[
        Path | None, typer.Option(help="With --to gguf: what llama.cpp's converter made of the base.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a delta as an adapter of low rank at a stated error, or put it into a GGUF of its base."""
    if to not in FORMS:
        raise ValueError(f"--to {to!r} is unknown; {nearest(to, FORMS)}")
    if to == "gguf" and gguf is None:
        raise ValueError("--to gguf needs --gguf: the file that llama.cpp's convert_hf_to_gguf made of the base")
    if to == "gguf" and (rank is not None or error is not None):
        raise ValueError("--rank and --error are about adapters, and --to gguf writes whole tensors: leave them out")
    if to != "gguf" and gguf is not None:
        raise ValueError(f"--gguf is the file that --to gguf patches, and --to {to} needs none: leave it out")
    check_readable(delta, "delta")
    if to == "lora":
        check_new_folder(out, "--out")
    else:
        check_writable(out, {".gguf"}, inputs=[delta, gguf])
    with work(base) as console, console.status("converting"):
        from zest_fast.integrations.sharing.gguf_files import delta_to_gguf, delta_to_gguf_lora
        from zest_fast.integrations.sharing.lora import delta_to_lora

        if gguf is not None:
            check_readable(gguf, "GGUF")
            done: GgufPatch | LoraExport = delta_to_gguf(delta, base, gguf, out)
        else:
            done = (delta_to_lora if to == "lora" else delta_to_gguf_lora)(delta, base, out, rank=rank, error=error)
    if as_json:
        show.json_document({**asdict(done), "path": str(done.path)})
        return
    if to != "gguf":
        _print_layers(cast("LoraExport", done))
    show.line(show.results(), str(done))


def _print_layers(export: LoraExport) -> None:
    table = Table(Column("layer", overflow="fold"), box=SIMPLE_HEAD)
    for title in ("rank", "of", "relative error"):
        table.add_column(title, justify="right")
    for one in export.layers:
        table.add_row(show.cell(one.name), str(one.rank), str(one.full_rank), f"{one.error:.3g}")
    show.results().print(table)
