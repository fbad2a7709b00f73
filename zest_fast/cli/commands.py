"""`zest-fast profile`, `finetune`, `demo` and `doctor`. Results go to stdout, everything else to stderr."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

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
    check_folder,
    check_new_folder,
    check_readable,
    check_writable,
    compiled,
    opened_job,
    share_of,
    split_names,
    typed,
    work,
)


@app.command()
def profile(
    ctx: typer.Context,
    model: Model,
    data: Data,
    task: Task = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    chat_template: ChatTemplate = None,
    split: Split = None,
    config: Config = None,
    batch_size: BatchSize = 16,
    batches: Annotated[
        int, typer.Option(min=1, help="Of how many batches: more than one gives means, and how they differ.")
    ] = 1,
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
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure every metric of every layer in one forward and one backward pass over a batch."""
    check_options(ctx.params)
    check_writable(out, {".json", ".parquet"}, inputs=[data])
    check_writable(plot, {".png", ".svg", ".pdf"}, "--plot")
    pattern, chosen = compiled(layers), None if metrics == "all" else split_names(metrics, "--metrics")
    with work(model, data) as console:
        job = opened_job(ctx, console)
        with console.status("profiling one batch" if batches == 1 else f"profiling {batches} batches"):
            import zest_fast

            found: dict[str, Any] = {"batch": job.first_batch()} if batches == 1 else {"batches": job.batches(batches)}
            result = zest_fast.profile(
                job.model,
                **found,
                layers=pattern,
                metrics="all" if metrics == "all" else chosen,
                backend=cast(Any, backend),
            )
        show.notes(console, job, typed(ctx))
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
    ctx: typer.Context,
    model: Model,
    data: Data,
    task: Task = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    chat_template: ChatTemplate = None,
    split: Split = None,
    config: Config = None,
    by: Annotated[
        str | None, typer.Option(help="The metric that chooses the layers; by default the Ranker that ships does.")
    ] = None,
    probe: Annotated[
        str | None,
        typer.Option(help="Probe each layer before ranking, for this share of a sweep's cost, such as 5%."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many layers to train beside the head.")] = 5,
    layers: Annotated[
        str | None, typer.Option(help="Exact layer names, separated by commas, instead of ranked ones.")
    ] = None,
    head: Annotated[
        str, typer.Option(help="auto (the output layer of a classifier), none, or exact names, separated by commas.")
    ] = "auto",
    prefer: Annotated[
        str, typer.Option(help="score, or cheap-cut: of layers that the ranking cannot tell apart, the higher ones.")
    ] = "score",
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="3GB, 24GiB: of --checkpoint, --frozen, --stream and --cache, where you do not say, the fastest that "
            "fits; other layers only where none does."
        ),
    ] = None,
    checkpoint: Annotated[str | None, typer.Option(help="above-cut: recompute activations in backward.")] = None,
    frozen: Annotated[str | None, typer.Option(help="int8 or nf4: keep frozen Linear layers quantised.")] = None,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Frozen weights stay on disk: MODEL is a folder, plain or of zest-fast pack, --layers what trains. On "
            "the CPU, unless --device says cuda.",
        ),
    ] = False,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="A folder: layers below the lowest that trains compute each sample once, in eval mode, and what they "
            "compute is read from there in further epochs.",
            show_default=False,
        ),
    ] = None,
    cache_limit: Annotated[str, typer.Option(help="What that folder may take: 50GB, 20GiB.")] = "50GB",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training data.")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Stop after so many steps; counts before --epochs.")] = None,
    lr: Annotated[float, typer.Option(min=0.0, help="Learning rate of AdamW.")] = 1e-4,
    schedule: Annotated[
        str, typer.Option(help="constant, linear or cosine: how the rate falls, as transformers.get_scheduler has it.")
    ] = "constant",
    warmup: Annotated[float, typer.Option(help="The share of the steps in which the rate rises from zero, 0.1.")] = 0.0,
    batch_size: BatchSize = 16,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches of a step: the same as one batch of all.")] = 1,
    validation_share: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Share of the data held out for the scores before and after.")
    ] = 0.1,
    masters: Annotated[
        bool,
        typer.Option(
            "--masters/--no-masters", help="Float32 masters of what trains, where the model is bfloat16 or float16."
        ),
    ] = True,
    out: Annotated[Path, typer.Option(help="Where to save the trained layers.")] = Path("delta.safetensors"),
    save_model: Annotated[
        Path | None, typer.Option(help="A new folder for the tuned model, as from_pretrained loads it.")
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(min=1, help="Save the run every so many steps, as OUT with the ending .run.pt.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with a run that --save-every or Ctrl-C saved, to the bit.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Stop before training: which layers, and the plan.")
    ] = False,
    max_length: MaxLength = None,
    image_size: ImageSize = None,
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Profile, rank, train the best layers and the head, and save what changed."""
    check_options(ctx.params)
    check_writable(out, {".safetensors"})
    check_new_folder(save_model, "--save-model")
    progress = None
    if resume is not None:
        check_readable(resume, "run")
        from zest_fast.cli.jobs.runs import read_progress, resumed_options

        progress = read_progress(resume)
        ctx.params |= resumed_options(resume, progress, ctx.params, typed(ctx))
        layers = ",".join(progress.layers) or None
        checkpoint, frozen, stream = ctx.params["checkpoint"], ctx.params["frozen"], ctx.params["stream"]
        cache = cache or progress.own_cache
        epochs, steps, lr, masters = (ctx.params[name] for name in ("epochs", "steps", "lr", "masters"))
        schedule, warmup, accumulate = (ctx.params[name] for name in ("schedule", "warmup", "accumulate"))
    if layers is not None and (unused := typed(ctx) & {"by", "top", "probe"}):
        raise ValueError(f"--{unused.pop()} chooses among ranked layers, and --layers names them: leave one out")
    if by is not None and probe is not None:
        raise ValueError("--probe is mixed in by the Ranker that ships, and --by ranks by a metric: leave one out")
    if cache is None and max_memory is None and "cache_limit" in typed(ctx):
        raise ValueError("--cache-limit is about --cache, which names the folder: pass both")
    if layers is not None and progress is None and prefer != "score":
        raise ValueError("--prefer chooses among ranked layers, and --layers names them: leave one out")
    names = split_names(layers, "--layers")
    if stream and names is None:
        raise ValueError(
            "--stream needs --layers: what trains is read into memory, and has to be known before; rank first, on a "
            "machine that holds the model, or name layers of the upper half"
        )
    if stream and frozen is not None:
        raise ValueError(
            f"--frozen {frozen} packs weights in memory: pack the folder (zest-fast pack), and --stream it"
        )
    share = share_of("--probe", probe)
    with work(model, data) as console:
        from zest_fast.cli.jobs.dial import opened_first
        from zest_fast.cli.jobs.wanted import Dial
        from zest_fast.integrations.pretrained import Streamed

        def opened(on_disk: tuple[Any, Any] | None, same_length: bool) -> Any:
            """on_disk: layers and head of a model whose frozen weights stay there."""
            streamed = None if on_disk is None else Streamed(*on_disk)
            return opened_job(ctx, console, same_length=same_length, streamed=streamed)

        chosen: Any = None if head == "none" else head if head == "auto" else split_names(head, "--head")
        if progress is not None:
            chosen = progress.head or None
        dial = None
        if max_memory is not None:
            given = {"checkpoint": checkpoint, "frozen": frozen, "stream": stream or None, "cache": cache}
            dial = Dial(max_memory, frozenset(name for name, value in given.items() if value is not None), opened)
        if progress is not None and resume is not None:
            from zest_fast.cli.jobs.runs import check_data
            from zest_fast.integrations.data.sources import digest_of_data

            parts = {name: ctx.params[name] for name in ("split", "config")}
            check_data(resume, progress, data, digest_of_data(data, **parts))
        if stream or dial is None:
            job = opened((tuple(names or ()), chosen) if stream else None, cache is not None)
        else:
            job = opened_first(opened, model, names, chosen, ctx.params["device"], cache is not None)
        from zest_fast.cli.jobs.finetuning import finetune_job, settings_of_job
        from zest_fast.cli.jobs.wanted import Wanted

        wanted = Wanted(
            layers=names,
            head=head,
            by=by,
            probe=share,
            top=top,
            prefer=cast(Any, prefer),  # these are looked at there
            dial=dial,
            checkpoint=cast(Any, checkpoint),
            frozen=cast(Any, frozen),
            cache=cache,
            cache_limit=cache_limit,
            epochs=epochs,
            steps=steps,
            lr=lr,
            schedule=schedule,
            warmup=warmup,
            accumulate=accumulate,
            masters=masters,
            out=out,
            save_model=save_model,
            save_every=save_every,
            resume=None if resume is None or progress is None else (resume, progress),
            dry_run=dry_run,
            model=model,
            data=data,
            stream=stream,
            data_settings=settings_of_job(job, ctx.params),
            params=dict(ctx.params),
            written=typed(ctx),
            saving=None if progress is None else progress.saving,
        )
        document = finetune_job(job, wanted, console)
    if as_json:
        show.json_document(document)
    elif dry_run:
        show.results().print("dry run: nothing was trained and nothing is saved", highlight=False)
    else:
        show.finetuning_table(document)
    if dry_run:
        return
    if document["not_saved"]:
        raise OSError(f"--out {document['not_saved']}; what was trained is saved as {document['delta']}")
    if document["model_not_saved"]:
        raise OSError(f"{document['model_not_saved']}; zest-fast merge makes it of the delta, {document['delta']}")


@app.command()
def demo(
    task: Annotated[str, typer.Option(help="lite0 (images), minilm or smollm2 (text).")] = "lite0",
    out: Annotated[Path, typer.Option(help="Folder for the heat map, the curves and the JSON.")] = Path("zest-demo"),
    seed: Seed = 0,
    full: Annotated[
        bool, typer.Option("--full", help="Random layers too, and each arm's learning rate chosen: minutes more.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run the whole job on real packaged weights and data, beside head only and all layers."""
    check_folder(out)
    results = show.results()
    with work() as console:
        from zest_fast.demo import run_demo

        document = run_demo(task, out, seed=seed, console=console if as_json else results, full=full)
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
