"""What kernels are measured on, and who computes it: ours, torch expressions, torch.compile, and functions of users.

Bytes are those that a kernel has to read at least once: x for moments; dW and W for gradient_moments; Y and G for
channel_products; x, g and W for linear_gradient_moments, which a matrix product bounds instead (2 T I O FLOP).

A function of a user's takes the tensors of SIGNATURES, leaves them as they are, and returns a mapping of the named
statistics to numbers or tensors of one entry, or S.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from zest_fast import kernels
from zest_fast.benchmarking import torch_reductions as reductions
from zest_fast.benchmarking.accuracy import Verdict, judge, judge_products, statistics_of
from zest_fast.kernels import Collector, reference
from zest_fast.kernels.channels import by_channel

SIGNATURES = {
    "moments": "moments(x) -> mean, std, abs_mean, abs_std",
    "gradient_moments": (
        "gradient_moments(dw, w) -> mean, std, abs_mean, abs_std, norm (of dw), weight_mean, weight_std, weight_norm, "
        "plain (the mean of w * dw), snip (the sum of its magnitudes)"
    ),
    "linear_gradient_moments": "linear_gradient_moments(x, g, w) -> the same, of dw = g.T @ x",
    "channel_products": "channel_products(y, g) -> S [N, K], the sum of y * g over positions",
}
LAYOUTS = ("tokens", "pixels")  #: of channel_products: Y [8, positions, 768], or [8, channels, side, side]
ROWS = 256  #: of x and g of linear_gradient_moments
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
Role = Literal["ours", "own", "peer", "floor"]
_DRAWN = 1 << 20  # different numbers, repeated: drawing 256 MiB would outlast the measurement
_MIB = 1 << 20


def _same(result: Any) -> Any:
    return result


@dataclass(frozen=True)
class Candidate:
    """Who computes a kernel.

    call: of the tensors; on a GPU this alone is timed, and waits for nothing. numbers: of its result, what a caller on
    a CPU waits for. read: of its result, what is compared with the reference; None = there is nothing to compare.
    """

    name: str
    role: Role
    call: Callable[..., Any]
    numbers: Callable[[Any], object] = _same
    read: Callable[[Any], Any] | None = _same

    def on_cpu(self, *tensors: Tensor) -> object:
        return self.numbers(self.call(*tensors))


@dataclass(frozen=True)
class Problem:
    """One kernel on tensors of one shape and type. layout: of channel_products."""

    kernel: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    layout: str = ""

    @property
    def label(self) -> str:
        return f"{self.kernel} ({self.layout})" if self.layout else self.kernel

    @property
    def shape(self) -> list[int]:
        """As readers know it: T, I and O of a linear layer, else that of the first tensor."""
        return [*self.shapes[0], self.shapes[1][1]] if self.kernel == "linear_gradient_moments" else [*self.shapes[0]]

    @property
    def bytes(self) -> int:
        return sum(map(math.prod, self.shapes)) * DTYPES[self.dtype].itemsize

    @property
    def flop(self) -> int:
        """Of the matrix product."""
        return 2 * math.prod(self.shape) if self.kernel == "linear_gradient_moments" else 0

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        """Normal numbers, the same for each call; with another mean than zero where a kernel may overlook it."""
        offset = 0.5 if self.kernel in ("moments", "gradient_moments") else 0.0
        return tuple(
            random_numbers(*shape, dtype=DTYPES[self.dtype], seed=seed, offset=offset).to(device)
            for seed, shape in enumerate(self.shapes)
        )

    def judge(self, found: Any, *tensors: Tensor) -> Verdict:
        """What somebody found of these tensors against the float64 reference. Raises as the functions of accuracy."""
        dtype = DTYPES[self.dtype]
        if self.kernel == "channel_products":
            y, g = (by_channel(x, 2 if self.layout == "tokens" else 1) for x in tensors)
            magnitude = reference.channel_products(y.double().abs(), g.double().abs())
            return judge_products(found, reference.channel_products(y, g), magnitude, dtype)
        expected = statistics_of(getattr(reference, self.kernel)(*tensors))
        return judge(found, expected, dtype, math.prod(self.shapes[-1]))


def problem_of(kernel: str, size: int, dtype: str, layout: str = "") -> Problem:
    """The one that reads about `size` bytes; of linear_gradient_moments the weight has as many."""
    numel = size // DTYPES[dtype].itemsize
    shapes: tuple[tuple[int, ...], ...]
    if kernel == "moments":
        shapes = ((numel,),)
    elif kernel == "gradient_moments":
        shapes = ((numel // 2,),) * 2
    elif kernel == "linear_gradient_moments":
        return linear_problem(ROWS, math.isqrt(numel), math.isqrt(numel), dtype)
    else:
        shapes = (_outputs(numel // 2, layout),) * 2
    return Problem(kernel, shapes, dtype, layout)


def linear_problem(t: int, i: int, o: int, dtype: str) -> Problem:
    """linear_gradient_moments of x [T, I], g [T, O] and w [O, I]."""
    return Problem("linear_gradient_moments", ((t, i), (t, o), (o, i)), dtype)


def _outputs(numel: int, layout: str) -> tuple[int, ...]:
    if layout == "tokens":
        return (8, max(1, numel // (8 * 768)), 768)
    side = 14 if numel < _MIB else 56
    return (8, max(1, numel // (8 * side * side)), side, side)


def random_numbers(*shape: int, dtype: torch.dtype, seed: int = 0, offset: float = 0.0) -> Tensor:
    """Normal numbers around `offset`, a million different ones repeated, each time on another scale: who leaves out a
    part, or reads one twice, finds other statistics."""
    found = torch.empty(math.prod(shape), dtype=dtype)
    drawn = torch.randn(min(len(found), _DRAWN), generator=torch.Generator().manual_seed(seed)).add_(offset)
    parts = found.split(_DRAWN)
    for part, scale in zip(parts, torch.linspace(1, 2, len(parts)).tolist(), strict=True):
        part.copy_(drawn[: len(part)] * scale)
    return found.view(shape)


class Compiled:
    """The reductions that torch.compile makes, each built once."""

    def __init__(self) -> None:
        torch.compiler.reset()
        self._made = {
            "moments": reductions.compiled_moments(),
            "gradient_moments": reductions.compiled_gradient_moments(),
            "tokens": reductions.compiled_channel_products([1]),
            "pixels": reductions.compiled_channel_products([2, 3]),
        }

    def of(self, problem: Problem) -> Any:
        """None where there is none."""
        return self._made.get(problem.layout or problem.kernel)


def candidates_of(problem: Problem, device: torch.device, compiled: Compiled | None = None) -> list[Candidate]:
    """Ours first, then what torch computes. compiled: None leaves torch.compile out."""
    others = {
        "moments": _peers_of_moments,
        "gradient_moments": _peers_of_gradient_moments,
        "linear_gradient_moments": _peers_of_linear,
        "channel_products": _peers_of_products,
    }[problem.kernel](problem)
    made = compiled.of(problem) if compiled else None
    return [_ours(problem, device), *others, *([_compiled(problem, made)] if made else [])]


def own_candidate(name: str, function: Callable[..., Any]) -> Candidate:
    """A function of a user's."""
    return Candidate(name, "own", function)


def _ours(problem: Problem, device: torch.device) -> Candidate:
    """The public function; on a GPU what profile() calls, which leaves the numbers there."""
    one = problem.kernel == "channel_products"
    if device.type == "cpu":
        public = getattr(kernels, problem.kernel)
        call = (lambda x: public([x])[0]) if problem.kernel == "moments" else public
        return Candidate("zest_fast", "ours", call, read=_same if one else statistics_of)
    if one:
        return Candidate("zest_fast", "ours", kernels.channel_products)
    return Candidate("zest_fast", "ours", partial(_queued, problem.kernel), read=_fetched)


def _queued(kernel: str, *tensors: Tensor) -> tuple[Collector, Callable[[], Any]]:
    collector = Collector("auto")
    if kernel == "moments":
        return collector, collector.moments(tensors)[0]
    return collector, getattr(collector, kernel)(*tensors)


def _fetched(queued: tuple[Collector, Callable[[], Any]]) -> dict[str, float]:
    collector, later = queued
    collector.fetch()
    return statistics_of(later())


def _peers_of_moments(problem: Problem) -> list[Candidate]:
    lean = partial(reductions.lean_moments, scratch=reductions.Scratch())
    return [
        Candidate("torch_separate", "peer", reductions.separate_moments, _numbers),
        Candidate("torch_lean", "peer", lean, _stacked, partial(_derived, problem)),
    ]


def _peers_of_gradient_moments(problem: Problem) -> list[Candidate]:
    lean = partial(reductions.lean_gradient_moments, scratch=reductions.Scratch())
    return [
        Candidate("torch_separate", "peer", reductions.separate_gradient_moments, _numbers),
        Candidate("torch_lean", "peer", lean, _stacked, partial(_derived, problem)),
    ]


def _peers_of_linear(problem: Problem) -> list[Candidate]:
    scratch, stored = reductions.Scratch(), _Stored()

    def separate(x: Tensor, g: Tensor, w: Tensor) -> reductions.Sums:
        return reductions.separate_gradient_moments(g.t() @ x, w)

    def lean(x: Tensor, g: Tensor, w: Tensor) -> reductions.Sums:
        return reductions.lean_gradient_moments(stored.product(x, g, w), w, scratch)

    return [
        Candidate("torch_separate", "peer", separate, _numbers),
        Candidate("torch_lean", "peer", lean, _stacked, partial(_derived, problem)),
        Candidate("bare_mm", "floor", stored.product, read=None),
    ]


class _Stored:
    """dW in a buffer that is reused: fresh pages cost more than the product."""

    def __init__(self) -> None:
        self._dw: Tensor | None = None

    def product(self, x: Tensor, g: Tensor, w: Tensor) -> Tensor:
        if self._dw is None:
            self._dw = torch.empty_like(w)
        return torch.mm(g.t(), x, out=self._dw)


def _peers_of_products(problem: Problem) -> list[Candidate]:
    positions, scratch = [1] if problem.layout == "tokens" else [2, 3], reductions.Scratch()
    separate = partial(reductions.separate_channel_products, positions=positions)
    lean = partial(reductions.lean_channel_products, positions=positions, scratch=scratch)
    return [Candidate("torch_separate", "peer", separate), Candidate("torch_lean", "peer", lean)]


def _compiled(problem: Problem, call: Callable[..., Tensor]) -> Candidate:
    if problem.kernel == "channel_products":
        return Candidate("torch_compiled", "peer", call)
    names = reductions.SUMS_OF_X if problem.kernel == "moments" else reductions.SUMS_OF_GRADIENT

    def read(sums: Tensor) -> dict[str, Tensor]:
        return _derived(problem, dict(zip(names, sums, strict=True)))

    return Candidate("torch_compiled", "peer", call, lambda sums: sums.tolist(), read)


def _numbers(sums: reductions.Sums) -> list[float]:
    return [value.item() for value in sums.values()]


def _stacked(sums: reductions.Sums) -> list[float]:
    return list(torch.stack(list(sums.values())).tolist())


def _derived(problem: Problem, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The statistics of sums, in the type that these came in, which says how exact they can be."""
    of = reductions.statistics_of_x if problem.kernel == "moments" else reductions.statistics_of_gradient
    found = of(math.prod(problem.shapes[-1]), {name: value.item() for name, value in sums.items()})
    dtype = next(iter(sums.values())).dtype
    return {name: torch.tensor(value, dtype=dtype) for name, value in found.items()}
