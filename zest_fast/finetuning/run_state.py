"""Everything that a training run needs to go on as if it had never stopped, in one file that holds no code.

torch.save's format, read with `weights_only=True`; the frozen weights are not in it. It holds a checksum of its own
contents. Version 1, written before, had none; it is read as it is.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import os
import random
from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from zest_fast.finetuning.delta_files import Delta, hash_in, names_in, reason
from zest_fast.finetuning.digests import add_tensor
from zest_fast.foundation.documents import check_stored
from zest_fast.foundation.replacing import check_regular, replacing
from zest_fast.lean.optimizer import ELEMENTWISE
from zest_fast.profiling.processes.local import is_distributed

FORMAT = "zest_fast.run"
VERSION = 2
_WITHOUT_CHECKSUM = 1


@dataclass(frozen=True)
class Run:
    """What a file holds, every entry of the type that it must have.

    states, kinds: of optimizer, scheduler and others, by name. random: as `random_state` takes it.
    """

    delta: Delta
    states: Mapping[str, Any]
    kinds: Mapping[str, str]
    progress: Any
    random: Mapping[str, Any]


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
    sharded = next((name for name, tensor in delta.parameters.items() if is_distributed(tensor)), None)
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
    content["checksum"] = checksum(content)
    with replacing(path) as temporary:
        torch.save(content, temporary)
    return Path(path)


def read_run(path: str | os.PathLike[str]) -> Run:
    """What `write_run` wrote. Raises ValueError, naming the file, if torn, damaged or foreign."""
    check_regular(path)
    try:
        check_stored(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"it is not of the format {FORMAT!r}")
        version = content["version"]
        if type(version) is not int or version not in (VERSION, _WITHOUT_CHECKSUM):
            raise ValueError(
                f"its version is {version!r:.80}, and this zest_fast reads {_WITHOUT_CHECKSUM} and {VERSION}"
            )
        _check_sizes(content, os.path.getsize(path))
        if (version == _WITHOUT_CHECKSUM) == ("checksum" in content):
            raise ValueError(f"a checksum and format version {version} do not go together")
        if version != _WITHOUT_CHECKSUM and checksum(content) != content["checksum"]:
            raise ValueError("its contents do not have its checksum: bits were lost, or somebody has edited it")
        return _run(content)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # torch.load raises whatever it meets in a file from somebody else
        raise ValueError(
            f"{os.fspath(path)!r} is no run that can be resumed ({reason(error)}): torn, or written "
            "by something else; name a file that SelectiveBackward.save_run wrote"
        ) from error


def checksum(content: Mapping[str, Any]) -> str:
    """Of everything in the file but its checksum, tensors with their bytes."""
    state = hashlib.blake2b(digest_size=32)
    _add_to(state, {key: value for key, value in content.items() if key != "checksum"})
    return state.hexdigest()


def _add_to(state: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        add_tensor(state, value, "tensor|")
    elif isinstance(value, dict):  # Counter and OrderedDict too
        state.update(f"{type(value).__name__}|{len(value)}|".encode())
        for key, part in value.items():
            _add_to(state, key)
            _add_to(state, part)
    elif isinstance(value, list | tuple | set):
        parts = sorted(value, key=repr) if isinstance(value, set) else value
        state.update(f"{type(value).__name__}|{len(value)}|".encode())
        for part in parts:
            _add_to(state, part)
    else:
        state.update(f"{type(value).__name__}|{value!r}|".encode(errors="surrogatepass"))


def _check_sizes(value: Any, most: int) -> None:
    """Raise ValueError for a tensor that is larger than the whole file: reading it would take memory without end."""
    if isinstance(value, torch.Tensor):
        if value.is_meta:
            raise ValueError("a tensor has no contents (it is on the meta device)")
        if value.layout == torch.strided and value.numel() * value.element_size() > most:
            raise ValueError(f"a tensor of shape {list(value.shape)} is larger than the file")
    elif isinstance(value, dict | list | tuple | set):
        for part in (*value.keys(), *value.values()) if isinstance(value, dict) else value:
            _check_sizes(part, most)


def _run(content: Mapping[str, Any]) -> Run:
    """Raises ValueError for an entry of another type than `write_run` writes, KeyError for one that is missing."""
    parameters, buffers, states = (content[key] for key in ("parameters", "buffers", "states"))
    kinds = content.get("kinds", {})  # not there in the first files of version 1
    for key, found, kind in (
        ("parameters", parameters, torch.Tensor),
        ("buffers", buffers, torch.Tensor),
        ("states", states, dict),
        ("kinds", kinds, str),
    ):
        if not isinstance(found, dict) or not all(
            isinstance(name, str) and isinstance(value, kind) for name, value in found.items()
        ):
            raise ValueError(f"{key} is no dictionary from names to values of type {kind.__name__}")
    layers, head = (names_in(key, content[key]) for key in ("layers", "head"))
    delta = Delta(layers, head, hash_in(content["base"]), parameters, buffers)
    return Run(delta, states, kinds, content["progress"], _random(content["random"]))


class Objects:
    """Optimizer, scheduler and others that are to take the states of a run: checked, changed, changed back."""

    def __init__(self, objects: Mapping[str, Stateful], run: Run) -> None:
        """Raises ValueError where the two do not fit; nothing has changed then."""
        if objects.keys() != run.states.keys():
            raise ValueError(f"it was saved with {sorted(run.states)}, and {sorted(objects)} are there to resume")
        for name, thing in objects.items():
            if run.kinds.get(name, type(thing).__qualname__) != type(thing).__qualname__:
                raise ValueError(f"the {name} was a {run.kinds[name]}, and here is a {type(thing).__qualname__}")
        self._objects, self._states = objects, run.states
        self._before = {name: deepcopy(thing.state_dict()) for name, thing in objects.items()}
        for name, thing in objects.items():
            if isinstance(thing, torch.optim.Optimizer):
                _check_optimizer(name, thing, run.states[name])
            else:
                _check_alike(name, run.states[name], self._before[name], thing)
        self._touched: list[str] = []

    def put(self) -> None:
        """Give each its state. Raises ValueError where one refuses it; call `put_back` then."""
        for name, thing in self._objects.items():
            self._touched.append(name)
            try:
                thing.load_state_dict(deepcopy(self._states[name]))
            except Exception as error:
                raise ValueError(f"the state of {name} does not fit ({reason(error)})") from error

    def put_back(self) -> None:
        """Give those that were touched the state that they had."""
        while self._touched:
            name = self._touched.pop()
            self._objects[name].load_state_dict(self._before[name])


def _check_optimizer(name: str, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """torch's own loading takes any value in a group, and moments of any shape, and fails in a later step."""
    wrong = f"the state of {name} does not fit: "
    groups, moments = state.get("param_groups"), state.get("state")
    if not isinstance(groups, list) or not isinstance(moments, dict) or not all(isinstance(g, dict) for g in groups):
        raise ValueError(wrong + "it has no list of param_groups, or no dictionary of states")
    if [_count(group) for group in groups] != [len(group["params"]) for group in optimizer.param_groups]:
        raise ValueError(wrong + "its groups hold other numbers of parameters than those of this optimizer")
    numbers = [number for group in groups for number in group["params"]]
    if len(set(map(repr, numbers))) < len(numbers) or any(type(number) is not int for number in numbers):
        raise ValueError(wrong + "the numbers of its parameters are not all different whole numbers")
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for at, (saved, ours) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        for key, value in ours.items():
            if key in saved and key not in ("params", "param_names"):
                _check_value(f"{wrong}param_groups[{at}][{key!r}]", saved[key], value, finite=True)
            elif key not in saved and key != "initial_lr" and _kind(value) in ("number", "list"):  # flags may be new
                raise ValueError(f"{wrong}param_groups[{at}] lacks {key!r}")
    parameters = dict(zip(numbers, own, strict=True))
    expected: dict[int, set[str]] = {}
    if type(optimizer) in ELEMENTWISE:
        for group in groups:
            expected |= dict.fromkeys(group["params"], _names_of_moments(type(optimizer), group, wrong))
    for number, values in moments.items():
        if number not in parameters or not isinstance(values, dict):
            raise ValueError(f"{wrong}state[{number!r:.40}] belongs to no parameter of this optimizer")
        if missing := sorted(expected.get(number, set()) - values.keys()):
            raise ValueError(f"{wrong}state[{number}] lacks {missing[0]!r}")
        for key, value in values.items():
            place = f"{wrong}state[{number}][{key!r:.40}]"
            if key == "step" and not _is_count(value):
                raise ValueError(f"{place} is {value!r:.80}, and a count of steps is needed")
            if number in expected and isinstance(value, torch.Tensor) and value.dim() > 0:
                _check_moment(place, value, parameters[number])


def _names_of_moments(kind: Any, group: Mapping[str, Any], wrong: str) -> set[str]:
    """What torch's optimizer of this kind keeps of a parameter, by a step with the settings of the group."""
    settings = {key: group[key] for key in inspect.signature(kind).parameters if key in group and key not in _HOW}
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    try:
        optimizer = kind([parameter], **settings)
        optimizer.step()
    except Exception as error:
        raise ValueError(f"{wrong}a group with {settings!r:.200} is refused ({reason(error)})") from error
    return set(optimizer.state[parameter])


_HOW = ("params", "foreach", "fused", "capturable", "differentiable")  # how it computes, and no setting


def _check_moment(place: str, moment: torch.Tensor, parameter: torch.Tensor) -> None:
    is_number = moment.is_floating_point() or moment.is_complex()
    if moment.shape != parameter.shape or moment.layout != torch.strided or not is_number:
        raise ValueError(
            f"{place} has shape {list(moment.shape)}, {moment.dtype}, {moment.layout}; its parameter "
            f"{list(parameter.shape)}, {parameter.dtype}, {parameter.layout}"
        )


def _count(group: Mapping[str, Any]) -> int:
    found = group.get("params")
    return len(found) if isinstance(found, list | tuple) else -1


def _is_count(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        value = value.item() if value.numel() == 1 and not value.is_complex() else None
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0


def _check_alike(name: str, saved: Mapping[str, Any], ours: Any, thing: Any) -> None:
    """Of a scheduler, a GradScaler, a sampler: values of the kinds that are there now, and no method replaced."""
    wrong = f"the state of {name} does not fit: "
    if not isinstance(ours, dict):
        return
    for key, value in saved.items():
        if key in ours:
            _check_value(f"{wrong}{key!r:.40}", value, ours[key])
        elif isinstance(key, str) and callable(getattr(type(thing), key, None)):
            raise ValueError(f"{wrong}{key!r:.40} is a method there")
    # Private ones, and this one, are not in the states of every version of torch.
    if missing := sorted(str(key) for key in ours if key not in saved and not str(key).startswith(("_", "verbose"))):
        raise ValueError(f"{wrong}it lacks {missing[0]!r:.40}")


def _check_value(place: str, saved: Any, ours: Any, *, finite: bool = False) -> None:
    """Raise ValueError where one is a number and the other is none, and so on.

    None may stand for what has not been decided, such as `foreach`, but not for a number or a list.
    """
    found, wanted = _kind(saved), _kind(ours)
    if "other" in (found, wanted) or ours is None or (saved is None and wanted not in ("number", "list")):
        return
    if found != wanted or (finite and found == "number" and not math.isfinite(saved)):
        raise ValueError(f"{place} is {saved!r:.80}, and here it is {ours!r:.80}")
    if wanted == "list" and len(saved) == len(ours):
        for place_in, (one, other) in enumerate(zip(saved, ours, strict=True)):
            _check_value(f"{place}[{place_in}]", one, other, finite=finite)
    elif wanted == "dictionary":
        for key in ours.keys() & saved.keys():
            _check_value(f"{place}[{key!r:.40}]", saved[key], ours[key], finite=finite)


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "flag"
    if isinstance(value, int | float) or (isinstance(value, torch.Tensor) and value.numel() == 1):
        return "number"
    for kind, classes in (("text", str), ("list", (list, tuple)), ("dictionary", dict), ("tensor", torch.Tensor)):
        if isinstance(value, classes):
            return kind
    return "other"


def random_state() -> dict[str, Any]:
    """Of torch (CPU and every CUDA device that is in use), NumPy's global generator and Python's."""
    kind, keys, *rest = np.random.get_state()
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
    np.random.set_state(_of_numpy(state["numpy"]))
    random.setstate(_of_python(state["python"]))


def _random(state: Any) -> Mapping[str, Any]:
    """Raises ValueError unless generators would take it: these are not the global ones."""
    try:
        torch.Generator().set_state(state["torch"])
        cuda = state["cuda"]
        if not isinstance(cuda, list) or not all(
            isinstance(own, torch.Tensor) and own.dtype == torch.uint8 and own.shape in ((8,), (16,)) for own in cuda
        ):
            raise ValueError("cuda is no list of states, 16 bytes each")
        np.random.RandomState().set_state(_of_numpy(state["numpy"]))
        random.Random().setstate(_of_python(state["python"]))
    except Exception as error:
        raise ValueError(f"random holds no state of the random generators ({reason(error)})") from error
    return state


def _of_numpy(state: Any) -> tuple[Any, ...]:
    kind, keys, place, has_normal, normal = state
    words = keys.numpy()
    if kind != "MT19937" or words.shape != (624,) or words.min() < 0 or words.max() >= 2**32:
        raise ValueError("numpy is no state of MT19937")
    if type(place) is not int or not 0 <= place <= 624 or has_normal not in (0, 1) or not math.isfinite(normal):
        raise ValueError("numpy is no state of MT19937")  # which would be read beyond its end
    return kind, words.astype(np.uint32), place, int(has_normal), float(normal)


def _of_python(state: Any) -> tuple[Any, ...]:
    version, internal, normal = state
    if version != 3 or len(internal) != 625 or not all(type(word) is int and 0 <= word < 2**32 for word in internal):
        raise ValueError("python is no state of random.Random")
    if not internal[-1] <= 624 or not (normal is None or (type(normal) is float and math.isfinite(normal))):
        raise ValueError("python is no state of random.Random")
    return version, tuple(internal), normal


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
