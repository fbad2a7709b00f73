"""The state of random numbers: of torch, NumPy and Python, and of generators that a model or its closure owns."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from zest_fast.profiling.functions import referred, values_in


class KeptRandom:
    """Random state as it is now.

    Args:
        parameters: of the model; they tell the CUDA devices.
        objects: attributes of modules, generators among them.
        functions: what runs the model: generators in their closures and among the globals that they name are kept, and
            those of functions that they refer to in turn.
        forwards: of modules; as functions, but without what they refer to in turn.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        objects: Iterable[Any],
        functions: Iterable[Callable[..., Any]],
        forwards: Iterable[Callable[..., Any]],
    ) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = {d: torch.cuda.get_rng_state(d) for d in {p.device for p in parameters} if d.type == "cuda"}
        self._python = random.getstate()
        numpy = sys.modules.get("numpy")
        self._numpy = numpy.random.get_state() if numpy is not None else None
        held = [value for function in referred(functions) for value in values_in(function)]
        held += [value for function in forwards if isinstance(function, FunctionType) for value in values_in(function)]
        candidates = (*objects, *held)
        kinds = {kind for kind in {type(value) for value in candidates} if _is_generator(kind)}
        found = {id(g): g for g in candidates if type(g) in kinds}
        self._own = [(g, _state(g)) for g in found.values()]

    def restore(self) -> None:
        """Sets every generator back."""
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        for generator, state in self._own:
            _set_state(generator, state)


def _is_generator(kind: type) -> bool:
    numpy = sys.modules.get("numpy")
    own = () if numpy is None else (numpy.random.Generator, numpy.random.RandomState)
    return issubclass(kind, (torch.Generator, random.Random, *own))


def _state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if hasattr(generator, "bit_generator"):  # numpy.random.Generator
        return generator.bit_generator.state
    return generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)
