"""A model from a folder, of which only what trains and what is small is in memory."""

from __future__ import annotations

import ctypes
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zest_fast.finetuning.digests import digest
from zest_fast.finetuning.quantised_formats import FORMATS
from zest_fast.finetuning.quantised_weights import QuantisedLinear
from zest_fast.finetuning.trainable_layers import chosen_layers, head_layers
from zest_fast.foundation.nearest import nearest, some
from zest_fast.streaming.checkpoints import (
    Checkpoint,
    PackedFolder,
    packed_checkpoint,
    plain_checkpoint,
    read_packed,
    source_checkpoint,
)
from zest_fast.streaming.empty_models import empty_model
from zest_fast.streaming.mapped_files import check_platform, pages_of
from zest_fast.streaming.packing import packed_shapes
from zest_fast.streaming.streamed_model import WEIGHTS, others_weights, stream_weights
from zest_fast.streaming.transfer import CudaTransfer, Transfer

SMALL = 1 << 20  #: bytes: a weight below this is kept in memory
_M_MMAP_THRESHOLD = -3  # of <malloc.h>


def open_streamed(
    folder: str | os.PathLike[str],
    *,
    train: Iterable[str] = (),
    head: str | Iterable[str] | None = "auto",
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Open a model of transformers whose frozen weights stay on disk; they are read in every pass.

    Resident are the layers that train, what is smaller than 1 MiB, and the weights of about two layers at a time, in
    forward and in backward. The rest are mapped pages, which the system reads ahead and drops. Losses and gradients are
    those of the resident model, bit for bit; of a packed folder, those of `SelectiveBackward(frozen=...)`.

    nn.Linear layers, embeddings and the head of a language model are mapped; layers of other kinds (transformers'
    Conv1D, convolutions, fused experts) are in memory. Give the model to `SelectiveBackward` with the same layers:
    deltas fit the resident model, and the other way round.

    On a GPU are what trains, what is small, and two buffers as large as the largest frozen layer (or 32 MiB of the
    head, if that is more), which frozen weights go through one after the other; the host pins two of the same size. A
    thread reads the next weight and a stream of its own copies it while this one multiplies. Rows of embeddings are
    read on the host as they are looked up. The loss of a language model takes its head in blocks of 32 MiB while
    lean saving is on; who asks for logits has the whole head on the GPU for that moment. `parameters()` and
    `state_dict()` have the frozen weights where they are, on the host. **This has not run on a GPU**: the order of its
    copies is tested on the CPU, with buffers that are overwritten as early and copied as late as they may be.

    From then on the C library gives freed memory from 1 MiB on back to the system (glibc's M_MMAP_THRESHOLD, of the
    whole process); by itself it keeps unpacked weights that nobody needs any more.

    Args:
        folder: model.safetensors or shards with config.json, as `save_pretrained` writes them, or what `pack` made of
            such a folder. It must stay as it is while the model lives.
        train: layers that will train, by name; in memory, in the dtype of the file. Of a packed folder they are read
            from the folder that was packed.
        head: likewise, as for SelectiveBackward: "auto" = the last layer of a classifier, nothing for a language model.
        device: where the model runs for good: "cpu", "cuda" or "cuda:1". Batches belong there.

    Returns:
        The model in eval mode; what will train requires a gradient, and nothing else. It cannot be copied, pickled or
        converted.

    Raises:
        ValueError: a folder, shard or tensor that is missing, torn or of another shape than the configuration says; a
            layer that does not exist; a packed folder whose source is gone or has changed, while layers train.
        NotImplementedError: another system than Linux, a device of another kind; afterwards, when the model is moved.
        RuntimeError: on a GPU, in a pass: a file that was cut short, named; a process that was forked from this one.
        ImportError: no transformers, or no bitsandbytes for a folder packed in nf4.

    Examples:
        >>> import torch, transformers, zest_fast
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> config = transformers.LlamaConfig(**sizes, vocab_size=50)
        >>> transformers.LlamaForCausalLM(config).save_pretrained("llama")
        >>> layers = ["model.layers.1.mlp.up_proj"]
        >>> model = zest_fast.open_streamed("llama", train=layers)
        >>> with zest_fast.SelectiveBackward(model, layers) as tuned:
        ...     tokens = torch.arange(8).unsqueeze(0)
        ...     model(input_ids=tokens, labels=tokens).loss.backward()
        ...     print(tuned.cut, tuned.trainable_names)
        model.layers.1.mlp.up_proj ('model.layers.1.mlp.up_proj.weight',)
    """
    check_platform()
    transfer = _transfer(device)
    _let_go_of_freed_memory()
    folder = Path(folder)
    packed = read_packed(folder)
    if packed is not None:
        FORMATS[packed.format].check()
    checkpoint = plain_checkpoint(folder) if packed is None else packed_checkpoint(folder, packed)
    with torch.inference_mode(False):  # whose tensors cannot train, and do not say when they were written to
        model = empty_model(folder)
        _Opened(model, folder, checkpoint, packed, transfer).fill(train, head)
    return model


def _transfer(device: str | torch.device) -> Transfer | None:
    """None for the CPU. Raises ValueError or NotImplementedError, naming the device, where there is no way to it."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r} is unknown; 'cpu', 'cuda' or 'cuda:1' is needed") from error
    if found.type == "cpu":
        return None
    if found.type != "cuda":
        raise NotImplementedError(f"device={device!r}: weights are copied as they are used to 'cuda' only, or 'cpu'")
    if not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: torch {torch.__version__} finds no CUDA device; 'cpu' is left")
    if found.index is not None and found.index >= torch.cuda.device_count():
        raise ValueError(f"device={device!r}: there are {torch.cuda.device_count()} CUDA devices")
    return CudaTransfer(found)


def _let_go_of_freed_memory() -> None:
    """glibc by itself raises the size from which it does so to that of the largest block that was freed: unpacked
    weights, which are larger than all else that a step frees. Other C libraries have no such switch."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, SMALL)


class _Slot(NamedTuple):
    """Where a tensor belongs: a parameter or buffer `name` of a module, and its name in the model."""

    module: nn.Module
    name: str
    path: str

    @property
    def tensor(self) -> Tensor:
        found = self.module._parameters.get(self.name)
        return found if found is not None else self.module._buffers[self.name]  # type: ignore[return-value]


class _Opened:
    """The model of a folder, while it is filled."""

    def __init__(
        self,
        model: nn.Module,
        folder: Path,
        checkpoint: Checkpoint,
        packed: PackedFolder | None,
        transfer: Transfer | None,
    ) -> None:
        self._model, self._folder, self._checkpoint, self._packed = model, folder, checkpoint, packed
        self._transfer = transfer

    def fill(self, train: Iterable[str], head: str | Iterable[str] | None) -> None:
        packed = {} if self._packed is None else self._linears()
        used = self._put_tensors(packed)
        parts = (*chosen_layers(self._model, train), *head_layers(self._model, head))
        trained = {id(parameter): part.name for part in parts for parameter in part.parameters}
        self._read_trained(packed, trained)
        for name, module in packed.items():
            if id(module._parameters["weight"]) not in trained:
                used |= {f"{name}.packed", f"{name}.scale"}
                self._put_packed(name, module)
        mapped = self._keep_in_memory(trained)
        if self._transfer is not None:
            self._move(mapped, self._transfer.device)
        stream_weights(self._model, mapped, self._transfer)
        self._check(used)

    def _linears(self) -> dict[str, nn.Linear]:
        """The packed layers, in the model. Raises ValueError for one that does not fit it."""
        assert self._packed is not None
        modules, found = dict(self._model.named_modules()), {}
        for name, layer in self._packed.layers.items():
            module = modules.get(name)
            if type(module) is not nn.Linear:
                raise self._misfit(f"it has packed {name!r}, which is no nn.Linear there; {nearest(name, modules)}")
            if tuple(module.weight.shape) != layer.shape:
                raise self._misfit(
                    f"the packed {name!r} has shape {list(layer.shape)}, and {list(module.weight.shape)} there"
                )
            found[name] = module
        return found

    def _put_tensors(self, packed: dict[str, nn.Linear]) -> set[str]:
        """Everything from the files, mapped, and a stand-in without memory for what is packed; the names it had."""
        for name, module in packed.items():
            layer = self._packed.layers[name]  # type: ignore[union-attr]
            empty = torch.empty((), dtype=layer.dtype).expand(layer.shape)
            module._parameters["weight"] = nn.Parameter(empty, requires_grad=False)
        slots: dict[int, list[_Slot]] = {}
        for slot in self._slots():
            slots.setdefault(id(slot.tensor), []).append(slot)
        used: set[str] = set()
        missing = []
        for places in slots.values():
            if places[0].module in packed.values() and places[0].name == "weight":
                continue
            names = list(filter(None, (self._name(slot.path) for slot in places)))
            if not names:
                missing.append(places[0].path)
                continue
            used.update(names)
            self._put(places, names)
        if missing:
            raise self._misfit(f"it lacks {some(map(repr, missing))}; {nearest(missing[0], self._checkpoint)}")
        return used

    def _slots(self) -> Iterator[_Slot]:
        for prefix, module in self._model.named_modules(remove_duplicate=False):
            buffers = set(module._buffers) - module._non_persistent_buffers_set
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and (name in module._parameters or name in buffers):
                    yield _Slot(module, name, f"{prefix}.{name}" if prefix else name)

    def _name(self, path: str) -> str | None:
        """In the files, which those of a base model alone call without its prefix."""
        prefix = f"{getattr(self._model, 'base_model_prefix', '')}."
        return next((name for name in (path, path.removeprefix(prefix)) if name in self._checkpoint), None)

    def _put(self, places: list[_Slot], names: list[str]) -> None:
        """Into all places that share a tensor; where the files have it several times, these are the same."""
        tensor = self._checkpoint.parameter(names[0])
        wanted = places[0].tensor
        if tensor.shape != wanted.shape:
            raise self._misfit(f"{names[0]!r} has shape {list(tensor.shape)}, and {list(wanted.shape)} there")
        if tensor.is_floating_point() != wanted.is_floating_point():
            raise self._misfit(f"{names[0]!r} is stored as {tensor.dtype}, and {wanted.dtype} is needed there")
        for other in names[1:]:
            if digest(self._checkpoint.parameter(other)) != digest(tensor):
                raise self._misfit(
                    f"{names[0]!r} and {other!r} are tied there and differ in the files; set tie_word_embeddings to "
                    "false in it if both are meant"
                )
        for slot in places:
            if slot.name in slot.module._parameters:
                slot.module._parameters[slot.name] = tensor
            else:
                slot.module._buffers[slot.name] = tensor.detach().clone()

    def _read_trained(self, packed: dict[str, nn.Linear], trained: dict[int, str]) -> None:
        """What trains, into memory; of packed layers from the source."""
        chosen = {name: module for name, module in packed.items() if id(module._parameters["weight"]) in trained}
        if chosen:
            assert self._packed is not None
            source = source_checkpoint(self._folder, self._packed)
            for name, module in chosen.items():
                self._read_source(name, module._parameters["weight"], source)
        for parameter in self._model.parameters():
            if id(parameter) in trained:
                _to_memory(parameter)
                parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())

    def _read_source(self, name: str, weight: Any, source: Checkpoint) -> None:
        assert self._packed is not None
        layer = self._packed.layers[name]
        prefix = f"{getattr(self._model, 'base_model_prefix', '')}."
        path = next((one for one in (f"{name}.weight", f"{name}.weight".removeprefix(prefix)) if one in source), "")
        found = source.parameter(path or f"{name}.weight")
        if tuple(found.shape) != layer.shape or found.dtype != layer.dtype or digest(found) != layer.digest:
            raise ValueError(
                f"{path!r} in {os.fspath(source.folder / layer.file)!r} is not the weight that "
                f"{os.fspath(self._folder)!r} was packed from; put that file back, or pack again"
            )
        weight.data = found.detach().clone()
        _drop(found)

    def _put_packed(self, name: str, module: nn.Linear) -> None:
        """As `QuantisedWeights` does it, with what the files hold."""
        assert self._packed is not None
        layer = self._packed.layers[name]
        new = {one: self._checkpoint.parameter(f"{name}.{one}") for one in ("packed", "scale")}
        self._check_packed(name, new, layer.shape)
        there = list(module._parameters.items())
        module._parameters.clear()
        for key, value in there:
            module._parameters.update(new if key == "weight" else {key: value})
        plain: nn.Module = module
        plain.__class__ = QuantisedLinear
        vars(plain).update(format=self._packed.format, dtype=layer.dtype)

    def _check_packed(self, name: str, new: dict[str, nn.Parameter], shape: tuple[int, int]) -> None:
        assert self._packed is not None
        for one, (dtype, sizes) in packed_shapes(self._packed.format, shape).items():
            found = new[one]
            if found.dtype != dtype or tuple(found.shape) != sizes:
                raise self._misfit(
                    f"{name}.{one} is {found.dtype} {list(found.shape)}, and {dtype} {list(sizes)} is needed in "
                    f"{self._packed.format}"
                )

    def _keep_in_memory(self, trained: dict[int, str]) -> set[int]:
        """All but what is large, frozen and of a kind whose pages are given back; ids of that."""
        kinds = nn.Linear | QuantisedLinear | nn.Embedding
        owned = {
            id(parameter)
            for module in self._model.modules()
            if isinstance(module, kinds)
            for name, parameter in module._parameters.items()
            if name in WEIGHTS
        }
        if self._transfer is not None:
            owned -= others_weights(self._model)
        mapped = set()
        for parameter in self._model.parameters():
            if id(parameter) in trained:
                continue
            if id(parameter) in owned and parameter.nbytes >= SMALL and pages_of(parameter) is not None:
                mapped.add(id(parameter))
            else:
                _to_memory(parameter)
        return mapped

    def _move(self, mapped: set[int], device: torch.device) -> None:
        """All but what stays on disk, in place as far as parameters go: all who share one have it."""
        for parameter in self._model.parameters():
            if id(parameter) not in mapped:
                parameter.data = parameter.data.to(device)
        moved: dict[int, Tensor] = {}
        for module in self._model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = moved.setdefault(id(buffer), buffer.to(device))

    def _check(self, used: set[str]) -> None:
        tensors = (*self._model.named_parameters(), *self._model.named_buffers())
        if empty := [name for name, tensor in tensors if tensor.is_meta]:
            raise self._misfit(f"nothing fills {some(map(repr, empty))}, which stays on the meta device")
        ignored = getattr(self._model, "_keys_to_ignore_on_load_unexpected", None) or ()
        patterns = [re.compile(pattern) for pattern in (*ignored, r"rotary_emb\.inv_freq")]
        layers = {} if self._packed is None else self._packed.layers
        strange = [
            name
            for name in self._checkpoint
            if name not in used
            and name.removesuffix(".packed").removesuffix(".scale") not in layers
            and not any(pattern.search(name) for pattern in patterns)
        ]
        if strange:
            warnings.warn(
                f"{os.fspath(self._folder)!r} holds {some(map(repr, strange))}, which {type(self._model).__name__} "
                "does not have: not used",
                stacklevel=4,
            )

    def _misfit(self, what: str) -> ValueError:
        return ValueError(
            f"{os.fspath(self._folder)!r} does not hold the {type(self._model).__name__} of its config.json: {what}"
        )


def _to_memory(parameter: nn.Parameter) -> None:
    """In place, so that all who share it have it."""
    pages = pages_of(parameter)
    if pages is not None:
        parameter.data = parameter.detach().clone()
        pages.drop()
        del parameter.pages  # type: ignore[attr-defined]


def _drop(parameter: nn.Parameter) -> None:
    pages = pages_of(parameter)
    if pages is not None:
        pages.drop()
