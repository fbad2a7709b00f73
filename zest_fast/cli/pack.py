"""`zest-fast pack`: the frozen weights of a folder in int8 or nf4, for zest_fast.open_streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from zest_fast.cli.app import app
from zest_fast.cli.options import work
from zest_fast.foundation.options import Frozen


@app.command()
def pack(
    folder: Annotated[
        Path, typer.Argument(help="What save_pretrained wrote: config.json and safetensors.", show_default=False)
    ],
    frozen: Annotated[
        str, typer.Option(help="int8 or nf4: how Linear layers but the head are kept.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="A new folder for the packed weights.", show_default=False)],
) -> None:
    """Pack the weights of a folder once, so that a model streamed from disk reads half or a quarter of them."""
    with work() as console, console.status("packing"):
        from zest_fast.streaming.packing import pack as pack_folder

        pack_folder(folder, out, frozen=cast(Frozen, frozen))
    size = sum(file.stat().st_size for file in out.iterdir())
    typer.echo(f"{out}: {size / 2**20:,.1f} MiB; layers that train are read from {folder}, which has to stay")
