"""Which n layers to train when some are as good as others: those above which less has to be differentiated."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, get_args

from torch import nn

from zest_fast.foundation.byte_counts import memory_bytes
from zest_fast.foundation.nearest import nearest
from zest_fast.foundation.options import Checkpoint, Frozen, Preference
from zest_fast.planning.batches import stand_in_batch
from zest_fast.planning.optimizers import Build
from zest_fast.planning.plan import planned_peak
from zest_fast.planning.step_costs import StepCosts, costs_of_ranking, measured_costs
from zest_fast.ranking.ranking import Ranking

PREFERENCES: tuple[str, ...] = get_args(Preference)
PRICE = 2.0
"""What a share of the promised gain is worth in shares of a step: 1 % of what the n best layers promise over average
ones is given up for no less than 2 % of the FLOPs. Fixed on simulated rankings (bench/choose.py shows other prices)."""

_log = logging.getLogger("zest_fast")


class Choice(tuple[str, ...]):
    """The names of the chosen layers, best first, with what the choice traded: what `zest_fast.choose` returns.

    Attributes:
        explanation: the trade in words.
        given_up: layers of the top n that are not chosen.
        taken: those in their place.
        step: cost of a training step relative to full fine-tuning.
        step_of_top: that of the top n.
        peak_bytes: of a step of AdamW where max_memory asked for it, else None.

    Examples:
        >>> import zest_fast
        >>> choice = zest_fast.Choice(["4", "0"], explanation="the best two")
        >>> list(choice), choice.explanation, choice.given_up
        (['4', '0'], 'the best two', ())
    """

    def __new__(
        cls,
        names: Iterable[str],
        *,
        explanation: str = "",
        given_up: tuple[str, ...] = (),
        taken: tuple[str, ...] = (),
        step: float = math.nan,
        step_of_top: float = math.nan,
        peak_bytes: int | None = None,
    ) -> Choice:
        choice = super().__new__(cls, names)
        choice.explanation, choice.given_up, choice.taken = explanation, given_up, taken
        choice.step, choice.step_of_top, choice.peak_bytes = step, step_of_top, peak_bytes
        return choice

    explanation: str
    given_up: tuple[str, ...]
    taken: tuple[str, ...]
    step: float
    step_of_top: float
    peak_bytes: int | None


def choose(
    ranking: Ranking,
    n: int,
    *,
    model: nn.Module | None = None,
    batch: Any = None,
    max_memory: str | int | None = None,
    prefer: Preference = "score",
    checkpoint: Checkpoint | None = None,
    frozen: Frozen | None = None,
    stream: bool = False,
    optimizer: str | Build = "adamw",
    accumulating: bool = False,
) -> Choice:
    """Which `n` layers to train: the best, or as good ones above which less has to be differentiated.

    Args:
        ranking: as `rank` returns it.
        n: how many layers.
        model: to count FLOPs on, on fake tensors: nothing is computed, the model stays as it is. Without a model, costs
            come from the profile and take it that each layer sees as many positions: right for the linear layers of a
            transformer, not for convolutions.
        batch: as in `profile`. Without one, a model of transformers gets 1 x 512 tokens or 32 images.
        max_memory: bytes, or "16GB" (10^9) or "16GiB" (2^30). If the set needs more, the lowest layers are exchanged
            for the best ones above a higher cut until a step of AdamW fits, as a dry run of model and batch counts it.
        prefer: "score" = the n best; "cheap-cut" = layers are exchanged for higher ones whose scores are equal within
            the ranking's uncertainty (the 80 % interval of their difference holds zero), as long as that saves enough
            FLOPs for what the scores lose (PRICE). Scores without intervals, as those of a single metric, have no
            uncertainty to trade: only layers of the very same score are exchanged.
        checkpoint: of the SelectiveBackward that shall fit; without max_memory it changes nothing, as all that follow.
        frozen: the same.
        stream: frozen weights stay on disk, as for `plan`.
        optimizer: as for `plan`.
        accumulating: the same.

    Returns:
        A tuple of names, best first; what they cost and what was traded is in its `.explanation`.

    Raises:
        ValueError: n below 1 or beyond the scored layers, a ranking of another model, or no set of n layers fits into
            max_memory (the least that is needed is named).
        TypeError: no ranking.

    Examples:
        >>> import torch, zest_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> batch = torch.randn(6, 4), torch.randint(3, (6,))
        >>> ranking = zest_fast.rank(zest_fast.profile(model, batch), by="snip")
        >>> chosen = zest_fast.choose(ranking, 1, model=model, batch=batch, max_memory="1MB")
        >>> len(chosen), chosen.peak_bytes < 10**6
        (1, True)
    """
    if not isinstance(ranking, Ranking):
        raise TypeError(f"ranking must be a Ranking, as rank(profile) returns, not {type(ranking).__name__}")
    if prefer not in PREFERENCES:
        raise ValueError(f"prefer={prefer!r} is unknown; {nearest(prefer, PREFERENCES)}")
    if model is None and (batch is not None or max_memory is not None):
        argument = "batch" if batch is not None else "max_memory"
        raise ValueError(f"{argument} needs model=: a step is counted on the model itself")
    limit = None if max_memory is None else memory_bytes(max_memory)
    assumed = ""
    if model is not None and batch is None:
        batch = stand_in_batch(model)
        assumed = f"\n  counted on a batch of {list(next(iter(batch.values())).shape)}; pass batch= for yours"
    costs = costs_of_ranking(ranking) if model is None else measured_costs(model, batch)
    candidates = Candidates(ranking, n, costs)
    sets = candidates.sets()
    chosen = candidates.cheap_cut() if prefer == "cheap-cut" else sets[0]
    peak = None
    if model is not None and limit is not None:
        higher = [names for names in sets if candidates.cut(names) > candidates.cut(chosen)]

        def needs(names: tuple[str, ...]) -> int:
            return planned_peak(
                model,
                batch,
                names,
                head=costs.head or None,
                checkpoint=checkpoint,
                frozen=frozen,
                stream=stream,
                optimizer=optimizer,
                accumulating=accumulating,
            )

        chosen, peak = _first_that_fits([chosen, *higher], needs, limit)
    choice = candidates.choice(chosen, peak, assumed)
    _log.info(choice.explanation)
    return choice


class Candidates:
    """The layers that can be chosen, their scores and what they cost; price: see PRICE."""

    def __init__(self, ranking: Ranking, n: int, costs: StepCosts, price: float = PRICE) -> None:
        top = ranking.top(n)  # says what is wrong with n
        head = ranking.explain()["head"].to_numpy(dtype=bool)
        self._by, self._costs, self._n, self._price = ranking.by, costs, len(top), price
        half = (ranking.intervals[:, 1] - ranking.intervals[:, 0]) / 2
        rows = zip(ranking.names, ranking.scores.tolist(), half.tolist(), head, strict=True)
        self._rows = {name: (score, half) for name, score, half, head in rows if not head and not math.isnan(score)}
        for name in self._rows:
            if name not in costs.layers:
                missing = f"the ranking has the layer {name!r}, the model has not"
                raise ValueError(f"{missing}; {nearest(name, costs.layers)}")

    def cut(self, names: Sequence[str]) -> int:
        """The rank in the forward pass down to which backward runs."""
        return min(self._costs.layers[name].cut for name in names)

    def sets(self) -> list[tuple[str, ...]]:
        """The n best layers, then the n best of those above the lowest of these, and so on, as long as there are n."""
        found = []
        names = list(self._rows)
        while len(names) >= self._n:
            found.append(tuple(names[: self._n]))
            lowest = self.cut(found[-1])
            names = [name for name in names if self._costs.layers[name].cut > lowest]
        return found

    def cheap_cut(self) -> tuple[str, ...]:
        """Of the sets equal to the n best within the uncertainty, the one with the best of score and step."""
        sets = self.sets()
        equal = [names for names in sets if all(self._equal(*pair) for pair in _exchanges(sets[0], names))]
        step = self._costs.step(sets[0])
        return min(equal, key=lambda names: self._costs.step(names) / step + self._price * self.promise_lost(names))

    def promise_lost(self, names: Sequence[str]) -> float:
        """By how much the mean score is below that of the n best, as a share of their lead over the average layer."""
        top, chosen = (statistics.fmean(self._rows[name][0] for name in some) for some in (self.sets()[0], names))
        lead = top - statistics.fmean(score for score, _ in self._rows.values())
        return (top - chosen) / lead if lead > 0 else 0.0

    def _equal(self, out: str, taken: str) -> bool:
        """Whether the interval of the difference of their scores holds zero, errors normal and independent."""
        (score, half), (lower_score, lower_half) = self._rows[out], self._rows[taken]
        return score == lower_score or score - lower_score <= math.hypot(half, lower_half)

    def choice(self, names: tuple[str, ...], peak: int | None, assumed: str = "") -> Choice:
        """The set with what it traded. assumed: what its explanation ends with."""
        top = self.sets()[0]
        exchanges = _exchanges(top, names)
        full = self._costs.full
        facts: dict[str, Any] = {
            "given_up": tuple(out for out, _ in exchanges),
            "taken": tuple(taken for _, taken in exchanges),
            "step": self._costs.step(names) / full,
            "step_of_top": self._costs.step(top) / full,
            "peak_bytes": peak,
        }
        return Choice(names, explanation="\n".join(self._explain(Choice(names, **facts), top)) + assumed, **facts)

    def _explain(self, choice: Choice, top: tuple[str, ...]) -> Iterator[str]:
        yield f"{len(choice)} layers by {self._by}: {', '.join(choice)}"
        if choice.given_up:
            lost = f"{self.promise_lost(choice):.0%} of their lead over the average layer is given up"
            yield f"not the best {len(choice)} of the ranking, but cheaper ({lost}):"
        for out, taken in zip(choice.given_up, choice.taken, strict=True):
            equal = "equal within the uncertainty" if self._equal(out, taken) else "not equal, but it fits"
            yield f"  {taken} ({self._score(taken)}) for {out} ({self._score(out)}): {equal}"
        if all(math.isnan(self._rows[name][1]) for name in top):
            yield f"{self._by} gives no intervals: only equal scores count as equal"
        where = f"backward ends at {self._lowest(choice)}"
        step = f"a step costs {choice.step:.2f} of full fine-tuning"
        if choice.given_up:
            where += f" instead of {self._lowest(top)}"
            step += f" instead of {choice.step_of_top:.2f} ({choice.step / choice.step_of_top - 1:+.0%})"
        yield f"{where}; {step} in FLOPs"
        if not self._costs.measured:
            yield "  counted with as many positions in every layer; pass model= and batch= where that is not so"
        if choice.peak_bytes is not None:
            yield f"a step of AdamW holds {_bytes(choice.peak_bytes)} at the most"

    def _score(self, name: str) -> str:
        score, half = self._rows[name]
        return f"{score:.4g}" + ("" if math.isnan(half) else f" ± {half:.2g}")

    def _lowest(self, names: Sequence[str]) -> str:
        return min(names, key=lambda name: self._costs.layers[name].cut)


def _exchanges(top: Sequence[str], names: Sequence[str]) -> list[tuple[str, str]]:
    """(given up, taken in its place): the best of the one with the best of the other."""
    out = [name for name in top if name not in names]
    taken = [name for name in names if name not in top]
    return list(zip(out, taken, strict=True))


def _first_that_fits(
    sets: Sequence[tuple[str, ...]], needs: Callable[[tuple[str, ...]], int], limit: int
) -> tuple[tuple[str, ...], int]:
    """A set whose step fits, as far to the front as possible: by bisection, since as a rule a step holds the less the
    higher the cut. Where larger layers lie above, so that the last set does not fit, one after the other.
    """
    peaks = {0: needs(sets[0])}
    if peaks[0] <= limit:
        return sets[0], peaks[0]
    last = len(sets) - 1
    peaks[last] = needs(sets[last])
    if peaks[last] > limit:
        for place in range(1, last):
            peaks[place] = needs(sets[place])
            if peaks[place] <= limit:
                return sets[place], peaks[place]
        raise ValueError(
            f"max_memory: no {len(sets[0])} layers fit into {_bytes(limit)}; with those that need the least, a step of "
            f"AdamW holds {_bytes(min(peaks.values()))}. Choose fewer layers, a smaller batch or a narrower dtype"
        )
    low, high = 1, last
    while low < high:
        middle = (low + high) // 2
        peaks[middle] = needs(sets[middle])
        low, high = (low, middle) if peaks[middle] <= limit else (middle + 1, high)
    return sets[low], peaks[low]


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.3f} MB"
