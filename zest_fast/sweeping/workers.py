"""Trials dealt out to workers that may die. No worker writes records: the caller saves each result as it arrives."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from zest_fast.sweeping.trials import Trial, Trials

Result = dict[str, float]
DEATHS = 3
"""So many workers may die in one trial before the sweep gives up."""


@dataclass(frozen=True)
class Died:
    """What came of a trial whose worker is gone."""

    reason: str


class Pool(Protocol):
    """Workers by number. What a trial raises, `wait` raises; a worker that dies is an outcome."""

    size: int

    def start(self, worker: int, trial: Trial) -> None: ...

    def wait(self) -> list[tuple[int, Result | Died]]:
        """Outcomes of started trials, at least one."""
        ...

    def replace(self, worker: int) -> None:
        """Put a new worker in the place of one that died."""
        ...


def distribute(trials: Iterable[Trial], pool: Pool, save: Callable[[Trial, Result], None]) -> None:
    """Run each trial once; one whose worker dies is done by another.

    Raises RuntimeError where DEATHS workers died in the same trial.
    """
    waiting = list(trials)
    running: dict[int, Trial] = {}
    deaths: Counter[Trial] = Counter()
    layers: dict[int, str] = {}
    """What each worker did last."""
    while waiting or running:
        for worker in range(pool.size):
            if waiting and worker not in running:
                trial = _next(waiting, layers.get(worker), {trial.layer for trial in running.values()})
                waiting.remove(trial)
                running[worker], layers[worker] = trial, trial.layer
                pool.start(worker, trial)
        for worker, outcome in pool.wait():
            trial = running.pop(worker)
            if not isinstance(outcome, Died):
                save(trial, outcome)
                continue
            deaths[trial] += 1
            if deaths[trial] == DEATHS:
                raise RuntimeError(
                    f"{DEATHS} workers died while they trained {trial.layer!r} with seed {trial.seed} (the last one: "
                    f"{outcome.reason}); what is finished is recorded. Is there memory for so many workers? Sweep with "
                    "fewer, or with workers=1 to see what happens"
                )
            waiting.insert(0, trial)
            pool.replace(worker)


def _next(waiting: list[Trial], last: str | None, busy: set[str]) -> Trial:
    """The layer that the worker did last, else one that no other is at: each boundary is reached by few workers."""
    same = (trial for trial in waiting if trial.layer == last)
    free = (trial for trial in waiting if trial.layer not in busy)
    return next(same, next(free, waiting[0]))


# What workers share that are no copies of this process


@contextmanager
def current_folder_not_first() -> Iterator[None]:
    """For processes of Python that are started within, and theirs.

    `python -c` and `-m` look into the current folder first, where a file of the user's called random.py would be run in
    the place of the real module. What the caller may import from there is told to them by its path.
    """
    name = "PYTHONSAFEPATH"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def naming_what_cannot_be_sent() -> Iterator[None]:
    """ValueError instead of what pickling raises."""
    try:
        yield
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"the model cannot be sent to other processes ({error}): define its classes and functions at the top of a "
            "module, remove hooks that are closures, or sweep with workers=1"
        ) from error


def attempt(trials: Trials, trial: Trial) -> Result | Exception:
    """What came of a trial, an exception among it, in a form that can be sent back."""
    try:
        return trials.run(trial)
    except Exception as error:
        return as_sent(error)


def as_sent(error: Exception) -> Exception:
    """The exception, or one with its words where it does not come through pickle (it has arguments of its own)."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def keep_caches_here(trials: Trials) -> None:
    """In the temporary folder where that of the records is missing, which only the machine of the caller may have."""
    if not trials.folder.is_dir():
        trials.folder = Path(tempfile.gettempdir())
