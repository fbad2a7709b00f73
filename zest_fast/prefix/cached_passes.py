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
from zest_fast.prefix.activation_files import ActivationFiles, Room, differences
from zest_fast.prefix.boundaries import Boundary, Call, NotReusable, Rows, close, rounding, rows_in, tensors
from zest_fast.prefix.cache import PrefixCache
from zest_fast.prefix.flow import Drawn, is_observed
from zest_fast.prefix.flow import before as calls_before
from zest_fast.prefix.layouts import Learner
from zest_fast.prefix.passes import Before, Kept, Passes, floats_of, part_of, undone, with_rows
from zest_fast.prefix.placeholders import Unkept
from zest_fast.prefix.sample_keys import Samples
from zest_fast.prefix.walk import Walk
from zest_fast.profiling.heads import unwrap
from zest_fast.profiling.watched import unwatched

FORMAT = 2
_CHECKED = 64
"""One batch in so many is held against the full pass; in between, two samples of the 2nd, 4th, 8th ... that is read."""
_CHANGES = (
    "something below the cut changes between passes (weights, buffers, a counter), or depends on the other samples of "
    "a batch. Steps since the last comparison may be wrong; train without the cache"
)
_LOOKED_AT = 1 << 16
"""Entries of an output that are looked through for NaN: of a loss or the logits of a classifier."""
_LEARNED_FROM = 8
"""Samples of the first batch."""
_SHAPES = 64
"""That are known at a time; each has files that are open."""
_OF_A_RUN = ("base", "cut", "numerics", "mode", "modules", "torch")
"""Entries of a description that say what was another one, where a folder holds several."""

_log = logging.getLogger("zest_fast")


class CachedPasses:
    """Of one model, until `remove()`.

    digest: of whole modules and of single tensors, by name; "" where some cannot be read. Raises RuntimeError where the
    cache serves another model.
    """

    def __init__(self, cache: PrefixCache, model: nn.Module, digest: Callable[..., str]) -> None:
        self.is_removed = False
        if cache.passes is not None and not cache.passes.is_removed:
            raise RuntimeError("this PrefixCache serves another model: make one for each SelectiveBackward")
        self._cache, self._model, self._digest = cache, model, digest
        self._passes = Passes(model, eval_prefix=cache.eval_prefix)
        self._learner = Learner(self._passes)
        self._walk = Walk(model)
        self._layouts: dict[Any, _Layout | str] = {}
        self._bases: list[tuple[_Weights, str]] = []
        self._distinct: set[bytes] = set()
        self._busy = threading.Lock()
        self._before: tuple[list[nn.Module], Before] | None = None  # of which modules, from one pass to the next
        self._room = Room(cache.folder, cache.limit)
        self._count = self._read = 0  # batches that were read whole; samples
        self._warned_of_keys = False
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
            before = self._as_it_is()
            try:
                with self._passes.by(forward):
                    return self._run(samples)
            except NotReusable as error:
                before.restore()  # random numbers that were drawn, statistics that were taken
                return self._plainly(str(error), forward, args, keywords)
            finally:
                before.let_go()
        finally:
            self._busy.release()

    def fill(self, forward: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Keep the activations of these arguments, whose pass then runs whole. Raises as `run`."""
        samples = Samples.of(args, keywords)
        if isinstance(samples, Samples) and self._busy.acquire(blocking=False):
            try:
                # What cannot be is said by the pass that comes next.
                with contextlib.suppress(NotReusable), self._passes.by(forward), undone(self._model), unwatched():
                    self._known(samples)
                    _log.info("prefix cache: %s", self._cache.forecast)
            finally:
                self._busy.release()

    def run_whole(self, forward: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """The pass without the cache, what is below the cut in eval mode where that is asked for."""
        samples = Samples.of(args, keywords) if self._cache.eval_prefix else ""
        layout = None if isinstance(samples, str) else self._layouts.get(self._state(samples))
        if isinstance(samples, str) or not isinstance(layout, _Layout):
            return forward(*args, **keywords)
        with self._passes.by(forward):
            return self._passes.whole(layout.boundary, samples)

    def _as_it_is(self) -> Before:
        """Buffers, generators and attributes of this moment."""
        modules = self._walk.modules
        if self._before is None or self._before[0] is not modules:
            self._before = modules, Before(self._model, modules)
        else:
            self._before[1].renew()
        return self._before[1]

    def _plainly(self, why: str, forward: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if not self._cache.plain[why]:
            warnings.warn(f"prefix cache: a pass runs without it: {why}", stacklevel=7)
        self._cache.plain[why] += 1
        return forward(*args, **keywords)

    def _run(self, samples: Samples) -> Any:
        with unwatched():
            layout, kept = self._known(samples)
        output = self._passes.from_cut(layout.boundary, samples, kept)
        found = floats_of(output)
        if any(isinstance(leaf, Unkept) for leaf in found):
            raise NotReusable("the output depends on what was not kept")
        if any(type(leaf) is Tensor and leaf.numel() <= _LOOKED_AT and bool(leaf.isnan().any()) for leaf in found):
            with unwatched():
                self._compare(layout, samples, kept)  # NaN of its own, or of a placeholder that code hid from torch
        self._warn_of_keys(output)
        return output

    def _known(self, samples: Samples) -> tuple[_Layout, Kept]:
        layout = self._layout(samples)
        try:
            return layout, self._checked(layout, samples)
        except (NotReusable, ValueError):
            if layout.compared or layout.learned_from.count == samples.count:
                raise
        layout = self._learned_anew(layout, samples)  # what a few samples showed is not so of all of them
        return layout, self._checked(layout, samples)

    def _checked(self, layout: _Layout, samples: Samples) -> Kept:
        """The activations, held against the model where it is time."""
        computed = self._cache.computed
        kept = self._activations(layout, samples)
        if layout.waits_for(samples):
            self._compare(layout, samples, kept)
        elif self._cache.computed == computed:
            self._count += 1
            if self._count == 1 or self._count % _CHECKED == 0:
                self._compare(layout, samples, kept)
            elif self._count & (self._count - 1) == 0:
                self._compare_some(layout, samples, kept)
        return kept

    def _warn_of_keys(self, output: Any) -> None:
        if self._warned_of_keys or not isinstance(output, dict):
            return
        if any(dict.get(output, name) is not None for name in ("past_key_values", "cache")):
            self._warned_of_keys = True
            warnings.warn(
                "prefix cache: past_key_values of the output lack the blocks below the cut, which did not run; train "
                "with use_cache=False",
                stacklevel=8,
            )

    def _activations(self, layout: _Layout, samples: Samples) -> Kept:
        """Of every live call; read, or computed and written."""
        cache, digests = self._cache, samples.digests
        began = time.perf_counter()
        kept, missing = layout.read(digests)
        cache.seconds_reading += time.perf_counter() - began
        cache.read += samples.count - len(missing)
        self._read += samples.count - len(missing)
        if layout.is_inherited and len(missing) < samples.count:
            self._hold_against_the_model(layout, samples, kept, missing)
        if missing:
            began = time.perf_counter()
            with undone(self._model):  # the pass that follows counts
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
        part = None if len(missing) == samples.count else torch.tensor(missing)
        rows = list(range(len(missing)))
        try:
            found = self._passes.to_cut(boundary, samples if part is None else samples.take(part), boundary.live)
        except NotReusable:
            raise
        except Exception:
            if part is None:  # the model's own
                raise
            found, rows = self._passes.to_cut(boundary, samples, boundary.live), missing  # no part of a batch runs
        for call, stores in kept.items():
            for known, store, value in zip(rows_in(call.output), stores, with_rows(call, found[call]), strict=True):
                for place, row in zip(rows, missing, strict=True):
                    part_of(known, store, row).copy_(part_of(known, value, place))

    def _hold_against_the_model(self, layout: _Layout, samples: Samples, kept: Kept, missing: list[int]) -> None:
        """Once, of what was written before: weights and classes are in the key, the code of a model is not."""
        rows = [row for row in range(samples.count) if row not in missing]
        if call := self._differing(layout, samples, kept, rows):
            raise RuntimeError(
                f"prefix cache: {os.fspath(self._cache.folder)!r} holds activations for these weights that are not "
                f"what {call!r} computes: the code of the model has changed, or kernels do; name another folder"
            )
        layout.is_inherited = False

    def _compare_some(self, layout: _Layout, samples: Samples, kept: Kept) -> None:
        """Of two samples (of one alone, shapes may collapse): other ones each time."""
        rows = sorted({(self._count + place) % samples.count for place in (0, samples.count // 2)})
        try:
            with undone(self._model):
                call = self._differing(layout, samples, kept, rows)
        except Exception:  # a part of a batch does not run, or takes another way
            return self._compare(layout, samples, kept)
        if call:
            layout.files.disown()
            raise RuntimeError(f"prefix cache: what {call!r} gives is not what was kept: {_CHANGES}")

    def _differing(self, layout: _Layout, samples: Samples, kept: Kept, rows: list[int]) -> str:
        """The first call that does not give what is kept of these samples; "" where all do."""
        part = torch.tensor(rows)
        found = self._passes.to_cut(layout.boundary, samples.take(part), layout.boundary.live)
        for call, stores in kept.items():
            for known, store, value in zip(rows_in(call.output), stores, with_rows(call, found[call]), strict=True):
                if not close(known.take(store, part), value, rounding(value.dtype)):
                    return call.name
        return ""

    def _notice(self, digests: Iterable[bytes]) -> None:
        cache = self._cache
        if cache.samples is None or cache.stopped:
            return
        self._distinct.update(digests)
        if len(self._distinct) > cache.samples and not self._read:
            cache.stopped = "the loader gives other samples in every epoch"
            warnings.warn(
                f"prefix cache: {len(self._distinct):,} different samples came where an epoch has {cache.samples:,}, "
                "and none came twice: the loader augments at random, or pads to other lengths in every epoch. Nothing "
                "more is kept; make samples repeat (no augmentation, fixed lengths), or leave the cache out",
                stacklevel=9,
            )

    def _compare(self, layout: _Layout, samples: Samples, kept: Kept) -> None:
        """Outputs with those of the full pass."""
        expected = self._passes.outcome(layout.boundary, samples)
        difference = self._passes.difference(layout.boundary, samples, kept, expected, layout.learned_from)
        if difference and layout.waits_for(samples):
            which = "another" if layout.compared else "the first"
            raise ValueError(
                f"prefix cache: the outputs of {which} batch {difference} beside those of the full pass: "
                "a module above the cut reads what one below it has left somewhere; leave the cache out, or choose "
                "higher layers"
            )
        if difference:
            layout.files.disown()
            raise RuntimeError(
                f"prefix cache: the outputs of a batch {difference} beside those of the full pass: {_CHANGES}"
            )
        layout.has_compared(samples)

    # What is known of samples of one shape

    def _layout(self, samples: Samples) -> _Layout:
        state = self._state(samples)
        key = state if state in self._layouts else (samples.shared, False, *state[2:])
        known = self._layouts.pop(key, None)
        if isinstance(known, _Layout) and not known.weights.are_same():
            known.files.close()
            known = None
        if known is None:
            key = state
            if samples.count > 1 and len(set(samples.digests)) == 1:
                raise NotReusable("the samples of the batch are all the same, which shows nothing of others")
            known = self._learn(samples.few(_LEARNED_FROM))
        self._layouts[key] = known  # the latest at the end
        self._forget()
        if isinstance(known, str):
            raise NotReusable(known)
        return known

    def _learned_anew(self, layout: _Layout, samples: Samples) -> _Layout:
        """From all samples of the batch."""
        layout.files.disown()
        layout.files.close()
        key = next(key for key, known in self._layouts.items() if known is layout)
        self._layouts[key] = known = self._learn(samples)
        if isinstance(known, str):
            raise NotReusable(known)
        return known

    def _forget(self) -> None:
        """Shapes that have not been met for long."""
        while len(self._layouts) > _SHAPES:
            oldest = self._layouts.pop(next(iter(self._layouts)))
            if isinstance(oldest, _Layout):
                oldest.files.close()

    def _learn(self, samples: Samples) -> _Layout | str:
        """Or why nothing of this shape can be kept. Raises ValueError where that is so of the first."""
        try:
            boundary, place, read = self._learner.learn(samples)
            weights = _Weights(self._model, boundary, place, read)
            files = self._files(boundary, place.name, samples, weights)
            return _Layout(boundary, files, samples, weights, is_inherited=len(files) > 0)
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
        """What a layout is of: shapes, whether there is one sample, numerics, modes, hooks, and what trains."""
        modules = self._walk.modules
        modes = tuple([module.training for module in modules])
        observed = tuple([module for module in modules if is_observed(module)])
        trained = tuple([p.requires_grad for module in modules for p in module._parameters.values() if p is not None])
        return samples.shared, samples.count == 1, _numerics(samples), modes, observed, trained

    def _files(self, boundary: Boundary, cut: str, samples: Samples, weights: _Weights) -> ActivationFiles:
        cache, model = self._cache, self._model
        names = [call.name for call in boundary.skipped]
        base = self._base(weights)
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
        files = ActivationFiles(self._room, description, boundary.bytes_per_sample)
        ours = {name: description[name] for name in _OF_A_RUN}
        others = [{name: other.get(name) for name in _OF_A_RUN} for other in files.others()]
        for theirs in others:
            if theirs != ours:
                what = differences(ours, theirs)
                _log.info(
                    "prefix cache: %s also holds activations of another %s; they are not used", cache.folder, what
                )
        return files

    def _base(self, weights: _Weights) -> str:
        """Digest of the weights below the cut as they are, which takes a second for each GB and core."""
        for known, base in self._bases:
            if known.names == weights.names and known.are_same():
                return base
        self._bases = [(known, base) for known, base in self._bases if known.are_same()]
        self._bases.append((weights, self._digest(*weights.names)))
        return self._bases[-1][1]

    def __getstate__(self) -> dict[str, Any]:
        """A copy, as of the model with its wrapper, serves nothing."""
        return {"_model": None, "_layouts": {}, "is_removed": True}


class _Weights:
    """What is below the cut, as it was: parameters and buffers of what does not run, and what the code that does run
    holds itself (a table of positions)."""

    def __init__(self, model: nn.Module, boundary: Boundary, place: Call, read: frozenset[int]) -> None:
        whole = [call.name for call in boundary.skipped]
        inside = tuple(f"{name}." for name in whole)
        calls = [*calls_before(place), *(call for call in place.path() if call is not place)]
        own = [c.name for c in calls if c.name not in whole and not f"{c.name}.".startswith(inside)]
        modules = dict.fromkeys(m for name in whole for m in model.get_submodule(name).modules())
        self._slots = [
            (held, name, tensor, _stamp(tensor))
            for module in modules
            for held in (module._parameters, module._buffers)
            for name, tensor in held.items()
            if tensor is not None
        ]
        holders = [(path, model.get_submodule(path)) for path in dict.fromkeys(own)]
        of_parents = [
            (f"{path}.{name}" if path else name, (held, name, tensor, _stamp(tensor)))
            for path, module in holders
            for held in (module._parameters, module._buffers)
            for name, tensor in held.items()
            if tensor is not None and id(tensor) in read and not tensor.requires_grad
        ]
        self._slots += [slot for _, slot in of_parents]
        self.names = tuple(dict.fromkeys(whole)), tuple(name for name, _ in of_parents)
        """Of modules that do not run, and of tensors that their parents hold."""

    def are_same(self) -> bool:
        """Whether nobody has written there or put something else in their place, as far as torch tells: what is written
        through `.data` it does not. The tensors are held, so that no other one gets their address."""
        return all(held.get(name) is tensor and _stamp(tensor) == stamp for held, name, tensor, stamp in self._slots)


def _stamp(tensor: Tensor) -> tuple[Any, ...]:
    address = tensor.data_ptr() if tensor.layout == torch.strided and not tensor.is_meta else 0
    return 0 if tensor.is_inference() else tensor._version, address, tensor.dtype, tensor.shape


@dataclass
class _Layout:
    """Of samples of one shape: where the pass is taken up, and the files."""

    boundary: Boundary
    files: ActivationFiles
    learned_from: Samples
    weights: _Weights
    is_inherited: bool = False
    """Whether there are records of another run, which have not been held against the model yet."""
    compared: int = 0
    """Different batches whose outputs were held against the full pass, up to two: the second shows what modules have
    kept from the first."""
    _latest: list[bytes] | None = None

    def waits_for(self, samples: Samples) -> bool:
        return self.compared < 2 and samples.digests != self._latest

    def has_compared(self, samples: Samples) -> None:
        if self.waits_for(samples):
            self.compared, self._latest = self.compared + 1, samples.digests

    def read(self, digests: list[bytes]) -> tuple[Kept, list[int]]:
        """The activations of these samples, and which rows are not there and hold anything."""
        count = len(digests)
        memory = torch.empty(count, self.boundary.bytes_per_sample, dtype=torch.uint8)
        rows = memory.numpy()
        missing = [
            row
            for row, digest in enumerate(digests)
            if digest not in self.files or not self.files.read(digest, rows[row].data)
        ]
        kept: dict[Call, list[Tensor]] = {call: [] for call in self.boundary.live}
        offset = 0
        for call in self.boundary.live:
            for known in rows_in(call.output):
                part = memory[:, offset : offset + known.bytes_per_sample].contiguous()
                offset += known.bytes_per_sample
                kept[call].append(_tensor(known, part.view(-1).view(known.dtype), count))
        return kept, missing

    def write(self, digest: bytes, row: int, kept: Kept) -> bool:
        parts = [
            part_of(known, store, row).permute(known.order).contiguous().cpu() for known, store in self._parts(kept)
        ]
        memory = torch.cat([part.view(-1).view(torch.uint8) for part in parts])
        return self.files.write(digest, memory.numpy().data)

    def _parts(self, kept: Kept) -> list[tuple[Any, Tensor]]:
        return [pair for call in self.boundary.live for pair in zip(rows_in(call.output), kept[call], strict=True)]


def _tensor(known: Rows, memory: Tensor, count: int) -> Tensor:
    """Of what lies sample by sample in memory."""
    memory = memory.to(known.device)
    if known.order[0] == known.dim:
        return known.view(memory, count)
    store = known.empty(count)
    for row, part in enumerate(memory.view(count, -1)):
        part_of(known, store, row).copy_(known.view(part, 1))
    return store


def _made_of(module: nn.Module) -> list[str]:
    """Classes and their settings."""
    return [f"{type(m).__module__}.{type(m).__qualname__}({m.extra_repr()})" for m in module.modules()]


def _numerics(samples: Samples) -> str:
    """What the precision of a pass depends on beside dtypes."""
    kinds = sorted({tensor.device.type for tensor in tensors((samples.args, dict(samples.keywords)))})
    lower = [f"autocast {kind} {torch.get_autocast_dtype(kind)}" for kind in kinds if torch.is_autocast_enabled(kind)]
    return ", ".join([*kinds, f"matmul {torch.get_float32_matmul_precision()}", *lower])
