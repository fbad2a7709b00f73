"""Which processes share a model and its batch, read off the model: or by name what is not known here."""

from __future__ import annotations

import sys
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zest_fast.foundation.torch_private import (
    fsdp_accumulates,
    fsdp_divides_by,
    fsdp_gathered,
    fsdp_groups,
    fsdp_parameters,
    fsdp_takes_unused,
)
from zest_fast.profiling.processes.local import is_distributed

DDP, FSDP2, TENSOR_PARALLEL = "DistributedDataParallel", "FSDP2", "tensor parallel"


@dataclass(frozen=True)
class Layout:
    """How a model lies on several processes."""

    kind: str
    """One of the names above."""
    ranks: tuple[int, ...]
    """Of all processes that share the model, global ones."""
    group: Any
    """The process group over which DDP reduces gradients; None elsewhere."""
    share: float
    """What the gradient of the global batch is made of: the sum over processes of their own, times this."""
    name: str = ""
    """What a note calls it."""
    units: list[nn.Module] = field(default_factory=list)
    """Modules that were given to ``fully_shard``."""
    takes_unused: bool = False
    """Whether FSDP2 was told that a process may leave parameters unused."""

    @property
    def splits_the_batch(self) -> bool:
        """Whether each process has a batch of its own, and not the same one."""
        return self.kind != TENSOR_PARALLEL

    @property
    def note(self) -> str:
        """What a table says of the processes whose figures it has."""
        what, count = "of the global batch, " if self.splits_the_batch else "", len(self.ranks)
        return f"{what}on {count} process{'es' if count > 1 else ''} ({self.name})"

    @property
    def groups(self) -> list[Any]:
        """Of FSDP2."""
        return [group for unit in self.units for group in fsdp_groups(unit)]


def layout_of(model: nn.Module, modules: dict[str, nn.Module], *, accumulates: bool = False) -> Layout | None:
    """How the model lies on processes; None where it lies on this one alone.

    Args:
        model: in its DistributedDataParallel, if it is in one.
        modules: those of the model inside, by name.
        accumulates: whether FSDP2 may be in the middle of an accumulation of gradients.

    Raises:
        NotImplementedError: a layout of which metrics would be wrong; the message says what to do.
        ValueError: FSDP2 in the middle of an accumulation of gradients.
    """
    _refuse_unknown_wrappers(modules)
    fsdp = sys.modules.get("torch.distributed.fsdp")
    units: list[nn.Module] = []
    if fsdp is not None:
        unit_type: Any = getattr(fsdp, "FSDPModule", ())  # not in torch 2.5
        units = [module for module in modules.values() if isinstance(module, unit_type)]
    distributed = _distributed_parameters(modules)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        if distributed or units:
            raise NotImplementedError(
                "the model is sharded (FSDP2, tensor parallel) inside of a DistributedDataParallel: these two cannot "
                "be profiled together; profile the module inside on its own mesh, or use fully_shard with a mesh of "
                "two dimensions (HSDP)"
            )
        return _ddp(model)
    if units:
        return _fsdp(units, distributed, modules, accumulates)
    return _tensor_parallel(distributed) if distributed else None


def _refuse_unknown_wrappers(modules: dict[str, nn.Module]) -> None:
    """Raises for modules that bring gradients of processes together in ways that are not followed here."""
    first_of_its_kind: dict[type, tuple[str, nn.Module]] = {}
    for name, module in modules.items():
        first_of_its_kind.setdefault(type(module), (name, module))
    for name, module in first_of_its_kind.values():
        where = f"module {name!r}" if name else "the model"
        kinds = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__}
        if any(kind.endswith(".FullyShardedDataParallel") for kind in kinds):
            raise NotImplementedError(
                f"{where} is a FullyShardedDataParallel (FSDP1), whose flat parameters have no layers; shard the model "
                "with fully_shard (FSDP2), or profile it before it is wrapped"
            )
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise NotImplementedError(
                f"{where} is a DistributedDataParallel inside of the model: only the model as a whole can be profiled "
                "over processes; profile it before its parts are wrapped, or wrap the whole"
            )
        if "torch.distributed._composable.replicate.DDP" in kinds:
            raise NotImplementedError(
                f"{where} was given to replicate(), which reduces gradients in hooks of its own; put the model into a "
                "DistributedDataParallel instead"
            )
        if any(kind.startswith("deepspeed.") for kind in kinds):
            raise NotImplementedError(
                f"{where} is a {type(module).__name__} of DeepSpeed, whose gradients are not followed; profile the "
                "module inside (ZeRO-1 and 2; metrics are then of the batch of this process) in a "
                "DistributedDataParallel, or before DeepSpeed gets it"
            )


def _distributed_parameters(modules: dict[str, nn.Module]) -> dict[str, Any]:
    return {
        f"{module_name}.{own_name}" if module_name else own_name: p
        for module_name, module in modules.items()
        for own_name, p in module._parameters.items()
        if p is not None and is_distributed(p)
    }


def _ddp(model: nn.parallel.DistributedDataParallel) -> Layout | None:
    group: Any = model.process_group
    ranks = torch.distributed.get_process_group_ranks(group)
    if len(ranks) == 1:
        return None
    return Layout(DDP, tuple(ranks), group, 1 / len(ranks), name=DDP)


def _fsdp(
    units: list[nn.Module], distributed: dict[str, Any], modules: dict[str, nn.Module], accumulates: bool
) -> Layout:
    groups = [group for unit in units for group in fsdp_groups(unit)]
    for group in groups if not accumulates else ():
        if why := fsdp_accumulates(group):
            raise ValueError(
                f"a group of FSDP2 is in the middle of an accumulation of gradients: {why}; finish the step first, "
                "with the gradients reduced"
            )
    sharded = {id(p): p for group in groups for p in fsdp_parameters(group)}
    # A module that is gathered holds the whole parameter now, and the shard later.
    names = {id(p): name for name, p in distributed.items()}
    gathered = {id(p) for group in groups for p in fsdp_gathered(group)}
    placed: dict[int, Any] = sharded | {id(p): p for p in distributed.values() if id(p) not in gathered}
    mesh = next(iter(placed.values())).device_mesh if placed else None
    for key, p in placed.items():
        name = repr(names.get(key, "of a gathered module"))
        kinds = tuple(type(placement).__name__ for placement in p.placements)
        if key not in sharded or kinds not in {("Shard",), ("Replicate", "Shard")}:
            raise NotImplementedError(
                f"parameter {name} lies on processes as {p.placements}: with FSDP2 only parameters that fully_shard "
                "has spread (one dimension of the mesh, or two with replicas) can be profiled; profile the model "
                "before tensor parallelism is put on it"
            )
        if p.device_mesh != mesh:
            raise NotImplementedError(
                f"parameter {name} lies on {p.device_mesh}, others on {mesh}: a model on several meshes cannot be "
                "profiled; profile its parts, each on its own mesh, with closure="
            )
    if mesh is None:
        raise NotImplementedError("fully_shard was called on modules without parameters; profile the model without it")
    _require_sharded_weights(modules, sharded.keys() | gathered)
    divisors = {fsdp_divides_by(group) for group in groups}
    if len(divisors) > 1:
        raise NotImplementedError(
            f"groups of FSDP2 divide gradients by different numbers ({divisors}): there is no one loss of which they "
            "are gradients; call set_gradient_divide_factor on all of them alike"
        )
    ranks = tuple(mesh.mesh.flatten().tolist())
    (divisor,) = divisors
    return Layout(
        FSDP2,
        ranks,
        None,
        1 / (divisor or len(ranks)),
        name="HSDP" if mesh.ndim == 2 else FSDP2,
        units=units,
        takes_unused=all(map(fsdp_takes_unused, groups)),
    )


def _require_sharded_weights(modules: dict[str, nn.Module], of_groups: Set[int]) -> None:
    """Refuses weights that fully_shard was told to ignore: their gradients are those of one process."""
    for module_name, module in modules.items():
        for own_name, p in module._parameters.items():
            if p is not None and p.dim() >= 2 and id(p) not in of_groups:
                name = f"{module_name}.{own_name}" if module_name else own_name
                raise NotImplementedError(
                    f"parameter {name!r} is not sharded, while others are (ignored_params of fully_shard, or a model "
                    "of which only parts were given to it): FSDP2 does not reduce its gradient over processes; give "
                    "the whole model to fully_shard as well"
                )


def _tensor_parallel(distributed: dict[str, Any]) -> Layout:
    mesh = next(iter(distributed.values())).device_mesh
    for name, p in distributed.items():
        if p.device_mesh != mesh:
            raise NotImplementedError(
                f"parameter {name!r} lies on {p.device_mesh}, others on {mesh}: a model on several meshes cannot be "
                "profiled; profile its parts, each on its own mesh, with closure="
            )
        kinds = [type(placement).__name__ for placement in p.placements]
        if len(kinds) > 1 or kinds[0] not in ("Shard", "Replicate"):
            raise NotImplementedError(
                f"parameter {name!r} lies on processes as {p.placements}: only Shard or Replicate on a mesh of one "
                "dimension can be profiled (data parallelism with it cannot); profile the model before it is "
                "distributed, or on one dimension of the mesh"
            )
    ranks: Sequence[int] = mesh.mesh.flatten().tolist()
    return Layout(TENSOR_PARALLEL, tuple(ranks), None, 1.0, name=TENSOR_PARALLEL)


def is_a_copy(tensor: Tensor) -> bool:
    """Whether what this process holds of a tensor is held, and counted, by another one as well."""
    if not is_distributed(tensor):
        return False
    distributed: Any = tensor
    place = distributed.device_mesh.get_coordinate() or ()
    return any(placement.is_replicate() and at > 0 for placement, at in zip(distributed.placements, place, strict=True))
