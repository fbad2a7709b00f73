"""How rankings are judged, version 2: written down, and committed, before anything was fitted for it.

Question. Given the profile of one mini-batch, how well does a ranking order the layers of a model by what fine-tuning
each of them alone gains on that data set, and how much of the possible gain do its first layers bring? And is it the
batch that tells, or what was known of the model before?

Version 1 judged 26 pairs of seven models, took gains from the head before it trains along, and had no controls. What
changed, and why:
  pairs        every pair that bench/sweeps.py plans, 14 models of 12 families so far, with two more text models and
               noisy labels: with five families a single one decided. Means over the pairs of version 1 alone
               (VERSION_1_PAIRS) stand apart in the results; what is fitted there was fitted to all pairs.
  gains        count from the head retrained alone by the same recipe ("head_retrained" in what the records say of a
               sweep; where that lacks, from the head at the start, and the pair is named). Orders and recovered shares
               are the same; what does change is "kept" (below) and how many layers are worse than the head alone.
  controls     contestants get the profile of a batch that says nothing: shuffled labels, noise for inputs. A ranking
               that reads the batch falls with them. Number of parameters, middle first and evenly spaced layers are
               rankings that have never seen a batch.
  rivals       gradient and weight norms as published methods use them (rivals.py).
  weights      beside the plain mean over pairs, a mean weighted by the reliability of each pair's target.
  blocks       beside layers, the blocks that they form.

Pairs. PAIRS below, as far as the records hold them; others in the records are left out of training and test, and named
in the results. No pair is dropped for its results.

Target. The gain of a layer under one seed is the loss of the head retrained alone minus the loss with the layer, on the
score split; its mean over the seeds is the truth that every ranking of the pair is held against. What full fine-tuning
gains under the same recipe is not in the records, so a layer's share of it is not known and not shown.

Unit. One profile: (model, data set, seed, head_state). The value of a pair is the mean over its seeds; the value of a
setting is the mean over its pairs, each pair counting once. Beside it stands the mean weighted by reliability, the
share of a target's variance that is no noise (measures.py); records fix the weights, and a pair of one seed has the
smallest weight of the others. Control profiles are of seed 0 alone and stand in for those of every seed.

Settings. Nothing of what is held out is seen in training, neither rows nor contribution; who fits gets frames from
which it has been removed, who predicts gets frames without the columns of outcomes (OUTCOMES).
  known models    each family of data sets in turn is held out of all models; the rest of all models trains. Clean and
                  corrupted versions and those with noisy labels share samples and are one family. A pair whose model
                  has no other family in the records is no known model: it is left out here and named.
  new models      each family of models in turn is held out with all its pairs. EfficientNet-Lite0, Lite1 and Lite2
                  share names, shapes and training, so they are one family, held out together. The data sets may have
                  been seen on other models.
  other modality  trained on vision, tested on text, and the reverse.

Headlines. "One batch": the profile with a fresh head, since that is what users have when they ask, and nothing else.
The warm one, whose head was trained first, stands beside it. "Probed": the same profile with the score of a
probe (the column probe_score of the records, of pairs that were probed: `python -m bench.probes`); contestants of the
first headline see no probe, and those of the second say nothing of other pairs. Whatever is fitted
gets the rows of both states; signs and choices of single metrics are made for each state by itself, which favours them.

Measures (measures.py). Kendall's tau-b, the tau that a perfect predictor of the noisy target would attain, the share of
the best possible top 3, 5 and 10's gain that the ranking's recover (0 = random, 1 = best), and kept_5: the ranking's
first five layers' gain over that of the best five, both counted from the head retrained alone, between -1 and 1 so that
a pair with next to nothing to gain does not decide.

Blocks. The block of a layer is its name up to the last component that is a number and not the layer's own (else one
that ends in a digit; else the layer itself). A block's gain and its score are the means over its layers. Pairs of at
least MIN_BLOCKS blocks count; with fewer, tau is a coin.

Contestants. zest_fast.Ranker with its defaults; the same without static features; the paper's MLP on pairs; ridge on
z-scored features; every single metric, and depth, with its sign learned on training pairs; the metric whose mean tau on
training pairs is the largest in absolute value, with its sign; what a step of Adam gains to first order (large first;
in version 1 added after the first evaluation, when the Ranker got it as a feature); RGN (large first, Lee et al. 2022),
Spectrum's signal-to-noise (large first, within each type of module), KappaTune's condition number (small first), these
four with the sign of theory; the layer prior (mean rank of the same layer on training pairs of the same model; known
models only); the prior of the kind of layer; number of parameters (large first), middle (the middle of the depth
first), uniform (evenly spaced over the depth), resnorm, normalised gradient norm, GRASS, AdaGradSelect and LISA's
weight norm (large first; rivals.py has their definitions, and what of them the records lack); random (the exact
expectation). Whatever learns a sign, a choice or a prior of kinds does so on training pairs of the same model where
there are any, else on all. Controls: CONTROLLED, fitted as above, on shuffled labels and on noise.

Nothing is chosen by looking at held-out scores: every setting of every contestant is a constant in the code or chosen
by cross-validation inside the training part. All contestants and all pairs are reported. What had been looked at before
this version: version 1's results on its pairs, and number of parameters, middle and step gain on them; the Ranker that
ships was fitted to them.

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

VERSION = 2
DRAWS = 10_000
SEED = 2026
HEAD_STATES = ("fresh", "warm")
SETTINGS = ("known models", "new models", "other modality")
TOP = (3, 5, 10)
MIN_BLOCKS = 4
OUTCOMES = ("accuracy", "loss", "head_accuracy", "head_loss", "start_loss")
"""start_loss: what gains are counted from; see profiles.py."""

MODEL_FAMILIES = {
    "efficientnet-lite0": "efficientnet-lite",
    "efficientnet-lite1": "efficientnet-lite",
    "efficientnet-lite2": "efficientnet-lite",
    "mobilenet-v2": "mobilenet-v2",
    "thin-resnet50": "thin-resnet50",
    "mobilenet-v1": "mobilenet-v1",
    "face-resnet": "face-resnet",
    "dense-landmarks": "dense-landmarks",
    "tiny-xception": "tiny-xception",
    "mobilenet-v3": "mobilenet-v3",
    "lcnet-svtr": "lcnet-svtr",
    "minilm": "minilm",
    "smollm2": "smollm2",
    "splade-tiny": "splade-tiny",
    "nanoguard": "nanoguard",
}
MODALITIES = dict.fromkeys(MODEL_FAMILIES.values(), "vision") | dict.fromkeys(
    ("minilm", "smollm2", "splade-tiny", "nanoguard"), "text"
)
CONTROLLED = ("ranker", "ranker, metrics only", "step gain")
"""Contestants that read the batch, and are shown one that says nothing, too."""
_VERSION_1 = {
    "efficientnet-lite0": "mnist fashion animals mnist-corrupted fashion-corrupted emoji",
    "efficientnet-lite1": "mnist fashion animals",
    "efficientnet-lite2": "mnist fashion animals",
    "mobilenet-v2": "mnist fashion animals mnist-corrupted fashion-corrupted emoji",
    "thin-resnet50": "mnist fashion animals mnist-corrupted fashion-corrupted emoji",
    "minilm": "trec sms-spam movie-sentiment tweet-sentiment amazon-sentiment nyt-sentiment",
    "smollm2": "trec sms-spam",
}
_VERSION_2 = {
    "efficientnet-lite0": "animals-noisy-labels",
    "mobilenet-v1": "mnist animals fashion-noisy-labels emoji",
    "face-resnet": "fashion mnist-noisy-labels animals",
    "dense-landmarks": "mnist fashion-noisy-labels emoji",
    "tiny-xception": "animals fashion mnist-corrupted",
    "mobilenet-v3": "mnist fashion-corrupted emoji",
    "lcnet-svtr": "mnist emoji fashion-corrupted",
    "minilm": "trec-noisy-labels trec-corrupted",
    "splade-tiny": "trec sms-spam movie-sentiment trec-corrupted trec-noisy-labels tweet-sentiment amazon-sentiment "
    "nyt-sentiment movie-sentiment-noisy-labels",
    "nanoguard": "trec sms-spam movie-sentiment-noisy-labels",
}


def _pairs(datasets: dict[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple((model, dataset) for model, of_model in datasets.items() for dataset in of_model.split())


VERSION_1_PAIRS = _pairs(_VERSION_1)
PAIRS = VERSION_1_PAIRS + _pairs(_VERSION_2)


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
    for setting, key in zip(SETTINGS, (_family, _model_family, _modality), strict=True):
        for held_out in sorted({key(pair) for pair in pairs}):
            train = tuple(pair for pair in pairs if key(pair) != held_out)
            test = tuple(pair for pair in pairs if key(pair) == held_out)
            if setting == SETTINGS[0]:
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
