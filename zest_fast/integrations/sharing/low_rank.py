"""What a delta changed as products of low rank, with the error that this makes: the numbers of a LoRA adapter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from zest_fast.foundation.nearest import some

_WHOLE_SPECTRUM = 1024  # rows or columns up to which all singular values are found in float64, whatever is asked
_OVERSAMPLING, _POWERS = 16, 6  # of the randomised decomposition of larger matrices (Halko et al., arXiv 0909.4061)


@dataclass(frozen=True)
class LowRank:
    """b @ a in the place of a difference: b [out, rank], a [rank, in], both float32.

    error: the Frobenius norm of what is missing by that of the difference, of the factors as they are here.
    norm: of the difference. needed: the rank for the error that was asked for where this one is too large, else None.
    """

    a: Tensor
    b: Tensor
    error: float
    norm: float
    needed: int | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def low_rank(difference: Tensor, *, rank: int | None, error: float | None) -> LowRank:
    """The factors of least rank whose relative Frobenius error is at most `error`, of rank `rank` at most; without
    `error`, of that rank.

    difference: [out, in], not all zero. The factors share the singular values (a row of `a` and a column of `b` have
    the same norm). Above 1,024 rows and columns with `rank` given a randomised decomposition finds the leading
    singular vectors; its error is what it says, as everywhere, since it is measured.
    """
    full = min(difference.shape)
    most = full if rank is None else min(rank, full)
    wide = difference.double() if full <= _WHOLE_SPECTRUM else difference.float()
    norm = float(torch.linalg.vector_norm(wide, dtype=torch.float64))
    u, s, vh = _leading(wide, most)
    found = most
    if error is not None:
        found = min(most, _rank_for(s, norm, error))
    a, b, reached = _factors(wide, norm, u, s, vh, found)
    while error is not None and reached > error and found < most:  # by the last digits of float32
        found += 1
        a, b, reached = _factors(wide, norm, u, s, vh, found)
    needed = None
    if error is not None and reached > error:
        spectrum = s if len(s) == full else torch.linalg.svdvals(wide)
        needed = _rank_for(spectrum, norm, error)
    return LowRank(a.contiguous(), b.contiguous(), reached, norm, needed)


def _factors(wide: Tensor, norm: float, u: Tensor, s: Tensor, vh: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """a, b and the error that they make."""
    root = s[:rank].sqrt()
    a, b = (root[:, None] * vh[:rank]).float(), (u[:, :rank] * root).float()
    missing = torch.linalg.vector_norm(wide - b.to(wide.dtype) @ a.to(wide.dtype), dtype=torch.float64)
    return a, b, float(missing) / norm


def _leading(wide: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors and values, all of them or (of a large matrix) those that may be needed."""
    if min(wide.shape) <= _WHOLE_SPECTRUM or rank + _OVERSAMPLING >= min(wide.shape) // 2:
        u, s, vh = torch.linalg.svd(wide, full_matrices=False)
        return u, s, vh
    with torch.random.fork_rng(devices=[]):  # the numbers of the user's own generator stay theirs
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(wide, q=rank + _OVERSAMPLING, niter=_POWERS)
    return u, s, v.mT


def _rank_for(singular: Tensor, norm: float, error: float) -> int:
    """The least rank that leaves out at most `error` of the norm; one more than there are values where none does."""
    squares = singular.double().square()
    beyond = max(norm**2 - float(squares.sum()), 0.0)  # of values that were not computed
    left = squares.flip(0).cumsum(0).flip(0) + beyond  # [k]: what ranks up to k leave out
    enough = (torch.cat([left, left.new_tensor([beyond])]) <= (error * norm) ** 2).nonzero()
    return max(1, int(enough[0])) if len(enough) else len(singular) + 1


def check_wanted(rank: int | None, error: float | None) -> None:
    """Raises ValueError where neither is given, or one is out of range."""
    if rank is None and error is None:
        raise ValueError("say how exact the adapter is to be: rank=16, error=0.05, or both")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ValueError(f"rank={rank!r}: a rank is a whole number from 1 on")
    if error is not None and not (isinstance(error, int | float) and 1e-6 <= error < 1):
        raise ValueError(
            f"error={error!r}: the share of a difference that may be missing is from 0.000001 (factors are float32) to "
            "below 1"
        )


def refuse_what_does_not_hold(found: Iterable[tuple[str, LowRank]], rank: int | None, error: float | None) -> None:
    """Raises ValueError that names the layers whose error is too large, with the rank that each would need."""
    short = [
        f"{name!r} needs rank {one.needed} (rank {one.rank} leaves an error of {one.error:.3g})"
        for name, one in found
        if one.needed is not None
    ]
    if short:
        limit = "" if rank is None else f" at rank={rank}"
        raise ValueError(
            f"error={error:g} cannot be held{limit}: {some(short, 3)}; allow a larger rank or error, or merge the "
            "delta instead, which is exact"
        )
