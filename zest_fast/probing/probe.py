"""A few real steps on each layer alone, scored on samples that it did not train on."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zest_fast.foundation.interrupts import HeldInterrupts
from zest_fast.foundation.nearest import some
from zest_fast.probing.budget import LAYER_LR_FACTORS, STEPS, Sizes, sizes_for, sweep_units
from zest_fast.probing.samples import Samples, samples_of
from zest_fast.profiling.borrowing.model_state import ModelState
from zest_fast.profiling.heads import find_head, is_language_model
from zest_fast.profiling.layers import Layer, LayerSelection, find_layers, select_layers
from zest_fast.profiling.profile import profile
from zest_fast.ranking.probed import Probe, evidence
from zest_fast.sweeping.head import choose_strength, features_of, fit_head
from zest_fast.sweeping.prefix_cache import PrefixCache
from zest_fast.sweeping.progress import Progress
from zest_fast.sweeping.recipe import Recipe
from zest_fast.sweeping.trial_order import plan
from zest_fast.sweeping.trials import LayerTask, Trial, Trials, evaluate, saved_parameters, set_head
from zest_fast.sweeping.volatile_state import preserved

CACHE_BYTES = 1 << 30
_HEAD_LR = 5e-4
_HEAD_ALONE = ""  # the name of the trial that trains no layer; no layer has it
_AGAIN = 2  # times `top` layers are probed again where the budget allows it


def probe(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    layers: LayerSelection = None,
    budget: float = 0.05,
    top: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> Probe:
    """Train each layer alone (with the head) for a few steps and see what that gains on other samples.

    A profile reads one gradient; this reads what steps do. The samples are divided at random: some to train on, others
    to score, and, where the model ends in a classifier of one nn.Linear, some to fit that head to first, which replaces
    a head that does worse. Eight steps of Adam, once at 0.001 and once at 0.01 RMS(W), falling linearly; what lies
    below a layer is computed once for all layers above it, as in `sweep`. What the budget leaves after the first round
    goes to further rounds, on other training samples, of the `2 x top` best layers. The model runs in eval mode and is
    afterwards as it was, bit for bit, also after an error or Ctrl-C (which waits for the end of a trial).

    Memory: that of a training step of one layer, a copy of its weight with two moments, and at most 1 GiB of
    activations (more is kept on disk in the folder for temporary files).

    Args:
        model: any module that `profile` takes and whose weights train.
        batches: batches as `profile` takes them: mappings of tensors with labels, or pairs (inputs, targets), inputs
            being a tensor or a mapping of tensors. All of one shape but for the number of samples; 256 samples or more
            make a useful probe.
        loss_fn: as in `profile`.
        layers: as in `profile`; None = every layer but embeddings. The head is never among them.
        budget: share of the cost of a sweep of these layers by the default recipe (three seeds of 32 steps of 32
            samples, 1,500 scored), counted in passes of samples.
        top: how many layers are to be chosen: where the order matters most.
        seed: of the division of the samples and of the batches.
        progress: show a bar on a terminal.

    Returns:
        A Probe: scores, and gains with standard errors. `rank(profile, probe=...)` mixes it with what the Ranker knows.

    Raises:
        TypeError, ValueError: batches that do not fit together or hold too few samples, a budget too small for one
            probe of each layer, a loss that is not finite before any training; the message names it.

    Examples:
        >>> import torch, zest_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> found = zest_fast.probe(model, [(torch.randn(96, 4), torch.arange(96) % 3)], progress=False)
        >>> sorted(found.names)
        ['0', '2']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; a torch.nn.Module is needed")
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget <= 1:
        raise ValueError(f"budget is {budget!r}; a share of a sweep's cost is needed, above 0 and at most 1")
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise ValueError(f"top is {top!r}; a whole number from 1 on is needed")
    samples = samples_of(model, batches, loss_fn)
    chosen, head, notes = _layers(model, layers, samples)
    classes = samples.class_numbers(model)
    fits_head = head is not None and classes is not None
    sizes = sizes_for(len(samples), budget, len(chosen), fits_head=fits_head)
    with HeldInterrupts() as interrupts, ExitStack() as borrowed:
        borrowed.enter_context(_in_eval_mode(model))
        borrowed.enter_context(ModelState(list(model.modules()), []))
        borrowed.enter_context(preserved(model, seed))
        borrowed.enter_context(saved_parameters(tuple(head.parameters()) if head is not None else ()))
        folder = borrowed.enter_context(tempfile.TemporaryDirectory(prefix="zest_fast-probe-"))
        job = _Probing(model, head, chosen, samples, sizes, seed, Path(folder), interrupts)
        job.prepare(classes)
        return job.run(budget, top, notes, progress)


class _Probing:
    """One probe of a borrowed model."""

    def __init__(
        self,
        model: nn.Module,
        head: nn.Linear | None,
        layers: list[Layer],
        samples: Samples,
        sizes: Sizes,
        seed: int,
        folder: Path,
        interrupts: HeldInterrupts,
    ) -> None:
        self._model = model
        self._head = head
        self._layers = layers
        self._samples = samples
        self._sizes = sizes
        self._seed = seed
        self._folder = folder
        self._interrupts = interrupts
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
        self._head_rows, rest = order[: sizes.head], order[sizes.head :]
        self._scored, self._others = rest[: sizes.scored], rest[sizes.scored :]
        self._recipes = [
            Recipe(
                steps=STEPS,
                batch_size=sizes.batch,
                head_lr=_HEAD_LR,
                layer_lr_factor=factor,
                max_layer_lr=factor * 0.2,  # as the default recipe has it: RMS of 0.2
                train_samples=None,
            )
            for factor in LAYER_LR_FACTORS
        ]

    def prepare(self, classes: Tensor | None) -> None:
        """The head that every layer starts from."""
        head = self._head
        if head is None:
            return
        if classes is not None:
            rows = self._head_rows
            features = features_of(self._model, head, self._samples.of(rows).inputs)
            targets = classes[rows]
            strength = choose_strength(features, targets, head.out_features, self._recipes[0].head_strengths)
            fitted = fit_head(features, targets, head.out_features, strength, biased=head.bias is not None)
            own = _flat(head)
            before = self._loss_now()
            set_head(head, *(value.to(head.weight.device) for value in fitted))
            if before <= self._loss_now():  # a head that was trained on more knows more
                set_head(head, *own)

    def run(self, budget: float, top: int, notes: list[str], progress: bool) -> Probe:
        """Rounds until the budget is spent."""
        start = self._loss_now()
        if not math.isfinite(start):
            raise ValueError(f"the loss is {start} before any training; profile the batch: its error names the layers")
        names = [layer.name for layer in self._layers]
        rounds: dict[str, list[np.ndarray]] = {name: [] for name in names}
        left = budget * sweep_units() * len(names)
        heads: list[float] = []
        spent, wanted = 0.0, names
        with Progress(f"probe of {len(names)} layers", len(names), progress) as bar:
            while not heads or left - spent >= self._sizes.round_units(len(wanted)):
                alone, found = self._round(wanted, len(heads), bar)
                heads.append(alone)
                for name, values in found.items():
                    rounds[name].append(values)
                spent += self._sizes.round_units(len(wanted))
                if (len(heads) + 1) * self._sizes.trained > len(self._others):
                    break  # no other samples are left to train on
                scores = evidence(*_means(rounds))
                wanted = [names[row] for row in sorted(np.argsort(-scores, kind="stable")[: _AGAIN * top])]
        gains, errors = _means(rounds)
        best = np.argmax(np.nan_to_num(gains, nan=-np.inf), axis=0)
        columns = np.arange(len(names))
        settings = {
            "steps": STEPS,
            "batch_size": self._sizes.batch,
            "layer_lr_factors": list(LAYER_LR_FACTORS),
            "trained_samples": self._sizes.trained,
            "scored_samples": len(self._scored),
            "head_samples": len(self._head_rows),
            "seed": self._seed,
        }
        return Probe(
            names=tuple(names),
            scores=evidence(gains, errors),
            gains=gains[best, columns],
            errors=errors[best, columns],
            rounds=np.array([len(rounds[name]) for name in names]),
            start=start,
            head=float(np.mean(heads)),
            cost=spent / (sweep_units() * len(names)),
            by_rate={factor: np.stack(both) for factor, *both in zip(LAYER_LR_FACTORS, gains, errors, strict=True)},
            settings=settings,
            notes=(*notes, *_warned(names, gains)),
        )

    def _round(self, wanted: list[str], number: int, bar: Progress) -> tuple[float, dict[str, np.ndarray]]:
        """The loss after the head alone was trained, and of each layer of `wanted` gains and errors, [rates, 2]."""
        first = number * self._sizes.trained
        train = self._samples.of(self._others[first : first + self._sizes.trained])
        score = self._samples.of(self._scored)
        limit = CACHE_BYTES // (len(train) + len(score))
        seed = self._seed + number
        of_head = tuple(self._head.parameters()) if self._head is not None else ()
        layers = {layer: (seed,) for layer in self._layers if layer.name in wanted}
        tasks = plan(self._model, of_head, layers, train.inputs, reuse=True, limit=limit)
        trials = Trials(
            model=self._model,
            head=self._head,
            recipe=self._recipes[0],
            heads={seed: _flat(self._head)} if self._head is not None else {},
            rows={seed: torch.arange(len(train))},
            tasks=tasks | {_HEAD_ALONE: _of_head_alone(tasks)},
            train=(train.inputs, train),
            score=(score.inputs, score),
            limit=limit,
            folder=self._folder,
        )
        bar.plan([task.cost for task in tasks.values()])
        alone = trials.full_pass(Trial(_HEAD_ALONE, seed)) if of_head else self._untrained(score)
        found = {}
        for name, task in tasks.items():
            values = []
            for trials.recipe in self._recipes:
                with self._interrupts.interruptible():
                    pass  # between trials the model is as it was
                result = trials.run(Trial(name, seed))
                values.append(_gain(alone["losses"], result["losses"], result["samples"]))
            found[name] = np.array(values)
            bar.advance(task.cost)
        return float(np.average(alone["losses"], weights=alone["samples"])), found

    def _untrained(self, score: Samples) -> Mapping[str, Any]:
        with preserved(self._model, self._seed):
            return evaluate(self._cache(score), score)

    def _loss_now(self) -> float:
        score = self._samples.of(self._scored)
        found = self._untrained(score)
        return float(np.average(found["losses"], weights=found["samples"]))

    def _cache(self, samples: Samples) -> PrefixCache:
        """That keeps nothing."""
        return PrefixCache(self._model, samples.inputs, limit=0, folder=self._folder)


def _layers(
    model: nn.Module, selection: LayerSelection, samples: Samples
) -> tuple[list[Layer], nn.Linear | None, list[str]]:
    """Those that the loss depends on, the head that trains with them, and what should be said of it."""
    notes = []
    head = None
    try:
        name = None if is_language_model(model) else find_head(model)
    except ValueError as error:
        name = None
        notes.append(f"no head was trained with the layers: {error}")
    if name is not None:
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear):
            head = module
        else:
            notes.append(
                f"no head was trained with the layers: {name!r} is a {type(module).__name__}, not an nn.Linear"
            )
    chosen = select_layers(find_layers(dict(model.named_modules())), selection)
    few = samples.of(torch.arange(min(4, len(samples))))
    batch = few.inputs if few.targets is None else (few.inputs, few.targets)
    with _in_eval_mode(model):
        reached = set(profile(model, batch, loss_fn=samples.loss_fn, layers=selection, metrics=["plain"]).names)
    chosen = [layer for layer in chosen if layer.module is not head and layer.name in reached]
    if is_language_model(model):
        output = find_head(model)
        chosen = [layer for layer in chosen if layer.module_name != output]
    if not chosen:
        raise ValueError("layers: nothing beside the head is chosen that the loss depends on")
    return chosen, head, notes


def _of_head_alone(tasks: Mapping[str, LayerTask]) -> LayerTask:
    """A trial in which no layer trains: in its place is a number that the loss does not depend on."""
    last = list(tasks.values())[-1]
    part = replace(last.part, name=_HEAD_ALONE, parameters=(nn.Parameter(torch.ones(1)),))
    return replace(last, part=part)


def _gain(alone: list[float], own: list[float], samples: list[int]) -> tuple[float, float]:
    """The mean loss that is saved, and its standard error: the same samples with and without the layer."""
    weights = np.asarray(samples, dtype=np.float64)
    saved = np.asarray(alone) - np.asarray(own)
    if not np.isfinite(saved).all():
        return math.nan, math.nan
    mean = float(np.average(saved, weights=weights))
    if len(saved) < 2:
        return mean, math.nan
    variance = np.average((saved - mean) ** 2, weights=weights) * len(saved) / (len(saved) - 1)
    return mean, float(np.sqrt(variance / len(saved)))


def _means(rounds: Mapping[str, list[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Gains and errors, [rates, layers] each. Rounds score the same samples: their luck does not average out."""
    gains, errors = [], []
    for values in rounds.values():
        own = np.stack(values)  # [rounds, rates, 2]
        between = own[:, :, 0].var(axis=0, ddof=1) / len(own) if len(own) > 1 else 0.0
        gains.append(own[:, :, 0].mean(axis=0))
        errors.append(np.sqrt(np.mean(own[:, :, 1] ** 2, axis=0) + between))
    return np.stack(gains, axis=1), np.stack(errors, axis=1)


def _warned(names: list[str], gains: np.ndarray) -> list[str]:
    """gains: [rates, layers]"""
    lost = [name for name, finite in zip(names, np.isfinite(gains).any(axis=0), strict=True) if not finite]
    found = [f"the loss was not finite after training {some(lost)}"] if lost else []
    if len(lost) < len(names) and not (gains[np.isfinite(gains)] > 0).any():
        found.append(
            "the loss rose in every probe: the samples may be too few, the labels wrong, or the head may know all "
            "there is; the order of the layers says little"
        )
    for note in found:
        warnings.warn(note, stacklevel=4)
    return found


def _flat(head: nn.Linear) -> tuple[Tensor, Tensor]:
    """Copies of weight and bias."""
    bias = head.bias.detach().clone() if head.bias is not None else torch.zeros(head.out_features)
    return head.weight.detach().clone(), bias


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
