"""`zest-fast plan`: does a training step fit, and what would make it fit. No weights are loaded, no GPU is needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.box import SIMPLE_HEAD
from rich.progress import Progress
from rich.table import Table

from zest_fast.cli import show
from zest_fast.cli.app import app
from zest_fast.cli.options import Json, split_names, typed, work

if TYPE_CHECKING:
    from zest_fast.planning.report import Plan

LAYERS_HELP = (
    "all; exact names, separated by commas; or a number: so many layers, evenly from --lowest-block on, for a plan "
    "before they are chosen."
)


@app.command()
def plan(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="llama-7b, bert-base, resnet-50 ..., a config.json or its folder, a hub id, module:function, or the "
            "YAML of a trainer (as --file).",
            show_default=False,
        ),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="A configuration of axolotl, LLaMA-Factory or Trainer (YAML, JSON) to plan.")
    ] = None,
    layers: Annotated[str, typer.Option(help=LAYERS_HELP)] = "5",
    lowest_block: Annotated[int, typer.Option(min=0, help="Where --layers is a number: the lowest block.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in a batch.")] = 1,
    sequence_length: Annotated[int | None, typer.Option(min=1, help="Tokens of a sample.")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Pixels of both sides.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32, bfloat16-mixed.")] = "bfloat16",
    optimizer: Annotated[
        str,
        typer.Option(
            help="adamw, adamw-8bit, sgd ...; behind it -masters: float32 ones; -in-backward: one gradient at a time."
        ),
    ] = "adamw",
    lean: Annotated[bool, typer.Option(help="Save only what the gradient of inputs needs, above the cut.")] = True,
    checkpoint: Annotated[str | None, typer.Option(help="above-cut: recompute the blocks above the cut.")] = None,
    frozen: Annotated[str | None, typer.Option(help="int8 or nf4: quantise what is frozen.")] = None,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream", help="Frozen weights stay on disk (open_streamed); on a CPU, unless --device says cuda."
        ),
    ] = False,
    fit: Annotated[
        str | None,
        typer.Option(help="3GB, 24GiB ...: of checkpointing, int8, nf4 and weights on disk the fastest way that fits."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda, or cpu; by default what the model is for.")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Plan the pass of `zest-fast profile` instead.")] = False,
    probe: Annotated[bool, typer.Option("--probe", help="Plan the passes of `zest_fast.probe` instead.")] = False,
    table: Annotated[bool, typer.Option("--table", help="Other lowest blocks and batch sizes beside it.")] = False,
    max_memory: Annotated[
        str | None, typer.Option(help="24GB, 16GiB ...: show of that table what fits, and fail if nothing does.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Peak memory and FLOPs of a training step, by a dry run without weights and without a GPU."""
    if model is not None and file is None and model.endswith((".yml", ".yaml")):
        file, model = Path(model), None
    if model is None and file is None:
        raise ValueError("pass a model, or --file with a configuration of a trainer")
    sizes: dict[str, Any] = {"sequence_length": sequence_length, "image_size": image_size}
    said = {"lean", "checkpoint", "frozen", "stream", "profile", "probe"} & typed(ctx) | ({"file"} if file else set())
    if fit is not None and said:
        raise ValueError(f"--fit chooses how memory is saved, and --{min(said)} says it: leave one out")
    how = None
    with work(model or "") as console:
        with console.status("planning"):
            source = _source(model)
            if fit is not None:
                from zest_fast.planning.savings import fit_memory

                how = fit_memory(
                    source,
                    _layers(source, layers, lowest_block),
                    fit,
                    batch_size=batch_size,
                    dtype=dtype,
                    optimizer=optimizer,
                    device=cast(Any, device),
                    **sizes,
                )
                found = how.plan
            elif file is not None:
                from zest_fast.integrations.training_files import plan_training_file

                found = plan_training_file(file, model=source, **sizes)
            elif profile:
                from zest_fast.planning.plan import plan_profile

                found = plan_profile(source, batch_size=batch_size, dtype=dtype, **sizes)
            elif probe:
                from zest_fast.probing.plan import plan_probe

                found = plan_probe(source, dtype=dtype, **sizes)
            else:
                from zest_fast.planning.plan import plan as plan_step

                found = plan_step(
                    source,
                    _layers(source, layers, lowest_block),
                    batch_size=batch_size,
                    dtype=dtype,
                    optimizer=optimizer,
                    lean=lean,
                    checkpoint=cast(Any, checkpoint),  # which is looked at there
                    frozen=cast(Any, frozen),
                    stream=stream,
                    device=cast(Any, device),
                    **sizes,
                )
        rows = None
        if table or max_memory is not None:
            with Progress(console=console, transient=True) as bar:
                task = bar.add_task("planning the table")

                def progress(done: int, total: int) -> None:
                    bar.update(task, completed=done, total=total)

                rows = found.within(max_memory, progress=progress) if max_memory else found.table(progress=progress)
    if as_json:
        show.json_document(_document(found, rows) | ({} if how is None else {"fit": str(how), **vars(how.savings)}))
    else:
        if how is not None:
            show.results().print(str(how), highlight=False, markup=False)
        _print(found, rows)


def _source(model: str | None) -> Any:
    from zest_fast.integrations.references import is_reference, load_function

    return load_function(model)() if model is not None and is_reference(model) else model


def _layers(source: Any, layers: str, lowest_block: int) -> Any:
    if layers == "all":
        return layers
    if not layers.isdecimal():
        return split_names(layers, "--layers")
    from zest_fast.planning.blocks import layout_of
    from zest_fast.planning.skeletons import named_model

    return layout_of(named_model(source)[1]).stand_ins(int(layers), lowest_block)


def _document(found: Plan, rows: Any) -> dict[str, Any]:
    layers = found.setting.layers
    document = {
        "model": found.model,
        "purpose": found.purpose,
        "layers": layers,
        "cut": found.cut,
        "trainable_parameters": found.trainable_parameters,
        "peak_bytes": found.peak_bytes,
        "peak_phase": found.peak_phase,
        "peak_tensor": str(found.peak_tensor),
        "flops": found.flops,
        "flops_by_phase": found.flops_by_phase,
        "breakdown": found.breakdown,
        "groups": found.groups,
        "fits_gb": list(found.fits),
        "notes": list(found.notes),
    }
    return document if rows is None else {**document, "table": rows.to_dict("records")}


def _print(found: Plan, rows: Any) -> None:
    console = show.results()
    console.print(str(found), highlight=False, markup=False)
    if isinstance(found.setting.layers, tuple):
        console.print("layers: " + ", ".join(found.setting.layers), highlight=False, markup=False)
    if rows is None:
        return
    columns = [column for column in rows.columns if column != "peak_bytes"]
    table = Table(*(column.replace("_", " ") for column in columns), box=SIMPLE_HEAD)
    for row in rows.to_dict("records"):
        table.add_row(*(_cell(column, row[column]) for column in columns))
    console.print(table)


def _cell(column: str, value: Any) -> str:
    if isinstance(value, bool):
        return "fits" if value else "-"
    return f"{value:.3g}" if column == "flops" else str(value)
