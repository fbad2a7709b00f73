"""The commands of `zest-fast`. Results go to stdout, everything else (progress, notes, errors) to stderr."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from zest_fast.cli import show

# IndexError is what torch raises for a label beyond the outputs and a token beyond the vocabulary.
USER_ERRORS = (ValueError, TypeError, KeyError, IndexError, OSError, ImportError, RuntimeError)


class _OneLineErrors(TyperGroup):
    """Turns what a wrong input raises into one line and exit code 2; bugs (other errors) keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except USER_ERRORS as error:
            if ctx.params.get("debug") or isinstance(error, BrokenPipeError):
                raise
            text = error.args[0] if isinstance(error, KeyError) and error.args else error  # str() would quote it
            typer.echo(f"error: {' '.join(str(text).split()) or type(error).__name__}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    name="zest-fast",
    cls=_OneLineErrors,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Which layers of this model are worth fine-tuning? One pass tells; then tune only those.",
)

MODEL_HELP = "A hub id, a model folder, or module:function that returns a torch.nn.Module."
DATA_HELP = (
    "A .jsonl, .csv or .parquet file, a folder with one sub-folder of images per class, "
    "or module:function that returns a DataLoader (or a pair: training, validation)."
)
Model = Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)]
Data = Annotated[str, typer.Argument(help=DATA_HELP, show_default=False)]
Task = Annotated[
    str | None,
    typer.Option(help="text-classification, causal-lm or image-classification; by default model and data tell."),
]
TextColumn = Annotated[str, typer.Option(help="The column of a table that holds the text.")]
LabelColumn = Annotated[
    str | None, typer.Option(help="The column that holds the class ('label' where the model is a classifier).")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples in a batch.")]
MaxLength = Annotated[int | None, typer.Option(min=1, help="Tokens of a text; by default what the model takes.")]
ImageSize = Annotated[
    int | None, typer.Option(min=1, help="Pixels of both sides; by default the model's image processor, or 224.")
]
Seed = Annotated[int, typer.Option(help="Of the shuffle, the split and a fresh head.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"zest-fast {version('zest_fast')}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every command; `debug` is read by _OneLineErrors."""


@app.command()
def profile(
    model: Model,
    data: Data,
    task: Task = None,
    text_column: TextColumn = "text",
    label_column: LabelColumn = None,
    batch_size: BatchSize = 16,
    layers: Annotated[str | None, typer.Option(help="A regular expression that matches whole layer names.")] = None,
    metrics: Annotated[
        str | None,
        typer.Option(help='Names, separated by commas; by default those of one pass, "all" for every one.'),
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, reference, cpu, triton or cuda.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Where to save the profile: .json or .parquet.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Where to draw the heat map: .png, .svg or .pdf.")] = None,
    max_length: MaxLength = None,
    image_size: ImageSize = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure every metric of every layer in one forward and one backward pass over one batch."""
    _check_writable(out, {".json", ".parquet"})
    _check_writable(plot, {".png", ".svg", ".pdf"})
    pattern, chosen = _pattern(layers), None if metrics == "all" else _names(metrics)
    with _work() as console:
        with console.status("loading model and data"):
            from zest_fast.cli.job import open_job

            job = open_job(
                model,
                data,
                task=task,
                label_column=label_column,
                seed=seed,
                device=device,
                text_column=text_column,
                batch_size=batch_size,
                max_length=max_length,
                image_size=image_size,
            )
        show.notes(console, job.loaded)
        with console.status("profiling one batch"):
            import zest_fast

            batch = job.first_batch()
            result = zest_fast.profile(
                job.model, batch, layers=pattern, metrics="all" if metrics == "all" else chosen, backend=backend
            )
        if out is not None:
            result.save(out)
        if plot is not None:
            result.plot(plot)
    if as_json:
        show.json_document(show.profile_document(result))
    else:
        show.profile_table(result, chosen)


@app.command()
def finetune(
    model: Model,
    data: Data,
    task: Task = None,
    text_column: TextColumn = "text",
    label_column: LabelColumn = None,
    by: Annotated[
        str | None, typer.Option(help="The metric that chooses the layers; by default the Ranker that ships does.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many layers to train beside the head.")] = 5,
    layers: Annotated[
        str | None, typer.Option(help="Exact layer names, separated by commas, instead of ranked ones.")
    ] = None,
    head: Annotated[
        str, typer.Option(help="auto (the output layer of a classifier), none, or exact names, separated by commas.")
    ] = "auto",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training data.")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Stop after so many steps; counts before --epochs.")] = None,
    lr: Annotated[float, typer.Option(min=0.0, help="Learning rate of AdamW.")] = 1e-4,
    batch_size: BatchSize = 16,
    validation_share: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Share of the data held out for the scores before and after.")
    ] = 0.1,
    out: Annotated[Path, typer.Option(help="Where to save the trained layers.")] = Path("delta.safetensors"),
    max_length: MaxLength = None,
    image_size: ImageSize = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Profile, rank, train the best layers and the head, and save what changed."""
    _check_writable(out, {".safetensors"})
    with _work() as console:
        with console.status("loading model and data"):
            from zest_fast.cli.job import open_job

            job = open_job(
                model,
                data,
                task=task,
                label_column=label_column,
                seed=seed,
                device=device,
                text_column=text_column,
                batch_size=batch_size,
                validation_share=validation_share,
                max_length=max_length,
                image_size=image_size,
            )
        show.notes(console, job.loaded)
        from zest_fast.cli.finetuning import finetune_job

        document = finetune_job(
            job,
            layers=_names(layers),
            head=head,
            by=by,
            top=top,
            epochs=epochs,
            steps=steps,
            lr=lr,
            out=out,
            console=console,
        )
    if as_json:
        show.json_document(document)
    else:
        show.finetuning_table(document)


@app.command()
def demo(
    task: Annotated[str, typer.Option(help="lite0 (images), minilm or smollm2 (text).")] = "lite0",
    out: Annotated[Path, typer.Option(help="Folder for the heat map, the curves and the JSON.")] = Path("zest-demo"),
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Run the whole job on real packaged weights and data, beside head only, random layers and all layers."""
    results = show.results()
    with _work() as console:
        from zest_fast.demo import run_demo

        document = run_demo(task, out, seed=seed, console=console if as_json else results)
    if as_json:
        show.json_document(document)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say which kernels and extras are on, which are off, and why."""
    from zest_fast.cli.doctor import examine

    found = examine()
    if as_json:
        show.json_document(found)
    else:
        show.doctor_table(found)


@contextlib.contextmanager
def _work() -> Iterator[Console]:
    """A console on stderr. What a user's module prints meanwhile goes there, too: stdout is for the result."""
    with contextlib.redirect_stdout(sys.stderr):
        yield Console(stderr=True)


def _check_writable(path: Path | None, endings: set[str]) -> None:
    """Fails before the work rather than after it."""
    if path is None:
        return
    from zest_fast.integrations.references import nearest_path
    from zest_fast.profiling.nearest import nearest

    if path.suffix not in endings:
        raise ValueError(f"{path}: the ending {path.suffix!r} is unknown here; {nearest(path.suffix, endings)}")
    if not path.parent.is_dir():
        raise ValueError(f"the folder of {path} does not exist; {nearest_path(path.parent)}")


def _names(joined: str | None) -> list[str] | None:
    return None if joined is None else [name.strip() for name in joined.split(",") if name.strip()]


def _pattern(text: str | None) -> re.Pattern[str] | None:
    try:
        return None if text is None else re.compile(text)
    except re.error as error:
        raise ValueError(f"--layers {text!r} is no regular expression: {error}") from error
