"""Test results of an arm, their standard errors, and the sentence that says what was found."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from zest_fast.demo.arms import Run
from zest_fast.demo.measure import Cost


@dataclass(frozen=True)
class ArmResult:
    """An arm after its one look at the test split; several runs where layers were drawn several times."""

    name: str
    runs: list[Run]
    tried: list[dict[str, Any]]  # every learning-rate scale with its validation loss and accuracy
    hits: Tensor  # [runs, test samples]: 1 right, 0 wrong
    costs: list[Cost]  # one a run; empty for a model that is not trained

    @property
    def accuracy(self) -> float:
        return self.hits.mean().item()

    @property
    def standard_error(self) -> float:
        return _standard_error(self.hits.mean(0), self.hits.mean(1))

    def best_on_validation(self, name: str) -> "ArmResult":
        """The one run that the validation split picks: what a search over random choices would find."""
        best = min(range(len(self.runs)), key=lambda number: self.runs[number].loss)
        return ArmResult(name, [self.runs[best]], self.tried, self.hits[best : best + 1], self.costs[best : best + 1])


def difference(a: ArmResult, b: ArmResult) -> tuple[float, float]:
    """Accuracy of a minus that of b, and its standard error, paired over the test samples that both answered."""
    per_sample = a.hits.mean(0) - b.hits.mean(0)
    return per_sample.mean().item(), _standard_error(per_sample, a.hits.mean(1), b.hits.mean(1))


def _standard_error(per_sample: Tensor, *per_run: Tensor) -> float:
    """Of a mean over test samples, and over runs where there are several (their spread adds its own part)."""
    variance = per_sample.var(correction=1).item() / len(per_sample)
    variance += sum(runs.var(correction=1).item() / len(runs) for runs in per_run if len(runs) > 1)
    return math.sqrt(variance)


def finding(chosen: ArmResult, others: list[ArmResult], full: ArmResult) -> str:
    """Two sentences: the chosen layers against each other arm (a difference counts from two standard errors on), and
    what they cost."""
    verdicts = "; ".join(f"{other.name} {_verdict(chosen, other)}" for other in others)
    (cost,), (whole,) = chosen.costs, full.costs
    return (
        f"{chosen.name}, test accuracy against: {verdicts}. It trains {cost.parameters / whole.parameters:.1%} of the "
        f"parameters in {cost.relative:.2f} of the time and {cost.peak_bytes / whole.peak_bytes:.2f} of the memory of "
        f"{full.name}."
    )


def _verdict(a: ArmResult, b: ArmResult) -> str:
    gap, error = difference(a, b)
    figures = f"{100 * gap:+.1f} ± {100 * error:.1f} points"
    if abs(gap) <= 2 * error:
        return f"{figures} (no difference shown)"
    return f"{figures} ({'better' if gap > 0 else 'worse'})"
