"""Frozen-aware saving: modules above the cut keep only what the gradient of their input needs.

What torch keeps is for the gradients of weights as well, which frozen modules do not have. One file for each kind:
convolution, batch_norm, activation, dropout, linear, norm, gated, loss.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn

from zest_fast.foundation.nearest import nearest
from zest_fast.foundation.removable import Removable
from zest_fast.lean.forward import LeanForward, owns_trainable
from zest_fast.lean.kinds import kind_of


class LeanHandle(Removable):
    """What `apply_lean` did. `.remove()`, or the end of a `with` block, undoes it.

    applied: kind -> names of the modules that keep less. skipped: name -> why that module is left plain.
    """

    def __init__(self) -> None:
        self.applied: dict[str, tuple[str, ...]] = {}
        self.skipped: dict[str, str] = {}
        self._forwards: list[LeanForward] = []

    def remove(self) -> None:
        """Give every module its plain forward back. A second call does nothing."""
        while self._forwards:
            self._forwards.pop().remove()

    def __str__(self) -> str:
        kinds = ", ".join(f"{len(names)} {kind}" for kind, names in self.applied.items())
        reasons: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            if reason == _TRAINS:
                continue  # which is no news
            reasons.setdefault(reason, []).append(name or "the model")
        lines = [f"lean: {kinds or 'nothing'}"]
        lines += [
            f"  left plain: {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "") + f": {reason}"
            for reason, names in reasons.items()
        ]
        return "\n".join(lines)

    def put_in(self, kind: str, name: str, forwards: Iterable[LeanForward]) -> None:
        """Give the modules of `forwards` these; the first of them is called `name`."""
        for forward in forwards:
            forward.put_in()
            self._forwards.append(forward)
        self.applied[kind] = (*self.applied.get(kind, ()), name)

    def take_out(self, modules: Collection[int]) -> None:
        """Give the modules with these ids their plain forward back: torch.compile decides by itself what to keep."""
        for forward in self._forwards:
            if id(forward.module) in modules:
                forward.remove()

    def follow(self, model: nn.Module) -> None:
        """Go by what trains now: what was left plain for that and is frozen keeps less. What trains runs plainly by
        itself; it is in `skipped` then."""
        modules = dict(model.named_modules())
        trains = {name for name, module in modules.items() if owns_trainable(module)}
        for kind, names in list(self.applied.items()):
            self.skipped |= {name: _TRAINS for name in names if name in trains}
            self.applied[kind] = tuple(name for name in names if name not in trains)
        for name, module in modules.items():
            if self.skipped.get(name) == _TRAINS and name not in trains:
                _apply_to(name, module, set(), self)
                if self.skipped[name] == _TRAINS:
                    del self.skipped[name]
        self.applied = {kind: names for kind, names in self.applied.items() if names}

    def has_put_into(self, module: nn.Module) -> bool:
        return any(forward.module is module for forward in self._forwards)


def apply_lean(model: nn.Module, trainable: Iterable[nn.Parameter | str] | None = None) -> LeanHandle:
    """Let the frozen modules of `model` keep less for the backward pass; losses and gradients stay the same.

    In place, by a forward of the instance: names, types, hooks and state_dict stay, and a copy or a pickle of the model
    is lean too. Values are those of the plain forward, bit for bit but for the loss of a causal language model (1e-6).
    Below the cut, under no_grad and in torch.compile the modules run plainly.

    SelectiveBackward does it by itself (lean=True). A lean copy is made lean anew.

    Args:
        model: whose weights are frozen already where they shall be.
        trainable: the parameters (or their names) that train; None = those that require a gradient. Their modules stay
            plain. A module whose parameter trains later runs plainly from then on.

    Returns:
        A handle: what was applied, what was left plain and why, and `.remove()`, also at the end of a `with` block.

    Raises:
        TypeError: something else than a module.
        ValueError: a name that is no parameter.
        RuntimeError: a model that is lean already. The model is then untouched.

    Examples:
        >>> import zest_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3))
        >>> with zest_fast.apply_lean(model) as lean:
        ...     print(lean.applied, lean.skipped)
        {'activation': ('1',), 'dropout': ('2',)} {'0': 'it trains', '3': 'it trains'}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")
    trains = _trainable(model, trainable)
    lean = {name: vars(module).get("forward") for name, module in model.named_modules()}
    lean = {name: forward for name, forward in lean.items() if isinstance(forward, LeanForward)}
    for name, forward in lean.items():
        if not forward.is_copied:
            raise RuntimeError(f"{name or 'the model'!r} is lean already: call .remove() of the handle that made it so")
    for forward in lean.values():
        forward.remove()
    handle = LeanHandle()
    try:
        _apply(model, trains, handle)
    except BaseException:
        handle.remove()
        raise
    return handle


def _apply(model: nn.Module, trains: set[int], handle: LeanHandle) -> None:
    for name, module in model.named_modules():
        if _is_ligers(module):
            handle.skipped[name] = f"Liger's kernels run it ({type(module).__name__})"
        elif kind_of(module) is not None and not handle.has_put_into(module):
            _apply_to(name, module, trains, handle)


def _apply_to(name: str, module: nn.Module, trains: set[int], handle: LeanHandle) -> None:
    kind = kind_of(module)
    assert kind is not None
    if handle.has_put_into(module):  # and is lean again
        handle.put_in(kind.name, name, ())
        return
    forwards = _why_plain(module, trains) or kind.forwards(module)
    if isinstance(forwards, str):
        handle.skipped[name] = forwards
    else:
        handle.put_in(kind.name, name, forwards)


_TRAINS = "it trains"


def _is_ligers(module: nn.Module) -> bool:
    """Whether Liger-kernel put in its class, the forward of its class, or a forward of this instance alone."""
    forward = vars(module).get("forward", type(module).forward)
    return any(str(getattr(one, "__module__", "")).split(".")[0] == "liger_kernel" for one in (forward, type(module)))


def _why_plain(module: nn.Module, trains: set[int]) -> str:
    """What is in the way of lean saving in a module of any kind; "" if nothing is."""
    if "forward" in vars(module):
        return f"its forward was replaced by {vars(module)['forward']!r:.80}"
    if any(id(parameter) in trains for parameter in module.parameters(recurse=False)):
        return _TRAINS
    return ""


def _trainable(model: nn.Module, trainable: Iterable[nn.Parameter | str] | None) -> set[int]:
    """The ids of the parameters."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if trainable is None:
        return {id(parameter) for parameter in parameters.values() if parameter.requires_grad}
    found = set()
    for one in trainable:
        if isinstance(one, str) and one not in parameters:
            raise ValueError(f"trainable: the model has no parameter {one!r}; {nearest(one, parameters)}")
        found.add(id(parameters[one] if isinstance(one, str) else one))
    return found
