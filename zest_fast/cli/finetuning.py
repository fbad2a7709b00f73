"""What `zest-fast finetune` does with an opened job: profile, rank, train, save, report."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from zest_fast import PrefixCache, SelectiveBackward, choose, profile, rank
from zest_fast import probe as run_probe
from zest_fast.cli import show
from zest_fast.cli.interrupts import listening
from zest_fast.cli.job import Job, to_device
from zest_fast.cli.options import split_names
from zest_fast.cli.saving import save_somewhere
from zest_fast.cli.training import evaluate, train
from zest_fast.foundation.options import Checkpoint, Frozen, Preference
from zest_fast.foundation.text_table import printable
from zest_fast.probing.collecting import collect
from zest_fast.profiling.heads import find_head, is_language_model


def finetune_job(
    job: Job,
    *,
    layers: Sequence[str] | None,
    head: str,
    by: str | None,
    probe: float | None,
    top: int,
    prefer: Preference,
    max_memory: str | None,
    checkpoint: Checkpoint | None,
    frozen: Frozen | None,
    cache: Path | None,
    cache_limit: str,
    epochs: int,
    steps: int | None,
    lr: float,
    out: Path,
    written: Collection[str],
    console: Console,
) -> dict[str, Any]:
    """Trains `layers` and the head; returns the report, ready for JSON.

    layers: None = the `top` ones of a ranking, by a metric or (by=None) by the Ranker that ships.
    probe: the share of a sweep's cost that a probe may take, to be mixed into that ranking; None = no probe.
    head: "auto", "none", or the names of modules, separated by commas.
    prefer, max_memory, checkpoint, frozen: as for `choose` and SelectiveBackward.
    cache, cache_limit: folder and limit of a PrefixCache; None = no cache.
    written: the parameters of the command line, for the notes on those without effect.
    """
    ranking, explanation = None, None
    if layers is None:
        batch = job.first_batch()
        with console.status("profiling one batch"):
            profiled = profile(job.model, batch, metrics=None if by is None else [by])
        found = None
        if probe is not None:
            with console.status("probing"):
                batches = collect(job.model, job.loaders.train, lambda one: to_device(one, job.device))
                found = run_probe(job.model, batches, layers=profiled.names, budget=probe, progress=console.is_terminal)
        ranking = rank(profiled, by=by, probe=found)
        if prefer == "score" and max_memory is None:
            layers = ranking.top(top)
        else:  # counts on the model itself, for which not every model is made
            settings: dict[str, Any] = {
                "prefer": prefer,
                "max_memory": max_memory,
                "checkpoint": checkpoint,
                "frozen": frozen,
            }
            layers = choose(ranking, top, model=job.model, batch=batch, **settings)
            explanation = layers.explanation
    elif max_memory is not None or prefer != "score":
        raise ValueError("--max-memory and --prefer choose among ranked layers, and --layers names them: leave one out")
    chosen_head = _head(job, head, layers)
    kept = None
    if cache is not None:
        kept = PrefixCache(cache, limit=cache_limit, samples=_samples(job), eval_prefix=True)
    options: dict[str, Any] = {"checkpoint": checkpoint, "frozen": frozen, "cache": kept}
    with SelectiveBackward(job.model, layers, head=chosen_head, **options) as tuned:
        show.notes(console, job, written)  # once nothing is refused any more: an error is one line
        parameters = list(tuned.parameters())
        before = _score(job)
        total_steps = steps if steps is not None else epochs * _rounds_length(job)
        recipe = {"optimizer": "AdamW", "lr": lr, "planned_steps": total_steps}
        losses: list[float] = []
        with listening() as interrupts, _progress(console, total_steps) as report:

            def told(step: int, loss: float) -> None:
                if step == 1 and kept is not None:
                    console.print(f"note: cache: {printable(kept.forecast)}", highlight=False, markup=False)
                report(step, loss)

            try:
                training = train(
                    job.model,
                    parameters,
                    job.loaders.train,
                    epochs=epochs,
                    steps=steps,
                    lr=lr,
                    device=job.device,
                    report=told,
                    losses=losses,
                    stop=lambda: interrupts.happened,
                )
            except Exception as error:
                if not interrupts.happened:
                    if not losses:
                        raise
                    raise _with_what_was_saved(error, tuned, out, ranking, recipe, losses) from error
                # The workers of a DataLoader hear Ctrl-C, too, and their end is an error here.
                training = None
        if training is None or (interrupts.happened and len(losses) < total_steps):
            raise KeyboardInterrupt(_save_partial(tuned, out, ranking, recipe, losses))
        saved, not_there = save_somewhere(
            lambda path: tuned.save(path, ranking=ranking, recipe={**recipe, "steps": len(losses)}), out
        )
        try:
            if interrupts.happened:
                raise KeyboardInterrupt
            after = _score(job)  # when the weights are safe already
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"training was over, and the trained layers are saved as {saved}") from None
        cut, problem = tuned.cut, _problem(tuned)
    return {
        "layers": list(layers),
        "by": ranking.by if ranking is not None else None,
        "note": ranking.note if ranking is not None else None,
        "choice": explanation,
        "trainable": list(tuned.trainable_names),
        "cut": cut,
        "trainable_parameters": sum(parameter.numel() for parameter in parameters),
        "parameters": sum(parameter.numel() for parameter in job.model.parameters()),
        "steps": len(training.losses),
        "training_loss": training.losses,
        "before": before,
        "after": after,
        "seconds_per_step": training.seconds_per_step,
        "peak_memory_bytes": training.peak_memory,
        "cache": None if kept is None else str(kept),
        "device": str(job.device),
        "delta": str(saved),
        "not_saved": None if not_there is None else f"{out} could not be written ({_reason(not_there)})",
        "verified": problem is None,
        "problem": problem,
    }


def _save_partial(
    tuned: SelectiveBackward, out: Path, ranking: Any, recipe: dict[str, Any], losses: list[float]
) -> str:
    """Saves what an unfinished run has trained beside `out`, marked as such in its recipe; says where."""
    done, planned = len(losses), recipe["planned_steps"]
    if not done:
        return "no step was done, nothing is saved"
    recipe = {**recipe, "steps": done, "interrupted": True}
    path = out.with_name(f"{out.stem}.interrupted{out.suffix}")
    saved, _ = save_somewhere(lambda file: tuned.save(file, ranking=ranking, recipe=recipe), path)
    return f"the layers as they were after step {done} of {planned} are saved as {saved}"


def _with_what_was_saved(
    error: Exception, tuned: SelectiveBackward, out: Path, ranking: Any, recipe: dict[str, Any], losses: list[float]
) -> Exception:
    """The error that ended the training, and where the steps before it are."""
    try:
        told = _save_partial(tuned, out, ranking, recipe, losses)
    except (OSError, RuntimeError) as failure:  # a disk is full, or what was trained is not finite
        told = f"what was trained until then is not saved ({failure})"
    text = str(error) or type(error).__name__
    return RuntimeError(f"{text}; {told}")


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _problem(tuned: SelectiveBackward) -> str | None:
    """What `.verify()` has to say: what was trained is saved either way."""
    try:
        tuned.verify()
    except RuntimeError as error:
        return str(error)
    return None


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


def _rounds_length(job: Job) -> int:
    try:
        return len(job.loaders.train)
    except TypeError:
        raise ValueError("the data have no length (an IterableDataset): say how long to train with --steps") from None


def _samples(job: Job) -> int | None:
    """In an epoch; None where the data do not say."""
    try:
        return len(job.loaders.train.dataset)  # type: ignore[arg-type]
    except (AttributeError, TypeError):
        return None


def _score(job: Job) -> dict[str, Any] | None:
    """None where there is no validation data."""
    if job.loaders.validation is None:
        return None
    return asdict(evaluate(job.model, job.loaders.validation, job.device))


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[int, float], None]]:
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("{task.fields[speed]:.2f} steps/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("training", total=total, loss=float("nan"), speed=0.0)

        def report(step: int, loss: float) -> None:
            elapsed = progress.tasks[bar].elapsed or 1e-9
            progress.update(bar, completed=step, loss=loss, speed=step / elapsed)

        yield report
