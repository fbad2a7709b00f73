"""A dry run that goes through a few of the blocks that are alike, and counts them as often as they are there.

The forward pass of a skipped block hands on what it gets, once that is like what the block before it got. What came and
went in a traced block is then copied for each skipped one, if the traced ones show that blocks of the run differ by
nothing: in the order of the pass each does what the one before it did, to its own tensors and to its neighbour's.
Whatever is not exactly so raises Unlike, and the dry run goes through all blocks instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from zest_fast.foundation.torch_private import saved_tensors_hooks
from zest_fast.planning.ledger import Allocation, Books, Event, Ledger
from zest_fast.planning.repeats import BlockNumber, Path, Run, Unlike, state_of

_SIMPLE = (int, float, str, bool, type(None))


@contextmanager
def left_alone(model: nn.Module, names: Sequence[str], runs: Sequence[Run]) -> Iterator[None]:
    """Meanwhile no lean forwards, which are tried out one by one, are put into skipped blocks, which never run."""
    parts = [
        part for run in runs for place in run.skipped for part in [*model.get_submodule(names[place]).modules()][1:]
    ]
    for part in parts:
        part.forward = _never_runs
    try:
        yield
    finally:
        for part in parts:
            if vars(part).get("forward") is _never_runs:
                del part.forward


def _never_runs(*args: Any, **kwargs: Any) -> Any:
    raise Unlike("a part of a skipped block runs")


class SkippedBlocks:
    """The stand-ins of a model's skipped blocks, which are put in for good."""

    def __init__(self, model: nn.Module, names: Sequence[str], runs: Sequence[Run], ledger: Ledger) -> None:
        self._runs, self._ledger = runs, ledger
        self._calls: list[int] = []
        self._parameters: list[Tensor] = []
        for run in runs:
            call = _Call(run.numbers)
            for place in run.traced:
                block = model.get_submodule(names[place])
                for name, attribute in run.numbers:
                    module = block.get_submodule(name)
                    vars(module)[attribute] = BlockNumber()
                block.register_forward_pre_hook(self._entered(place), prepend=True)
            before = model.get_submodule(names[run.traced[-2]])
            before.register_forward_pre_hook(call.note_inputs, prepend=True, with_kwargs=True)
            before.register_forward_hook(call.note_output)
            for place in run.skipped:
                block = model.get_submodule(names[place])
                block.forward = self._stand_in(place, block, call)
                self._parameters += block.parameters()

    def leave_out(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """Those of `parameters` that are in no skipped block."""
        skipped = set(map(id, self._parameters))
        return [p for p in parameters if id(p) not in skipped]

    def check(self) -> None:
        """After the step. Raises Unlike if a run was not gone through in order and once."""
        for run in self._runs:
            if [place for place in self._calls if place in run.blocks] != [
                *run.traced[:-1],
                *run.skipped,
                run.traced[-1],
            ]:
                raise Unlike("blocks run in another order, or not once")
        if any(p.grad is not None for p in self._parameters):
            raise Unlike("a skipped block's parameters are used outside of it")

    def _entered(self, place: int) -> Callable[..., None]:
        def note(module: nn.Module, inputs: Any) -> None:
            if self._ledger.phase == "forward":
                self._calls.append(place)

        return note

    def _stand_in(self, place: int, block: nn.Module, call: _Call) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._calls.append(place)
            return call.handed_on(block, args, kwargs)

        return forward


class _Call:
    """What the block before the skipped ones got, went by and gave, without holding it."""

    def __init__(self, numbers: frozenset[Path]) -> None:
        self._numbers = numbers
        self._inputs: Any = None
        self._around: Any = None
        self._output: Any = None

    def note_inputs(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._inputs is None:
            self._inputs = _described((args, kwargs))
            self._around = _around(), state_of(module, self._numbers)

    def note_output(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._output is None:
            self._output = _described(output)

    def handed_on(self, block: nn.Module, args: Any, kwargs: Any) -> Any:
        """The output of a skipped block: its first input, where the output of a block is one of that form."""
        if self._inputs is None or self._output is None or _described((args, kwargs)) != self._inputs:
            raise Unlike("blocks of a run get different inputs")
        if (_around(), state_of(block, self._numbers)) != self._around:
            raise Unlike("blocks of a run are called in different ways")
        first = next((x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)), None)
        leaves, form = self._output
        tensors = [leaf for leaf in leaves if isinstance(leaf, _Form)]
        others = [leaf for leaf in leaves if not isinstance(leaf, _Form)]
        if first is None or tensors != [_form(first)] or not all(isinstance(leaf, _SIMPLE) for leaf in others):
            raise Unlike("a block's output is not of the form of its input")
        return tree_unflatten([first if isinstance(leaf, _Form) else leaf for leaf in leaves], form)


def _around() -> tuple[Any, ...]:
    """The modes of torch in which a block is called, and who decides about saved tensors."""
    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    hook = saved_tensors_hooks()  # each region of checkpointing makes its own
    whose = None if hook is None else getattr(hook, "__qualname__", type(hook))
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, whose


@dataclass(frozen=True)
class _Form:
    parts: tuple[Any, ...]


def _form(x: Tensor) -> _Form:
    return _Form((type(x), x.shape, x.stride(), x.dtype, x.device, x.requires_grad, x.storage_offset()))


def _described(tree: Any) -> tuple[list[Any], Any]:
    """The leaves, tensors by their form and what is no plain value by its identity, and how they are nested."""
    leaves, form = tree_flatten(tree)
    return [
        _form(x) if isinstance(x, Tensor) else x if isinstance(x, _SIMPLE) else ("object", id(x)) for x in leaves
    ], form


def with_repeats(books: Books, runs: Sequence[Run], names: Sequence[str]) -> Books:
    """The books as they would be had all blocks been gone through. names: of the blocks. Raises Unlike."""
    return _Repetition(books, runs, names).books()


@dataclass(frozen=True)
class _Segment:
    """Events in a row that belong to one block (-1: to none). births: what came in it. number: of this block's."""

    block: int
    number: int
    events: list[Event]
    births: list[Allocation]


Place = tuple[int, int, int]  # block, number of its segment, which of the births
Origin = tuple[int | None, int, int]  # the same by the distance among the traced; None = of no block of the run


class _Repetition:
    def __init__(self, books: Books, runs: Sequence[Run], names: Sequence[str]) -> None:
        self._books, self._runs, self._names = books, runs, names
        self._run_of = {place: run for run in runs for place in run.blocks}
        self._skipped = {place for run in runs for place in run.skipped}
        self._middles = {run.like for run in runs}
        self._segments: list[_Segment] = []
        self._by_block: dict[int, list[int]] = {}  # places in _segments
        self._born: dict[int, Place] = {}  # by id of the allocation
        self._copies: dict[Place, Allocation] = {}
        self._divide()

    def books(self) -> Books:
        before = self._what_is_inserted()
        events: list[Event] = []
        first, source = 0, 0
        for place, segment in enumerate(self._segments):
            for block, copied in before.get(place, ()):
                events += self._copied(copied, block)
            if source == self._books.first:
                first = len(events)
            source += len(segment.events)
            events += self._adjusted(segment)
        if source == self._books.first:
            first = len(events)
        return Books(events, first, self._flops())

    def _divide(self) -> None:
        previous = None
        for index, event in enumerate(self._books.events):
            block = event.block
            if block in self._skipped:
                raise Unlike("something happens between skipped blocks")
            if block != previous or index == self._books.first:
                number = len(self._by_block.setdefault(block, []))
                self._by_block[block].append(len(self._segments))
                self._segments.append(_Segment(block, number, [], []))
                previous = block
            segment = self._segments[-1]
            segment.events.append(event)
            if event.came:
                self._born[id(event.allocation)] = block, segment.number, len(segment.births)
                segment.births.append(event.allocation)

    def _what_is_inserted(self) -> dict[int, list[tuple[int, _Segment]]]:
        """By the place of the segment before which they come: skipped blocks, and the segments to copy for them."""
        inserted: dict[int, list[tuple[int, _Segment]]] = {}
        directions: dict[tuple[int, int], bool] = {}
        for run in self._runs:  # those that others are like come first
            of = [self._by_block.get(place, []) for place in run.traced]
            models = [self._segments[index] for index in self._by_block.get(run.like, [])]
            if any(len(indices) != len(models) for indices in of):
                raise Unlike("blocks are gone through more or less often than others")
            for number, indices in enumerate(zip(*of, strict=True)):
                ascending = indices[-1] > indices[0]
                if directions.setdefault((run.like, number), ascending) != ascending or list(indices) != list(
                    range(indices[0], indices[-1] + 1) if ascending else range(indices[0], indices[-1] - 1, -1)
                ):
                    raise Unlike("blocks are not gone through one after the other")
                model = models[number]
                self._check(run, model, [self._segments[index] for index in indices])
                copies = [(block, model) for block in (run.skipped if ascending else reversed(run.skipped))]
                inserted[indices[-1] if ascending else indices[-2]] = copies
        return inserted

    def _check(self, run: Run, model: _Segment, traced: list[_Segment]) -> None:
        """All bring forth the same, and free the same of their own and their neighbours' in the run, in order."""
        births = [self._birth(x, model.block) for x in model.births]
        story = self._story(model)
        for segment in traced:
            if [self._birth(x, segment.block) for x in segment.births] != births:
                raise Unlike("blocks make different tensors")
            outside = -1 if segment.block == run.traced[0] else 1 if segment.block == run.traced[-1] else 0
            within = [x for x in self._story(segment) if x is None or x[0] is not None]
            if within != [x for x in story if x is None or x[0] != outside or not outside]:
                raise Unlike("blocks free different tensors")

    def _birth(self, made: Allocation, block: int) -> tuple[Any, ...]:
        name = self._names[block]
        own = made.module == name or made.module.startswith(f"{name}.")
        where = made.module[len(name) :] if own else made.module
        return made.size, made.kind, own, where, made.phase, made.operator, made.shape, made.dtype

    def _story(self, segment: _Segment) -> list[Origin | None]:
        """What comes (None) and goes, in order: what goes by where it came from."""
        return [None if event.came else self._origin(segment.block, event.allocation) for event in segment.events]

    def _origin(self, block: int, gone: Allocation) -> Origin:
        """Of what a traced block frees. Raises Unlike for what is of its run, but neither its own nor a neighbour's."""
        home, number, which = self._born[id(gone)]
        run = self._run_of[block]
        if home not in run.blocks:
            return None, number, which
        distance = run.traced.index(home) - run.traced.index(block)
        if abs(distance) > 1:
            raise Unlike("a block frees what is not its own or its neighbour's")
        return distance, number, which

    def _copied(self, segment: _Segment, block: int) -> list[Event]:
        old, new = self._names[segment.block], self._names[block]
        events, births = [], 0
        for event in segment.events:
            made = event.allocation
            if event.came:
                own = made.module == old or made.module.startswith(f"{old}.")
                copy = replace(made, module=new + made.module[len(old) :] if own else made.module, block=block)
                self._copies[block, segment.number, births] = copy
                births += 1
            else:
                distance, number, which = self._origin(segment.block, made)
                if distance is None:
                    raise Unlike("a block frees what is of no block of its run")
                copy = self._at((block + distance, number, which))
            events.append(Event(copy, event.came, block))
        return events

    def _adjusted(self, segment: _Segment) -> list[Event]:
        """The events of a traced segment, in which what its neighbour left is now a skipped block's."""
        return [
            event if event.came else Event(self._owner(segment.block, event), False, event.block)
            for event in segment.events
        ]

    def _owner(self, block: int, event: Event) -> Allocation:
        home, number, which = self._born[id(event.allocation)]
        run = self._run_of.get(block)
        if run is not None and home in run.traced and home != block:
            distance = run.traced.index(home) - run.traced.index(block)
            if abs(distance) == 1:
                return self._at((block + distance, number, which))
        if home in self._middles and home != block:
            raise Unlike("what a block made is freed elsewhere")
        return event.allocation

    def _at(self, place: Place) -> Allocation:
        block, number, which = place
        if block in self._skipped:
            return self._copies[place]
        return self._segments[self._by_block[block][number]].births[which]

    def _flops(self) -> dict[tuple[str, int], int]:
        flops = dict(self._books.flops)
        if any(place in self._skipped for _, place in flops):
            raise Unlike("something is computed between skipped blocks")
        for run in self._runs:
            for phase in {phase for phase, _ in flops}:
                of_one = flops.get((phase, run.like), 0)
                if any(flops.get((phase, place), 0) != of_one for place in run.traced):
                    raise Unlike("blocks take different FLOPs")
                for place in run.skipped:
                    flops[phase, place] = of_one
        return flops
