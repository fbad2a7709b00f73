"""Sizes in bytes, as users write them."""

from __future__ import annotations

import re

_SIZES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def memory_bytes(size: str | int, argument: str = "max_memory") -> int:
    """Bytes of 24_000_000_000, "24GB" (10^9) or "24GiB" (2^30)."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", size) if isinstance(size, str) else None
    if found is None or (found[2].upper() or "B") not in _SIZES:
        raise ValueError(f"{argument}={size!r} is no size; write bytes, '24GB' (10^9 bytes) or '24GiB' (2^30)")
    return int(float(found[1]) * _SIZES[found[2].upper() or "B"])
