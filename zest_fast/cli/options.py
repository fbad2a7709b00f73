"""What several commands share: their options, and how they read them."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from zest_fast.cli.jobs.job import Job

MODEL_HELP = "A hub id, a model folder, or module:function that returns a torch.nn.Module."
DATA_HELP = (
    "A .jsonl, .csv or .parquet file, a folder with one sub-folder of images per class, a folder of both parts (train "
    "and validation), a set of the library datasets (saved, or owner/name on the hub), or module:function that returns "
    "a DataLoader (or a pair: training, validation)."
)
Model = Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)]
Data = Annotated[str, typer.Argument(help=DATA_HELP, show_default=False)]
Task = Annotated[
    str | None,
    typer.Option(
        help="text-classification, regression, multi-label, token-classification, causal-lm, seq2seq-lm or "
        "image-classification; by default model and data tell."
    ),
]
TextColumn = Annotated[
    str | None,
    typer.Option(
        help="The column of a table that holds the text, or several: a pair, prompt,completion, source,target; by "
        "default the usual names (text, messages, prompt ...)."
    ),
]
LabelColumn = Annotated[
    str | None,
    typer.Option(
        help="The column of the class, number, labels or tags, or several columns of 0 and 1; by default 'label'."
    ),
]


def _template_in(path: str | None) -> str | None:
    """What the file holds: runs and deltas keep the template itself."""
    if path is None:
        return None
    check_readable(Path(path), "chat template")
    return Path(path).read_text(encoding="utf-8")


ChatTemplate = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", callback=_template_in, help="How messages become one text (Jinja), for the tokenizer's own."
    ),
]
Split = Annotated[
    str | None, typer.Option(help="Of data in parts: the one that trains, or that and the one that scores: train,test.")
]
Config = Annotated[str | None, typer.Option(help="Of a set on the hub: which of its configurations.")]
Dtype = Annotated[
    str | None, typer.Option(help="Of the weights: float32, bfloat16 or float16; by default as they are.")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Import and run code that comes with the model, which can do all that you can."
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples in a batch.")]
MaxLength = Annotated[int | None, typer.Option(min=1, help="Tokens of a text; by default what the model takes.")]
ImageSize = Annotated[
    int | None, typer.Option(min=1, help="Pixels of both sides; by default as the model says, or 224.")
]
Seed = Annotated[int, typer.Option(min=-(2**63), max=2**63 - 1, help="Of the shuffle, the split and a fresh head.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")]


@contextlib.contextmanager
def work(*sources: str) -> Iterator[Console]:
    """A console on stderr. What a user's module prints meanwhile goes there, too: stdout is for the result.

    sources: model and data. Where one is a `module:function`, what lies in the current folder can be imported, after
    all that is installed.
    """
    from zest_fast.integrations.references import current_folder_last, is_reference

    here = current_folder_last() if any(map(is_reference, sources)) else contextlib.nullcontext()
    with here, contextlib.redirect_stdout(sys.stderr):
        yield Console(stderr=True)


def check_readable(path: Path, what: str) -> None:
    """ValueError with the nearest name where there is no such file."""
    from zest_fast.integrations.references import nearest_path

    if path.is_dir():
        raise ValueError(f"{what} {str(path)!r} is a folder; name a file")
    if not path.is_file():
        raise ValueError(f"{what} {str(path)!r} does not exist; {nearest_path(path)}")


def check_writable(
    path: Path | None, endings: set[str], option: str = "--out", inputs: Iterable[str | Path | None] = ()
) -> None:
    """Fails before the work rather than after it: a file of this name is really made beside `path`, and removed.

    endings: the ones known here; none = any. inputs: what the command reads, which it must not replace.
    """
    if path is None:
        return
    from zest_fast.foundation.nearest import nearest
    from zest_fast.integrations.references import nearest_path

    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder; name a file in it")
    if endings and path.suffix not in endings:
        raise ValueError(
            f"{option} {path}: the ending {path.suffix!r} is unknown here; {nearest(path.suffix, endings)}"
        )
    if not path.parent.is_dir():
        folder = path.parent
        if folder.exists():
            raise ValueError(f"{option} {path}: {folder} is a file, not a folder")
        raise ValueError(f"{option}: the folder of {path} does not exist; {nearest_path(folder)}")
    if os.path.lexists(path):
        if not path.exists():
            raise ValueError(f"{option} {path} is a link to what does not exist, {os.path.realpath(path)}; remove it")
        if not path.is_file():
            raise ValueError(f"{option} {path} is no ordinary file (a device or a pipe); name a file")
        if not os.access(path, os.W_OK):
            raise ValueError(f"{option} {path} is write-protected; name another file or change its mode")
        for source in inputs:
            if source is not None and Path(source).is_file() and path.samefile(source):
                raise ValueError(
                    f"{option} {path} is what this command reads, and would be replaced; name another file"
                )
    _try_to_write(Path(os.path.realpath(path)), f"{option} {path}")


def _try_to_write(target: Path, what: str) -> None:
    """As `replacing` will: to a new file beside `target`, with a longer name. A byte tells whether the disk is full."""
    trial = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(trial, "xb") as file:
            file.write(b"\0")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ValueError(f"{what} cannot be written ({error.strerror or error}); name a file elsewhere") from error
    finally:
        with contextlib.suppress(OSError):
            trial.unlink(missing_ok=True)


def check_new_folder(path: Path | None, option: str) -> None:
    """Of a folder that must not be there yet, in one that is: fails before the work rather than after it."""
    if path is None:
        return
    from zest_fast.integrations.references import nearest_path

    if os.path.lexists(path):
        raise ValueError(f"{option} {path} is there already; name a new folder")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise ValueError(f"{option}: the folder around {path} does not exist; {nearest_path(parent)}")
    _try_to_write(parent / path.absolute().name, f"{option} {path}")


def check_folder(path: Path, option: str = "--out") -> None:
    """The same for a folder that is made, with its parents, where it is missing."""
    there = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
    if not there.is_dir():
        raise ValueError(f"{option} {path}: {there} is not a folder")
    _try_to_write(there.absolute() / "file", f"{option} {path}")


def typed(ctx: typer.Context) -> set[str]:
    """The parameters that the user wrote on the command line, defaults left out."""
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


_OF_A_JOB = (
    "model",
    "data",
    "task",
    "text_column",
    "label_column",
    "chat_template",
    "split",
    "config",
    "dtype",
    "trust_remote_code",
    "batch_size",
    "validation_share",
    "max_length",
    "image_size",
    "seed",
    "device",
)


def opened_job(ctx: typer.Context, console: Console, **instead: Any) -> Job:
    """The model and the data that a command names, by what `open_job` takes of its parameters.

    instead: of these, what is not the user's to say.
    """
    with console.status("loading model and data"):
        from zest_fast.cli.jobs.job import open_job

        return open_job(**{name: ctx.params[name] for name in _OF_A_JOB if name in ctx.params} | instead)


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def split_names(joined: str | None, written: str) -> list[str] | None:
    """Names separated by commas; ValueError, with the option as it is written, where there are none."""
    if joined is None:
        return None
    names = [name.strip() for name in joined.split(",") if name.strip()]
    if not names:
        raise ValueError(f"{written} {joined!r} names nothing; leave it out for the default")
    return names


def compiled(text: str | None) -> re.Pattern[str] | None:
    try:
        return None if text is None else re.compile(text)
    except re.error as error:
        raise ValueError(f"--layers {text!r} is no regular expression: {error}") from error


def share_of(option: str, text: str | None) -> float | None:
    """ "5%" or "0.05" -> 0.05. Raises ValueError for what is no share above 0 and at most 1."""
    if text is None:
        return None
    number = text.strip().removesuffix("%")
    try:
        share = float(number) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ValueError(f"{option} {text!r} is no share of a sweep's cost; write 5% or 0.05")
    return share
