"""Training loops of every kind, each a function (model, watched or None) that trains and returns its optimizers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import zest_fast

LOOPS = {}


def loop(function):
    LOOPS[function.__name__] = function
    return function


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 12), nn.ReLU(inplace=True), nn.Dropout(0.2), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3)
    )


def batches(count: int, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, size, 6, generator=generator)
    return [(one, one[:, :3].argmax(1)) for one in x]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x).float(), y)


@loop
def plain(model, watched):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for x, y in batches(5):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()
    return [optimizer]


@loop
def accumulated_clipped_and_scheduled(model, watched):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for i, (x, y) in enumerate(batches(9)):
        (loss_of(model, x, y) / 3).backward()
        if i % 3 == 2:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=i % 2 == 0)
    return [optimizer]


@loop
def scaled_with_overflow(model, watched):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for i, (x, y) in enumerate(batches(6)):
        optimizer.zero_grad()
        loss = loss_of(model, x, y) * (float("inf") if i in (0, 3) else 1.0)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    return [optimizer]


@loop
def fused_and_scaled(model, watched):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i, (x, y) in enumerate(batches(4)):
        scaler.scale(loss_of(model, x, y) * (float("inf") if i == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return [optimizer]


@loop
def in_backward(model, watched):
    optimizer = zest_fast.adamw(model.parameters(), lr=1e-2)
    with zest_fast.optimizer_in_backward(optimizer):
        for x, y in batches(4):
            loss_of(model, x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return [optimizer]


@loop
def in_backward_as_torch_has_it(model, watched):
    optimizers = {p: torch.optim.Adam([p], lr=1e-2, foreach=False) for p in model.parameters()}

    def step(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    handles = [p.register_post_accumulate_grad_hook(step) for p in optimizers]
    for x, y in batches(4):
        loss_of(model, x, y).backward()
    for handle in handles:
        handle.remove()
    return list(optimizers.values())


@loop
def two_optimizers(model, watched):
    optimizers = [torch.optim.Adam(model[0].parameters(), lr=1e-2), torch.optim.SGD(model[3:].parameters(), lr=1e-1)]
    for x, y in batches(4):
        loss_of(model, x, y).backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    return optimizers


@loop
def with_a_closure(model, watched):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-1)
    for x, y in batches(4):

        def closure(x=x, y=y) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, x, y)
            loss.backward()
            return loss

        optimizer.step(closure)
    return [optimizer]


@loop
def under_autocast(model, watched):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for x, y in batches(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, x, y)
        loss.backward()
        optimizer.step()
    return [optimizer]


def _checkpointed(reentrant):
    def train(model, watched):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for x, y in batches(4):
            optimizer.zero_grad()
            h = checkpoint(model[:3], x.requires_grad_(), use_reentrant=reentrant)
            loss_of(model[3:], h, y).backward()
            optimizer.step()
        return [optimizer]

    return train


LOOPS["checkpointed_reentrant"] = _checkpointed(True)
LOOPS["checkpointed"] = _checkpointed(False)


@loop
def by_hand(model, watched):
    """An update that is no optimizer's."""
    for x, y in batches(4):
        loss_of(model, x, y).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
        if watched is not None:
            watched.step()
        model.zero_grad()
    return []


@loop
def gradients_assigned_by_hand(model, watched):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-1)
    for x, y in batches(4):
        found = torch.autograd.grad(loss_of(model, x, y), list(model.parameters()))
        for p, g in zip(model.parameters(), found, strict=True):
            p.grad = g
        optimizer.step()
    return [optimizer]


@loop
def two_losses_with_a_retained_graph(model, watched):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-1)
    for x, y in batches(4):
        optimizer.zero_grad()
        output = model(x)
        nn.functional.cross_entropy(output, y).backward(retain_graph=True)
        output.square().mean().backward()
        optimizer.step()
    return [optimizer]


@loop
def skipped_by_the_user(model, watched):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-1)
    for i, (x, y) in enumerate(batches(5)):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        if i != 2:
            optimizer.step()
    return [optimizer]


@loop
def validated_in_between(model, watched):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-1)
    for x, y in batches(4):
        model.eval()
        with torch.no_grad():
            model(100 * x)
        model(100 * x)  # a forward with a graph that nobody uses
        model.train()
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()
    return [optimizer]


@loop
def profiled_in_between(model, watched):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-1)
    for x, y in batches(4):
        zest_fast.profile(model, (100 * x, y))
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()
    return [optimizer]


@loop
def out_of_memory_and_tried_again(model, watched):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-1)

    def fail(g: Tensor) -> None:
        raise RuntimeError("out of memory")

    for i, (x, y) in enumerate(batches(4)):
        optimizer.zero_grad()
        for size in (8, 4):
            try:
                loss = loss_of(model, x[:size], y[:size])
                if i == 1 and size == 8:
                    handle = model[0].bias.register_hook(fail)
                loss.backward()
            except RuntimeError:
                handle.remove()
                optimizer.zero_grad()
            else:
                break
        optimizer.step()
    return [optimizer]
