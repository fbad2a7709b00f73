"""The predictor of the ZEST paper: an MLP that scores one layer from its zero-shot metrics, trained on pairs of layers.

From the paper: each iteration samples two layers of the same model and data set, pairs in a batch may come from
different ones; at inference a layer is scored by itself; the only inputs are the zero-shot metrics; one predictor
serves all models and data sets. The paper does not give its size, its loss, its optimizer or how metrics are scaled.
Ours: two hidden layers of 64 with ReLU, the logistic loss of the difference of scores (RankNet, Burges et al. 2005),
Adam, and z-scores within the profile. The contribution of a layer is the gain in loss that all rankings here are
judged by, where the paper takes accuracy. About 2 million pairs are seen in training: sampled, not enumerated.
"""

from __future__ import annotations

import numpy as np
import pandas
import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.layerbench.profiles import PAPER_METRICS, mean_gain, places, present, z_scores


class PairMLP:
    """Deterministic for a seed (and a number of threads)."""

    def __init__(self, *, hidden: int = 64, steps: int = 2000, batch: int = 1024, rate: float = 1e-3, seed: int = 0):
        self._hidden, self._steps, self._batch, self._rate, self._seed = hidden, steps, batch, rate, seed

    def fit(self, train: pandas.DataFrame) -> PairMLP:
        self._metrics = present(train, PAPER_METRICS)
        inputs = torch.from_numpy(z_scores(train, self._metrics)).float()
        gains = torch.tensor(mean_gain(train).to_numpy())
        members, starts = _members(train)
        generator = torch.Generator().manual_seed(self._seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            self._network = self._untrained()
        optimizer = torch.optim.Adam(self._network.parameters(), lr=self._rate, weight_decay=1e-4)
        for _ in range(self._steps):
            pairs = members[_sample_pairs(starts, self._batch, generator)]
            first, second = self._network(inputs[pairs])[..., 0]
            sign = torch.sign(gains[pairs[0]] - gains[pairs[1]]).float()
            optimizer.zero_grad()
            functional.softplus(-sign * (first - second))[sign != 0].mean().backward()
            optimizer.step()
        return self

    def predict(self, profile: pandas.DataFrame) -> np.ndarray:
        with torch.no_grad():
            scores = self._network(torch.from_numpy(z_scores(profile, self._metrics)).float())
        return scores[:, 0].double().numpy()

    def _untrained(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(len(self._metrics), self._hidden),
            nn.ReLU(),
            nn.Linear(self._hidden, self._hidden),
            nn.ReLU(),
            nn.Linear(self._hidden, 1),
        )


def _members(records: pandas.DataFrame) -> tuple[Tensor, Tensor]:
    """The rows of all profiles, one profile after another, and where in them each profile starts and the last ends."""
    rows = places(records)
    starts = np.cumsum([0, *map(len, rows)])
    return torch.from_numpy(np.concatenate(rows)), torch.from_numpy(starts)


def _sample_pairs(starts: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Places of `count` pairs of layers, [2, count]: a profile, then two of its layers."""
    profile = torch.randint(len(starts) - 1, (count,), generator=generator)
    sizes = starts[profile + 1] - starts[profile]
    return starts[profile] + (torch.rand(2, count, generator=generator, dtype=torch.float64) * sizes).long()
