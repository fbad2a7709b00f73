"""Frozen norms over the last dimension (RMSNorm and its like), and activations written out in several operations.

They keep their input, in its own type, and run again in the backward pass; as written in transformers, a bfloat16
RMSNorm keeps a float32 copy of it. They are known by what they own and do, not by name: a trial of the class's code
shows whether lean is exact and in which types it keeps less. torch's own LayerNorm, RMSNorm, SiLU and GELU keep nothing
but their input as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zest_fast.finetuning.lean_forward import plain_forward
from zest_fast.finetuning.lean_recompute import recomputed
from zest_fast.finetuning.lean_stand_in import agree, inputs_like, kept_bytes, stand_in

_ROWS = (2, 3)  # of the trial's input
_WIDTH = 8  # of the trial's input to an activation
_ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")
_TYPES = (torch.float32, torch.bfloat16)


def is_norm(module: nn.Module) -> bool:
    """Whether it owns what an RMSNorm or LayerNorm owns: a vector, perhaps a second one, and an epsilon."""
    vectors = [p for p in module._parameters.values() if p is not None]
    return (
        not module._modules
        and not module._buffers
        and len(vectors) in (1, 2)
        and all(p.dim() == 1 and p.shape == vectors[0].shape for p in vectors)
        and any(isinstance(getattr(module, name, None), float) for name in ("eps", "variance_epsilon"))
    )


def is_activation(module: nn.Module) -> bool:
    """Whether its class is among the activations of torch or transformers, and owns nothing."""
    owned = [*module._parameters, *module._buffers, *module._modules]
    return type(module).__module__ in _ACTIVATIONS and not owned and not getattr(module, "inplace", False)


def run_again(module: nn.Module, x: Tensor) -> Tensor:
    return recomputed(plain_forward(module), x)


def element_sizes(module: nn.Module) -> tuple[int, ...] | str:
    """The sizes in bytes of the types in which running it again keeps less; or why it is left plain."""
    try:
        with torch.random.fork_rng(devices=[]):
            sizes = tuple(dtype.itemsize for dtype in _TYPES if _keeps_less(module, dtype))
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, AssertionError) as error:
        return f"its class cannot be tried on a small input ({type(error).__name__}: {error})"
    return sizes or "torch keeps no more than its input as it is"


def _keeps_less(module: nn.Module, dtype: torch.dtype) -> bool:
    small = stand_in(module, dtype)
    plain = plain_forward(small)
    width = next((len(p) for p in module._parameters.values() if p is not None), _WIDTH)
    x = inputs_like((*_ROWS, width), dtype)
    if not agree(plain, lambda x: recomputed(plain, x), x):
        raise ValueError("two runs of it differ")
    return kept_bytes(plain, x) > kept_bytes(lambda x: recomputed(plain, x), x) + x.numel() // 2 * dtype.itemsize
