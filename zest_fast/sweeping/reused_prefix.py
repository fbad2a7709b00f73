"""The frozen part of a pass, computed once for each sample and reused by every layer above it."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from zest_fast.prefix.boundaries import (
    Boundary,
    Call,
    NotReusable,
    Rows,
    Trace,
    boundaries_before,
    close,
    intercepted,
    rounding,
    rows_in,
    same_gradient,
)
from zest_fast.prefix.inputs import Inputs, batches, compared_of, count, rows_of
from zest_fast.prefix.placeholders import Reached, Unkept, filled
from zest_fast.prefix.volatile_state import VolatileState, preserved
from zest_fast.profiling.loss import call_model

TOLERANCE = 1e-5  # of the largest logit of a class, on the same samples: all but rounding is the same
# Other samples than the traced ones, and another number of them, so that nothing taken from the trace goes unnoticed.
_VERIFIED, _OTHERS = (1, 2, 3, 4), (4, 0, 1, 2)
_CHANGE = 1.0  # of the RMS of a weight, in a random direction


def find_boundary(
    model: nn.Module, trace: Trace, place: Call, trained: Sequence[nn.Parameter], probe: Inputs, limit: int
) -> Boundary:
    """The closest verified boundary before `place` that keeps at most `limit` bytes a sample.

    Where none is so small, the smallest. Without any the boundary skips nothing: a plain forward pass.
    trained: what a trial changes, the layer's parameters and the head's; they are changed for the comparison and put
    back, so that a prefix that depends on them is seen. probe: PROBED samples.
    """
    best = None
    others = rows_of(probe, torch.tensor(_OTHERS))

    def forward() -> Any:
        with preserved(model):
            return call_model(model, others)

    for boundary in boundaries_before(trace, place, forward):
        if best is not None and boundary.bytes_per_sample >= best.bytes_per_sample:
            continue
        verified = _verified(model, boundary, trained, probe)
        if verified is not None:
            best = verified
            if best.bytes_per_sample <= limit:
                break
    return best or Boundary(trace, 0.0, (), ())


def _verified(model: nn.Module, boundary: Boundary, trained: Sequence[nn.Parameter], probe: Inputs) -> Boundary | None:
    """The boundary if passes from it give the output of full ones, whatever the weights and the skipped outputs are."""
    for candidate in (boundary, replace(boundary, writable=True)):
        try:
            with preserved(model):
                if _gives_the_same(model, candidate, trained, probe):
                    return candidate
        except Exception:  # what a model says to placeholders in the wrong places, or in memory it cannot write to
            continue
    return None


def _gives_the_same(model: nn.Module, boundary: Boundary, trained: Sequence[nn.Parameter], probe: Inputs) -> bool:
    inputs, others = (rows_of(probe, torch.tensor(rows)) for rows in (_VERIFIED, _OTHERS))
    samples = len(_VERIFIED)
    kept: dict[Call, Any] = {}

    def keep(call: Call, run: Callable[[], Any]) -> Any:
        kept[call] = run()
        if difference := call.fits(kept[call], samples):
            raise NotReusable(f"the output of {call.name!r} {difference}", call)
        return tree_map(_copy, kept[call])

    def replay(value: float | None, call: Call, _: Callable[[], Any]) -> Any:
        if call in boundary.live:
            return tree_map(_copy, kept[call])
        if value is None:  # what other samples would have given
            return tree_map(lambda leaf: leaf.flip(0) if isinstance(leaf, Tensor) and leaf.dim() else leaf, kept[call])
        return tree_map(lambda leaf: filled(leaf, samples, value, boundary.writable), call.output)

    state = VolatileState(model)

    def outcome(differentiated: bool) -> tuple[Tensor, list[Tensor | None]]:
        state.restore()
        logits = compared_of(call_model(model, inputs))
        if not differentiated:
            return logits, []
        weights = torch.linspace(-1, 1, logits.numel(), device=logits.device).view_as(logits).to(logits.dtype)
        return logits.detach(), list(torch.autograd.grad(logits, trained, weights, allow_unused=True))

    with torch.no_grad(), intercepted(boundary.trace, boundary.skipped, keep):
        call_model(model, inputs)
    # Comparisons and branches do not see a NaN; they see numbers on both sides of all that occurs. The values may not
    # depend on a weight, and their gradients do all the same.
    with _changed(trained), torch.enable_grad():
        expected, gradients = outcome(differentiated=True)
        if expected.isnan().any():  # a comparison would tell nothing
            return False
        with torch.no_grad():
            call_model(model, others)  # what skipped modules remember is of other samples from now on
        for fill, differentiated in ((torch.nan, True), (None, True), (1e4, False), (-1e4, False)):
            with (
                torch.set_grad_enabled(differentiated),
                intercepted(boundary.trace, boundary.skipped, partial(replay, fill)),
            ):
                found, others_gradients = outcome(differentiated)
            if isinstance(found, Unkept) or not _same_logits(found, expected):
                return False
            if differentiated and not all(map(same_gradient, others_gradients, gradients)):
                return False
    return True


def _same_logits(found: Tensor, expected: Tensor) -> bool:
    """Each class on its own scale: one of -10,000, which stands for never, does not hide what the others do."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    relative = max(TOLERANCE, rounding(found.dtype) / 8)
    found, expected = found.double(), expected.double()
    sizes = expected.abs().masked_fill(~expected.isfinite(), 0).amax(0)
    scale = torch.maximum(sizes, sizes.median())
    tolerance = scale * relative
    return bool((((found - expected).abs() <= tolerance) | (found == expected)).all())


@contextmanager
def _changed(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, other values that take a gradient, off in a random direction: a weight of which only the direction
    counts, or one of zeros, would not show what a factor does to it."""
    before = [(parameter, parameter.detach().clone(), parameter.requires_grad) for parameter in parameters]
    generator = torch.Generator().manual_seed(0)
    try:
        for parameter, value, _ in before:
            noise = torch.randn(value.shape, generator=generator).to(value)
            size = float(value.detach().float().square().mean().sqrt()) or 0.02
            with torch.no_grad():
                parameter.add_(noise, alpha=_CHANGE * size)
            parameter.requires_grad_()
        yield
    finally:
        for parameter, value, requires_grad in before:
            with torch.no_grad():
                parameter.copy_(value)
            parameter.requires_grad_(requires_grad)


def _copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


class ReusedPrefix:
    """Runs a model over samples of one set of inputs from a boundary on, and moves the boundary up.

    inputs: of all samples. limit: bytes that may be kept in memory for each sample; beyond, all is memory-mapped from
    files in `folder` that have no name, so that nothing is left behind, however the process ends.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, *, limit: int, folder: Path, batch_size: int = 64) -> None:
        self._model = model
        self._inputs = inputs
        self._limit = limit
        self._folder = folder
        self._batch_size = batch_size
        self._boundary: Boundary | None = None
        self._kept: dict[Call, list[Tensor]] = {}

    def __len__(self) -> int:
        return count(self._inputs)

    def run(self, rows: Tensor) -> Any:
        """The model's output for the samples with these numbers.

        Raises NotReusable where the pass goes another way than the traced one, or its output is NaN and that of a full
        pass is not.
        """
        boundary = self._boundary
        if boundary is None or not boundary.skipped:
            return self._run_fully(rows)
        try:
            with intercepted(boundary.trace, boundary.skipped, partial(self._replay, rows)):
                output = call_model(self._model, rows_of(self._inputs, rows))
        except NotReusable:
            raise
        except Exception as error:  # raised again by the full pass that follows, if it is the model's own
            raise NotReusable(f"the pass from there failed ({type(error).__name__}: {error})") from error
        logits = compared_of(output)
        if isinstance(logits, Unkept):
            raise NotReusable("the logits depend on an output that was not kept")
        if bool(logits.isnan().any()):
            with preserved(self._model):
                self._require_close(logits.detach(), compared_of(self._run_fully(rows)).detach())
        return output

    def check(self, rows: Tensor) -> None:
        """Raises NotReusable unless the output for these samples is that of a full pass."""
        if self._boundary is None or not self._boundary.skipped:
            return
        with preserved(self._model):
            state = VolatileState(self._model)
            found = compared_of(self.run(rows)).detach()
            state.restore()  # so that the same random numbers are drawn
            self._require_close(found, compared_of(self._run_fully(rows)).detach())

    def _run_fully(self, rows: Tensor) -> Any:
        return call_model(self._model, rows_of(self._inputs, rows))

    def _require_close(self, found: Tensor, expected: Tensor) -> None:
        if not close(found, expected, rounding(expected.dtype)):
            wrong = "NaN" if found.isnan().any() else f"{float((found - expected).abs().max()):.2g} off"
            raise NotReusable(f"the logits of a batch were {wrong}, beside those of the full pass")

    @torch.no_grad()
    def advance(self, boundary: Boundary) -> None:
        """Take passes up from `boundary`: one pass leads there, from the present one or, where it cannot, the input.

        Then another one, over other batches, has to give the same. Raises NotReusable where it does not, or one goes
        another way than the traced pass; passes are taken up from where they were before, or the input, then.
        """
        fresh = {call: self._allocate(call, boundary) for call in boundary.live if call not in self._kept}
        if fresh:
            present = set(self._boundary.skipped) if self._boundary is not None else set()
            if any(present.intersection(call.path()) for call in fresh):
                del fresh
                self._boundary, self._kept = None, {}
                return self.advance(boundary)
            with preserved(self._model):
                for rows in batches(len(self), self._batch_size):
                    self._capture(boundary, rows, fresh, self._keep)
                order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))
                for rows in order.split(max(1, self._batch_size // 2)):
                    self._capture(boundary, rows, fresh, self._require_same)
        self._kept = {call: fresh[call] if call in fresh else self._kept[call] for call in boundary.live}
        self._boundary = boundary

    def _replay(self, rows: Tensor, call: Call, _: Callable[[], Any]) -> Any:
        assert self._boundary is not None
        kept = iter(self._kept.get(call, ()))

        def leaf(known: Any) -> Any:
            if call not in self._kept:
                # Verified not to matter; should it matter to other samples, they show a NaN.
                return filled(known, len(rows), torch.nan, self._boundary.writable)  # type: ignore[union-attr]
            return known.take(next(kept), rows) if isinstance(known, Rows) else _copy(known)

        return tree_map(leaf, call.output)

    def _capture(
        self,
        boundary: Boundary,
        rows: Tensor,
        fresh: dict[Call, list[Tensor]],
        visit: Callable[[Call, Tensor, list[Tensor], list[Tensor]], None],
    ) -> None:
        skipped = self._boundary.skipped if self._boundary is not None else ()
        waiting = set(fresh)

        def handle(call: Call, run: Callable[[], Any]) -> Any:
            if call not in fresh:
                return self._replay(rows, call, run)
            output = run()
            if any(isinstance(leaf, Unkept) for leaf in tree_leaves(output)):
                raise NotReusable(f"the output of {call.name!r} depends on one that was not kept", call)
            if difference := call.fits(output, len(rows)):
                raise NotReusable(f"the output of {call.name!r} {difference}", call)
            pairs = zip(tree_leaves(call.output), tree_leaves(output), strict=True)
            visit(call, rows, fresh[call], [value for known, value in pairs if isinstance(known, Rows)])
            waiting.discard(call)
            if not waiting:
                raise Reached
            return output

        try:
            with intercepted(boundary.trace, skipped, handle, watched=fresh):
                call_model(self._model, rows_of(self._inputs, rows))
        except Reached:
            return
        raise NotReusable("the forward pass took another way than the traced one")

    def _keep(self, call: Call, rows: Tensor, stores: list[Tensor], values: list[Tensor]) -> None:
        for known, store, value in zip(rows_in(call.output), stores, values, strict=True):
            known.put(store, rows, value)

    def _require_same(self, call: Call, rows: Tensor, stores: list[Tensor], values: list[Tensor]) -> None:
        for known, store, value in zip(rows_in(call.output), stores, values, strict=True):
            if not close(value, known.take(store, rows), rounding(value.dtype)):
                raise NotReusable(f"the output of {call.name!r} depends on the other samples of its batch", call)

    def _allocate(self, call: Call, boundary: Boundary) -> list[Tensor]:
        if boundary.bytes_per_sample <= self._limit:
            return [known.empty(len(self)) for known in rows_in(call.output)]
        return [_mapped(known, len(self), self._folder) for known in rows_in(call.output)]


def _mapped(known: Rows, samples: int, folder: Path) -> Tensor:
    """Uninitialised, on disk: a file without a name, written and read through its mapping."""
    size = samples * known.bytes_per_sample
    if not size:
        return known.empty(samples)
    with tempfile.TemporaryFile(dir=folder) as file:
        try:  # a full disk is an error here, not a SIGBUS later
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise RuntimeError(
                f"{size >> 20} MiB of activations do not fit in {str(folder)!r} ({error.strerror}): make room, or "
                "sweep with a larger cache_bytes= or with reuse=False"
            ) from error
        memory = mmap.mmap(file.fileno(), size)
    return known.view(torch.frombuffer(memory, dtype=known.dtype), samples)
