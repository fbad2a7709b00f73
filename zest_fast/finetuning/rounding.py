"""Weights in bfloat16 and float16 that a step cannot move, because it is rounded away.

A weight takes the nearest number of its type: a step below half the distance to the next one leaves it where it is. Of
weights as large as 0.02 in bfloat16 that is 6e-5, three times AdamW's step at a rate of 2e-5.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zest_fast.lean.master_weights import MasterWeights
from zest_fast.profiling.processes.local import is_distributed

_SAMPLE = 1 << 16  # entries of each parameter
_ENOUGH = 0.95  # of the weights should be able to move
_BITS = {torch.bfloat16: (7, -133), torch.float16: (10, -24)}  # of the fraction; exponent of the smallest number
_RATE_BOUNDS_STEP = ("adam", "lion", "rmsprop", "adagrad")  # in names: steps are at most about as large as the rate
_EXACT = ("bf16_stochastic_round", "use_kahan_summation", "kahan_sum", "master_weights")  # what some optimizers have


def half_steps(weights: Tensor) -> Tensor:
    """Half the distance from each weight to the next number of its type, in float32; what is below is rounded away."""
    fraction, smallest = _BITS[weights.dtype]
    _, exponent = torch.frexp(weights.float())  # weight = m 2**exponent, 0.5 <= |m| < 1
    last = (exponent - 1 - fraction).clamp(min=smallest)
    last = torch.where(weights == 0, smallest, last)
    return torch.ldexp(torch.full(weights.shape, 0.5), last)


@dataclass(frozen=True)
class Lost:
    """share: of `count` weights in `dtype` that a step at `rate` cannot move. enough: a rate that moves most."""

    dtype: str
    count: int
    rate: float
    share: float
    enough: float

    def __str__(self) -> str:
        return (
            f"{self.share:.0%} of the {self.count:,} chosen weights in {self.dtype} cannot move at a learning rate of "
            f"{self.rate:g}: a step of that size is below half of their last digit, and rounded away. Take "
            f"zest_fast.MasterWeights as the optimizer, let the chosen layers be float32 (under torch.autocast), or "
            f"take a rate of {self.enough:.1g}, at which {_ENOUGH:.0%} of them move"
        )


def lost_steps(optimizer: Any, chosen: Mapping[str, nn.Parameter]) -> Lost | None:
    """What rounding takes from a step of `optimizer`, where that is known: of those like Adam from the rate, of SGD
    from gradients that are there. None where (nearly) all weights in low precision can move, or nothing is known.
    """
    optimizer = innermost(optimizer)
    if any(getattr(optimizer, name, False) for name in _EXACT):
        return None
    own = {id(parameter) for parameter in chosen.values()}
    counts, stuck, rates, needed, dtypes = [], [], [], [], set()
    for group in optimizer.param_groups:
        if any(group.get(name) for name in _EXACT):
            continue
        rate = max(float(group.get("lr", 0.0)), float(group.get("initial_lr", 0.0)))  # a warm-up begins at 0
        for parameter in group["params"]:
            if id(parameter) not in own or not _is_low(parameter):
                continue
            weights = _sample(parameter)
            step = _step(optimizer, group, rate, parameter)
            if step is None:
                continue
            half = half_steps(weights)
            counts.append(parameter.numel())
            stuck.append(parameter.numel() * float((step < half).float().mean()))
            rates.append(rate)
            needed.append(float(half.quantile(_ENOUGH)))
            dtypes.add(str(parameter.dtype).removeprefix("torch."))
    if not counts or sum(stuck) <= (1 - _ENOUGH) * sum(counts):
        return None
    enough = max(needed) if _bounds_step(optimizer) else max(rates) * 10
    return Lost(" and ".join(sorted(dtypes)), sum(counts), max(rates), sum(stuck) / sum(counts), enough)


def innermost(optimizer: Any) -> Any:
    """The optimizer itself, which accelerate wraps into another."""
    while hasattr(getattr(optimizer, "optimizer", None), "param_groups"):
        optimizer = optimizer.optimizer
    return optimizer


def _step(optimizer: Any, group: Mapping[str, Any], rate: float, parameter: Tensor) -> Tensor | None:
    """The largest step of each sampled entry; None where it is not known."""
    if not rate:
        return None
    if _bounds_step(optimizer):
        return torch.tensor(rate)
    if isinstance(optimizer, torch.optim.SGD) and parameter.grad is not None and not parameter.grad.is_sparse:
        return rate * _sample(parameter.grad).float().abs() / (1 - min(0.99, float(group.get("momentum", 0.0))))
    return None


def _bounds_step(optimizer: Any) -> bool:
    name = type(optimizer).__name__.lower()
    return any(kind in name for kind in _RATE_BOUNDS_STEP)


class Samples:
    """Some entries of each chosen weight in low precision as they are now: how many have moved?"""

    def __init__(self, chosen: Mapping[str, nn.Parameter]) -> None:
        self._found: dict[str, tuple[torch.dtype, Tensor]] = {}
        self.add(chosen)

    def add(self, chosen: Mapping[str, nn.Parameter]) -> None:
        """What trains from now on; of what is known already, the older sample stays."""
        for name, parameter in chosen.items():
            if _is_low(parameter) and parameter.dim() > 1 and name not in self._found:
                self._found[name] = parameter.dtype, _sample(parameter)

    def __bool__(self) -> bool:
        return bool(self._found)

    def moved(self, chosen: Mapping[str, nn.Parameter], optimizer: Any = None) -> tuple[str, float] | None:
        """The types, and the share of the weights in them that are not where they were; None without such.

        Of weights that `optimizer` keeps masters of, the share of these.
        """
        dtypes, counts, moved = set(), 0, 0.0
        for name, (dtype, before) in self._found.items():
            if name not in chosen:
                continue
            now = chosen[name]
            if now.dtype != dtype or is_distributed(now) or (sample := _sample(now)).shape != before.shape:
                continue
            master = _master(optimizer, now)
            sample = sample if master is None else _sample(master)
            dtypes.add(str(dtype).removeprefix("torch."))
            counts += now.numel()
            moved += now.numel() * float((sample != before.to(sample.dtype)).float().mean())
        return (" and ".join(sorted(dtypes)), moved / counts) if counts else None


def _master(optimizer: Any, parameter: Tensor) -> Tensor | None:
    if not isinstance(optimizer, MasterWeights):
        return None
    try:
        return optimizer.master_of(parameter)
    except KeyError:
        return None


def _is_low(parameter: Tensor) -> bool:
    return (
        parameter.dtype in _BITS and parameter.numel() > 0 and not parameter.is_meta and not is_distributed(parameter)
    )


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE)].to("cpu", copy=True)


def complaints(samples: Samples, chosen: Mapping[str, nn.Parameter], optimizer: Any) -> Iterator[str]:
    """What there is to say after training of weights that rounding has kept in their places."""
    found = samples.moved(chosen, innermost(optimizer))
    if found is not None and 0 < found[1] < 0.9:  # none at all is an error, said elsewhere
        yield (
            f"only {found[1]:.0%} of the chosen weights in {found[0]} have moved: the steps of the others were rounded "
            "away, or they had no gradient. Take zest_fast.MasterWeights as the optimizer, let the chosen layers be "
            "float32 (under torch.autocast), or raise the rate"
        )
    if optimizer is not None and (lost := lost_steps(optimizer, chosen)) is not None:
        yield str(lost)
