"""`zest-fast train-ranker`: fit a Ranker to the records of sweeps, the user's and the shipped ones. Needs no torch."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zest_fast.cli import show
from zest_fast.cli.app import app
from zest_fast.cli.options import Json, check_writable, work

if TYPE_CHECKING:
    import pandas

RECORDS_HELP = "What `zest-fast sweep` wrote (.jsonl), or consolidated records (.parquet); none = the shipped ones."


@app.command("train-ranker")
def train_ranker(
    records: Annotated[list[Path] | None, typer.Argument(help=RECORDS_HELP, show_default=False)] = None,
    out: Annotated[Path, typer.Option(help="Where to save the Ranker: .json.")] = Path("ranker.json"),
    shipped: Annotated[
        bool, typer.Option(help="Learn from the records that ship with the library, too; the same pair is replaced.")
    ] = True,
    folds: Annotated[
        int, typer.Option(min=0, help="Of the cross-validation, by families of data sets; 0 leaves it out.")
    ] = 5,
    seed: Annotated[int, typer.Option(help="Of the trees.")] = 0,
    as_json: Json = False,
) -> None:
    """Fit a Ranker to your records beside the shipped ones, and say what it is worth on data it has not seen."""
    check_writable(out, {".json"}, inputs=records or [])
    with work() as console, console.status("reading records") as status:
        from zest_fast.ranking.learning.cross_validation import cross_validate
        from zest_fast.ranking.ranker import Ranker

        frame, sweeps = read_sources(records or [], shipped=shipped)
        validation = None
        if folds:
            validation = cross_validate(frame, folds=folds, sweeps=sweeps, seed=seed, progress=status.update)
        status.update("fitting all records")
        ranker = Ranker(seed=seed).fit(frame, sweeps=sweeps)
        ranker.save(out)
    if as_json:
        rows = None if validation is None else validation.to_dict("records")
        show.json_document({"ranker": str(out), "metadata": ranker.metadata, "cross_validation": rows})
        return
    if validation is not None:
        show.cross_validation_table(validation, "Kendall's tau on held-out families of data sets")
    show.results().print(f"{ranker!r}, saved as {out}", highlight=False, markup=False)


def read_sources(paths: Sequence[Path], *, shipped: bool) -> tuple[pandas.DataFrame, list[dict[str, Any]]]:
    """Records and metadata of every source. A pair of the user's replaces the shipped one of the same name.

    Raises ValueError where there is no source, two of the user's files hold the same pair, or a file cannot be read.
    """
    import pandas

    from zest_fast.integrations.references import nearest_path
    from zest_fast.sweeping.tables import SHIPPED

    if not paths and not shipped:
        raise ValueError("--no-shipped leaves nothing to learn from; name files of records")
    sources: dict[tuple[str, str], Path] = {}
    frames, sweeps = [], []
    for path in (*paths, *([SHIPPED] if shipped else [])):
        if path.is_dir():
            raise ValueError(f"records {str(path)!r} are a folder; name its files")
        if not path.is_file():
            raise ValueError(f"records {str(path)!r} do not exist; {nearest_path(path)}")
        frame, found = _read(path)
        pairs = {(sweep["model"], sweep["dataset"]) for sweep in found}
        twice = sorted(pairs & set(sources))
        if twice and path != SHIPPED:
            model, dataset = twice[0]
            raise ValueError(f"{str(sources[twice[0]])!r} and {str(path)!r} both hold records of {model} on {dataset}")
        new = pairs - set(sources)
        sources |= dict.fromkeys(new, path)
        keys = pandas.MultiIndex.from_frame(frame[["model", "dataset"]])
        frames.append(frame[keys.isin(list(new))])
        sweeps += [sweep for sweep in found if (sweep["model"], sweep["dataset"]) in new]
    return pandas.concat(frames, ignore_index=True), sweeps


def _read(path: Path) -> tuple[pandas.DataFrame, list[dict[str, Any]]]:
    """A file of one sweep becomes a table first, as `consolidate` makes it: finished, or refused."""
    from zest_fast.sweeping.tables import consolidate, load_records, sweeps_of

    if path.suffix == ".parquet":
        return load_records(path), sweeps_of(path)
    with tempfile.TemporaryDirectory() as folder:
        try:
            table = consolidate([path], Path(folder) / "records.parquet")
        except ValueError as error:
            raise ValueError(f"{str(path)!r}: {error}") from error
        return load_records(table), sweeps_of(table)
