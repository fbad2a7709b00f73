"""Workers that are processes of this machine: forked where that is safe, else started anew with a pickled model."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from zest_fast.sweeping.trials import Trial, Trials
from zest_fast.sweeping.workers import Died, Result, attempt, current_folder_not_first, naming_what_cannot_be_sent

_PATIENCE = 1.0  # seconds between looks whether the parent lives


class LocalPool:
    """So many processes, each with a copy of `trials`; their threads together are as many as torch has here.

    forked: called first in each forked process, to let go of what it must not hold (the lock of the record file).
    Raises ValueError where the processes cannot be forked and the model cannot be pickled.
    """

    def __init__(self, trials: Trials, size: int, forked: Callable[[], None]) -> None:
        self.size = size
        self._threads = max(1, torch.get_num_threads() // size)
        self._forked = forked
        forks = _can_fork(self._threads)
        self._context: Any = multiprocessing.get_context("fork" if forks else "spawn")
        self._trials = trials if forks else _pickled(trials)
        self._processes: list[Any] = [None] * size
        self._pipes: list[Any] = [None] * size
        for worker in range(size):
            self.replace(worker)

    def start(self, worker: int, trial: Trial) -> None:
        with suppress(OSError):  # it is dead already; `wait` finds that out
            self._pipes[worker].send(trial)

    def wait(self) -> list[tuple[int, Result | Died]]:
        ready = wait(self._pipes)
        return [(worker, self._outcome(worker)) for worker, pipe in enumerate(self._pipes) if pipe in ready]

    def _outcome(self, worker: int) -> Result | Died:
        try:
            outcome = self._pipes[worker].recv()
        except (EOFError, OSError):
            self._processes[worker].join()
            return Died(_words(self._processes[worker].exitcode))
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def replace(self, worker: int) -> None:
        if self._pipes[worker] is not None:
            self._pipes[worker].close()
        ours, theirs = self._context.Pipe()
        self._pipes[worker] = ours
        # A forked process inherits this end of every pipe, and no pipe would ever end.
        inherited = [pipe for pipe in self._pipes if pipe is not None]
        forks = self._context.get_start_method() == "fork"
        arguments = (self._trials, theirs, self._threads, *((self._forked, inherited) if forks else ()))
        process = self._context.Process(target=_work, args=arguments, daemon=True)
        with warnings.catch_warnings(), current_folder_not_first():
            # Python 3.12 warns of any fork beside threads; these processes use one thread and none of the locks.
            warnings.filterwarnings("ignore", message=".*multi-threaded", category=DeprecationWarning)
            process.start()
        theirs.close()
        self._processes[worker] = process

    def close(self) -> None:
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            pipe.close()
            process.kill()
            process.join()


@contextmanager
def local_pool(trials: Trials, size: int, forked: Callable[[], None]) -> Iterator[LocalPool]:
    """The processes are gone at the end."""
    pool = LocalPool(trials, size, forked)
    try:
        yield pool
    finally:
        pool.close()


def _can_fork(threads: int) -> bool:
    """A forked process has the model whatever it is made of, and shares its memory.

    But the threads of OpenMP and of CUDA's autograd do not survive in it, and macOS' own libraries do not either.
    """
    return sys.platform == "linux" and threads == 1 and not torch.cuda.is_available()


def _pickled(trials: Trials) -> bytes:
    # By value: tensors in shared memory would let one worker's training reach the others and the user's own model.
    with naming_what_cannot_be_sent():
        return pickle.dumps(trials)


def _work(
    trials: Trials | bytes,
    pipe: Connection,
    threads: int,
    forked: Callable[[], None] | None = None,
    inherited: list[Connection] | None = None,
) -> None:
    """Run trials until the parent closes the pipe or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    if forked is not None:
        forked()
    for other in inherited or ():
        other.close()
    torch.set_num_threads(threads)
    own: Trials = pickle.loads(trials) if isinstance(trials, bytes) else trials
    parent = os.getppid()
    while True:
        while not pipe.poll(_PATIENCE):
            if os.getppid() != parent:
                return
        try:
            trial = pipe.recv()
        except EOFError:
            return
        pipe.send(attempt(own, trial))


def _words(exit_code: int) -> str:
    return f"killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"exit status {exit_code}"
