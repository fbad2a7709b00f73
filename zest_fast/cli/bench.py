"""`zest-fast bench`: kernels, profiles, steps and plans measured so that others can repeat it, and results compared.

Exit code 1 where what is judged is wrong or slower, 2 where nothing could be measured or compared.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from zest_fast.benchmarking.timing import ROUNDS_OF_AN_INTERVAL
from zest_fast.cli import show
from zest_fast.cli.app import app
from zest_fast.cli.checks import check_options
from zest_fast.cli.options import (
    BatchSize,
    Device,
    Dtype,
    ImageSize,
    LabelColumn,
    MaxLength,
    Seed,
    Task,
    TextColumn,
    TrustRemoteCode,
    check_readable,
    check_writable,
    opened_job,
    split_names,
    typed,
    work,
)
from zest_fast.foundation.byte_counts import memory_bytes
from zest_fast.foundation.nearest import nearest

if TYPE_CHECKING:
    import torch

    from zest_fast.benchmarking.results import Result
    from zest_fast.benchmarking.runs import Build

bench = typer.Typer(
    no_args_is_help=True, help="Measure kernels, profiles, steps and plans, right before fast; compare two results."
)
app.add_typer(bench, name="bench")

_FEWEST_BYTES, _MOST_BYTES = 4 << 10, 16 << 30
KERNELS = ("moments", "gradient_moments", "linear_gradient_moments", "channel_products")
DTYPES = ("float32", "bfloat16", "float16", "float64")
SETS = ("tiny", "small", "standard")

Rounds = Annotated[
    int, typer.Option(min=ROUNDS_OF_AN_INTERVAL, help="Interleaved rounds: six are the fewest of an interval.")
]
Threads = Annotated[str | None, typer.Option(help="1,2: numbers of threads; by default as many as torch takes.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Where to save the result, for `bench compare`.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print Markdown.")]
Plot = Annotated[Path | None, typer.Option(help="Where to draw medians and intervals: .png, .svg or .pdf.")]


@bench.command()
def kernels(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[KERNEL]...", help=f"Of {', '.join(KERNELS)}; by default all.")
    ] = None,
    kernel: Annotated[
        list[str] | None,
        typer.Option(help="Your own beside ours: mine:moments, or moments=mine:fast. More than once for several."),
    ] = None,
    size: Annotated[str, typer.Option(help="Bytes of the input, several with commas.")] = "1MiB,32MiB",
    dtype: Annotated[str, typer.Option(help=f"Of {', '.join(DTYPES)}.")] = "float32,bfloat16",
    threads: Threads = None,
    rounds: Rounds = 11,
    warm: Annotated[
        bool, typer.Option("--warm", help="One input, left in the caches; by default they are rotated and flushed.")
    ] = False,
    compiles: Annotated[bool, typer.Option("--compile/--no-compile", help="torch.compile as a peer.")] = True,
    device: Device = "cpu",
    json_file: JsonFile = None,
    markdown: Markdown = False,
    plot: Plot = None,
) -> None:
    """Each kernel beside torch, the read bandwidth and functions of yours; exit code 1 where one of yours is wrong."""
    _check_files(json_file, plot)
    dtypes = _among("--dtype", dtype, DTYPES)
    chosen = list(dict.fromkeys(_known("KERNEL", name, KERNELS) for name in names or ()))
    sizes = [_size(text) for text in split_names(size, "--size") or ()]
    counts = _numbers(threads)
    sources = [text.rpartition("=")[2] for text in kernel or ()]
    with work(*sources) as console, console.status("measuring") as status:
        from zest_fast.benchmarking.kernels import Site
        from zest_fast.benchmarking.own_kernels import load_own_kernel
        from zest_fast.benchmarking.runs import run_kernels
        from zest_fast.cli.jobs.job import pick_device

        own = [load_own_kernel(text) for text in kernel or ()]
        for computed, candidate in own:
            if chosen and computed not in chosen:
                raise ValueError(f"--kernel {candidate.name} computes {computed}, which is not among {chosen}")
        result = run_kernels(
            chosen or list(dict.fromkeys(computed for computed, _ in own)) or KERNELS,
            own,
            dtypes=dtypes,
            sizes=sizes,
            threads=counts,
            site=Site(pick_device(device), warm=warm, rounds=rounds),
            compiles=compiles,
            say=status.update,
        )
    _report(result, json_file, markdown, plot)


def _passes(command: str, text: str) -> Callable[..., None]:
    """The command that measures profile, step or plan on a model of the user's, or on the built-in ones."""

    @bench.command(command, help=text)
    def measured(
        ctx: typer.Context,
        model: Annotated[
            str | None, typer.Argument(help="As of `zest-fast profile`; by default built-in ones.", show_default=False)
        ] = None,
        data: Annotated[
            str | None, typer.Argument(help="As of `zest-fast profile`: its first batch.", show_default=False)
        ] = None,
        size: Annotated[str, typer.Option(help=f"Of the built-in models: {', '.join(SETS)}.")] = "small",
        only: Annotated[
            str | None, typer.Option(help="Of the built-in models: bert, llama, resnet50, mobilenetv2.")
        ] = None,
        layers: Annotated[
            str | None,
            typer.Option(help="Of a step or a plan: exact names of what trains; by default the Ranker's best five."),
        ] = None,
        threads: Threads = None,
        rounds: Rounds = 9,
        task: Task = None,
        text_column: TextColumn = None,
        label_column: LabelColumn = None,
        batch_size: BatchSize = 16,
        max_length: MaxLength = None,
        image_size: ImageSize = None,
        dtype: Dtype = None,
        trust_remote_code: TrustRemoteCode = False,
        seed: Seed = 0,
        device: Device = "cpu",
        json_file: JsonFile = None,
        markdown: Markdown = False,
        plot: Plot = None,
    ) -> None:
        check_options(ctx.params)
        _check_files(json_file, plot, data)
        _check_model(command, ctx)
        counts, names = _numbers(threads), split_names(layers, "--layers")
        with work(model or "", data or "") as console, console.status("measuring") as status:
            from zest_fast.benchmarking.runs import run_passes
            from zest_fast.cli.jobs.job import pick_device

            place = pick_device(device)
            builds: dict[str, Build] = {}
            if model is None:
                builds = _built_in(_known("--size", size, SETS), split_names(only, "--only"), dtype, place)
            else:
                status.stop()
                job = opened_job(ctx, console)
                show.notes(console, job, typed(ctx))
                batch = job.first_batch()
                builds[model] = lambda: (job.model, batch)
                status.start()
            result = run_passes(
                command,
                builds,
                layers=names,
                rounds=rounds,
                threads=counts,
                device=place,
                settings={"size": size if model is None else None, "dtype": dtype, "batch_size": batch_size},
                say=status.update,
            )
        _report(result, json_file, markdown, plot)

    return measured


_passes("profile", "A whole profile beside a plain forward and backward pass, and beside hooks of torch.")
_passes("step", "Forward and backward of SelectiveBackward beside full training, in time, FLOPs and memory.")
_passes("plan", "The planned peak of a step beside the counted one, and the time of the plan; on a CPU.")


@bench.command()
def compare(
    a: Annotated[Path, typer.Argument(help="What `bench ... --json` saved before.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="The same, after.", show_default=False)],
    margin: Annotated[
        float, typer.Option(min=0.0, max=0.5, help="What counts as the same: all of the interval within it.")
    ] = 0.05,
) -> None:
    """Faster, slower, same or ambiguous, of each case; exit code 1 where ours or yours got slower or wrong."""
    for file in (a, b):
        check_readable(file, "result")
    from zest_fast.benchmarking.comparison import compare as compared
    from zest_fast.benchmarking.results import Result

    found = compared(Result.load(a), Result.load(b), margin)
    table = Table("case", "", "", "time, second to first", box=SIMPLE_HEAD)
    for line in found.lines:
        change = "" if line.low is None else f"{line.low:.3g} to {line.high:.3g}"
        table.add_row(show.cell(line.case), show.cell(line.name), line.answer, show.cell(change or line.why))
    console = show.results()
    console.print(table)
    for note in found.notes:
        show.line(console, note)
    if found.is_worse:
        raise typer.Exit(1)


def _check_files(json_file: Path | None, plot: Path | None, data: str | None = None) -> None:
    check_writable(json_file, {".json"}, "--json", inputs=[data])
    check_writable(plot, {".png", ".svg", ".pdf"}, "--plot")
    if plot is not None:
        from zest_fast.profiling.heat_map import figure_class

        figure_class()  # an hour later would be late


def _check_model(command: str, ctx: typer.Context) -> None:
    """Options that have no place are refused: a figure of something else than was asked for would pass for it."""
    params, said = ctx.params, typed(ctx)
    if (params["model"] is None) != (params["data"] is None):
        raise ValueError("a model of yours needs data, too: pass MODEL and DATA, or neither for the built-in models")
    of_data = {"task", "text_column", "label_column", "batch_size", "max_length", "image_size", "trust_remote_code"}
    wrong = said & (of_data | {"seed"} if params["model"] is None else {"size", "only"})
    if wrong:
        which = "a model of yours" if params["model"] is None else "the built-in models"
        raise ValueError(f"--{min(wrong).replace('_', '-')} is of {which}: leave it out")
    if command == "profile" and params["layers"] is not None:
        raise ValueError("--layers is of a step or a plan: a profile measures every layer")
    if params["model"] is None and params["layers"] is not None and params["only"] is None:
        raise ValueError("--layers names the layers of one model: say which one, with --only or MODEL and DATA")
    if command == "plan" and params["device"] not in ("cpu", "auto"):
        raise ValueError("bench plan counts what the CPU's allocator hands out: leave --device out")


def _built_in(size: str, only: list[str] | None, dtype: str | None, device: torch.device) -> dict[str, Build]:
    import torch
    from torch.utils._pytree import tree_map_only

    from zest_fast.benchmarking.models import SIZES, Case

    try:
        import transformers  # noqa: F401 (an hour later would be late)
    except ImportError as error:
        raise ImportError(
            "the built-in models need transformers: pip install 'zest_fast[transformers]', or name MODEL and DATA"
        ) from error

    cases = {case.model: case for case in SIZES[size]}
    weights = None if dtype is None else getattr(torch, dtype)

    def built(case: Case) -> tuple[torch.nn.Module, Any]:
        model, batch = case.build()
        floats = tree_map_only(torch.Tensor, lambda x: x.to(weights) if x.is_floating_point() else x, batch)
        return model.to(device, weights), {name: tensor.to(device) for name, tensor in floats.items()}

    names = [_known("--only", name, cases) for name in only or cases]
    return {str(cases[name]): partial(built, cases[name]) for name in names}


def _report(result: Result, json_file: Path | None, markdown: bool, plot: Path | None) -> None:
    from zest_fast.benchmarking.report import draw, markdown_of, remarks_of, table_of, where

    if json_file is not None:
        result.save(json_file)
    if plot is not None:
        draw(result, plot)
    console = show.results()
    if markdown:
        print(markdown_of(result))
    else:
        show.line(console, where(result))
        for case in result.cases:
            head, rows = table_of(result.command, case)
            table = Table(box=SIMPLE_HEAD, title=show.cell(case.name), title_justify="left")
            for place, name in enumerate(head):
                table.add_column(show.cell(name), justify="left" if place < 2 else "right")
            for row in rows:
                table.add_row(*map(show.cell, row))
            console.print(table)
            for remark in remarks_of(case):
                show.line(console, remark)
    if result.wrong:
        raise typer.Exit(1)


def _known(what: str, name: str, names: Any) -> str:
    if name not in names:
        raise ValueError(f"{what} {name!r} is unknown; {nearest(name, names)}")
    return name


def _among(what: str, text: str, names: tuple[str, ...]) -> list[str]:
    return list(dict.fromkeys(_known(what, name, names) for name in split_names(text, what) or ()))


def _size(text: str) -> int:
    size = memory_bytes(text, "--size")
    if not _FEWEST_BYTES <= size <= _MOST_BYTES:
        raise ValueError(f"--size {text!r}: from 4KiB to 16GiB can be measured")
    return size


def _numbers(text: str | None) -> list[int]:
    """Of "1,2"; what torch takes where nothing is said."""
    if text is None:
        import torch

        return [torch.get_num_threads()]
    words = split_names(text, "--threads") or []
    if wrong := [word for word in words if not (word.isdecimal() and 1 <= int(word) <= 1024)]:
        raise ValueError(f"--threads {wrong[0]!r} is no number of threads; write 1, or 1,2")
    return list(dict.fromkeys(map(int, words)))
