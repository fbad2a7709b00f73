"""Folders of a LLaMA with random weights, written piece by piece: a 70B takes disk and no memory.

Packed weights are random where they lie, with scales that make their deviation that of the plain ones; the weights that
train are in a source of their own, which holds nothing else. No such folder is a model that anybody packed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zest_fast.finetuning.digests import digest
from zest_fast.finetuning.quantised_weights import frozen_linears, head_name
from zest_fast.foundation.replacing import new_folder
from zest_fast.streaming.checkpoints import DOCUMENT, INDEX
from zest_fast.streaming.empty_models import empty_model
from zest_fast.streaming.packing import document, packed_shapes
from zest_fast.streaming.shard_writer import NAMES, ShardWriter

DTYPE = torch.bfloat16
_DEVIATION = {"int8": 73.3, "nf4": 0.57}  # of random codes, before the scale
_PIECE = 1 << 22  # entries
_SOURCE = "trained.safetensors"


def write_random(folder: Path, config: Any, frozen: str | None, trained: tuple[str, ...]) -> None:
    """trained: layers that a packed folder has no packed weights of, but a source."""
    with new_folder(folder) as temporary:
        config.save_pretrained(temporary)
        model = empty_model(temporary)
        generator = torch.Generator().manual_seed(0)
        deviation = config.initializer_range
        packed = {} if frozen is None else frozen_linears(model, (), head_name(model), frozen)
        blocks: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, parameter in model.named_parameters():
            parts = name.split(".")
            blocks.setdefault(".".join(parts[:3]) if "layers" in parts else parts[-2], {})[name] = tuple(
                parameter.shape
            )
        index, source = {}, temporary / "source"
        for number, names in enumerate(blocks.values(), 1):
            file = f"{'model' if frozen is None else 'packed'}-{number:05}-of-{len(blocks):05}.safetensors"
            written = [one for name in names for one in (name, f"{name[:-7]}.packed", f"{name[:-7]}.scale")]
            with ShardWriter(temporary / file, written) as shard:
                for name, shape in names.items():
                    index[name] = file
                    if (layer := name.removesuffix(".weight")) not in packed:
                        parts_of_it = _ones(shape) if len(shape) == 1 else _normal(shape, deviation, generator)
                        shard.write(name, DTYPE, shape, parts_of_it)
                    elif layer not in trained:
                        assert frozen is not None
                        _write_packed(shard, layer, frozen, shape, deviation, generator)
        if frozen is None:
            (temporary / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
            return
        source.mkdir()
        layers = {
            layer: {"shape": list(module.weight.shape), "dtype": NAMES[DTYPE], "file": _SOURCE, "digest": ""}
            for layer, module in packed.items()
        }
        with ShardWriter(source / _SOURCE, [f"{layer}.weight" for layer in trained]) as shard:
            for layer in trained:
                weight = torch.cat(list(_normal(tuple(layers[layer]["shape"]), deviation, generator)))
                layers[layer]["digest"] = digest(weight.view(layers[layer]["shape"]))
                shard.write(f"{layer}.weight", DTYPE, layers[layer]["shape"], [weight])
        sizes = {path.name: path.stat().st_size for path in sorted(temporary.glob("*.safetensors"))}
        sources = {_SOURCE: (source / _SOURCE).stat().st_size}
        (temporary / DOCUMENT).write_text(document(frozen, sizes, folder / "source", sources, layers))


def _write_packed(
    shard: ShardWriter, layer: str, frozen: str, shape: tuple[int, ...], deviation: float, generator: torch.Generator
) -> None:
    for one, (dtype, sizes) in packed_shapes(frozen, (shape[0], shape[1])).items():
        scale = torch.full((math.prod(sizes),), deviation / _DEVIATION[frozen])
        pieces = iter([scale]) if one == "scale" else _codes(math.prod(sizes), dtype, generator)
        shard.write(f"{layer}.{one}", dtype, sizes, pieces)


def _normal(shape: tuple[int, ...], deviation: float, generator: torch.Generator) -> Iterator[Tensor]:
    for count in _pieces(math.prod(shape)):
        yield torch.randn(count, generator=generator).mul_(deviation).to(DTYPE)


def _codes(count: int, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Tensor]:
    low, high = (-127, 128) if dtype == torch.int8 else (0, 256)
    for piece in _pieces(count):
        yield torch.randint(low, high, (piece,), generator=generator, dtype=dtype)


def _ones(shape: tuple[int, ...]) -> Iterator[Tensor]:
    yield torch.ones(shape, dtype=DTYPE)


def _pieces(count: int) -> Iterator[int]:
    for start in range(0, count, _PIECE):
        yield min(_PIECE, count - start)
