"""The frozen part of a pass, computed once for each sample and reused by every layer above it."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from zest_fast.profiling.loss import call_model
from zest_fast.sweeping.boundaries import (
    Boundary,
    Call,
    Trace,
    boundaries_before,
    intercepted,
    tensors,
)
from zest_fast.sweeping.inputs import Inputs, batches, count, logits_of, rows_of, take

TRACED, VERIFIED = 2, 3  # samples; different numbers, so that a shape taken from the trace does not go unnoticed
TOLERANCE = 1e-5  # of the largest logit: other batch sizes choose other kernels
_SAFETENSORS_NAMES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16",
                      torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL"}  # fmt: skip


class _Reached(BaseException):
    """Ends a pass that has yielded all it was run for; no model catches it by accident."""


def find_boundary(model: nn.Module, trace: Trace, place: Call, weight: Tensor, probe: Inputs, limit: int) -> Boundary:
    """The closest verified boundary before `place` that keeps at most `limit` bytes a sample.

    Where none is so small, the smallest. Without any the boundary skips nothing: a plain forward pass.
    weight: of the layer; it is changed for the comparison and put back, so that a prefix that depends on it is seen.
    probe: at least TRACED + VERIFIED samples.
    """
    traced = rows_of(probe, torch.arange(TRACED))
    others = rows_of(probe, torch.arange(TRACED, TRACED + VERIFIED))
    best = None
    for boundary in boundaries_before(trace, place, lambda: call_model(model, traced)):
        if best is not None and boundary.bytes_per_sample >= best.bytes_per_sample:
            continue
        if _gives_the_same(model, boundary, weight, others):
            best = boundary
            if best.bytes_per_sample <= limit:
                break
    return best or Boundary(trace, 0.0, (), ())


@torch.no_grad()
def _gives_the_same(model: nn.Module, boundary: Boundary, weight: Tensor, inputs: Inputs) -> bool:
    kept: dict[Call, Any] = {}

    def keep(call: Call, run: Callable[[], Any]) -> Any:
        kept[call] = run()
        return tree_map(_copy, kept[call])

    def replay(call: Call, _: Callable[[], Any]) -> Any:
        return tree_map(_copy, kept[call]) if call in boundary.live else tree_map(_unknown, kept[call])

    before = weight.detach().clone()
    try:
        with intercepted(boundary.trace, boundary.skipped, keep):
            call_model(model, inputs)
        weight.mul_(1.25)
        expected = logits_of(call_model(model, inputs))
        with intercepted(boundary.trace, boundary.skipped, replay):
            found = logits_of(call_model(model, inputs))
    except (RuntimeError, ValueError, TypeError, IndexError):  # what a model says to placeholders in the wrong places
        return False
    finally:
        weight.copy_(before)
    return torch.allclose(found, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


def _copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _unknown(leaf: Any) -> Any:
    return torch.full_like(leaf, torch.nan) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


class PrefixCache:
    """Runs a model over samples of one set of inputs from a boundary on, and moves the boundary up.

    inputs: of all samples. limit: bytes that may be kept in memory for each sample; beyond, all is memory-mapped from
    safetensors files in `folder`, which have no name any more while they are used, so that nothing is left behind.
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
        """The model's output for the samples with these numbers."""
        boundary = self._boundary
        if boundary is None or not boundary.skipped:
            return call_model(self._model, rows_of(self._inputs, rows))
        with intercepted(boundary.trace, boundary.skipped, partial(self._replay, rows)):
            return call_model(self._model, rows_of(self._inputs, rows))

    @torch.no_grad()
    def advance(self, boundary: Boundary) -> None:
        """Take passes up from `boundary`: one pass leads there, from the present one or, where it cannot, the input."""
        fresh = {call: self._allocate(call, boundary) for call in boundary.live if call not in self._kept}
        if fresh:
            present = set(self._boundary.skipped) if self._boundary is not None else set()
            if any(present.intersection(call.path()) for call in fresh):
                self._boundary, self._kept = None, {}
                return self.advance(boundary)
            for rows in batches(len(self), self._batch_size):
                self._capture(boundary.trace, rows, fresh)
        self._kept = {call: fresh[call] if call in fresh else self._kept[call] for call in boundary.live}
        self._boundary = boundary

    def _replay(self, rows: Tensor, call: Call, _: Callable[[], Any]) -> Any:
        if call in self._kept:
            kept = iter(self._kept[call])
            return tree_map(lambda leaf: take(next(kept), rows) if isinstance(leaf, Tensor) else leaf, call.output)
        # Verified not to matter, so it need not even be filled.
        return tree_map(lambda leaf: _empty(leaf, len(rows)) if isinstance(leaf, Tensor) else leaf, call.output)

    def _capture(self, trace: Trace, rows: Tensor, fresh: dict[Call, list[Tensor]]) -> None:
        skipped = self._boundary.skipped if self._boundary is not None else ()
        waiting = set(fresh)

        def take(call: Call, run: Callable[[], Any]) -> Any:
            if call not in fresh:
                return self._replay(rows, call, run)
            output = run()
            for store, leaf in zip(fresh[call], tensors(output), strict=True):
                store[rows[0] : rows[-1] + 1] = leaf  # rows that follow one another: a copy, not a scatter
            waiting.discard(call)
            if not waiting:
                raise _Reached
            return output

        try:
            with intercepted(trace, skipped, take, watched=fresh):
                call_model(self._model, rows_of(self._inputs, rows))
        except _Reached:
            return
        raise RuntimeError("the forward pass took another way than the traced one; sweep with reuse=False")

    def _allocate(self, call: Call, boundary: Boundary) -> list[Tensor]:
        if boundary.bytes_per_sample <= self._limit:
            return [_empty(leaf, len(self)) for leaf in tensors(call.output)]
        return [_mapped(leaf, len(self), self._folder) for leaf in tensors(call.output)]


def _empty(leaf: Tensor, rows: int) -> Tensor:
    """[rows, ...] in the memory format of the example: a model in channels_last stays fast."""
    last = leaf.dim() == 4 and not leaf.is_contiguous() and leaf.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty((rows, *leaf.shape[1:]), dtype=leaf.dtype, device=leaf.device, memory_format=layout)


def _mapped(leaf: Tensor, rows: int, folder: Path) -> Tensor:
    """[rows, ...] on disk: a safetensors file of one tensor, written and read through its mapping."""
    shape = [rows, *leaf.shape[1:]]
    size = rows * leaf[0].numel() * leaf.element_size()
    entry = {"dtype": _SAFETENSORS_NAMES[leaf.dtype], "shape": shape, "data_offsets": [0, size]}
    header = json.dumps({"kept": entry}).encode()
    header += b" " * (-len(header) % 8)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".safetensors") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.flush()
        try:  # a full disk is an error here, not a SIGBUS later
            os.posix_fallocate(file.fileno(), 0, 8 + len(header) + size)
        except OSError as error:
            raise RuntimeError(
                f"{size >> 20} MiB of activations do not fit in {str(folder)!r} ({error.strerror}): make room, or "
                "sweep with a larger cache_bytes= or with reuse=False"
            ) from error
        whole = torch.from_file(file.name, shared=True, size=8 + len(header) + size, dtype=torch.uint8)
    return whole[8 + len(header) :].view(leaf.dtype).view(shape)
