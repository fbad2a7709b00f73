"""`zest-fast finetune --max-memory`: of the ways to save memory the fastest that fits, for the layers that were chosen.

What the user has settled by an option stays so. Only where no way fits are ranked layers exchanged for higher ones.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils._pytree import tree_leaves, tree_map_only

from zest_fast import Choice as ChosenLayers
from zest_fast import Fit, choose, fit_memory
from zest_fast.cli.jobs.job import Job
from zest_fast.cli.jobs.runs import unmoved
from zest_fast.cli.jobs.wanted import Choice, Wanted
from zest_fast.cli.options import option
from zest_fast.foundation.byte_counts import memory_bytes
from zest_fast.integrations.pretrained import downloaded_folder
from zest_fast.integrations.quiet import quiet_transformers
from zest_fast.integrations.references import is_reference
from zest_fast.planning.report import Plan, sized, tensors_within
from zest_fast.planning.savings import NothingFits, Savings
from zest_fast.ranking.ranking import Ranking
from zest_fast.streaming.checkpoints import INDEX, WHOLE, read_packed
from zest_fast.streaming.mapped_files import check_platform

_PADDING = 1.1
"""A cache pads every text to the longest: where a batch grows by more than this, the dial leaves it out."""


@dataclass(frozen=True)
class Turned:
    """What goes on with the way that was found. saving: of it, for reports and recipes."""

    job: Job
    wanted: Wanted
    choice: Choice
    plan: Plan
    saving: dict[str, Any]


def opened_first(
    opened: Callable[..., Job], model: str, layers: Sequence[str] | None, head: Any, device: str, same_length: bool
) -> Job:
    """With weights that are mapped for as long as nothing is decided, where they can be and layers are named: the model
    may be one that does not fit into memory."""
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    if layers is not None and on_cpu and not isinstance(_folder(model), str):
        with suppress(ValueError):  # of a head that has to be drawn; whatever else it is comes again
            return opened(on_disk=(tuple(layers), head), same_length=same_length)
    return opened(on_disk=None, same_length=same_length)


def turn(
    job: Job,
    wanted: Wanted,
    choice: Choice,
    console: Console,
    *,
    optimizer: str,
    steps: int,
    again: Callable[[ChosenLayers], Choice],
) -> Turned:
    """The fastest way that fits; where none does, with other layers of the ranking.

    optimizer: as for `plan`. steps: of the run, each batch for itself. again: the choice with these layers instead.
    Raises ValueError where nothing fits, with what needs the least and what would fit, and where no plan can be made.
    """
    assert wanted.dial is not None
    limit, batch = wanted.dial.limit, _longest_batch(job)
    ways = _Ways(job, wanted, batch, steps)
    planned: dict[str, Any] = {
        "batch": batch,
        "optimizer": optimizer,
        "device": "cpu" if job.device.type == "cpu" else "cuda",
        "epochs": ways.epochs,
        "steps": steps,
        "accumulating": wanted.accumulate > 1,
    }
    source: Any = job.model
    if job.on_disk:  # of which a resident step is planned, too
        source = str(Path(_folder(wanted.model)).absolute())  # which is no name of an architecture
        planned["dtype"] = next(p.dtype for p in job.model.parameters() if p.is_floating_point())

    def fitted(one: Choice, among: list[Savings]) -> Fit:
        return fit_memory(source, one.layers, limit, head=one.head, among=among, **planned)

    with console.status("planning the ways to save memory"), quiet_transformers():
        try:
            found = fitted(choice, ways.all)
        except NothingFits as error:
            try:
                choice = again(_exchanged(job, wanted, choice, error, batch, optimizer))
                found = fitted(choice, ways.all)
            except ValueError:
                raise ValueError(_nothing_fits(error, fitted, choice, planned, ways)) from error
        except Exception as error:  # of a model whose code needs values, whatever that raises
            raise ValueError(
                f"--max-memory needs a plan, and none can be made here ({type(error).__name__}: {error}): leave it "
                "out, and say yourself what is to be saved by --checkpoint, --frozen, --stream or --cache"
            ) from error
        if found.savings.cache and "cache" not in wanted.dial.settled and (why := _no_room(found, wanted, job)):
            ways.no_cache = why
            found = fitted(choice, ways.without_cache)
    return _turned(job, wanted, choice, found, ways)


def _exchanged(
    job: Job, wanted: Wanted, choice: Choice, error: NothingFits, batch: Any, optimizer: str
) -> ChosenLayers:
    """The layers of the ranking that fit with what needs the least. Raises ValueError where none do, or none can be."""
    if not isinstance(choice.ranking, Ranking):
        raise error
    limit, least = memory_bytes(wanted.dial.limit), error.least  # type: ignore[union-attr]
    return choose(
        choice.ranking,
        len(choice.layers),
        model=job.model,
        batch=batch,
        max_memory=limit if job.device.type == "cpu" else max(1, tensors_within(limit)),
        prefer=wanted.prefer,
        checkpoint=least.checkpoint,
        frozen=least.frozen,
        stream=least.stream,
        optimizer=optimizer,
        accumulating=wanted.accumulate > 1,
    )


class _Ways:
    """Those that the model, the data and what is settled leave. no_stream, no_cache: why one of them is left out."""

    def __init__(self, job: Job, wanted: Wanted, batch: Any, steps: int) -> None:
        assert wanted.dial is not None
        settled = wanted.dial.settled
        self.no_stream = self.no_cache = ""
        self.own_batches = job.own_batches
        try:
            self.epochs = max(steps / len(job.loaders.train), 1e-9)
        except TypeError:  # of an IterableDataset
            self.epochs = 1.0
        folder = _folder(wanted.model)
        packed = None if isinstance(folder, str) else read_packed(folder)
        checkpoints: Any = (wanted.checkpoint,) if "checkpoint" in settled else (None, "above-cut")
        formats: Any = (
            (wanted.frozen,) if "frozen" in settled else (None, "int8", *(["nf4"] if find_spec("bitsandbytes") else []))
        )
        streams = self._streams(job, folder, settled, wanted.params)
        if packed is not None:
            formats, streams = (packed.format,), (True,)
        caches = (True,) if "cache" in settled else self._caches(job, batch)
        self.all = [
            Savings(*way)
            for way in itertools.product(checkpoints, formats, streams, caches)
            if packed is not None or not (way[1] and way[2])  # what is packed in memory is not on disk
        ]
        self.without_cache = [way for way in self.all if not way.cache]

    def reasons(self, savings: Savings | None) -> list[str]:
        """Why others are left out, as far as that matters beside these; None = nothing fits."""
        saves = savings is None or savings != Savings(cache=savings.cache)
        return [why for why in (saves and self.no_stream, savings is not None and self.no_cache) if why]

    def _streams(
        self, job: Job, folder: Path | str, settled: Iterable[str], params: Mapping[str, Any]
    ) -> tuple[bool, ...]:
        if "stream" in settled:
            return (True,)
        why = folder if isinstance(folder, str) else ""
        if job.device.type != "cpu":
            why = "on a GPU that was not measured, --stream asks for it"
        elif not why and (loading := [option(name) for name in ("dtype", "trust_remote_code") if params[name]]):
            why = f"{loading[0]} is about weights as they are loaded, and there they are read as they are"
        elif not why and (job.loaded.new_head or job.loaded.fresh):
            why = "the head is drawn at random: save the model with it once, and name that folder"
        if why:
            self.no_stream = f"weights on disk are no way here: {why}"
        return (False,) if why else (False, True)

    def _caches(self, job: Job, batch: Any) -> tuple[bool, ...]:
        if self.epochs <= 1:
            return (False,)  # of which nobody has asked anything
        why = ""
        if job.device.type != "cpu":
            why = "on a GPU that was not measured, --cache asks for it"
        elif not job.own_batches:
            why = "whether samples come again as they were is not known of a loader of yours, --cache asks for it"
        elif _entries(batch) > _PADDING * _entries(job.any_batch()):
            why = "texts differ in length, and it pads each to the longest, --cache asks for it"
        if why:
            self.no_cache = f"a prefix cache is left out: {why}"
        return (False,) if why else (False, True)


def _folder(model: str) -> Path | str:
    """Of safetensors, which can be mapped; or why there is none."""
    if is_reference(model):
        return f"{model} is no folder of safetensors"
    folder = downloaded_folder(model)
    if folder is None:
        return f"{model} is no folder, and the hub's is not downloaded"
    if not any((folder / name).exists() for name in (WHOLE, INDEX)) and read_packed(folder) is None:
        return f"{model} holds no {WHOLE}"
    try:
        check_platform()
    except NotImplementedError as error:
        return str(error)
    return folder


def _longest_batch(job: Job) -> Any:
    """As large as any that will come; of a loader of the user's the first one, and the loader does not move on."""
    if job.own_batches:
        return replace(job, loaders=job.in_one_length()).any_batch()
    with unmoved(job.loaders.train):
        return job.first_batch()


def _entries(batch: Any) -> int:
    return sum(leaf.numel() for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor))


def _no_room(found: Fit, wanted: Wanted, job: Job) -> str:
    """Why the activations of an epoch cannot be kept; "" where they can."""
    samples: Any = job.loaders.train.dataset
    needs = found.cache_bytes * len(job.loaders.train)
    free = shutil.disk_usage(wanted.out.absolute().parent).free // 2
    if needs <= min(memory_bytes(wanted.cache_limit), free):
        return ""
    return (
        f"a prefix cache is left out: it may take {sized(needs)} for {len(samples):,} samples, where --cache-limit is "
        f"{wanted.cache_limit} and half of what is free beside {wanted.out} {sized(free)}"
    )


def _turned(job: Job, wanted: Wanted, choice: Choice, found: Fit, ways: _Ways) -> Turned:
    assert wanted.dial is not None
    savings = found.savings
    own = None
    if savings.cache and wanted.cache is None:
        own = _new_folder(wanted.out.absolute().with_name(f"{wanted.out.stem}.activations"))
    same_length = savings.cache and "cache" not in wanted.dial.settled
    if savings.stream != job.on_disk:
        on_disk = (tuple(choice.layers), choice.head) if savings.stream else None
        if savings.stream:
            job.model.to("meta")  # its memory is what does not fit
        job = wanted.dial.opened(on_disk=on_disk, same_length=savings.cache)
    elif same_length:
        loaders = job.in_one_length()
        _go_on_with(loaders.train, job.loaders.train)
        job = replace(job, loaders=loaders)
    explanation = "\n".join([str(found), *(f"  {reason}" for reason in ways.reasons(savings))])
    saving = {"max_memory": wanted.dial.limit, **asdict(savings), "peak_bytes": found.plan.peak_bytes}
    saving |= {"explanation": explanation, "own_cache": None if own is None else str(own)}
    options: dict[str, Any] = {
        "checkpoint": savings.checkpoint,
        "frozen": None if savings.stream else savings.frozen,  # which a folder on disk says by itself
        "stream": savings.stream,
    }
    wanted = replace(
        wanted,
        **options,
        cache=own or wanted.cache,
        saving=saving,
        params={**wanted.params, **options},
        data_settings=replace(wanted.data_settings, frozen=savings.frozen),
    )
    return Turned(job, wanted, choice, found.plan, saving)


def _new_folder(path: Path) -> Path:
    """That, or one with a number behind it: what is there already is not the run's, which goes with it."""
    numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(2))
    return next(folder for folder in itertools.chain([path], numbered) if not os.path.lexists(folder))


def _go_on_with(loader: Any, before: Any) -> None:
    """The order of what comes is that of the other loader, which may have given a batch to profile."""
    loader.generator.set_state(before.generator.get_state())


def _nothing_fits(
    error: NothingFits,
    fitted: Callable[..., Fit],
    choice: Choice,
    planned: dict[str, Any],
    ways: _Ways,
) -> str:
    """With what would fit: so much memory, or so many samples in a batch, where that is ours to say."""
    text = f"{error}. --max-memory {math.ceil(error.needs / 2**10)}KiB would do"
    samples = _samples(planned["batch"])
    for count in [samples >> halved for halved in range(1, samples.bit_length())] if ways.own_batches else ():
        planned["batch"] = _first(count, planned["batch"])
        try:
            savings = fitted(choice, ways.all).savings
        except ValueError:
            continue
        text += f", or --batch-size {count} with {savings}"
        break
    return "; ".join([text, *ways.reasons(None)])


def _first(count: int, batch: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda tensor: tensor[:count], batch)


def _samples(batch: Any) -> int:
    return next(leaf.shape[0] for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor))
