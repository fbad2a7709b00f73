"""An interrupted `zest-fast finetune`: what it was told, what it had chosen, and where it was in its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from zest_fast.cli.options import option
from zest_fast.finetuning.run_state import read_run
from zest_fast.foundation.nearest import some

KIND = "zest-fast finetune"

# What a run goes on with, and may not be told anew but as it was.
OPTIONS = (
    "task",
    "text_column",
    "label_column",
    "batch_size",
    "validation_share",
    "max_length",
    "image_size",
    "seed",
    "epochs",
    "steps",
    "lr",
    "masters",
    "checkpoint",
    "frozen",
    "stream",
)
CHOOSING = ("by", "probe", "top", "prefer", "max_memory", "layers", "head")  # which a run has done


@dataclass(frozen=True)
class Progress:
    """options: of the command, by name. data, digest: as they were named, and of what they held. place: see Rounds."""

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
        _check(found)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"--resume {path} is no run of `zest-fast finetune` that can be resumed ({error})") from error
    return found


def _check(found: Progress) -> None:
    lists = {"layers": (found.layers, str), "head": (found.head, str), "losses": (found.losses, float)}
    for name, (values, kind) in lists.items():
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            raise ValueError(f"{name} is {values!r:.80}")
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
        f"{option(name)} {params[name]} (it was started with {found.options[name]})"
        for name in OPTIONS
        if name in written and params[name] != found.options[name]
    ]
    if (params["cache"] is not None) != found.cached:
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
