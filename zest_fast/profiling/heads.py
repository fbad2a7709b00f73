"""Which module is the output layer of a model: a classifier, or the head of a language model.

transformers and peft are recognised by what their classes offer, so neither is imported here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def find_head(model: nn.Module) -> str | None:
    """The name, among `model.named_modules()`, of the output layer; None if no module owns a weight.

    A classifier of transformers: its last Linear with `config.num_labels` outputs. A model with output embeddings:
    those. Any other module: its last layer, if that is an nn.Linear. Inside LoRA, the layer that it wraps.
    Raises ValueError when none of this tells.
    """
    inner = unwrap(model)
    head = _language_model_head(inner)
    if head is None and _is_transformers(inner):
        if not is_classifier(inner):
            raise _cannot_tell(model, "it is no classifier and has no output embeddings")
        labels: int = inner.config.num_labels  # type: ignore[assignment, union-attr]
        head = _last_linear(inner, labels)
        if head is None:
            raise _cannot_tell(model, f"no nn.Linear has its config.num_labels = {labels} outputs")
    elif head is None:
        owners = list(_weighted(inner))
        if not owners:
            return None
        head = owners[-1]
        if not isinstance(head, nn.Linear):
            raise _cannot_tell(model, f"its last layer is a {type(head).__name__}, not an nn.Linear")
    return next(name for name, module in model.named_modules() if module is head)


def is_language_model(model: nn.Module) -> bool:
    """Whether the output layer predicts tokens: output embeddings, or a last Linear as large as an embedding."""
    return _language_model_head(unwrap(model)) is not None


def unwrap(model: nn.Module) -> nn.Module:
    """The user's model inside data parallelism, torch.compile and PEFT."""
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif callable(getattr(model, "get_base_model", None)) and hasattr(model, "peft_config"):
            model = model.get_base_model()  # type: ignore[operator]
        else:
            return model


def _language_model_head(model: nn.Module) -> nn.Module | None:
    if _is_transformers(model):
        head = None if is_classifier(model) else model.get_output_embeddings()  # type: ignore[operator]
        return _inside_adapter(head) if isinstance(head, nn.Module) else None
    owners = list(_weighted(model))
    if not owners or not isinstance(owners[-1], nn.Linear):
        return None
    embeddings = (module for module in model.modules() if isinstance(module, nn.Embedding))
    shape = _shape(owners[-1])
    return owners[-1] if shape and any(_shape(table) == shape for table in embeddings) else None


def _shape(module: nn.Module) -> tuple[int, ...]:
    """Of its weight, without computing it: reading a parametrised one takes a step of its power iteration."""
    weight = module._parameters.get("weight", vars(module).get("weight"))
    return () if weight is None else tuple(weight.shape)


def _is_transformers(model: nn.Module) -> bool:
    return hasattr(model, "config") and callable(getattr(model, "get_output_embeddings", None))


def is_classifier(model: nn.Module) -> bool:
    """Whether it is a classifier of transformers."""
    if not _is_transformers(model):
        return False
    return re.search(r"For\w*Classification", type(model).__name__) is not None and hasattr(model.config, "num_labels")


def _last_linear(model: nn.Module, outputs: int) -> nn.Module | None:
    linears = [m for m in _weighted(model) if isinstance(m, nn.Linear) and m.out_features == outputs]
    return linears[-1] if linears else None


def _weighted(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that own a parameter of two or more dimensions, in order; no embeddings, and nothing that LoRA added."""
    modules = list(model.modules())
    added = {
        part
        for adapter in modules
        if isinstance(adapter._modules.get("base_layer"), nn.Module)
        for part in set(adapter.modules()) - set(adapter.base_layer.modules())  # type: ignore[union-attr]
    }
    for module in modules:
        if not module._parameters or module in added or isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            continue
        if any(p is not None and p.dim() > 1 for p in module._parameters.values()):
            yield module


def _inside_adapter(module: nn.Module) -> nn.Module:
    while isinstance(getattr(module, "base_layer", None), nn.Module):
        module = module.base_layer  # type: ignore[assignment]
    return module


def _cannot_tell(model: nn.Module, reason: str) -> ValueError:
    return ValueError(f"cannot tell which layer of {type(model).__name__} is its head: {reason}; pass head=")
