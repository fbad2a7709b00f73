"""What the command line asks of `zest-fast finetune`, and which layers train and why."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zest_fast.cli.jobs import runs
from zest_fast.cli.jobs.job import Job
from zest_fast.foundation.options import Checkpoint, Frozen, Preference
from zest_fast.integrations.merging import DataSettings
from zest_fast.ranking.ranking import Ranking


@dataclass(frozen=True)
class Dial:
    """settled: of checkpoint, frozen, stream and cache, what the command line says. opened: the same model and data
    with other options of `open_job`."""

    limit: str
    settled: frozenset[str]
    opened: Callable[..., Job]


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
    command line, for the notes on those without effect.
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
