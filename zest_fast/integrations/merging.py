"""A folder of a model and a delta: a folder that from_pretrained and inference servers load.

Where the tensors of the files are those of the model, by name, shape and dtype, the files are copied and what was
trained is written over the bytes that it replaces: no model is loaded, and of its weights one at a time is read, to
check that they are the base. Everything else (a head that the files do not hold, pickles, hub ids, a base that was
quantised) takes the model in memory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zest_fast.finetuning.delta_files import Delta, check_tensors, read_delta
from zest_fast.finetuning.delta_use import (
    Rounded,
    cast_delta,
    in_dtype_of,
    merge_delta,
    name_classes,
    needs_cast,
    put_in,
)
from zest_fast.finetuning.digests import digest, hash_of, saved_buffers
from zest_fast.finetuning.quantised_formats import FORMATS
from zest_fast.finetuning.selective_backward import SelectiveBackward
from zest_fast.foundation.documents import check_links, parse_json, whole_file
from zest_fast.foundation.interrupts import HeldInterrupts
from zest_fast.foundation.replacing import new_folder, replacing
from zest_fast.integrations.pretrained import TASKS, LoadedModel, find_task, load_model
from zest_fast.integrations.quiet import quiet_transformers
from zest_fast.integrations.references import is_reference
from zest_fast.streaming.checkpoints import Checkpoint, plain_checkpoint, read_packed
from zest_fast.streaming.empty_models import empty_model

# Weights of another kind beside the safetensors, and what a trainer leaves: neither belongs to the merged model.
_LEFT_OUT = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ckpt", ".gguf", ".pkl", ".ot")
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class DataSettings:
    """How `zest-fast finetune` read model and data, as it writes that into a delta.

    text_column, label_column: names, separated by commas; None = the usual ones. chat_template: one that was given
    instead of the tokenizer's own. split, config: the parts of a set of `datasets`, and which of its configurations.
    new_head: the head was drawn for the classes of the data. frozen: what the frozen weights were kept in. digest: of
    the data, validation_share of which was held out by seed.
    """

    task: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    chat_template: str | None = None
    split: str | None = None
    config: str | None = None
    max_length: int | None = None
    image_size: int | None = None
    batch_size: int = 16
    seed: int = 0
    validation_share: float = 0.0
    digest: str | None = None
    new_head: bool = False
    frozen: str | None = None


_KINDS: dict[str, tuple[type, ...]] = {
    "task": (str, type(None)),
    "text_column": (str, type(None)),
    "label_column": (str, type(None)),
    "chat_template": (str, type(None)),
    "split": (str, type(None)),
    "config": (str, type(None)),
    "max_length": (int, type(None)),
    "image_size": (int, type(None)),
    "batch_size": (int,),
    "seed": (int,),
    "validation_share": (float, int),
    "digest": (str, type(None)),
    "new_head": (bool,),
    "frozen": (str, type(None)),
}


def settings_of(delta: Delta) -> DataSettings:
    """What a delta says of its data; the defaults where it was saved from a loop of the user's own.

    Raises ValueError for a value of another type than is written there.
    """
    said = delta.data if isinstance(delta.data, dict) else {}
    known = {key: value for key, value in said.items() if key in _KINDS}
    for key, value in known.items():
        if not isinstance(value, _KINDS[key]) or (isinstance(value, bool) and key != "new_head"):
            raise ValueError(f"the delta's data[{key!r}] is {value!r:.80}; zest-fast finetune writes no such thing")
    found = DataSettings(**known)
    for key, allowed in (("task", TASKS), ("frozen", tuple(FORMATS))):
        if getattr(found, key) not in (None, *allowed):
            raise ValueError(f"the delta's data[{key!r}] is {getattr(found, key)!r:.80}; it may be one of {allowed}")
    if not -(2**63) <= found.seed < 2**63 or not 0 <= found.validation_share < 1:
        raise ValueError("the delta's data hold a seed or a validation share that no run can have had")
    if min(found.batch_size, found.max_length or 1, found.image_size or 1) < 1:
        raise ValueError("the delta's data hold a size below 1")
    return found


def load_base(source: str, delta: Delta, *, own_dtype: bool = False, trust_remote_code: bool = False) -> LoadedModel:
    """The model that a delta was made on, as `zest-fast finetune` opened it; the delta is not in it yet.

    A head that was new then is drawn again, in the sizes of the delta's class names. own_dtype: the weights as they are
    in the files, not as they were while it trained. A delta never says that code is to be trusted: the caller does.
    Raises what load_model raises.
    """
    said = settings_of(delta)
    dtype = getattr(torch, delta.dtypes[0], None) if len(delta.dtypes) == 1 else None
    if own_dtype or not isinstance(dtype, torch.dtype):
        dtype = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(said.seed)
        names = (delta.class_names or None) if said.new_head else None
        return load_model(source, task=said.task, class_names=names, dtype=dtype, trust_remote_code=trust_remote_code)


def put_delta(model: nn.Module, path: str | os.PathLike[str], delta: Delta, *, cast: bool = False) -> Rounded | None:
    """Put a delta into its base, whose frozen weights are rounded as they were where it was trained quantised.

    Raises ValueError where it does not fit; a model that was rounded stays rounded then.
    """
    frozen: Any = settings_of(delta).frozen
    if frozen is None:
        return put_in(model, path, cast=cast)[1]
    with SelectiveBackward(model, delta.layers, head=list(delta.head) or None, frozen=frozen) as tuned:
        tuned.load(path)
    return None


def merge_folder(
    source: str,
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    cast: bool = False,
    max_shard_size: str | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Write the model of `source` with a delta in it; returns how, in a line.

    source: a folder, a hub id, or `module:function`, of which `out` may be a .safetensors file. out: a new folder.
    cast: the weights keep the dtype that they have in the files, and what was trained is rounded to it; else they are
    written as they were while it trained. max_shard_size: of the files; None = shards stay as they are, or as
    save_pretrained makes them. trust_remote_code: as for load_model; the model is then loaded.
    Raises ValueError where the delta is torn, foreign or does not fit, and where a file beside the weights is a link
    that leads out of the folder, OSError where `out` cannot be written; nothing is left then.
    """
    delta = read_delta(path)
    _check_cast(delta, cast)
    if is_reference(source):
        merge_delta(load_base(source, delta).model, path, out, cast=cast, max_shard_size=max_shard_size)
        return "the model was built and merged in memory"
    if not trust_remote_code:
        find_task(source)  # says what code of its own a model asks to run
    plain = max_shard_size is None and not trust_remote_code and _is_plain_folder(source)
    patch = _patch(Path(source), path, delta, cast=cast) if plain else None
    if patch is not None:
        with new_folder(out) as folder:
            patch.write(folder)
            name_classes(folder, delta.class_names)
        how = f"{len(patch.files)} of {len(patch.all_files)} weights files changed; no model was loaded"
        return _with_note(how, patch.rounded)
    loaded = load_base(source, delta, own_dtype=cast, trust_remote_code=trust_remote_code)
    rounded = put_delta(loaded.model, path, delta, cast=cast)
    if (template := settings_of(delta).chat_template) is not None and loaded.processor is not None:
        loaded.processor.chat_template = template
    save_model_folder(loaded, out, delta.class_names, max_shard_size=max_shard_size)
    frozen = settings_of(delta).frozen
    how = f"; frozen weights are rounded to {frozen}, as they were while it trained" if frozen else ""
    return _with_note(f"the model was loaded and merged in memory{how}", rounded)


def _with_note(how: str, rounded: Rounded | None) -> str:
    return how if rounded is None else f"{how}; {rounded}"


def _check_cast(delta: Delta, cast: bool) -> None:
    frozen = settings_of(delta).frozen
    if cast and frozen is not None:
        raise ValueError(
            f"cast=True: the delta was trained on a base whose frozen weights were rounded to {frozen}, and they come "
            "out in the dtype of the training; merge it without"
        )


def apply_to_folder(
    source: str, path: str | os.PathLike[str], *, check: bool = False, cast: bool = False
) -> tuple[list[Path], Rounded | None]:
    """Put a delta into the files of a folder, in place; returns the files that are (check: would be) written anew, and
    what was rounded (cast: to the dtype of the files).

    Each is made whole beside the old one before the first takes its place. Raises ValueError where the delta does not
    fit or the files cannot be changed so: then nothing is changed.
    """
    delta = read_delta(path)
    folder = Path(source)
    if not folder.is_dir():
        raise ValueError(f"{source!r} is no folder, whose files could be changed: merge it into a new folder instead")
    _check_cast(delta, cast)
    patch = _patch(folder, path, delta, cast=cast) if _is_plain_folder(source) else None
    if patch is None:
        raise ValueError(
            f"{source!r} cannot be changed in place: its safetensors do not hold what the delta replaces, by name, "
            "shape and dtype (where the dtype alone differs, cast=True rounds); merge it into a new folder instead"
        )
    changed = [*patch.files, folder / "config.json"]
    if linked := [file for file in changed if file.is_symlink() or file.stat().st_nlink > 1]:
        raise ValueError(
            f"{str(linked[0])!r} is a link to a file that others use (such as the cache of the hub): merge it into a "
            "new folder instead"
        )
    if not check:
        patch.in_place()
        name_classes(folder, delta.class_names)
    return patch.files, patch.rounded


def save_model_folder(
    loaded: LoadedModel,
    out: str | os.PathLike[str],
    class_names: tuple[str, ...] = (),
    *,
    max_shard_size: str | None = None,
) -> None:
    """A new folder with the model, its tokenizer or image processor, and the names of its classes.

    max_shard_size: as save_pretrained takes it; None = its default.
    Raises ValueError for a model that has no save_pretrained, OSError where it cannot be written.
    """
    model: Any = loaded.model
    if not hasattr(model, "save_pretrained"):
        raise ValueError(
            f"{loaded.source!r} is a {type(model).__name__} without save_pretrained, of which no folder can be made: "
            "leave the folder out, and put the delta into it with zest_fast.apply_delta"
        )
    with new_folder(out) as folder, quiet_transformers():
        model.save_pretrained(folder, **({} if max_shard_size is None else {"max_shard_size": max_shard_size}))
        if loaded.processor is not None:
            loaded.processor.save_pretrained(folder)
        name_classes(folder, class_names)


def _is_plain_folder(source: str) -> bool:
    folder = Path(source)
    if not folder.is_dir() or not sys.platform.startswith("linux"):
        return False
    if read_packed(folder) is not None:
        raise ValueError(f"{source!r} holds packed weights: name the folder that was packed")
    return any((folder / name).exists() for name in ("model.safetensors", _INDEX))


@dataclass(frozen=True)
class _Patch:
    """What to write where: bytes of tensors by file, offset first. rounded: for the dtype of the files."""

    folder: Path
    pieces: dict[str, list[tuple[int, torch.Tensor]]]
    all_files: tuple[str, ...]
    rounded: Rounded | None

    @property
    def files(self) -> list[Path]:
        return [self.folder / name for name in self.pieces]

    def write(self, out: Path) -> None:
        """The whole folder, with the pieces in it. Raises ValueError where one of its files leads out of it."""
        beside = [file for file in sorted(self.folder.iterdir()) if file.is_file() and _belongs(file.name)]
        templates = self.folder / "additional_chat_templates"
        check_links(self.folder, (*beside, templates, *templates.rglob("*")), "copied")
        for file in beside:
            shutil.copyfile(file, out / file.name)
        if templates.is_dir():
            shutil.copytree(templates, out / templates.name)
        for name in self.all_files:
            shutil.copyfile(self.folder / name, out / name)
            self._put(name, out / name)

    def in_place(self) -> None:
        with HeldInterrupts(), contextlib.ExitStack() as stack:
            for name in self.pieces:
                temporary = stack.enter_context(replacing(self.folder / name))
                shutil.copyfile(self.folder / name, temporary)
                self._put(name, temporary)

    def _put(self, name: str, file: Path) -> None:
        with open(file, "rb+") as stream:
            for offset, tensor in self.pieces.get(name, ()):
                stream.seek(offset)
                stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _patch(folder: Path, path: str | os.PathLike[str], delta: Delta, *, cast: bool) -> _Patch | None:
    """None where the files do not hold the tensors of the model as the delta has them (cast: but for their dtype).

    Raises ValueError where they do, and are not the base.
    """
    checkpoint = plain_checkpoint(folder)
    said = settings_of(delta)
    if said.new_head or said.frozen is not None or not _one_dtype(folder, checkpoint, delta, cast):
        return None
    if said.task in ("regression", "multi-label") and find_task(str(folder)) != said.task:
        return None  # its configuration has to say so
    if said.chat_template is not None:
        return None  # its tokenizer has to have it
    model = empty_model(folder)
    names = _aliases(model)
    buffers = saved_buffers(model)
    here = {name: [alias for alias in aliases if alias in checkpoint] for name, aliases in names.items()}
    for name, tensor in {**dict(model.named_parameters()), **buffers}.items():
        if not here[name] and name in buffers and name not in delta.buffers:
            continue  # as the code computes it
        if not here[name] or any(checkpoint.shape_and_dtype(a)[0] != tuple(tensor.shape) for a in here[name]):
            return None
    if not {*delta.parameters, *delta.buffers} <= here.keys():
        return None
    rounded = None
    try:
        dtypes = {name: checkpoint.shape_and_dtype(aliases[0])[1] for name, aliases in here.items() if aliases}
        widened = needs_cast(delta, dtypes, cast=cast)
        if widened:
            delta, rounded = cast_delta(delta, dtypes)
        for kind, values in (("parameter", delta.parameters), ("buffer", delta.buffers)):
            check_tensors(kind, values, {name: checkpoint.parameter(here[name][0]) for name in values})
        as_trained = partial(in_dtype_of, delta) if widened else None
        found = _digests(checkpoint, here, buffers, set(delta.parameters), as_trained)
        if found is None:
            return None
        if hash_of(found, without=delta.parameters) != delta.base:
            raise ValueError(
                "the other parameters or buffers of this folder differ from those it was trained on: name the folder "
                "of its own base"
            )
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r} does not fit {os.fspath(folder)!r}: {error}") from error
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for name, tensor in {**delta.parameters, **delta.buffers}.items():
        for alias in here[name]:
            pieces.setdefault(checkpoint.file_of(alias), []).append((checkpoint.place_of(alias), tensor))
    return _Patch(folder, pieces, checkpoint.files, rounded)


def _one_dtype(folder: Path, checkpoint: Checkpoint, delta: Delta, cast: bool) -> bool:
    """Whether from_pretrained takes the weights as they lie in the files, in the dtype that the delta knows (cast: in
    any one)."""
    dtypes = {str(checkpoint.shape_and_dtype(name)[1]).removeprefix("torch.") for name in checkpoint}
    floating = {name for name in dtypes if getattr(torch, name).is_floating_point}
    config = parse_json(whole_file(folder / "config.json"))
    said = config.get("dtype", config.get("torch_dtype")) if isinstance(config, dict) else None
    return len(floating) == 1 and (cast or floating == set(delta.dtypes)) and said in (None, *floating)


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter and saved buffer, by the one that a delta has."""
    tensors = {**dict(model.named_parameters()), **saved_buffers(model)}
    ids = {id(tensor): name for name, tensor in tensors.items()}
    names: dict[str, list[str]] = {name: [] for name in tensors}
    every = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    for name, tensor in every:
        if id(tensor) in ids:
            names[ids[id(tensor)]].append(name)
    return names


def _digests(
    checkpoint: Checkpoint,
    here: Mapping[str, list[str]],
    buffers: Mapping[str, torch.Tensor],
    without: set[str],
    as_trained: Callable[[torch.Tensor], torch.Tensor] | None,
) -> dict[str, str] | None:
    """Digests of what is not replaced, one tensor in memory at a time; None where tied names hold different weights."""
    found = {}
    for name, aliases in here.items():
        if name in without:
            continue
        there: list[torch.Tensor] = [checkpoint.parameter(alias) for alias in aliases] or [buffers[name]]
        held = {digest(tensor if as_trained is None else as_trained(tensor)) for tensor in there}
        if len(held) > 1:
            return None
        (found[name],) = held
    return found


def _belongs(name: str) -> bool:
    """Configuration, tokenizer, licence: whatever is no weights, and the index of those that are merged."""
    foreign_index = name.endswith(".index.json") and name != _INDEX
    return not name.startswith(".") and not name.endswith(_LEFT_OUT) and not foreign_index
