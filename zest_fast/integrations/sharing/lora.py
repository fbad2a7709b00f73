"""A delta as a LoRA adapter of PEFT: what trained in matrices as products of low rank, the rest as it is."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from zest_fast.finetuning.delta_files import Delta, read_delta
from zest_fast.finetuning.delta_use import fitted
from zest_fast.finetuning.digests import Base
from zest_fast.foundation.documents import parse_json
from zest_fast.foundation.nearest import some
from zest_fast.foundation.replacing import new_folder
from zest_fast.integrations.exports import used_without_a_call
from zest_fast.integrations.merging import load_base, settings_of
from zest_fast.integrations.sharing.low_rank import LowRank, check_wanted, low_rank, refuse_what_does_not_hold
from zest_fast.integrations.sharing.model_cards import model_card
from zest_fast.profiling.layers import is_transformers_conv1d

_FILE = "adapter_model.safetensors"
_METADATA = "zest_fast"


@dataclass(frozen=True)
class AdaptedLayer:
    """rank of full_rank; error: the relative Frobenius error of the weight's difference."""

    name: str
    rank: int
    full_rank: int
    error: float


@dataclass(frozen=True)
class LoraExport:
    """What an adapter holds.

    Attributes:
        path: where it is.
        layers: those that are adapted, each with its rank and error.
        whole: modules that are in it whole, and exact.
        unchanged: of the delta's tensors, those that are as in the base: they are left out.
        error: of all adapted weights together.
        bytes: of its tensors.

    Examples:
        >>> from pathlib import Path
        >>> from zest_fast import LoraExport
        >>> print(LoraExport(Path("adapter"), (), ("classifier",), (), 0.0, 3072))
        adapter: LoRA on 0 layers, error 0; whole: classifier; 3.0 KiB
    """

    path: Path
    layers: tuple[AdaptedLayer, ...]
    whole: tuple[str, ...]
    unchanged: tuple[str, ...]
    error: float
    bytes: int

    def __str__(self) -> str:
        ranks = sorted({one.rank for one in self.layers})
        of_rank = f" of rank {ranks[0]}{f' to {ranks[-1]}' if len(ranks) > 1 else ''}" if ranks else ""
        whole = f"; whole: {some(self.whole)}" if self.whole else ""
        left = f"; as in the base: {some(self.unchanged)}" if self.unchanged else ""
        size = f"{self.bytes / 2**20:.1f} MiB" if self.bytes >= 2**20 else f"{self.bytes / 2**10:.1f} KiB"
        layers = f"{len(self.layers)} layer{'' if len(self.layers) == 1 else 's'}"
        return f"{self.path}: LoRA{of_rank} on {layers}, error {self.error:.3g}{whole}{left}; {size}"


@dataclass(frozen=True)
class Adapter:
    """The numbers of an adapter, whoever writes them. whole: module -> its state. biases: differences, by layer."""

    factors: Mapping[str, LowRank]
    biases: Mapping[str, Tensor]
    whole: Mapping[str, Mapping[str, Tensor]]
    unchanged: tuple[str, ...]

    def report(self, path: Path, size: int) -> LoraExport:
        layers = tuple(
            AdaptedLayer(name, one.rank, min(one.a.shape[1], one.b.shape[0]), one.error)
            for name, one in self.factors.items()
        )
        total = sum(one.norm**2 for one in self.factors.values())
        missing = sum((one.error * one.norm) ** 2 for one in self.factors.values())
        error = (missing / total) ** 0.5 if total else 0.0
        return LoraExport(path, layers, tuple(self.whole), self.unchanged, error, size)


def delta_to_lora(
    path: str | os.PathLike[str],
    base: nn.Module | str,
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    error: float | None = None,
) -> LoraExport:
    """Write a delta as a LoRA adapter that `PeftModel.from_pretrained(base, out)` loads (extra `peft`).

    The difference of each trained matrix (Linear, Conv1D of transformers, convolution, embedding) becomes a product of
    low rank by its singular value decomposition, the best there is for its Frobenius norm; biases travel beside them,
    exactly, where every adapted layer has one. The head, norms, weights with another name and what is tied to another
    module are saved whole (modules_to_save). lora_alpha equals the rank, in every layer, so that the scale is 1.

    Args:
        path: the delta.
        base: the model that it was made on: as it was loaded, or a folder or hub id. A model stays as it is.
        out: a new folder.
        rank: of the adapters at most; without `error`, of all of them.
        error: the relative Frobenius error of a difference at most; each layer gets the least rank that holds it.

    Returns:
        What the adapter holds: ranks and errors by layer; print it.

    Raises:
        ValueError: the delta does not fit the base or has no matrix that changed, a layer cannot hold `error` at
            `rank` (the message names it and the rank that it would need), or the base was quantised while it trained.
        FileExistsError: `out` is there already. Nothing is written in each case.
        ImportError: without peft.

    Examples:
        >>> import copy, torch, zest_fast
        >>> from torch import nn
        >>> base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> tuned = copy.deepcopy(base)
        >>> with zest_fast.SelectiveBackward(tuned, ["0"]) as selective:
        ...     with torch.no_grad():
        ...         _ = tuned[0].weight.add_(torch.outer(torch.arange(8.0), torch.ones(8)))
        ...     _ = selective.save("delta.safetensors")
        >>> export = zest_fast.delta_to_lora("delta.safetensors", base, "adapter", error=0.01)
        >>> [(one.name, one.rank) for one in export.layers], export.whole
        ([('0', 1)], ('2',))
    """
    check_wanted(rank, error)
    model, delta, source = base_of(path, base)
    from zest_fast.integrations.peft import lora_config  # before the work, so that it says at once what is missing

    with new_folder(out) as folder:
        adapter = adapter_of(model, delta, rank=rank, error=error)
        if not adapter.factors:
            raise ValueError(
                f"{os.fspath(path)!r} has no weight that changed and that LoRA could adapt (whole: "
                f"{some(adapter.whole)}): merge it instead"
            )
        ranks = {name: one.rank for name, one in adapter.factors.items()}
        modules, top = dict(model.named_modules()), max(ranks.values())
        config = lora_config(
            list(ranks),
            model,
            r=top,
            ranks={name: one for name, one in ranks.items() if one != top},
            head=list(adapter.whole) or None,
            lora_bias=bool(adapter.biases),
            fan_in_fan_out=all(is_transformers_conv1d(modules[name]) for name in ranks),
            inference_mode=True,
            base_model_name_or_path=source,
        )
        config.alpha_pattern = config.rank_pattern
        tensors = _peft_tensors(modules, adapter)
        report = adapter.report(Path(out), sum(tensor.nbytes for tensor in tensors.values()))
        metadata = {"format": "pt", _METADATA: json.dumps({**asdict(report), "path": None})}
        save_file(tensors, folder / _FILE, metadata)
        config.save_pretrained(str(folder))
        (folder / "README.md").write_text(model_card(path, base=source, adapter=report), encoding="utf-8")
    return report


def read_export(folder: str | os.PathLike[str]) -> LoraExport:
    """What `delta_to_lora` said of the adapter in a folder. Raises ValueError where it is none of its own."""
    file = Path(folder, _FILE)
    try:
        with safe_open(file, framework="pt") as opened:
            said = parse_json((opened.metadata() or {})[_METADATA])
        layers = tuple(AdaptedLayer(**one) for one in said["layers"])
        whole, unchanged = (tuple(map(str, said[key])) for key in ("whole", "unchanged"))
        return LoraExport(Path(folder), layers, whole, unchanged, float(said["error"]), int(said["bytes"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{os.fspath(file)!r} does not say its ranks and errors ({type(error).__name__}): it is not what "
            "delta_to_lora wrote"
        ) from error


def base_of(path: str | os.PathLike[str], base: nn.Module | str) -> tuple[nn.Module, Delta, str | None]:
    """The base as it was when the delta was made, the delta, and what the base is called.

    Raises ValueError where they do not fit, or frozen weights were rounded while it trained.
    """
    delta = read_delta(path)
    frozen = settings_of(delta).frozen
    if frozen is not None:
        raise ValueError(
            f"{os.fspath(path)!r} was trained on a base whose frozen weights were rounded to {frozen}, and what is "
            "made of it here would go onto the plain ones: merge it instead (zest-fast merge)"
        )
    model = base if isinstance(base, nn.Module) else load_base(base, delta).model
    fitted(path, delta, model, Base(model))
    if isinstance(base, str):
        return model, delta, base
    return model, delta, getattr(getattr(model, "config", None), "_name_or_path", "") or None


def adapter_of(model: nn.Module, delta: Delta, *, rank: int | None, error: float | None) -> Adapter:
    """Factors of what trained in matrices, and the modules that are to be saved whole.

    model: the base. Raises ValueError for what can be neither, and where `error` cannot be held.
    """
    there, modules = dict(model.named_parameters()), dict(model.named_modules())
    moved = [name for name, value in delta.parameters.items() if not torch.equal(value, there[name].cpu())]
    adapted, whole = _parts(model, modules, delta, moved)

    def difference(name: str) -> Tensor:
        return delta.parameters[name].double() - there[name].detach().cpu().double()

    factors = {
        name: low_rank(_matrix(modules[name], difference(f"{name}.weight")), rank=rank, error=error) for name in adapted
    }
    refuse_what_does_not_hold(factors.items(), rank, error)
    biases: dict[str, Tensor] = {}
    if any(f"{name}.bias" in moved for name in adapted):
        for name, one in factors.items():
            bias = f"{name}.bias"
            biases[name] = difference(bias) if bias in moved else torch.zeros(one.b.shape[0])
    tuned = {**delta.parameters, **delta.buffers}
    states = {name: _state(name, modules[name], tuned, model) for name in whole}
    inside = tuple(f"{name}." for name in whole)
    unchanged = tuple(name for name in delta.parameters if name not in moved and not name.startswith(inside))
    return Adapter(factors, biases, states, unchanged)


def _parts(
    model: nn.Module, modules: Mapping[str, nn.Module], delta: Delta, moved: Sequence[str]
) -> tuple[list[str], list[str]]:
    """The layers to adapt, and the outermost modules that go whole.

    Heads go whole, moved or not: a new one is in no base.
    """
    owners = _owners(model)
    whole = {name for name in delta.head if name in modules} | {name.rpartition(".")[0] for name in delta.buffers}
    weights: list[str] = []
    biases: list[str] = []
    for name in moved:
        module, _, own = name.rpartition(".")
        adaptable = _takes_lora(modules[module]) and not used_without_a_call(modules, module)
        if len(owners[name]) > 1 or not adaptable or own not in ("weight", "bias"):
            whole |= owners[name]
        else:
            (weights if own == "weight" else biases).append(module)
    # PEFT has biases in all adapters or in none, and none without a weight.
    together = all(_has_bias(modules[name]) for name in weights)
    whole |= {name for name in biases if not together or name not in weights}
    if "" in whole:
        bare = next(name for name in (*moved, *delta.buffers) if "" in owners.get(name, {""}))
        raise ValueError(f"{bare!r} belongs to no module that an adapter could hold: merge the delta instead")
    outer = sorted(name for name in whole if not any(name.startswith(f"{other}.") for other in whole))
    inside = tuple(f"{name}." for name in outer)
    return [name for name in weights if not f"{name}.".startswith(inside)], outer


def _owners(model: nn.Module) -> dict[str, set[str]]:
    """The modules that hold each parameter, by the one of its names that a delta has."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    owners: dict[str, set[str]] = {name: set() for name in names.values()}
    for alias, parameter in model.named_parameters(remove_duplicate=False):
        owners[names[id(parameter)]].add(alias.rpartition(".")[0])
    return owners


def _takes_lora(module: nn.Module) -> bool:
    """Whether PEFT computes W + BA for it: for convolutions it leaves out groups, dilation and other paddings, and
    what max_norm makes of an embedding's rows it makes of those of A."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        plain = type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and module.padding_mode == "zeros"
        return plain and module.groups == 1 and set(module.dilation) == {1}
    if type(module) is nn.Embedding:
        return module.max_norm is None
    return type(module) is nn.Linear or is_transformers_conv1d(module)


def _has_bias(module: nn.Module) -> bool:
    return getattr(module, "bias", None) is not None


def _matrix(module: nn.Module, difference: Tensor) -> Tensor:
    """[out, in], as PEFT multiplies its factors; of an embedding [dimension, entries]."""
    if is_transformers_conv1d(module) or isinstance(module, nn.Embedding):
        return difference.T
    return difference.flatten(1)


def _state(name: str, module: nn.Module, tuned: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state of a module of the base with what was trained in it."""
    ours = {id(parameter): tuned[key] for key, parameter in model.named_parameters() if key in tuned}
    by_alias = {
        key: ours[id(parameter)]
        for key, parameter in module.named_parameters(remove_duplicate=False)
        if id(parameter) in ours
    }
    return {key: by_alias.get(key, tuned.get(f"{name}.{key}", tensor)) for key, tensor in module.state_dict().items()}


def _peft_tensors(modules: Mapping[str, nn.Module], adapter: Adapter) -> dict[str, Tensor]:
    """Under the names that PEFT documents for its files (docs: "PEFT checkpoint format")."""
    found: dict[str, Tensor] = {}
    for name, one in adapter.factors.items():
        module, prefix = modules[name], f"base_model.model.{name}"
        if isinstance(module, nn.Embedding):
            found |= {f"{prefix}.lora_embedding_A": one.a, f"{prefix}.lora_embedding_B": one.b}
            continue
        a, b = one.a, one.b
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            a = a.reshape(one.rank, *module.weight.shape[1:])
            b = b.reshape(*b.shape, *(1 for _ in module.kernel_size))
        found |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
        if name in adapter.biases:
            found[f"{prefix}.lora_B.bias"] = adapter.biases[name].float()
    for name, state in adapter.whole.items():
        found |= {f"base_model.model.{name}.{key}": tensor for key, tensor in state.items()}
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in found.items()
    }
