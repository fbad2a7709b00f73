"""The arms that the demo compares, and how each is trained: same start, same batches, same number of steps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zest_fast.demo.task import Split, Task
from zest_fast.finetuning.selective_backward import SelectiveBackward

EVALUATION_BATCH = 100
OTHER_RATE = 0.05  # of the scale: the rate of the head, of biases and of normalisation


@dataclass(frozen=True)
class Arm:
    """What trains: `layers` with the head; no layers = head only; None = every parameter."""

    name: str
    layers: tuple[str, ...] | None
    scales: tuple[float, ...]


@dataclass
class Run:
    """One training run: validation curve as (step, loss, accuracy), and the trained tensors at its end."""

    arm: Arm
    scale: float
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    trained: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def loss(self) -> float:
        """Validation loss at the end; infinite if the run diverged, so that it is never chosen."""
        end = self.curve[-1][1]
        return end if end == end else float("inf")


@contextmanager
def trainable(task: Task, layers: tuple[str, ...] | None) -> Iterator[dict[str, nn.Parameter]]:
    """The parameters that an arm trains, by name; afterwards every flag is as before."""
    named = dict(task.model.named_parameters())
    if layers is None:
        yield named
        return
    tuned = SelectiveBackward(task.model, layers, head=task.head)
    try:
        yield {name: named[name] for name in tuned.trainable_names}
    finally:
        tuned.remove()


def optimizer_for(task: Task, parameters: dict[str, nn.Parameter], scale: float) -> torch.optim.Optimizer:
    """Adam with one learning rate a tensor; fused, or full fine-tuning would look slower than it need be."""
    groups = [{"params": [p], "lr": learning_rate(task, name, p, scale)} for name, p in parameters.items()]
    return torch.optim.Adam(groups, fused=True)


def learning_rate(task: Task, name: str, parameter: Tensor, scale: float) -> float:
    """scale x RMS of a weight, so that each moves by a like share of itself; scale x 0.05 for head, biases and norms.

    The RMS is clipped to [0.01, 0.1]: without it the stem and the first depthwise layers, whose weights are large,
    move too far and end worse than head only.
    """
    is_head = task.head is not None and name.startswith(f"{task.head}.")
    if is_head or parameter.dim() < 2:
        return scale * OTHER_RATE
    return scale * min(max(parameter.detach().square().mean().sqrt().item(), 0.01), 0.1)


def training_step(task: Task, optimizer: torch.optim.Optimizer, inputs: Tensor, labels: Tensor) -> None:
    loss = F.cross_entropy(task.model(inputs), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def batches(split: Split, batch_size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` shuffled batches, the same for every arm; the split is reshuffled when it is used up."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(split), generator=generator)])
        rows, order = order[:batch_size], order[batch_size:]
        yield split.batch(rows)


def train(
    task: Task, arm: Arm, scale: float, *, start: tuple[float, float], seed: int, on_step: Callable[[], None]
) -> Run:
    """Train one arm from the common start, with linear decay; the model is as before afterwards.

    start: validation loss and accuracy before training, the same for every arm.
    """
    budget, run = task.budget, Run(arm, scale, [(0, *start)])
    check_at = {round(budget.steps * (i + 1) / budget.checks) for i in range(budget.checks)}
    with trainable(task, arm.layers) as parameters:
        before = {name: p.detach().clone() for name, p in parameters.items()}
        optimizer = optimizer_for(task, parameters, scale)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / budget.steps)
        data = batches(task.splits["train"], budget.batch_size, budget.steps, seed)
        for step, (inputs, labels) in enumerate(data, start=1):
            training_step(task, optimizer, inputs, labels)
            decay.step()
            on_step()
            if step in check_at:
                run.curve.append((step, *validate(task)))
        run.trained = {name: p.detach().clone() for name, p in parameters.items()}
        put(parameters, before)
    return run


def put(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    """Write values into parameters in place."""
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


@torch.no_grad()
def losses_and_hits(task: Task, split: Split) -> tuple[Tensor, Tensor]:
    """Cross-entropy [samples] and whether the largest logit is the label [samples], float64."""
    losses, hits = [], []
    for rows in torch.arange(len(split)).split(EVALUATION_BATCH):
        inputs, labels = split.batch(rows)
        logits = task.model(inputs)
        losses.append(F.cross_entropy(logits, labels, reduction="none").double())
        hits.append((logits.argmax(-1) == labels).double())
    return torch.cat(losses), torch.cat(hits)


def validate(task: Task) -> tuple[float, float]:
    losses, hits = losses_and_hits(task, task.splits["validation"])
    return losses.mean().item(), hits.mean().item()


def hits_on_test(task: Task, run: Run) -> Tensor:
    """Right (1) or wrong (0) for each test sample [samples], with the run's trained tensors in place."""
    parameters = dict(task.model.named_parameters())
    before = {name: parameters[name].detach().clone() for name in run.trained}
    put(parameters, run.trained)
    try:
        return losses_and_hits(task, task.splits["test"])[1]
    finally:
        put(parameters, before)
