"""`zest-fast rank`: the layers of a saved profile, best first. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zest_fast.cli import show
from zest_fast.cli.app import app
from zest_fast.cli.options import Json, check_readable


@app.command()
def rank(
    profile_file: Annotated[Path, typer.Argument(help="What `zest-fast profile --out` saved.", show_default=False)],
    by: Annotated[
        str | None, typer.Option(help="A metric of the profile; by default the Ranker that ships decides.")
    ] = None,
    ranker: Annotated[
        Path | None, typer.Option(help="A Ranker of your own: what `zest-fast train-ranker` wrote.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many layers to choose.")] = 5,
    as_json: Json = False,
) -> None:
    """Rank the layers of a saved profile, best first."""
    from zest_fast.profiling.layer_profile import LayerProfile
    from zest_fast.ranking.ranking import Scorer
    from zest_fast.ranking.ranking import rank as rank_layers

    if by is not None and ranker is not None:
        raise ValueError("--by and --ranker exclude each other; leave one of them out")
    for what, file in (("profile", profile_file), ("ranker", ranker)):
        if file is not None:
            check_readable(file, what)
    saved = LayerProfile.load(profile_file)
    scorer: str | Scorer | None = by
    if ranker is not None:
        from zest_fast.ranking.ranker import Ranker

        scorer = Ranker.load(ranker)
    ranking = rank_layers(saved, by=scorer)
    chosen = ranking.top(top)
    if as_json:
        document = {"by": ranking.by, "names": ranking.names, "scores": ranking.scores, "top": chosen}
        if ranking.note:
            document |= {"intervals": ranking.intervals, "note": ranking.note}
        show.json_document(document)
    else:
        show.ranking_table(ranking, saved, chosen)
