"""What several commands share: their options, and how they read them."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

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


@contextlib.contextmanager
def work() -> Iterator[Console]:
    """A console on stderr. What a user's module prints meanwhile goes there, too: stdout is for the result."""
    with contextlib.redirect_stdout(sys.stderr):
        yield Console(stderr=True)


def check_writable(path: Path | None, endings: set[str]) -> None:
    """Fails before the work rather than after it."""
    if path is None:
        return
    from zest_fast.integrations.references import nearest_path
    from zest_fast.profiling.nearest import nearest

    if path.suffix not in endings:
        raise ValueError(f"{path}: the ending {path.suffix!r} is unknown here; {nearest(path.suffix, endings)}")
    if not path.parent.is_dir():
        raise ValueError(f"the folder of {path} does not exist; {nearest_path(path.parent)}")


def split_names(joined: str | None) -> list[str] | None:
    return None if joined is None else [name.strip() for name in joined.split(",") if name.strip()]


def compiled(text: str | None) -> re.Pattern[str] | None:
    try:
        return None if text is None else re.compile(text)
    except re.error as error:
        raise ValueError(f"--layers {text!r} is no regular expression: {error}") from error
