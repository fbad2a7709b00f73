"""The watched model as it is at the beginning of a logged step: its rows, and what cannot be seen of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from zest_fast.foundation.nearest import some
from zest_fast.foundation.torch_private import fsdp_shards, fsdp_unreduced, is_compiled_in_place
from zest_fast.profiling.layers import Layer, LayerSelection, Weight, find_layers, unsupported
from zest_fast.profiling.processes.layout import Layout, layout_of
from zest_fast.profiling.profile import require_usable, unwrapped
from zest_fast.profiling.table import Subject


@dataclass(frozen=True)
class Rows:
    """What is watched in one step."""

    subject: Subject
    layers: tuple[Layer, ...]
    compiled: frozenset[Layer]
    """Those whose module runs in compiled code, which sees no hooks."""
    shards: dict[int, Tensor] = field(default_factory=dict)
    """Of FSDP2 the parameters that train, by the id of what stands in their place while they are gathered."""

    @property
    def weights(self) -> list[Weight]:
        """Every weight of the rows, once."""
        return list({layer.weight: None for layer in self.layers})

    @cached_property  # it is asked for in every backward pass
    def weights_of_the_model(self) -> list[Weight]:
        """Those of all its layers, watched or not."""
        return list({layer.weight: None for layer in self.subject.layers})

    @property
    def parameters_to_step(self) -> set[int]:
        """Ids of the parameters by which the optimizers of this training are known: the weights and what their modules
        hold beside them; where none of these trains, all that does."""
        own = [p for layer in self.layers for p in (layer.weight.parameter, *layer.module.parameters(recurse=False))]
        if not any(p.requires_grad for p in own):
            own += [p for p in self.subject.model.parameters() if p.requires_grad]
        return {id(self.shards.get(id(p), p)) for p in own}


class Target:
    """A model whose layers are watched.

    Args:
        model: as its user calls it: wrapped by DistributedDataParallel or torch.compile, or plain.
        selection: as of ``profile``.
        frozen: whether layers that do not train are rows as well.
    """

    def __init__(self, model: nn.Module, selection: LayerSelection, frozen: bool) -> None:
        self.called = model
        self.model = unwrapped(model)[1]
        self._selection = selection
        if not (selection is None or callable(selection) or isinstance(selection, str | re.Pattern)) and isinstance(
            selection, Iterable
        ):
            self._selection = list(selection)  # a generator, which is asked again at every logged step
        self._frozen = frozen
        self.layout: Layout | None = None
        """How the model lies on several processes; None where it lies on this one alone. Known with the first rows."""
        self._names: list[str] = []
        self._seen: dict[str, nn.Parameter] = {}

    def rows(self) -> Rows:
        """The rows of the first step. Raises what ``select_layers`` and ``profile`` raise."""
        modules = dict(self.model.named_modules())
        self.layout = layout_of(unwrapped(self.called)[0], modules, accumulates=True)
        require_usable(modules)
        rows = self._of(Subject.of(self.model, modules, self._selection))
        if not rows.layers:
            names = some(layer.name for layer in rows.subject.chosen)
            raise ValueError(
                f"layers: none of the chosen layers requires a gradient ({names}); let some train, or pass frozen=True "
                "to watch their outputs and weights"
            )
        self._remember(rows)
        return rows

    def rows_again(self) -> tuple[Rows, list[str]]:
        """The rows of a later step, and what changed since the one before, in words; never raises."""
        rows, why = self._now()
        notes = [f"layers= does not fit the model any more ({why}); watched is what is left of it"] if why else []
        now = {layer.name: layer.weight.parameter for layer in rows.layers}
        gone, new = [n for n in self._seen if n not in now], [n for n in now if n not in self._seen]
        other = [n for n in now if n in self._seen and self._seen[n] is not now[n]]
        changes = (
            (gone, "not watched any more"),
            (new, "watched from this step on"),
            (other, "have other weights now"),
        )
        notes += [
            f"layers that {what if what.startswith('have') else f'are {what}'}: {some(names)} (gone, replaced, frozen "
            "or unfrozen since the last logged step)"
            for names, what in changes
            if names
        ]
        self._remember(rows)
        return rows, notes

    def weights_now(self) -> set[int]:
        """``Rows.parameters_to_step`` as the model is now."""
        return self._now()[0].parameters_to_step

    def _now(self) -> tuple[Rows, str]:
        """The rows as the model is, and why the selection does not fit it, where it does not."""
        modules = dict(self.model.named_modules())
        try:
            return self._of(Subject.of(self.model, modules, self._selection)), ""
        except Exception as error:  # of the user's predicate, too
            layers = find_layers(modules)
            chosen = [one for one in layers if one.name in self._names and not unsupported(one.weight.parameter)]
            trainable = {layer: layer.weight.parameter.requires_grad for layer in chosen}
            return self._of(Subject(self.model, modules, layers, chosen, trainable)), str(error)

    def replaced_since(self, rows: Rows) -> list[Layer]:
        """Rows that do not stand for what is in the model now."""
        now: dict[str, Tensor] = dict(self.model.named_parameters(remove_duplicate=False))
        shards = self._shards()
        found = {name: shards.get(id(p), p) for name, p in now.items()}
        return [layer for layer in rows.layers if found.get(layer.parameter_name) is not layer.weight.parameter]

    def unreduced(self) -> list[Tensor]:
        """Gradients that FSDP2 keeps to itself until it reduces."""
        return [gradient for group in self._groups for gradient in fsdp_unreduced(group)]

    @property
    def note(self) -> str:
        """Of how many processes the figures are; empty where it is this one alone."""
        return "" if self.layout is None else self.layout.note

    @property
    def is_shared_unseen(self) -> bool:
        """Whether there are several processes of which the model itself tells nothing."""
        distributed = torch.distributed
        return (
            self.layout is None
            and not isinstance(unwrapped(self.called)[0], nn.parallel.DistributedDataParallel)
            and distributed.is_available()
            and distributed.is_initialized()
            and distributed.get_world_size() > 1
        )

    def _shards(self) -> dict[int, Tensor]:
        return {key: shard for group in self._groups for key, shard in fsdp_shards(group).items()}

    @property
    def _groups(self) -> list[Any]:
        return self.layout.groups if self.layout is not None else []

    def _of(self, subject: Subject) -> Rows:
        shards: Any = self._shards()
        for layer in subject.layers:  # a gathered module holds the whole parameter, which no optimizer knows
            layer.weight.parameter = shards.get(id(layer.weight.parameter), layer.weight.parameter)
        layers = tuple(layer for layer in subject.chosen if self._frozen or layer.weight.parameter.requires_grad)
        compiled: set[nn.Module] = set()
        for module in self.called.modules():
            if hasattr(module, "_orig_mod") or is_compiled_in_place(module):
                compiled.update(module.modules())
        seen_by_none = frozenset(layer for layer in layers if layer.called_module in compiled)
        return Rows(subject, layers, seen_by_none, shards)

    def _remember(self, rows: Rows) -> None:
        self._names = self._names or [layer.name for layer in rows.subject.chosen]
        self._seen = {layer.name: layer.weight.parameter for layer in rows.layers}
