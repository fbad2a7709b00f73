"""The common start of every arm: the head alone, fitted on samples that the layers never train on.

Features and descent are a sweep's (sweeping/head.py). Its `fit_head` and `choose_strength` are not: they penalise the
weight on features scaled to a root mean square of one, so the same strengths would give other heads, and other figures
than the recorded ones; here the penalty is on the features as they come.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zest_fast.demo.task import Task
from zest_fast.sweeping.head import descend, features_of

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
    split = task.splits["head"]
    features, labels = features_of(task.model, head, split.inputs, batch_size=100), split.labels
    kept = round(len(labels) * (1 - HELD_OUT))

    def held_out_loss(strength: float) -> float:
        fit(head, features[:kept], labels[:kept], strength)
        with torch.no_grad():
            return F.cross_entropy(head(features[kept:]), labels[kept:]).item()

    best = min(STRENGTHS, key=held_out_loss)
    fit(head, features, labels, best)
    return best


def fit(head: nn.Linear, features: Tensor, labels: Tensor, strength: float) -> None:
    """Minimise mean cross-entropy + strength / 2 x ||W||^2 from W = 0: no random start."""
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    descend(list(head.parameters()), head.weight, lambda: head(features), labels, strength, steps=ITERATIONS)
