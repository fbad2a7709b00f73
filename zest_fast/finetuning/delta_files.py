"""What fine-tuning changed, as one safetensors file that fits only the model it was made from.

The tensors are the trained parameters (whole, not differences: loading is exact to the bit) and the buffers that
changed, under their names in the model. The metadata tells which layers trained, how they were chosen and trained where
the user says so, what the outputs are called and how data became batches, the dtypes of the model, and holds a hash of
everything frozen and a checksum of the file's own contents. Version 3, written before, said nothing of classes and
data, version 2 had no checksum either; both are read as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from zest_fast.finetuning.digests import digests
from zest_fast.finetuning.sharding import is_written_here, whole
from zest_fast.foundation.documents import shown
from zest_fast.foundation.nearest import some
from zest_fast.foundation.replacing import check_regular, replacing
from zest_fast.foundation.version import __version__
from zest_fast.ranking.ranking import Ranking

FORMAT = "zest_fast.delta"
VERSION = 4
_WITHOUT_CLASSES = 3
_WITHOUT_CHECKSUM = 2


@dataclass(frozen=True, repr=False)
class Delta:
    """layers, head: what trained. base: hash of the frozen parameters, and of the buffers as they were found.

    dtypes: of the parameters of the whole model. ranking, recipe: how the layers were chosen and trained, as plain
    JSON; None where nobody said. class_names: in the order of the outputs, () where nobody said. data: how data became
    batches (task, columns, lengths), as plain JSON.
    """

    layers: tuple[str, ...]
    head: tuple[str, ...]
    base: str
    parameters: Mapping[str, torch.Tensor]
    buffers: Mapping[str, torch.Tensor]
    dtypes: tuple[str, ...] = ()
    ranking: Any = None
    recipe: Any = None
    class_names: tuple[str, ...] = ()
    data: Any = None

    def __repr__(self) -> str:
        """Three lines: what it holds, which layers, and how they were chosen and trained."""
        tensors = (*self.parameters.values(), *self.buffers.values())
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        what = f"Delta: {len(self.parameters)} parameters and {len(self.buffers)} buffers, {size / 2**20:,.1f} MiB, "
        layers = f"layers {some(self.layers)}" if self.layers else "no layer"
        head = f"head {some(self.head)}" if self.head else "no head"
        by = self.ranking.get("by") if isinstance(self.ranking, Mapping) else None
        chosen = "no ranking" if self.ranking is None else f"ranked by {shown(by)}" if by else "with its ranking"
        keys = some(map(str, self.recipe)) if isinstance(self.recipe, Mapping) else ""
        recipe = f"recipe says {keys}" if keys else "no recipe"
        classes = f", {len(self.class_names)} classes" if self.class_names else ""
        return f"{what}base {self.base[:12]}\n  {layers}; {head}\n  {chosen}, {recipe}{classes}"


def write_delta(path: str | os.PathLike[str], delta: Delta) -> Path:
    """Write `delta` completely or not at all. Raises TypeError for a ranking, recipe or data that are no JSON.

    Sharded tensors are gathered by all processes and written by the first.
    """
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "layers": json.dumps(delta.layers),
        "head": json.dumps(delta.head),
        "base": delta.base,
        "buffers": json.dumps(list(delta.buffers)),
        "dtypes": json.dumps(delta.dtypes),
        "ranking": _as_json("ranking", delta.ranking),
        "recipe": _as_json("recipe", delta.recipe),
        "class_names": json.dumps(delta.class_names),
        "data": _as_json("data", delta.data),
        "torch": torch.__version__,
        "zest_fast": __version__,
    }
    # Copies, because safetensors refuses tensors that share memory, as the weights of a flattened LSTM do.
    tensors = {
        name: whole(tensor).to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in (*delta.parameters.items(), *delta.buffers.items())
    }
    if is_written_here(delta.parameters.values()):
        metadata["checksum"] = checksum(metadata, tensors)
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata)
    return Path(path)


def read_delta(path: str | os.PathLike[str]) -> Delta:
    """Read what `write_delta` wrote. Raises ValueError, naming the file, if torn, damaged or of another format.

    The checksum takes a second for each GB and core.
    """
    check_regular(path)
    which = _identity(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
            version = int(metadata["version"])
            if version in (VERSION, _WITHOUT_CLASSES, _WITHOUT_CHECKSUM):
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                _check_sum(version, metadata, tensors)
                return _delta(version, metadata, tensors)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # decoders of a file from somebody else raise whatever they meet
        if _identity(path) != which:  # replaced meanwhile: safetensors opens it for the header, and for each tensor
            return read_delta(path)
        raise ValueError(
            f"{os.fspath(path)!r} is no delta that can be read ({reason(error)}): torn, or written by "
            "something else; save it again, or name a file that SelectiveBackward.save wrote"
        ) from error
    raise ValueError(
        f"{os.fspath(path)!r} has format version {version}, this zest_fast reads versions {_WITHOUT_CHECKSUM} to "
        f"{VERSION}: " + ("upgrade zest_fast" if version > VERSION else "save it again")
    )


def _identity(path: str | os.PathLike[str]) -> tuple[int, int, int]:
    found = os.stat(path)
    return found.st_ino, found.st_mtime_ns, found.st_size


def reason(error: BaseException) -> str:
    """What went wrong, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def checksum(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str:
    """Of names, dtypes, shapes and bytes of all tensors, and of the metadata but for a checksum in it."""
    state = hashlib.blake2b(digest_size=32)
    for name, digest in sorted(digests(tensors).items()):
        state.update(json.dumps([name, digest]).encode())
    state.update(json.dumps({**metadata, "checksum": None}, sort_keys=True).encode())
    return state.hexdigest()


def _check_sum(version: int, metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> None:
    if (version == _WITHOUT_CHECKSUM) == ("checksum" in metadata):
        raise ValueError(f"a checksum and format version {version} do not go together")
    if version != _WITHOUT_CHECKSUM and checksum(metadata, tensors) != metadata["checksum"]:
        raise ValueError("its contents do not have its checksum: bits were lost, or somebody has edited it")


def _delta(version: int, metadata: Mapping[str, str], tensors: dict[str, torch.Tensor]) -> Delta:
    """Raises ValueError for an entry of another type than `write_delta` writes."""
    layers, head, dtypes, buffers = (
        names_in(key, json.loads(metadata[key])) for key in ("layers", "head", "dtypes", "buffers")
    )
    if unknown := sorted(set(buffers) - set(tensors)):
        raise ValueError(f"it names a buffer {unknown[0]!r} and has no tensor of this name")
    ranking, recipe = (json.loads(metadata[key]) for key in ("ranking", "recipe"))
    class_names: tuple[str, ...] = ()
    data: Any = None
    if version > _WITHOUT_CLASSES:
        class_names = names_in("class_names", json.loads(metadata["class_names"]))
        data = json.loads(metadata["data"])
    changed = {name: tensors.pop(name) for name in buffers}
    base = hash_in(metadata["base"])
    return Delta(layers, head, base, tensors, changed, dtypes, ranking, recipe, class_names, data)


def names_in(key: str, value: Any) -> tuple[str, ...]:
    """The entry of a file that has to be a list of different names."""
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{key} is {value!r:.80}, and a list of names is needed")
    if len(set(value)) < len(value):
        raise ValueError(f"{key} has a name twice")
    return tuple(value)


def hash_in(value: Any) -> str:
    """The entry of a file that has to be the hash of a base."""
    if not isinstance(value, str) or len(value) != 64 or not set(value) <= set("0123456789abcdef"):
        raise ValueError(f"base is {value!r:.80}, and a hash of 64 hexadecimal digits is needed")
    return value


def check_tensors(kind: str, saved: Mapping[str, torch.Tensor], there: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError unless every saved tensor has its place: same name, shape, dtype and layout, and contents.

    A parameter that is not finite is none that was saved (see SelectiveBackward.save).
    """
    for name, tensor in saved.items():
        if name not in there:
            raise ValueError(f"the delta has a {kind} {name!r}, the model has none")
        for what in ("shape", "dtype", "layout"):
            ours, theirs = getattr(there[name], what), getattr(tensor, what)
            if ours != theirs:
                ours, theirs = (list(x) if what == "shape" else x for x in (ours, theirs))
                raise ValueError(f"{kind} {name!r} has {what} {theirs} in the delta and {ours} in the model")
        if tensor.is_meta:
            raise ValueError(f"{kind} {name!r} has no contents in the delta (it is on the meta device)")
        if kind == "parameter" and not torch.isfinite(tensor).all():
            raise ValueError(f"{kind} {name!r} is not finite in the delta")


def _as_json(argument: str, value: Any) -> str:
    if isinstance(value, Ranking):
        value = value.plain()
    elif is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{argument} must be plain data that JSON can hold, a dataclass of such or (as ranking) a Ranking: {error}"
        ) from error
