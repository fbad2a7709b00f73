"""`zest-fast push`: a delta, an adapter or a merged model onto the hub, with its card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zest_fast.cli.app import app
from zest_fast.cli.options import check_readable, work


@app.command()
def push(
    path: Annotated[Path, typer.Argument(help="A delta, or a folder: an adapter, a merged model.", show_default=False)],
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="Of the hub.", show_default=False)],
    delta: Annotated[
        Path | None, typer.Option(help="What a folder was made of: its card says what was trained.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base, for the card: an id of the hub.")] = None,
    score: Annotated[
        list[str] | None, typer.Option(help="For the card, such as accuracy=0.875; may be repeated.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="For the card, such as apache-2.0.")] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="By default as your account or organisation makes it.")
    ] = None,
    with_base: Annotated[
        bool, typer.Option("--with-base", help="A folder may hold whole weights, most of which are the base's.")
    ] = False,
) -> None:
    """Upload a delta, an adapter or a merged model, and a card that says what was trained and how it was chosen."""
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise ValueError(f"{repo!r} is no repository of the hub: write USER/NAME")
    scores = dict(map(_score, score or ()))
    if delta is not None:
        check_readable(delta, "--delta")
    with work() as console, console.status("uploading"):
        from zest_fast.integrations.sharing.hub import push as upload

        page = upload(
            path,
            repo,
            delta=delta,
            base=base,
            private=private,
            with_base=with_base,
            scores=scores,
            license=license,
        )
    typer.echo(page)


def _score(text: str) -> tuple[str, float]:
    name, found, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        found = ""
    if not (found and name):
        raise ValueError(f"--score {text!r} is no score; write accuracy=0.875")
    return name, number
