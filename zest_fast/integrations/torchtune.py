"""A component of torchtune's configurations: a model of which only the chosen layers train, in its full recipes.

    model:
      _component_: zest_fast.integrations.torchtune.trained_layers
      builder: torchtune.models.llama3_2.llama3_2_1b
      layers: [layers.7.mlp.w2, layers.9.attn.output_proj]

The recipe's checkpointer writes the whole model as it does without; its HF checkpointer a folder for from_pretrained.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from zest_fast.finetuning.trainable_layers import chosen_layers, head_layers
from zest_fast.foundation.nearest import some
from zest_fast.integrations.exports import selected
from zest_fast.integrations.tool_settings import warn_untested


def trained_layers(
    builder: str | Callable[..., nn.Module], layers: Iterable[str], head: str | None = None, **arguments: Any
) -> nn.Module:
    """The model of a builder, with everything frozen but these layers. Autograd then ends at the lowest of them.

    Args:
        builder: the builder, or its path as a recipe's `_component_` has it.
        layers: names as in a profile of that builder's model (torchtune's names are not those of transformers).
        head: a module that trains whole, such as that of a classifier.
        **arguments: of the builder.

    Returns:
        The model. The recipe puts the weights of its checkpoint in afterwards, so there is nothing to verify yet.

    Raises:
        ValueError: a builder or layers that are not there, or a builder that adapts or quantises as well.

    Examples:
        >>> from torch import nn
        >>> from zest_fast.integrations.torchtune import trained_layers
        >>> model = trained_layers("torch.nn.Bilinear", ["weight"], in1_features=2, in2_features=2, out_features=1)
        >>> all(parameter.requires_grad for parameter in model.parameters())
        True
    """
    warn_untested("torchtune")
    model = (_found(builder) if isinstance(builder, str) else builder)(**arguments)
    added = [name for name, _ in model.named_parameters() if "lora_" in name or name.endswith(".magnitude")]
    if added:
        raise ValueError(
            f"builder: {builder} adds adapters ({some(added, 1)}), and layers says what trains too; take that of "
            "the plain model, or leave out trained_layers"
        )
    parts = (*chosen_layers(model, selected(layers, None)), *head_layers(model, head))
    chosen = {id(parameter) for part in parts for parameter in part.parameters}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    return model


def _found(path: str) -> Callable[..., nn.Module]:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"builder: {path!r} cannot be imported ({error})") from error
