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

from zest_fast.cli.jobs.job import to_device
from zest_fast.cli.jobs.runs import Rounds
from zest_fast.integrations.datasets import IGNORED
from zest_fast.lean.master_weights import LOW, MasterWeights
from zest_fast.profiling.heads import is_language_model, unwrap
from zest_fast.profiling.loss import call_model, logits_of, own_loss


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
    place: dict[str, Any]  #: in the data, of the last batch; see Rounds


def loss_and_predictions(model: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean loss, logits [n, classes] and targets [n] of a batch: a mapping with labels, or a pair (inputs, targets)."""
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise ValueError(f"the batch holds {sorted(batch)} and no 'labels'; training needs them")
        output = model(**batch)
        loss, logits, targets = own_loss(output, batch), logits_of(output), batch["labels"]
        _check_classes(logits, targets, classes=-1)
        if logits.dim() == 3:
            if _predicts_next(model):  # position t predicts token t + 1
                logits, targets = logits[:, :-1], targets[:, 1:]
            logits, targets = logits.flatten(0, 1), targets.flatten()
        return loss, logits, targets
    inputs, targets = batch
    logits = logits_of(call_model(model, inputs))
    _check_classes(logits, targets, classes=1 if logits.dim() > 1 else 0)
    return torch.nn.functional.cross_entropy(logits, targets), logits, targets


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
            "tokens, whose targets are integers without the last dimension of the logits: regression, soft and several "
            "labels at once are not supported yet; wrap the model in SelectiveBackward in a loop of your own"
        )
    if logits.shape[classes] < 2:
        raise ValueError(
            f"the model has a single output (logits {list(logits.shape)}), whose cross-entropy is zero for any "
            "weights: give it an output for each class"
        )


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


def optimizer_for(parameters: Sequence[torch.nn.Parameter], lr: float, *, masters: bool) -> torch.optim.Optimizer:
    """AdamW; with float32 masters of what is in bfloat16 or float16, where that is wanted and there is any."""
    if masters and any(parameter.dtype in LOW for parameter in parameters):
        return MasterWeights(parameters, lr=lr)
    return torch.optim.AdamW(parameters, lr=lr)


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
) -> Training:
    """`steps` counts before `epochs`. report(step, loss, place) is called after every step, place() for its place.

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
    batches = itertools.islice(rounds, None if steps is None else max(0, steps - len(losses)))
    seconds: list[float] = []
    model.train()
    started = time.perf_counter()
    for step, batch in enumerate(batches, start=len(losses) + 1):
        loss, _, _ = loss_and_predictions(model, to_device(batch, device))
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss is {loss.item()} at step {step}; try a smaller --lr than {lr:g}")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
        report(step, losses[-1], lambda: rounds.place)
        started = time.perf_counter()
        if stop():
            break
    model.eval()
    return Training(losses, sorted(seconds)[len(seconds) // 2], peak_memory(device), rounds.place)


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
