"""A step for each layer alone along its gradient, as far as it helps, scored on samples that gave no gradient."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zest_fast.finetuning.trainable_layers import chosen_layers
from zest_fast.foundation.interrupts import HeldInterrupts
from zest_fast.foundation.nearest import some
from zest_fast.probing.budget import STEP_SIZES, Sizes, sizes_for, sweep_units
from zest_fast.probing.directions import directions_of, groups_of
from zest_fast.probing.samples import Samples, samples_of
from zest_fast.profiling.borrowing.model_state import ModelState
from zest_fast.profiling.heads import find_head, is_language_model
from zest_fast.profiling.layers import Layer, LayerSelection, find_layers, select_layers
from zest_fast.profiling.profile import profile
from zest_fast.ranking.probed import Probe, evidence
from zest_fast.sweeping.boundaries import NotReusable
from zest_fast.sweeping.head import choose_strength, features_of, fit_head
from zest_fast.sweeping.prefix_cache import PrefixCache
from zest_fast.sweeping.progress import Progress
from zest_fast.sweeping.recipe import Recipe
from zest_fast.sweeping.trial_order import plan
from zest_fast.sweeping.trials import LayerTask, evaluate, saved_parameters, set_head
from zest_fast.sweeping.volatile_state import in_eval_mode, preserved

CACHE_BYTES = 1 << 30
_WORSE = 2  # step sizes in a row that gain less than the best so far end a layer's search


def probe(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    layers: LayerSelection = None,
    budget: float = 0.05,
    seed: int = 0,
    progress: bool = True,
) -> Probe:
    """Move each layer alone along the gradient of many batches, and see how far that takes the loss of other samples.

    A profile reads one gradient: its size says what an infinitely small step gains on the same samples. This reads what
    steps gain on others, and how far a layer can go before it does harm. The samples are divided at random: some whose
    gradients give directions, others to score, and, where the model ends in a classifier of one nn.Linear, some to fit
    that head to first, which replaces a head that does worse. The direction is Adam's, mean gradient over root mean
    square, of batches of 16. Step sizes are STEP_SIZES times the learning rate of the sweeps' default recipe, smallest
    first, until two in a row gain less than the best; the gain of a layer is its largest. What lies below a layer is
    computed once for all layers above it, as in `sweep`. The model runs in eval mode and is afterwards as it was, bit
    for bit, also after an error or Ctrl-C (which waits until the layer at hand is put back).

    Memory: a pass that differentiates all probed weights, whose gradients and moments come in groups of at most 1 GiB
    (a pass over the samples for each; a larger weight is a group of its own), and at most 1 GiB of activations (more is
    kept on disk in the folder for temporary files).

    Args:
        model: any module that `profile` takes and whose weights train.
        batches: batches as `profile` takes them: mappings of tensors with labels, or pairs (inputs, targets), inputs
            being a tensor or a mapping of tensors. All of one shape but for the number of samples; 256 samples or more
            make a useful probe.
        loss_fn: as in `profile`.
        layers: as in `profile`; None = every layer but embeddings. The head is never among them.
        budget: share of the cost of a sweep of these layers by the default recipe (three seeds of 32 steps of 32
            samples, 1,500 scored), counted in passes of samples.
        seed: of the division of the samples.
        progress: show a bar on a terminal.

    Returns:
        A Probe: scores, and gains with standard errors. `rank(profile, probe=...)` mixes it with what the Ranker knows.

    Raises:
        TypeError, ValueError: batches that do not fit together or hold too few samples, a budget too small for one
            probe of each layer, a loss that is not finite before any step; the message names it.

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
    samples = samples_of(model, batches, loss_fn)
    chosen, head, notes = _layers(model, layers, samples)
    weights = [part.parameters[0] for part in chosen_layers(model, [layer.name for layer in chosen])]
    groups = groups_of(weights)
    if samples.class_numbers(model) is None:
        head = None  # it stays as it is: only a classifier is fitted
    sizes = sizes_for(len(samples), budget, len(chosen), passes=len(groups), fits_head=head is not None)
    with HeldInterrupts() as interrupts, ExitStack() as borrowed:
        borrowed.enter_context(in_eval_mode(model))
        borrowed.enter_context(ModelState(list(model.modules()), []))
        borrowed.enter_context(preserved(model, seed))
        borrowed.enter_context(saved_parameters(tuple(head.parameters()) if head is not None else ()))
        folder = borrowed.enter_context(tempfile.TemporaryDirectory(prefix="zest_fast-probe-"))
        job = _Probing(model, chosen, weights, samples, sizes, seed, Path(folder), interrupts)
        if head is not None:
            job.fit_head(head)
        return job.run(groups, notes, progress)


class _Probing:
    """One probe of a borrowed model."""

    def __init__(
        self,
        model: nn.Module,
        layers: list[Layer],
        weights: list[nn.Parameter],
        samples: Samples,
        sizes: Sizes,
        seed: int,
        folder: Path,
        interrupts: HeldInterrupts,
    ) -> None:
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
        head, directions, scored, _ = order.split(
            [sizes.head, sizes.directions, sizes.scored, len(samples) - sizes.head - sizes.directions - sizes.scored]
        )
        self._model = model
        self._layers = layers
        self._weights = weights
        self._sizes = sizes
        self._seed = seed
        self._folder = folder
        self._interrupts = interrupts
        self._for_head, self._for_directions, self._scored = map(samples.of, (head, directions, scored))
        self._limit = CACHE_BYTES // max(1, len(self._scored))
        self._cache = self._new_cache()

    def fit_head(self, head: nn.Linear) -> None:
        """Unless the one that is there does as well on the scored samples."""
        targets = self._for_head.class_numbers(self._model)
        assert targets is not None  # as of all samples
        features = features_of(self._model, head, self._for_head.inputs)
        strength = choose_strength(features, targets, head.out_features, Recipe().head_strengths)
        fitted = fit_head(features, targets, head.out_features, strength, biased=head.bias is not None)
        own = head.weight.detach().clone(), head.bias.detach().clone() if head.bias is not None else fitted[1]
        before = _mean(self._losses(self._new_cache()))
        set_head(head, *(value.to(head.weight.device) for value in fitted))
        if before <= _mean(self._losses(self._new_cache())):
            set_head(head, *own)

    def run(self, groups: list[list[int]], notes: list[str], progress: bool) -> Probe:
        start = self._losses(self._new_cache())
        if not math.isfinite(_mean(start)):
            raise ValueError(
                f"the loss is {_mean(start)} before any step; profile the batch: its error names the layers"
            )
        names = [layer.name for layer in self._layers]
        gains, errors = np.full((2, len(STEP_SIZES), len(names)), np.nan)
        left = dict.fromkeys(self._layers, (self._seed,))
        tasks = plan(self._model, (), left, self._scored.inputs, reuse=True, limit=self._limit)
        with Progress(f"probe of {len(names)} layers", len(names), progress) as bar:
            bar.plan([task.cost for task in tasks.values()])
            for group in groups:
                self._let_through()
                directions = directions_of(self._model, [self._weights[row] for row in group], self._for_directions)
                self._cache = self._new_cache()  # the boundary moves up only
                of_row = dict(zip(group, directions, strict=True))
                for name, task in tasks.items():
                    row = names.index(name)
                    if row in of_row:
                        gains[:, row], errors[:, row] = self._search(task, self._weights[row], of_row.pop(row), start)
                        bar.advance(task.cost)
        best = np.argmax(np.nan_to_num(gains, nan=-np.inf), axis=0)
        columns = np.arange(len(names))
        units = self._sizes.units(0, len(groups)) + int(np.isfinite(gains).sum()) * self._sizes.scored
        return Probe(
            names=tuple(names),
            scores=evidence(gains[best, columns], errors[best, columns]),
            gains=gains[best, columns],
            errors=errors[best, columns],
            steps=np.where(np.isfinite(gains[best, columns]), np.array(STEP_SIZES)[best], np.nan),
            start=_mean(start),
            cost=units / (sweep_units() * len(names)),
            by_step={step: np.stack([gains[i], errors[i]]) for i, step in enumerate(STEP_SIZES)},
            settings={
                "head_samples": self._sizes.head,
                "direction_samples": self._sizes.directions,
                "scored_samples": self._sizes.scored,
                "seed": self._seed,
            },
            notes=(*notes, *_warned(names, gains)),
        )

    def _search(
        self, task: LayerTask, weight: nn.Parameter, direction: Tensor, start: list[tuple[float, int]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Gains and their errors at STEP_SIZES, NaN beyond the end of the search."""
        gains, errors = np.full((2, len(STEP_SIZES)), np.nan)
        rate = Recipe().layer_lr(float(weight.detach().double().square().mean().sqrt()))
        cache = self._cache_at(task)
        best, worse = -math.inf, 0
        with torch.no_grad(), saved_parameters((weight,)) as (before,):
            for place, step in enumerate(STEP_SIZES):
                weight.copy_(before - (step * rate * direction).to(before.dtype))
                gains[place], errors[place] = _gain(start, self._losses_of(task, cache))
                worse = 0 if gains[place] > best else worse + 1
                best = max(best, gains[place]) if math.isfinite(gains[place]) else best
                if worse >= _WORSE:
                    break
        self._let_through()
        return gains, errors

    def _cache_at(self, task: LayerTask) -> PrefixCache:
        """That takes passes up as far above as was verified; from the input where that does not hold."""
        if not task.boundary.skipped:
            return self._new_cache()
        try:
            self._cache.advance(task.boundary)
            self._cache.check(torch.arange(min(self._scored.chunk, len(self._scored))))
            return self._cache
        except NotReusable as error:
            return self._unlike(task, error)

    def _losses_of(self, task: LayerTask, cache: PrefixCache) -> list[tuple[float, int]]:
        try:
            return self._losses(cache)
        except NotReusable as error:
            return self._losses(self._unlike(task, error))

    def _unlike(self, task: LayerTask, error: NotReusable) -> PrefixCache:
        warnings.warn(
            f"what lies below {task.part.name!r} was not reused: {error}. The full forward pass runs instead",
            stacklevel=2,
        )
        return self._new_cache()

    def _losses(self, cache: PrefixCache) -> list[tuple[float, int]]:
        """Of the scored samples, or of chunks of so many."""
        with preserved(self._model, self._seed):
            found = evaluate(cache, self._scored)
        return list(zip(found["losses"], found["samples"], strict=True))

    def _new_cache(self) -> PrefixCache:
        return PrefixCache(
            self._model,
            self._scored.inputs,
            limit=self._limit,
            folder=self._folder,
            batch_size=self._scored.chunk,
        )

    def _let_through(self) -> None:
        """Ctrl-C, where the model is as it was but for the head, which is put back at the end."""
        with self._interrupts.interruptible():
            pass


def _layers(
    model: nn.Module, selection: LayerSelection, samples: Samples
) -> tuple[list[Layer], nn.Linear | None, list[str]]:
    """Those that the loss depends on, but for the head; the head, where it may be fitted; what should be said of it."""
    notes = []
    name = None
    try:
        name = find_head(model)
    except ValueError as error:
        notes.append(f"no head was fitted: {error}")
    output = model.get_submodule(name) if name is not None else None
    head = output if isinstance(output, nn.Linear) and not is_language_model(model) else None
    if output is not None and not isinstance(output, nn.Linear):
        notes.append(f"no head was fitted: {name!r} is a {type(output).__name__}, not an nn.Linear")
    chosen = select_layers(find_layers(dict(model.named_modules())), selection)
    few = samples.of(torch.arange(min(4, len(samples))))
    batch = few.inputs if few.targets is None else (few.inputs, few.targets)
    with in_eval_mode(model):
        reached = set(profile(model, batch, loss_fn=samples.loss_fn, layers=selection, metrics=["plain"]).names)
    chosen = [layer for layer in chosen if layer.module is not output and layer.name in reached]
    if not chosen:
        raise ValueError("layers: nothing beside the head is chosen that the loss depends on")
    return chosen, head, notes


def _mean(losses: list[tuple[float, int]]) -> float:
    values, samples = zip(*losses, strict=True)
    return float(np.average(values, weights=samples))


def _gain(start: list[tuple[float, int]], now: list[tuple[float, int]]) -> tuple[float, float]:
    """The mean loss that is saved, and its standard error: the same samples before and after."""
    before, after = (np.array([loss for loss, _ in losses]) for losses in (start, now))
    weights = np.array([samples for _, samples in start], dtype=np.float64)
    saved = before - after
    if not np.isfinite(saved).all():
        return math.nan, math.nan
    mean = float(np.average(saved, weights=weights))
    if len(saved) < 2:
        return mean, math.nan
    variance = np.average((saved - mean) ** 2, weights=weights) * len(saved) / (len(saved) - 1)
    return mean, float(np.sqrt(variance / len(saved)))


def _warned(names: list[str], gains: np.ndarray) -> list[str]:
    """gains: [step sizes, layers]"""
    lost = [name for name, finite in zip(names, np.isfinite(gains).any(axis=0), strict=True) if not finite]
    found = [f"the loss was not finite after any step of {some(lost)}"] if lost else []
    if len(lost) < len(names) and not (gains[np.isfinite(gains)] > 0).any():
        found.append(
            "the loss rose in every probe: the samples may be too few, the labels wrong, or the head may know all "
            "there is; the order of the layers says little"
        )
    for note in found:
        warnings.warn(note, stacklevel=4)
    return found
