"""The frozen part of a training pass, computed once for each sample: activations at the cut, kept on disk."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from zest_fast.foundation.byte_counts import memory_bytes
from zest_fast.foundation.documents import json_hash
from zest_fast.foundation.nearest import some
from zest_fast.foundation.version import __version__
from zest_fast.prefix.activation_files import ActivationFiles, differences
from zest_fast.prefix.boundaries import (
    DEPENDS,
    Boundary,
    Call,
    NotReusable,
    Rows,
    close,
    dims_of,
    finished_before,
    intercepted,
    order_of,
    rounding,
    rows_in,
    samples_along,
    tensors,
    what_prevents,
)
from zest_fast.prefix.flow import Drawn, first_trained_call, needed
from zest_fast.prefix.placeholders import Reached, Unkept, filled
from zest_fast.prefix.sample_keys import Samples
from zest_fast.prefix.volatile_state import VolatileState, preserved
from zest_fast.profiling.heads import unwrap

FORMAT = 1
_CHECKED = 64
"""One batch in so many is held against the full pass."""
_SMALL = 64
"""A call with less than this part of what is kept is not worth a pass to find out whether it is needed."""

_log = logging.getLogger("zest_fast")


class PrefixCache:
    """Keep what frozen layers below the cut compute, on disk: from the second epoch on they do not run.

    Give it to `SelectiveBackward(..., cache=PrefixCache(folder))` and train as before. The first time that a sample
    comes, the layers below the cut compute its activations, which are written to the folder; every further time they
    are read, and the forward pass starts at the cut. Several tensors across the cut (residuals, masks, rotary tables,
    the output of an encoder) are found by following the values of the first batch. What is read is what the same layers
    would compute, but for the rounding of other batch sizes.

    A sample is known by the bytes of its inputs, so loaders may shuffle; a sample that is padded to another length, or
    augmented at random, is another sample. The folder may hold caches of many models: what was written for other
    weights, another cut, dtype, mode, or torch is never read. Files of a process that was killed are read up to their
    last whole record, damaged ones are named and computed again, and several processes may share a folder. Nothing is
    deleted by itself: remove the folder when you are done.

    Batches are compared with the full pass: the first of each shape, then one in 64.

    Passes without gradients (validation), in compiled code and of several threads at once run as they would without it.

    Args:
        folder: made where it does not exist.
        limit: bytes of the whole folder, "50GB" (10^9) or "50GiB" (2^30); samples beyond are computed in every epoch.
        samples: in an epoch, if you know. As soon as there are more than that without one being read again, the loader
            changes its samples: a warning says so, and nothing more is kept.
        eval_prefix: run the layers below the cut in eval mode. Dropout in train mode gives other activations each time
            and is refused otherwise.

    Raises:
        ValueError: a limit that is no size, or `samples` below 1. Of the first forward pass: nothing can be kept, with
            what prevents it.
        NotADirectoryError: the folder is a file.

    Examples:
        >>> import tempfile, torch, zest_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> data = torch.randn(12, 4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = zest_fast.PrefixCache(folder, limit="1GB", samples=12)
        ...     with zest_fast.SelectiveBackward(model, ["2"], cache=cache):
        ...         for rows in [*data.split(6), *data.split(6)]:
        ...             model(rows).sum().backward()
        ...         print(cache.kept, cache.read, cache.computed)
        12 12 12
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        limit: str | int = "50GB",
        samples: int | None = None,
        eval_prefix: bool = False,
    ) -> None:
        if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 1):
            raise ValueError(f"samples={samples!r}: how many there are in an epoch, at least 1, or None")
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"{os.fspath(folder)!r} is a file; name a folder for the activations")
        self.limit = memory_bytes(limit, "limit")
        self.samples, self.eval_prefix = samples, eval_prefix
        self.read = 0
        """Samples whose activations were read."""
        self.computed = 0
        """Samples for which the layers below the cut ran."""
        self.plain: Counter[str] = Counter()
        """Why passes ran without the cache, and how many."""
        self._seconds = [0.0, 0.0]  # of computing, of reading
        self._distinct: set[bytes] = set()
        self._layouts: dict[Any, _Layout | str] = {}
        self._found: tuple[tuple[str, ...], tuple[int, ...]] | None = None  # skipped calls, live ones of them
        self._bases: dict[Any, str] = {}
        self._attached: _Attached | None = None
        self._busy = threading.Lock()
        self._passes = 0
        self._stopped = ""

    # For SelectiveBackward

    def attach(
        self,
        model: nn.Module,
        digest: Callable[[Iterable[str]], str],
    ) -> None:
        """Serve this model until `remove()`.

        digest: of the parameters and buffers of modules, by name; "" where some cannot be read. Raises RuntimeError
        where it serves another one.
        """
        if self._attached is not None:
            raise RuntimeError("this PrefixCache serves another model: make one for each SelectiveBackward")
        self._attached = _Attached(model, digest)
        self._layouts.clear()
        self._found = None

    def serves(self, model: nn.Module) -> bool:
        """Whether it is attached to this model, and not a copy."""
        return self._attached is not None and self._attached.model is model

    def remove(self) -> None:
        """Let go of model and files; what is kept stays. A second call does nothing."""
        for layout in self._layouts.values():
            if isinstance(layout, _Layout):
                layout.files.close()
        self._attached = None

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
                    _log.info("prefix cache: %s", self.forecast)
            finally:
                self._busy.release()

    def run_whole(self, forward: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """The pass without the cache, what is below the cut in eval mode where that is asked for."""
        samples = Samples.of(args, keywords) if self.eval_prefix else ""
        layout = None if isinstance(samples, str) else self._layouts.get(self._state(samples))
        if not isinstance(layout, _Layout):
            return forward(*args, **keywords)
        assert self._attached is not None
        with intercepted(layout.boundary.trace, layout.boundary.skipped, self._undisturbed):
            return self._attached.model.forward(*args, **keywords)

    def _plainly(self, why: str, forward: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if not self.plain[why]:
            warnings.warn(f"prefix cache: a pass runs without it: {why}", stacklevel=7)
        self.plain[why] += 1
        return forward(*args, **keywords)

    def _run(self, samples: Samples) -> Any:
        assert self._attached is not None
        model = self._attached.model
        layout = self._layout(samples)
        kept = self._activations(layout, samples)
        self._passes += 1
        if self._passes % _CHECKED == 0 or layout.waits_for(samples):
            self._compare(layout, samples, kept)
        with intercepted(layout.boundary.trace, layout.boundary.skipped, partial(_replay, layout.boundary, kept)):
            output = model.forward(*samples.args, **samples.keywords)
        if any(isinstance(leaf, Unkept) for leaf in _outcome(output)):
            raise NotReusable("the output depends on what was not kept")
        return output

    def _activations(self, layout: _Layout, samples: Samples) -> dict[Call, list[Tensor]]:
        """Of every live call; read, or computed and written."""
        digests = samples.digests()
        kept = {call: [known.empty(samples.count) for known in rows_in(call.output)] for call in layout.boundary.live}
        began = time.perf_counter()
        missing = [row for row, digest in enumerate(digests) if not layout.read(digest, row, kept)]
        self._seconds[1] += time.perf_counter() - began
        self.read += samples.count - len(missing)
        if layout.is_inherited and len(missing) < samples.count:
            self._hold_against_the_model(layout, samples, kept, missing)
        if missing:
            began = time.perf_counter()
            whole = len(missing) == samples.count
            rows = torch.tensor(missing)
            found = self._compute(layout.boundary, samples if whole else samples.take(rows), layout.boundary.live)
            for call, stores in kept.items():
                for known, store, value in zip(
                    rows_in(call.output), stores, _with_rows(call, found[call]), strict=True
                ):
                    for place, row in enumerate(missing):
                        _sample(known, store, row).copy_(_sample(known, value, place))
            self._seconds[0] += time.perf_counter() - began
            self.computed += len(missing)
            self._notice(digests[row] for row in missing)
            if not self._stopped:
                for row in missing:
                    if not layout.write(digests[row], row, kept):
                        self._say_full(layout)
                        break
        return kept

    def _hold_against_the_model(
        self, layout: _Layout, samples: Samples, kept: dict[Call, list[Tensor]], missing: list[int]
    ) -> None:
        """Once, of what was written before: weights and classes are in the key, the code of a model is not."""
        rows = torch.tensor([row for row in range(samples.count) if row not in missing])
        found = self._compute(layout.boundary, samples.take(rows), layout.boundary.live)
        for call, stores in kept.items():
            for known, store, value in zip(rows_in(call.output), stores, _with_rows(call, found[call]), strict=True):
                if not close(known.take(store, rows), value, rounding(value.dtype)):
                    raise RuntimeError(
                        f"prefix cache: {os.fspath(self.folder)!r} holds activations for these weights that are not "
                        f"what {call.name!r} computes: the code of the model has changed, or kernels do; name "
                        "another folder"
                    )
        layout.is_inherited = False

    def _notice(self, digests: Iterable[bytes]) -> None:
        if self.samples is None or self._stopped:
            return
        self._distinct.update(digests)
        if len(self._distinct) > self.samples and not self.read:
            self._stopped = "the loader gives other samples in every epoch"
            warnings.warn(
                f"prefix cache: {len(self._distinct):,} different samples came where an epoch has {self.samples:,}, "
                "and none came twice: the loader augments at random, or pads to other lengths in every epoch. Nothing "
                "more is kept; make samples repeat (no augmentation, fixed lengths), or leave the cache out",
                stacklevel=9,
            )

    def _say_full(self, layout: _Layout) -> None:
        self._stopped = layout.files.full
        if self._stopped:
            _log.info("prefix cache: %s; other samples are computed in every epoch", self._stopped)

    # What is learned of a shape of samples

    def _layout(self, samples: Samples) -> _Layout:
        state = self._state(samples)
        known = self._layouts.get(state) or self._layouts.get((samples.shared, False, *state[2:]))
        if known is None:
            try:
                known = self._learn(samples)
            except Drawn as error:
                raise ValueError(
                    f"prefix cache: {error}; pass PrefixCache(..., eval_prefix=True) to run what is below the cut in "
                    "eval mode, or leave the cache out"
                ) from None
            except NotReusable as error:
                if not any(isinstance(layout, _Layout) for layout in self._layouts.values()):
                    raise ValueError(f"prefix cache: {error}; leave the cache out, or choose higher layers") from None
                known = str(error)
            self._layouts[state] = known
        if isinstance(known, str):
            raise NotReusable(known)
        return known

    def _state(self, samples: Samples) -> tuple[Any, ...]:
        """What a layout is of: shapes, whether there is one sample, numerics, modes and weights."""
        assert self._attached is not None
        model = self._attached.model
        modes = tuple(module.training for module in model.modules())
        return samples.shared, samples.count == 1, _numerics(samples), modes, _versions(model)

    @torch.no_grad()
    def _learn(self, samples: Samples) -> _Layout:
        assert self._attached is not None
        model = self._attached.model
        trained = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}

        def run() -> Any:
            return model.forward(*samples.args, **samples.keywords)

        with preserved(model), torch.enable_grad():  # as the pass that it stands for
            state = VolatileState(model)
            trace, place = first_trained_call(model, run, trained, self._undisturbed)
            if written := state.changed_buffers():
                where = some(name for name, buffer in model.named_buffers() if id(buffer) in written)
                raise NotReusable(f"what runs below {place.name!r}, which trains, writes buffers ({where})")
        with preserved(model):
            skipped = self._know_outputs(Boundary(trace, 0.0, (), ()), place, samples)
            names = tuple(call.name for call in skipped)
            if self._found is not None and self._found[0] == names:
                boundary = Boundary(trace, 0.0, skipped, tuple(skipped[place] for place in self._found[1]))
            else:
                held = needed(trace, place, run, self._undisturbed)
                boundary = Boundary(trace, 0.0, skipped, tuple(call for call in skipped if call in held))
            kept = self._compute(boundary, samples, boundary.live)
            if not boundary.bytes_per_sample:
                raise NotReusable("nothing that is computed below the cut matters above it")
            boundary = self._fewest(boundary, samples, {call: _with_rows(call, kept[call]) for call in boundary.live})
        self._found = names, tuple(skipped.index(call) for call in boundary.live)
        files = self._files(boundary, place, samples)
        layout = _Layout(boundary, files, samples, is_inherited=len(files) > 0)
        return layout

    def _know_outputs(self, boundary: Boundary, place: Call, samples: Samples) -> tuple[Call, ...]:
        """The calls below the cut that can be left out, each with what is known of its output."""
        half = torch.arange(max(1, samples.count // 2))
        known: dict[Call, Any] = {}
        while True:
            skipped = tuple(finished_before(place))
            new = tuple(call for call in skipped if call not in known)
            if not new:
                break
            boundary = replace(boundary, skipped=skipped)
            found = self._compute(boundary, samples, new)
            if samples.count == 1:
                known |= {call: tree_map(lambda leaf: _rows(leaf, 0, 1), found[call]) for call in new}
                continue
            fewer = self._compute(boundary, samples.take(half.flip(0)), new)
            replaced = self._compute(boundary, samples.take(torch.arange(samples.count) % len(half)), new)
            for call in new:
                known[call], call.reason = _known(found[call], fewer[call], replaced[call], samples.count, len(half))
        if not skipped:
            why = what_prevents(place) or next((call.reason for call in known if call.reason == DEPENDS), "")
            what = f"nothing that could be kept runs before {place.name!r}, which trains"
            raise NotReusable(f"{what}: {why}" if why else what)
        for call in skipped:
            call.output = known[call]
        return skipped

    def _compute(self, boundary: Boundary, samples: Samples, wanted: tuple[Call, ...]) -> dict[Call, Any]:
        """The outputs of these calls, copied as they are returned, by a pass that ends at the last of them."""
        assert self._attached is not None
        model = self._attached.model
        found: dict[Call, Any] = {}

        def handle(call: Call, forward: Callable[[], Any]) -> Any:
            output = self._undisturbed(call, forward)
            if call in waiting:
                if call.output is not None and (difference := call.fits(output, samples.count)):
                    raise NotReusable(f"the output of {call.name!r} {difference}", call)
                if any(tensor.requires_grad for tensor in tensors(output)):
                    raise NotReusable(f"the output of {call.name!r} requires a gradient")
                found[call] = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)
                waiting.discard(call)
                if not waiting:
                    raise Reached
            return output

        waiting = set(wanted)
        if not waiting:
            return found
        try:
            with intercepted(boundary.trace, boundary.skipped, handle):
                model.forward(*samples.args, **samples.keywords)
        except Reached:
            return found
        raise NotReusable("the forward pass took another way than the traced one")

    def _undisturbed(self, call: Call, forward: Callable[[], Any]) -> Any:
        if not self.eval_prefix:
            return forward()
        modes = [(module, module.training) for module in call.module.modules()]
        try:
            for module, _ in modes:
                module.training = False
            return forward()
        finally:
            for module, training in modes:
                module.training = training

    def _fewest(self, boundary: Boundary, samples: Samples, kept: dict[Call, list[Tensor]]) -> Boundary:
        """The boundary without live calls that do not matter: a variable that nobody reads again holds its value."""
        expected = self._full(boundary, samples)
        if not self._same(boundary, samples, kept, expected):
            boundary = replace(boundary, writable=True)
            if not self._same(boundary, samples, kept, expected):
                raise NotReusable("a pass from the cut on does not give the output of the full one")
        for call in sorted(boundary.live, key=_bytes, reverse=True):
            if _bytes(call) * _SMALL < boundary.bytes_per_sample:
                break
            fewer = replace(boundary, live=tuple(other for other in boundary.live if other is not call))
            if self._same(fewer, samples, kept, expected):
                boundary = fewer
        return boundary

    def _full(self, boundary: Boundary, samples: Samples) -> list[Tensor]:
        assert self._attached is not None
        model = self._attached.model
        intercepting = intercepted(boundary.trace, boundary.skipped, self._undisturbed)
        with preserved(model), torch.no_grad(), intercepting:
            found = _outcome(model.forward(*samples.args, **samples.keywords))
        if not found:
            raise NotReusable("the model returns no tensors by which two passes could be compared")
        return found

    def _same(
        self, boundary: Boundary, samples: Samples, kept: dict[Call, list[Tensor]], expected: list[Tensor]
    ) -> bool:
        other = samples.take(torch.arange(samples.count).flip(0))
        try:
            return not self._difference(boundary, samples, kept, expected, other)
        except Exception:  # what a model says to placeholders in the wrong places
            return False

    def _difference(
        self,
        boundary: Boundary,
        samples: Samples,
        kept: dict[Call, list[Tensor]],
        expected: list[Tensor],
        other: Samples,
    ) -> str:
        assert self._attached is not None
        model = self._attached.model
        with preserved(model), torch.no_grad():
            with preserved(model):
                model.forward(*other.args, **other.keywords)  # what modules remember is of other samples now
            copies = {call: [tensor.clone() for tensor in stores] for call, stores in kept.items()}
            with intercepted(boundary.trace, boundary.skipped, partial(_replay, boundary, copies)):
                found = _outcome(model.forward(*samples.args, **samples.keywords))
        if len(found) != len(expected):
            return "have another structure"
        for ours, theirs in zip(found, expected, strict=True):
            if isinstance(ours, Unkept):
                return "depend on what was not kept"
            if not close(ours, theirs, rounding(theirs.dtype)):
                return f"are up to {float((ours.double() - theirs.double()).abs().nan_to_num().max()):.2g} off"
        return ""

    def _compare(self, layout: _Layout, samples: Samples, kept: dict[Call, list[Tensor]]) -> None:
        expected = self._full(layout.boundary, samples)
        difference = self._difference(layout.boundary, samples, kept, expected, layout.first)
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

    def _files(self, boundary: Boundary, place: Call, samples: Samples) -> ActivationFiles:
        assert self._attached is not None
        model = self._attached.model
        names = [call.name for call in boundary.skipped]
        base = self._base(names)
        if not base:
            raise NotReusable("weights below the cut cannot be read (offloaded, on the meta device): no key for them")
        modes = [bool(m.training) and not self.eval_prefix for n in names for m in model.get_submodule(n).modules()]
        description = {
            "format": FORMAT,
            "zest_fast": __version__.split("+")[0],
            "torch": torch.__version__,
            "model": type(unwrap(model)).__name__,
            "base": base,
            "cut": place.name,
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
        files = ActivationFiles(self.folder, self.limit, description, boundary.bytes_per_sample)
        for other in files.others():
            if {k: v for k, v in other.items() if k in _OF_A_RUN} != {
                k: v for k, v in description.items() if k in _OF_A_RUN
            }:
                _log.info(
                    "prefix cache: %s also holds activations of another %s; they are not used",
                    self.folder,
                    differences({k: description[k] for k in _OF_A_RUN}, {k: other.get(k) for k in _OF_A_RUN}),
                )
        return files

    def _base(self, names: list[str]) -> str:
        """Digest of the weights below the cut as they are, which takes a second for each GB and core."""
        assert self._attached is not None
        state = (tuple(names), _versions(self._attached.model))
        if state not in self._bases:
            self._bases[state] = self._attached.digest(names)
        return self._bases[state]

    @property
    def forecast(self) -> str:
        """What it takes and saves, once the first batch is through; "" before."""
        layout = next((layout for layout in self._layouts.values() if isinstance(layout, _Layout)), None)
        if layout is None:
            return ""
        each = layout.boundary.bytes_per_sample
        text = f"{each:,} bytes a sample"
        if self.samples is not None:
            text += f", {each * self.samples / 1e9:.3g} GB for {self.samples:,} samples"
        text += f" in {os.fspath(self.folder)!r}"
        if self.kept > self.computed:
            text += f", where {self.kept - self.computed:,} are already"
        if self.computed:
            each_takes = self._seconds[0] / self.computed
            whole = f", {each_takes * self.samples:.3g} s an epoch" if self.samples is not None else ""
            text += f"; computing one takes {1e3 * each_takes:.3g} ms{whole}, which further epochs save"
        return text

    @property
    def kept(self) -> int:
        """Samples whose activations are on disk, for the model that it serves."""
        return sum(len(layout.files) for layout in self._layouts.values() if isinstance(layout, _Layout))

    @property
    def bytes_kept(self) -> int:
        """On disk, of these."""
        return sum(layout.files.bytes_kept for layout in self._layouts.values() if isinstance(layout, _Layout))

    def __str__(self) -> str:
        if not self._layouts:
            return f"nothing yet, in {os.fspath(self.folder)!r}"
        text = f"{self.kept:,} samples in {self.bytes_kept / 1e9:.3g} GB"
        text += f"; {self.computed:,} computed, {self.read:,} read"
        if self.computed and self.read:
            computing, reading = self._seconds[0] / self.computed, self._seconds[1] / (self.read + self.computed)
            text += f" (in {1e3 * reading:.2g} ms each in place of {1e3 * computing:.2g} ms)"
        if self._stopped:
            text += f"; nothing more is kept: {self._stopped}"
        if self.plain:
            text += f"; {sum(self.plain.values()):,} passes without it: {some(self.plain)}"
        return text

    def __repr__(self) -> str:
        return f"PrefixCache({os.fspath(self.folder)!r}): {self}"

    def __getstate__(self) -> dict[str, Any]:
        """A copy, as of the model with its wrapper, serves nothing yet."""
        fresh = PrefixCache(self.folder, limit=self.limit, samples=self.samples, eval_prefix=self.eval_prefix)
        return {name: value for name, value in vars(fresh).items() if name != "_busy"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _busy=threading.Lock())


_OF_A_RUN = ("base", "cut", "numerics", "mode", "modules", "torch")


@dataclass(frozen=True)
class _Attached:
    model: nn.Module
    digest: Callable[[Iterable[str]], str]


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

    def read(self, digest: bytes, row: int, kept: dict[Call, list[Tensor]]) -> bool:
        """Whether the activations of this sample are there; then they are in row `row` of `kept`."""
        if digest not in self.files:
            return False
        memory = bytearray(self.boundary.bytes_per_sample)
        if not self.files.read(digest, memoryview(memory)):
            return False
        offset = 0
        for call in self.boundary.live:
            for known, store in zip(rows_in(call.output), kept[call], strict=True):
                size = known.bytes_per_sample
                if size:
                    flat = torch.frombuffer(
                        memory, dtype=known.dtype, count=size // known.dtype.itemsize, offset=offset
                    )
                    _sample(known, store, row).copy_(known.view(flat, 1))
                offset += size
        return True

    def write(self, digest: bytes, row: int, kept: dict[Call, list[Tensor]]) -> bool:
        memory = bytearray()
        for call in self.boundary.live:
            for known, store in zip(rows_in(call.output), kept[call], strict=True):
                one = _sample(known, store, row).permute(known.order).contiguous().cpu()
                memory += one.view(-1).view(torch.uint8).numpy().data
        return self.files.write(digest, memoryview(memory))


def _sample(known: Rows, store: Tensor, row: int) -> Tensor:
    each = known.shape[known.dim]
    return store.narrow(known.dim, row * each, each)


def _known(output: Any, fewer: Any, replaced: Any, count: int, half: int) -> tuple[Any, str]:
    """An output of `count` samples with Rows for its tensors, or why it cannot be kept.

    fewer: of the first `half` of the samples, the last of them first. replaced: of these twice, so that the first half
    has other samples beside it: the same kernels run, and more than their rounding comes from those.
    """
    dims, reason = dims_of(output, fewer, count, half)
    if reason:
        return None, reason
    first = list(range(half))
    for ours, less, other, dim in zip(tensors(output), tensors(fewer), tensors(replaced), dims, strict=True):
        if other.shape != ours.shape:
            return None, DEPENDS
        if dim is not None:
            ours, other = (samples_along(tensor, dim, count, first) for tensor in (ours, other))
            less = samples_along(less, dim, half, first[::-1])
        exact = rounding(ours.dtype)
        if not (close(other, ours, exact / 8) and close(less, ours, 10 * exact)):
            return None, DEPENDS
    of = iter(dims)

    def known(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or (dim := next(of)) is None:
            return leaf
        return _rows(leaf, dim, count)

    return tree_map(known, output), ""


def _rows(leaf: Any, dim: int, count: int) -> Any:
    if not isinstance(leaf, Tensor) or not leaf.dim():
        return leaf
    shape = list(leaf.shape)
    shape[dim] //= count
    return Rows(tuple(shape), dim, order_of(leaf), leaf.dtype, leaf.device)


def _with_rows(call: Call, output: Any) -> list[Tensor]:
    """Of an output, those with a part for each sample."""
    pairs = zip(tree_leaves(call.output), tree_leaves(output), strict=True)
    return [value for known, value in pairs if isinstance(known, Rows)]


def _bytes(call: Call) -> int:
    return sum(known.bytes_per_sample for known in rows_in(call.output))


def _replay(boundary: Boundary, kept: dict[Call, list[Tensor]], call: Call, _: Callable[[], Any]) -> Any:
    live = call in boundary.live
    stores = iter(kept[call] if live else ())

    def leaf(known: Any) -> Any:
        if isinstance(known, Rows) and live:
            return next(stores)
        if live:
            return known.clone() if isinstance(known, Tensor) else known
        return filled(known, _count(boundary, kept), torch.nan, boundary.writable)

    return tree_map(leaf, call.output)


def _count(boundary: Boundary, kept: dict[Call, list[Tensor]]) -> int:
    for call, stores in kept.items():
        for known, store in zip(rows_in(call.output), stores, strict=True):
            return store.shape[known.dim] // known.shape[known.dim]
    return 1


def _outcome(output: Any) -> list[Tensor]:
    """By what two passes are compared: every tensor of floats that the model returns."""
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    if not leaves:
        leaves = (
            [value for value in vars(output).values() if isinstance(value, Tensor)]
            if hasattr(output, "__dict__")
            else []
        )
    return [leaf for leaf in leaves if isinstance(leaf, Unkept) or leaf.is_floating_point()]


def _made_of(module: nn.Module) -> list[str]:
    """Classes and their settings."""
    return [f"{type(m).__module__}.{type(m).__qualname__}({m.extra_repr()})" for m in module.modules()]


def _versions(model: nn.Module) -> tuple[Any, ...]:
    """Changes when somebody writes to what is frozen, or puts something else in its place."""
    return tuple((id(p), p._version) for p in model.parameters() if not p.requires_grad and not p.is_inference())


def _numerics(samples: Samples) -> str:
    """What the precision of a pass depends on beside dtypes."""
    devices = {
        leaf.device.type for leaf in tree_leaves((samples.args, dict(samples.keywords))) if isinstance(leaf, Tensor)
    }
    autocast = [
        f"autocast {device} {torch.get_autocast_dtype(device)}"
        for device in sorted(devices)
        if torch.is_autocast_enabled(device)
    ]
    return ", ".join([*sorted(devices), f"matmul {torch.get_float32_matmul_precision()}", *autocast])
