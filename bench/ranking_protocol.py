"""How rankings are judged: written down, and committed, before anything was fitted to real records.

Question. Given the profile of one mini-batch, how well does a ranking order the layers of a model by what fine-tuning
each of them alone gains on that data set, and how much of the possible gain do its first layers bring?

Pairs. PAIRS below, as far as the records hold them; others in the records are left out of training and test, and named
in the results. No pair is dropped for its results.

Target. The gain of a layer under one seed is head_loss - loss, on the score split; its mean over the seeds is the truth
that every ranking of the pair is held against.

Unit. One profile: (model, data set, seed, head_state). The value of a pair is the mean over its seeds; the value of a
setting is the mean over its pairs, each pair counting once.

Settings. Nothing of what is held out is seen in training, neither rows nor contribution; who fits gets frames from
which it has been removed, who predicts gets frames without the columns of outcomes (OUTCOMES).
  known models    each family of data sets in turn is held out of all models; the rest of all models trains. Clean and
                  corrupted versions share images and are one family. A pair whose model has no other family in the
                  records is no known model: it is left out here and named.
  new models      each family of models in turn is held out with all its pairs. EfficientNet-Lite0, Lite1 and Lite2
                  share names, shapes and training, so they are one family, held out together. The data sets may have
                  been seen on other models.
  other modality  trained on vision, tested on text, and the reverse.

Headline. The profile with a fresh head, since that is what users have when they ask; the warm one, whose head was
trained first, stands beside it. Whatever is fitted gets the rows of both; signs and choices of single metrics are made
for each state by itself, which favours them.

Measures (bench/ranking_measures.py). Kendall's tau-b, the tau that a perfect predictor of the noisy target would
attain, and the share of the best possible top 3, 5 and 10's gain that the ranking's recover (0 = random, 1 = best).

Contestants. zest_fast.Ranker with its defaults; the same without static features; the paper's MLP on pairs; ridge on
z-scored features; every single metric, and depth, with its sign learned on training pairs; the metric whose mean tau on
training pairs is the largest in absolute value, with its sign; what a step of Adam gains to first order (large first;
added after the first evaluation, when the Ranker got it as a feature); RGN (large first, Lee et al. 2022), Spectrum's
signal-to-noise (large first, within each type of module), KappaTune's condition number (small first), these four with
the sign of theory; the layer prior (mean rank of the same layer on training pairs of the same model; known
models only); the prior of the kind of layer; random (the exact expectation). Whatever learns a sign, a choice or a
prior of kinds does so on training pairs of the same model where there are any, else on all.

Nothing is chosen by looking at held-out scores: every setting of every contestant is a constant in the code or chosen
by cross-validation inside the training part. All contestants and all pairs are reported.

Intervals. 95 %, percentile bootstrap over the pairs, DRAWS draws with a fixed seed, the same draws for all contestants,
so that differences are paired. Pairs share models and data sets, so a second interval draws whole folds (what is held
out together); it is wider, and stands beside the first in the JSON.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas

DRAWS = 10_000
SEED = 2026
HEAD_STATES = ("fresh", "warm")
TOP = (3, 5, 10)
OUTCOMES = ("accuracy", "loss", "head_accuracy", "head_loss")

MODEL_FAMILIES = {
    "efficientnet-lite0": "efficientnet-lite",
    "efficientnet-lite1": "efficientnet-lite",
    "efficientnet-lite2": "efficientnet-lite",
    "mobilenet-v2": "mobilenet-v2",
    "thin-resnet50": "thin-resnet50",
    "minilm": "minilm",
    "smollm2": "smollm2",
}
MODALITIES = {
    "efficientnet-lite": "vision",
    "mobilenet-v2": "vision",
    "thin-resnet50": "vision",
    "minilm": "text",
    "smollm2": "text",
}
_DATASETS = {
    "efficientnet-lite0": "mnist fashion animals mnist-corrupted fashion-corrupted emoji",
    "efficientnet-lite1": "mnist fashion animals",
    "efficientnet-lite2": "mnist fashion animals",
    "mobilenet-v2": "mnist fashion animals mnist-corrupted fashion-corrupted emoji",
    "thin-resnet50": "mnist fashion animals mnist-corrupted fashion-corrupted emoji",
    "minilm": "trec sms-spam movie-sentiment tweet-sentiment amazon-sentiment nyt-sentiment",
    "smollm2": "trec sms-spam",
}
PAIRS = tuple((model, dataset) for model, datasets in _DATASETS.items() for dataset in datasets.split())


class Pair(NamedTuple):
    model: str
    dataset: str
    family: str
    """Of the data set: those that share images or sentences have one."""

    @property
    def name(self) -> str:
        return f"{self.model}/{self.dataset}"


@dataclass(frozen=True)
class Fold:
    setting: str
    held_out: str
    train: tuple[Pair, ...]
    test: tuple[Pair, ...]


def pairs_in(records: pandas.DataFrame) -> tuple[list[Pair], list[str]]:
    """The pairs of the protocol that `records` (columns of `load_records()`) holds, sorted, and the names of others."""
    found = sorted(
        Pair(*row) for row in records[["model", "dataset", "family"]].drop_duplicates().itertuples(index=False)
    )
    judged = [pair for pair in found if (pair.model, pair.dataset) in PAIRS]
    return judged, [pair.name for pair in found if pair not in judged]


def folds(pairs: Iterable[Pair]) -> Iterator[Fold]:
    """Every fold of every setting that has something to train on and something to test."""
    pairs = tuple(pairs)
    for setting, key in (("known models", _family), ("new models", _model_family), ("other modality", _modality)):
        for held_out in sorted({key(pair) for pair in pairs}):
            train = tuple(pair for pair in pairs if key(pair) != held_out)
            test = tuple(pair for pair in pairs if key(pair) == held_out)
            if setting == "known models":
                known = {pair.model for pair in train}
                test = tuple(pair for pair in test if pair.model in known)
            if train and test:
                yield Fold(setting, held_out, train, test)


def rows_of(records: pandas.DataFrame, pairs: Iterable[Pair]) -> pandas.DataFrame:
    """The rows of these pairs, in their order."""
    wanted = {(pair.model, pair.dataset) for pair in pairs}
    chosen = [key in wanted for key in zip(records.model, records.dataset, strict=True)]
    return records[chosen].reset_index(drop=True)


def protocol_hash() -> str:
    """SHA-256 of this file."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def _family(pair: Pair) -> str:
    return pair.family


def _model_family(pair: Pair) -> str:
    return MODEL_FAMILIES[pair.model]


def _modality(pair: Pair) -> str:
    return MODALITIES[_model_family(pair)]
