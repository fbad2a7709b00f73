"""What runs in a job of Slurm: trials that come through a mailbox, files in a folder that its machine and the caller's
share.

A mailbox has two files, each replaced whole by its one writer: `order`, what the job is to do, and `report`, what came
of it. Both are there from the start, since a network file system looks anew at a file that is opened, but may answer
from memory that there is none. A job that Slurm starts a second time finds its order as it was, and does it again.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from zest_fast.foundation.version import __version__
from zest_fast.sweeping.trials import Trial, Trials
from zest_fast.sweeping.workers import Result, as_sent, attempt, keep_caches_here, naming_what_cannot_be_sent

POLL = 0.2  # seconds between looks into a mailbox
_PATIENCE = 300.0  # seconds without a sign of life from the caller; its files may be seen late


class Order(NamedTuple):
    """The trials of a job are numbered from 1; no trial = go home."""

    number: int
    trial: Trial | None = None


class Report(NamedTuple):
    number: int
    """Of the order; 0 = begun, waiting for the first one."""
    outcome: Result | Exception | None = None
    warnings: tuple[str, ...] = ()
    leaving: bool = False
    """The job takes no other order: its time is up, or somebody else wants its machine."""


class Mailbox:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.order = folder / "order"
        self.report = folder / "report"

    def make(self) -> None:
        self.folder.mkdir()
        write(self.order, Order(0))
        write(self.report, None)


def write(path: Path, value: Any) -> None:
    """Replace the file: who reads it meanwhile reads the old one or the new one."""
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(pickle.dumps(value))
    os.replace(new, path)


def read(path: Path) -> Any:
    """None where the file cannot be read now, such as one that is replaced at this moment on another machine."""
    try:
        return pickle.loads(path.read_bytes())
    except OSError:
        return None


@dataclass(frozen=True)
class Terms:
    """What numbers depend on beside the trials, and what a job has to know."""

    threads: int
    versions: str
    dtype: torch.dtype
    precision: str
    path: tuple[str, ...]
    """Where the caller finds modules: those of the model may be nowhere else."""
    patience: float

    @staticmethod
    def of_this_process(threads: int) -> Terms:
        return Terms(
            threads=threads,
            versions=_versions(),
            dtype=torch.get_default_dtype(),
            precision=torch.get_float32_matmul_precision(),
            path=tuple(map(os.path.abspath, sys.path)),
            patience=_PATIENCE,
        )


def pack(folder: Path, trials: Trials, terms: Terms) -> None:
    """Write what all jobs read: once, however many there are.

    Raises ValueError where the model cannot be pickled.
    """
    import cloudpickle

    write(folder / "alive", 0)
    write(folder / "terms", terms)
    with naming_what_cannot_be_sent(), open(folder / "trials", "wb") as file:
        cloudpickle.dump(trials, file)  # takes along the code of what no other machine could import


def work(folder: Path, name: str) -> None:
    """The whole job: orders of the mailbox of this name until it is sent home, has to leave, or the caller is gone."""
    leaving = _Leaving()
    mailbox = Mailbox(folder / name)
    terms: Terms = pickle.loads((folder / "terms").read_bytes())
    caller = _Caller(folder, terms.patience)
    trials: Trials | None = None
    done = 0
    if read(mailbox.order) == Order(0):
        write(mailbox.report, Report(0))
    while not leaving.now and mailbox.folder.is_dir() and caller.lives():
        order = read(mailbox.order)
        if order is None or order.number == done:
            time.sleep(POLL)
            continue
        if order.trial is None:
            return
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            outcome: Result | Exception
            try:  # not before the first order: an error in here is to arrive by its name
                trials = _unpacked(folder, terms) if trials is None else trials
                outcome = attempt(trials, order.trial)
            except Exception as error:
                outcome = as_sent(error)
        said = tuple(str(one.message) for one in caught if one.category is UserWarning)
        write(mailbox.report, Report(order.number, outcome, said, leaving.now))
        done = order.number


def _unpacked(folder: Path, terms: Terms) -> Trials:
    if _versions() != terms.versions:
        raise RuntimeError(
            f"the job runs {_versions()}, the sweep {terms.versions}: scores of the two are not the same; install the "
            "same there"
        )
    sys.path.extend(one for one in terms.path if one not in sys.path)
    torch.set_num_threads(terms.threads)
    torch.set_default_dtype(terms.dtype)
    torch.set_float32_matmul_precision(terms.precision)
    with open(folder / "trials", "rb") as file:
        trials: Trials = pickle.load(file)
    keep_caches_here(trials)
    return trials


def _versions() -> str:
    return f"zest_fast {__version__} with torch {torch.__version__}"


class _Leaving:
    """Heeds the signals of Slurm instead of submitit, which would raise an error in the middle of a trial, or have the
    job started again by itself.
    """

    def __init__(self) -> None:
        from submitit import JobEnvironment

        self.now = False
        signal.signal(signal.Signals[f"SIG{JobEnvironment.USR_SIG}"], self._told)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _told(self, *_: Any) -> None:
        """A minute or so before the end: the trial at hand may still be finished."""
        self.now = True


class _Caller:
    """The sweep writes another number into `alive` every few seconds, as long as it lives."""

    def __init__(self, folder: Path, patience: float) -> None:
        self._file = folder / "alive"
        self._patience = patience
        self._last: int | None = None
        self._heard = time.monotonic()

    def lives(self) -> bool:
        """By this machine's clock alone: those of two machines need not agree."""
        number = read(self._file)
        if number is not None and number != self._last:
            self._last, self._heard = number, time.monotonic()
        return time.monotonic() - self._heard < self._patience
