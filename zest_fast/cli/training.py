"""The training loop of `zest-fast finetune`: a plain one, to be read and replaced."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from zest_fast.cli.job import to_device
from zest_fast.integrations.datasets import IGNORED


@dataclass(frozen=True)
class Score:
    loss: float  #: mean over what was predicted
    accuracy: float
    predictions: int  #: samples, or tokens of a language model


@dataclass(frozen=True)
class Training:
    losses: list[float]  #: one a step
    seconds_per_step: float  #: median, data loading included
    peak_memory: int | None  #: bytes; see peak_memory


def loss_and_predictions(model: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean loss, logits [n, classes] and targets [n] of a batch: a mapping with labels, or a pair (inputs, targets)."""
    if isinstance(batch, Mapping):
        output = model(**batch)
        if getattr(output, "loss", None) is None:
            raise ValueError(f"the model returns no loss for a batch of {sorted(batch)}; it has to hold 'labels'")
        logits, targets = output.logits, batch["labels"]
        if logits.dim() == 3 and targets.dim() == 2:  # a language model: position t predicts token t + 1
            logits, targets = logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten()
        return output.loss, logits, targets
    inputs, targets = batch
    output = model(inputs)
    logits = getattr(output, "logits", output)
    return torch.nn.functional.cross_entropy(logits, targets), logits, targets


@torch.no_grad()
def evaluate(model: torch.nn.Module, loader: DataLoader[Any], device: torch.device) -> Score:
    """Loss and accuracy in eval mode; the mode is as before afterwards."""
    mode = model.training
    model.eval()
    total = right = count = 0.0
    for batch in loader:
        loss, logits, targets = loss_and_predictions(model, to_device(batch, device))
        counted = targets != IGNORED
        total += float(loss) * int(counted.sum())
        right += int((logits.argmax(1) == targets)[counted].sum())
        count += int(counted.sum())
    model.train(mode)
    if not count:
        raise ValueError("the validation data holds nothing to predict")
    return Score(total / count, right / count, int(count))


def train(
    model: torch.nn.Module,
    parameters: Sequence[torch.nn.Parameter],
    loader: DataLoader[Any],
    *,
    epochs: int,
    steps: int | None,
    lr: float,
    device: torch.device,
    report: Callable[[int, float], None],
) -> Training:
    """AdamW over `parameters`; `steps` counts before `epochs`. report(step, loss) is called after every step.

    Raises RuntimeError when the loss is not finite.
    """
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    rounds = itertools.repeat(loader, epochs) if steps is None else itertools.repeat(loader)
    batches = itertools.islice(itertools.chain.from_iterable(rounds), steps)
    losses: list[float] = []
    seconds: list[float] = []
    model.train()
    started = time.perf_counter()
    for step, batch in enumerate(batches, start=1):
        loss, _, _ = loss_and_predictions(model, to_device(batch, device))
        losses.append(loss.item())
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss is {losses[-1]} at step {step}; try a smaller --lr than {lr:g}")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
        report(step, losses[-1])
    model.eval()
    return Training(losses, sorted(seconds)[len(seconds) // 2], peak_memory(device))


def peak_memory(device: torch.device) -> int | None:
    """Bytes. CUDA: what torch allocated at most since training began; otherwise the largest resident set of this
    process, loading and profiling included; None where the system does not tell (Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
