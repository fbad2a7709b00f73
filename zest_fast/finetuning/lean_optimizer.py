"""The former place of `zest_fast.adamw` and `zest_fast.optimizer_in_backward`, kept for code that imports from here."""

from zest_fast.lean.optimizer import OptimizerInBackward, adamw, optimizer_in_backward

__all__ = ["OptimizerInBackward", "adamw", "optimizer_in_backward"]
