"""AdamW without copies, and the optimizer's steps inside the backward pass."""

import copy

import pytest
import torch
from small_models import Mlp, llama
from torch import nn

from zest_fast.lean.optimizer import adamw, optimizer_in_backward


def train(model, batches, make, *, in_backward):
    """The weights after a step on each batch; a schedule halves the learning rate after each."""
    optimizer = make(model.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    stepping = optimizer_in_backward(optimizer) if in_backward else None
    for x in batches:
        model(x).square().sum().backward()
        assert all((p.grad is None) == in_backward for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    if stepping:
        stepping.remove()
    return model.state_dict(), optimizer


OPTIMIZERS = {
    "adamw": lambda p: adamw(p, lr=1e-2),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "groups": lambda p: adamw([{"params": [q], "lr": 1e-3 * (i + 1)} for i, q in enumerate(p)]),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_steps_in_backward_are_those_of_a_plain_step(make):
    torch.manual_seed(0)
    model, batches = Mlp(), [torch.randn(5, 4) for _ in range(3)]
    plain, optimizer = train(copy.deepcopy(model), batches, make, in_backward=False)
    lean, other = train(model, batches, make, in_backward=True)
    assert all(torch.equal(tensor, lean[name]) for name, tensor in plain.items())
    assert [len(group["params"]) for group in other.param_groups] == [len(g["params"]) for g in optimizer.param_groups]
    assert [group["lr"] for group in other.param_groups] == [group["lr"] for group in optimizer.param_groups]


def test_one_gradient_is_alive_at_a_time():
    torch.manual_seed(0)
    model, ids = llama(tie_word_embeddings=True), torch.arange(12).reshape(2, 6)
    alive = []
    with optimizer_in_backward(adamw(model.parameters())):
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda _: alive.append(sum(p.grad is not None for p in model.parameters()))
            )
        model(input_ids=ids, labels=ids).loss.backward()
    assert alive == [0] * len(list(model.parameters()))  # the hook of the step came first


def test_after_remove_gradients_stay():
    model = Mlp()
    optimizer = adamw(model.parameters())
    with optimizer_in_backward(optimizer) as stepping:
        pass
    stepping.remove()
    before = model.a.weight.clone()
    model(torch.randn(2, 4)).sum().backward()
    assert model.a.weight.grad is not None and torch.equal(model.a.weight, before)


def test_adamw_makes_no_copies_unless_told():
    parameters = [nn.Parameter(torch.zeros(2))]
    for made in (adamw(parameters), adamw([("named", parameters[0])]), adamw([{"params": parameters}])):
        assert (made.defaults["foreach"], made.defaults["fused"]) == (False, False)
    assert adamw(parameters, foreach=True).defaults["foreach"]


@pytest.mark.parametrize(
    ("optimizer", "error", "message"),
    [
        (lambda p: p, TypeError, "must be a torch.optim.Optimizer, not list"),
        (torch.optim.LBFGS, ValueError, "LBFGS needs all gradients at once"),
        (lambda p: p[0].sum().backward() or torch.optim.SGD(p), ValueError, "hold a gradient; call"),
    ],
)
def test_refusals(optimizer, error, message):
    with pytest.raises(error, match=message):
        optimizer_in_backward(optimizer([nn.Parameter(torch.ones(2))]))
