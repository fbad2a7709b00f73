"""The common start of every arm: the head alone, fitted on samples that the layers never train on."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zest_fast.demo.task import Split, Task

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # L2 penalties tried
HELD_OUT = 0.2  # share of the head split that chooses among them
ITERATIONS = 100


def warm_head(task: Task) -> float:
    """Fit the classifier in place by L-BFGS with an L2 penalty; returns the penalty's strength.

    A head fitted on the samples that later train the layers would overfit them and leave no gradient to rank by.
    """
    head = task.model.get_submodule(task.head or "")
    if not isinstance(head, nn.Linear):
        raise TypeError(f"demo task {task.name!r}: head {task.head!r} must be an nn.Linear, not {type(head).__name__}")
    features, labels = head_inputs(task.model, head, task.splits["head"]), task.splits["head"].labels
    kept = round(len(labels) * (1 - HELD_OUT))

    def held_out_loss(strength: float) -> float:
        fit(head, features[:kept], labels[:kept], strength)
        with torch.no_grad():
            return F.cross_entropy(head(features[kept:]), labels[kept:]).item()

    best = min(STRENGTHS, key=held_out_loss)
    fit(head, features, labels, best)
    return best


@torch.no_grad()
def head_inputs(model: nn.Module, head: nn.Module, split: Split, batch_size: int = 100) -> Tensor:
    """What the head sees of each sample: [samples, features]."""
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    try:
        for inputs in split.inputs.split(batch_size):
            model(inputs)
    finally:
        handle.remove()
    return torch.cat(seen)


def fit(head: nn.Linear, features: Tensor, labels: Tensor, strength: float) -> None:
    """Minimise mean cross-entropy + strength / 2 x ||W||^2 from W = 0: no random start."""
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(features), labels) + strength / 2 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.zero_grad()
