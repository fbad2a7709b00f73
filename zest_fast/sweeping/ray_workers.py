"""Workers that are actors of a Ray cluster: the same trials, on as many machines as there are.

They have to find zest_fast and the modules of the model: installed there, or sent by the `runtime_env` of `ray.init`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from zest_fast.sweeping.trials import Trial, Trials
from zest_fast.sweeping.workers import Died, Result, keep_caches_here


class RayPool:
    """An actor for each processor of the cluster that the trials can keep busy, each with its own copy of `trials`."""

    def __init__(self, ray: Any, trials: Trials) -> None:
        self._ray = ray
        self.size = max(1, min(int(ray.cluster_resources().get("CPU", 1)), len(trials.left())))
        # Ray's pickle takes along the code of what no other machine could import.
        self._payload = ray.put(ray.cloudpickle.dumps(trials))
        self._actor = ray.remote(num_cpus=1, max_restarts=0)(_Worker)
        self._actors = [self._actor.remote(self._payload) for _ in range(self.size)]
        self._running: dict[Any, int] = {}

    def start(self, worker: int, trial: Trial) -> None:
        self._running[self._actors[worker].run.remote(trial)] = worker

    def wait(self) -> list[tuple[int, Result | Died]]:
        done, _ = self._ray.wait(list(self._running))
        return [(self._running.pop(reference), self._outcome(reference)) for reference in done]

    def _outcome(self, reference: Any) -> Result | Died:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.ActorDiedError as error:
            return Died(str(error).strip().splitlines()[0])

    def replace(self, worker: int) -> None:
        self._actors[worker] = self._actor.remote(self._payload)

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)


@contextmanager
def ray_pool(trials: Trials, address: str) -> Iterator[RayPool]:
    """Actors of the cluster at this address; "ray" = the one that is connected or configured, else a local one.

    A connection that was there before stays, one that was made here ends. Raises ImportError without Ray,
    ConnectionError where no cluster answers.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError(f"workers={address!r} needs Ray: pip install 'zest_fast[ray]'") from error
    connected = ray.is_initialized()
    if not connected:
        ray.init(address=None if address == "ray" else address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        pool = RayPool(ray, trials)
        try:
            yield pool
        finally:
            pool.close()
    finally:
        if not connected:
            ray.shutdown()


class _Worker:
    """One processor, one thread."""

    def __init__(self, payload: bytes) -> None:
        self._payload = payload
        self._trials: Trials | None = None

    def run(self, trial: Trial) -> Result:
        if self._trials is None:  # not in __init__, where an error counts as a death
            self._trials = _unpacked(self._payload)
        return self._trials.run(trial)


def _unpacked(payload: bytes) -> Trials:
    import torch
    from ray import cloudpickle

    torch.set_num_threads(1)
    trials: Trials = cloudpickle.loads(payload)
    keep_caches_here(trials)
    return trials
