"""`zest-fast evaluate`: loss and accuracy of a model, or of a base with a delta, on a user's data."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from zest_fast.cli import show
from zest_fast.cli.app import app
from zest_fast.cli.options import (
    BatchSize,
    Data,
    Device,
    ImageSize,
    Json,
    LabelColumn,
    MaxLength,
    Model,
    Seed,
    Task,
    TextColumn,
    check_readable,
    opened_job,
    typed,
    work,
)

_OF_THE_DATA = ("task", "text_column", "label_column", "max_length", "image_size", "batch_size", "seed")


@app.command()
def evaluate(
    ctx: typer.Context,
    model: Model,
    data: Data,
    delta: Annotated[
        Path | None,
        typer.Option(help="What `zest-fast finetune` saved of MODEL; columns and lengths are then its own by default."),
    ] = None,
    held_out: Annotated[
        bool,
        typer.Option("--held-out", help="Only the share that finetune held out of these data; with --delta."),
    ] = False,
    task: Task = None,
    text_column: TextColumn = "text",
    label_column: LabelColumn = None,
    batch_size: BatchSize = 16,
    max_length: MaxLength = None,
    image_size: ImageSize = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Loss and accuracy of a model on data, of a base with a delta in it with --delta."""
    if delta is not None:
        check_readable(delta, "delta")
    if held_out and delta is None:
        raise ValueError("--held-out is the share that a delta's training left out: pass --delta")
    if held_out and "seed" in typed(ctx):
        raise ValueError("--held-out is drawn by the seed of the delta, and --seed names another: leave one out")
    with work(model, data) as console:
        from zest_fast.cli.jobs.training import evaluate as score
        from zest_fast.integrations.datasets import digest_of_data

        more: dict[str, Any] = {"validation_share": 0.0}
        if delta is not None:
            from zest_fast.finetuning.delta_files import read_delta
            from zest_fast.integrations.merging import settings_of

            said = settings_of(read_delta(delta))
            more |= {name: getattr(said, name) for name in _OF_THE_DATA if name not in typed(ctx)} | {"delta": delta}
            known = said.digest is not None and said.digest == digest_of_data(data)
            if held_out and (not known or not said.validation_share):
                raise ValueError(
                    f"--held-out: {delta} was not trained on what {data} holds now, with a share held out"
                    if not known
                    else f"--held-out: the training of {delta} held nothing out"
                )
            more["validation_share"] = said.validation_share if held_out else 0.0
        job = opened_job(ctx, console, **more)
        if job.loaded.fresh:
            raise ValueError(
                f"{model} does not hold a head for these classes ({'; '.join(job.loaded.notes)}): figures of random "
                "weights would mean nothing; name what was trained, or pass --delta"
            )
        show.notes(console, job, typed(ctx))
        if delta is not None and known and not held_out:
            show.note(
                console, f"{delta} was trained on these data, on {1 - said.validation_share:.0%} of them; --held-out"
            )
        loader = job.loaders.validation
        if loader is None:
            loader = job.loaders.train
        elif not held_out:
            show.note(console, f"{data} returns a pair: the second loader is scored")
        with console.status("scoring"):
            found = score(job.model, loader, job.device)
    document = {"model": model, "data": data, "delta": None if delta is None else str(delta), **asdict(found)}
    if as_json:
        show.json_document(document | {"class_names": job.loaded.class_names})
    else:
        typer.echo(show.score_line(asdict(found)))
