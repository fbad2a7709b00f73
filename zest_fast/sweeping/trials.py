"""Trials: one layer trained alone with the head under one seed, then scored. What a worker of a sweep does."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zest_fast.finetuning.trainable_layers import Part
from zest_fast.prefix.boundaries import Boundary, Call, NotReusable
from zest_fast.prefix.inputs import Inputs, batches
from zest_fast.prefix.volatile_state import preserved
from zest_fast.sweeping.objectives import Objective
from zest_fast.sweeping.recipe import Recipe
from zest_fast.sweeping.reused_prefix import ReusedPrefix

COMPARED = 8
"""Scored samples on which a layer's passes are compared with full ones after training, once those of another layer were
right for a whole chunk. Before it, a whole batch is compared: what a model does may depend on its size."""


class Trial(NamedTuple):
    layer: str
    seed: int


@dataclass(frozen=True, eq=False)
class LayerTask:
    """One layer with what is left to do for it, and where its passes are taken up."""

    part: Part
    seeds: tuple[int, ...]
    place: Call
    """The first call that uses the layer's weight."""
    boundary: Boundary

    @property
    def cost(self) -> float:
        """Seconds of a traced pass from the boundary on: what a trial costs, up to a factor."""
        return self.boundary.trace.seconds - self.boundary.start


@dataclass(eq=False)
class Trials:
    """All that trials need. A worker has its own, pickled or forked: a trial changes the model and changes it back."""

    model: nn.Module
    head: nn.Linear
    recipe: Recipe
    heads: Mapping[int, tuple[Tensor, Tensor]]
    """Weight and bias of the head that each seed starts from."""
    rows: Mapping[int, Tensor]
    """The samples of `train` that each seed trains on."""
    tasks: Mapping[str, LayerTask]
    """By layer, in the order of the boundaries."""
    train: tuple[Inputs, Objective]
    score: tuple[Inputs, Objective]
    limit: int
    """Bytes a sample that are kept in memory; beyond, on disk in `folder`."""
    folder: Path
    _caches: tuple[ReusedPrefix, ReusedPrefix] | None = field(default=None, init=False)
    _blamed: set[Call] = field(default_factory=set, init=False)
    """Calls that were not as the traced ones: no pass skips them."""
    _checked: set[str] = field(default_factory=set, init=False)
    """Layers whose passes were compared with full ones."""
    _plain: set[str] = field(default_factory=set, init=False)
    """Layers that failed that."""

    def left(self) -> list[Trial]:
        """What is to be done, in the order that moves the boundary upwards only."""
        return [Trial(layer, seed) for layer, task in self.tasks.items() for seed in task.seeds]

    def run(self, trial: Trial) -> dict[str, Any]:
        """What the objective records after the training, and the seconds that it all took.

        Where passes from the boundary turn out not to be full ones, it is done again with full ones; a warning says so.
        """
        began = time.perf_counter()
        task = self.tasks[trial.layer]
        result = None
        if self._reuses(task):
            try:
                result = self._measure(trial, *self._caches_at(task.boundary), check=trial.layer not in self._checked)
                self._checked.add(trial.layer)
            except NotReusable as error:
                self._plain.add(trial.layer)
                self._blamed |= {error.blamed} if error.blamed is not None else set()
                first, last = (task.boundary.skipped[place].name for place in (0, -1))
                warnings.warn(
                    f"what lies below {trial.layer!r} (from {first!r} to {last!r}) was not reused: {error}. The full "
                    "forward pass runs instead, which takes longer; its scores are those without reuse",
                    stacklevel=2,
                )
        if result is None:
            result = self._measure(trial, *self._new_caches())
        return {**result, "seconds": round(time.perf_counter() - began, 3)}

    def _reuses(self, task: LayerTask) -> bool:
        boundary = task.boundary
        if task.part.name in self._plain or not boundary.skipped:
            return False
        return not self._blamed or self._blamed.isdisjoint(boundary.trace.expected(boundary.skipped, boundary.skipped))

    def _measure(
        self, trial: Trial, train: ReusedPrefix, score: ReusedPrefix, *, check: bool = False
    ) -> dict[str, Any]:
        part = self.tasks[trial.layer].part
        set_head(self.head, *self.heads[trial.seed])
        with saved_parameters(part.parameters), preserved(self.model, trial.seed):
            self._train(part, trial.seed, train, check)
            if check:
                with torch.no_grad():
                    score.check(self._compared(trial.layer, len(score)))
            return evaluate(score, self.score[1])

    def _caches_at(self, boundary: Boundary) -> tuple[ReusedPrefix, ReusedPrefix]:
        if self._caches is None:
            self._caches = self._new_caches()
        for cache in self._caches:
            cache.advance(boundary)
        return self._caches

    def _new_caches(self) -> tuple[ReusedPrefix, ReusedPrefix]:
        """That have not moved from the input."""
        train, score = (
            ReusedPrefix(self.model, inputs, limit=self.limit, folder=self.folder, batch_size=objective.chunk)
            for inputs, objective in (self.train, self.score)
        )
        return train, score

    def _compared(self, layer: str, samples: int) -> Tensor:
        """The scored samples that a layer's pass is compared on: the next few with every layer, whole chunks until one
        layer has passed and after one has failed."""
        first = COMPARED * list(self.tasks).index(layer)
        size = COMPARED if self._checked and not self._plain else self.score[1].chunk
        return torch.arange(samples).roll(-first)[:size]

    def _train(self, part: Part, seed: int, cache: ReusedPrefix, check: bool = False) -> None:
        recipe, objective = self.recipe, self.train[1]
        rms = float(part.parameters[0].detach().double().square().mean().sqrt())
        head = list(self.head.parameters())
        groups = [
            {"params": list(part.parameters), "lr": recipe.layer_lr(rms)},
            {"params": head, "lr": recipe.head_lr},
        ]
        trained = [*part.parameters, *head]
        optimizer = torch.optim.Adam(groups)
        rates = [group["lr"] for group in optimizer.param_groups]
        for parameter in trained:
            parameter.requires_grad_(True)
        try:
            with torch.enable_grad():
                for step, batch in enumerate(_batches_of(self.rows[seed], recipe.steps, recipe.batch_size, seed)):
                    for group, rate in zip(optimizer.param_groups, rates, strict=True):
                        group["lr"] = rate * recipe.learning_rate_scale(step)
                    if check and step == 0:
                        cache.check(batch)
                    loss = objective.loss(cache.run(batch), batch)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        finally:
            for parameter in trained:
                parameter.requires_grad_(False)
                parameter.grad = None


@torch.no_grad()
def evaluate(cache: ReusedPrefix, objective: Objective) -> dict[str, Any]:
    """What the objective records of the model as it is, over all samples of the cache."""
    return objective.evaluate((rows, cache.run(rows)) for rows in batches(len(cache), objective.chunk))


@torch.no_grad()
def set_head(head: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    """The bias is ignored where the head has none."""
    head.weight.copy_(weight.view_as(head.weight))
    if head.bias is not None:
        head.bias.copy_(bias)


@contextmanager
def saved_parameters(parameters: tuple[nn.Parameter, ...]) -> Iterator[list[Tensor]]:
    """At the end the values of these parameters are what they were; yields copies of these."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield before
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


def draw(available: int, wanted: int | None, seed: int) -> Tensor:
    """Row numbers for a seed: its own part of one permutation, or random ones where the split is too small for that."""
    if wanted is None or wanted >= available:
        return torch.arange(available)
    if (seed + 1) * wanted <= available:
        order = torch.randperm(available, generator=torch.Generator().manual_seed(0))
        return order[seed * wanted : (seed + 1) * wanted]
    return torch.randperm(available, generator=torch.Generator().manual_seed(seed + 1))[:wanted]


def _batches_of(rows: Tensor, steps: int, size: int, seed: int) -> Iterator[Tensor]:
    """The same batches for every layer of a seed: epochs in random order, without the incomplete batch at the end."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, len(rows))
    done = 0
    while done < steps:
        order = rows[torch.randperm(len(rows), generator=generator)]
        for batch in order[: len(rows) // size * size].split(size)[: steps - done]:
            yield batch
            done += 1
