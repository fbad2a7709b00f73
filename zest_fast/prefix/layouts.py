"""What is learned of the first samples of a shape: where their passes end below the cut, and what has to be kept."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from zest_fast.foundation.nearest import some
from zest_fast.prefix.boundaries import (
    DEPENDS,
    Boundary,
    Call,
    NotReusable,
    Rows,
    close,
    dims_of,
    equal,
    finished_before,
    rounding,
    rows_in,
    same_gradient,
    samples_along,
    tensors,
    what_prevents,
)
from zest_fast.prefix.flow import before, first_trained_call, needed
from zest_fast.prefix.passes import Kept, Passes, undone, with_rows
from zest_fast.prefix.sample_keys import Samples
from zest_fast.prefix.volatile_state import VolatileState

_SMALL = 64
"""A call with less than this part of what is kept is not worth a pass to find out whether it is needed."""


class Learner:
    """Of one model; shapes that are met later mostly need what the first one needed."""

    def __init__(self, passes: Passes) -> None:
        self._passes = passes
        self._found: tuple[tuple[str, ...], tuple[int, ...]] | None = None  # skipped calls, live ones of them

    @torch.no_grad()
    def learn(self, samples: Samples) -> tuple[Boundary, Call, frozenset[int]]:
        """The place to take passes up from, the call that comes there, of what trains or runs with it, and the ids of
        the tensors that are read before.

        Raises NotReusable where nothing can be kept.
        """
        passes, model = self._passes, self._passes.model
        trained = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
        with undone(model), torch.enable_grad():  # as the pass that it stands for
            state = VolatileState(model)
            trace, place, read = first_trained_call(model, lambda: passes.run(samples), trained, passes.undisturbed)
            if state.changed_buffers():
                where = some(state.changed_names())
                raise NotReusable(f"what runs below {place.name!r}, which trains, writes buffers ({where})")
            below = {call.name for call in before(place)}
            numbers = _numbers(model, below)
            first_trained_call(model, lambda: passes.run(samples), trained, passes.undisturbed)
            if counting := sorted(n for n, value in _numbers(model, below).items() if numbers.get(n) != value):
                raise NotReusable(f"what runs below {place.name!r}, which trains, counts its passes ({some(counting)})")
        with undone(model):
            skipped = self._know_outputs(Boundary(trace, 0.0, (), ()), place, samples)
            names = tuple(call.name for call in skipped)
            if self._found is not None and self._found[0] == names:
                live = tuple(skipped[number] for number in self._found[1])
            else:
                held = needed(trace, place, lambda: passes.run(samples), passes.undisturbed)
                live = tuple(call for call in skipped if call in held)
            boundary = Boundary(trace, 0.0, skipped, live)
            if not boundary.bytes_per_sample:
                raise NotReusable("nothing that is computed below the cut matters above it")
            found = passes.to_cut(boundary, samples, live)
            kept = {call: with_rows(call, found[call]) for call in live}
            boundary = self._fewest(boundary, samples, kept)
            self._check_gradients(boundary, samples, kept)
        self._found = names, tuple(skipped.index(call) for call in boundary.live)
        return boundary, place, read

    def _know_outputs(self, boundary: Boundary, place: Call, samples: Samples) -> tuple[Call, ...]:
        """The calls below the cut that can be left out, each with what is known of its output."""
        half = torch.arange(max(1, samples.count // 2))
        known: dict[Call, Any] = {}
        while True:  # calls inside those whose output cannot be kept come next
            skipped = tuple(finished_before(place))
            new = tuple(call for call in skipped if call not in known)
            if not new:
                break
            boundary = replace(boundary, skipped=skipped)
            found = self._passes.to_cut(boundary, samples, new)
            if samples.count == 1:
                known |= {call: tree_map(_of_one, found[call]) for call in new}
                continue
            fewer = self._part(boundary, samples.take(half.flip(0)), new)
            replaced = self._part(boundary, samples.take(torch.arange(samples.count) % len(half)), new)
            for call in new:
                known[call], call.reason = _known(found[call], fewer[call], replaced[call], samples.count, len(half))
        if not skipped:
            why = what_prevents(place) or next((call.reason for call in known if call.reason == DEPENDS), "")
            what = f"nothing that could be kept runs before {place.name!r}, which trains"
            raise NotReusable(f"{what}: {why}" if why else what)
        for call in skipped:
            call.output = known[call]
        return skipped

    def _part(self, boundary: Boundary, samples: Samples, wanted: tuple[Call, ...]) -> dict[Call, Any]:
        try:
            return self._passes.to_cut(boundary, samples, wanted)
        except NotReusable:
            raise
        except Exception as error:
            raise NotReusable(
                f"the model does not run on a part of a batch or with others in it ({type(error).__name__}: {error})"
            ) from error

    def _check_gradients(self, boundary: Boundary, samples: Samples, kept: Kept) -> None:
        """What backward recomputes, say, does not show in outputs."""
        ours = self._passes.gradients(boundary, samples, kept)
        theirs = self._passes.gradients(boundary, samples, None)
        if len(ours) != len(theirs) or not all(map(same_gradient, ours, theirs)):
            raise NotReusable("a pass from the cut on does not give the gradients of the full one")

    def _fewest(self, boundary: Boundary, samples: Samples, kept: Kept) -> Boundary:
        """The boundary without live calls that do not matter: a variable that nobody reads again holds its value."""
        expected = self._passes.outcome(boundary, samples)
        if not self._gives(boundary, samples, kept, expected):
            boundary = replace(boundary, writable=True)
            if not self._gives(boundary, samples, kept, expected):
                raise NotReusable("a pass from the cut on does not give the output of the full one")
        for call in sorted(boundary.live, key=_bytes, reverse=True):
            if _bytes(call) * _SMALL < boundary.bytes_per_sample:
                break
            fewer = replace(boundary, live=tuple(other for other in boundary.live if other is not call))
            if self._gives(fewer, samples, kept, expected):
                boundary = fewer
        return boundary

    def _gives(self, boundary: Boundary, samples: Samples, kept: Kept, expected: list[Tensor]) -> bool:
        other = samples.take(torch.arange(max(1, samples.count // 2)))  # of which a mean is another one
        try:
            return not self._passes.difference(boundary, samples, kept, expected, other)
        except Exception:  # what a model says to placeholders in the wrong places
            return False


def _numbers(model: nn.Module, names: Collection[str]) -> dict[str, Any]:
    """Plain values that these modules hold: a counter is another one after every pass."""
    return {
        f"{name}.{key}" if name else key: value
        for name, module in model.named_modules()
        if name in names
        for key, value in vars(module).items()
        if type(value) in (bool, int, float, str) and key != "training"
    }


def _known(output: Any, fewer: Any, replaced: Any, count: int, half: int) -> tuple[Any, str]:
    """An output of `count` samples with Rows for its tensors, or why it cannot be kept.

    fewer: of the first `half` of the samples, the last of them first. replaced: of these twice, so that the first half
    has other samples beside it: the same kernels run, and more than their rounding comes from those.
    """
    dims, reason = dims_of(output, fewer, count, half)
    if reason:
        return None, reason
    if not all(_same_values(output, other) for other in (fewer, replaced)):
        return None, "holds a value that changes with the samples"
    first = list(range(half))
    for ours, less, other, dim in zip(tensors(output), tensors(fewer), tensors(replaced), dims, strict=True):
        if other.shape != ours.shape:
            return None, DEPENDS
        if dim is not None:
            ours, other = (samples_along(tensor, dim, count, first) for tensor in (ours, other))
            less = samples_along(less, dim, half, first[::-1])
        exact = rounding(ours.dtype)
        if not (_near(other, ours, exact / 8) and close(less, ours, 10 * exact)):
            return None, DEPENDS
    of = iter(dims)

    def known(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or (dim := next(of)) is None:
            return leaf
        return Rows.of(leaf, dim, count)

    return tree_map(known, output), ""


def _near(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """`close`, but each entry of the last dimension on a scale of its own, down to a thousandth of the largest one: a
    huge feature does not hide what the others do."""
    if not close(found, expected, tolerance) or expected.dim() < 2 or not expected.is_floating_point():
        return close(found, expected, tolerance)
    sizes = expected.double().abs().nan_to_num(0.0, 0.0, 0.0).flatten(0, -2).amax(0)
    scale = torch.maximum(sizes, 1e-3 * sizes.max())
    apart = (found.double() - expected.double()).abs().nan_to_num(0.0, 0.0, 0.0)
    return bool((apart <= tolerance * scale).all())


def _same_values(output: Any, other: Any) -> bool:
    """Whether two outputs are built alike and hold the same beside tensors."""
    ours, structure = tree_flatten(output)
    theirs, other_structure = tree_flatten(other)
    if structure != other_structure:
        return False
    return all(equal(a, b) for a, b in zip(ours, theirs, strict=True) if not isinstance(a, Tensor))


def _of_one(leaf: Any) -> Any:
    """Of a single sample, in which nothing tells what grows with more."""
    return Rows.of(leaf, 0, 1) if isinstance(leaf, Tensor) and leaf.dim() else leaf


def _bytes(call: Call) -> int:
    return sum(known.bytes_per_sample for known in rows_in(call.output))
