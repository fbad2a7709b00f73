"""An interrupted `zest-fast finetune`: what it was told, what it had chosen, and where it was in its data.

`Rounds` gives batches, round after round, from any place on: a training that goes on sees the same ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from zest_fast.cli.options import option
from zest_fast.finetuning.run_state import random_state, read_run, set_random_state
from zest_fast.foundation.nearest import some

KIND = "zest-fast finetune"

# What a run goes on with, and may not be told anew but as it was.
OPTIONS = (
    "task",
    "text_column",
    "label_column",
    "chat_template",
    "split",
    "config",
    "dtype",
    "batch_size",
    "validation_share",
    "max_length",
    "image_size",
    "seed",
    "epochs",
    "steps",
    "lr",
    "schedule",
    "warmup",
    "accumulate",
    "masters",
    "checkpoint",
    "frozen",
    "stream",
)
# What runs that were saved before these were options had.
_ADDED = {
    "chat_template": None,
    "split": None,
    "config": None,
    "dtype": None,
    "schedule": "constant",
    "warmup": 0.0,
    "accumulate": 1,
}
CHOOSING = ("by", "probe", "top", "prefer", "max_memory", "layers", "head")  # which a run has done


@dataclass(frozen=True)
class Progress:
    """options: of the command, by name. data, digest: as they were named, and of what they held. place: see Rounds.

    saving: what --max-memory found, as the report has it; None without it, and in runs from before there was a dial.
    """

    kind: str
    options: dict[str, Any]
    data: str
    digest: str | None
    layers: list[str]
    head: list[str]
    cached: bool
    ranking: Any
    explanation: str | None
    before: dict[str, Any] | None
    losses: list[float]
    place: dict[str, Any]
    planned: dict[str, Any] | None = None  # which earlier versions did not save
    saving: dict[str, Any] | None = None

    @property
    def own_cache(self) -> Path | None:
        """The folder of the cache that --max-memory has made for this run."""
        own = (self.saving or {}).get("own_cache")
        return None if own is None else Path(own)

    def plain(self) -> dict[str, Any]:
        """As `save_run` takes it."""
        return asdict(self)


def run_file(out: Path) -> Path:
    """Where the run that writes a delta to `out` is saved."""
    return out.with_name(f"{out.stem}.run.pt")


def read_progress(path: Path) -> Progress:
    """Raises ValueError, naming the file, for one that is torn, foreign, or of another loop."""
    progress = read_run(path).progress
    if not isinstance(progress, Mapping) or progress.get("kind") != KIND:
        raise ValueError(
            f"--resume {path} was saved by another loop, which alone knows how it goes on (SelectiveBackward.resume)"
        )
    try:
        found = Progress(**progress)
        found = replace(found, options={**_ADDED, **found.options})
        _check(found)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"--resume {path} is no run of `zest-fast finetune` that can be resumed ({error})") from error
    return found


def _check(found: Progress) -> None:
    lists = {"layers": (found.layers, str), "head": (found.head, str), "losses": (found.losses, float)}
    for name, (values, kind) in lists.items():
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            raise ValueError(f"{name} is {values!r:.80}")
    if found.saving is not None and not isinstance(found.saving, dict):
        raise ValueError(f"saving is {found.saving!r:.80}")
    if not isinstance(found.options, dict) or set(found.options) != set(OPTIONS):
        raise ValueError("its options are not those of this version")
    place, start = found.place, found.place["start"]
    for name in ("round", "done"):
        if type(place[name]) is not int or place[name] < 0:
            raise ValueError(f"{name} is {place[name]!r:.80}")
    if not isinstance(start["own"], list) or not all(isinstance(state, torch.Tensor) for state in start["own"]):
        raise ValueError("it does not say how the data were shuffled")


def resumed_options(path: Path, found: Progress, params: Mapping[str, Any], written: set[str]) -> dict[str, Any]:
    """The options of the run, for those that were not written.

    Raises ValueError that names what was written otherwise than the run was started with.
    """
    if chosen := sorted(written & set(CHOOSING)):
        raise ValueError(
            f"{option(chosen[0])} is about choosing layers, and the run of {path} has chosen: leave it out"
        )
    other = [
        f"{option(name)} {params[name]!s:.60} (it was started with {found.options[name]!s:.60})"
        for name in OPTIONS
        if name in written and params[name] != found.options[name]
    ]
    if (params["cache"] is not None) != found.cached and found.own_cache is None:
        other.append(f"--cache (it was started {'with one' if found.cached else 'without'})")
    if other:
        raise ValueError(f"--resume {path} goes on as the run was started, and here is {some(other)}")
    return dict(found.options)


def check_data(path: Path, found: Progress, data: str, digest: str | None) -> None:
    """Raises ValueError where the data are others than those the run was started with, as far as that can be told."""
    if digest is None and found.digest is None:
        if data != found.data:
            raise ValueError(f"--resume {path} was started with the data of {found.data}, and here is {data}")
    elif digest != found.digest:
        raise ValueError(
            f"--resume {path}: {data} does not hold what the run was started with ({found.data} as it was then)"
        )


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


@contextmanager
def unmoved(loader: DataLoader[Any]) -> Iterator[None]:
    """At the end the random state, and that of the loader's own generators, is what it was: a look at its data."""
    state, own = random_state(), [(generator, generator.get_state()) for generator in _generators(loader)]
    try:
        yield
    finally:
        set_random_state(state)
        for generator, before in own:
            generator.set_state(before)


def _generators(loader: DataLoader[Any]) -> list[torch.Generator]:
    """Those that the loader and its samplers draw from, each once."""
    sampler = getattr(loader, "batch_sampler", None)
    holders = (loader, getattr(loader, "sampler", None), sampler, getattr(sampler, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(g): g for g in itertools.chain(found) if isinstance(g, torch.Generator)}.values())
