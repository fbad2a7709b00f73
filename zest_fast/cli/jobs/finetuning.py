"""What `zest-fast finetune` does with an opened job: profile, rank, plan, train, save, report."""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from zest_fast import PrefixCache, SelectiveBackward, choose, plan, profile, rank
from zest_fast import probe as run_probe
from zest_fast.cli import show
from zest_fast.cli.jobs import runs
from zest_fast.cli.jobs.dial import Dial, turn
from zest_fast.cli.jobs.interrupts import listening
from zest_fast.cli.jobs.job import Job, to_device
from zest_fast.cli.jobs.record import training_record
from zest_fast.cli.jobs.saving import save_somewhere
from zest_fast.cli.jobs.scores import evaluate
from zest_fast.cli.jobs.training import optimizer_for, scheduler_for, steps_of, train
from zest_fast.cli.options import split_names
from zest_fast.finetuning.trainable_layers import chosen_layers, head_layers
from zest_fast.foundation.options import Checkpoint, Frozen, Preference
from zest_fast.foundation.text_table import printable
from zest_fast.integrations.data.sources import digest_of_data
from zest_fast.integrations.merging import DataSettings, merge_folder, save_model_folder
from zest_fast.integrations.pretrained import downloaded_folder
from zest_fast.lean.master_weights import LOW
from zest_fast.planning.report import Plan
from zest_fast.probing.collecting import collect
from zest_fast.profiling.heads import find_head, is_language_model
from zest_fast.ranking.ranking import Ranking
from zest_fast.streaming.checkpoints import read_packed

_RUN_STATES = 4  # times what trains: weights, two moments, a float32 master


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for.

    layers: None = the `top` ones of a ranking, by a metric or (by=None) by the Ranker that ships.
    head: "auto", "none", or the names of modules, separated by commas.
    probe: the share of a sweep's cost that a probe may take, to be mixed into that ranking; None = no probe.
    prefer, checkpoint, frozen: as for `choose` and SelectiveBackward.
    dial: --max-memory, which settles checkpoint, frozen, stream and cache; None = they are as they are. saving: what it
    has found, for report, recipe and a run that goes on.
    cache, cache_limit: folder and limit of a PrefixCache; None = no cache.
    schedule, warmup: of the learning rate. accumulate: batches of a step.
    masters: float32 masters of what trains in bfloat16 or float16.
    save_model: a folder for the tuned model; None = the delta alone. save_every: steps; None = never.
    resume: the file of an interrupted run, and what it says. dry_run: stop before training.
    data_settings: how data became batches. params: those of the command; written: those that were written on the
    command parameters of the line, for the notes on those without effect.
    """

    layers: Sequence[str] | None
    head: str
    by: str | None
    probe: float | None
    top: int
    prefer: Preference
    dial: Dial | None
    checkpoint: Checkpoint | None
    frozen: Frozen | None
    cache: Path | None
    cache_limit: str
    epochs: int
    steps: int | None
    lr: float
    schedule: str
    warmup: float
    accumulate: int
    masters: bool
    out: Path
    save_model: Path | None
    save_every: int | None
    resume: tuple[Path, runs.Progress] | None
    dry_run: bool
    model: str
    data: str
    stream: bool
    data_settings: DataSettings
    params: dict[str, Any]
    written: Collection[str]
    saving: dict[str, Any] | None = None

    @property
    def own_cache(self) -> Path | None:
        """The folder of the cache that the dial has made up, which goes when the run is over."""
        own = (self.saving or {}).get("own_cache")
        return None if own is None else Path(own)


@dataclass(frozen=True)
class Choice:
    """What trains and why. ranking: a Ranking, or what a run says of one; None where layers were named."""

    layers: Sequence[str]
    head: str | list[str] | None
    ranking: Any = None
    explanation: str | None = None

    @property
    def by(self) -> str | None:
        return self.ranking.by if isinstance(self.ranking, Ranking) else (self.ranking or {}).get("by")

    @property
    def note(self) -> str | None:
        return self.ranking.note if isinstance(self.ranking, Ranking) else (self.ranking or {}).get("note")


def settings_of_job(job: Job, params: Mapping[str, Any]) -> DataSettings:
    """What a delta says of the data that it was trained on."""
    frozen = params["frozen"]
    if params["stream"]:
        packed = read_packed(downloaded_folder(params["model"]) or Path(params["model"]))
        frozen = None if packed is None else packed.format
    return DataSettings(
        task=job.loaded.task,
        text_column=",".join(job.form.texts) if job.form else params["text_column"],
        label_column=(",".join(job.form.labels) or None) if job.form else params["label_column"],
        chat_template=params["chat_template"],
        split=params["split"],
        config=params["config"],
        max_length=params["max_length"],
        image_size=params["image_size"],
        batch_size=params["batch_size"],
        seed=params["seed"],
        validation_share=params["validation_share"] if job.own_batches and not job.own_validation else 0.0,
        digest=digest_of_data(params["data"], split=params["split"], config=params["config"]),
        new_head=job.loaded.new_head,
        frozen=frozen,
    )


def finetune_job(job: Job, wanted: Wanted, console: Console) -> dict[str, Any]:
    """Trains what is wanted and the head; returns the report, ready for JSON."""
    if wanted.save_model is not None and not hasattr(job.model, "save_pretrained"):
        raise ValueError(
            f"--save-model: {wanted.model} is a {type(job.model).__name__} without save_pretrained, of which no folder "
            "can be made; leave it out, and put the delta into the model with zest_fast.apply_delta"
        )
    choice, batch = _choose(job, wanted, console)
    found = None
    if wanted.dial is not None and wanted.resume is None:
        _check(job, choice)
        turned = turn(
            job,
            wanted,
            choice,
            console,
            optimizer=_planned_optimizer(job, wanted),
            steps=_passes(job, wanted),
            again=partial(_exchanged, job, wanted, choice),
        )
        job, wanted, choice, found = turned.job, turned.wanted, turned.choice, turned.plan
    lines, planned = _plan(job, wanted, choice, batch, console, found)
    batch = None  # which may lie on a GPU
    if wanted.dry_run:
        _say(console, job, wanted, lines)
        return _dry_report(job, wanted, choice, planned)
    kept = None
    if wanted.cache is not None:
        kept = PrefixCache(wanted.cache, limit=wanted.cache_limit, samples=_samples(job), eval_prefix=True)
    options: dict[str, Any] = {"checkpoint": wanted.checkpoint, "frozen": wanted.frozen, "cache": kept}
    with (
        _own_cache(wanted) as is_needed,
        SelectiveBackward(job.model, choice.layers, head=choice.head, **options) as tuned,
    ):
        run = _Run(job, wanted, console, choice, tuned, kept)
        try:
            return run.report(lines, planned)
        except BaseException:
            is_needed.append(run.saved_at > 0)
            raise


@contextmanager
def _own_cache(wanted: Wanted) -> Iterator[list[bool]]:
    """Removes, at the end, what the dial has made up, but for a run that can go on."""
    own, is_needed = wanted.own_cache, list[bool]()
    try:
        yield is_needed
    finally:
        if own is not None and not any(is_needed):
            shutil.rmtree(own, ignore_errors=True)


def _say(console: Console, job: Job, wanted: Wanted, lines: Sequence[str]) -> None:
    """What will be done and what to know about it, once nothing is refused any more: an error is one line."""
    for text in lines:
        show.line(console, text)
    show.notes(console, job, wanted.written)


class _Run:
    """One training, from the first score to the saved delta and folder."""

    def __init__(
        self,
        job: Job,
        wanted: Wanted,
        console: Console,
        choice: Choice,
        tuned: SelectiveBackward,
        kept: PrefixCache | None,
    ) -> None:
        self.job, self.wanted, self.console, self.choice, self.tuned, self.kept = (
            job,
            wanted,
            console,
            choice,
            tuned,
            kept,
        )
        self.total = _steps(job, wanted)
        self.recipe: dict[str, Any] = {
            "optimizer": "AdamW",
            "lr": wanted.lr,
            "schedule": wanted.schedule,
            "warmup": wanted.warmup,
            "accumulate": wanted.accumulate,
            "planned_steps": self.total,
            "model": wanted.model,
            "batch_size": wanted.data_settings.batch_size,
            "saving": _without_paths(wanted.saving),
        }
        self.losses: list[float] = []
        self.scheduler: Any = None
        self.before: dict[str, Any] | None = None
        self.planned: dict[str, Any] | None = None
        self.run_file = runs.run_file(wanted.out)
        self._resumable = self.run_file if wanted.resume is None else wanted.resume[0]
        self.saved_at = 0 if wanted.resume is None else len(wanted.resume[1].losses)  # the step of the run's last file

    def report(self, lines: Sequence[str], planned: dict[str, Any] | None) -> dict[str, Any]:
        job, wanted, tuned, choice = self.job, self.wanted, self.tuned, self.choice
        parameters = list(tuned.parameters())
        optimizer = optimizer_for(parameters, wanted.lr, masters=wanted.masters)
        self.scheduler = scheduler_for(optimizer, wanted.schedule, wanted.warmup, self.total)
        self.recipe["masters"] = "float32" if getattr(optimizer, "master_weights", False) else None
        _check_space(wanted, parameters, job.model)
        _say(self.console, job, wanted, lines)
        self._say_masters(optimizer)
        place = None
        if wanted.resume is None:
            self.before, self.planned = _score(job, wanted), planned
        else:
            file, found = wanted.resume
            place, self.before, self.planned = found.place, found.before, found.planned
            if len(found.losses) >= self.total:
                raise ValueError(f"--resume {file} was at step {len(found.losses)} of {self.total} already: it is over")
        training = self._train(parameters, optimizer, place)
        saved, not_there = save_somewhere(lambda path: self._save(path, steps=len(self.losses)), wanted.out)
        try:
            if training is None:
                raise KeyboardInterrupt
            after = _score(job, wanted)  # when the weights are safe already
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"training was over, and the trained layers are saved as {saved}") from None
        cut, problem = tuned.cut, _problem(tuned)
        folder, no_folder = self._save_folder(saved)
        return {
            "layers": list(choice.layers),
            "by": choice.by,
            "note": choice.note,
            "choice": choice.explanation,
            "saving": wanted.saving,
            "plan": self.planned,
            "trainable": list(tuned.trainable_names),
            "cut": cut,
            "trainable_parameters": sum(parameter.numel() for parameter in parameters),
            "parameters": sum(parameter.numel() for parameter in job.model.parameters()),
            "steps": len(self.losses),
            "training_loss": self.losses,
            "before": self.before,
            "after": after,
            "seconds_per_step": training.seconds_per_step,
            "peak_memory_bytes": training.peak_memory,
            "cache": None if self.kept is None else str(self.kept),
            "device": str(job.device),
            "delta": str(saved),
            "not_saved": None if not_there is None else f"{wanted.out} could not be written ({_reason(not_there)})",
            "model": folder,
            "model_not_saved": no_folder,
            "verified": problem is None,
            "problem": problem,
        }

    def _say_masters(self, optimizer: Any) -> None:
        masters = getattr(optimizer, "master_bytes", 0)
        text = f"what trains keeps float32 masters ({masters / 2**20:,.1f} MiB), so that no step is rounded away"
        if not masters:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                text = self.tuned.summary(optimizer).rounding
        if text:
            show.note(self.console, text)
        if any(parameter.dtype == torch.float16 for parameter in self.tuned.parameters()):
            show.note(
                self.console, "float16: the loss is not scaled, and gradients below 6e-8 are lost; bfloat16 keeps them"
            )

    def _train(self, parameters: list[Any], optimizer: Any, place: Any) -> Any:
        """The Training; None where Ctrl-C came in the last step. Raises KeyboardInterrupt that says what was saved."""
        wanted, kept = self.wanted, self.kept
        with listening() as interrupts, _progress(self.console, self.total) as report:

            def told(step: int, loss: float, here: Callable[[], dict[str, Any]]) -> None:
                if step == 1 and kept is not None:
                    self.console.print(f"note: cache: {printable(kept.forecast)}", highlight=False, markup=False)
                report(step, loss)
                if wanted.save_every is not None and step % wanted.save_every == 0 and step < self.total:
                    self._save_run(optimizer, here())

            def resume() -> None:
                assert wanted.resume is not None
                self.tuned.resume(wanted.resume[0], optimizer, self.scheduler)
                self.losses.extend(wanted.resume[1].losses)

            try:
                training = train(
                    self.job.model,
                    optimizer,
                    self.job.loaders.train,
                    epochs=wanted.epochs,
                    steps=wanted.steps,
                    lr=wanted.lr,
                    device=self.job.device,
                    report=told,
                    losses=self.losses,
                    stop=lambda: interrupts.happened,
                    place=place,
                    resume=resume,
                    accumulate=wanted.accumulate,
                    scheduler=self.scheduler,
                    task=self.job.loaded.task,
                )
            except Exception as error:
                if not interrupts.happened:
                    if not self.losses:
                        raise
                    raise self._with_what_was_saved(error) from error
                # The workers of a DataLoader hear Ctrl-C, too, and their end is an error here.
                training = None
            if training is not None and interrupts.happened and self.saved_at < len(self.losses) < self.total:
                self._save_run(optimizer, training.place)
        if len(self.losses) >= self.total and interrupts.happened:
            return None
        if training is None or interrupts.happened:
            raise KeyboardInterrupt(self._save_partial())
        return training

    def _save(self, path: Path, **more: Any) -> None:
        settings = {key: value for key, value in asdict(self.wanted.data_settings).items() if value is not None}
        names = self.job.loaded.class_names or ()
        recipe = {**self.recipe, **more, "record": training_record(self.planned, self.before, self.losses)}
        self.tuned.save(path, ranking=self.choice.ranking, recipe=recipe, class_names=names, data=settings)

    def _save_run(self, optimizer: Any, place: dict[str, Any]) -> None:
        """The state from which `--resume` goes on; where it cannot be written, training goes on all the same."""
        choice, wanted = self.choice, self.wanted
        heads = head_layers(self.job.model, choice.head)
        progress = runs.Progress(
            kind=runs.KIND,
            options={name: wanted.params[name] for name in runs.OPTIONS},
            data=wanted.data,
            digest=wanted.data_settings.digest,
            layers=list(choice.layers),
            head=[part.name for part in heads],
            cached=wanted.cache is not None,
            ranking=_plain_ranking(choice.ranking),
            explanation=choice.explanation,
            before=self.before,
            losses=list(self.losses),
            place=place,
            planned=self.planned,
            saving=wanted.saving,
        )
        try:
            self.tuned.save_run(self.run_file, optimizer, self.scheduler, progress=progress.plain())
            self.saved_at, self._resumable = len(self.losses), self.run_file
        except OSError as error:
            show.note(self.console, f"{self.run_file} could not be written ({_reason(error)})")

    def _save_partial(self) -> str:
        """Saves what an unfinished run has trained beside `out`, marked as such in its recipe; says where."""
        done, out = len(self.losses), self.wanted.out
        if not done:
            return "no step was done, nothing is saved"
        path = out.with_name(f"{out.stem}.interrupted{out.suffix}")
        saved, _ = save_somewhere(lambda file: self._save(file, steps=done, interrupted=True), path)
        again = f"--resume {self._resumable} goes on after step {self.saved_at}; " if self.saved_at else ""
        return f"{again}the layers as they were after step {done} of {self.total} are saved as {saved}"

    def _with_what_was_saved(self, error: Exception) -> Exception:
        """The error that ended the training, and where the steps before it are."""
        try:
            told = self._save_partial()
        except (OSError, RuntimeError) as failure:  # a disk is full, or what was trained is not finite
            told = f"what was trained until then is not saved ({failure})"
        text = str(error) or type(error).__name__
        return RuntimeError(f"{text}; {told}")

    def _save_folder(self, delta: Path) -> tuple[str | None, str | None]:
        """The folder of the tuned model and why it was not written. The delta is there: nothing is lost."""
        out = self.wanted.save_model
        if out is None:
            return None, None
        loaded = self.job.loaded
        try:
            if self.wanted.stream:  # of mapped weights: from the files that they are in
                merge_folder(str(downloaded_folder(self.wanted.model)), delta, out)
            else:
                self.tuned.remove()  # plain weights in the place of packed ones
                save_model_folder(loaded, out, loaded.class_names or ())
        except Exception as error:  # whatever save_pretrained of a stranger's model raises: the delta is there
            reason = _reason(error) if isinstance(error, OSError) else _first_line(error)
            return None, f"--save-model {out} could not be written ({reason})"
        return str(out), None


def _choose(job: Job, wanted: Wanted, console: Console) -> tuple[Choice, Any]:
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


def _exchanged(job: Job, wanted: Wanted, choice: Choice, layers: Any) -> Choice:
    """With these layers instead, as `choose` returns them."""
    return replace(choice, layers=layers, head=_head(job, wanted.head, layers), explanation=layers.explanation)


def _check(job: Job, choice: Choice) -> None:
    """Raises what SelectiveBackward would."""
    chosen_layers(job.model, choice.layers)
    head_layers(job.model, choice.head)


def _plan(
    job: Job, wanted: Wanted, choice: Choice, batch: Any, console: Console, found: Plan | None = None
) -> tuple[list[str], dict[str, Any] | None]:
    """Lines that say what will train, why, and what a step will hold; and the latter for the report.

    found: a plan that is there already. None where none can be made: not every model runs on tensors without contents.
    """
    _check(job, choice)
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
                    optimizer=_planned_optimizer(job, wanted),
                    checkpoint=wanted.checkpoint,
                    frozen=wanted.frozen,
                    accumulating=wanted.accumulate > 1,
                )
        except Exception as error:  # of a model whose code needs values, whatever that raises
            lines.append(f"plan: none can be made of this model ({type(error).__name__}: {_first_line(error)})")
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


def _planned_optimizer(job: Job, wanted: Wanted) -> str:
    low = wanted.masters and any(parameter.dtype in LOW for parameter in job.model.parameters())
    return "adamw-masters" if low else "adamw-foreach" if job.device.type == "cuda" else "adamw"


def _dry_report(job: Job, wanted: Wanted, choice: Choice, planned: dict[str, Any] | None) -> dict[str, Any]:
    parts = (*chosen_layers(job.model, choice.layers), *head_layers(job.model, choice.head))
    names = {id(parameter): name for name, parameter in job.model.named_parameters()}
    return {
        "dry_run": True,
        "layers": list(choice.layers),
        "by": choice.by,
        "note": choice.note,
        "choice": choice.explanation,
        "trainable": list(dict.fromkeys(names[id(parameter)] for part in parts for parameter in part.parameters)),
        "saving": wanted.saving,
        "plan": planned,
        "device": str(job.device),
        "class_names": job.loaded.class_names,
    }


def _check_space(wanted: Wanted, parameters: Sequence[Any], model: Any) -> None:
    """Raises ValueError where the disk has no room for what is saved in the end, before hours are spent on it."""
    trained = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    runs_too = _RUN_STATES * sum(4 * parameter.numel() for parameter in parameters)
    needs = {wanted.out: ("--out", trained + (runs_too if wanted.save_every is not None else 0))}
    if wanted.save_model is not None:
        whole = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        needs[wanted.save_model] = ("--save-model", whole)
    for path, (written, size) in needs.items():
        with suppress(OSError):
            free = shutil.disk_usage(Path(os.path.realpath(path)).parent).free
            if free < size:
                raise ValueError(
                    f"{written} {path} will take about {math.ceil(size / 2**20):,} MiB, and {free / 2**20:,.0f} MiB "
                    "are free there; name another disk or make room"
                )


def _without_paths(saving: dict[str, Any] | None) -> dict[str, Any] | None:
    """For a file that others get."""
    return None if saving is None else {name: value for name, value in saving.items() if name != "own_cache"}


def _plain_ranking(ranking: Any) -> Any:
    return ranking.plain() if isinstance(ranking, Ranking) else ranking


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")[:200]


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


def _steps(job: Job, wanted: Wanted) -> int:
    """Of the whole run."""
    return wanted.steps or steps_of(_rounds_length(job), wanted.epochs, wanted.accumulate)


def _passes(job: Job, wanted: Wanted) -> int:
    """Of the whole run, of which a step takes several: what a cache saves. The last step may take fewer."""
    return wanted.steps * wanted.accumulate if wanted.steps else _rounds_length(job) * wanted.epochs


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


def _score(job: Job, wanted: Wanted) -> dict[str, Any] | None:
    """None where there is no validation data. Within --max-memory, as far as that is a matter of the batch."""
    if job.loaders.validation is None:
        return None
    names: dict[str, Any] = {"task": job.loaded.task, "class_names": job.loaded.class_names}
    names["one_by_one"] = job.own_batches and wanted.saving is not None
    return evaluate(job.model, job.loaders.validation, job.device, **names).plain()


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
