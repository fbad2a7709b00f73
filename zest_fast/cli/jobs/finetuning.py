"""What `zest-fast finetune` does with an opened job: profile, rank, plan, train, save, report."""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from zest_fast import PrefixCache, SelectiveBackward
from zest_fast.cli import show
from zest_fast.cli.jobs import runs
from zest_fast.cli.jobs.choosing import (
    check_choice,
    choose_layers,
    exchanged,
    passes_of_run,
    plan_lines,
    planned_optimizer,
    steps_of_run,
)
from zest_fast.cli.jobs.dial import turn
from zest_fast.cli.jobs.interrupts import listening
from zest_fast.cli.jobs.job import Job
from zest_fast.cli.jobs.record import training_record
from zest_fast.cli.jobs.saving import save_somewhere
from zest_fast.cli.jobs.scores import evaluate
from zest_fast.cli.jobs.training import optimizer_for, scheduler_for, train
from zest_fast.cli.jobs.wanted import Choice, Wanted
from zest_fast.finetuning.trainable_layers import chosen_layers, head_layers
from zest_fast.foundation.text_table import first_line, printable
from zest_fast.integrations.data.sources import digest_of_data
from zest_fast.integrations.merging import DataSettings, merge_folder, save_model_folder
from zest_fast.integrations.pretrained import downloaded_folder
from zest_fast.ranking.ranking import Ranking
from zest_fast.streaming.checkpoints import read_packed

_RUN_STATES = 4  # times what trains: weights, two moments, a float32 master


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
    choice, batch = choose_layers(job, wanted, console)
    found = None
    if wanted.dial is not None and wanted.resume is None:
        check_choice(job, choice)
        turned = turn(
            job,
            wanted,
            choice,
            console,
            optimizer=planned_optimizer(job, wanted),
            steps=passes_of_run(job, wanted),
            again=partial(exchanged, job, wanted, choice),
        )
        job, wanted, choice, found = turned.job, turned.wanted, turned.choice, turned.plan
    lines, planned = plan_lines(job, wanted, choice, batch, console, found)
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
        self.total = steps_of_run(job, wanted)
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
            reason = _reason(error) if isinstance(error, OSError) else first_line(error, "no message")[:200]
            return None, f"--save-model {out} could not be written ({reason})"
        return str(out), None


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


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _problem(tuned: SelectiveBackward) -> str | None:
    """What `.verify()` has to say: what was trained is saved either way."""
    try:
        tuned.verify()
    except RuntimeError as error:
        return str(error)
    return None


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
