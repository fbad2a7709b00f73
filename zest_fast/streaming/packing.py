"""A folder of weights packed once, so that it is a quarter or half of what is read in every pass afterwards."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from zest_fast.finetuning.digests import digest
from zest_fast.finetuning.quantised_formats import BLOCK, FORMATS
from zest_fast.finetuning.quantised_weights import frozen_linears, head_name
from zest_fast.foundation.documents import check_links
from zest_fast.foundation.nearest import some
from zest_fast.foundation.options import Frozen
from zest_fast.foundation.replacing import new_folder
from zest_fast.foundation.version import __version__
from zest_fast.streaming.checkpoints import DOCUMENT, FORMAT, INDEX, VERSION, Checkpoint, plain_checkpoint
from zest_fast.streaming.empty_models import empty_model
from zest_fast.streaming.mapped_files import check_platform, pages_of
from zest_fast.streaming.shard_writer import NAMES, ShardWriter

_BESIDE = (".json", ".txt", ".model", ".jinja")  # endings of what tokenizers and configurations are kept in


def pack(source: str | os.PathLike[str], out: str | os.PathLike[str], *, frozen: Frozen) -> Path:
    """Write the weights of a folder again, nn.Linear layers but the head in int8 or nf4, for `open_streamed`.

    One tensor at a time is in memory. Layers that train are read from `source` later on, so it has to stay.

    Args:
        source: model.safetensors or shards with config.json, as `save_pretrained` writes them.
        out: a new folder; it appears whole or not at all.
        frozen: "int8" or "nf4" (extra `quant`), as for SelectiveBackward, and the same bits.

    Returns:
        The folder `out`.

    Raises:
        ValueError: an unknown format; a source that is missing, torn, packed already or has no layer to pack, a weight
            that is not finite; a file beside them that is a link out of the folder.
        OSError: `out` exists, or cannot be written.
        ImportError: no transformers, or no bitsandbytes for nf4.
        NotImplementedError: another system than Linux.

    Examples:
        >>> import transformers, zest_fast
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> config = transformers.LlamaConfig(**sizes, vocab_size=50)
        >>> transformers.LlamaForCausalLM(config).save_pretrained("llama")
        >>> folder = zest_fast.pack("llama", "llama-int8", frozen="int8")
        >>> zest_fast.open_streamed(folder).model.layers[0].mlp.up_proj
        QuantisedLinear(in_features=16, out_features=32, int8)
    """
    check_platform()
    if frozen not in FORMATS:
        raise ValueError(f"frozen={frozen!r} is unknown; {some(map(repr, FORMATS))} are there")
    FORMATS[frozen].check()
    folder = Path(source)
    if (folder / DOCUMENT).exists():
        raise ValueError(f"{os.fspath(source)!r} is packed already; name the folder that it was packed from")
    checkpoint = plain_checkpoint(folder)
    layers = _packed_layers(folder, checkpoint, frozen)
    check_links(folder, _beside(folder), "copied")
    with new_folder(out) as temporary:
        _write(folder, temporary, checkpoint, layers, frozen)
    return Path(out)


def packed_shapes(format: str, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of what a matrix of this shape is packed into, by name."""
    if format == "int8":
        return {"packed": (torch.int8, shape), "scale": (torch.float32, shape[:1])}
    count = shape[0] * shape[1]
    return {"packed": (torch.uint8, (-(-count // 2), 1)), "scale": (torch.float32, (-(-count // BLOCK),))}


def document(
    format: str, files: Mapping[str, int], source: Path, source_files: Mapping[str, int], layers: Mapping[str, object]
) -> str:
    """The text of zest_fast.json; files with their sizes, for layers see `PackedLayer`."""
    found = {
        "format": FORMAT,
        "version": VERSION,
        "frozen": format,
        "files": dict(files),
        "source": {"folder": os.path.abspath(source), "files": dict(source_files)},
        "layers": dict(layers),
        "zest_fast": __version__,
    }
    return json.dumps(found, indent=1) + "\n"


def _packed_layers(folder: Path, checkpoint: Checkpoint, format: str) -> dict[str, str]:
    """The layers that SelectiveBackward would pack if nothing trained: the names of their weights in the files, and in
    the model.

    Raises ValueError where there are none, and for a weight that is missing or of another shape.
    """
    model = empty_model(folder)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found = {}
    for name, module in frozen_linears(model, (), head_name(model), format).items():
        weight = f"{name}.weight"
        stored = weight if weight in checkpoint else weight.removeprefix(prefix)
        shape = tuple(checkpoint.parameter(stored).shape)
        if shape != tuple(module.weight.shape):
            raise ValueError(
                f"{stored!r} in {os.fspath(folder / checkpoint.file_of(stored))!r} has shape {list(shape)}, and "
                f"{list(module.weight.shape)} by its config.json"
            )
        found[stored] = name
    return found


def _write(source: Path, folder: Path, checkpoint: Checkpoint, layers: Mapping[str, str], format: str) -> None:
    files: dict[str, list[str]] = {}
    for name in checkpoint:
        files.setdefault(checkpoint.file_of(name), []).append(name)
    documented: dict[str, object] = {}
    for number, (file, names) in enumerate(files.items(), 1):
        written = [one for name in names for one in (_parts(layers[name]) if name in layers else [name])]
        with ShardWriter(folder / f"packed-{number:05}-of-{len(files):05}.safetensors", written) as shard:
            for name in names:
                tensor = checkpoint.parameter(name)
                pages = pages_of(tensor)
                if name in layers:
                    documented[layers[name]] = {
                        "shape": list(tensor.shape),
                        "dtype": NAMES[tensor.dtype],
                        "file": file,
                        "digest": digest(tensor),
                    }
                    for key, one in _packed(name, tensor.detach(), format).items():
                        shard.write(f"{layers[name]}.{key}", one.dtype, one.shape, [one])
                else:
                    shard.write(name, tensor.dtype, tensor.shape, [tensor.detach()])
                if pages is not None:
                    pages.drop()
    for beside in _beside(source):
        shutil.copyfile(beside, folder / beside.name)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
    source_sizes = {file: (source / file).stat().st_size for file in files}
    (folder / DOCUMENT).write_text(document(format, sizes, source, source_sizes, documented), encoding="utf-8")


def _beside(source: Path) -> list[Path]:
    """What is copied as it is."""
    files = (file for file in sorted(source.iterdir()) if file.is_file() and file.name not in (INDEX, DOCUMENT))
    return [file for file in files if file.suffix in _BESIDE]


def _parts(name: str) -> list[str]:
    return [f"{name}.packed", f"{name}.scale"]


def _packed(name: str, weight: Tensor, format: str) -> dict[str, Tensor]:
    if not torch.isfinite(torch.stack(torch.aminmax(weight))).all():
        raise ValueError(f"frozen={format!r}: {name!r} holds weights that are not finite; mend them first")
    packed, scale = FORMATS[format].pack(weight)
    return {"packed": packed, "scale": scale}
