"""Before `zest-fast finetune` trains: the layers that do, and what a step of them will hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console

from zest_fast import choose, plan, plan_profile, profile, rank
from zest_fast import probe as run_probe
from zest_fast.cli.jobs.job import Job, to_device
from zest_fast.cli.jobs.training import steps_of
from zest_fast.cli.jobs.wanted import Choice, Wanted
from zest_fast.cli.options import split_names
from zest_fast.finetuning.trainable_layers import chosen_layers, head_layers
from zest_fast.foundation.byte_counts import memory_bytes
from zest_fast.foundation.text_table import first_line
from zest_fast.integrations.quiet import quiet_transformers
from zest_fast.lean.master_weights import LOW
from zest_fast.planning.report import Plan, sized, tensors_within
from zest_fast.probing.collecting import collect
from zest_fast.profiling.heads import find_head, is_language_model


def choose_layers(job: Job, wanted: Wanted, console: Console) -> tuple[Choice, Any]:
    """The layers that were named, that a run had chosen, or the best ones of a ranking; and a batch to plan by.

    The batch is None where none can be had without moving the data loader on.
    """
    if wanted.resume is not None:
        run = wanted.resume[1]
        return Choice(run.layers, run.head or None, run.ranking, run.explanation), None
    if wanted.layers is not None:
        chosen = Choice(wanted.layers, _head(job, wanted.head, wanted.layers))
        return chosen, job.first_batch() if wanted.dry_run else job.any_batch()
    batch, by = job.first_batch(), wanted.by
    if wanted.dial is not None:
        _check_profile(job, batch, by, wanted.dial.limit)
    with console.status("profiling one batch"):
        profiled = profile(job.model, batch, metrics=None if by is None else [by])
    found = None
    if wanted.probe is not None:
        with console.status("probing"):
            batches = collect(job.model, job.loaders.train, lambda one: to_device(one, job.device))
            found = run_probe(
                job.model, batches, layers=profiled.names, budget=wanted.probe, progress=console.is_terminal
            )
    ranking = rank(profiled, by=by, probe=found)
    layers: Any = ranking.top(wanted.top)
    explanation = None
    if wanted.prefer != "score":  # counts on the model itself, for which not every model is made
        layers = choose(ranking, wanted.top, model=job.model, batch=batch, prefer=wanted.prefer)
        explanation = layers.explanation
    return Choice(layers, _head(job, wanted.head, layers), ranking, explanation), batch


def _check_profile(job: Job, batch: Any, by: str | None, limit: str) -> None:
    """Raises ValueError where the pass by which layers are ranked holds more than --max-memory."""
    try:
        with quiet_transformers():
            needs = plan_profile(job.model, batch=batch, metrics=None if by is None else [by]).peak_bytes
    except Exception:  # metrics without a backward pass; and where no plan can be made, the dial says so
        return
    allowed = memory_bytes(limit)
    if needs > (allowed if job.device.type == "cpu" else tensors_within(allowed)):
        raise ValueError(
            f"--max-memory {limit!r}: to rank the layers takes a profile of the whole model, which holds "
            f"{sized(needs)}; name them by --layers, of a profile that was made elsewhere, say, or rank --by "
            "weight_std, which runs nothing"
        )


def exchanged(job: Job, wanted: Wanted, choice: Choice, layers: Any) -> Choice:
    """With these layers instead, as `choose` returns them."""
    return replace(choice, layers=layers, head=_head(job, wanted.head, layers), explanation=layers.explanation)


def check_choice(job: Job, choice: Choice) -> None:
    """Raises what SelectiveBackward would."""
    chosen_layers(job.model, choice.layers)
    head_layers(job.model, choice.head)


def plan_lines(
    job: Job, wanted: Wanted, choice: Choice, batch: Any, console: Console, found: Plan | None = None
) -> tuple[list[str], dict[str, Any] | None]:
    """Lines that say what will train, why, and what a step will hold; and the latter for the report.

    found: a plan that is there already. None where none can be made: not every model runs on tensors without contents.
    """
    check_choice(job, choice)
    lines = ["training " + ", ".join(choice.layers)]
    if choice.note:
        lines.append(f"ranking: {choice.note}")
    if choice.explanation:
        lines.append(f"choice: {choice.explanation}")
    if wanted.saving is not None:
        lines.append(f"--max-memory {wanted.saving['max_memory']}: {wanted.saving['explanation']}")
    if found is not None:
        lines.append(_plan_line(found))
    elif wanted.stream:
        lines.append("plan: zest-fast plan --stream makes one of weights that stay on disk")
    elif batch is not None:
        try:
            with console.status("planning a step"):
                found = plan(
                    job.model,
                    choice.layers,
                    batch=batch,
                    head=choice.head,
                    optimizer=planned_optimizer(job, wanted),
                    checkpoint=wanted.checkpoint,
                    frozen=wanted.frozen,
                    accumulating=wanted.accumulate > 1,
                )
        except Exception as error:  # of a model whose code needs values, whatever that raises
            why = first_line(error, "no message")[:200]
            lines.append(f"plan: none can be made of this model ({type(error).__name__}: {why})")
        else:
            lines.append(_plan_line(found))
    if found is None:
        return lines, None
    return lines, {
        "peak_bytes": found.peak_bytes,
        "flops": found.flops,
        "breakdown": found.breakdown,
        "trainable_parameters": found.trainable_parameters,
        "cut": found.cut,
    }


def _plan_line(found: Plan) -> str:
    parts = ", ".join(f"{kind} {size / 2**20:,.1f}" for kind, size in found.breakdown.items() if size)
    return (
        f"plan: a step takes {found.peak_bytes / 2**20:,.1f} MiB of tensors at its peak ({parts}) and "
        f"{found.flops / 1e9:,.3g} GFLOP, {found.setting.size}; backward ends at {found.cut}"
    )


def planned_optimizer(job: Job, wanted: Wanted) -> str:
    low = wanted.masters and any(parameter.dtype in LOW for parameter in job.model.parameters())
    return "adamw-masters" if low else "adamw-foreach" if job.device.type == "cuda" else "adamw"


def _head(job: Job, head: str, layers: Sequence[str]) -> str | list[str] | None:
    """ "auto" and, with it, whatever the checkpoint did not hold: layers that are drawn at random have to train."""
    if head == "none":
        return None
    if head != "auto":
        return split_names(head, "--head")
    fresh = {name.rpartition(".")[0] for name in job.loaded.fresh} - set(layers)
    if not fresh:
        return "auto"
    found = None if is_language_model(job.model) else find_head(job.model)
    return sorted(fresh if found is None else fresh | {found})


def steps_of_run(job: Job, wanted: Wanted) -> int:
    """Of the whole run."""
    return wanted.steps or steps_of(_rounds_length(job), wanted.epochs, wanted.accumulate)


def _rounds_length(job: Job) -> int:
    try:
        return len(job.loaders.train)
    except TypeError:
        raise ValueError("the data have no length (an IterableDataset): say how long to train with --steps") from None


def passes_of_run(job: Job, wanted: Wanted) -> int:
    """Of the whole run, of which a step takes several: what a cache saves. The last step may take fewer."""
    return wanted.steps * wanted.accumulate if wanted.steps else _rounds_length(job) * wanted.epochs
