"""bench.part_of_a_sweep on pairs whose gains are known."""

from __future__ import annotations

import numpy as np
import pandas
import pytest

from bench.layerbench.measures import attainable_tau
from bench.part_of_a_sweep import judged

LAYERS = [f"encoder.{block}.{role}" for block in range(6) for role in ("query", "output.dense")]


def pair_of(gains: np.ndarray, probe: np.ndarray) -> pandas.DataFrame:
    """Records of one pair. gains: [seeds, layers]; probe: [layers]."""
    size = np.arange(len(LAYERS))[::-1] + 1.0
    rows = [
        {"seed": seed, "layer": name, "loss": -gain, "numel": n, "probe_score": p, "depth": place, "kind": "linear"}
        for seed, of_seed in enumerate(gains)
        for place, (name, gain, n, p) in enumerate(zip(LAYERS, of_seed, size, probe, strict=True))
    ]
    return pandas.DataFrame(rows)


def of(pair: pandas.DataFrame) -> dict[str, dict[str, float]]:
    return {row["way"]: row for row in judged(pair)["ways"]}


def test_without_noise_one_seed_says_everything_and_a_perfect_predictor_no_more() -> None:
    gains = np.tile(np.linspace(0, 1, len(LAYERS)), (3, 1))
    ways = of(pair_of(gains, probe=gains[0]))
    for way in ("probe", "all layers trained under one seed", "a perfect predictor"):
        assert ways[way]["tau"] == pytest.approx(1.0)
    assert ways["number of parameters"]["tau"] == pytest.approx(-1.0)
    assert ways["all layers trained under one seed"]["share"] == pytest.approx(1 / 3)


def test_a_seed_is_never_held_against_itself() -> None:
    noise = np.random.default_rng(0).normal(size=(3, len(LAYERS)))
    ways = of(pair_of(noise, probe=np.arange(len(LAYERS))))
    assert (
        abs(ways["all layers trained under one seed"]["tau"]) < 0.3
    )  # .5 and more where the mean holds the seed itself


def test_layers_that_were_not_trained_are_filled_in_from_their_neighbours() -> None:
    gains = np.tile(np.sin(np.linspace(0, 3, len(LAYERS))), (3, 1))
    ways = of(pair_of(gains, probe=np.random.default_rng(1).permutation(len(LAYERS))))
    assert ways["the same, and 50% of the layers trained under one seed"]["tau"] > ways["probe"]["tau"] + 0.3


def test_a_perfect_predictor_is_held_against_all_seeds_but_one() -> None:
    generator = np.random.default_rng(2)
    signal = generator.normal(size=len(LAYERS))
    found = [
        of(pair_of(signal + generator.normal(size=(3, len(LAYERS))), probe=signal))["a perfect predictor"]["tau"]
        for _ in range(60)
    ]
    # signal and noise have the same variance: the mean of two seeds is two thirds signal
    assert np.mean(found) == pytest.approx(attainable_tau(2 / 3), abs=0.05)
