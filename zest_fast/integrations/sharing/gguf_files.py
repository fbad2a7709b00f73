"""A delta for llama.cpp: into a GGUF of its base, or as a GGUF adapter beside it (extra `gguf`).

Vocabulary and settings of a GGUF are what llama.cpp's own converter made of the base; nothing here makes them anew. The
names of tensors are those of the package gguf; how llama.cpp lays them out is known for the architectures below, and
held against the bits of the file wherever there is one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zest_fast.foundation.nearest import nearest, some
from zest_fast.foundation.replacing import check_regular, replacing
from zest_fast.integrations.sharing.lora import LoraExport, adapter_of, base_of
from zest_fast.integrations.sharing.low_rank import check_wanted
from zest_fast.profiling.layers import is_transformers_conv1d

# model_type of transformers -> what gguf calls it. llama.cpp keeps the rows of queries and keys of the first two in the
# order of its own rotary embedding (LlamaModel.permute in its conversion); those of the others are as they are.
_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gpt2": "gpt2",
    "bert": "bert",
}
_SUFFIXES = (".weight", ".bias")


@dataclass(frozen=True)
class GgufPatch:
    """What went into a GGUF: tensors by their names there; lost of entries are not exactly what was trained."""

    path: Path
    tensors: tuple[str, ...]
    lost: int
    entries: int

    def __str__(self) -> str:
        exact = "exact" if not self.lost else f"{self.lost:,} of {self.entries:,} trained entries were rounded"
        return f"{self.path}: {len(self.tensors)} tensors replaced, {exact}; all else is as it was"


def delta_to_gguf(
    path: str | os.PathLike[str],
    base: nn.Module | str,
    gguf_file: str | os.PathLike[str],
    out: str | os.PathLike[str],
) -> GgufPatch:
    """Write a copy of a GGUF of the base with what was trained in it, in the types that its tensors have.

    Every tensor of the base is held against the file first, bit for bit: a file of other weights, or one whose tensors
    are laid out otherwise than is known here, is refused.

    Args:
        path: the delta.
        base: the model that it was made on, or its folder or hub id.
        gguf_file: that llama.cpp's convert_hf_to_gguf made of the base: in F32, F16, BF16, Q8_0 or another type that
            the package gguf writes.
        out: the file to write; an existing one is replaced at once or kept.

    Returns:
        What was replaced, and how many entries were rounded to the types of the file.

    Raises:
        ValueError: no mapping for the architecture or for a tensor that was trained, a type that cannot be written, a
            value beyond its range, a file that is torn, split or of another base.
        ImportError: without gguf.
    """
    gguf = _gguf()
    model, delta, _ = base_of(path, base)
    architecture, names = _Names.of(model, gguf)
    reader = _reader(gguf, gguf_file, architecture)
    there = {tensor.name: tensor for tensor in reader.tensors}
    if delta.buffers:
        raise ValueError(f"{min(delta.buffers)!r} is a buffer that moved, which no GGUF of {architecture} has")
    pieces: list[tuple[int, bytes]] = []
    replaced, lost, entries = [], 0, 0
    for name, aliases, parameter in _parameters(model):
        homes = [home for home in map(names.find, aliases) if home is not None and home in there]
        tuned = delta.parameters.get(name)
        if tuned is not None and not homes:
            raise ValueError(
                f"{os.fspath(gguf_file)!r} has no tensor for {name!r}, which was trained: merge the delta into a "
                "folder, and convert that"
            )
        for home in homes:
            _check_same(gguf, os.fspath(gguf_file), there[home], names.laid_out(name, parameter.detach()), name)
            if tuned is not None:
                values = names.laid_out(name, tuned)
                data = _as_type(gguf, there[home], values)
                pieces.append((int(there[home].data_offset), data.tobytes()))
                kept = torch.from_numpy(gguf.dequantize(data, there[home].tensor_type)).reshape(values.shape)
                if not torch.isfinite(kept).all():
                    raise ValueError(f"{name!r} has values beyond the range of {there[home].tensor_type.name}")
                replaced.append(home)
                lost, entries = lost + int((kept != values.float()).sum()), entries + values.numel()
    with replacing(out) as temporary:
        shutil.copyfile(gguf_file, temporary)
        with open(temporary, "rb+") as stream:
            for offset, contents in pieces:
                stream.seek(offset)
                stream.write(contents)
    return GgufPatch(Path(out), tuple(replaced), lost, entries)


def delta_to_gguf_lora(
    path: str | os.PathLike[str],
    base: nn.Module | str,
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    error: float | None = None,
) -> LoraExport:
    """Write a delta as a LoRA adapter that llama.cpp takes beside any GGUF of the base (`llama-cli --lora`).

    The factors are those of `delta_to_lora`, as float32. llama.cpp adapts matrices alone.

    Args:
        path: the delta.
        base: the model that it was made on, or its folder or hub id.
        out: the file to write; an existing one is replaced at once or kept.
        rank: as for `delta_to_lora`.
        error: as there.

    Returns:
        Ranks and errors by layer.

    Raises:
        ValueError: as `delta_to_lora`, and by name what an adapter of llama.cpp cannot hold (biases, norms, heads of
            classifiers, tied embeddings): `delta_to_gguf` can.
        ImportError: without gguf.
    """
    check_wanted(rank, error)
    gguf = _gguf()
    model, delta, _ = base_of(path, base)
    architecture, names = _Names.of(model, gguf)
    adapter = adapter_of(model, delta, rank=rank, error=error)
    if adapter.whole or adapter.biases:
        cannot = [*adapter.whole, *(f"{name}.bias" for name in adapter.biases)]
        raise ValueError(
            f"adapters of llama.cpp hold no {some(cannot)}: put the delta into a GGUF of the base instead, which is "
            "exact"
        )
    if not adapter.factors:
        raise ValueError(f"{os.fspath(path)!r} has no weight that changed")
    alpha = max(one.rank for one in adapter.factors.values())
    tensors: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    for name, one in adapter.factors.items():
        home = names.find(f"{name}.weight")
        embedding = isinstance(modules[name], nn.Embedding)
        if home is None or (embedding and home != "token_embd.weight"):
            raise ValueError(f"{name!r} is no matrix that llama.cpp adapts in {architecture} models")
        # llama.cpp scales every layer by alpha and its own rank, and alpha is one for all.
        b = names.permuted(f"{name}.weight", one.b) * (one.rank / alpha)
        tensors[f"{home}.lora_a"] = one.a.T.contiguous() if embedding else one.a
        tensors[f"{home}.lora_b"] = b.contiguous()
    with replacing(out) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
        for home, tensor in tensors.items():
            writer.add_tensor(home, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return adapter.report(Path(out), sum(tensor.nbytes for tensor in tensors.values()))


class _Names:
    """From the parameters of a model to the tensors of a GGUF."""

    def __init__(self, model: nn.Module, kind: str, mapping: Any) -> None:
        self._mapping, self._kind = mapping, kind
        self._config: Any = model.config
        self._modules = dict(model.named_modules())

    @classmethod
    def of(cls, model: nn.Module, gguf: Any) -> tuple[str, _Names]:
        """What gguf calls the architecture, and its names. Raises ValueError for one that is not known."""
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        if kind not in _ARCHITECTURES:
            raise ValueError(
                f"{kind!r} models: how llama.cpp lays out their tensors is not known here; "
                f"{nearest(kind, _ARCHITECTURES)}"
            )
        architecture = _ARCHITECTURES[kind]
        number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
        config: Any = model.config
        return architecture, cls(model, kind, gguf.get_tensor_name_map(number, config.num_hidden_layers))

    def find(self, name: str) -> str | None:
        plain = name.removeprefix("bert.") if self._kind == "bert" else name
        found: str | None = self._mapping.get_name(plain, try_suffixes=_SUFFIXES)
        return found

    def laid_out(self, name: str, tensor: Tensor) -> Tensor:
        """As llama.cpp has it: [out, in], queries and keys in the order of its rotary embedding."""
        module = self._modules[name.rpartition(".")[0]]
        turned = tensor.T if is_transformers_conv1d(module) and tensor.dim() == 2 else tensor
        return self.permuted(name, turned).contiguous()

    def permuted(self, name: str, rows: Tensor) -> Tensor:
        """Of each head, the two halves of its rows interleaved."""
        own = name.rpartition(".")[0].rpartition(".")[2]
        if _ARCHITECTURES[self._kind] != "llama" or own not in ("q_proj", "k_proj"):
            return rows
        heads = self._config.num_attention_heads if own == "q_proj" else self._config.num_key_value_heads
        return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _parameters(model: nn.Module) -> Iterator[tuple[str, list[str], nn.Parameter]]:
    """Each parameter once: the name that a delta has for it, all its names, itself."""
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    for name, parameter in model.named_parameters():
        yield name, aliases[id(parameter)], parameter


def _reader(gguf: Any, file: str | os.PathLike[str], architecture: str) -> Any:
    check_regular(file)
    try:
        reader = gguf.GGUFReader(file)
        kind = reader.get_field("general.architecture")
        found = None if kind is None else kind.contents()
        split = reader.get_field("split.count")
        parts = 1 if split is None else int(split.contents())
    except OSError:
        raise
    except Exception as error:  # a file of somebody else makes the reader raise whatever it meets
        raise ValueError(f"{os.fspath(file)!r} is torn or no GGUF ({type(error).__name__}: {error})") from error
    if found != architecture:
        raise ValueError(f"{os.fspath(file)!r} is a GGUF of {found!r}, and the base is {architecture!r}")
    if parts > 1 or reader.byte_order != "I":
        what = (
            "split into several files: join them with llama-gguf-split --merge" if parts > 1 else "of other endianness"
        )
        raise ValueError(f"{os.fspath(file)!r} is {what}")
    return reader


def _as_type(gguf: Any, tensor: Any, values: Tensor) -> Any:
    """The values in the type of a tensor of a GGUF, as an array of its bytes' shape."""
    try:
        with np.errstate(over="ignore"):  # what became infinite is an error of the caller's, with a name
            return gguf.quantize(values.detach().cpu().float().numpy(), tensor.tensor_type)
    except NotImplementedError as error:
        raise ValueError(
            f"{tensor.name!r} is {tensor.tensor_type.name}, which the package gguf cannot write: take a GGUF of the "
            "base in F16, BF16 or Q8_0, and let llama-quantize make the smaller one of the result"
        ) from error


def _check_same(gguf: Any, file: str, tensor: Any, values: Tensor, name: str) -> None:
    """Raises ValueError where the file does not hold these values of the base."""
    if tuple(map(int, reversed(tensor.shape))) != tuple(values.shape):
        shape = list(map(int, reversed(tensor.shape)))
        raise ValueError(
            f"{file!r} has {tensor.name!r} of shape {shape}, and {name!r} of the base is {list(values.shape)}"
        )
    if _as_type(gguf, tensor, values).tobytes() != tensor.data.tobytes():
        raise ValueError(
            f"{file!r} holds other values in {tensor.name!r} than the base in {name!r}: it was made of other weights, "
            "or laid out or quantised by another program than convert_hf_to_gguf"
        )


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files need the package gguf: pip install 'zest_fast[gguf]'") from error
    return gguf
