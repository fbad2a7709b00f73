"""`zest-fast sweep`: what every layer of the user's model is worth on the user's data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zest_fast.cli import show
from zest_fast.cli.app import app
from zest_fast.cli.checks import check_options
from zest_fast.cli.options import (
    Config,
    Data,
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
    check_writable,
    compiled,
    opened_job,
    typed,
    work,
)

if TYPE_CHECKING:
    from torch import Tensor

    from zest_fast.prefix.inputs import Inputs
    from zest_fast.sweeping.recipe import Recipe

EVERYTHING = 1 << 30  # samples in a batch: texts of one batch are padded alike


@app.command("sweep")
def sweep_command(
    ctx: typer.Context,
    model: Model,
    data: Data,
    task: Task = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    split: Split = None,
    config: Config = None,
    layers: Annotated[str | None, typer.Option(help="A regular expression that matches whole layer names.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps of each layer.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Samples in a training step.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How often each layer is trained.")] = None,
    layer_lr_factor: Annotated[
        float | None, typer.Option(min=0.0, help="A layer's learning rate as a multiple of the RMS of its weight.")
    ] = None,
    head_lr: Annotated[float | None, typer.Option(min=0.0, help="The learning rate of the head.")] = None,
    head_share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the data that warms the head.")] = 0.2,
    score_share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the data that scores.")] = 0.4,
    out: Annotated[Path, typer.Option(help="The record file; a sweep that was interrupted goes on from it.")] = Path(
        "sweep.jsonl"
    ),
    workers: Annotated[
        str,
        typer.Option(help="How many processes; 'ray', or the address of a Ray cluster; or 'slurm:8', so many jobs."),
    ] = "1",
    slurm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="For slurm:N: folder (shared by all machines), timeout_min, partition ... as submitit names them.",
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many layers to show.")] = 10,
    max_length: MaxLength = None,
    image_size: ImageSize = None,
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Fine-tune every layer alone with the head, score it, and show the best. Takes long; run again, it goes on."""
    check_options(ctx.params)
    check_writable(out, {".jsonl"}, inputs=[data])
    chosen = compiled(layers)
    options = _slurm_options(slurm) if slurm else None
    changes: dict[str, Any] = {
        "steps": steps, "batch_size": batch_size, "layer_lr_factor": layer_lr_factor, "head_lr": head_lr,
        "seeds": None if seeds is None else tuple(range(seeds)),
    }  # fmt: skip
    with work(model, data) as console:
        from zest_fast.sweeping.recipe import Recipe
        from zest_fast.sweeping.sweep import sweep

        recipe = Recipe(**{name: value for name, value in changes.items() if value is not None})
        job = opened_job(ctx, console, device="cpu", batch_size=EVERYTHING)
        if job.loaded.task not in (None, "text-classification", "image-classification"):
            raise ValueError(f"a sweep scores classes by accuracy, and these data are for {job.loaded.task}")
        inputs, targets = _all_samples(job.loaders.train)
        splits = _splits(inputs, targets, head_share, score_share)
        show.notes(console, job, typed(ctx) - {"batch_size"})  # that is the recipe's here
        try:
            frame = sweep(
                job.model,
                splits,
                layers=chosen,
                recipe=recipe,
                out=out,
                model_name=_name(model),
                dataset_name=_name(data),
                workers=int(workers) if workers.lstrip("-").isdecimal() else workers,
                slurm=options,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{out} holds what was done; the same command goes on from there") from None
    document = _document(frame, recipe, out, top)
    if as_json:
        show.json_document(document)
    else:
        show.sweep_table(document)


def _slurm_options(words: list[str]) -> dict[str, Any]:
    """Numbers and true/false where a value reads as one and would be written the same; an account 0123 is a text."""
    options: dict[str, Any] = {}
    for word in words:
        key, sign, text = word.partition("=")
        if not (key and sign and text):
            raise ValueError(f"--slurm {word}: expected key=value, such as timeout_min=60")
        if key in options:
            raise ValueError(f"--slurm {word}: {key} is given twice")
        options[key] = text if key == "folder" else _value(text)
    return options


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            if str(kind(text)) == text:
                return kind(text)
        except ValueError:
            pass
    return text


def _all_samples(loader: Any) -> tuple[Inputs, Tensor]:
    """Inputs and class numbers of every batch together."""
    import torch

    batches = [_inputs_and_targets(batch) for batch in loader]
    if not batches:
        raise ValueError("the data yields no batch")
    first = batches[0][0]
    try:
        targets = torch.cat([targets for _, targets in batches])
        if isinstance(first, torch.Tensor):
            return torch.cat([inputs for inputs, _ in batches]), targets
        return {name: torch.cat([inputs[name] for inputs, _ in batches]) for name in first}, targets
    except (RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"the batches of the data cannot be joined ({error}); pad all samples alike") from error


def _inputs_and_targets(batch: Any) -> tuple[Any, Tensor]:
    if isinstance(batch, dict) and "labels" in batch:
        return {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return batch[0], batch[1]
    raise ValueError("a batch is neither a mapping with 'labels' nor a pair (inputs, targets); a sweep needs one")


def _splits(inputs: Inputs, targets: Tensor, head_share: float, score_share: float) -> dict[str, tuple[Inputs, Tensor]]:
    """The samples come shuffled by the seed: the first ones warm the head, the last ones score."""
    import torch

    from zest_fast.prefix.inputs import rows_of

    head, score = round(head_share * len(targets)), round(score_share * len(targets))
    train = len(targets) - head - score
    if min(head, train, score) < 1:
        raise ValueError(
            f"--head-share {head_share:g} and --score-share {score_share:g} leave {train} of {len(targets)} samples to "
            f"train on, {head} for the head and {score} to score; each needs some"
        )
    parts = torch.arange(len(targets)).split([head, train, score])
    return {
        name: (rows_of(inputs, rows), targets[rows])
        for name, rows in zip(("head", "train", "score"), parts, strict=True)
    }


def _name(source: str) -> str:
    """A hub id or a reference as it is; of a path its last part: records travel, folders do not."""
    return Path(source).name if Path(source).exists() else source


def _document(frame: Any, recipe: Recipe, out: Path, top: int) -> dict[str, Any]:
    """The best layers by their mean gain over the head alone, with the spread over seeds."""
    rows = frame[frame.head_state == "warm"]
    gains = (rows.head_loss - rows.loss).groupby(rows.layer)
    spread, accuracy = gains.std(ddof=1), rows.groupby("layer").accuracy.mean()
    best = gains.mean().sort_values(ascending=False).head(top)
    return {
        "records": str(out),
        "recipe": recipe.to_dict(),
        "layers": int(rows.layer.nunique()),
        "head": {"loss": float(rows.head_loss.mean()), "accuracy": float(rows.head_accuracy.mean())},
        "best": [
            {"layer": name, "gain": gain, "deviation": spread[name], "accuracy": accuracy[name]}
            for name, gain in best.items()
        ],
    }
