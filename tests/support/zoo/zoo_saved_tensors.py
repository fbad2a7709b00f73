"""Hooks on saved tensors that hand back copies: on the host, on disk, in other formats; alone and with checkpoints."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from zoo_registry import Built, entry, images


def in_place_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(8, 6), nn.ReLU(inplace=True), nn.Linear(6, 6), nn.Dropout(0.2), nn.ReLU(inplace=True), nn.Linear(6, 3)
    )


def cloned() -> AbstractContextManager:
    return saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone())


def copied_into_fresh_memory() -> AbstractContextManager:
    def unpack(t: Tensor) -> Tensor:
        return torch.empty_like(t).copy_(t)  # written once already: its version is 1

    return saved_tensors_hooks(lambda t: t.detach().clone(), unpack)


def on_disk() -> AbstractContextManager:
    def pack(t: Tensor) -> bytes:
        buffer = io.BytesIO()
        torch.save(t.detach(), buffer)
        return buffer.getvalue()

    return saved_tensors_hooks(pack, lambda data: torch.load(io.BytesIO(data)))


def as_numbers() -> AbstractContextManager:
    def unpack(packed: tuple) -> Tensor:
        array, like = packed
        return torch.from_numpy(array.copy()).to(like)

    return saved_tensors_hooks(lambda t: (t.detach().numpy().copy(), t.dtype), unpack)


def pooled() -> AbstractContextManager:
    """One slab of memory that every tensor is copied into: all that is handed back are views of it."""
    slab, used = torch.zeros(20000, dtype=torch.float64), 0

    def pack(t: Tensor) -> tuple[int, torch.Size, torch.dtype]:
        nonlocal used
        start, used = used, used + t.numel()
        slab[start:used] = t.detach().flatten()
        return start, t.shape, t.dtype

    def unpack(packed: tuple[int, torch.Size, torch.dtype]) -> Tensor:
        start, shape, dtype = packed
        return slab[start : start + shape.numel()].view(shape).to(dtype)

    return saved_tensors_hooks(pack, unpack)


class Under(nn.Module):
    """A net under hooks on saved tensors, its parts checkpointed if `reentrant` is not None."""

    def __init__(self, hooks: Callable[[], AbstractContextManager], net: nn.Module, *, reentrant: bool | None = None):
        super().__init__()
        self.front, self.net, self.hooks, self.reentrant = nn.Linear(8, 8), net, hooks, reentrant

    def forward(self, x: Tensor) -> Tensor:
        with self.hooks():
            x = self.front(x)
            return self.net(x) if self.reentrant is None else checkpoint(self.net, x, use_reentrant=self.reentrant)


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def sequences(hooks: Callable[[], AbstractContextManager], *, reentrant: bool | None = None) -> Built:
    return Under(hooks, in_place_net(), reentrant=reentrant), squares, (torch.randn(5, 3, 8),)


@entry()
def saved_as_clones() -> Built:
    return sequences(cloned)


@entry()
def saved_in_fresh_memory() -> Built:
    return sequences(copied_into_fresh_memory)


@entry()
def saved_on_disk() -> Built:
    return sequences(on_disk)


@entry()
def saved_as_arrays() -> Built:
    return sequences(as_numbers)


@entry()
def saved_in_one_slab() -> Built:
    return sequences(pooled)


@entry()
def saved_on_the_host() -> Built:
    return sequences(lambda: save_on_cpu(pin_memory=False))


@entry()
def saved_on_the_pinned_host() -> Built:
    return sequences(lambda: save_on_cpu(pin_memory=True))


@entry()
def saved_on_disk_and_checkpointed() -> Built:
    return sequences(on_disk, reentrant=False)


@entry()
def saved_in_fresh_memory_and_checkpointed_reentrantly() -> Built:
    return sequences(copied_into_fresh_memory, reentrant=True)


@entry()
def saved_on_the_pinned_host_and_checkpointed_reentrantly() -> Built:
    return sequences(lambda: save_on_cpu(pin_memory=True), reentrant=True)


@entry()
def hooks_within_a_checkpoint() -> Built:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = in_place_net()

        def forward(self, x: Tensor) -> Tensor:
            with copied_into_fresh_memory():
                return self.net(x)

    return Under(nullcontext, Part(), reentrant=False), squares, (torch.randn(5, 3, 8),)


@entry()
def hooks_within_hooks() -> Built:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = in_place_net()

        def forward(self, x: Tensor) -> Tensor:
            with on_disk():
                return self.net(x)

    return Under(lambda: save_on_cpu(pin_memory=True), Part()), squares, (torch.randn(5, 3, 8),)


@entry()
def convolutions_saved_in_fresh_memory() -> Built:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.ConvTranspose2d(4, 4, 2), nn.ReLU(inplace=True), nn.Flatten(2)
    )

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.out = net, nn.Linear(49, 3)

        def forward(self, x: Tensor) -> Tensor:
            with copied_into_fresh_memory():
                return self.out(self.net(x))

    return Model(), squares, (images(),)


@entry()
def torch_s_offload_wrapper() -> Built:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper

    net = nn.Sequential(nn.Linear(8, 8), offload_wrapper(in_place_net()), checkpoint_wrapper(nn.Linear(3, 3)))
    return net, squares, (torch.randn(5, 3, 8),)


@entry()
def reused_layer_saved_on_disk() -> Built:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            with on_disk():
                for _ in range(3):
                    x = torch.tanh(self.step(x))
                return self.out(x)

    return Model(), squares, (torch.randn(5, 8),)


@entry()
def saved_tensors_that_may_be_read_once() -> Built:
    """Hooks that free what they hold once it was handed back, as an offloader does."""

    def once() -> AbstractContextManager:
        def unpack(held: list[Tensor]) -> Tensor:
            return held.pop().clone()

        return saved_tensors_hooks(lambda t: [t.detach().clone()], unpack)

    return sequences(once)


@entry()
def penalised_and_saved_in_fresh_memory() -> Built:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        with copied_into_fresh_memory():
            output = model(x).square().mean()
        (slope,) = torch.autograd.grad(output, x, create_graph=True)
        return output + slope.square().sum()

    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)), loss, (torch.randn(5, 8),)
