"""The head that every layer starts from: logistic regression on the features of the untouched model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from zest_fast.prefix.inputs import Inputs, batches, count, logits_of, rows_of
from zest_fast.profiling.heads import find_head
from zest_fast.profiling.loss import call_model


def classifier_of(model: nn.Module) -> tuple[str, nn.Linear]:
    """Name and module of the linear layer whose output is the model's. Raises ValueError where there is none."""
    name = find_head(model)
    head = model.get_submodule(name) if name is not None else None
    if name is None or not isinstance(head, nn.Linear):
        kind = type(head).__name__ if head is not None else "nothing"
        raise ValueError(
            f"the head of {type(model).__name__} is {kind}; a sweep needs a classifier that ends in nn.Linear"
        )
    return name, head


@torch.no_grad()
def features_of(model: nn.Module, head: nn.Linear, inputs: Inputs, batch_size: int = 64) -> Tensor:
    """What the head gets, [samples, features] in float32. Raises ValueError where its output is not the model's."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = head.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].detach(), output.detach())))
    features = []
    try:
        for rows in batches(count(inputs), batch_size):
            seen.clear()
            logits = logits_of(call_model(model, rows_of(inputs, rows)))
            if len(seen) != 1 or not torch.equal(seen[0][1], logits):
                raise ValueError("the model's logits are not the output of its last nn.Linear; a sweep cannot train it")
            features.append(seen[0][0].float())
    finally:
        hook.remove()
    return torch.cat(features)


def fit_head(
    features: Tensor, targets: Tensor, classes: int, strength: float, *, biased: bool = True
) -> tuple[Tensor, Tensor]:
    """Weight [classes, features] and bias [classes]: cross-entropy + strength/2 ‖weight‖², by L-BFGS from zero.

    The penalty is on features scaled to a root mean square of one. The bias stays zero unless `biased`.
    """
    features = features.double()
    scale = features.square().mean().sqrt().clamp_min(1e-12)  # so that a strength means the same for every model
    weight = torch.zeros(classes, features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=biased)
    scaled = features / scale
    trained = [weight, bias] if biased else [weight]
    descend(trained, weight, lambda: scaled @ weight.T + bias, targets, strength, steps=200)
    return (weight.detach() / scale).float(), bias.detach().float()


def descend(
    trained: list[Tensor],
    weight: Tensor,
    logits: Callable[[], Tensor],
    targets: Tensor,
    strength: float,
    *,
    steps: int,
) -> None:
    """Minimise mean cross-entropy + strength/2 ‖weight‖² over `trained` in place, by at most `steps` of L-BFGS."""
    optimizer = torch.optim.LBFGS(trained, max_iter=steps, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(logits(), targets) + strength / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    optimizer.zero_grad()


def choose_strength(features: Tensor, targets: Tensor, classes: int, strengths: Sequence[float]) -> float:
    """The strength with the least loss on every fifth sample after a fit on the others."""
    if len(strengths) == 1 or len(features) < 5:
        return strengths[0]
    held_out = torch.arange(len(features)) % 5 == 4
    losses = []
    for strength in strengths:
        weight, bias = fit_head(features[~held_out], targets[~held_out], classes, strength)
        logits = features[held_out] @ weight.T + bias
        losses.append(float(nn.functional.cross_entropy(logits, targets[held_out])))
    return strengths[losses.index(min(losses))]
