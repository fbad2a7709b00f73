"""What training each layer alone would gain: a sweep in a quadratic model of the loss, for all layers at once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zest_fast.finetuning.trainable_layers import chosen_layers
from zest_fast.foundation.interrupts import HeldInterrupts
from zest_fast.foundation.nearest import some
from zest_fast.prefix.inputs import logits_of, rows_of
from zest_fast.prefix.volatile_state import preserved
from zest_fast.probing.budget import BATCH, PENDING, Sizes, sizes_for, sweep_units
from zest_fast.probing.directions import find_directions, flat_gradients, trainable
from zest_fast.probing.quadratic import saved, trained
from zest_fast.probing.samples import Samples, samples_of
from zest_fast.profiling.borrowing.model_state import ModelState
from zest_fast.profiling.borrowing.training_modes import in_eval_mode
from zest_fast.profiling.heads import find_head, is_language_model
from zest_fast.profiling.layers import Layer, LayerSelection, find_layers, select_layers
from zest_fast.profiling.loss import call_model
from zest_fast.profiling.profile import profile
from zest_fast.ranking.probed import Probe, evidence
from zest_fast.sweeping.head import choose_strength, features_of, fit_head
from zest_fast.sweeping.progress import Progress
from zest_fast.sweeping.recipe import Recipe
from zest_fast.sweeping.trials import saved_parameters, set_head

RATES = (0.1, 0.18, 0.3, 0.55, 1.0, 1.8, 3.0)
"""Of the default recipe's learning rate: families of models want other ones, and a user's model has none yet."""
_FEW = 128  # samples


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
    """Train each layer alone in a quadratic model of the loss, and see what that gains on other samples.

    A profile reads one gradient: its size says what an infinitely small step gains on the same samples. This reads what
    a sweep's 32 steps gain on others. The samples are divided at random: some to fit the head to, where the model ends
    in a classifier of one nn.Linear (a fitted head that does worse is dropped), the others into two halves. Each half
    gives every layer a few directions, the ways in which Adam would step along the gradient of some of its samples
    (of a few classes each); then small batches of all samples say how the loss slopes along them, and, by the gradients
    of labels drawn from the model's own predictions, how it curves (Gauss-Newton). In that quadratic model the recipe's
    steps are taken with the slopes of one half and scored with those of the other. That costs two forward and three
    backward passes over the samples, whatever the number of layers. It is done at rates from a tenth to three times the
    recipe's; what counts is the gain at the rate below the one at which all layers together gain most. Losses that are
    not the cross-entropy of class numbers have no labels to draw: there the covariance of the gradients stands for the
    curvature.

    The model runs in eval mode and is afterwards as it was, bit for bit, also after an error or Ctrl-C.

    Memory: a pass that differentiates weights, in groups whose directions and gradients take at most 1 GiB (84 bytes an
    entry of a weight; a larger weight is a group of its own). Each group costs its passes anew: where that leaves too
    few samples, there are four, two or one direction in place of eight.

    Args:
        model: any module that `profile` takes and whose weights train.
        batches: batches as `profile` takes them: mappings of tensors with labels, or pairs (inputs, targets), inputs
            being a tensor or a mapping of tensors. All of one shape but for the number of samples; 512 samples or more
            make a useful probe.
        loss_fn: as in `profile`.
        layers: as in `profile`; None = every layer but embeddings. The head is never among them.
        budget: share of the cost of a sweep of these layers by the default recipe (three seeds of 32 steps of 32
            samples, 1,500 scored), counted in passes of samples.
        seed: of the division of the samples, and of the labels that are drawn.
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
        >>> found = zest_fast.probe(model, [(torch.randn(96, 4), torch.arange(96) % 3)], budget=0.2, progress=False)
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
    if samples.class_numbers(model) is None:
        head = None  # it stays as it is: only a classifier is fitted
    sizes = sizes_for(len(samples), budget, [weight.numel() for weight in weights], fits_head=head is not None)
    with HeldInterrupts() as interrupts, ExitStack() as borrowed:
        borrowed.enter_context(in_eval_mode(model))
        borrowed.enter_context(ModelState(list(model.modules()), []))
        borrowed.enter_context(preserved(model, seed))
        borrowed.enter_context(saved_parameters(tuple(head.parameters()) if head is not None else ()))
        job = _Probing(model, chosen, weights, samples, sizes, seed, interrupts)
        if head is not None:
            job.fit_head(head)
        return job.run(notes, progress)


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
        interrupts: HeldInterrupts,
    ) -> None:
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
        self._for_head = samples.of(order[: sizes.head])
        self._probed = samples.of(order[sizes.head : sizes.head + sizes.probed])
        self._model = model
        self._layers = layers
        self._weights = weights
        self._sizes = sizes
        self._seed = seed
        self._interrupts = interrupts

    def fit_head(self, head: nn.Linear) -> None:
        """Unless the one that is there does as well on the probed samples."""
        targets, others = self._for_head.class_numbers(self._model), self._probed.class_numbers(self._model)
        assert targets is not None and others is not None  # as of all samples
        features = features_of(self._model, head, self._for_head.inputs)
        strength = choose_strength(features, targets, head.out_features, Recipe().head_strengths)
        fitted = fit_head(features, targets, head.out_features, strength, biased=head.bias is not None)
        apart = features_of(self._model, head, self._probed.inputs)
        own = head.weight, head.bias if head.bias is not None else fitted[1]
        losses = [
            nn.functional.cross_entropy(nn.functional.linear(apart, *(part.to(apart) for part in parts)), others)
            for parts in (own, fitted)
        ]
        if losses[0] > losses[1]:
            set_head(head, *(value.to(head.weight.device) for value in fitted))

    def run(self, notes: list[str], progress: bool) -> Probe:
        names = [layer.name for layer in self._layers]
        gains, errors = np.full((2, len(RATES), len(names)), np.nan)
        batches = self._sizes.probed // BATCH
        with Progress(f"probe of {len(names)} layers", batches * len(self._sizes.groups), progress) as bar:
            bar.plan([1.0] * batches * len(self._sizes.groups))
            for group in self._sizes.groups:
                for row, observed in zip(group, self._observe(group, bar), strict=True):
                    gains[:, row], errors[:, row] = self._search(self._weights[row], observed)
        place = _cautious(gains)
        if self._sizes.probed < _FEW:
            notes = [*notes, f"only {self._sizes.probed} samples were probed; more samples or a larger budget say more"]
        return Probe(
            names=tuple(names),
            scores=evidence(gains[place], errors[place]),
            gains=gains[place],
            errors=errors[place],
            rate=RATES[place],
            start=self._start,
            cost=self._sizes.units / (sweep_units() * len(names)),
            by_rate={rate: np.stack([gains[i], errors[i]]) for i, rate in enumerate(RATES)},
            settings={
                "head_samples": self._sizes.head,
                "probed_samples": self._sizes.probed,
                "directions": self._sizes.directions,
                "passes": len(self._sizes.groups),
                "seed": self._seed,
            },
            notes=(*notes, *_warned(names, gains)),
        )

    def _observe(self, group: Sequence[int], bar: Progress) -> list[_Observed]:
        """Of the weights of a group."""
        weights = [self._weights[row] for row in group]
        halves = torch.arange(len(self._probed)).chunk(2)
        count = self._sizes.directions
        ways = [torch.zeros(2 * count, w.numel(), dtype=torch.float32, device=w.device) for w in weights]
        of_halves = []
        for rows, own in zip(halves, (slice(count), slice(count, None)), strict=True):
            self._let_through()
            half = self._probed.of(rows)
            classes = half.class_numbers(self._model)
            of_halves.append(find_directions(self._model, weights, half, classes, [way[own] for way in ways]))
        grams = list(zip(*of_halves, strict=True))
        slopes, curved = self._along(weights, ways, bar)
        return [_Observed(*of_weight) for of_weight in zip(slopes, curved, grams, strict=True)]

    def _along(
        self, weights: list[nn.Parameter], ways: list[Tensor], bar: Progress
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of the batches along the ways, float64 [batches, ways] for each weight, and those of drawn labels;
        where there are none to draw, the deviations of the former, scaled to samples."""
        slopes: list[list[Tensor]] = [[] for _ in weights]
        curved: list[list[Tensor]] = [[] for _ in weights]
        pending: list[list[Tensor]] = [[] for _ in weights]
        losses = []
        generator = torch.Generator().manual_seed(self._seed)  # the same labels for every group
        drawn = self._probed.class_numbers(self._model) is not None
        batches = torch.arange(len(self._probed)).split(BATCH)

        def read() -> None:
            """All pending gradients at once: the ways are what takes the time to read."""
            for place, held in enumerate(pending):
                found = (torch.stack(held) @ ways[place].T).double().cpu()
                slopes[place] += found[:: 1 + drawn]
                curved[place] += found[1::2] if drawn else []
                held.clear()

        with trainable(weights):
            for number, rows in enumerate(batches, start=1):
                with preserved(self._model, self._seed):
                    output = call_model(self._model, rows_of(self._probed.inputs, rows))
                    loss = self._probed.loss(output, rows)
                    losses.append(float(loss.detach()))
                    if not math.isfinite(losses[-1]):
                        raise ValueError(
                            f"the loss of {len(rows)} samples is {losses[-1]} before any step; profile them: its error "
                            "names the layers"
                        )
                    every = [loss, *([_drawn_loss(output, generator)] if drawn else [])]
                    for place, one in enumerate(every):
                        found = flat_gradients(one, weights, retain_graph=place + 1 < len(every))
                        for held, gradient in zip(pending, found, strict=True):
                            held.append(gradient)
                        del found, gradient
                    del output, loss, every
                if number % PENDING == 0 or number == len(batches):
                    read()
                bar.advance(1.0)
                self._let_through()
        self._start = float(np.mean(losses))
        along = [torch.stack(rows) for rows in slopes]
        if not drawn:
            return along, [(rows - rows.mean(0)) * BATCH**0.5 for rows in along]
        return along, [torch.stack(rows) for rows in curved]

    def _search(self, weight: nn.Parameter, observed: _Observed) -> tuple[np.ndarray, np.ndarray]:
        """Gains and their errors at RATES: each half trains and the other scores."""
        recipe = Recipe()
        rate = recipe.layer_lr(float(weight.detach().double().square().mean().sqrt()))
        gains, errors = np.full((2, len(RATES)), np.nan)
        halves = torch.arange(len(observed.slopes)).chunk(2)
        if not (torch.isfinite(observed.slopes).all() and torch.isfinite(observed.curved).all()):
            return gains, errors
        found = np.empty((2, len(RATES), 2))  # of each half that trains: gains and errors
        for half, gram in enumerate(observed.grams):
            own = slice(half * len(gram), (half + 1) * len(gram))
            slopes, curved = observed.slopes[:, own], observed.curved[:, own]
            train, score = slopes[halves[half]], slopes[halves[1 - half]]
            # Of training, the gradient is what may be luck; of its curvature the more samples tell the better.
            curvature, scored_curvature = _mean_square(curved), _mean_square(curved[halves[1 - half]])
            for place, factor in enumerate(RATES):
                shares = trained(train, curvature, gram, factor * rate, recipe, batch=BATCH)
                found[half, place] = saved(score, scored_curvature, shares)
        gains, errors = found[..., 0].mean(0), np.sqrt((found[..., 1] ** 2).mean(0) / len(found))
        return gains, errors

    def _let_through(self) -> None:
        """Ctrl-C, where the model is as it was but for the head and what requires gradients, put back at the end."""
        with self._interrupts.interruptible():
            pass


@dataclass(frozen=True)
class _Observed:
    """Of one weight, float64: what batches of both halves say of the ways of both halves."""

    slopes: Tensor
    """[batches, ways]"""
    curved: Tensor
    """[batches, ways], whose second moment is the curvature."""
    grams: tuple[Tensor, Tensor]
    """Of the ways of each half, [directions, directions]."""


def _drawn_loss(output: Any, generator: torch.Generator) -> Tensor:
    """Whose gradient has the Gauss-Newton matrix of a sample as its second moment: of labels that the model draws.

    Kunstner, Hennig & Balles, "Limitations of the empirical Fisher approximation", 2019.
    """
    logits = logits_of(output)
    labels = torch.multinomial(logits.detach().double().softmax(-1).cpu(), 1, generator=generator)[:, 0]
    total = nn.functional.cross_entropy(logits, labels.to(logits.device), reduction="sum")
    return total / len(labels) ** 0.5


def _mean_square(rows: Tensor) -> Tensor:
    """[observations, directions] -> [directions, directions]"""
    return rows.T @ rows / len(rows)


def _cautious(gains: np.ndarray) -> int:
    """The place of the rate below the one at which all layers together gain most, of gains [rates, layers].

    Beyond the best the quadratic model ends before the loss does.
    """
    finite = np.isfinite(gains).all(axis=0)
    return max(0, int(gains[:, finite].sum(axis=1).argmax()) - 1) if finite.any() else 0


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


def _warned(names: list[str], gains: np.ndarray) -> list[str]:
    """gains: [rates, layers]"""
    lost = [name for name, finite in zip(names, np.isfinite(gains).any(axis=0), strict=True) if not finite]
    found = [f"the gradients of {some(lost)} are not finite"] if lost else []
    if len(lost) < len(names) and not (gains[np.isfinite(gains)] > 0).any():
        found.append(
            "the loss rises in every probe: the samples may be too few, the labels wrong, or the head may know all "
            "there is; the order of the layers says little"
        )
    for note in found:
        warnings.warn(note, stacklevel=4)
    return found
