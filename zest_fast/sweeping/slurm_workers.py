"""Workers that are jobs of Slurm, submitted by `submitit` as one array: the same trials, on the machines of a cluster.

A job that waits in the queue has no trial, so that nobody waits for it. Jobs end in many ways on a cluster (time limit,
preemption, lost machine), so one that is over is replaced by a new one, with a mailbox of its own.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zest_fast.sweeping.slurm_job import POLL, Mailbox, Order, Report, Terms, pack, read, work, write
from zest_fast.sweeping.trials import Trial, Trials
from zest_fast.sweeping.workers import DEATHS, Died, Result, current_folder_not_first

_OF_ALL_CLUSTERS = (
    "name",
    "timeout_min",
    "mem_gb",
    "nodes",
    "cpus_per_task",
    "gpus_per_node",
    "tasks_per_node",
    "stderr_to_stdout",
)
"""Options that submitit takes as they are; the others are Slurm's own, and it wants them with `slurm_` before."""
_BEAT = 10.0  # seconds between signs of life, of which jobs miss some thirty before they leave
_LOOK = 2.0  # seconds between looks at how the jobs are
_FORCED = 60.0  # seconds after which Slurm itself is asked; submitit alone would let ten minutes pass
_GRACE = 10.0  # seconds for jobs to go home


@dataclass(frozen=True)
class SlurmJobs:
    """How many jobs, and how they are to be submitted; checked by `slurm_jobs`."""

    count: int
    folder: Path
    cluster: str
    options: Mapping[str, Any]

    @property
    def threads(self) -> int:
        return int(self.options.get("cpus_per_task") or 1)


def slurm_jobs(workers: int | str, options: Mapping[str, Any] | None) -> SlurmJobs:
    """What `workers="slurm:8"` and the options with it ask for, by submitit's own check; nothing is submitted.

    Raises ValueError or TypeError where they do not fit, ImportError without submitit, RuntimeError without Slurm.
    """
    count = _count(workers)
    if options is None:
        options = {}
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise TypeError(f"slurm is {options!r}; a mapping of submitit's options is needed")
    try:
        import submitit  # noqa: F401
    except ImportError as error:
        raise ImportError(f"workers={workers!r} needs submitit: pip install 'zest_fast[slurm]'") from error
    chosen = {name.removeprefix("slurm_"): value for name, value in options.items()}
    if len(chosen) < len(options):
        raise ValueError(f"slurm names an option twice, with and without 'slurm_': {', '.join(sorted(options))}")
    folder = _shared_folder(chosen.pop("folder", None))
    cluster = chosen.pop("cluster", "slurm")
    if cluster not in ("slurm", "local"):
        raise ValueError(f"slurm: cluster is {cluster!r}; 'slurm', or 'local' for processes of this machine, is needed")
    for name in ("nodes", "tasks_per_node", "ntasks_per_node"):
        if chosen.get(name) not in (None, 1):
            raise ValueError(f"slurm: {name} is {chosen[name]!r}; a worker is one process, for more ask 'slurm:N'")
    if all(chosen.get(name) is None for name in ("timeout_min", "time")):
        raise ValueError(
            "slurm lacks timeout_min, after which a job ends and another one takes its place: the minutes of a few "
            "trials at least, at most what the cluster allows"
        )
    jobs = SlurmJobs(count, folder, cluster, chosen)
    _executor(jobs, folder)
    return jobs


def _count(workers: int | str) -> int:
    name, _, count = str(workers).partition(":")
    if name != "slurm":
        raise ValueError(f"slurm is for workers='slurm:N'; workers is {workers!r}")
    if not (count.isascii() and count.isdecimal() and int(count) > 0):
        raise ValueError(f"workers is {workers!r}; 'slurm:8' asks for eight jobs")
    return int(count)


def _shared_folder(given: Any) -> Path:
    if not isinstance(given, str | os.PathLike) or not os.fspath(given):
        raise ValueError(
            "slurm lacks the folder that all machines of the cluster share (often one in your home), in which jobs get "
            f"their trials: {given!r} is none"
        )
    folder = Path(os.path.abspath(Path(given).expanduser()))
    if "%" in str(folder):
        raise ValueError(f"slurm: folder {str(folder)!r} has a % in it, which Slurm replaces; choose another one")
    try:
        with tempfile.TemporaryDirectory(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"slurm: in folder {str(folder)!r} nothing can be written ({error.strerror or error}); make it, or name "
            "one that all machines of the cluster share"
        ) from error
    return folder


def _executor(jobs: SlurmJobs, folder: Path) -> Any:
    """submitit's, whose logs go into `folder`."""
    import submitit

    # A job that Slurm starts anew by itself would not be counted where a trial kills one after the other.
    options = {"name": "zest-fast-sweep", **jobs.options}
    try:
        options["additional_parameters"] = {"no-requeue": True, **(options.get("additional_parameters") or {})}
        executor = submitit.AutoExecutor(folder=folder, cluster=jobs.cluster)
        executor.update_parameters(
            **{name if name in _OF_ALL_CLUSTERS else f"slurm_{name}": value for name, value in options.items()}
        )
    except (NameError, ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"slurm: {str(error).splitlines()[0]}") from error
    except RuntimeError as error:
        raise RuntimeError(
            f"workers='slurm:{jobs.count}' needs a machine that submits jobs to Slurm ({error}); slurm={{'cluster': "
            "'local', ...} tries the same with processes of this machine"
        ) from error
    return executor


@dataclass(eq=False)
class _Job:
    handle: Any
    """submitit's."""
    mailbox: Mailbox
    ready: bool = False
    """It runs, and takes orders."""
    number: int = 0
    """Of its last order."""
    worker: int | None = None
    """Whose trial it is at."""
    layer: str | None = None
    """What it did last."""

    def send(self, trial: Trial | None) -> None:
        self.number += 1
        write(self.mailbox.order, Order(self.number, trial))


class SlurmPool:
    """As many trials at a time as there are to be jobs; a job that runs takes the next one that waits.

    executor: submitit's. folder: what all jobs and this process share, with the trials in it.
    Raises RuntimeError where jobs cannot be submitted, or end before they have begun.
    """

    def __init__(self, executor: Any, folder: Path, size: int) -> None:
        self.size = size
        self._executor = executor
        self._folder = folder
        self._jobs: list[_Job] = []
        self._waiting: dict[int, Trial] = {}
        """By worker, which is nothing but a number here."""
        self._mailboxes = 0
        self._in_vain = 0
        """Jobs that ended without a trial, since the last outcome."""
        self._last_words = ""
        self._beats = 0
        self._next_beat = self._next_look = self._next_forced = 0.0

    def start(self, worker: int, trial: Trial) -> None:
        self._waiting[worker] = trial

    def replace(self, worker: int) -> None:
        """Jobs are replaced by what waits for them."""

    def wait(self) -> list[tuple[int, Result | Died]]:
        while True:
            try:
                self._give_a_sign_of_life()
                self._deal()
                self._submit()
                outcomes = self._collect()
            except OSError as error:
                raise RuntimeError(
                    f"slurm: {str(self._folder)!r} cannot be written ({error.strerror or error}); what is finished is "
                    "recorded: make room, or name another folder"
                ) from error
            finished = [(worker, outcome) for worker, outcome in outcomes if not isinstance(outcome, Exception)]
            if len(finished) < len(outcomes):
                raise next(outcome for _, outcome in outcomes if isinstance(outcome, Exception))
            if finished:
                return finished
            time.sleep(POLL)

    def _give_a_sign_of_life(self) -> None:
        if time.monotonic() >= self._next_beat:
            self._beats += 1
            write(self._folder / "alive", self._beats)
            self._next_beat = time.monotonic() + _BEAT

    def _deal(self) -> None:
        """A job stays with the layer that it did last, where a trial of it waits."""
        for job in self._jobs:
            if self._waiting and job.ready and job.worker is None:
                same = (worker for worker, trial in self._waiting.items() if trial.layer == job.layer)
                worker = next(same, next(iter(self._waiting)))
                trial = self._waiting.pop(worker)
                job.worker, job.layer = worker, trial.layer
                job.send(trial)

    def _submit(self) -> None:
        """Jobs for the trials that wait, unless those that were submitted ended in vain."""
        free = sum(job.worker is None for job in self._jobs)
        missing = min(len(self._waiting) - free, self.size - len(self._jobs))
        if missing <= 0:
            return
        if self._in_vain >= DEATHS:
            if self._jobs:
                return  # until one of them has done something
            raise RuntimeError(
                f"{self._in_vain} jobs ended before they had begun (the last one: {self._last_words}); what is "
                f"finished is recorded. Do the machines of the cluster share {str(self._folder.parent)!r}, and find "
                "this Python with zest_fast in it?"
            )
        mailboxes = [self._mailbox() for _ in range(missing)]
        names = [mailbox.folder.name for mailbox in mailboxes]
        from submitit.helpers import clean_env

        try:
            # A sweep may run inside a job itself; jobs get the environment of who submits them.
            with clean_env(), current_folder_not_first():
                handles = self._executor.map_array(work, [self._folder] * missing, names)
        except (RuntimeError, OSError) as error:
            if not self._jobs:
                raise RuntimeError(f"slurm: the jobs cannot be submitted: {error}") from error
            self._in_vain, self._last_words = max(self._in_vain, DEATHS), str(error)
            warnings.warn(f"slurm: a job cannot be replaced ({error}); the others go on", stacklevel=2)
            return
        self._jobs += [_Job(handle, mailbox) for handle, mailbox in zip(handles, mailboxes, strict=True)]

    def _mailbox(self) -> Mailbox:
        mailbox = Mailbox(self._folder / f"mailbox-{self._mailboxes}")
        mailbox.make()
        self._mailboxes += 1
        return mailbox

    def _collect(self) -> list[tuple[int, Result | Died | Exception]]:
        over = self._over()  # before the mailboxes are read: what a job wrote last is there by then
        outcomes: list[tuple[int, Result | Died | Exception]] = []
        for job in list(self._jobs):
            report = read(job.mailbox.report)
            if report is not None:
                outcomes += self._read(job, report)
            if job in over:
                outcomes += self._bury(job)
        return outcomes

    def _over(self) -> list[_Job]:
        now = time.monotonic()
        if now < self._next_look or not self._jobs:
            return []
        self._next_look = now + _LOOK
        if now >= self._next_forced:
            self._jobs[0].handle.done(force_check=True)  # of all jobs at once
            self._next_forced = now + _FORCED
        return [job for job in self._jobs if _is_over(job.handle)]

    def _read(self, job: _Job, report: Report) -> list[tuple[int, Result | Died | Exception]]:
        if job.number == 0:
            job.ready = True
        if job.worker is None or report.number != job.number:
            return []
        worker, job.worker = job.worker, None
        job.ready = not report.leaving
        self._in_vain = 0
        for text in report.warnings:
            warnings.warn(text, stacklevel=2)
        assert report.outcome is not None
        return [(worker, report.outcome)]

    def _bury(self, job: _Job) -> list[tuple[int, Result | Died | Exception]]:
        self._jobs.remove(job)
        _cancel(job.handle)  # it may be suspended only
        words = _words(job.handle)
        if job.worker is not None:
            return [(job.worker, Died(words))]
        if not job.ready and job.number == 0:
            self._in_vain += 1
            self._last_words = words
        return []

    def close(self) -> None:
        """Jobs without a trial are sent home, the others cancelled."""
        for job in self._jobs:
            if job.ready and job.worker is None:
                with suppress(OSError):
                    job.send(None)
            else:
                _cancel(job.handle)
        until = time.monotonic() + _GRACE
        while self._jobs and time.monotonic() < until:
            time.sleep(POLL)
            self._next_look = 0.0
            over = self._over()
            self._jobs = [job for job in self._jobs if job not in over]
        for job in self._jobs:
            _cancel(job.handle)


@contextmanager
def slurm_pool(trials: Trials, jobs: SlurmJobs) -> Iterator[SlurmPool]:
    """The jobs are gone at the end, and what was written for them; after an error it stays, for the logs in it."""
    folder = Path(tempfile.mkdtemp(prefix="zest-sweep-", dir=jobs.folder))
    failed = False
    try:
        pack(folder, trials, Terms.of_this_process(jobs.threads))
        pool = SlurmPool(_executor(jobs, folder / "logs"), folder, min(jobs.count, len(trials.left())))
        try:
            yield pool
        except Exception:
            failed = True
            raise
        finally:
            pool.close()
    finally:
        if failed:
            warnings.warn(f"logs and model of the jobs are kept in {str(folder)!r}, for you to remove", stacklevel=2)
        else:
            _remove(folder)


def _remove(folder: Path) -> None:
    for _ in range(5):  # a job may write the end of its log
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(POLL)
    warnings.warn(f"{str(folder)!r} cannot be removed entirely; that is left to you", stacklevel=2)


def _is_over(handle: Any) -> bool:
    """submitit takes a preempted job for one that will be started again, which ours are not."""
    return handle.done() or handle.state.upper().startswith("PREEMPTED")


def _cancel(handle: Any) -> None:
    with suppress(OSError):  # no scancel here
        handle.cancel(check=False)


def _words(handle: Any) -> str:
    """What Slurm calls the end of a job, and the last line of its log."""
    words = f"job {handle.job_id} is over (state {handle.state}"
    with suppress(OSError):
        lines = handle.paths.stderr.read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), None)
        words += f", last words: {last}" if last else ""
    return f"{words})"
