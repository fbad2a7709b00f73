"""`zest-fast evaluate`: loss and accuracy of a model, or of a base with a delta, on a user's data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from zest_fast.cli import show
from zest_fast.cli.app import app
from zest_fast.cli.checks import check_options
from zest_fast.cli.options import (
    BatchSize,
    ChatTemplate,
    Config,
    Data,
    Device,
    Dtype,
    ImageSize,
    Json,
    LabelColumn,
    MaxLength,
    Model,
    Seed,
    Split,
    Task,
    TextColumn,
    TrustRemoteCode,
    check_readable,
    opened_job,
    option,
    typed,
    work,
)

_OF_THE_DATA = (
    "task",
    "text_column",
    "label_column",
    "chat_template",
    "max_length",
    "image_size",
    "batch_size",
    "seed",
)
_OF_ITS_PARTS = ("split", "config")


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
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    chat_template: ChatTemplate = None,
    split: Split = None,
    config: Config = None,
    batch_size: BatchSize = 16,
    max_length: MaxLength = None,
    image_size: ImageSize = None,
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Loss and the figures of the task of a model on data, of a base with a delta in it with --delta.

    Accuracy of classes and tokens, MSE and correlations of numbers, F1 of several labels a row and of tags.
    """
    check_options(ctx.params)
    if delta is not None:
        check_readable(delta, "delta")
    if delta is not None and dtype is not None:
        raise ValueError(
            "--dtype is about a model as it is saved, and --delta says in which its base was: leave one out"
        )
    if held_out and delta is None:
        raise ValueError("--held-out is the share that a delta's training left out: pass --delta")
    if held_out and "seed" in typed(ctx):
        raise ValueError("--held-out is drawn by the seed of the delta, and --seed names another: leave one out")
    with work(model, data) as console:
        from zest_fast.cli.jobs.scores import evaluate as score
        from zest_fast.integrations.data.sources import digest_of_data

        more: dict[str, Any] = {"validation_share": 0.0}
        if delta is not None:
            from zest_fast.finetuning.delta_files import read_delta
            from zest_fast.integrations.merging import settings_of

            said = settings_of(read_delta(delta))
            more |= {name: getattr(said, name) for name in _OF_THE_DATA if name not in typed(ctx)} | {"delta": delta}
            parts = {name: getattr(said, name) for name in _OF_ITS_PARTS if name not in typed(ctx)}
            digest = digest_of_data(data, **({"split": split, "config": config} | parts))
            known = said.digest is not None and said.digest == digest
            if held_out and not known:
                raise ValueError(f"--held-out: {delta} was not trained on what {data} holds now, with a share held out")
            if known:
                more |= parts
            more["validation_share"] = said.validation_share if held_out else 0.0
        job = opened_job(ctx, console, **more)
        if job.loaded.fresh:
            raise ValueError(
                f"{model} does not hold a head for these classes ({'; '.join(job.loaded.notes)}): figures of random "
                "weights would mean nothing; name what was trained, or pass --delta"
            )
        cut_otherwise = sorted(typed(ctx) & {"max_length", "chat_template"})
        if held_out and cut_otherwise and job.form is not None and job.form.kind != "texts":
            raise ValueError(
                f"--held-out: the share was drawn from the samples that were left as {delta} cut them, and "
                f"{option(cut_otherwise[0])} may leave others: leave it out"
            )
        if held_out and job.loaders.validation is None:
            raise ValueError(f"--held-out: the training of {delta} held nothing out")
        show.notes(console, job, typed(ctx))
        if delta is not None and known and not held_out and not job.own_validation:
            show.note(
                console, f"{delta} was trained on these data, on {1 - said.validation_share:.0%} of them; --held-out"
            )
        loader = job.loaders.validation
        if loader is None:
            loader = job.loaders.train
        elif not held_out and not job.own_validation:
            show.note(console, f"{data} returns a pair: the second loader is scored")
        with console.status("scoring"):
            names: dict[str, Any] = {"task": job.loaded.task, "class_names": job.loaded.class_names}
            found = score(job.model, loader, job.device, **names).plain()
    document = {"model": model, "data": data, "delta": None if delta is None else str(delta), **found}
    if as_json:
        show.json_document(document | {"class_names": job.loaded.class_names})
    else:
        typer.echo(show.score_line(found))
