"""What users write, for type checkers: tests/test_types.py holds `mypy --strict` against it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import zest_fast
from zest_fast import Choice, LayerProfile, Plan, Ranker, Ranking, Recipe, SelectiveBackward


def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, targets)


def main() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    batch = torch.randn(6, 4), torch.randint(3, (6,))
    profile: LayerProfile = zest_fast.profile(model, batch, loss_fn=loss_fn, metrics=["snip", "fisher"], backend="cpu")
    again = zest_fast.profile(model, batch, metrics=profile.metrics)
    value: float = again["0"]["snip"]
    ranking: Ranking = zest_fast.rank(profile, by="snip")
    layers: Choice = zest_fast.choose(ranking, 1, prefer="cheap-cut")
    with SelectiveBackward(model, layers, checkpoint=None, frozen=None) as tuned:
        optimizer = zest_fast.adamw(tuned.parameters(), lr=1e-4)
        with zest_fast.optimizer_in_backward(optimizer):
            torch.autograd.backward(loss_fn(model(batch[0]), batch[1]))
        report: str = tuned.verify()
        tuned.save("delta.safetensors", ranking=ranking)
    delta = zest_fast.apply_delta(model, "delta.safetensors")
    peak: int = zest_fast.planned_peak(model, batch, layers)
    step: Plan = zest_fast.plan(model, layers, batch_size=2, image_size=8, device="cpu", frozen="nf4")
    needed: int = step.peak_bytes
    ranker: Ranker = Ranker(features="metrics").fit(zest_fast.load_records())
    recipe = Recipe(steps=8)
    version: str = zest_fast.__version__
    print(value, report, delta.layers, peak, needed, ranker, recipe.hash, version)
