"""What a profile asks of the processes that share its model, at the few places where they meet: and, for a model that
lies on this process alone, the same questions with their plain answers.

Meetings of one profile: before the pass (is it the same one everywhere?), between forward and backward, after each run
(does it stand?), with the statistics, and at the end. A process that raises says so at the next one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, TypeVar

from torch import Tensor, nn

from zest_fast.foundation.nearest import some
from zest_fast.foundation.torch_private import (
    ddp_is_interrupted,
    fsdp_dtypes,
    fsdp_groups,
    is_gathered,
    reset_ddp,
    set_fsdp_dtypes,
    settle_fsdp,
    start_fsdp,
)
from zest_fast.kernels import Collector
from zest_fast.profiling.graph import custom_functions, leaves_of
from zest_fast.profiling.layers import Layer, Weight
from zest_fast.profiling.loss import require_finite
from zest_fast.profiling.observer import Statistics
from zest_fast.profiling.processes.layout import DDP, FSDP2, Layout, layout_of
from zest_fast.profiling.processes.local import is_distributed, local_part
from zest_fast.profiling.processes.meeting import Meeting, OtherProcessFailed, meeting_of
from zest_fast.profiling.processes.report import merged
from zest_fast.profiling.processes.shared_statistics import SharedStatistics
from zest_fast.profiling.taps import Routes, Taps

T = TypeVar("T")
R = TypeVar("R")

_WAITED = (
    "a forward pass of the DistributedDataParallel was still waiting for its backward pass, and took gradients of this "
    "profile for its own; it is dropped. Run every forward pass of the wrapper to its backward pass, or under "
    "torch.no_grad(), before the profile"
)


class Alone:
    """A model on this process alone."""

    note = ""
    """What the profile says of the processes."""
    on_request_refused = ""
    """Why metrics that take passes of their own cannot be had."""
    whole_pass = False
    """Whether every pass runs forward and backward, all weights take part, and no dW is reduced tile by tile."""

    def telling(self) -> AbstractContextManager[None]:
        """Around all of the profile: no process ends before the others, and who raises says so."""
        return nullcontext()

    def borrowed(self) -> AbstractContextManager[None]:
        """Inside of it: the model as a pass needs it, and afterwards as it was."""
        return nullcontext()

    def open(self, layers: Sequence[Layer], metrics: Sequence[str], loss_scale: float) -> None:
        """Before the first run."""

    def settle(self) -> None:
        """Before each run and after the last: nothing of a run that stopped half-way is left."""

    def statistics(
        self, needed: frozenset[str], backend: str, may_be_written: Callable[[Tensor], bool], layers: Sequence[Layer]
    ) -> Statistics:
        """The observer of a run."""
        return Statistics(needed, backend, may_be_written)

    def forward_is_done(self, taps: Taps, loss: Tensor, model: nn.Module, compute_loss: Callable[[], Tensor]) -> None:
        """Between forward and backward."""
        if loss.device.type == "cpu":  # elsewhere a look would wait for the device: after the pass
            require_finite(loss, model, compute_loss)

    def backward_is_done(self) -> None:
        """After the backward pass."""

    def agree(self, revised: Routes | None, failed: Exception | None) -> Routes | None:
        """How the pass has to be run again, on all processes; None where it stands."""
        return revised

    def finish(
        self,
        taps: Taps,
        statistics: Statistics,
        layers: Sequence[Layer],
        loss: Tensor,
        model: nn.Module,
        compute_loss: Callable[[], Tensor],
    ) -> float:
        """Completes the statistics, and returns the loss of the whole batch."""
        statistics.finish(layers)
        if loss.device.type != "cpu":
            require_finite(loss, model, compute_loss)
        return float(loss.detach())


class Together(Alone):
    """A model on several processes, each of which runs the same profile.

    Args:
        wrapper: the model in its DistributedDataParallel, if it is in one.
        modules: of the model inside, by name.
        layout: who shares it.
    """

    whole_pass = True

    def __init__(self, wrapper: nn.Module, modules: dict[str, nn.Module], layout: Layout) -> None:
        self._wrapper = wrapper
        self._modules = modules
        self._names: dict[Any, str] = {}
        for name, module in modules.items():
            self._names.setdefault(module, name)
        self._layout = layout
        self._meeting: Meeting = meeting_of(layout.ranks)
        self._is_over = False
        self._statistics: SharedStatistics | None = None
        self.note = layout.note
        self.on_request_refused = (
            f"takes passes of its own, which are not brought together over processes ({layout.name}): profile one "
            "process's copy with whole weights"
        )

    # --- around the profile ---

    def borrowed(self) -> AbstractContextManager[None]:
        if self._layout.kind == FSDP2:
            return self._sharded()
        return self._wrapper_refused() if self._layout.kind == DDP else nullcontext()

    @contextmanager
    def telling(self) -> Iterator[None]:
        try:
            yield
            self._exchange(None, lambda _: None)
        except BaseException as error:
            if self._is_over:
                raise
            self._is_over = True
            if isinstance(error, Exception) and self._statistics is not None:
                with suppress(RuntimeError):  # of a collective with one who is gone
                    self._statistics.end()  # the others wait for each mean
            earlier = self._meeting.failure()
            self._meeting.fail(error)
            if earlier and isinstance(error, RuntimeError) and str(error) not in earlier:
                raise OtherProcessFailed(earlier) from error  # whose going is what failed here
            raise

    def _exchange(self, message: T, merge: Callable[[list[T]], R]) -> R:
        try:
            return self._meeting.exchange(message, merge)
        except Exception:
            self._is_over = True  # the others know
            raise

    @contextmanager
    def _wrapper_refused(self) -> Iterator[None]:
        handle = self._wrapper.register_forward_pre_hook(_refuse_the_wrapper)
        try:
            yield
        finally:
            handle.remove()
            self._forget_what_waited()

    def _forget_what_waited(self) -> bool:
        """Of DDP: whether a backward pass that was still to come has taken gradients of this one for its own."""
        model: Any = self._wrapper
        waited = self._layout.kind == DDP and ddp_is_interrupted(model)
        if waited:
            reset_ddp(model)
        return waited

    @contextmanager
    def _sharded(self) -> Iterator[None]:
        """Shards in their places; afterwards gathered what was gathered."""
        units = self._layout.units
        for unit in self._roots():
            start_fsdp(unit)
        groups = self._layout.groups
        dtypes = [fsdp_dtypes(group) for group in groups]
        gathered = [unit for unit in units if any(map(is_gathered, fsdp_groups(unit)))]
        for unit in units:
            unit.reshard()  # type: ignore[operator]
        try:
            yield
        finally:
            self.settle()
            for group, before in zip(groups, dtypes, strict=True):
                set_fsdp_dtypes(group, before)
        for unit in gathered:  # not after an error: it is a collective
            unit.unshard()  # type: ignore[operator]

    def _roots(self) -> list[nn.Module]:
        inner = {id(m) for unit in self._layout.units for m in unit.modules() if m is not unit}
        return [unit for unit in self._layout.units if id(unit) not in inner]

    def settle(self) -> None:
        for root in self._roots():
            settle_fsdp(root, self._layout.groups)
        for unit in self._layout.units:
            unit.reshard()  # type: ignore[operator]

    # --- the meetings ---

    def open(self, layers: Sequence[Layer], metrics: Sequence[str], loss_scale: float) -> None:
        subject = [
            (layer.name, tuple(layer.weight.parameter.shape), str(layer.weight.parameter.dtype)) for layer in layers
        ]
        values: list[Any] = []
        if self._layout.kind == DDP:  # whose weights are copies, as far as nobody has changed one of them
            collector = Collector("auto")
            found = [collector.moments([layer.weight.parameter.detach()], (layer.name,))[0] for layer in layers]
            collector.fetch()
            values = [(m.abs_mean, m.norm, m.nonfinite) for m in (later() for later in found)]
        self._exchange((self._layout.kind, list(metrics), loss_scale, subject, values), _require_the_same)

    def statistics(
        self, needed: frozenset[str], backend: str, may_be_written: Callable[[Tensor], bool], layers: Sequence[Layer]
    ) -> Statistics:
        self._layers = list(layers)
        self._statistics = SharedStatistics(needed, backend, may_be_written, self._layout, layers)
        for group in self._layout.groups:
            set_fsdp_dtypes(group, None)  # by what requires a gradient in this pass
        return self._statistics

    def forward_is_done(self, taps: Taps, loss: Tensor, model: nn.Module, compute_loss: Callable[[], Tensor]) -> None:
        assert self._statistics is not None
        weights = self._statistics.all_weights
        calls = {module: at for module, at in taps.order.items() if module in self._names}
        if is_distributed(loss) and not all(p.is_replicate() for p in loss.placements):  # type: ignore[attr-defined]
            raise ValueError(
                f"the loss is a DTensor of parts ({loss.placements}); return loss.full_tensor()"  # type: ignore[attr-defined]
            )
        leaves, is_opaque = leaves_of(loss)
        is_opaque = is_opaque or bool(custom_functions(loss))
        absent = [] if is_opaque else [i for i, w in enumerate(weights) if id(w.parameter) not in leaves]
        last = [i for i, w in enumerate(weights) if taps.is_summed_at_the_end(w) or not _all_called(w, taps)]
        first_calls = {
            i: min((calls[layer.called_module] for layer in w.layers if layer.called_module in calls), default=-1)
            for i, w in enumerate(weights)
        }
        called = sorted(layer.name for layer in self._layers if layer.called_module in taps.uses)
        message = (float(local_part(loss.detach())), called, absent, last, first_calls)
        order = self._exchange(message, self._order_of_gradients)
        self._statistics.begin([weights[i] for i in order], [weights[i] for i in absent])

    def _order_of_gradients(self, messages: list[Any]) -> list[int]:
        losses, called, absent, last, first_calls = zip(*messages, strict=True)
        for rank, loss in zip(self._layout.ranks, losses, strict=True):
            if not math.isfinite(loss):
                raise ValueError(
                    f"the loss of process {rank} is {loss}: look there at the batch, and for weights or outputs of "
                    "layers that are not finite (a profile of the model alone names them)"
                )
        if self._layout.kind == FSDP2 and not self._layout.takes_unused:
            everywhere, anywhere = set(called[0]).intersection(*called), set().union(*called)
            if everywhere != anywhere:
                raise NotImplementedError(
                    f"processes use different layers ({some(sorted(anywhere - everywhere))} not on all of them): FSDP2 "
                    "reduces their gradients only where all processes have one; call "
                    "set_reduce_scatter_unused_params(True) on the modules, or let every process use every layer"
                )
        nowhere = set(absent[0]).intersection(*absent)
        late = set().union(*last)
        calls: dict[int, int] = first_calls[0]
        return sorted((i for i in calls if i not in nowhere), key=lambda i: (i in late, -calls[i]))

    def backward_is_done(self) -> None:
        if self._statistics is not None:
            self._statistics.end()
        if self._forget_what_waited():
            raise RuntimeError(_WAITED)

    def agree(self, revised: Routes | None, failed: Exception | None) -> Routes | None:
        if failed is not None:
            return None  # the others are in the middle of a pass, and cannot begin it again
        if revised is None and self._statistics is not None and self._statistics.came_again:
            raise RuntimeError(_WAITED)  # and got all that it waited for
        assert self._statistics is not None
        weights = [id(weight.parameter) for weight in self._statistics.all_weights]
        things: dict[str, list[Any]] = {
            "leaf": weights,
            "until_the_end": weights,
            "copied": self._layers,
            "threads": self._layers,
        }
        wanted = None
        if revised is not None:  # numbers in the place of layers and ids, which mean nothing elsewhere
            flags = {name: getattr(revised, name) for name in ("tiles", "own_flags", "anchored")}
            numbers = {name: {known.index(x) for x in getattr(revised, name)} for name, known in things.items()}
            wanted = flags | numbers
        everywhere = self._exchange(wanted, _union)
        if everywhere is None:
            return None
        named = {name: frozenset(known[i] for i in everywhere[name]) for name, known in things.items()}
        return Routes(**(everywhere | named))

    def finish(
        self,
        taps: Taps,
        statistics: Statistics,
        layers: Sequence[Layer],
        loss: Tensor,
        model: nn.Module,
        compute_loss: Callable[[], Tensor],
    ) -> float:
        assert isinstance(statistics, SharedStatistics)
        statistics.finish(layers)
        names = [layer.name for layer in layers]
        half = {i for i, layer in enumerate(layers) if layer.weight.parameter.dtype.itemsize < 4}
        report = statistics.report(taps, self._names, float(local_part(loss.detach())), loss.dtype.itemsize < 4)
        whole = self._exchange(
            report, lambda reports: merged(reports, names, half, self._layout.share, self._layout.splits_the_batch)
        )
        statistics.take(whole, taps, self._modules)
        return whole.loss


def together_or_alone(model: nn.Module, modules: dict[str, nn.Module]) -> Alone:
    """Who takes part in a profile of this model; raises as ``layout_of``.

    Args:
        model: in its DistributedDataParallel, if it is in one.
        modules: those of the model inside of wrappers, by name.
    """
    layout = layout_of(model, modules)
    return Alone() if layout is None else Together(model, modules, layout)


def _refuse_the_wrapper(module: nn.Module, args: Any) -> None:
    raise ValueError(
        "the closure called the DistributedDataParallel itself, whose backward pass reduces and keeps every gradient: "
        "let it call model.module; profile brings gradients together by itself"
    )


def _all_called(weight: Weight, taps: Taps) -> bool:
    return all(layer.called_module in taps.order for layer in weight.layers)


def _require_the_same(messages: list[Any]) -> None:
    """Raises where processes profile different things, or DDP's copies of a weight differ."""
    kind, metrics, loss_scale, subject, values = messages[0]
    for place, (other_kind, other_metrics, other_scale, other_subject, other_values) in enumerate(messages):
        who = f"process {place} of this profile"
        if (other_kind, other_metrics, other_scale) != (kind, metrics, loss_scale):
            raise ValueError(f"{who} was called with other metrics, loss_scale or a model that lies differently")
        if other_subject != subject:
            odd = [a[0] for a, b in zip(other_subject, subject, strict=False) if a != b]
            raise ValueError(
                f"{who} profiles other layers than the first ({len(other_subject)} and {len(subject)}; first "
                f"difference: {some(odd) if odd else 'their number'}): pass the same model and layers= everywhere"
            )
        for (name, *_), found, first in zip(subject, other_values, values, strict=False):
            if any(abs(a - b) > 1e-6 * abs(b) for a, b in zip(found, first, strict=True)):
                raise ValueError(
                    f"the weight of layer {name!r} differs between processes, and DistributedDataParallel takes them "
                    "for copies: load the same weights everywhere, or wrap the model after loading"
                )


def _union(wanted: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """One revision of routes for all: without tiles where one wants none, and with all that any wants."""
    found = [routes for routes in wanted if routes is not None]
    if not found:
        return None
    united = {
        name: set().union(*(routes[name] for routes in found))
        if isinstance(value, set)
        else any(routes[name] for routes in found)
        for name, value in found[0].items()
    }
    return united | {"tiles": all(routes["tiles"] for routes in found)}
