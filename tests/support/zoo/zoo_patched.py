"""What stands between a layer and its formula: patched functions, modes, hooks of all modules, hooks on gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as module_globals
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from zoo_registry import Built, entry, images, mean_square


def net(*, out: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, out))


def within(make_context: Callable[[], AbstractContextManager], *, shape: tuple[int, ...] = (5, 8)) -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        with make_context():
            return mean_square(model, x)

    return net(), loss, (torch.randn(shape),)


@contextmanager
def replaced(owner: object, name: str, by: Callable) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: by(original, *args, **kwargs))
    try:
        yield
    finally:
        setattr(owner, name, original)


@entry()
def forward_patched_on_the_class() -> Built:
    # As a library of adapters does it: the input is scaled on its way in.
    return within(lambda: replaced(nn.Linear, "forward", lambda original, self, x: original(self, 1.5 * x)))


@entry()
def forward_patched_to_normalise_the_weight() -> Built:
    def forward(original: Callable, self: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True), self.bias)

    return within(lambda: replaced(nn.Linear, "forward", forward), shape=(5, 3, 8))


@entry()
def linear_function_patched() -> Built:
    return within(lambda: replaced(F, "linear", lambda original, x, w, b=None: original(x, 1.1 * w.sin(), b)))


@entry()
def conv2d_function_patched() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        with replaced(
            F, "conv2d", lambda original, x, w, *rest: original(x, w - w.mean((1, 2, 3), keepdim=True), *rest)
        ):
            return mean_square(model, x)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    return model, loss, (images(),)


class OverLinear(TorchFunctionMode):
    """Replaces F.linear."""

    def __init__(self, by: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> None:
        super().__init__()
        self.by = by

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear:
            return self.by(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


@entry()
def function_mode_that_scales_the_result() -> Built:
    return within(lambda: OverLinear(lambda x, w, b=None: 1.1 * F.linear(x, w, b)))


@entry()
def function_mode_that_rounds_weights() -> Built:
    def rounded(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return F.linear(x, w + ((w * 8).round() / 8 - w).detach(), b)

    return within(lambda: OverLinear(rounded), shape=(5, 3, 8))


@entry()
def function_mode_that_transforms_weights() -> Built:
    return within(lambda: OverLinear(lambda x, w, b=None: F.linear(x, torch.tanh(2 * w), b)))


@entry()
def function_mode_that_only_looks() -> Built:
    return within(lambda: OverLinear(F.linear), shape=(5, 3, 8))


class OverProducts(TorchDispatchMode):
    """Changes the results of matrix products below autograd, which does not notice."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return 1.1 * result if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) else result


@entry()
def dispatch_mode_that_changes_products() -> Built:
    return within(OverProducts)


@contextmanager
def installed(register: Callable, hook: Callable) -> Iterator[None]:
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


@entry()
def hook_of_all_modules_that_replaces_outputs() -> Built:
    def doubled(module: nn.Module, args: tuple, y: Tensor) -> Tensor | None:
        return 2 * y if isinstance(module, nn.Linear) else None

    return within(lambda: installed(module_globals.register_module_forward_hook, doubled))


@entry()
def hook_of_all_modules_that_replaces_inputs() -> Built:
    def squared(module: nn.Module, args: tuple) -> tuple | None:
        return (args[0] * args[0].abs(),) if isinstance(module, nn.Linear) else None

    return within(lambda: installed(module_globals.register_module_forward_pre_hook, squared), shape=(5, 3, 8))


@entry()
def hook_of_all_modules_that_overwrites_outputs() -> Built:
    def overwritten(module: nn.Module, args: tuple, y: Tensor) -> Tensor | None:
        return y.mul_(0.5).add_(1) if isinstance(module, nn.Linear) else None

    return within(lambda: installed(module_globals.register_module_forward_hook, overwritten))


@entry()
def pre_hook_that_changes_the_weight_s_input_twice() -> Built:
    model = net()
    model[2].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model[2].register_forward_pre_hook(lambda module, args, kwargs: ((), {"input": args[0] + 1}), with_kwargs=True)
    return model, mean_square, (torch.randn(5, 8),)


@entry()
def backward_hook_that_changes_gradients() -> Built:
    model = net()
    model[2].register_full_backward_hook(lambda module, grad_input, grad_output: (3 * grad_input[0],))
    model[1].register_full_backward_hook(lambda module, grad_input, grad_output: (grad_input[0].clamp(-1e-2, 1e-2),))
    return model, mean_square, (torch.randn(5, 3, 8),)


@entry()
def backward_pre_hook_that_changes_gradients() -> Built:
    model = net()
    model[2].register_full_backward_pre_hook(lambda module, grad_output: (grad_output[0] * grad_output[0].sign(),))
    return model, mean_square, (torch.randn(5, 3, 8),)


@entry()
def layer_whose_output_has_several_hooks() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y.register_hook(lambda g: 2 * g)
            y.register_hook(lambda g: g + 0.01)
            z = self.b(torch.tanh(y))
            z.register_hook(lambda g: g.sign() * 0.02)
            return self.out(z)

    return Model(), mean_square, (torch.randn(5, 3, 8),)


class NodeHooked(nn.Module):
    """Hooks that the user puts on the graph node of an output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.front, self.layer, self.out = nn.Linear(8, 6), layer, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(torch.tanh(self.front(x)))
        y.grad_fn.register_prehook(lambda grads: (2 * grads[0],))
        return self.out(torch.tanh(y))


@entry()
def pre_hook_on_the_graph_node() -> Built:
    return NodeHooked(nn.Linear(6, 6)), mean_square, (torch.randn(5, 8),)


@entry()
def pre_hook_on_the_graph_node_of_a_view() -> Built:
    return NodeHooked(nn.Linear(6, 6)), mean_square, (torch.randn(5, 3, 8),)


@entry()
def pre_hook_on_the_graph_node_of_a_convolution() -> Built:
    return NodeHooked(nn.Conv1d(3, 3, 3, padding=1)), mean_square, (torch.randn(5, 3, 8),)


@entry()
def reversed_gradient() -> Built:
    # Domain-adversarial training: gradients change their sign between the features and the second head.
    class Reverse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx, g: Tensor) -> Tensor:
            return -0.5 * g

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.label, self.domain = nn.Linear(8, 6), nn.Linear(6, 3), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            z = self.features(x)
            return torch.cat([self.label(torch.tanh(z)), self.domain(Reverse.apply(z).relu())], -1)

    return Model(), mean_square, (torch.randn(5, 8),)


class Fickle(nn.Parameter):
    """A weight that has its own idea of a linear layer."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if function is F.linear:
                return function(args[0], args[1].sin(), *args[2:])
            return function(*args, **(kwargs or {}))


@entry()
def weight_of_a_class_of_its_own() -> Built:
    model = net()
    model[2].weight = Fickle(model[2].weight.detach())
    return model, mean_square, (torch.randn(5, 8),)


class Loud(Tensor):
    """An input that has its own idea of a linear layer, and is handed on."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        return result * 1.5 if function is F.linear else result


@entry()
def input_of_a_class_of_its_own() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return mean_square(model, x.as_subclass(Loud)).as_subclass(Tensor)

    return net(), loss, (torch.randn(5, 8),)


@entry()
def linear_whose_class_changes() -> Built:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        model[2].__class__ = Scaled
        try:
            return mean_square(model, x)
        finally:
            model[2].__class__ = nn.Linear

    return net(), loss, (torch.randn(5, 8),)


@entry()
def linear_whose_call_is_replaced() -> Built:
    class Called(nn.Linear):
        def __call__(self, x: Tensor) -> Tensor:
            return 2 * super().__call__(torch.tanh(x))

    return nn.Sequential(Called(8, 6), Called(6, 6), nn.Linear(6, 3)), mean_square, (torch.randn(5, 8),)


@entry()
def forward_replaced_on_the_instance_within_the_loss() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        layer = model[2]
        layer.forward = lambda x: F.linear(x, layer.weight.tanh(), layer.bias)
        try:
            return mean_square(model, x)
        finally:
            del layer.forward

    return net(), loss, (torch.randn(5, 8),)
