"""Everything that a training run needs to go on as if it had never stopped, in one file that holds no code.

torch.save's format, read with `weights_only=True`; the frozen weights are not in it.
"""

from __future__ import annotations

import os
import pickle
import random
from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from zest_fast.finetuning.delta import Delta
from zest_fast.finetuning.sharding import is_sharded
from zest_fast.profiling.replacing import replacing

FORMAT = "zest_fast.run"
VERSION = 1


class Stateful(Protocol):
    """An optimizer, a scheduler, a GradScaler, a sampler."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


def write_run(
    path: str | os.PathLike[str], delta: Delta, objects: Mapping[str, Stateful], progress: Any = None
) -> Path:
    """Write tensors, states of the objects and of the random generators, completely or not at all.

    Raises TypeError, naming it, for a state that is not made of tensors, numbers, strings and containers of these;
    ValueError where tensors are sharded over processes.
    """
    sharded = next((name for name, tensor in delta.parameters.items() if is_sharded(tensor)), None)
    if sharded is not None:
        raise ValueError(
            f"{sharded!r} is sharded over processes (FSDP2), and so is the optimizer's state: save the run with "
            "torch.distributed.checkpoint, and what was trained with .save()"
        )
    content = {
        "format": FORMAT,
        "version": VERSION,
        "layers": delta.layers,
        "head": delta.head,
        "base": delta.base,
        "parameters": {name: tensor.detach() for name, tensor in delta.parameters.items()},
        "buffers": {name: tensor.detach() for name, tensor in delta.buffers.items()},
        "states": {name: thing.state_dict() for name, thing in objects.items()},
        "kinds": {name: type(thing).__qualname__ for name, thing in objects.items()},
        "progress": progress,
        "random": random_state(),
    }
    for name in ("states", "progress"):
        _check_plain(name, content[name])
    with replacing(path) as temporary:
        torch.save(content, temporary)
    return Path(path)


def read_run(path: str | os.PathLike[str]) -> tuple[Delta, dict[str, Any]]:
    """What `write_run` wrote: the delta, and the rest. Raises ValueError, naming the file, if torn or foreign."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or content.get("format") != FORMAT or content["version"] != VERSION:
            raise ValueError(f"it is not of the format {FORMAT!r}, version {VERSION}")
        parts = (content.pop(key) for key in ("layers", "head", "base", "parameters", "buffers"))
        return Delta(*parts), content
    except FileNotFoundError:
        raise
    except (RuntimeError, ValueError, KeyError, TypeError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{os.fspath(path)!r} is no run that can be resumed ({type(error).__name__}: {reason}): torn, or written "
            "by something else; name a file that SelectiveBackward.save_run wrote"
        ) from error


def restore(objects: Mapping[str, Stateful], states: Mapping[str, Any], kinds: Mapping[str, str]) -> None:
    """Give each object its state, or all of them the one that they had. Raises ValueError where the two do not fit."""
    if objects.keys() != states.keys():
        raise ValueError(f"it was saved with {sorted(states)}, and {sorted(objects)} are there to resume")
    for name, thing in objects.items():
        if kinds.get(name, type(thing).__qualname__) != type(thing).__qualname__:
            raise ValueError(f"the {name} was a {kinds[name]}, and here is a {type(thing).__qualname__}")
    before = {name: deepcopy(thing.state_dict()) for name, thing in objects.items()}
    for name, thing in objects.items():
        try:
            thing.load_state_dict(states[name])
        except Exception as error:
            for earlier in list(objects)[: list(objects).index(name) + 1]:
                objects[earlier].load_state_dict(before[earlier])
            raise ValueError(f"the state of {name} does not fit ({type(error).__name__}: {error})") from error


def random_state() -> dict[str, Any]:
    """Of torch (CPU and every CUDA device that is in use), NumPy's global generator and Python's."""
    kind, keys, *rest = np.random.get_state()  # type: ignore[misc]
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "python": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """What `random_state` took. Devices beyond those that are there now are left out."""
    torch.set_rng_state(state["torch"])
    for device, own in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(own, device)
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def _check_plain(place: str, value: Any) -> None:
    if isinstance(value, torch.Tensor) or value is None or type(value) in (bool, int, float, complex, str, bytes):
        return
    if isinstance(value, Counter | dict):
        parts = [(f"{place}[{key!r}]", part) for key, part in value.items()]
    elif type(value) in (list, tuple, set):
        parts = [(f"{place}[{index}]", part) for index, part in enumerate(value)]
    else:
        raise TypeError(f"{place} is a {type(value).__name__}, and a run holds only plain data and tensors")
    for name, part in parts:
        _check_plain(name, part)
