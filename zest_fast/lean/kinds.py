"""Which modules can be lean, and what makes them so: one entry for each kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from zest_fast.lean import activation, batch_norm, convolution, dropout, gated, linear, loss, norm
from zest_fast.lean.forward import LeanForward


class Kind(NamedTuple):
    """forwards: the lean forwards that make a module of this kind lean, its own first; or why it is left plain."""

    name: str
    is_one: Callable[[nn.Module], bool]
    forwards: Callable[[nn.Module], list[LeanForward] | str]


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of this module; None for modules that no lean function is known for."""
    return next((kind for kind in KINDS if kind.is_one(module)), None)


def _of_class(
    name: str,
    classes: tuple[type[nn.Module], ...],
    lean: Callable[[nn.Module], LeanForward],
    obstacle: Callable[[nn.Module], str] = lambda module: "",
) -> Kind:
    """A kind that is known by its class, subclasses with a forward of their own excepted."""

    def forwards(module: nn.Module) -> list[LeanForward] | str:
        if not any(type(module).forward is own.forward for own in classes):
            return f"its class {type(module).__name__} has a forward of its own"
        if "weight" not in module._parameters and ("weight" in vars(module) or hasattr(type(module), "weight")):
            # Not read: a parametrisation may take a step then, as a spectral norm does.
            return "its weight is no parameter but computed from others"
        return obstacle(module) or [lean(module)]

    return Kind(name, lambda module: isinstance(module, classes), forwards)


def _by(lean: Callable[[Any, Tensor], Tensor]) -> Callable[[nn.Module], LeanForward]:
    return lambda module: LeanForward(module, lean)


def _run_again(module: nn.Module) -> list[LeanForward] | str:
    sizes = norm.element_sizes(module)
    return sizes if isinstance(sizes, str) else [LeanForward(module, norm.lean_of(module), sizes)]


def _gated(module: nn.Module) -> list[LeanForward] | str:
    return gated.obstacle(module) or [LeanForward(module, gated.multiply_gated)]


def _language_model(module: nn.Module) -> list[LeanForward] | str:
    head = loss.head_of(module)
    assert head is not None
    return loss.obstacle(module, head) or [
        loss.LeanLanguageModel(module),
        loss.LeanHead(head, linear.multiply),
    ]


KINDS: tuple[Kind, ...] = (
    _of_class("convolution", convolution.CLASSES, _by(convolution.convolve), convolution.obstacle),
    _of_class("batch norm", batch_norm.CLASSES, _by(batch_norm.normalise), batch_norm.obstacle),
    _of_class("activation", activation.CLASSES, _by(activation.activate)),
    _of_class("dropout", dropout.CLASSES, _by(dropout.drop), dropout.obstacle),
    _of_class("linear under autocast", linear.CLASSES, linear.LeanLinear),
    Kind("norm", norm.is_norm, _run_again),
    Kind("activation of several operations", norm.is_activation, _run_again),
    Kind("gated block", lambda module: gated.form_of(module) is not None, _gated),
    Kind("loss over chunks", lambda module: loss.head_of(module) is not None, _language_model),
)
