"""What csrc/layout.h and csrc/moments.h fix and every backend has to know: numbers of dtypes, widths of rows.

tests/kernels/test_layout.py holds it against these files and against the compiled extension.
"""

from __future__ import annotations

import dataclasses

import torch

from zest_fast.kernels.moments import GradientMoments, Moments

DTYPE_NUMBER = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""As ``enum class DType`` counts them."""

MOMENTS = len(dataclasses.fields(Moments))
"""float64 in a row of moments: one for each field, in their order."""

GRADIENT_MOMENTS = MOMENTS + len(dataclasses.fields(GradientMoments)) - 1
"""float64 in a row of gradient moments: those of ``gradient``, then the other fields."""
