"""Rankings that learn nothing: sizes and depths, and criteria of published methods, from what a profile holds.

Each is used with the sign of its authors, from one batch and before any step, since that is what is compared here. What
the methods do besides, sampling layers anew as training goes on, is no ranking and not judged.

  NumberOfParameters, Middle, Uniform: they see no batch.
  Resnorm: Xu et al. 2026 (Layer Card, arXiv 2602.04019), the projected residual norm, which they show to equal a
    normalised gradient norm for squared loss and linear adapters. Here the gradient norm over the root mean square of
    the layer's input: the covariance of the input is taken to be a multiple of the identity, since records hold no more
    of it, and its size is inferred from the output.
  NormalisedGradient: ‖dW‖ / √(number of weights), so that size does not decide.
  Grass: Tian et al. 2026 (GRASS, arXiv 2604.07808), the mean gradient norm (MGN) of a transformer layer; here the mean
    over the weights of a block, of one batch instead of several steps.
  AdaGradSelect: Kumar et al. 2025 (arXiv 2512.15764), the blocks with the largest gradient norm first; here the norm of
    all gradients of a block at the first step, before any history of updates.
  LisaWeightNorm: Pan et al. 2024 (LISA, arXiv 2403.17919), the norms of weights that LoRA and full training reach, the
    mean over training. Records hold no trained weights, so these are the norms of the pretrained ones.

A method that picks blocks leaves the layers of a block tied, and a tie counts as its expectation over random orders.
The papers' abstracts and summaries were read for this, not every derivation: numbers of equations are not given.
"""

from __future__ import annotations

import numpy as np
import pandas

from bench.layerbench.profiles import block_of


class _LearnsNothing:
    def fit(self, train: pandas.DataFrame):
        return self


class NumberOfParameters(_LearnsNothing):
    """The largest first."""

    def predict(self, profile: pandas.DataFrame) -> np.ndarray:
        return profile.numel.to_numpy(np.float64)


class Middle(_LearnsNothing):
    """The middle of the model's depth first: minus the distance of a layer's place, 0 to 1, from a half."""

    def predict(self, profile: pandas.DataFrame) -> np.ndarray:
        place = _places(profile)
        return -abs(place / max(1, len(place) - 1) - 0.5)


class Uniform(_LearnsNothing):
    """Evenly spaced layers: the first n are spread over the depth, for every n.

    In the order of the van der Corput sequence 1/2, 1/4, 3/4, 1/8, ..., of which x stands for layer ⌊x · layers⌋.
    """

    def predict(self, profile: pandas.DataFrame) -> np.ndarray:
        layers = len(profile)
        bits = max(1, int(layers).bit_length())
        numbers = np.r_[1 : 2**bits, 0]
        reversed_bits = sum(((numbers >> bit) & 1) << (bits - 1 - bit) for bit in range(bits))
        chosen = pandas.unique(reversed_bits * layers >> bits)
        order = np.empty(layers)
        order[chosen] = np.arange(layers)
        return -order[_places(profile)]


class Resnorm(_LearnsNothing):
    """‖dW‖ / RMS(X). Y = W X with unrelated entries has RMS(Y) = RMS(W) √(inputs) RMS(X), which gives RMS(X)."""

    def predict(self, profile: pandas.DataFrame) -> np.ndarray:
        inputs = np.array([np.prod(shape[1:], dtype=np.float64) for shape in profile["shape"]])
        output = np.hypot(_number(profile, "act_std"), _number(profile, "act_mean"))
        with np.errstate(divide="ignore", invalid="ignore"):
            entering = output / (_weight_rms(profile) * np.sqrt(inputs))
            score = _number(profile, "grad_norm") / entering
        return np.where(np.isfinite(score), score, np.nan)


class NormalisedGradient(_LearnsNothing):
    """Root mean square of the gradient."""

    def predict(self, profile: pandas.DataFrame) -> np.ndarray:
        return _number(profile, "grad_norm") / np.sqrt(_number(profile, "numel"))


class Grass(_LearnsNothing):
    """Mean gradient norm of a block's weights."""

    def predict(self, profile: pandas.DataFrame) -> np.ndarray:
        return profile.grad_norm.groupby(_blocks(profile)).transform("mean").to_numpy(np.float64)


class AdaGradSelect(_LearnsNothing):
    """Norm of the gradient of a block."""

    def predict(self, profile: pandas.DataFrame) -> np.ndarray:
        return np.sqrt((profile.grad_norm**2).groupby(_blocks(profile)).transform("sum").to_numpy(np.float64))


class LisaWeightNorm(_LearnsNothing):
    """Norm of the pretrained weight."""

    def predict(self, profile: pandas.DataFrame) -> np.ndarray:
        return _weight_rms(profile) * np.sqrt(_number(profile, "numel"))


def _places(profile: pandas.DataFrame) -> np.ndarray:
    """Of each layer how many come before it."""
    return profile.depth.rank(method="first").to_numpy(np.int64) - 1


def _blocks(profile: pandas.DataFrame) -> list[str]:
    return [block_of(layer) for layer in profile.layer]


def _weight_rms(profile: pandas.DataFrame) -> np.ndarray:
    return np.hypot(_number(profile, "weight_std"), _number(profile, "weight_mean"))


def _number(profile: pandas.DataFrame, name: str) -> np.ndarray:
    return profile[name].to_numpy(np.float64)
