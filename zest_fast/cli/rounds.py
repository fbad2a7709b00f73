"""Batches of a loader, round after round, from any place on: an interrupted training goes on with the same ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from zest_fast.finetuning.run_state import random_state, set_random_state


class Rounds:
    """Iterate over it for batches; `place` says, after each, where in the data it was.

    epochs: how many rounds; None = any number. place: of the batch after which to go on; None = the beginning. The
    order of a round is drawn from generators as it begins. What they were then is in a place, so that the round is
    drawn again, as far as it depends on them, and what was done of it is passed over.
    """

    def __init__(self, loader: DataLoader[Any], epochs: int | None, place: Mapping[str, Any] | None = None) -> None:
        self._loader, self._epochs = loader, epochs
        self._from = place
        self._round, self._done, self._start = 0, 0, None  # type: int, int, dict[str, Any] | None

    @property
    def place(self) -> dict[str, Any]:
        """Plain data and tensors."""
        return {"round": self._round, "done": self._done, "start": self._start}

    def prepare(self) -> None:
        """Draw the round again and pass over what was done of it; random generators move. For a place alone."""
        assert self._from is not None
        self._round, done, start = self._from["round"], self._from["done"], self._from["start"]
        self._begin(start)
        for self._done in range(1, done + 1):
            if next(self._batches, None) is None:
                raise ValueError(
                    f"the data yield {self._done - 1} batches a round, and {done} were done of this one: are they the "
                    "same as before?"
                )

    def __iter__(self) -> Iterator[Any]:
        if self._from is None:
            self._begin(None)
        while True:
            for batch in self._batches:
                self._done += 1
                yield batch
            if not self._done:
                raise ValueError(
                    f"the data yield no batch in round {self._round + 1} of training; check the loader and its size"
                )
            self._round += 1
            if self._epochs is not None and self._round >= self._epochs:
                return
            self._begin(None)

    def _begin(self, start: dict[str, Any] | None) -> None:
        """A round, as the generators are now or as they were at another one's start."""
        own = _generators(self._loader)
        if start is not None:
            if len(start["own"]) != len(own):
                raise ValueError("the loader had other generators of its own when the run was saved")
            set_random_state(start["global"])
            for generator, state in zip(own, start["own"], strict=True):
                generator.set_state(state)
        self._start = {"global": random_state(), "own": [generator.get_state() for generator in own]}
        self._done, self._batches = 0, iter(self._loader)


def _generators(loader: DataLoader[Any]) -> list[torch.Generator]:
    """Those that the loader and its samplers draw from, each once."""
    sampler = getattr(loader, "batch_sampler", None)
    holders = (loader, getattr(loader, "sampler", None), sampler, getattr(sampler, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(g): g for g in itertools.chain(found) if isinstance(g, torch.Generator)}.values())
