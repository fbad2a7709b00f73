"""Choose the layers that train again, during a run.

What an ordinary backward pass leaves is not enough for that: frozen layers have no gradient. So every k-th step takes a
profile of a batch, which leaves nothing behind, and ranks it.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from zest_fast.finetuning.optimizer_check import check_optimizer
from zest_fast.finetuning.rounding import innermost
from zest_fast.finetuning.selective_backward import SelectiveBackward
from zest_fast.finetuning.trainable_layers import Part, chosen_layers, layers_that_can_train
from zest_fast.foundation.interrupts import HeldInterrupts
from zest_fast.foundation.options import MetricNames
from zest_fast.foundation.torch_private import post_accumulate_hooks
from zest_fast.lean.master_weights import MasterWeights
from zest_fast.lean.optimizer import OptimizerInBackward
from zest_fast.profiling.profile import profile
from zest_fast.ranking.ranking import Ranking, Scorer, rank

_log = logging.getLogger("zest_fast")

MARGIN = 0.25
"""By how much a score has to be higher, in standard deviations: what the ranking of two batches differs by without any
training should exchange nothing."""


@dataclass(frozen=True)
class Exchange:
    """What `Reselect.step` has done: `entered[i]` took the place of `left[i]` after `step` optimizer steps."""

    step: int
    left: tuple[str, ...]
    entered: tuple[str, ...]

    def __str__(self) -> str:
        pairs = ", ".join(f"{new} for {old}" for old, new in zip(self.left, self.entered, strict=True))
        return f"step {self.step}: {pairs}"


class Reselect:
    """Choose the layers of a SelectiveBackward again at every k-th step: call `.step(batch)` after `optimizer.step()`.

    That step takes a profile of `batch` (at the cost of a step of full fine-tuning), ranks it, and lets the best layer
    that is frozen take the place of the worst one that trains, then the next, as long as its score is higher by
    `margin`. As many layers train as before, and the head stays. A layer that the ranking gives no finite score stays
    where it is, and so does one that could not train (quantised by bitsandbytes, on disk). Other steps only count.

    A layer that enters takes the places of the one that it replaces in the optimizer's groups: rates, weight decay and
    schedulers, which go by groups, act on it as they are. Its weight goes where a weight was, its bias where a bias
    was; where there was none, where another layer's bias is, or else to its weight. It starts without an optimizer
    state, at the rate of that moment. What leaves is frozen with what it has learned, has no gradient, and is in
    `tuned.save()`.

    Whether it pays is another matter: see docs/watch.md for what was measured.

    Args:
        tuned: the wrapped model.
        optimizer: the one that holds what trains.
        every: optimizer steps from one choice to the next; the first is after that many.
        by: as in `rank`; None = the Ranker that ships.
        margin: by how much a score has to be higher, in standard deviations of the scores of all layers that could
            train. 0 = any better layer enters.
        batch: a fixed one, as for `profile`, for every choice; None = the one that `.step` is given.
        loss_fn: as for `profile`.
        closure: as for `profile`, instead of a batch.
        metrics: as for `profile`; what `by` needs has to be among them.
        states: of the optimizer for a layer that leaves: "drop", or "keep" them until it comes back.

    Attributes:
        steps: that were counted.
        exchanges: what was done, in order.
        ranking: the last one; None before.

    Raises:
        ValueError, TypeError: an argument that does not fit; an optimizer that lacks what trains or holds what is
            frozen. Of `.step`: a step without a batch, and what `profile` and `rank` raise; nothing is exchanged then.
        NotImplementedError: an optimizer that cannot take up a parameter by itself (LBFGS, Muon, Adagrad, schedule-free
            ones, MasterWeights) or steps in the backward pass; models as `SelectiveBackward.exchange` refuses them. In
            each case nothing has changed. Ctrl-C waits for the end of an exchange.

    Examples:
        >>> import torch, zest_fast
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> tuned = zest_fast.SelectiveBackward(model, ["0"])
        >>> optimizer = torch.optim.AdamW(tuned.parameters(), lr=0.01)
        >>> reselect = zest_fast.Reselect(tuned, optimizer, every=2, by="snip", margin=0)
        >>> for x in torch.randn(4, 6, 4):
        ...     nn.functional.cross_entropy(model(x), torch.arange(6) % 3).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     _ = reselect.step((x, torch.arange(6) % 3))
        >>> reselect.steps, len(tuned.layers)
        (4, 1)
    """

    def __init__(
        self,
        tuned: SelectiveBackward,
        optimizer: Any,
        *,
        every: int = 200,
        by: str | Scorer | None = None,
        margin: float = MARGIN,
        batch: Any = None,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        closure: Callable[[], Tensor] | None = None,
        metrics: MetricNames | None = None,
        states: Literal["drop", "keep"] = "drop",
    ) -> None:
        if not isinstance(tuned, SelectiveBackward):
            raise TypeError(f"tuned must be a SelectiveBackward, not {type(tuned).__name__}")
        if isinstance(every, bool) or operator.index(every) < 1:
            raise ValueError(f"every={every!r}: optimizer steps from one choice to the next, at least 1")
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < float("inf"):
            raise ValueError(f"margin={margin!r}: standard deviations of the scores, at least 0")
        if states not in ("drop", "keep"):
            raise ValueError(f"states must be 'drop' or 'keep', not {states!r}")
        if batch is not None and closure is not None:
            raise ValueError("batch and closure were both given; a profile takes one of them")
        if by is not None and not isinstance(by, str | Scorer):
            raise TypeError(f"by must be a metric name or have .predict(profile), not {type(by).__name__}")
        if not tuned.layers:
            raise ValueError("tuned trains no layer beside the head: there is nothing to exchange")
        self.tuned, self.optimizer = tuned, innermost(optimizer)
        self._every, self._by, self._margin, self._batch = operator.index(every), by, float(margin), batch
        self._loss_fn, self._closure, self._metrics = loss_fn, closure, metrics
        self._keeps = states == "keep"
        self._kept: dict[str, Any] = {}  # optimizer states by parameter name
        self._places: dict[str, _Place] = {}
        self._check()
        self.steps = 0
        self.exchanges: list[Exchange] = []
        self.ranking: Ranking | None = None

    def step(self, batch: Any = None) -> Exchange | None:
        """Count a step of the optimizer, after it was taken; choose again where it is time.

        Args:
            batch: as for `profile`: a mapping with labels, or a pair (inputs, targets). Not needed where one was given
                when this was built.

        Returns:
            What was exchanged; None where nothing was.

        Raises:
            ValueError: no batch; and what `choose` raises.
        """
        if batch is None and not self.has_a_batch:
            raise ValueError("step: no batch to profile; call .step(batch), or give Reselect a batch= or closure=")
        self.steps += 1
        return self.choose(batch) if self.steps % self._every == 0 else None

    @property
    def has_a_batch(self) -> bool:
        """Whether `.step` needs none."""
        return self._batch is not None or self._closure is not None

    def choose(self, batch: Any = None) -> Exchange | None:
        """Choose now, whatever the count says.

        Args:
            batch: as for `.step`.

        Returns:
            What was exchanged; None where nothing was.

        Raises:
            ValueError, TypeError, RuntimeError, NotImplementedError: what the profile, the ranking or the exchange
                refuses; nothing has changed then.
        """
        self._check()
        batch = self._batch if batch is None else batch
        if self._closure is not None:
            batch = None
        found = profile(self.tuned.model, batch, loss_fn=self._loss_fn, closure=self._closure, metrics=self._metrics)
        self.ranking = rank(found, by=self._by)
        pairs = self._pairs(self.ranking)
        if not pairs:
            return None
        self._exchange(pairs)
        done = Exchange(self.steps, tuple(pairs), tuple(pairs.values()))
        self.exchanges.append(done)
        _log.info("reselect: %s", done)
        return done

    def _check(self) -> None:
        """Raises what an exchange would, so that nothing is found out in the middle of one; knows the groups then."""
        tuned, optimizer = self.tuned, self.optimizer
        tuned.check_exchange(tuned.layers)
        check_optimizer(optimizer, _training(tuned), tuned.model)
        for kind in _WITHOUT_NEW_PARAMETERS:
            if isinstance(optimizer, getattr(torch.optim, kind, ())):
                raise NotImplementedError(
                    f"optimizer: {kind} prepares or checks its parameters when it is built, and layers cannot be "
                    "exchanged in it; train with another one, such as AdamW or SGD"
                )
        if isinstance(optimizer, MasterWeights):
            raise NotImplementedError(
                "optimizer: MasterWeights holds a float32 master of each weight, made when it was built, and layers "
                "cannot be exchanged in it; let the model or its chosen layers be float32"
            )
        if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
            raise NotImplementedError(
                f"optimizer: {type(optimizer).__name__} keeps other weights in training than it gives in evaluation "
                "(schedule-free), and a layer that leaves would stay with those of training; train with another one"
            )
        for name, parameter in _training(tuned).items():
            hooks = post_accumulate_hooks(parameter) or {}
            if any(isinstance(getattr(hook, "__self__", None), OptimizerInBackward) for hook in hooks.values()):
                raise NotImplementedError(
                    f"optimizer: {name!r} is stepped within the backward pass (optimizer_in_backward), which does not "
                    "follow an exchange; step after it"
                )
        parts = chosen_layers(tuned.model, tuned.layers)  # others than before where somebody else exchanged them
        self._places = {part.name: self._places.get(part.name) or self._place_of(part) for part in parts}

    def _place_of(self, part: Part) -> _Place:
        weight, *biases = (self._group_of(parameter) for parameter in part.parameters)
        return _Place(weight, biases[0] if biases else None)

    def _group_of(self, parameter: Tensor) -> int:
        groups = enumerate(self.optimizer.param_groups)
        return next(number for number, group in groups if any(p is parameter for p in group["params"]))

    def _pairs(self, ranking: Ranking) -> dict[str, str]:
        """What leaves -> what takes its place: for the worst that trains the best that does not, and so on."""
        tuned = self.tuned
        can = layers_that_can_train(tuned.model, tuned.head)
        scores = {
            name: float(score)
            for name, score in zip(ranking.names, ranking.scores, strict=True)
            if name in can and np.isfinite(score) and (name in tuned.layers or name not in ranking.heads)
        }
        ahead = self._margin * float(np.std(list(scores.values()))) if scores else 0.0
        best_first = [name for name in ranking.names if name in scores]
        inside = [name for name in reversed(best_first) if name in tuned.layers]
        outside = [name for name in best_first if name not in tuned.layers]
        pairs = {}
        for old, new in zip(inside, outside, strict=False):
            if not scores[new] > scores[old] + ahead:
                break
            pairs[old] = new
        return pairs

    def _exchange(self, pairs: Mapping[str, str]) -> None:
        """In the model and in the optimizer, or in neither: what may fail comes first."""
        tuned, optimizer = self.tuned, self.optimizer
        layers = [pairs.get(name, name) for name in tuned.layers]
        parts = {part.name: part for part in chosen_layers(tuned.model, layers)}
        names = {id(parameter): name for name, parameter in tuned.model.named_parameters()}
        before = _training(tuned)
        after = tuned.check_exchange(layers)
        staying = {id(p) for name, p in before.items() if name in after}
        leaving = {name: p for name, p in before.items() if id(p) not in staying}
        places = {pairs.get(name, name): place for name, place in self._places.items()}
        entering: dict[str, tuple[int, nn.Parameter]] = {}
        for new in pairs.values():
            for number, parameter in enumerate(parts[new].parameters):
                if id(parameter) not in staying:
                    group = self._group_for_bias(places[new]) if number else places[new].weight
                    entering.setdefault(names[id(parameter)], (group, parameter))
        contents = _without(optimizer, leaving)
        for name, (number, parameter) in entering.items():
            contents[number].append((parameter, name))
        kept = {name: optimizer.state[p] for name, p in leaving.items() if p in optimizer.state} if self._keeps else {}
        back = {p: self._kept[name] for name, (_, p) in entering.items() if name in self._kept}
        kept = {**{name: state for name, state in self._kept.items() if name not in entering}, **kept}
        with HeldInterrupts():
            tuned.exchange(layers)
            for group, content in zip(optimizer.param_groups, contents, strict=True):
                group["params"][:] = [parameter for parameter, _ in content]
                if "param_names" in group:
                    group["param_names"][:] = [name for _, name in content]
            for parameter in leaving.values():
                optimizer.state.pop(parameter, None)
            optimizer.state.update(back)
            self._places, self._kept = places, kept

    def _group_for_bias(self, place: _Place) -> int:
        if place.bias is not None:
            return place.bias
        return next((other.bias for other in self._places.values() if other.bias is not None), place.weight)


class _Place(NamedTuple):
    """Numbers of the optimizer's groups that the parameters of a layer are in. bias: None where the first had none."""

    weight: int
    bias: int | None


_WITHOUT_NEW_PARAMETERS = ("LBFGS", "Muon", "Adagrad")


def _training(tuned: SelectiveBackward) -> dict[str, nn.Parameter]:
    return dict(zip(tuned.trainable_names, tuned.parameters(), strict=True))


def _without(optimizer: Any, leaving: Mapping[str, Tensor]) -> list[list[tuple[Tensor, Any]]]:
    """The (parameter, name) of each group; names where it has some."""
    gone = {id(parameter) for parameter in leaving.values()}
    return [
        [
            (parameter, name)
            for parameter, name in zip(
                group["params"], group.get("param_names") or [None] * len(group["params"]), strict=True
            )
            if id(parameter) not in gone
        ]
        for group in optimizer.param_groups
    ]
