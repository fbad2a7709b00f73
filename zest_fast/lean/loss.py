"""Cross-entropy of a causal language model with a frozen head, over chunks of the tokens: logits never exist whole.

torch keeps two tensors of tokens x vocabulary for the backward pass, and holds a third on the way. Here each chunk's
gradient of the hidden states is computed together with its loss, so what is kept is as large as the hidden states, and
no multiplication is done twice.

For a model of transformers that calls its head and then `self.loss_function` on what the head returns. The head returns
DeferredLogits during a call with labels; a model that does something to them in between (a soft cap, a scale) thereby
computes them, and goes on plainly. `.logits` of the model's output are computed when they are read.

The head's weight is used a block of rows at a time (head_blocks.py), so that it need not be there whole either.
"""

from __future__ import annotations

import math
import sys
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zest_fast.foundation.torch_private import forward_hooks, has_backward_hooks
from zest_fast.lean.forward import (
    LeanForward,
    builds_plain_graph,
    owns_trainable,
    plain_forward,
    run_plainly,
)
from zest_fast.lean.head_blocks import linear_by_blocks, times_by_blocks
from zest_fast.lean.logits import DeferredLogits

FEWEST_TOKENS = 128  #: of a chunk: fewer, and reading the head's weight outweighs multiplying by it

_deferring: ContextVar[nn.Module | None] = ContextVar("_deferring", default=None)  # the head of the model that runs


def head_of(module: nn.Module) -> nn.Module | None:
    """The head of a causal language model of transformers; None for every other module."""
    kind = type(module)  # PEFT's wrappers hand on the attributes of the model inside
    if not hasattr(kind, "loss_function") or not hasattr(kind, "get_output_embeddings"):
        return None
    head = module.get_output_embeddings()  # type: ignore[operator]
    return head if isinstance(head, nn.Module) and _is_causal(module) else None


def _is_causal(model: Any) -> bool:
    return "_loss_function" in vars(model) or model.loss_function is _standard_loss()


def obstacle(model: nn.Module, head: nn.Module) -> str:
    """Why the loss of this model is left plain; "" where it can be taken over chunks."""
    if type(head).forward is not nn.Linear.forward and not hasattr(head._parameters.get("weight"), "blocks"):
        return f"its head is a {type(head).__name__}, not a plain Linear"
    if "forward" in vars(head) or "weight" not in head._parameters:
        return "the forward or the weight of its head was replaced"
    if forward_hooks(head) or has_backward_hooks(head):
        return "there are hooks on its head, which look at the logits"
    if owns_trainable(head):
        return "its head trains"
    if model.loss_function is not _standard_loss():
        return "its loss function was replaced"
    return ""


def _standard_loss() -> object:
    losses: Any = sys.modules.get("transformers.loss.loss_utils")
    return getattr(losses, "ForCausalLMLoss", None)


class LeanHead(LeanForward):
    """The forward of the head: deferred while its model runs with labels."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and self._pays(args[0]) and _deferring.get() is self.module:
            assert isinstance(self.module, nn.Linear)
            return DeferredLogits(args[0], self.module)
        return super().__call__(*args, **kwargs)


class LeanLanguageModel(LeanForward):
    """The forward of the model: while it runs with labels, its head defers the logits and its loss goes by chunks.

    The loss function is there for as long as the forward is, since several threads may run the model; a loss function
    that is set later takes its place, and gets the logits.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, plain_forward(model))
        self._own = vars(model).get("_loss_function")

    def put_in(self) -> None:
        super().put_in()
        self.module.loss_function = causal_lm_loss  # type: ignore[assignment]

    def remove(self) -> None:
        super().remove()
        if vars(self.module).get("_loss_function") is causal_lm_loss:
            if self._own is None:
                del self.module._loss_function
            else:
                self.module.loss_function = self._own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not builds_plain_graph() or not self.enabled or kwargs.get("labels") is None:
            return run_plainly(self.module, *args, **kwargs)
        if vars(self.module).get("_loss_function") is not causal_lm_loss:
            return run_plainly(self.module, *args, **kwargs)
        token = _deferring.set(self.module.get_output_embeddings())  # type: ignore[operator]
        try:
            return run_plainly(self.module, *args, **kwargs)
        finally:
            _deferring.reset(token)


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' ForCausalLMLoss, over chunks where the logits are deferred; same arguments, same result."""
    if type(logits) is not DeferredLogits:
        standard: Any = _standard_loss()
        return standard(
            logits,
            labels,
            vocab_size,
            num_items_in_batch=num_items_in_batch,
            ignore_index=ignore_index,
            shift_labels=shift_labels,
            **kwargs,
        )
    hidden = logits.hidden.reshape(-1, logits.hidden.shape[-1])
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(hidden.device)
    total = chunked_cross_entropy(hidden, logits.head, targets, ignore_index)
    if num_items_in_batch is None:
        count = (targets != ignore_index).sum()
        return torch.where(
            count > 0, total / count.clamp(min=1), torch.nan
        )  # no target: no loss, no gradient, as torch
    return total / (num_items_in_batch.to(total.device) if torch.is_tensor(num_items_in_batch) else num_items_in_batch)


def chunked_cross_entropy(hidden: Tensor, head: nn.Linear, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Sum of the cross-entropies of head(hidden) in float32; hidden [tokens, width], targets [tokens] of int64.

    A chunk's logits are about as large as all hidden states, or FEWEST_TOKENS high. head must be frozen.
    """
    tokens, width = hidden.shape
    chunk = max(FEWEST_TOKENS, math.ceil(tokens * width / head.out_features))
    return _ChunkedCrossEntropy.apply(hidden, head, targets, ignore_index, chunk)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Any, targets: Tensor, ignore_index: int, chunk: int) -> Tensor:
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for h, t, g in zip(hidden.split(chunk), targets.split(chunk), gradient.split(chunk), strict=True):
            logits = linear_by_blocks(h, head.weight, head.bias)
            log_softmax = F.log_softmax(logits.float(), dim=-1)
            total += F.nll_loss(log_softmax, t, ignore_index=ignore_index, reduction="sum")
            g.copy_(times_by_blocks(_gradient_of_logits(log_softmax, t, ignore_index).to(logits.dtype), head.weight))
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: the gradient that was kept would count as a constant
            raise RuntimeError(
                "the loss over chunks of a causal language model (lean saving) cannot be differentiated twice: use "
                "SelectiveBackward(..., lean=False), or apply_lean only to the blocks"
            )
        (gradient,) = ctx.saved_tensors
        return (gradient.float() * grads[0]).to(gradient.dtype), None, None, None, None


def _gradient_of_logits(log_softmax: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """softmax minus one-hot, zero for ignored tokens; overwrites log_softmax."""
    ignored = targets == ignore_index
    places = targets.masked_fill(ignored, 0).unsqueeze(1)
    softmax = log_softmax.exp_()
    softmax.scatter_add_(1, places, softmax.new_full((), -1.0).expand(places.shape))
    return softmax.masked_fill_(ignored.unsqueeze(1), 0)
