"""Where Triton's kernels run: the device of a tensor, or the CPU under Triton's interpreter."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Makes x's device the current one, which is where Triton launches; its current stream is the caller's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
