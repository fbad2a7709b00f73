"""The passes of a model that a PrefixCache serves: read what is kept, compute what is not, run from the cut on."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zest_fast.foundation.documents import json_hash
from zest_fast.foundation.version import __version__
from zest_fast.prefix.activation_files import ActivationFiles, differences
from zest_fast.prefix.boundaries import Boundary, NotReusable, close, rounding, rows_in, tensors
from zest_fast.prefix.cache import PrefixCache
from zest_fast.prefix.flow import Drawn
from zest_fast.prefix.layouts import Learner
from zest_fast.prefix.passes import Kept, Passes, floats_of, part_of, with_rows
from zest_fast.prefix.placeholders import Unkept
from zest_fast.prefix.sample_keys import Samples
from zest_fast.profiling.heads import unwrap

FORMAT = 1
_CHECKED = 64
"""One batch in so many is held against the full pass."""
_OF_A_RUN = ("base", "cut", "numerics", "mode", "modules", "torch")
"""Entries of a description that say what was another one, where a folder holds several."""

_log = logging.getLogger("zest_fast")


class CachedPasses:
    """Of one model, until `remove()`.

    digest: of the parameters and buffers of modules, by name; "" where some cannot be read. Raises RuntimeError where
    the cache serves another model.
    """

    def __init__(self, cache: PrefixCache, model: nn.Module, digest: Callable[[Iterable[str]], str]) -> None:
        self.is_removed = False
        if cache.passes is not None and not cache.passes.is_removed:
            raise RuntimeError("this PrefixCache serves another model: make one for each SelectiveBackward")
        self._cache, self._model, self._digest = cache, model, digest
        self._passes = Passes(model, eval_prefix=cache.eval_prefix)
        self._learner = Learner(self._passes)
        self._layouts: dict[Any, _Layout | str] = {}
        self._bases: dict[Any, str] = {}
        self._distinct: set[bytes] = set()
        self._busy = threading.Lock()
        self._count = 0
        cache.passes, cache.stopped = self, ""

    def remove(self) -> None:
        """Let go of the files; what is kept stays. A second call does nothing."""
        for layout in self._learned():
            layout.files.close()
        self.is_removed = True

    def serves(self, model: nn.Module) -> bool:
        """Whether this is the model, and not a copy."""
        return self._model is model and not self.is_removed

    @property
    def bytes_per_sample(self) -> int:
        """Of the first shape; 0 before it is known."""
        return next((layout.boundary.bytes_per_sample for layout in self._learned()), 0)

    @property
    def kept(self) -> int:
        return sum(len(layout.files) for layout in self._learned())

    @property
    def bytes_kept(self) -> int:
        return sum(layout.files.bytes_kept for layout in self._learned())

    def _learned(self) -> list[_Layout]:
        return [layout for layout in self._layouts.values() if isinstance(layout, _Layout)]

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """The output of the model for these arguments, with a graph from the cut on.

        forward: the pass without the cache. Raises ValueError where nothing can be kept, RuntimeError where what was
        kept is not what the full pass gives.
        """
        if not self._busy.acquire(blocking=False):
            return self._plainly("another thread runs the model", forward, args, keywords)
        try:
            samples = Samples.of(args, keywords)
            if isinstance(samples, str):
                return self._plainly(samples, forward, args, keywords)
            try:
                return self._run(samples)
            except NotReusable as error:
                return self._plainly(str(error), forward, args, keywords)
        finally:
            self._busy.release()

    def fill(self, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Keep the activations of these arguments, whose pass then runs whole. Raises as `run`."""
        samples = Samples.of(args, keywords)
        if isinstance(samples, Samples) and self._busy.acquire(blocking=False):
            try:
                with contextlib.suppress(NotReusable):  # said by the pass that comes next
                    self._activations(self._layout(samples), samples)
                    _log.info("prefix cache: %s", self._cache.forecast)
            finally:
                self._busy.release()

    def run_whole(self, forward: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """The pass without the cache, what is below the cut in eval mode where that is asked for."""
        samples = Samples.of(args, keywords) if self._cache.eval_prefix else ""
        layout = None if isinstance(samples, str) else self._layouts.get(self._state(samples))
        if isinstance(samples, str) or not isinstance(layout, _Layout):
            return forward(*args, **keywords)
        return self._passes.whole(layout.boundary, samples)

    def _plainly(self, why: str, forward: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if not self._cache.plain[why]:
            warnings.warn(f"prefix cache: a pass runs without it: {why}", stacklevel=7)
        self._cache.plain[why] += 1
        return forward(*args, **keywords)

    def _run(self, samples: Samples) -> Any:
        layout = self._layout(samples)
        kept = self._activations(layout, samples)
        self._count += 1
        if self._count % _CHECKED == 0 or layout.waits_for(samples):
            self._compare(layout, samples, kept)
        output = self._passes.from_cut(layout.boundary, samples, kept)
        if any(isinstance(leaf, Unkept) for leaf in floats_of(output)):
            raise NotReusable("the output depends on what was not kept")
        return output

    def _activations(self, layout: _Layout, samples: Samples) -> Kept:
        """Of every live call; read, or computed and written."""
        cache, digests = self._cache, samples.digests()
        kept = {call: [known.empty(samples.count) for known in rows_in(call.output)] for call in layout.boundary.live}
        began = time.perf_counter()
        missing = [row for row, digest in enumerate(digests) if not layout.read(digest, row, kept)]
        cache.seconds_reading += time.perf_counter() - began
        cache.read += samples.count - len(missing)
        if layout.is_inherited and len(missing) < samples.count:
            self._hold_against_the_model(layout, samples, kept, missing)
        if missing:
            began = time.perf_counter()
            self._compute(layout.boundary, samples, kept, missing)
            cache.seconds_computing += time.perf_counter() - began
            cache.computed += len(missing)
            self._notice(digests[row] for row in missing)
            for row in missing if not cache.stopped else ():
                if not layout.write(digests[row], row, kept):
                    cache.stopped = layout.files.full
                    _log.info("prefix cache: %s; other samples are computed in every epoch", cache.stopped)
                    break
        return kept

    def _compute(self, boundary: Boundary, samples: Samples, kept: Kept, missing: list[int]) -> None:
        """Put the activations of the missing samples into their rows."""
        these = samples if len(missing) == samples.count else samples.take(torch.tensor(missing))
        found = self._passes.to_cut(boundary, these, boundary.live)
        for call, stores in kept.items():
            for known, store, value in zip(rows_in(call.output), stores, with_rows(call, found[call]), strict=True):
                for place, row in enumerate(missing):
                    part_of(known, store, row).copy_(part_of(known, value, place))

    def _hold_against_the_model(self, layout: _Layout, samples: Samples, kept: Kept, missing: list[int]) -> None:
        """Once, of what was written before: weights and classes are in the key, the code of a model is not."""
        rows = torch.tensor([row for row in range(samples.count) if row not in missing])
        found = self._passes.to_cut(layout.boundary, samples.take(rows), layout.boundary.live)
        for call, stores in kept.items():
            for known, store, value in zip(rows_in(call.output), stores, with_rows(call, found[call]), strict=True):
                if not close(known.take(store, rows), value, rounding(value.dtype)):
                    raise RuntimeError(
                        f"prefix cache: {os.fspath(self._cache.folder)!r} holds activations for these weights that are "
                        f"not what {call.name!r} computes: the code of the model has changed, or kernels do; name "
                        "another folder"
                    )
        layout.is_inherited = False

    def _notice(self, digests: Iterable[bytes]) -> None:
        cache = self._cache
        if cache.samples is None or cache.stopped:
            return
        self._distinct.update(digests)
        if len(self._distinct) > cache.samples and not cache.read:
            cache.stopped = "the loader gives other samples in every epoch"
            warnings.warn(
                f"prefix cache: {len(self._distinct):,} different samples came where an epoch has {cache.samples:,}, "
                "and none came twice: the loader augments at random, or pads to other lengths in every epoch. Nothing "
                "more is kept; make samples repeat (no augmentation, fixed lengths), or leave the cache out",
                stacklevel=9,
            )

    def _compare(self, layout: _Layout, samples: Samples, kept: Kept) -> None:
        expected = self._passes.outcome(layout.boundary, samples)
        difference = self._passes.difference(layout.boundary, samples, kept, expected, layout.first)
        if difference and layout.waits_for(samples):
            raise ValueError(
                f"prefix cache: the outputs of a second sample {difference} beside those of the full pass: a module "
                "above the cut reads what one below it has left somewhere; leave the cache out, or choose higher layers"
            )
        layout.proved |= layout.waits_for(samples)
        if difference:
            raise RuntimeError(
                f"prefix cache: the outputs of a batch {difference} beside those of the full pass: something below the "
                "cut changes between passes (weights, buffers, a counter). Steps since the last comparison may be "
                "wrong; train without the cache"
            )

    # What is known of samples of one shape

    def _layout(self, samples: Samples) -> _Layout:
        state = self._state(samples)
        known = self._layouts.get(state) or self._layouts.get((samples.shared, False, *state[2:]))
        if known is None:
            known = self._layouts[state] = self._learn(samples)
        if isinstance(known, str):
            raise NotReusable(known)
        return known

    def _learn(self, samples: Samples) -> _Layout | str:
        """Or why nothing of this shape can be kept. Raises ValueError where that is so of the first."""
        try:
            boundary, cut = self._learner.learn(samples)
            files = self._files(boundary, cut, samples)
            return _Layout(boundary, files, samples, is_inherited=len(files) > 0)
        except Drawn as error:
            raise ValueError(
                f"prefix cache: {error}; pass PrefixCache(..., eval_prefix=True) to run what is below the cut in "
                "eval mode, or leave the cache out"
            ) from None
        except NotReusable as error:
            if not self._learned():
                raise ValueError(f"prefix cache: {error}; leave the cache out, or choose higher layers") from None
            return str(error)

    def _state(self, samples: Samples) -> tuple[Any, ...]:
        """What a layout is of: shapes, whether there is one sample, numerics, modes and weights."""
        modes = tuple(module.training for module in self._model.modules())
        return samples.shared, samples.count == 1, _numerics(samples), modes, _versions(self._model)

    def _files(self, boundary: Boundary, cut: str, samples: Samples) -> ActivationFiles:
        cache, model = self._cache, self._model
        names = [call.name for call in boundary.skipped]
        base = self._base(names)
        if not base:
            raise NotReusable("weights below the cut cannot be read (offloaded, on the meta device): no key for them")
        modes = [m.training and not cache.eval_prefix for name in names for m in model.get_submodule(name).modules()]
        description = {
            "format": FORMAT,
            "zest_fast": __version__.split("+")[0],
            "torch": torch.__version__,
            "model": type(unwrap(model)).__name__,
            "base": base,
            "cut": cut,
            "calls": names,
            "modules": json_hash([_made_of(model.get_submodule(name)) for name in names]),
            "kept": [
                [call.name, *([list(k.shape), k.dim, list(k.order), str(k.dtype)] for k in rows_in(call.output))]
                for call in boundary.live
            ],
            "mode": "eval" if not any(modes) else "".join("te"[not mode] for mode in modes),
            "numerics": _numerics(samples),
            "arguments": samples.shared,
            "single": samples.count == 1,
        }
        files = ActivationFiles(cache.folder, cache.limit, description, boundary.bytes_per_sample)
        ours = {name: description[name] for name in _OF_A_RUN}
        others = [{name: other.get(name) for name in _OF_A_RUN} for other in files.others()]
        for theirs in others:
            if theirs != ours:
                what = differences(ours, theirs)
                _log.info(
                    "prefix cache: %s also holds activations of another %s; they are not used", cache.folder, what
                )
        return files

    def _base(self, names: list[str]) -> str:
        """Digest of the weights below the cut as they are, which takes a second for each GB and core."""
        state = (tuple(names), _versions(self._model))
        if state not in self._bases:
            self._bases[state] = self._digest(names)
        return self._bases[state]

    def __getstate__(self) -> dict[str, Any]:
        """A copy, as of the model with its wrapper, serves nothing."""
        return {"_model": None, "is_removed": True}


@dataclass
class _Layout:
    """Of samples of one shape: where the pass is taken up, and the files."""

    boundary: Boundary
    files: ActivationFiles
    first: Samples
    """Those that it was learned from."""
    is_inherited: bool = False
    """Whether there are records of another run, which have not been held against the model yet."""
    proved: bool = False
    """Of a single sample: whether another one has been compared since."""

    def waits_for(self, samples: Samples) -> bool:
        """Whether this is the second sample, which shows what modules have kept from the first."""
        single = self.first.count == samples.count == 1
        return single and not self.proved and samples.digests() != self.first.digests()

    def read(self, digest: bytes, row: int, kept: Kept) -> bool:
        """Whether the activations of this sample are there; then they are in row `row` of `kept`."""
        if digest not in self.files:
            return False
        memory = torch.empty(self.boundary.bytes_per_sample, dtype=torch.uint8)
        if not self.files.read(digest, memory.numpy().data):
            return False
        offset = 0
        for known, store in self._parts(kept):
            part = memory[offset : offset + known.bytes_per_sample]
            offset += known.bytes_per_sample
            aligned = part if part.storage_offset() % known.dtype.itemsize == 0 else part.clone()
            part_of(known, store, row).copy_(known.view(aligned.view(known.dtype), 1))
        return True

    def write(self, digest: bytes, row: int, kept: Kept) -> bool:
        parts = [
            part_of(known, store, row).permute(known.order).contiguous().cpu() for known, store in self._parts(kept)
        ]
        memory = torch.cat([part.view(-1).view(torch.uint8) for part in parts])
        return self.files.write(digest, memory.numpy().data)

    def _parts(self, kept: Kept) -> list[tuple[Any, Tensor]]:
        return [pair for call in self.boundary.live for pair in zip(rows_in(call.output), kept[call], strict=True)]


def _made_of(module: nn.Module) -> list[str]:
    """Classes and their settings."""
    return [f"{type(m).__module__}.{type(m).__qualname__}({m.extra_repr()})" for m in module.modules()]


def _versions(model: nn.Module) -> tuple[Any, ...]:
    """Changes when somebody writes to what is frozen, or puts something else in its place."""
    return tuple((id(p), p._version) for p in model.parameters() if not p.requires_grad and not p.is_inference())


def _numerics(samples: Samples) -> str:
    """What the precision of a pass depends on beside dtypes."""
    kinds = sorted({tensor.device.type for tensor in tensors((samples.args, dict(samples.keywords)))})
    lower = [f"autocast {kind} {torch.get_autocast_dtype(kind)}" for kind in kinds if torch.is_autocast_enabled(kind)]
    return ", ".join([*kinds, f"matmul {torch.get_float32_matmul_precision()}", *lower])
