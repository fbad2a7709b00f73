"""The private parts of torch that zest_fast uses, all of them: each with why, and a test that names it when it changes
(tests/foundation/test_torch_private.py). Seen in torch 2.8, 2.13 and 2.15.

A torch that lacks one of them is refused when this file is imported, not in the middle of a pass.

Everything here asks, but for `set_run_backward` and `set_post_accumulate_hooks`, which put something in and back again.
What is asked in every call of a layer is torch's own function under a name of ours, not one of ours around it.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, MutableMapping
from contextlib import AbstractContextManager
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as _calls
from torch.utils.checkpoint import CheckpointFunction

__all__ = [
    "DataDependentOutputException",  # of dry runs: the model looks at values
    "DynamicOutputShapeException",  # of dry runs: a shape depends on values
    "FakeTensor",  # plans are made of them: a shape without data
    "FakeTensorMode",
    "StorageWeakRef",  # keeps the address of a storage from being given to another one
]

Hooks = MutableMapping[int, Callable[..., Any]]

NEEDED = (
    "Tensor._backward_hooks",
    "Tensor._cdata",
    "Tensor._is_view",
    "Tensor._make_wrapper_subclass",
    "Tensor._post_accumulate_grad_hooks",
    "UntypedStorage._cdata",
    "_C.DisableTorchFunctionSubclass",
    "_C._are_functorch_transforms_active",
    "_C._autograd._get_sequence_nr",
    "_C._autograd._top_saved_tensors_default_hooks",
    "_C._current_autograd_node",
    "_C._current_graph_task_id",
    "_C._functorch.is_functorch_wrapped_tensor",
    "_C._functorch.peek_interpreter_stack",
    "_C._get_dispatch_stack_at",
    "_C._get_function_stack_at",
    "_C._is_any_autocast_enabled",
    "_C._len_torch_dispatch_stack",
    "_C._len_torch_function_stack",
    "_C._nn.flatten_dense_tensors",
    "_is_functional_tensor",
    "_neg_view",
    "autograd._engine_run_backward",
    "autograd.forward_ad._current_level",
    "nn.modules.module._global_forward_hooks",
    "optim.Optimizer.profile_hook_step",
)
"""Attributes of torch without which a pass cannot be made. What only some torch has is asked for where it is used."""


def refuse_a_torch_without(names: Iterable[str]) -> None:
    """Raises ImportError that names those attributes of torch which are not there."""
    lacking = [f"torch.{name}" for name in names if not _has(name)]
    if lacking:
        raise ImportError(
            f"torch {torch.__version__} has no {', '.join(lacking)}, which zest_fast needs: install a torch of the "
            "table in docs/versions.md (2.8 to 2.15), or a zest_fast that was made for this one"
        )


def _has(name: str) -> bool:
    try:
        attrgetter(name)(torch)
    except AttributeError:
        return False
    return True


refuse_a_torch_without(NEEDED)

# The backward pass that runs

# The id of the backward pass on this thread, -1 outside of any: what is recomputed in backward is no forward pass.
current_task: Callable[[], int] = torch._C._current_graph_task_id

# The node that backward runs on this thread, or None: what it makes belongs to the module that made the node.
current_node: Callable[[], Any] = torch._C._current_autograd_node

# The number that the next node gets: nodes of backward are told apart by the module that ran when they were made.
next_sequence_number: Callable[[], int] = torch._C._autograd._get_sequence_nr


def sequence_number(node: Any) -> int:
    """The number that a node got in forward."""
    return cast(int, node._sequence_nr())


_autograd: Any = torch.autograd  # as a value: it exports no private name to type checkers


def run_backward() -> Callable[..., Any]:
    """What every call of `backward` and `grad` from Python ends in; a pass must know of passes that are not its own."""
    return cast(Callable[..., Any], _autograd._engine_run_backward)


def set_run_backward(function: Callable[..., Any]) -> None:
    _autograd._engine_run_backward = function


def saved_tensors_are_moved() -> bool:
    """Whether hooks decide what becomes of tensors that autograd saves now: checkpointing, offloading."""
    return saved_tensors_hooks() is not None


def saved_tensors_hooks() -> Any:
    """The innermost hooks on saved tensors that are active, else None: a region of non-reentrant checkpointing has its
    own, and nothing public says that one is active."""
    found = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if found is None else found[0]


def inputs_of_checkpoint() -> tuple[bool, ...] | None:
    """Inside of reentrant checkpointing which of its inputs need a gradient, else None: nothing public says so.

    Looks for the frame of its forward among those that run.
    """
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is CheckpointFunction.forward.__code__:
            return tuple(frame.f_locals["ctx"].needs_input_grad)
    return None


_of_a_step = torch.optim.Optimizer.profile_hook_step(lambda optimizer: None).__code__


def steps_around() -> list[torch.optim.Optimizer]:
    """The optimizers of which a call of `step` runs, as seen from a step hook, the innermost first: that of a derived
    class and that of its base class both run the hooks, and so does an optimizer that another one steps. Nothing public
    tells the one step that they are.
    """
    frame, found = sys._getframe(1), []
    while frame is not None:
        if frame.f_code is _of_a_step:
            found.append(frame.f_locals["self"])
        frame = frame.f_back  # type: ignore[assignment]
    return found


# Modes, transforms and derivatives that stand between a module and its kernels

# Whether torch.func (vmap, grad, jvp) is at work on this thread: it wants plain operators, which it can differentiate.
transforms_are_active: Callable[[], bool] = torch._C._are_functorch_transforms_active

# The innermost of its interpreters, or None.
innermost_transform: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack

# Whether a tensor stands for others inside of it, and has no memory of its own.
is_transform_wrapper: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor

# Whether autocast is on for any device: the public question is asked device by device, in every call of a Linear.
is_any_autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled

# Within it a tensor subclass is not asked what to do: __torch_function__ of a subclass may use the tensor itself.
without_torch_function: Callable[[], AbstractContextManager[Any]] = torch._C.DisableTorchFunctionSubclass

_OWN_MODES = ("torch", "zest_fast")  # modes of these packages watch, place or fake tensors, and leave values alone
_forward_mode: Any = sys.modules["torch.autograd.forward_ad"]


def forward_mode_is_on() -> bool:
    """Whether forward-mode derivatives are taken: autograd functions without a jvp have none."""
    return bool(_forward_mode._current_level >= 0)


def is_transformed(x: Tensor) -> bool:
    """Whether a tensor stands for others, inside of `torch.func` (vmap, grad, jvp) or forward-mode derivatives."""
    return is_transform_wrapper(x) or (
        _forward_mode._current_level >= 0 and _forward_mode.unpack_dual(x).tangent is not None
    )


def is_altered() -> bool:
    """Whether a mode that is not torch's own stands between a module and its kernels, or a hook on all modules."""
    if _calls._global_forward_hooks:
        return True
    if not (torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack()):
        return False
    modes: list[object] = [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]
    modes += [torch._C._get_dispatch_stack_at(i) for i in range(torch._C._len_torch_dispatch_stack())]
    return any(type(mode).__module__.partition(".")[0] not in _OWN_MODES for mode in modes)


def compiler_is_loaded() -> bool:
    """Whether anything can have been compiled; importing the compiler to ask would cost a second for nothing."""
    return "torch._dynamo" in sys.modules


def is_compiled_in_place(module: nn.Module) -> bool:
    """Whether `module.compile()` was called: its code misses hooks that are put on later."""
    return getattr(module, "_compiled_call_impl", None) is not None


# Hooks, which can be put on in public and seen in private only


def forward_hooks(module: nn.Module) -> Hooks:
    """In the order in which they run: ours has to be the first or the last."""
    return module._forward_hooks


def forward_pre_hooks(module: nn.Module) -> Hooks:
    return module._forward_pre_hooks


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether somebody looks at the gradients of a module: they must be those of the plain module then."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def gradient_hooks(tensor: Tensor) -> Hooks | None:
    """Of `tensor.register_hook`: they act on the gradient of a leaf only where it is formed."""
    return tensor._backward_hooks


def post_accumulate_hooks(tensor: Tensor) -> Hooks | None:
    """Of `register_post_accumulate_grad_hook`: an optimizer in backward, which a profile must not run."""
    return tensor._post_accumulate_grad_hooks


def set_post_accumulate_hooks(tensor: Tensor, hooks: Hooks | None) -> None:
    """None alone would take none away: the engine keeps what it was given last, so it gets an empty one before."""
    if hooks is None:
        tensor._post_accumulate_grad_hooks = OrderedDict()
    tensor._post_accumulate_grad_hooks = hooks  # type: ignore[assignment]


def run_first(hooks: Hooks | None, number: int) -> None:
    """Puts one hook of a tensor before the others. The engine walks through the dictionary as it was filled, whatever
    order an OrderedDict has been given since."""
    assert hooks is not None
    others = {key: hook for key, hook in hooks.items() if key != number}
    first = hooks[number]
    hooks.clear()
    hooks[number] = first
    hooks.update(others)


# Tensors and their memory

# Whether a tensor is a view, asked of every output of a layer; `_base` says it of some only.
is_view: Callable[[Tensor], bool] = Tensor._is_view

# Makes a tensor with a shape and no memory, which stands for one that is computed when it is asked for.
make_wrapper_subclass: Callable[..., Any] = Tensor._make_wrapper_subclass


def ragged_dimension(x: Tensor) -> int:
    """Which dimension of a jagged tensor has rows of different lengths."""
    return int(x._ragged_idx)  # type: ignore[attr-defined]


def python_function(node: Any) -> type | None:
    """The autograd function that a node of the graph belongs to, where it is written in Python."""
    return getattr(type(node), "_forward_cls", None)


def tensor_key(tensor: Tensor) -> int:
    """A number for the tensor that Python objects of it share, without holding it."""
    return tensor._cdata


def storage_key(storage: torch.UntypedStorage) -> int:
    """A number for a storage while it lives, whatever its address is: fake ones have none, empty ones share 0."""
    return storage._cdata


def use_counts(tensor: Tensor) -> tuple[int, int]:
    """How many hold the tensor, and its storage, as seen from a dispatch mode.

    The engine adds gradients in place where it alone holds one: a plan must know when that is. To be asked only where
    `use_counts_are_told`; elsewhere a plan takes it that they are not added in place.
    """
    of_storage = torch._C._storage_Use_Count(storage_key(tensor.untyped_storage()))
    return tensor._use_count(), of_storage  # type: ignore[attr-defined]


use_counts_are_told = hasattr(Tensor, "_use_count") and hasattr(torch._C, "_storage_Use_Count")


# A tensor that torch.compile and functionalisation wrap around another one.
is_functional: Callable[[Tensor], bool] = torch._is_functional_tensor

# The same memory with its bit for "negated" turned over: bits are compared where they lie, without a copy.
neg_view: Callable[[Tensor], Tensor] = torch._neg_view

# All values of several tensors, one after another, in one call: flattening hundreds of buffers one by one takes longer
# than copying them. A single tensor is given as it is, not copied.
flattened: Callable[[list[Tensor]], Tensor] = torch._C._nn.flatten_dense_tensors


# What an operator will run


def conv_backends(*names: str) -> tuple[Any, ...]:
    """Those of the ways to run a convolution that this torch knows by these names."""
    known = getattr(torch._C, "_ConvBackend", None)
    return tuple(one for name in names if (one := getattr(known, name, None)) is not None)


# Which of them torch takes for a convolution, or None where it does not tell: only some hold copies.
select_conv_backend: Callable[..., Any] | None = getattr(torch._C, "_select_conv_backend", None)


def called_with_tensors(formula: Callable[..., int]) -> Callable[..., int]:
    """The mark by which FlopCounterMode knows a formula that is called with tensors, not with their shapes."""
    formula._get_raw = True  # type: ignore[attr-defined]
    return formula


# Several processes


def default_store() -> Any:
    """The store by which the processes found each other: messages in it get in the way of no collective."""
    return torch.distributed.distributed_c10d._get_default_store()


def ddp_is_interrupted(model: nn.parallel.DistributedDataParallel) -> bool:
    """Whether the reducer has got gradients, and waits for more: nothing tells before the first one."""
    try:
        model.reducer._check_reducer_finalized()
    except RuntimeError:
        return True
    return False


def reset_ddp(model: nn.parallel.DistributedDataParallel) -> None:
    """Has the reducer forget a backward pass that it waited for."""
    model.reducer._reset_state()


def fsdp_groups(unit: nn.Module) -> list[Any]:
    """What FSDP2 gathers and scatters together of a module that was given to ``fully_shard``."""
    state: Any = unit._get_fsdp_state()  # type: ignore[operator]
    groups = getattr(state, "_fsdp_param_groups", None)  # not in every torch since 2.8
    if groups is None:
        groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
    return list(groups)


def start_fsdp(root: nn.Module) -> None:
    """What the first forward of FSDP2 does once; it reads which parameters require a gradient, and keeps the answer."""
    root._get_fsdp_state()._lazy_init()  # type: ignore[operator]


def fsdp_parameters(group: Any) -> list[Tensor]:
    """The shards of a group, whether or not they are what the modules hold now."""
    return [one.sharded_param for one in group.fsdp_params]


def fsdp_gathered(group: Any) -> list[Tensor]:
    """What stands in the place of shards while a group is gathered: whole parameters, or the shards of fewer processes
    that ``reshard_after_forward=N`` leaves."""
    names = ("_unsharded_param", "_sharded_post_forward_param")
    return [p for one in group.fsdp_params for name in names if (p := getattr(one, name, None)) is not None]


def fsdp_shards(group: Any) -> dict[int, Tensor]:
    """The shards of a group by the id of what stands in their place while it is gathered."""
    names = ("_unsharded_param", "_sharded_post_forward_param")
    return {
        id(p): one.sharded_param
        for one in group.fsdp_params
        for name in names
        if (p := getattr(one, name, None)) is not None
    }


def fsdp_whole(group: Any) -> list[tuple[Tensor, Tensor]]:
    """The shard and the whole parameter of it that autograd sees, for those that have been gathered once."""
    return [
        (one.sharded_param, p) for one in group.fsdp_params if (p := getattr(one, "_unsharded_param", None)) is not None
    ]


def fsdp_unreduced(group: Any) -> list[Tensor]:
    """Gradients that a group keeps to itself, until a backward pass in which it reduces."""
    found = [one.unsharded_accumulated_grad for one in group.fsdp_params]
    found += [p.grad for p in fsdp_gathered(group)]
    found.append(getattr(group, "_partial_reduce_output", None))
    return list({id(gradient): gradient for gradient in found if gradient is not None}.values())


def is_gathered(group: Any) -> bool:
    """Whether the modules hold other parameters now, in the place of shards."""
    return not group.is_sharded


_OF_DTYPES = ("_reduce_dtype", "_orig_dtype", "_fsdp_params_with_wider_grad_dtype")  # the second until 2.13 or 2.14


def fsdp_dtypes(group: Any) -> dict[str, Any]:
    """Of parameters and of reductions, as FSDP2 read them off the parameters that required a gradient."""
    return {name: getattr(group, name) for name in _OF_DTYPES if hasattr(group, name)}


def set_fsdp_dtypes(group: Any, dtypes: dict[str, Any] | None) -> None:
    """Puts them there; None = reads them again."""
    if dtypes is None:
        group._init_mp_dtypes()
    else:
        vars(group).update(dtypes)


def fsdp_accumulates(group: Any) -> str:
    """Why the next gradient of a group would not be that of one pass alone; empty where it would."""
    if not group.reduce_grads or not group.all_reduce_grads:
        return "its gradients are not reduced now (set_requires_gradient_sync or set_requires_all_reduce of False)"
    if (
        getattr(group, "_partial_reduce_output", None) is not None
        or any(one.unsharded_accumulated_grad is not None for one in group.fsdp_params)
        or any(p.grad is not None for p in fsdp_gathered(group))
    ):
        return "it holds gradients of earlier passes that were not reduced (set_requires_gradient_sync(False))"
    return ""


def fsdp_divides_by(group: Any) -> float | None:
    """What sums of gradients are divided by, where somebody has set that; None = by the number of processes."""
    return getattr(group, "gradient_divide_factor", None)


def fsdp_takes_unused(group: Any) -> bool:
    """Whether a group takes zeros for a parameter that a process did not use."""
    return bool(getattr(group, "reduce_scatter_unused_params", False))


def settle_fsdp(root: nn.Module, groups: list[Any]) -> None:
    """Ends a pass that has stopped half-way: shards in their places, and nothing left of its gradients."""
    reset = getattr(root, "reset_iter_state", None)
    if reset is not None:  # not in every torch since 2.8; without it a pass that stopped half-way leaves marks
        reset()
    for group in groups:
        for one in group.fsdp_params:
            if "unsharded_accumulated_grad" in vars(one):  # in torch 2.15 the gradient of what is gathered
                one.unsharded_accumulated_grad = None
        for p in fsdp_gathered(group):
            p.grad = None
