"""The cut: a forward pass makes no graph before it uses a weight that trains, whatever asks for one by the way.

Freezing lets autograd skip everything below the lowest trained weight, until something makes an activation down there
require a gradient for the sake of reentrant checkpointing (`enable_input_require_grads()` of transformers, or a hook of
that kind). Here such marks have no effect during a pass, and transformers checkpoints without re-entering autograd.

All else is plain autograd, in every pass: what requires a gradient because somebody wants it (an input of a physics
loss, a soft prompt, an adapter that was added below, the fast weights of an inner loop) gets it, at the price of a
graph down to there.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from zest_fast.finetuning.dependence import tensors_in, trains
from zest_fast.finetuning.first_backward import FirstBackward
from zest_fast.finetuning.moving_buffers import MovingBuffers
from zest_fast.finetuning.recomputation import is_lost_in_recomputation, non_reentrant, unmarked
from zest_fast.finetuning.walking import compiled_modules, modules_of, upwards
from zest_fast.foundation.nearest import some
from zest_fast.foundation.torch_private import current_task, forward_hooks, innermost_transform
from zest_fast.lean.frozen_norms import end_calls
from zest_fast.prefix.cached_passes import CachedPasses
from zest_fast.prefix.flow import is_ours
from zest_fast.profiling.profile import is_being_profiled


class Cut:
    """Keeps backward above the lowest weight that trains; `remove()` takes it off again.

    owner: the module whose weight is that: the first in registration until a forward pass has shown the order of use. A
    module that is never called, because its parent uses its weight directly (nn.MultiheadAttention.out_proj), counts
    where the parent runs.
    skipped: the outermost modules that made no graph in that pass; empty before.
    compiled: ids of the modules in compiled code, as far as passes have shown them.

    Several threads may run the model at the same time; the first of them shows the order of use.

    Modules that are compiled one by one have the cut of freezing inside, without hooks: with them torch.compile would
    not see that the code of one block is that of the next.
    """

    def __init__(
        self,
        model: nn.Module,
        chosen: Mapping[str, nn.Parameter],
        buffers: MovingBuffers,
        on_compiled: Callable[[frozenset[int]], None] = lambda modules: None,
        cache: CachedPasses | None = None,
    ) -> None:
        """chosen: what has to train, by name; a pass in which one does not require a gradient is refused.

        buffers: sees what each pass moves.

        on_compiled: is told the ids of the modules in compiled code, before it first runs.

        cache: gives passes what is computed below the cut.
        """
        self._cache = cache
        self._model, self._buffers = model, buffers
        self.compiled: frozenset[int] = frozenset()
        self._on_compiled = on_compiled
        self._chosen = dict(chosen)
        self._places = _places(model, chosen)
        self._first_backward = FirstBackward(chosen)
        self._learning, self._warned, self._warned_of_marks = True, False, False
        self._running: set[int] = set()  # threads
        self._learner: int | None = None  # the thread whose pass shows the order of use
        self._below = False  # nothing that requires a gradient has been used in that pass
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

    def follow(self, chosen: Mapping[str, nn.Parameter], cache: CachedPasses | None) -> None:
        """Others train now, whose flags are set already; the next pass shows their order of use."""
        self._cache = cache
        self._chosen = dict(chosen)
        self._places = _places(self._model, chosen)
        self._first_backward.remove()
        self._first_backward = FirstBackward(chosen)
        self._plan(_trained(self._model))

    @property
    def is_running(self) -> bool:
        """Whether a forward pass runs, in any thread."""
        return bool(self._running)

    @property
    def had_a_backward_pass(self) -> bool:
        """Since these train: whether a gradient has arrived at one of them."""
        return self._first_backward.has_come

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """The forward pass of the model."""
        if torch.compiler.is_compiling():
            return forward(*args, **keywords)
        with self._buffers.watched():
            return self._run(forward, args, keywords)

    def _run(self, forward: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if not self._applies():
            return forward(*args, **keywords)
        self._first_backward.check()
        own = self._look_at_what_trains()
        if not self._warned and any(map(trains, tensors_in((args, keywords)))):
            self._warn_of_inputs_that_train()
        thread = get_ident()
        learns = own and self._learning and self._learner is None
        cache = self._cache if own and self._cache is not None and self._cache.serves(self._model) else None
        self._running.add(thread)
        try:
            with non_reentrant(self._model), unmarked():
                if cache is not None and learns:
                    cache.fill(forward, args, keywords)  # before the pass that is learned from, whose calls are noted
                if learns:  # an earlier pass may have raised
                    self._order.clear()
                    self._met.clear()
                    self._learner, self._below = thread, True
                if cache is None:
                    output = forward(*args, **keywords)
                elif learns:
                    output = cache.run_whole(forward, args, keywords)
                else:
                    output = cache.run(forward, args, keywords)
        except BaseException as error:
            if not isinstance(error, Exception):
                end_calls(self._model)  # hooks do not see a KeyboardInterrupt
            raise
        finally:
            self._running.discard(thread)
            if learns:
                self._learner, self._below = None, False
        if learns:
            self._warn_of_a_constant(output)
            self._learn()
        return output

    def _applies(self) -> bool:
        """Not to nested calls, to recomputation in backward, to functional transforms and to a profile."""
        return (
            torch.is_grad_enabled()
            and get_ident() not in self._running
            and current_task() == -1
            and innermost_transform() is None
            and not is_being_profiled(self._model)
        )

    def _look_at_what_trains(self) -> bool:
        """Whether parameters that train are in their places: `torch.func.functional_call` exchanges them for a pass."""
        frozen = [name for name, parameter in self._chosen.items() if not parameter.requires_grad]
        if frozen:
            raise RuntimeError(
                f"{frozen[0]!r} was chosen to train and no longer requires a gradient: something froze it after "
                "SelectiveBackward (peft's get_peft_model freezes all but its adapters: call it first); "
                "call .remove() and wrap again, or set requires_grad"
            )
        compiled = compiled_modules(self._model)
        if compiled != self.compiled:
            self.compiled = compiled
            self._on_compiled(compiled)
            self._unhook([name for name in self._handles if id(self._model.get_submodule(name)) in compiled])
        for module, name in self._places:
            there = module._parameters.get(name)
            if not (isinstance(there, nn.Parameter) and there.requires_grad):  # as those of FSDP2 and of a loaded state
                return False
        trained = _trained(self._model)
        if len(trained) != len(self._trained) or any(a is not b for a, b in zip(trained, self._trained, strict=True)):
            self._plan(trained)
        for name, module in self._frozen.items():  # the last word on outputs, also after hooks registered later
            if len(forward_hooks(module)) > 1 and name in self._handles:
                forward_hooks(module).move_to_end(self._handles[name][1].id)  # type: ignore[attr-defined]
        return True

    def _warn_of_inputs_that_train(self) -> None:
        self._warned = True
        warnings.warn(
            f"an input of {type(self._model).__name__} was computed from something that trains, so backward runs "
            "on through the whole model to it; detach the input if it should not",
            stacklevel=5,
        )

    def _warn_of_a_constant(self, output: Any) -> None:
        found = [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
        if found and not any(tensor.requires_grad for tensor in found):
            names = some(map(repr, self._chosen))
            warnings.warn(
                f"the output of {type(self._model).__name__} depends on nothing that was chosen ({names}), so there is "
                "no gradient; choose layers on its path",
                stacklevel=5,
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
            if not name or id(modules[name]) in self.compiled:
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
            module.register_forward_hook(partial(self._leave_frozen, name)),
        ]

    def _unhook(self, names: list[str]) -> None:
        for name in names:
            for handle in self._handles.pop(name, ()):
                handle.remove()

    def _enter_holder(
        self, name: str, is_owner: bool, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        if torch.compiler.is_compiling():
            return
        if get_ident() not in self._running:
            return
        learns = self._learner == get_ident()
        if learns:
            self._order.setdefault(name, 1 + len(self._order))
            if self._below:
                self._met.setdefault(name)
        if is_owner and not torch.is_grad_enabled() and is_lost_in_recomputation():
            raise RuntimeError(
                f"{name!r} trains and runs inside reentrant checkpointing without an input that requires a gradient, "
                "so it would get none: pass use_reentrant=False to torch.utils.checkpoint.checkpoint"
            )
        if learns and (is_owner or any(tensor.requires_grad for tensor in tensors_in((args, keywords)))):
            self._below = False

    def _enter_frozen(self, name: str, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or self._learner != get_ident() or not self._below:
            return
        if any(tensor.requires_grad for tensor in tensors_in((args, keywords))):
            self._below = False
        else:
            self._met.setdefault(name)

    def _leave_frozen(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if torch.compiler.is_compiling() or get_ident() not in self._running:
            return None
        found = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
        # In this order: of logits that are computed when they are looked at (lean saving), `grad_fn` is such a look.
        marked = found and len(forward_hooks(module)) > 1 and _is_marked_by_hooks(module, args)
        if marked and all(tensor.grad_fn is None for tensor in found):
            self._warn_of_marks(name, module)
            return _detached(output)
        if found and self._learner == get_ident():
            self._below = False
        return None

    def _warn_of_marks(self, name: str, module: nn.Module) -> None:
        strangers = [hook for hook in forward_hooks(module).values() if not is_ours(hook)]
        if self._warned_of_marks or any("make_inputs_require_grad" in _name_of(hook) for hook in strangers):
            return
        self._warned_of_marks = True
        warnings.warn(
            f"a hook makes the output of {name!r}, which is frozen, require a gradient. That is taken for the sake of "
            "gradient checkpointing, which does not need it here, and has no effect: to differentiate with respect to "
            "it, compute it before and give it to the model as an input",
            stacklevel=5,
        )

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


def _places(model: nn.Module, chosen: Iterable[str]) -> list[tuple[nn.Module, str]]:
    """Where the chosen parameters are: the module, and the name in it."""
    parts = (path.rpartition(".") for path in chosen)
    return [(model.get_submodule(owner), name) for owner, _, name in parts]


def _is_marked_by_hooks(module: nn.Module, args: tuple[Any, ...]) -> bool:
    """Whether leaves in its output require a gradient though nothing that it got or holds does."""
    if any(tensor.requires_grad for tensor in tensors_in(args)):
        return False
    return not all(map(is_ours, forward_hooks(module).values()))


def _name_of(code: Any) -> str:
    while isinstance(code, partial):
        code = code.func
    return str(getattr(code, "__qualname__", ""))


def _detached(values: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, values)
