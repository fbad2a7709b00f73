"""What a plan is made for: sizes, dtype, optimizer, and what is done to save memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch

from zest_fast.finetuning.trainable_layers import reusable_head
from zest_fast.foundation.nearest import nearest
from zest_fast.foundation.options import Checkpoint, Frozen, PlannedDevice
from zest_fast.planning.optimizers import Build, check_optimizer

DTYPES: dict[str, tuple[torch.dtype, torch.dtype | None]] = {  # of the weights, and of autocast
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "float32": (torch.float32, None),
    "bfloat16-mixed": (torch.float32, torch.bfloat16),
    "float16-mixed": (torch.float32, torch.float16),
}
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "bf16-mixed": "bfloat16-mixed"}
_SHORT |= {"fp16-mixed": "float16-mixed"}

QUANTISED: tuple[str, ...] = get_args(Frozen)


@dataclass(frozen=True)
class Setting:
    """One column of the arguments of `plan`.

    layers: names, "all", or None = what requires a gradient now. dtype: None = as the model is. accumulating: gradients
    of an earlier batch are there when the step begins. device: "cuda", or "cpu", where oneDNN's copies count too.
    trained_float32: what trains is kept in float32 under autocast. stream: frozen weights are read from disk as they
    are used, as `open_streamed` has them.
    """

    layers: tuple[str, ...] | str | None
    batch_size: int
    sequence_length: int | None = None
    image_size: int | None = None
    dtype: str | None = "bfloat16"
    optimizer: str | Build = "adamw"
    lean: bool = True
    checkpoint: Checkpoint | None = None
    frozen: Frozen | None = None
    head: Any = "auto"
    accumulating: bool = False
    device: PlannedDevice = "cuda"
    trained_float32: bool = False
    stream: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "sequence_length", "image_size"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r}: a whole number from 1 on is needed")
        if self.device not in get_args(PlannedDevice):
            raise ValueError(f"device={self.device!r} is unknown; 'cuda' or 'cpu' is needed")
        check_optimizer(self.optimizer)
        object.__setattr__(self, "head", reusable_head(self.head))
        if self.frozen is not None and self.frozen not in QUANTISED:
            raise ValueError(f"frozen={self.frozen!r} is unknown; None, 'int8' or 'nf4' is needed")
        if self.frozen is not None and self.layers == "all":
            raise ValueError(f"frozen={self.frozen!r} with layers='all': nothing is frozen; leave one of them out")
        if self.stream and self.layers == "all":
            raise ValueError("stream=True with layers='all': nothing is frozen that could stay on disk; leave it out")

    @property
    def optimizer_name(self) -> str:
        if isinstance(self.optimizer, str):
            return self.optimizer
        return str(getattr(self.optimizer, "__name__", type(self.optimizer).__name__))

    @property
    def size(self) -> str:
        """The batch in words: "4 x 512 tokens"."""
        if self.sequence_length is not None:
            return f"{self.batch_size} x {self.sequence_length} tokens"
        if self.image_size is not None:
            return f"{self.batch_size} x {self.image_size}² pixels"
        return f"{self.batch_size} samples"


def dtype_name(dtype: object) -> str | None:
    """The key of DTYPES for a name, a short one ("bf16"), or a torch.dtype; None stays None."""
    if dtype is None:
        return None
    text = str(dtype).removeprefix("torch.")
    text = _SHORT.get(text, text)
    if text not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; {nearest(text, DTYPES)}")
    return text


def packed_bytes(weights: int, rows: int, frozen: str) -> int:
    """Bytes of a quantised matrix.

    int8: a byte for each weight and a float32 scale for each row. nf4: half a byte for each weight and a float32 scale
    for each block of 64 (0.5625 bytes; QLoRA's double quantisation of the scales would leave 0.516).
    """
    return weights + 4 * rows if frozen == "int8" else -(-weights // 2) + 4 * -(-weights // 64)
