"""`zest-fast merge` and `zest-fast apply`: a delta and its base become a model folder, a new one or in place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zest_fast.cli.app import app
from zest_fast.cli.options import check_new_folder, check_readable, check_writable, work

Base = Annotated[
    str,
    typer.Argument(
        help="The model that the delta was made on: a folder, a hub id or module:function.", show_default=False
    ),
]
DeltaFile = Annotated[Path, typer.Argument(help="What `zest-fast finetune --out` saved.", show_default=False)]


@app.command()
def merge(
    base: Base,
    delta: DeltaFile,
    out: Annotated[
        Path, typer.Argument(help="A new folder; of module:function a .safetensors file.", show_default=False)
    ],
) -> None:
    """Write the base with the delta in it: a folder that from_pretrained and inference servers load."""
    check_readable(delta, "delta")
    if out.suffix == ".safetensors":
        check_writable(out, set(), "OUT", inputs=[delta])
    else:
        check_new_folder(out, "OUT")
    with work(base) as console, console.status("merging"):
        from zest_fast.integrations.merging import merge_folder
        from zest_fast.integrations.references import is_reference

        if out.suffix == ".safetensors" and not is_reference(base):
            raise ValueError(f"OUT {out} is a file, and of {base!r} a folder is made; name a new folder")
        how = merge_folder(base, delta, out)
    typer.echo(f"{out}: {how}")


@app.command()
def apply(
    folder: Annotated[Path, typer.Argument(help="The folder of the base; its files are changed.", show_default=False)],
    delta: DeltaFile,
    check: Annotated[bool, typer.Option("--check", help="Only say whether it fits, and what would change.")] = False,
) -> None:
    """Put a delta into the weights files of its base, in place: only those that hold what was trained are written."""
    check_readable(delta, "delta")
    with work() as console, console.status("applying"):
        from zest_fast.integrations.merging import apply_to_folder

        changed = apply_to_folder(str(folder), delta, check=check)
    names = ", ".join(file.name for file in changed)
    typer.echo(f"{delta} fits {folder}; {'would change' if check else 'changed'}: {names}")
