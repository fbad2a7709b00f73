"""Deltas on a model that is not being trained: put one in for good, write the merged model, switch between several."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import save_file, save_model
from torch import nn

from zest_fast.finetuning.delta_files import Delta, check_tensors, read_delta
from zest_fast.finetuning.digests import Base, digest, hash_of, saved_buffers
from zest_fast.finetuning.quantised_weights import QuantisedLinear
from zest_fast.foundation.interrupts import HeldInterrupts
from zest_fast.foundation.replacing import new_folder, replacing


def apply_delta(model: nn.Module, path: str | os.PathLike[str], *, cast: bool = False) -> Delta:
    """Put the delta of this file into its base model, in place and exact to the bit.

    Checking that the model is the base takes a second for each GB and core.

    Args:
        model: the base that the delta was made on, in the same dtype.
        path: what `SelectiveBackward.save` wrote.
        cast: the model may have another dtype, such as bfloat16 where the base was loaded in float32 and tuned: what
            was trained is rounded to nearest, ties to even, and a warning says how many entries lost by it. The base is
            checked by its weights in the dtype of the delta.

    Returns:
        What the file says: layers, head, ranking, recipe and the tensors.

    Raises:
        ValueError: the file is torn or foreign, or the model is not the one that the delta was made on (which it is no
            longer once another delta is in it: use DeltaSwitch), has another dtype without `cast`, or one that cannot
            hold a value. The model is then untouched.

    Examples:
        >>> import copy, torch, zest_fast
        >>> from torch import nn
        >>> base = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> tuned = copy.deepcopy(base)
        >>> with zest_fast.SelectiveBackward(tuned, ["0"]) as selective:
        ...     _ = nn.init.ones_(tuned[0].weight)
        ...     _ = selective.save("delta.safetensors")
        >>> zest_fast.apply_delta(base, "delta.safetensors").layers
        ('0',)
        >>> torch.equal(base[0].weight, tuned[0].weight)
        True
    """
    delta, rounded = put_in(model, path, cast=cast)
    if rounded is not None and rounded.lost:
        warnings.warn(str(rounded), stacklevel=2)
    return delta


def put_in(model: nn.Module, path: str | os.PathLike[str], *, cast: bool = False) -> tuple[Delta, Rounded | None]:
    """As apply_delta, without the warning: what was rounded is returned."""
    delta, rounded = fitted(path, read_delta(path), model, Base(model), cast=cast)
    _put(model, {**delta.parameters, **delta.buffers})
    return delta, rounded


def merge_delta(
    model: nn.Module,
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    cast: bool = False,
    max_shard_size: str | None = None,
) -> Path:
    """Write the whole state of `model` with the delta in it, as safetensors; the model stays as it is.

    `safetensors.torch.load_model(model, out)` reads a file, `from_pretrained(out)` the folder of a model of
    transformers; both also where the weights of this one are kept in int8 or nf4: they are written as they are rounded.
    `zest-fast merge` makes a folder of a folder, with its tokenizer, and mostly without loading the model.

    Args:
        model: the base, as for `apply_delta`.
        path: the delta.
        out: a file to write, an existing one is replaced at once or kept; or, where the name has no ending or ends in
            "/", a new folder: what the model's own `save_pretrained` writes, with the class names of the delta in its
            configuration, else model.safetensors.
        cast: as for `apply_delta`.
        max_shard_size: of the files of a folder, as `save_pretrained` takes it ("5GB"); None = its default.

    Returns:
        The path of `out`.

    Raises:
        ValueError: as `apply_delta` does, or shards are asked for where `save_pretrained` does not write; nothing is
            written then.
        FileExistsError: `out` is a folder that is there already.

    Examples:
        >>> import copy, zest_fast
        >>> from safetensors.torch import load_model
        >>> from torch import nn
        >>> base = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> tuned = copy.deepcopy(base)
        >>> with zest_fast.SelectiveBackward(tuned, ["0"]) as selective:
        ...     _ = nn.init.ones_(tuned[0].weight)
        ...     _ = selective.save("delta.safetensors")
        >>> merged = zest_fast.merge_delta(base, "delta.safetensors", "merged.safetensors")
        >>> load_model(base, merged)
        (set(), [])
        >>> base[0].weight.sum().item()
        32.0
    """
    in_folder = _names_a_folder(out)
    if max_shard_size is not None and not (in_folder and hasattr(model, "save_pretrained")):
        raise ValueError(
            f"max_shard_size={max_shard_size!r} is for folders that a model's own save_pretrained writes; leave it out"
        )
    into = new_folder(out) if in_folder else replacing(out)
    with into as place, DeltaSwitch(model) as switch:
        delta = read_delta(path)
        rounded = switch._use(path, delta, cast=cast)
        if rounded is not None and rounded.lost:
            warnings.warn(str(rounded), stacklevel=2)
        if not place.is_dir():
            _save_file(model, place)
        elif hasattr(model, "save_pretrained"):
            packed = _packed(model)
            save: Any = model.save_pretrained
            shards = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
            save(place, **shards, **({"state_dict": _unpacked(model, packed)} if packed else {}))
            name_classes(place, delta.class_names)
        else:
            _save_file(model, place / "model.safetensors")
    return Path(out)


def name_classes(folder: Path, class_names: Sequence[str]) -> None:
    """Let the configuration in a folder call its outputs so, where there are as many; without names nothing changes."""
    file = folder / "config.json"
    if not class_names or not file.exists():
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    if len(config.get("id2label") or (0, 1)) != len(class_names):  # transformers leaves out its default of two
        return
    config["id2label"] = {str(output): name for output, name in enumerate(class_names)}
    config["label2id"] = {name: output for output, name in enumerate(class_names)}
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _names_a_folder(out: str | os.PathLike[str]) -> bool:
    path, written = Path(out), os.fspath(out)
    return path.is_dir() or written.endswith(("/", os.sep)) or (not path.suffix and not os.path.lexists(path))


def _save_file(model: nn.Module, file: Path) -> None:
    packed = _packed(model)
    if packed:
        save_file(_unpacked(model, packed), str(file), {"format": "pt"})
    else:
        save_model(model, str(file), {"format": "pt"})


def _packed(model: nn.Module) -> dict[str, QuantisedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantisedLinear)}


def _unpacked(model: nn.Module, packed: Mapping[str, QuantisedLinear]) -> dict[str, torch.Tensor]:
    """The state with plain weights in the place of packed ones; of tensors that share memory, the first."""
    state = model.state_dict()
    for name, module in packed.items():
        del state[f"{name}.packed"], state[f"{name}.scale"]
        state[f"{name}.weight"] = module.weight
    found: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in state.items():  # an address of 0 (empty tensors, wrappers without memory) is shared by nobody
        found.setdefault((tensor.data_ptr() or id(tensor), tensor.shape), name)
    return {name: state[name].contiguous() for name in found.values()}


class DeltaSwitch:
    """One base model, several deltas: `use` one after another, `use(None)` or the end of a `with` block = the base.

    The base is hashed once, when this is built (a second for each GB and core). What a delta replaces is kept beside
    it, so the way back is exact to the bit.

    Args:
        model: the base of the deltas.

    Attributes:
        current: the file of the delta that is in the model; None = the base.

    Raises:
        ValueError: of `use`, as `apply_delta`; the model is then as it was.

    Examples:
        >>> import copy, zest_fast
        >>> from torch import nn
        >>> base = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> before, tuned = base[0].weight.sum().item(), copy.deepcopy(base)
        >>> with zest_fast.SelectiveBackward(tuned, ["0"]) as selective:
        ...     _ = nn.init.ones_(tuned[0].weight)
        ...     _ = selective.save("delta.safetensors")
        >>> with zest_fast.DeltaSwitch(base) as switch:
        ...     _ = switch.use("delta.safetensors")
        ...     base[0].weight.sum().item()
        32.0
        >>> base[0].weight.sum().item() == before
        True
    """

    def __init__(self, model: nn.Module) -> None:
        self.current: Path | None = None
        self._model = model
        self._base = Base(model)
        self._replaced: dict[str, torch.Tensor] = {}

    def use(self, path: str | os.PathLike[str] | None) -> DeltaSwitch:
        """Let the model be its base with this delta.

        Args:
            path: of the delta; None = the base alone.

        Returns:
            Itself.

        Raises:
            ValueError: as `apply_delta` does; nothing changes then.
        """
        self._use(path, None if path is None else read_delta(path))
        return self

    def _use(self, path: str | os.PathLike[str] | None, delta: Delta | None, *, cast: bool = False) -> Rounded | None:
        rounded = None
        fresh: dict[str, torch.Tensor] = {}
        if path is not None and delta is not None:
            delta, rounded = fitted(path, delta, self._model, self._base, cast=cast)
            fresh = {**delta.parameters, **delta.buffers}
        there = _tensors(self._model)
        kept = {
            name: self._replaced[name] if name in self._replaced else there[name].detach().clone() for name in fresh
        }
        _put(self._model, {**self._replaced, **fresh})
        self._replaced = kept
        self.current = None if path is None else Path(path)
        return rounded

    def __enter__(self) -> DeltaSwitch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.use(None)


@dataclass(frozen=True)
class Rounded:
    """What another dtype made of a delta: lost of entries are not what they were. kinds: "float32 to bfloat16"."""

    lost: int
    entries: int
    kinds: tuple[str, ...]

    def __str__(self) -> str:
        share = f"{self.lost / self.entries:.1%}" if self.entries else "none"
        what = f"{self.lost:,} of {self.entries:,} trained entries ({share})"
        return f"{what} lost bits when they were rounded, {' and '.join(self.kinds)}"


def fitted(
    path: str | os.PathLike[str], delta: Delta, model: nn.Module, base: Base, *, cast: bool = False
) -> tuple[Delta, Rounded | None]:
    """The delta as it goes into this model, and what was rounded for that.

    base: of the model. Raises ValueError, naming the file, where it does not fit.
    """
    try:
        there = _tensors(model)
        dtypes = {name: tensor.dtype for name, tensor in there.items()}
        rounded, found = None, base.digests
        if needs_cast(delta, dtypes, cast=cast):
            delta, rounded = cast_delta(delta, dtypes)
            found = {name: digest(in_dtype_of(delta, tensor)) for name, tensor in there.items()}
        check_tensors("parameter", delta.parameters, dict(model.named_parameters()))
        check_tensors("buffer", delta.buffers, saved_buffers(model))
        if hash_of(found, without=delta.parameters) != delta.base:
            raise ValueError(
                "the other parameters or buffers of this model differ from those it was trained on: "
                "load the same base weights in the same dtype first"
            )
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r} does not fit: {error}") from error
    return delta, rounded


def needs_cast(delta: Delta, dtypes: Mapping[str, torch.dtype], *, cast: bool) -> bool:
    """Whether what was trained has another floating dtype than the tensors of these names.

    Raises ValueError where it has and `cast` is False, and where no single dtype of the delta could vouch for the base.
    """
    other = {
        (str(tensor.dtype).removeprefix("torch."), str(dtypes[name]).removeprefix("torch."))
        for name, tensor in {**delta.parameters, **delta.buffers}.items()
        if name in dtypes
        and tensor.dtype != dtypes[name]
        and tensor.is_floating_point()
        and dtypes[name].is_floating_point
    }
    if not other:
        return False
    ours, theirs = min(other)
    if not cast:
        raise ValueError(f"it was trained in {ours}, and the base has {theirs}: cast=True rounds what was trained")
    known = [getattr(torch, name, None) for name in delta.dtypes]
    if len(known) != 1 or not isinstance(known[0], torch.dtype):
        raise ValueError(
            f"with cast=True the base is checked in the one dtype that it had, and it was "
            f"{' and '.join(delta.dtypes) or 'not written down'}: apply it to the base as it was loaded for training"
        )
    return True


def cast_delta(delta: Delta, dtypes: Mapping[str, torch.dtype]) -> tuple[Delta, Rounded]:
    """The delta in the floating dtypes of its base, by name, rounded to nearest, ties to even.

    Raises ValueError for a value that becomes infinite.
    """
    lost, entries, kinds = 0, 0, set()

    def small(name: str, tensor: torch.Tensor) -> torch.Tensor:
        nonlocal lost, entries
        dtype = dtypes.get(name, tensor.dtype)
        if dtype == tensor.dtype or not (tensor.is_floating_point() and dtype.is_floating_point):
            return tensor
        found = tensor.to(dtype)
        if (torch.isfinite(tensor) & ~torch.isfinite(found)).any():
            raise ValueError(f"{name!r} has values beyond the range of {str(dtype).removeprefix('torch.')}")
        lost += int((found.to(tensor.dtype) != tensor).sum())
        entries += tensor.numel()
        kinds.add(f"{tensor.dtype} to {dtype}".replace("torch.", ""))
        return found

    cast = replace(
        delta,
        parameters={name: small(name, tensor) for name, tensor in delta.parameters.items()},
        buffers={name: small(name, tensor) for name, tensor in delta.buffers.items()},
    )
    return cast, Rounded(lost, entries, tuple(sorted(kinds)))


def in_dtype_of(delta: Delta, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the base as the delta knew it."""
    return tensor.detach().to(getattr(torch, delta.dtypes[0])) if tensor.is_floating_point() else tensor


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **saved_buffers(model)}


@torch.no_grad()
def _put(model: nn.Module, values: dict[str, torch.Tensor]) -> None:
    there = _tensors(model)
    with HeldInterrupts():
        for name, value in values.items():
            there[name].copy_(value)
