"""A training step on fake tensors: shapes and dtypes without contents, so that 7B parameters need no memory.

The step is the real one: the same model code, SelectiveBackward, autograd and optimizer of torch, on tensors that are
said to be on the CPU (fake CUDA tensors need a CUDA build). What oneDNN holds beside them counts only where the step is
to run on a CPU. Kernels that keep other things on a GPU than on the CPU
differ there: dropout keeps a mask of bytes instead of floats, fused attention a smaller statistic.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from zest_fast.finetuning.quantised_weights import frozen_linears
from zest_fast.finetuning.selective_backward import SelectiveBackward
from zest_fast.lean.loss import LeanHead
from zest_fast.planning.batches import cast, make_batch
from zest_fast.planning.blocks import Layout
from zest_fast.planning.dry_run import dry, fake, fake_batch, fill
from zest_fast.planning.ledger import Ledger, Peak
from zest_fast.planning.optimizers import build_optimizer, is_in_backward
from zest_fast.planning.repeats import Run, Unlike, runs_of
from zest_fast.planning.repetition import SkippedBlocks, left_alone, with_repeats
from zest_fast.planning.settings import DTYPES, Setting, packed_bytes
from zest_fast.profiling.heads import unwrap
from zest_fast.profiling.loss import loss_of
from zest_fast.streaming.buffer_ring import BUFFERS, buffer_bytes
from zest_fast.streaming.opening import SMALL
from zest_fast.streaming.streamed_model import others_weights
from zest_fast.streaming.streamed_rows import largest_block


@dataclass(frozen=True)
class Step:
    """What a dry run found. flops: by phase. trainable: parameters that train. cut: "" without SelectiveBackward.

    estimated: modules of which something was counted by a formula, because no tensor shows it.
    """

    peak: Peak
    flops: dict[str, int]
    trainable: int
    cut: str
    estimated: tuple[str, ...] = ()


def dry_step(
    skeleton: nn.Module,
    layout: Layout,
    setting: Setting,
    batch: Any = None,
    loss_fn: Callable[..., Tensor] | None = None,
) -> Step:
    """One step of training as `setting` has it, when the states of the optimizer are there already.

    skeleton: a model on the meta device; it stays as it is. batch: in place of the sizes in `setting`; of its tensors
    only shapes and dtypes are read.
    """
    # Whatever goes wrong then may be because blocks are skipped: the step as a whole decides what an error is.
    with contextlib.suppress(Exception):
        if runs := runs_of(skeleton, layout, setting):
            return _step(skeleton, layout, setting, batch, loss_fn, runs)
    return _step(skeleton, layout, setting, batch, loss_fn)


def _step(
    skeleton: nn.Module,
    layout: Layout,
    setting: Setting,
    batch: Any,
    loss_fn: Callable[..., Tensor] | None,
    runs: tuple[Run, ...] = (),
) -> Step:
    """runs: blocks that are alike, of which only some are gone through. Raises Unlike if they are not alike."""
    model = copy.deepcopy(skeleton).train()
    weights, autocast = DTYPES[setting.dtype] if setting.dtype else (None, None)
    with dry(batch) as mode:
        with mode:
            fill(model, weights)
            example = make_batch(model, setting) if batch is None else fake_batch(batch)
            example = cast(example, weights)
        with left_alone(model, layout.blocks, runs):
            cut = _prepare(model, setting)  # not in the mode: what it tries out on tensors of its own has values
        with mode:
            if setting.trained_float32:
                autocast = weights
                _train_in_float32(model)
            parameters = [p for p in model.parameters() if p.requires_grad]
            if not parameters:
                raise ValueError("nothing would train: no parameter of the model requires a gradient")
            ledger = Ledger(setting.device == "cpu", layout.blocks if runs else (), runs)
            kept, buffers = _kept_otherwise(model, layout, setting)
            hold(ledger, model, example, kept)
            ring = torch.empty(buffers, dtype=torch.uint8)
            if buffers:
                ledger.hold(ring, "weights", "")
            ledger.watch(model, layout.head)
            skipped = SkippedBlocks(model, layout.blocks, runs, ledger)
            names = {id(p): name for name, p in model.named_parameters()}
            training = _Training(skipped.leave_out(parameters), setting, ledger, names)
            compute_loss = loss_of(model, example, loss_fn, None)
            with ledger:
                training.warm_up()
                ledger.enter("forward")
                ledger.start()
                with torch.autocast("cpu", dtype=autocast) if autocast else contextlib.nullcontext():
                    loss = compute_loss()
                ledger.enter("backward")
                loss.backward()
                ledger.enter("update")
                training.update()
        books = ledger.books()
        if runs:
            skipped.check()
            if ledger.estimated:
                raise Unlike("something is counted by a formula")
            books = with_repeats(books, runs, layout.blocks)
        trainable = sum(p.numel() for p in parameters)
        return Step(books.peak(), books.flops_by_phase, trainable, cut(), tuple(ledger.estimated))


def _prepare(model: nn.Module, setting: Setting) -> Callable[[], str]:
    """Freeze what `setting` says; returns a function that names the cut, once a forward pass has shown it."""
    if setting.layers is not None and setting.layers != "all":
        tuned = SelectiveBackward(
            model, setting.layers, head=setting.head, checkpoint=setting.checkpoint, lean=setting.lean
        )
        return lambda: tuned.cut
    if setting.layers == "all":
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    if setting.checkpoint is not None:
        _checkpoint(model, setting.checkpoint)
    return lambda: ""


def _checkpoint(model: nn.Module, asked_for: str) -> None:
    """The gradient checkpointing of transformers, under the name that its version gives it."""
    inner: Any = unwrap(model)
    for kind in ("activation", "gradient"):
        if hasattr(inner, f"{kind}_checkpointing_enable"):
            options = {f"{kind}_checkpointing_kwargs": {"use_reentrant": False}}
            getattr(inner, f"{kind}_checkpointing_enable")(**options)
            return
    raise ValueError(f"checkpoint={asked_for!r}: {type(inner).__name__} has no gradient checkpointing")


def _train_in_float32(model: nn.Module) -> None:
    """Put float32 parameters in the place of those that train, tied ones once."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.requires_grad:
                module._parameters[name] = made.setdefault(id(p), nn.Parameter(fake(p.data, torch.float32)))


def _kept_otherwise(
    model: nn.Module, layout: Layout, setting: Setting
) -> tuple[dict[int, tuple[int, int | None]], int]:
    """Of weights that are kept quantised or on disk, by id: resident bytes, and those that come on top in use; and the
    bytes of the buffers that weights go through which are copied to a GPU as they are used."""
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    on_gpu = setting.device == "cuda"
    kept: dict[int, tuple[int, int | None]] = {}
    copied = [0]
    if setting.frozen is not None:
        for module in frozen_linears(model, trained, layout.head, setting.frozen).values():
            weight = module.weight
            packed = packed_bytes(weight.numel(), module.out_features, setting.frozen)
            if setting.stream and packed >= SMALL:
                kept[id(weight)] = 0, weight.nbytes + (0 if on_gpu else packed)
                copied.append(buffer_bytes([packed]))
            else:
                kept[id(weight)] = packed, None
    resident = {*trained, *kept, *(others_weights(model) if on_gpu else ())}
    head = None if layout.head is None else model.get_submodule(layout.head)
    for other in model.modules() if setting.stream else ():
        held = other._parameters.get("weight") if isinstance(other, nn.Linear | nn.Embedding) else None
        if held is None or id(held) in resident or held.nbytes < SMALL:
            continue
        whole = other is head and not isinstance(vars(head).get("forward"), LeanHead)  # who asks for all logits
        if isinstance(other, nn.Linear) or id(held) not in kept:
            kept[id(held)] = 0, None if whole or not on_gpu else 0
        if isinstance(other, nn.Linear):
            copied.append(buffer_bytes([largest_block(held) if other is head else held.nbytes]))
    return kept, BUFFERS * max(copied) if on_gpu and setting.stream else 0


def hold(
    ledger: Ledger, model: nn.Module, batch: Any, kept: Mapping[int, tuple[int, int | None]] | None = None
) -> None:
    """Enter what is there before the step: parameters, buffers, the batch. kept: see `_kept_otherwise`."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        ledger.hold(tensor, "weights", name, *(kept or {}).get(id(tensor), (None, None)))
    for tensor in tree_leaves(batch):
        if isinstance(tensor, Tensor):
            ledger.hold(tensor, "activations", "")


class _Training:
    """The optimizer, after or inside of backward, and what tells gradients from other tensors."""

    def __init__(self, parameters: list[nn.Parameter], setting: Setting, ledger: Ledger, names: dict[int, str]) -> None:
        self._parameters, self._ledger, self._names = parameters, ledger, names
        self._in_backward = is_in_backward(setting.optimizer)
        self._groups = [[p] for p in parameters] if self._in_backward else [parameters]
        self._optimizer = setting.optimizer
        self._accumulating = setting.accumulating and not self._in_backward
        for index, parameter in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(self._arrived(index))

    def warm_up(self) -> None:
        """An update with empty gradients, so that the states are there: a step before the one that counts."""
        self._optimizers = [build_optimizer(self._optimizer, group) for group in self._groups]
        for parameter in self._parameters:
            parameter.grad = torch.empty_like(parameter)
            self._ledger.relabel(parameter.grad, "gradients", self._names[id(parameter)])
        for optimizer in self._optimizers:
            optimizer.step()
        if not self._accumulating:
            for parameter in self._parameters:
                parameter.grad = None

    def update(self) -> None:
        if not self._in_backward:
            self._optimizers[0].step()

    def _arrived(self, index: int) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if parameter.grad is None:
                return
            self._ledger.relabel(parameter.grad, "gradients", self._names[id(parameter)])
            if self._in_backward:
                self._ledger.enter("update")
                self._optimizers[index].step()
                parameter.grad = None
                self._ledger.enter("backward")

        return hook
