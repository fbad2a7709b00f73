"""The cut: a forward pass makes no graph before it uses a weight that trains, whatever asks for one.

Freezing alone lets autograd skip everything below the lowest trained weight, until something makes an activation down
there require a gradient (`enable_input_require_grads()` of transformers, an input of the user). Here modules without
anything that trains run under `no_grad` while nothing trained has been used in the pass, so they save nothing and are
not checkpointed; activations that require a gradient for their own sake are detached on the way. Once a module that
owns a trained weight is entered, everything is plain autograd.

That is decided in every pass from what requires a gradient now, not from a list made once: an adapter that is added
below moves the cut. Where an input of a frozen module does depend on something that trains, the module runs as usual;
a gradient is never lost to a wrong guess.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from zest_fast.finetuning.dependence import tensors_in, trains
from zest_fast.finetuning.first_backward import FirstBackward
from zest_fast.finetuning.modules import compiled_modules, modules_of, upwards
from zest_fast.finetuning.recomputation import is_lost_in_recomputation, non_reentrant
from zest_fast.profiling.nearest import some
from zest_fast.profiling.profile import is_being_profiled


class Cut:
    """Keeps backward above the lowest weight that trains; `remove()` takes it off again.

    owner: the module whose weight is that: the first in registration until a forward pass has shown the order of use. A
    module that is never called, because its parent uses its weight directly (nn.MultiheadAttention.out_proj), counts
    where the parent runs.
    skipped: the outermost modules that ran without a graph in that pass; empty before.

    Modules that are compiled one by one have the cut of freezing inside, without hooks: with them torch.compile would
    not see that the code of one block is that of the next.
    """

    def __init__(
        self,
        model: nn.Module,
        chosen: Mapping[str, nn.Parameter],
        on_compiled: Callable[[frozenset[int]], None] = lambda modules: None,
    ) -> None:
        """chosen: what has to train, by name; a pass in which one does not require a gradient is refused.

        on_compiled: is told the ids of the modules in compiled code, before it first runs.
        """
        self._model = model
        self._open: frozenset[nn.Module] = frozenset()
        self._compiled: frozenset[int] = frozenset()
        self._on_compiled = on_compiled
        self._chosen = dict(chosen)
        self._first_backward = FirstBackward(chosen)
        self._learning, self._warned, self._running, self._below = True, False, False, False
        self._holding: nn.Module | None = None  # the module that turned gradients off
        self._handles: dict[str, list[RemovableHandle]] = {}
        self._plan(_trained(model))
        self._found = {name: model.__dict__[name] for name in _REPLACED if name in model.__dict__}
        self._forward = _Forward(self, model.forward)
        model.forward = self._forward
        model._replicate_for_data_parallel = self._replicate  # type: ignore[method-assign]

    def remove(self) -> None:
        self._unhook(list(self._handles))
        self._first_backward.remove()
        self._forward.cut = None  # whoever has wrapped it meanwhile keeps a plain forward
        if self._model.__dict__.get("forward") is self._forward:
            del self._model.forward
        self._model.__dict__.pop("_replicate_for_data_parallel", None)
        self._model.__dict__.update({name: self._found[name] for name in self._found if name not in vars(self._model)})

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """The forward pass of the model."""
        if not self._applies():
            return forward(*args, **keywords)
        self._first_backward.check()
        self._look_at_what_trains()
        wanting = [tensor for tensor in tensors_in((args, keywords)) if tensor.requires_grad]
        if any(tensor.grad_fn is not None or trains(tensor) for tensor in wanting):
            self._warn_of_inputs_that_train()
            with non_reentrant(self._model):
                return forward(*args, **keywords)
        if wanting:
            args, keywords = _detached((args, keywords))
        if self._learning:  # an earlier pass may have raised
            self._order.clear()
            self._met.clear()
        self._running = self._below = True
        try:
            with non_reentrant(self._model):
                output = forward(*args, **keywords)
        finally:
            self._running = self._below = False
            self._holding = None
            torch.set_grad_enabled(True)  # as it was: hooks do not see a KeyboardInterrupt
        if self._learning:
            self._warn_of_a_constant(output)
        self._learn()
        return output

    def _applies(self) -> bool:
        """Not to nested calls, to recomputation in backward, to functional transforms and to a profile."""
        return (
            not torch.compiler.is_compiling()
            and torch.is_grad_enabled()
            and not self._running
            and torch._C._current_graph_task_id() == -1
            and torch._C._functorch.peek_interpreter_stack() is None
            and not is_being_profiled(self._model)
        )

    def _look_at_what_trains(self) -> None:
        frozen = [name for name, parameter in self._chosen.items() if not parameter.requires_grad]
        if frozen:
            raise RuntimeError(
                f"{frozen[0]!r} was chosen to train and no longer requires a gradient: something froze it after "
                "SelectiveBackward (peft's get_peft_model freezes all but its adapters: call it first); "
                "call .remove() and wrap again, or set requires_grad"
            )
        compiled = compiled_modules(self._model)
        if compiled != self._compiled:
            self._compiled = compiled
            self._on_compiled(compiled)
            self._unhook([name for name in self._handles if id(self._model.get_submodule(name)) in compiled])
        trained = _trained(self._model)
        if len(trained) != len(self._trained) or any(a is not b for a, b in zip(trained, self._trained, strict=True)):
            self._plan(trained)
        hooked = (module for name, module in self._frozen.items() if name in self._handles)
        self._open = frozenset(module for module in hooked if any(map(_has_foreign_code, modules_of(module))))
        for name, module in self._frozen.items():  # the last word on outputs, also after hooks registered later
            if len(module._forward_hooks) > 1 and name in self._handles:
                module._forward_hooks.move_to_end(self._handles[name][1].id)  # type: ignore[attr-defined]

    def _warn_of_inputs_that_train(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"an input of {type(self._model).__name__} was computed from something that trains, so backward runs "
                "on through the whole model to it; detach the input if it should not",
                stacklevel=4,
            )

    def _warn_of_a_constant(self, output: Any) -> None:
        found = [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
        if found and not any(tensor.requires_grad for tensor in found):
            names = some(map(repr, self._chosen))
            warnings.warn(
                f"the output of {type(self._model).__name__} depends on nothing that was chosen ({names}), so there is "
                "no gradient; choose layers on its path",
                stacklevel=4,
            )

    # Hooks, planned for the parameters that train

    def _plan(self, trained: list[nn.Parameter]) -> None:
        """Hook the modules: those that hold one of the `trained` parameters, and those that hold none."""
        self._unhook(list(self._handles))
        self._trained = trained
        ids = {id(parameter) for parameter in trained}
        modules = dict(self._model.named_modules(remove_duplicate=False))
        owners = [name for name, module in modules.items() if not ids.isdisjoint(map(id, module._parameters.values()))]
        holders = {id(modules[place]) for name in owners for place in upwards(name)}
        first = {id(module): name for name, module in reversed(modules.items())}  # of several names
        self._owners = [name for name in owners if first[id(modules[name])] == name]
        self.owner = next(iter(self._owners), "")
        self._order: dict[str, int] = {}  # of first use
        self._frozen: dict[str, nn.Module] = {}
        self.skipped: tuple[str, ...] = ()
        self._met: dict[str, None] = {}  # the outermost below the cut, and the holders of what trains on the way there
        self._learning = True
        for name in first.values():
            if not name or id(modules[name]) in self._compiled:
                continue
            if id(modules[name]) in holders:
                self._hook_holder(name, modules[name])
            else:
                self._hook_frozen(name, modules[name])

    def _hook_holder(self, name: str, module: nn.Module) -> None:
        hook = partial(self._enter_holder, name, name in self._owners)
        self._handles[name] = [module.register_forward_pre_hook(hook, with_kwargs=True)]

    def _hook_frozen(self, name: str, module: nn.Module) -> None:
        self._frozen[name] = module
        self._handles[name] = [
            module.register_forward_pre_hook(partial(self._enter_frozen, name), with_kwargs=True),
            module.register_forward_hook(self._leave_frozen, always_call=True),
        ]

    def _unhook(self, names: list[str]) -> None:
        for name in names:
            for handle in self._handles.pop(name, ()):
                handle.remove()

    def _enter_holder(
        self, name: str, is_owner: bool, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if torch.compiler.is_compiling():
            return None
        if self._running and self._learning:
            self._order.setdefault(name, 1 + len(self._order))
        if not self._below:
            return None
        self._met[name] = None
        if is_owner and not torch.is_grad_enabled() and is_lost_in_recomputation():
            raise RuntimeError(
                f"{name!r} trains and runs inside reentrant checkpointing without an input that requires a gradient, "
                "so it would get none: pass use_reentrant=False to torch.utils.checkpoint.checkpoint"
            )
        found = list(tensors_in((args, keywords)))
        depends = any(trains(tensor) for tensor in found)
        self._below = not (is_owner or depends)
        if depends or not any(tensor.requires_grad for tensor in found):
            return None
        return _detached((args, keywords))

    def _enter_frozen(self, name: str, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or not self._below or not torch.is_grad_enabled():
            return
        if any(trains(tensor) for tensor in tensors_in((args, keywords))):
            self._below = False
            return
        self._met[name] = None
        if module not in self._open:
            self._holding = module
            torch.set_grad_enabled(False)

    def _leave_frozen(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if torch.compiler.is_compiling():
            return None
        if module in self._open and self._below and torch.is_grad_enabled():
            return self._leave_open(output)
        if self._holding is not module:
            return None
        self._holding = None
        torch.set_grad_enabled(True)
        # A view that was made without gradients may not be changed in place by something that has one.
        if any(tensor.requires_grad or tensor._is_view() for tensor in tensors_in(output)):
            return _detached(output)
        return None

    def _leave_open(self, output: Any) -> Any:
        """What hooks or another forward of the user's may have brought in trains, or is detached."""
        found = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
        if any(trains(tensor) for tensor in found):
            self._below = False
            return None
        return _detached(output) if found else None

    def _learn(self) -> None:
        """After the first pass: the cut is known, and hooks that had nothing to do go away."""
        if not self._learning:
            return
        self._learning = False
        if self._owners:
            self.owner = min(self._owners, key=self._position)  # the first in registration where they tie
        self.skipped = tuple(name for name in self._met if name in self._frozen)
        self._unhook([name for name in self._handles if name not in self._met])

    def _position(self, name: str) -> int:
        return next((self._order[place] for place in upwards(name) if place in self._order), 0)  # in the root itself

    def _replicate(self) -> nn.Module:
        """A copy for another device (nn.DataParallel): frozen alike, without the cut, which belongs to one thread."""
        replica = type(self._model)._replicate_for_data_parallel(self._model)
        for name in _REPLACED:
            replica.__dict__.pop(name, None)
        return replica


_REPLACED = ("forward", "_replicate_for_data_parallel")


class _Forward:
    """Stands in for the forward of a model, with its signature; can be copied and pickled with the model.

    A hook could not do: nothing calls it when a KeyboardInterrupt leaves the forward pass.
    """

    def __init__(self, cut: Cut, original: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self.cut: Cut | None = cut
        self._original = original

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        if self.cut is None:
            return self._original(*args, **keywords)
        return self.cut.run(self._original, args, keywords)


def remove_copied_cut(model: nn.Module) -> None:
    """Of a model that is not wrapped itself, but a copy of one that is."""
    copied = vars(model).get("forward")
    if isinstance(copied, _Forward) and copied.cut is not None:
        copied.cut.remove()


def _trained(model: nn.Module) -> list[nn.Parameter]:
    """What requires a gradient, in a fixed order."""
    return [
        parameter
        for module in modules_of(model)
        for parameter in module._parameters.values()
        if parameter is not None and parameter.requires_grad
    ]


def _has_foreign_code(module: nn.Module) -> bool:
    """Whether hooks or a forward that are not ours run with it, and may use what trains elsewhere."""
    own = module.__dict__  # this runs for every module in every pass
    before, after, forward = own["_forward_pre_hooks"], own["_forward_hooks"], own.get("forward")
    if not before and not after and forward is None:
        return False
    run = [*before.values(), *after.values(), *(() if forward is None else (forward,))]
    return not all(map(_is_ours, run))


def _is_ours(code: Any) -> bool:
    while isinstance(code, partial):
        code = code.func
    place = getattr(code, "__module__", None) or type(code).__module__
    return str(place).startswith("zest_fast.")


def _detached(values: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, values)
