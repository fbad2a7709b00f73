"""Kernels of users, named by `module:function`."""

from __future__ import annotations

from zest_fast.benchmarking.kernel_cases import SIGNATURES, Candidate, own_candidate
from zest_fast.foundation.nearest import nearest
from zest_fast.integrations.references import find_function, is_reference


def load_own_kernel(text: str) -> tuple[str, Candidate]:
    """Of "mine:moments", or "moments=mine:fast" where the function has a name of its own: the kernel that it is to
    compute, and the function.

    Raises ValueError for what is neither, and for what cannot be found; what the user's module raises passes through.
    """
    kernel, _, reference = text.rpartition("=")
    if not is_reference(reference):
        raise ValueError(f"--kernel {text!r} is no module:function; write mine:moments, or moments=mine:fast")
    kernel = kernel or reference.partition(":")[2]
    if kernel not in SIGNATURES:
        raise ValueError(
            f"--kernel {text!r}: {kernel!r} is none of the kernels ({nearest(kernel, SIGNATURES)}); say which one it "
            f"computes, moments={reference}"
        )
    return kernel, own_candidate(reference, find_function(reference))
