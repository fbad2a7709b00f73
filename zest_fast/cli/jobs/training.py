"""The training loop of `zest-fast finetune`: a plain one, to be read and replaced."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from zest_fast.cli.jobs.job import to_device
from zest_fast.cli.jobs.runs import Rounds
from zest_fast.integrations.data.tokens import IGNORED
from zest_fast.lean.master_weights import LOW, MasterWeights
from zest_fast.profiling.heads import is_language_model, unwrap
from zest_fast.profiling.loss import call_model, logits_of, own_loss


@dataclass(frozen=True)
class Training:
    losses: list[float]  #: one a step
    seconds_per_step: float  #: median, data loading included
    peak_memory: int | None  #: bytes; see peak_memory
    place: dict[str, Any]  #: in the data, of the last batch; see Rounds


def loss_and_predictions(
    model: torch.nn.Module, batch: Any, task: str | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean loss, logits [n, classes] and targets [n] of a batch: a mapping with labels, or a pair (inputs, targets).

    Of the task regression both are numbers [n], of multi-label both [n, labels].
    """
    loss, logits, targets = _checked_loss(model, batch, task)
    if isinstance(batch, Mapping) and logits.dim() == 3:
        if _predicts_next(model):  # position t predicts token t + 1
            logits, targets = logits[:, :-1], targets[:, 1:]
        logits, targets = logits.flatten(0, 1), targets.flatten()
    return loss, logits, targets


def _checked_loss(
    model: torch.nn.Module, batch: Any, task: str | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean loss, logits and targets in the shapes of the batch. No value of the logits is asked for, which lean saving
    of a language model never has whole."""
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise ValueError(f"the batch holds {sorted(batch)} and no 'labels'; training needs them")
        output = model(**batch)
        loss, logits, targets = own_loss(output, batch), logits_of(output), batch["labels"]
        if task in ("regression", "multi-label"):
            return loss, *_numbers(logits, targets, task)
        _check_classes(logits, targets, classes=-1)
        return loss, logits, targets
    inputs, targets = batch
    logits = logits_of(call_model(model, inputs))
    _check_classes(logits, targets, classes=1 if logits.dim() > 1 else 0)
    return torch.nn.functional.cross_entropy(logits, targets), logits, targets


def _numbers(logits: torch.Tensor, targets: Any, task: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Raises ValueError where the loss would compare each prediction with every target, by broadcasting."""
    found = logits.squeeze(-1) if task == "regression" and logits.dim() == 2 else logits
    if not isinstance(targets, torch.Tensor) or not targets.is_floating_point() or targets.shape != found.shape:
        kind = f"{targets.dtype} {list(targets.shape)}" if isinstance(targets, torch.Tensor) else type(targets).__name__
        raise ValueError(f"{task} needs targets as floating-point numbers {list(found.shape)}, and a batch has {kind}")
    return found, targets


def _predictions_in(model: torch.nn.Module, batch: Any) -> int:
    """What the mean loss of a batch is a mean over: samples, or tokens that have a label."""
    targets = batch["labels"] if isinstance(batch, Mapping) else batch[1]
    if targets.is_floating_point():
        return len(targets)
    if isinstance(batch, Mapping) and targets.dim() == 2 and _predicts_next(model):
        targets = targets[:, 1:]
    return int((targets != IGNORED).sum())


def _predicts_next(model: torch.nn.Module) -> bool:
    """Whether the loss shifts the labels: not in a masked one, a decoder that is given them, a classifier of tokens."""
    inner = unwrap(model)
    decoder = getattr(getattr(inner, "config", None), "is_encoder_decoder", False)
    return is_language_model(inner) and not decoder and "MaskedLM" not in type(inner).__name__


def _check_classes(logits: torch.Tensor, targets: Any, classes: int) -> None:
    """Targets that are no class numbers have a loss of their own, and no accuracy: comparing would broadcast them."""
    if not isinstance(targets, torch.Tensor) or targets.is_floating_point() or targets.dim() != logits.dim() - 1:
        found = (
            f"{targets.dtype} {list(targets.shape)}" if isinstance(targets, torch.Tensor) else type(targets).__name__
        )
        raise ValueError(
            f"the targets of a batch are {found} for logits {list(logits.shape)}; finetune trains classes and "
            "tokens, whose targets are integers without the last dimension of the logits; say --task regression or "
            "--task multi-label of a model of transformers, or wrap it in SelectiveBackward in a loop of your own"
        )
    if logits.shape[classes] < 2:
        raise ValueError(
            f"the model has a single output (logits {list(logits.shape)}), whose cross-entropy is zero for any "
            "weights: give it an output for each class"
        )


def optimizer_for(parameters: Sequence[torch.nn.Parameter], lr: float, *, masters: bool) -> torch.optim.Optimizer:
    """AdamW; with float32 masters of what is in bfloat16 or float16, where that is wanted and there is any."""
    if masters and any(parameter.dtype in LOW for parameter in parameters):
        return MasterWeights(parameters, lr=lr)
    return torch.optim.AdamW(parameters, lr=lr)


SCHEDULES = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


def scheduler_for(
    optimizer: torch.optim.Optimizer, schedule: str, warmup: float, steps: int
) -> torch.optim.lr_scheduler.LambdaLR | None:
    """The learning rates of transformers.get_scheduler; None where it is constant from the first step on.

    warmup: the share of the steps in which the rate rises from zero.
    """
    rising = math.ceil(warmup * steps)
    if schedule == "constant" and not rising:
        return None

    def factor(step: int) -> float:
        if step < rising:
            return step / rising
        return max(0.0, SCHEDULES[schedule](min(1.0, (step - rising) / max(1, steps - rising))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def steps_of(batches: int, epochs: int, accumulate: int) -> int:
    """Steps of so many batches each, over all rounds of the data; the last one takes what is left."""
    return math.ceil(batches * epochs / accumulate)


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader[Any],
    *,
    epochs: int,
    steps: int | None,
    lr: float,
    device: torch.device,
    report: Callable[[int, float, Callable[[], dict[str, Any]]], None],
    losses: list[float],
    stop: Callable[[], bool] = lambda: False,
    place: Mapping[str, Any] | None = None,
    resume: Callable[[], None] = lambda: None,
    accumulate: int = 1,
    scheduler: torch.optim.lr_scheduler.LambdaLR | None = None,
    task: str | None = None,
) -> Training:
    """A step takes `accumulate` batches, its loss the mean over all that they predict. `steps` counts before `epochs`;
    report(step, loss, place) is called after every step, place() for its place.

    losses: gets the loss of each step that was done, also where an error ends the training. stop: asked after each
    step whether it was the last. place: in the data, of the last step of a run that goes on; resume: puts weights,
    optimizer, random state and losses of that run back.
    Raises RuntimeError when the loss is not finite.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    rounds = Rounds(loader, epochs if steps is None else None, place)
    if place is not None:
        rounds.prepare()
        resume()
    groups = itertools.islice(_groups(rounds, accumulate), None if steps is None else max(0, steps - len(losses)))
    seconds: list[float] = []
    model.train()
    started = time.perf_counter()
    for step, group in enumerate(groups, start=len(losses) + 1):
        loss = _backward(model, group, device, task, f"step {step}; try a smaller --lr than {lr:g}")
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss)
        seconds.append(time.perf_counter() - started)
        report(step, losses[-1], lambda: rounds.place)
        started = time.perf_counter()
        if stop():
            break
    model.eval()
    return Training(losses, sorted(seconds)[len(seconds) // 2], peak_memory(device), rounds.place)


def _groups(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    stream = iter(batches)
    while group := list(itertools.islice(stream, size)):
        yield group


def _backward(model: torch.nn.Module, group: list[Any], device: torch.device, task: str | None, where: str) -> float:
    """Gradients of the mean loss over all that these batches predict: a mean of means would weigh short ones more."""
    counts = [_predictions_in(model, batch) for batch in group] if len(group) > 1 else [1]
    total = 0.0
    for batch, count in zip(group, counts, strict=True):
        if not count and any(counts):
            continue  # nothing to learn: its mean is not a number
        loss = _checked_loss(model, to_device(batch, device), task)[0]  # the logits go before backward
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss is {loss.item()} at {where}")
        part = loss * (count / sum(counts)) if len(group) > 1 else loss
        part.backward()
        total += part.item()
    return total


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
