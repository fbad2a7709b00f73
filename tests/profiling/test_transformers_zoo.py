"""`zest_fast.profile()` on tiny models of transformers, held against the oracle.

The default suite takes a handful of kinds; `pytest -m slow tests/profiling/test_transformers_zoo.py -s` takes all that
can be built and prints those that cannot, and those that are not exact, with the reasons.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import pytest
from oracle import Measurement, compare, measure
from transformers_builder import NotBuilt, Tiny, architectures, build, described
from untouched import changes, state_of

import zest_fast

HANDFUL = (
    "albert",
    "bart",
    "bert",
    "convnext",
    "deberta-v2",
    "distilbert",
    "efficientnet",
    "gemma",
    "gpt2",
    "gpt_neox",
    "hubert",
    "llama",
    "longformer",
    "mamba",
    "mixtral",
    "mobilenet_v2",
    "opt",
    "qwen3",
    "qwen3_moe",
    "resnet",
    "roberta",
    "swin",
    "t5",
    "vit",
    "wav2vec2",
    "whisper",
)
BUILT_AT_LEAST = 245
LEFT_OUT_AT_MOST = 0.02


@dataclass
class Outcome:
    """What is wrong with one profile, how many cells it has, and how many of them plain autograd itself misses."""

    wrong: list[str]
    cells: int = 0
    left_out: int = 0

    @property
    def judged(self) -> bool:
        """Whether most of the table is within reach of plain autograd."""
        return self.left_out <= 0.5 * self.cells


def measured(tiny: Tiny) -> Measurement:
    """The oracle's table, after a first forward pass: some models complete or change themselves in there."""
    tiny.closure()
    return measure(tiny.model, tiny.closure)


def specification(tiny: Tiny, own: Measurement) -> Measurement:
    """The float64 run; plain autograd in float32 where a model cannot do without float32: it raises or gives NaN."""
    try:
        spec = measured(tiny.in_double())
    except Exception:
        return own
    cells = [(spec.values[row][metric], own.values[row][metric]) for row in own.values for metric in own.values[row]]
    return own if any(math.isnan(a) and not math.isnan(b) for a, b in cells) else spec


def outcome(tiny: Tiny) -> Outcome:
    own = measured(tiny.again())
    spec = specification(tiny, own)
    tiny.closure()
    before = state_of(tiny.model)
    try:
        profile = zest_fast.profile(tiny.model, closure=tiny.closure)
    except Exception as error:
        return Outcome([f"profile raised {described(error)}"])
    table = {name: {metric: float(profile[name][metric]) for metric in profile.metrics} for name in profile.names}
    verdict = compare(table, spec, own)
    changed = [f"changed: {what}" for what in changes(before, state_of(tiny.model))]
    return Outcome(verdict.misses + changed, verdict.cells, len(verdict.left_out))


@functools.cache
def outcome_of(model_type: str) -> Outcome:
    return outcome(build(model_type))


@pytest.mark.parametrize("model_type", HANDFUL)
def test_exact(model_type: str) -> None:
    result = outcome_of(model_type)
    assert result.wrong == []
    assert result.judged


def test_few_cells_are_beyond_plain_autograd() -> None:
    """Of all together: which models have more of them depends on the processor, that adds up in an order of its own."""
    results = [outcome_of(model_type) for model_type in HANDFUL]
    assert sum(r.left_out for r in results) <= LEFT_OUT_AT_MOST * sum(r.cells for r in results)


@pytest.mark.slow
def test_every_architecture_that_can_be_built() -> None:
    not_built: dict[str, str] = {}
    results: dict[str, Outcome] = {}
    for model_type in architectures():
        try:
            tiny = build(model_type)
        except NotBuilt as reason:
            not_built[model_type] = str(reason)
        else:
            results[model_type] = outcome(tiny)
    unjudged = [name for name, result in results.items() if not result.judged]
    judged = [result for result in results.values() if result.judged]
    left_out, cells = sum(result.left_out for result in judged), sum(result.cells for result in judged)
    wrong = {name: result.wrong for name, result in results.items() if result.wrong}
    print(
        f"\n{len(results)} architectures of {len(results) + len(not_built)} built; {left_out} of {cells} cells left out"
    )
    print_list("Not built", not_built)
    print_list("Beyond plain float32 autograd in most of the cells", dict.fromkeys(unjudged, ""))
    print_list("Not exact", {name: "; ".join(misses[:3]) for name, misses in wrong.items()})
    assert len(results) >= BUILT_AT_LEAST
    assert left_out <= LEFT_OUT_AT_MOST * cells
    assert len(set(wrong) | set(unjudged)) <= 0.05 * len(results)


def print_list(title: str, reasons: dict[str, str]) -> None:
    print(f"\n{title}: {len(reasons)}")
    for name, reason in reasons.items():
        print(f"  {name}: {reason[:300]}")
