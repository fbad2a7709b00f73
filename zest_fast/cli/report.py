"""`zest-fast report`: what a run has left, as one page that needs nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zest_fast.cli import show
from zest_fast.cli.app import app
from zest_fast.cli.options import check_writable, work


@app.command()
def report(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="A folder, or single files: profile, ranking, delta, run, log of a watched run, and what finetune and "
            "plan print with --json.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page.")] = Path("report.html"),
) -> None:
    """Write one page: ranking with intervals and reasons, heat map, memory, learning curve, watched run."""
    from zest_fast.integrations.references import nearest_path

    check_writable(out, {".html"}, inputs=files)
    for path in files:
        if not path.exists():
            raise ValueError(f"{str(path)!r} does not exist; {nearest_path(path)}")
    with work() as console, console.status("reading"):
        from zest_fast.cli.reporting.contents import contents_of
        from zest_fast.cli.reporting.page import page
        from zest_fast.cli.reporting.sources import WHAT, read_sources
        from zest_fast.foundation.replacing import replacing

        sources = read_sources(files)
        text = page(sources, contents_of(sources))
        with replacing(out) as temporary:
            temporary.write_text(text, encoding="utf-8")
        for warning in sources.warnings:
            show.note(console, warning)
    missing = [
        what for kind, what in WHAT.items() if kind in ("profile", "delta", "watch") and kind not in sources.paths
    ]
    typer.echo(f"{out}: {', '.join(sources.paths)}" + (f"; without {', '.join(missing)}" if missing else ""))
