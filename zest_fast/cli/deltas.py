"""`zest-fast merge`, `apply` and `diff`: a delta and its base become a model folder; what differs between two."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.progress import Progress
from rich.table import Column, Table

from zest_fast.cli import show
from zest_fast.cli.app import app
from zest_fast.cli.options import (
    Json,
    TrustRemoteCode,
    check_new_folder,
    check_readable,
    check_writable,
    work,
)
from zest_fast.foundation.nearest import some

if TYPE_CHECKING:
    from zest_fast.integrations.differences import Differences

Base = Annotated[
    str,
    typer.Argument(
        help="The model that the delta was made on: a folder, a hub id or module:function.", show_default=False
    ),
]
DeltaFile = Annotated[Path, typer.Argument(help="What `zest-fast finetune --out` saved.", show_default=False)]
Cast = Annotated[
    bool, typer.Option("--cast", help="The base keeps its dtype, and what was trained in another is rounded to it.")
]


@app.command()
def merge(
    base: Base,
    delta: DeltaFile,
    out: Annotated[
        Path, typer.Argument(help="A new folder; of module:function a .safetensors file.", show_default=False)
    ],
    cast: Cast = False,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Of a weights file, such as 5GB; by default shards stay as they are.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
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
        how = merge_folder(
            base, delta, out, cast=cast, max_shard_size=max_shard_size, trust_remote_code=trust_remote_code
        )
    typer.echo(f"{out}: {how}")


@app.command()
def apply(
    folder: Annotated[Path, typer.Argument(help="The folder of the base; its files are changed.", show_default=False)],
    delta: DeltaFile,
    check: Annotated[bool, typer.Option("--check", help="Only say whether it fits, and what would change.")] = False,
    cast: Cast = False,
) -> None:
    """Put a delta into the weights files of its base, in place: only those that hold what was trained are written."""
    check_readable(delta, "delta")
    with work() as console, console.status("applying"):
        from zest_fast.integrations.merging import apply_to_folder

        changed, rounded = apply_to_folder(str(folder), delta, check=check, cast=cast)
    names = ", ".join(file.name for file in changed)
    note = "" if rounded is None else f"; {rounded}"
    typer.echo(f"{delta} fits {folder}; {'would change' if check else 'changed'}: {names}{note}")


SOURCE_HELP = "A folder of weights, a .safetensors file, or a delta."


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(help=SOURCE_HELP, show_default=False)],
    b: Annotated[Path, typer.Argument(help=SOURCE_HELP, show_default=False)],
    as_json: Json = False,
) -> None:
    """Say which tensors moved between A and B, and by how much; entries are compared by their bits."""
    with work() as console, Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        from zest_fast.integrations.differences import TensorFiles, differences

        task = bar.add_task("comparing")
        with TensorFiles(a) as first, TensorFiles(b) as second:
            if not set(first.names) & set(second.names):
                held = f"the one holds {some(first.names, 2)}, the other {some(second.names, 2)}"
                raise ValueError(f"{a} and {b} share no name: {held}")
            found = differences(
                first, second, progress=lambda done, total: bar.update(task, completed=done, total=total)
            )
    if as_json:
        show.json_document(_document(found))
    else:
        _print(a, b, found)


def _document(found: Differences) -> dict[str, object]:
    return {
        "same": found.same,
        "changed": [vars(one) for one in found.changed],
        "equal": found.equal,
        "only_a": found.only_first,
        "only_b": found.only_second,
        "unlike": found.unlike,
        "delta": found.partial,
    }


def _print(a: Path, b: Path, found: Differences) -> None:
    console = show.results()
    if found.changed:
        table = Table(Column("tensor", overflow="fold"), box=SIMPLE_HEAD)
        for name in ("moved", "of", "largest step", "relative"):
            table.add_column(name, justify="right")
        for one in found.changed:
            share = f"{one.moved / one.count:.1%}"
            table.add_row(show.cell(one.name), share, f"{one.count:,}", f"{one.largest:.3g}", f"{one.relative:.2%}")
        console.print(table)
    lines = [
        f"{len(found.changed)} of {len(found.changed) + len(found.equal)} tensors differ, {len(found.equal)} equal"
    ]
    lines += [f"{name}: {what}" for name, what in found.unlike.items()]
    for names, where in ((found.only_first, a), (found.only_second, b)):
        if names:
            lines.append(f"only in {where}: {some(names)}")
    if found.partial:
        lines.append("a delta holds what was trained alone: what it lacks is as in its base")
    for text in lines:
        show.line(console, text)
