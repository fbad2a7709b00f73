"""The profile while it trains: every k-th step of the user's own loop, read where it leaves its gradients."""

from __future__ import annotations

import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from zest_fast import kernels
from zest_fast.foundation.interrupts import HeldInterrupts
from zest_fast.foundation.options import Backend, MetricNames
from zest_fast.foundation.removable import Leaving, Removable
from zest_fast.foundation.torch_private import current_task, steps_around
from zest_fast.profiling.engine import Watching
from zest_fast.profiling.functions import forwards_of, hooks_of, may_write, referred
from zest_fast.profiling.layers import LayerSelection
from zest_fast.profiling.metrics import METRIC_NAMES, METRICS, ON_REQUEST, select_metrics, statistics_needed
from zest_fast.profiling.processes.layout import DDP
from zest_fast.profiling.profile import is_being_profiled
from zest_fast.profiling.taps import Routes
from zest_fast.watching.gradients import Mark, marks
from zest_fast.watching.logs.sinks import ChecksLayout, Closes, Sink, sink_for
from zest_fast.watching.processes.together import Processes
from zest_fast.watching.report import Reporter
from zest_fast.watching.rounds import Round
from zest_fast.watching.target import Rows, Target
from zest_fast.watching.watched_step import WatchedStep
from zest_fast.watching.window import OF_WEIGHTS, Asked, Window

Log = str | os.PathLike[str] | Sink
Agreed = tuple[tuple[int, ...], bool]  # see Processes.open
Samples = int | Callable[[tuple[Any, ...], Mapping[str, Any]], int]

_NO_STEP = (
    "no step of an optimizer of torch.optim followed the backward pass (after steps of other optimizers, or compiled "
    "ones, call watched.step())"
)
_watched: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def watch(
    model: nn.Module,
    every: int = 100,
    metrics: MetricNames | None = None,
    layers: LayerSelection = None,
    log: Log | Iterable[Log] | None = None,
    *,
    frozen: bool = False,
    parts: bool = False,
    histograms: bool = False,
    updates: bool = False,
    noise: bool = False,
    samples: Samples | None = None,
    grad_scaler: Any = None,
    backend: Backend = "auto",
    first_step: int = 0,
) -> Watch:
    """The metrics of every layer at every k-th optimizer step of an ordinary training loop.

    Nothing is run for it: gradients are read where the loop's own backward pass leaves them, accumulated, unscaled, and
    before anything clips them. Weights, optimizer states, `.grad` and random state are bit for bit those of a run that
    is not watched. At steps that are not logged a counter runs, and nothing else.

    Steps are counted by the optimizers of torch.optim that hold a watched weight; for others call `watched.step()`
    after each of their steps. A step of several optimizers is one, which ends when all have stepped or the next
    backward pass of the model begins; optimizers that step inside of the backward pass end it there. A step that a
    GradScaler skips is logged, marked as `overflow`, and logged again under the same number when it is tried again; a
    fused optimizer skips within its own step, which counts.

    By default nothing is put into the forward. `act_*` and `fisher` take hooks on the modules and hold each layer's
    input and output until its gradient is there, as `profile` does; outputs count where a gradient comes back to their
    call of the model, so validation in between does not. With gradient accumulation they are those of all micro-batches
    as one batch. The loss is the sum of those on which `backward()` was called, divided as the loop divided them.
    Nothing is run again: what one pass cannot see is NaN, and `.notes` and `.profile.info[layer]["note"]` say why.
    Compiled modules have no such columns, and no code is compiled again for a watch where `model` is what
    `torch.compile` returned or compiled in place.

    Args:
        model: as the loop calls it: plain, sharded (FSDP2, tensor parallel), or what DistributedDataParallel or
            torch.compile returned. On several processes every one watches, and figures are of all of them; a process
            that does not come to a logged step is waited for 60 seconds at most, and costs figures, never the training.
        every: optimizer steps from one that is logged to the next; step 0, the first, is logged.
        metrics: names as of `profile`; None = those of weights and gradients, "all" = all that one pass yields.
        layers: as of `profile`.
        log: "run.jsonl", "run.parquet", "wandb" or whatever else `zest_fast.sink_for` takes, a function that gets each
            WatchedStep, or several of these. Names are opened when the watch begins and closed when it ends; of several
            processes the first one alone opens them. A sink that raises in between never stops the training: a warning
            names it once, `.failures` counts, and the next step is tried again.
        frozen: also layers that do not train: their weights, outputs and, above the cut, fisher. No gradient of theirs
            exists in an ordinary backward pass.
        parts: also each micro-batch by itself, before its gradient is accumulated or averaged over processes.
        histograms: also histograms of weights and gradients; not of sharded ones.
        updates: also `update_ratio`, ‖W_after - W_before‖ / ‖W_before‖. A copy of each watched weight is held while the
            optimizer steps. With optimizers in the backward pass one weight at a time is held.
        noise: also the gradient noise scale (McCandlish et al. 2018), from the gradients of micro-batches that are
            accumulated (or of processes), which have to weigh the same; a mean over the last 100 logged steps, with its
            standard error, and the batch size that it suggests. `zest_fast.noise_scale` takes batches instead.
        samples: how many samples a micro-batch has, for `noise`: a number, or a function of the arguments and keyword
            arguments of the model's forward; None = the first dimension of their first tensor.
        grad_scaler: whatever has `get_scale()`; None = a torch.amp.GradScaler that is used is seen. Other ways to scale
            a loss are not.
        backend: as of `profile`.
        first_step: optimizer steps that were taken before, in a run that is taken up again. Logged are steps whose
            number `every` divides.

    Returns:
        A context manager. While it lasts, and afterwards: `.last`, the last WatchedStep; `.steps`, how many were
        counted; `.failures`; `.remove()`.

    Raises:
        TypeError, ValueError: an argument that does not fit; metrics that take passes of their own.
        RuntimeError: the model, or a part of it, is watched already; later, in the loop, an optimizer that runs the
            model by itself (L-BFGS). When the watch begins, as `sink_for`, and ValueError for the log of another model.
        NotImplementedError: FSDP1, DeepSpeed and other layouts that `profile` refuses, TorchScript.

    Examples:
        >>> import torch, zest_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> logged = []
        >>> with zest_fast.watch(model, every=2, log=logged.append):
        ...     for x in torch.randn(4, 6, 4):
        ...         model(x).square().mean().backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> [step.step for step in logged], "grad_norm" in logged[0].profile.metrics
        ([0, 2], True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; a torch.nn.Module is needed")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every is {every!r}; a whole number of optimizer steps is needed, 1 or more")
    if isinstance(first_step, bool) or not isinstance(first_step, int) or first_step < 0:
        raise ValueError(f"first_step is {first_step!r}; a whole number of optimizer steps is needed, 0 or more")
    if isinstance(samples, bool) or not (samples is None or callable(samples) or isinstance(samples, int)):
        raise TypeError(f"samples is {samples!r}; a number or a function of the forward's arguments is needed")
    if isinstance(samples, int) and samples < 1:
        raise ValueError(f"samples is {samples}; a micro-batch has 1 or more")
    if grad_scaler is not None and not callable(getattr(grad_scaler, "get_scale", None)):
        raise TypeError(f"grad_scaler is a {type(grad_scaler).__name__}; something with get_scale() is needed")
    names = _metrics(metrics)
    target = Target(model, layers, frozen)
    rows = target.rows()
    if histograms and target.layout is not None and target.layout.kind != DDP:
        raise NotImplementedError(
            f"histograms=True: each process has the entries of its shard ({target.layout.name}), and histograms of "
            "these between different edges do not make up one; leave it out"
        )
    kernels.pick_backend(backend, rows.layers[0].weight.parameter.device)
    modules = list(target.model.modules())
    asked = Asked(
        metrics=names,
        needed=statistics_needed(names),
        backend=backend,
        parts=parts,
        histograms=histograms,
        updates=updates,
        noise=noise,
        samples=samples,
        grad_scaler=grad_scaler,
        writes=may_write(referred([*forwards_of(modules), *hooks_of(modules)]), modules),
    )
    return Watch(target, rows, asked, every, _logs(log), first_step)


class Watch(Removable):
    """See `watch`. The watch begins with the `with` block, and ends with it, or by `.remove()`."""

    def __init__(self, target: Target, rows: Rows, asked: Asked, every: int, logs: list[Log], first_step: int) -> None:
        self._target, self._rows, self._asked, self._every, self._logs = target, rows, asked, every, logs
        self._sinks: list[Sink] = []
        self._opened: list[Sink] = []  # of them those that a name stood for
        self._reporter = Reporter()
        self._routes = Routes()
        self._several: set[int] = set()
        self._processes: Processes | None = None
        self._round = Round()
        self._first_step = first_step
        self._holders: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._others: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._weights = rows.parameters_to_step
        self._window: Window | None = None  # of the step that runs
        self._pending: Window | None = None  # closed, of a step that its optimizers have begun to take
        self._in_backward = False
        self._marks: list[Mark] = []
        self._stepped_in_backward = False
        self._late = False
        self._stepping = False  # within an optimizer's step that runs a closure
        self._backwards_before = 0
        self._thread = 0
        self._began = 0.0
        self._backwards = 0
        self._cleared_at = -1
        self._said_no_step = False
        self._failed: set[int] = set()
        self._handles: list[Any] = []
        self._active = False
        self._notes: list[str] = []
        self.last: WatchedStep | None = None
        """The last step that was logged."""
        self.steps = first_step
        """Optimizer steps that are over, those before the watch included."""
        self.failures = 0
        """How often a function of `log` raised."""

    def __enter__(self) -> Watch:
        modules = set(self._target.model.modules())
        if self._active or any(module in _watched for module in modules):
            raise RuntimeError("the model, or a part of it, is watched already; leave that watch first")
        self._claimed = modules
        self._thread, self._began = threading.get_ident(), time.monotonic()
        agreed = self._begin_together()
        try:
            with HeldInterrupts():
                self._active = True
                _watched.update(modules)
                self._open_logs()
                self._handles = [
                    register_optimizer_step_pre_hook(self._before_step),
                    register_optimizer_step_post_hook(self._after_step),
                    Leaving(Watching(self).__enter__()),
                ]
                if self.steps % self._every == 0:
                    self._open(self._rows, self.steps, agreed)
        except BaseException as error:
            self._remove(error)
            raise
        return self

    def __exit__(self, kind: Any, error: BaseException | None, *trace: Any) -> None:
        try:
            self._remove(error)
        except KeyboardInterrupt:  # before hooks were safe from it
            self._remove(error)
            raise

    def remove(self) -> None:
        """Take every hook away. A step that has ended is logged, one that has not is dropped. A second call does
        nothing."""
        self._remove(None)

    def _begin_together(self) -> Agreed:
        """Says to the other processes that this one watches; they need not be there yet."""
        target, asked = self._target, self._asked
        self._processes = None
        if target.layout is not None:
            watched = {"every": self._every, "metrics": asked.metrics, "updates": asked.updates, "noise": asked.noise}
            self._processes = Processes(target.layout, (watched | {"parts": asked.parts},))
            self._processes.begin()
        try:
            return self._agreed(self.steps) if self.steps % self._every == 0 else ((), False)
        except BaseException as error:
            self._leave(error)
            raise

    def _agreed(self, step: int) -> Agreed:
        return self._processes.open(step, self._asked.needed) if self._processes is not None else ((), False)

    def _leave(self, error: BaseException | None) -> None:
        if self._processes is not None:
            self._processes.leave(f"{type(error).__name__}: {error}" if error is not None else "it has ended")
            self._processes = None

    def _remove(self, error: BaseException | None) -> None:
        if not self._active:
            return
        if error is not None and self._processes is not None:
            self._processes.hurry()
        with HeldInterrupts():
            while self._handles:
                self._handles.pop().remove()
            if self._window is not None:
                self._window.discard()
                self._window = None
            _watched.difference_update(self._claimed)
            self._active = False
        try:
            if self._round.has_begun:
                self._end_round()
        finally:
            self._leave(error)
            self._close_logs()
        if self._backwards and self.steps == self._first_step:
            warnings.warn(
                f"zest_fast.watch saw {self._backwards} backward passes and no step of an optimizer of torch.optim "
                "that holds a watched weight, so nothing was logged; call watched.step() after each step",
                RuntimeWarning,
                stacklevel=3,
            )

    def step(self) -> None:
        """Count a step of an optimizer that is not of torch.optim: call it after the weights were moved. Does nothing
        where the step was counted already."""
        if not self._active or (not self._round.has_begun and self._round.last_was_seen):
            return
        if self._window is not None:
            self._close()
        self._round.join(None)
        self._end_round()

    # The user's backward passes (engine.Spectator)

    def begins(self, roots: Any, accumulates: bool, inputs: Iterable[Any]) -> Callable[[bool], None] | None:
        if not accumulates or current_task() != -1 or threading.get_ident() != self._thread:
            return None
        if inputs and self._window is not None and not self._window.gradients.include(inputs):
            return None  # backward(inputs=...), for the gradient of something else
        if self._window is not None and any(is_being_profiled(layer.module) for layer in self._rows.layers):
            return None
        window = self._window
        if window is not None and window.backwards and not self._stepping and window.gradients.are_gone():
            self._cleared_without_a_step()
            window = self._window
            if window is not None and window.taps is not None:
                window.notes.append(
                    "act and fisher undefined: the forward began before the step without update was over"
                )
        self._in_backward = True
        self._marks = marks(self._rows.weights_of_the_model)
        if window is not None:
            if window.backwards and not self._stepping:
                window.look_for_cleared()
            window.begin_backward(roots)
        return self._ended

    def _ended(self, completed: bool) -> None:
        self._in_backward = False
        self._backwards += 1
        window = self._window
        ours = window is not None and window.end_backward()
        if ours or self._stepped_in_backward or marks(self._rows.weights_of_the_model) != self._marks:
            if self._round.has_begun and not self._stepping and not self._stepped_in_backward:
                self._end_round()
            self._round.backward_since = True
        else:
            self._round.other_since = True
        if window is not None and ours and not completed:
            self._reopen("a backward pass of this step failed, and the step began anew")
        if self._stepped_in_backward:
            self._stepped_in_backward = False
            if self._window is not None:
                self._close()
            self._end_round()

    # The user's optimizers

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():  # a compiled step runs no hook: watched.step() has to tell
            return
        if self._is_within_a_step():
            return
        self._late = False
        if not self._holds(optimizer):
            return
        if isinstance(optimizer, torch.optim.LBFGS):
            raise RuntimeError(
                "LBFGS runs the model several times within one step, so that a step has no one gradient; "
                "zest_fast.watch does not watch it: train with another optimizer, or without watch"
            )
        if self._in_backward:
            if self._round.has_begun and not self._stepped_in_backward:
                self._end_round()
            if self._window is not None and self._window.updates is not None:
                self._window.updates.before(optimizer)
            return
        if self._round.has_stepped(optimizer):
            self._end_round()
        elif self._round.belongs_to_the_last(optimizer):
            self._late = True
            self._round.know(optimizer)
            return
        self._stepping = _has_closure(args, kwargs)
        self._backwards_before = self._backwards
        if self._window is not None and not self._stepping and not self._round.has_begun:
            self._window.look_for_changed()
            self._close()
        running = self._pending if self._round.has_begun or not self._stepping else self._window
        if running is not None and running.updates is not None:
            running.updates.before(optimizer)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or self._is_within_a_step():
            return
        if self._late or not self._holds(optimizer):
            self._late = False
            return
        if self._in_backward:
            if self._window is not None and self._window.updates is not None:
                self._window.updates.after()
            self._round.join(optimizer, in_backward=True)
            self._stepped_in_backward = True
            return
        if self._stepping and self._window is not None and not self._round.has_begun:
            runs = self._backwards - self._backwards_before
            if runs > 1:
                self._window.ran_again(f"the optimizer ran {runs} backward passes within its step")
            self._close()  # after its closure: gradients were read before the weights moved
        self._stepping = False
        if self._pending is not None and self._pending.updates is not None:
            self._pending.updates.after()
        first = not self._round.has_begun
        self._round.join(optimizer)
        if first and self._window is None:
            self._open_if_due(self.steps + 1)
        weights = (layer.weight.parameter for layer in self._rows.layers)
        if self._round.is_complete(p for p in weights if p.grad is not None):
            self._end_round()

    def _is_within_a_step(self) -> bool:
        """Whether the step whose hook runs is a part of another one: of a class derived from its own, or of an
        optimizer that steps others (Lookahead)."""
        return any(self._holds(outer) for outer in steps_around()[1:])

    def _holds(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether it has a watched weight. One that has none may get some: in a step within the backward pass it may
        show a part of its parameters only."""
        if not self._active:
            return False
        if optimizer in self._holders:
            return True
        if optimizer not in self._others and not _shares(optimizer, self._weights):
            self._others.add(optimizer)  # the model is looked at again for each optimizer that is new
            self._weights |= self._target.weights_now()
        if _shares(optimizer, self._weights):
            self._holders.add(optimizer)
            return True
        return False

    # Steps

    def _open_if_due(self, step: int) -> None:
        if not self._active or step % self._every:
            return
        self._rows, notes = self._target.rows_again()
        self._notes += notes
        self._holders.clear()
        self._others.clear()
        self._weights = self._rows.parameters_to_step
        self._open(self._rows, step, self._agreed(step))

    def _open(self, rows: Rows, step: int, agreed: Agreed) -> None:
        window = Window(self._target, rows, self._asked, step, self._routes, self._several, self._skipped, *agreed)
        self._window = window
        window.notes += self._notes
        self._notes = []
        window.open()

    def _close(self) -> None:
        window = self._window
        assert window is not None
        window.close()
        self._routes = window.found_routes()
        self._pending, self._window = window, None

    def _end_round(self) -> None:
        """The step that runs has ended."""
        self.steps += 1
        self._round.end()
        self._log_pending()
        if self._window is None:
            self._open_if_due(self.steps)

    def _skipped(self, why: str = "") -> None:
        """The iteration ended without a step; the next one tries again."""
        window = self._window
        if window is None or not window.backwards or self._in_backward:
            return
        window.was_skipped = not why
        self._close()
        if why:
            window.notes.append(why)
        self._log_pending()
        self._open_if_due(self.steps)

    def _cleared_without_a_step(self) -> None:
        """The user skipped a step, or took it in a way that cannot be seen. It is logged, but not again and again."""
        if self._cleared_at != self.steps:
            self._cleared_at = self.steps
            self._skipped(f"{_NO_STEP}, and its gradients were cleared")
            return
        if not self._said_no_step:
            self._said_no_step = True
            warnings.warn(f"zest_fast.watch: {_NO_STEP}, twice in a row at step {self.steps}", RuntimeWarning, 2)
        self._reopen()

    def _reopen(self, why: str = "") -> None:
        assert self._window is not None
        step = self._window.step
        self._window.discard()
        self._notes += [why] if why else []
        self._open(self._rows, step, self._agreed(step))

    def _open_logs(self) -> None:
        first = not torch.distributed.is_available() or not torch.distributed.is_initialized()
        first = first or torch.distributed.get_rank() == 0
        self._sinks, self._failed = [], set()
        for log in self._logs:
            if not isinstance(log, str | os.PathLike):
                self._sinks.append(log)
            elif first:
                self._opened.append(sink_for(log))
                self._sinks.append(self._opened[-1])
        layout = self._reporter.layout(self._target, self._rows, self._asked)
        for sink in self._sinks:
            if isinstance(sink, ChecksLayout):
                sink.check(layout)

    def _close_logs(self) -> None:
        while self._opened:
            sink = self._opened.pop()
            try:
                if isinstance(sink, Closes):
                    sink.close()
            except Exception as error:
                self.failures += 1
                warnings.warn(
                    f"log: {_name(sink)} could not be closed ({type(error).__name__}: {error})",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def _log_pending(self) -> None:
        window, self._pending = self._pending, None
        if window is None:
            return
        if self._processes is not None:
            self._processes.bring_together(window)
        step = self._reporter.step(window, time.monotonic() - self._began)
        self.last = step
        for number, sink in enumerate(self._sinks):
            try:
                sink(step)
            except Exception as error:
                self.failures += 1
                if number not in self._failed:
                    self._failed.add(number)
                    warnings.warn(
                        f"log: {_name(sink)} failed at step {step.step} ({type(error).__name__}: {error}); training "
                        "goes on, each logged step is tried again, and .failures counts",
                        RuntimeWarning,
                        stacklevel=2,
                    )


def _metrics(metrics: MetricNames | None) -> list[str]:
    if metrics is None:
        return [name for name in METRIC_NAMES if METRICS[name].needs <= OF_WEIGHTS]
    if isinstance(metrics, str) and metrics == "all":
        return list(METRIC_NAMES)
    names = select_metrics(metrics)
    refused = [name for name in names if METRICS[name].needs & ON_REQUEST]
    if refused:
        raise ValueError(
            f"metrics: {', '.join(refused)} take passes of their own, and a watch runs none; leave them out, or call "
            "zest_fast.profile between two steps"
        )
    return names


def _logs(log: Any) -> list[Log]:
    if log is None:
        return []
    if callable(log) or isinstance(log, str | os.PathLike):
        return [log]
    logs = list(log) if isinstance(log, Iterable) and not isinstance(log, bytes) else [log]
    for one in logs:
        if not callable(one) and not isinstance(one, str | os.PathLike):
            raise TypeError(f"log: {one!r} is no sink; a path, a name or a function of a WatchedStep is needed")
    return logs


def _shares(optimizer: torch.optim.Optimizer, weights: set[int]) -> bool:
    return any(id(p) in weights for group in optimizer.param_groups for p in group["params"])


def _has_closure(args: Any, kwargs: Any) -> bool:
    return kwargs.get("closure") is not None or (len(args) > 1 and callable(args[1]))


def _name(sink: Any) -> str:
    return getattr(sink, "__qualname__", None) or type(sink).__qualname__
