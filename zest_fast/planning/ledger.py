"""The books of a dry run: every storage that came and went, what it was for, and the FLOPs of every operator.

Bytes of a run that is real are counted by counted_memory.py, from the allocator's events. Fake tensors make no such
events, and events do not say whose forward or backward pass a storage belongs to: hence another way of counting.

A TorchDispatchMode sees the result of each operator in forward, backward and the update alike. It does not see what is
held inside of operators: the large ones of a CPU come by formula (onednn.py). Real steps differ from it by less than
2 % (tests/planning/test_plan.py, tests/planning/test_plan_architectures.py).
"""

from __future__ import annotations

import bisect
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zest_fast.foundation.torch_private import (
    FakeTensorMode,
    current_node,
    current_task,
    next_sequence_number,
    sequence_number,
    storage_key,
    tensor_key,
    use_counts,
    use_counts_are_told,
)
from zest_fast.planning import onednn
from zest_fast.planning.flop_formulas import FORMULAS
from zest_fast.planning.repeats import Run, Unlike

KINDS = ("weights", "gradients", "optimizer", "activations", "loss")

_UNIT = 512  # bytes: torch's allocator for CUDA hands out multiples of it


@dataclass(eq=False, slots=True)
class Allocation:
    """One storage. module: whose forward, backward or update made it; "" is the model itself. operator: "" if it was
    there from the start. phase: in which it was made, "before" if before the step. block: the place of the block that
    made it or that has it, -1: of none.
    """

    size: int
    kind: str
    module: str
    phase: str
    operator: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    block: int = -1


class Event(NamedTuple):
    """An allocation came or went, while a block ran (-1: none)."""

    allocation: Allocation
    came: bool
    block: int


@dataclass(frozen=True)
class Peak:
    """The moment at which most bytes are alive: what is alive then, and the allocation that came last."""

    size: int
    alive: tuple[Allocation, ...]
    last: Allocation


@dataclass(frozen=True)
class Books:
    """What a ledger has counted. first: the event from which on a peak counts. flops: by phase and block."""

    events: list[Event]
    first: int
    flops: dict[tuple[str, int], int]

    @property
    def flops_by_phase(self) -> dict[str, int]:
        sums: dict[str, int] = {}
        for (phase, _), flops in self.flops.items():
            sums[phase] = sums.get(phase, 0) + flops
        return sums

    def peak(self) -> Peak:
        """The highest sum of bytes since the first event that counts."""
        alive = highest = 0
        moment = self.first - 1
        for index, (allocation, came, _) in enumerate(self.events):
            alive += allocation.size if came else -allocation.size
            if index >= self.first and alive > highest:
                highest, moment = alive, index
        there: dict[Allocation, None] = {}
        for allocation, came, _ in self.events[: moment + 1]:
            if came:
                there[allocation] = None
            else:
                del there[allocation]
        return Peak(highest, tuple(there), self.events[moment].allocation)


class Ledger(TorchDispatchMode):
    """Counts from its construction on; `start` sets the moment from which on a peak counts.

    on_cpu: whether what oneDNN holds beside the results counts. estimated: the modules of which something was counted
    by a formula that no tensor shows. blocks: names of the model's blocks, if it matters which of them runs. runs:
    of which some are skipped: an operator that mixes what several of the others made raises Unlike.
    """

    def __init__(self, on_cpu: bool = False, blocks: Sequence[str] = (), runs: Sequence[Run] = ()) -> None:
        super().__init__()
        self._on_cpu = on_cpu
        self.estimated: dict[str, None] = {}
        self.phase = "before"
        self._flops: dict[tuple[str, int], int] = {}
        skipped = {place for run in runs for place in run.skipped}
        self._ranks = {place: rank for rank, place in enumerate(p for p in range(len(blocks)) if p not in skipped)}
        self._in_runs = {place for run in runs for place in run.blocks}
        self._open: dict[int, Allocation] = {}  # by address of the storage
        self._packed: dict[int, int | None] = {}  # what comes on top when a weight kept otherwise is used, by address
        self._events: list[Event] = []
        self._first = 0
        self._owned = _owned()
        self._device_of = 0  # address of the tensor whose device the operator before this one asked for
        self._modules = _RunningModules(blocks)
        self.enter("before")

    def watch(self, model: nn.Module, head: str | None) -> None:
        """Attribute allocations to the modules of `model`; what follows the start of `head` belongs to the loss."""
        self._modules.watch(model, head)

    def enter(self, phase: str) -> None:
        """phase: "before" (the states of the optimizer arise), "forward", "backward" or "update"."""
        self.phase = phase
        self._modules.kind = "optimizer" if phase in ("before", "update") else "activations"

    def hold(self, tensor: Tensor, kind: str, name: str, packed: int | None = None, used: int | None = None) -> None:
        """Enter a tensor that is there before the step. packed: its bytes if it is kept in another way (quantised, on
        disk). used: those that come on top for as long as an operator computes with it; None = those of the tensor, or
        of the rows of it that the operator has.
        """
        module = name.rpartition(".")[0]
        key = storage_key(tensor.untyped_storage())
        if key in self._open:
            return
        self._enter(tensor, kind, module, "", packed)
        if packed is not None:
            self._packed[key] = used

    def relabel(self, tensor: Tensor, kind: str, name: str) -> None:
        """What an operator made turned out to be something else: a gradient, say."""
        allocation = self._open.get(storage_key(tensor.untyped_storage()))
        if allocation is not None and allocation.kind != "weights":
            allocation.kind, allocation.module = kind, name.rpartition(".")[0]

    def count(self, flops: int) -> None:
        """FLOPs that no operator shows."""
        key = self.phase, self._modules.block
        self._flops[key] = self._flops.get(key, 0) + flops

    def start(self) -> None:
        """Forget FLOPs and peaks so far."""
        self._first, self._flops = len(self._events), {}

    def books(self) -> Books:
        return Books(self._events, self._first, self._flops)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        func, args, kwargs = self._as_for_plain_tensors(func, args, kwargs)
        if func is not _DEVICE:
            self._look_where(args)
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        unpacked = None
        if packet in FORMULAS:
            self.count(FORMULAS[packet](*args, **kwargs, out_val=out))
            unpacked = self._unpack(args) if self._packed else None
        if self._on_cpu:
            self._pass_by(onednn.scratch(packet, args), packet.__name__)
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor) and storage_key(tensor.untyped_storage()) not in self._open:
                module, kind = self._modules.now()
                module = self._owner(args) if kind == "optimizer" else module
                self._enter(tensor, kind, module, packet.__name__)
        if onednn.is_recurrent(packet):
            self._hold_recurrent(packet, args, out)
        if unpacked is not None:
            self._note(unpacked, False)
        return out

    def _hold_recurrent(self, packet: Any, args: Any, out: Any) -> None:
        """The workspace, whose fake tensor is empty, and what comes and goes while the layer runs."""
        x = args[0]
        mode, hidden = (args[9], args[10]) if packet is _RNN else (args[14], args[15])
        self.estimated[self._modules.now()[0]] = None
        if packet is _RNN:
            workspace = self._open[storage_key(out[3].untyped_storage())]
            workspace.size = _rounded(onednn.recurrent_workspace(x, hidden, mode))
        if self._on_cpu:
            gradients = () if packet is _RNN else args[10:13]
            copies = sum(_size(g) for g in gradients if g is not None and not g.is_contiguous())
            self._pass_by(copies + onednn.recurrent_scratch(packet, x, hidden, mode), packet.__name__)

    def _pass_by(self, size: int, operator: str) -> None:
        """Bytes that are there for a moment."""
        if size:
            module, kind = self._modules.now()
            moment = Allocation(_rounded(size), kind, module, self.phase, operator, (size,), torch.uint8)
            self._note(moment, True)
            self._note(moment, False)

    def _as_for_plain_tensors(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
        """The operator that autograd calls where no tensor is fake and no mode runs: it writes into what it owns."""
        device_of, self._device_of = self._device_of, 0
        if func is _DEVICE:
            self._device_of = tensor_key(args[0])  # not the tensor: autograd would no longer own it
        elif func is _ADD and device_of and use_counts_are_told and _is_sum_of_gradients(args, device_of):
            first, second = args
            if _fits_into(second, first) and use_counts(first) == self._owned:
                return _ADD_IN_PLACE, args, kwargs
            if _fits_into(first, second) and use_counts(second) == self._owned:
                return _ADD_IN_PLACE, (second, first), kwargs
        return func, args, kwargs

    def _owner(self, args: Any) -> str:
        """The module of the parameter that an operator of the update works on."""
        for tensor in tree_leaves(args):
            if isinstance(tensor, Tensor):
                allocation = self._open.get(storage_key(tensor.untyped_storage()))
                if allocation is not None and allocation.module:
                    return allocation.module
        return ""

    def _unpack(self, args: Iterable[Any]) -> Allocation | None:
        """The dense copy of a quantised weight among the operands."""
        for tensor in args:
            if isinstance(tensor, Tensor) and (key := storage_key(tensor.untyped_storage())) in self._packed:
                used = self._packed[key]
                dense = Allocation(
                    _rounded(_size(tensor) if used is None else used),
                    "weights",
                    self._open[key].module,
                    self.phase,
                    "unpack",
                    tuple(tensor.shape),
                    tensor.dtype,
                )
                self._note(dense, True)
                return dense
        return None

    def _enter(self, tensor: Tensor, kind: str, module: str, operator: str, size: int | None = None) -> None:
        storage = tensor.untyped_storage()
        size = _rounded(storage.nbytes() if size is None else size)
        block = self._modules.block_of(module) if operator == "" else self._modules.block
        allocation = Allocation(size, kind, module, self.phase, operator, tuple(tensor.shape), tensor.dtype, block)
        self._open[storage_key(storage)] = allocation
        self._events.append(Event(allocation, True, block if operator else -1))
        weakref.finalize(storage, self._free, storage_key(storage)).atexit = False

    def _free(self, key: int) -> None:
        self._packed.pop(key, None)
        self._note(self._open.pop(key), False)

    def _note(self, allocation: Allocation, came: bool) -> None:
        block = self._modules.block
        if not came and self._modules.kind == "optimizer" and allocation.kind == "gradients":  # set to None
            block = self._modules.block_of(allocation.module)
        self._events.append(Event(allocation, came, block))

    def _look_where(self, args: Any) -> None:
        """In which block this is: of the update that of the parameter. Raises Unlike where that is not all."""
        self._modules.follow()
        if self._modules.kind == "optimizer" and (owner := self._owner(args)):
            self._modules.block = self._modules.block_of(owner)
        if self._in_runs:
            self._refuse_mixtures(args)

    def _refuse_mixtures(self, args: Any) -> None:
        made = [
            found
            for tensor in tree_leaves(args)
            if isinstance(tensor, Tensor)
            and (found := self._open.get(storage_key(tensor.untyped_storage()))) is not None
        ]
        if self._modules.kind == "optimizer":
            owners = {self._modules.block_of(allocation.module) for allocation in made if allocation.module}
            if len(owners) > 1 and owners & self._in_runs:
                raise Unlike("the optimizer updates parameters of several blocks at once")
            return
        ranks = [self._ranks[allocation.block] for allocation in made if allocation.block >= 0]
        outside = self._modules.block < 0
        here = self._ranks.get(self._modules.latest if outside else self._modules.block)
        if here is not None and any(abs(rank - here) > (not outside) for rank in ranks):
            raise Unlike("what a block made is used elsewhere than in its neighbours")


class _RunningModules:
    """Which module runs, and which block: in forward by hooks, in backward by the number that autograd gave to the node
    in forward. A block counts as running until another module outside of it starts.
    """

    def __init__(self, blocks: Sequence[str] = ()) -> None:
        self.kind = "activations"  #: of what forward makes now; "loss" from the head on
        self.block = -1  #: the place of the block in `blocks`
        self.latest = -1  #: the last that ran
        self._blocks = {name: place for place, name in enumerate(blocks)}
        self._stack: list[tuple[str, int]] = []
        self._numbers: list[int] = []
        self._places: list[
            tuple[str, str, int]
        ] = []  # module, kind and block of the nodes from the number beside it on

    def watch(self, model: nn.Module, head: str | None) -> None:
        for name, module in model.named_modules():
            module.register_forward_pre_hook(self._entering(name, name == head, self.block_of(name)), prepend=True)
            module.register_forward_hook(self._leave, always_call=True)

    def block_of(self, module: str) -> int:
        """The place of the block that a module is in, or -1."""
        while self._blocks and module:
            if module in self._blocks:
                return self._blocks[module]
            module = module.rpartition(".")[0]
        return -1

    def now(self) -> tuple[str, str]:
        """Name of the module and the kind of what it makes."""
        node = current_node()
        if self._stack or node is None or self.kind == "optimizer":  # forward, a recomputation, or the update
            return self._stack[-1][0] if self._stack else "", self.kind
        if node.name().endswith("AccumulateGrad"):
            return "", "gradients"
        return self._place_of(node)[:2]

    def follow(self) -> None:
        """See which block runs, in backward."""
        node = current_node()
        if not self._blocks or self._stack or node is None or node.name().endswith("AccumulateGrad"):
            return
        if sequence_number(node) < self._numbers[-1]:  # else it was made within the backward of one that was
            self._run_in(self._place_of(node)[2])

    def _place_of(self, node: Any) -> tuple[str, str, int]:
        place = bisect.bisect_right(self._numbers, sequence_number(node)) - 1
        return self._places[place] if place >= 0 else ("", "activations", -1)

    def _run_in(self, block: int) -> None:
        self.block = block
        if block >= 0:
            self.latest = block

    def _entering(self, name: str, is_head: bool, block: int) -> Callable[..., None]:
        def enter(module: nn.Module, inputs: Any) -> None:
            if is_head and current_task() == -1:  # not recomputed in backward
                self.kind = "loss"
            around = self._stack[-1][1] if self._stack else -1
            self._run_in(block if block >= 0 else around)
            self._stack.append((name, self.block))
            self._mark()

        return enter

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        _, block = self._stack.pop()
        around = self._stack[-1][1] if self._stack else -1
        self._run_in(around if around >= 0 else block)
        self._mark()

    def _mark(self) -> None:
        self._numbers.append(next_sequence_number())
        self._places.append((self._stack[-1][0] if self._stack else "", self.kind, self.block))


_RNN = torch.ops.aten.mkldnn_rnn_layer

# The engine sums the gradients of a tensor that is used more than once in InputBuffer::add. It asks for the device of
# the newer one, then writes into one of the two that nobody else holds; but not into a fake one, nor in a dispatch mode
# (isTensorSubclassLike), where it makes a third.
_DEVICE = torch.ops.prim.device.default
_ADD, _ADD_IN_PLACE = torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor


def _is_sum_of_gradients(args: Any, device_of: int) -> bool:
    return (
        len(args) == 2
        and all(isinstance(x, Tensor) for x in args)
        and tensor_key(args[1]) == device_of
        and current_task() != -1
    )


def _fits_into(added: Tensor, total: Tensor) -> bool:
    """Whether a sum in place has the shape, type and layout of one that is not."""
    return (
        added.shape == total.shape and torch.promote_types(added.dtype, total.dtype) == total.dtype and _is_dense(total)
    )


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements lie side by side in memory, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


@lru_cache(maxsize=1)
def _owned() -> tuple[int, int]:
    """What `use_counts` gives for a gradient that the engine alone holds: of a sum in which this is known."""
    probe = _Probe()
    with FakeTensorMode(), torch.enable_grad():
        x = torch.ones(1, requires_grad=True)
        y = x * 1
        z = y.sin() + y.cos()
        with probe:
            z.backward()
    return probe.found


class _Probe(TorchDispatchMode):
    found = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ADD and use_counts_are_told:
            self.found = use_counts(args[0])
        return func(*args, **(kwargs or {}))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _rounded(size: int) -> int:
    return -(-size // _UNIT) * _UNIT
