"""Gated feed-forward blocks, act(gate(x)) * up(x): keep gate and up; act(gate) is computed again in the backward pass.

With SiLU on the CPU, and with SiLU or GELU on a GPU with Triton, that pass is one compiled kernel. Known by their
children, and by a trial of the class's code against ours with small layers in place of theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zest_fast.foundation.torch_private import forward_hooks, forward_pre_hooks, has_backward_hooks
from zest_fast.kernels import lean_kernels
from zest_fast.lean.forward import plain_forward
from zest_fast.lean.recompute import Fused as FusedBackward
from zest_fast.lean.recompute import recomputed
from zest_fast.lean.stand_in import agree, inputs_like, small_linear, stand_in

_WIDTH, _INNER = 4, 6  # of the layers in a trial
_TRANSFORMERS = {
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
}


class Separate(NamedTuple):
    """Names of the children of down(act(gate(x)) * up(x))."""

    act: str
    gate: str
    up: str
    down: str

    def layers(self) -> dict[str, nn.Module]:
        return {
            self.gate: small_linear(_WIDTH, _INNER),
            self.up: small_linear(_WIDTH, _INNER),
            self.down: small_linear(_INNER, _WIDTH),
        }

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        act, gate, up, down = (getattr(module, name) for name in self)
        return down(recomputed(partial(_gated, act), gate(x), up(x), fused=_fused(act, lean_kernels.gated_backward)))


class Fused(NamedTuple):
    """Names of the children of down(act(gate) * up), where one layer yields gate and up side by side."""

    act: str
    gate_and_up: str
    down: str

    def layers(self) -> dict[str, nn.Module]:
        return {self.gate_and_up: small_linear(_WIDTH, 2 * _INNER), self.down: small_linear(_INNER, _WIDTH)}

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        act, gate_and_up, down = (getattr(module, name) for name in self)
        return down(recomputed(partial(_gated_halves, act), gate_and_up(x), fused=_fused(act, _halves_backward)))


# As in LLaMA, Mistral, Qwen, Gemma; LLaMA's own code; Phi-3 and GLM.
_FORMS: tuple[Separate | Fused, ...] = (
    Separate("act_fn", "gate_proj", "up_proj", "down_proj"),
    Separate("activation_fn", "gate_proj", "up_proj", "down_proj"),
    Separate("act_fn", "w1", "w3", "w2"),
    Fused("activation_fn", "gate_up_proj", "down_proj"),
    Fused("act_fn", "gate_up_proj", "down_proj"),
)


def form_of(module: nn.Module) -> Separate | Fused | None:
    """The form whose children these are."""
    return next((form for form in _FORMS if set(form) <= set(module._modules)), None)


def multiply_gated(module: nn.Module, x: Tensor) -> Tensor:
    form = form_of(module)
    assert form is not None
    return form.run(module, x)


def obstacle(module: nn.Module) -> str:
    """Why this block is left plain; "" where it can be lean."""
    form = form_of(module)
    assert form is not None
    act = module._modules[form.act]
    assert act is not None
    if forward_hooks(act) or forward_pre_hooks(act) or has_backward_hooks(act):
        return f"there are hooks on its {form.act}, which would run twice"
    if "forward" in vars(act) or any(True for _ in act.parameters()):
        return f"its {form.act} has parameters, or a forward that was replaced"
    if len(module._modules) != len(form):
        return f"it has children that no gated block has: {', '.join(set(module._modules) - set(form))}"
    small = stand_in(module, torch.float32, {**form.layers(), form.act: act})
    small.training = False
    try:
        same = agree(
            type(module).forward.__get__(small), partial(form.run, small), inputs_like((2, _WIDTH), torch.float32)
        )
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, AssertionError) as error:
        return f"its class cannot be tried on small layers ({type(error).__name__}: {error})"
    return "" if same else "its class computes something else than down(act(gate) * up)"


def _fused(act: nn.Module, backward: Callable[..., tuple[Tensor, ...] | None]) -> FusedBackward | None:
    name = _activation(act)
    return None if name is None else partial(backward, name)


def _activation(act: nn.Module) -> str | None:
    """Its name among the compiled kernels."""
    if isinstance(act, nn.SiLU):
        return "silu" if type(act).forward is nn.SiLU.forward and not act.inplace else None
    if isinstance(act, nn.GELU):
        known = type(act).forward is nn.GELU.forward
        return {"none": "gelu", "tanh": "gelu_tanh"}[act.approximate] if known else None
    return _TRANSFORMERS.get(type(act).__name__) if type(act).__module__ == "transformers.activations" else None


def _halves_backward(activation: str, g: Tensor, gate_and_up: Tensor) -> tuple[Tensor, ...] | None:
    gradient = lean_kernels.gated_halves_backward(activation, g, gate_and_up)
    return None if gradient is None else (gradient,)


def _gated(act: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    # Not act(gate): hooks on every module (FlopCounterMode has such) would see it once more in the backward pass.
    return plain_forward(act)(gate) * up


def _gated_halves(act: nn.Module, gate_and_up: Tensor) -> Tensor:
    return _gated(act, *gate_and_up.chunk(2, dim=-1))
