"""`zest-fast diff`: which tensors of two folders, files or deltas differ, and by how much."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.progress import Progress
from rich.table import Column, Table

from zest_fast.cli import show
from zest_fast.cli.app import app
from zest_fast.cli.options import Json, work
from zest_fast.foundation.nearest import some

if TYPE_CHECKING:
    from zest_fast.finetuning.differences import Differences

SOURCE_HELP = "A folder of weights, a .safetensors file, or a delta."


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(help=SOURCE_HELP, show_default=False)],
    b: Annotated[Path, typer.Argument(help=SOURCE_HELP, show_default=False)],
    as_json: Json = False,
) -> None:
    """Say which tensors moved between A and B, and by how much; entries are compared by their bits."""
    with work() as console, Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        from zest_fast.finetuning.differences import TensorFiles, differences

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
    for line in lines:
        console.print(show.printable(line), highlight=False, markup=False, soft_wrap=True)
