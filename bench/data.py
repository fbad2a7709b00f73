"""Models and data sets that package registries carry, as (classifier, splits) pairs for sweeps and benchmarks.

Nothing is fetched at run time and nothing is copied: all is read from installed packages (bench/packages), whose
versions are pinned. Where one is missing, the error is the line that installs it. Data sets that share images or
sentences share a family.

    python -m bench.data            # what can be loaded here
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.packages.classifiers import scaled
from bench.packages.efficientnet_lite import efficientnet_lite
from bench.packages.face_api import face_pixels, face_resnet, mobilenet_v1
from bench.packages.face_separable import dense_landmarks, tiny_xception
from bench.packages.images import IMAGE_SIZE as IMAGE_SIZE
from bench.packages.images import Images, animals, corrupted, emoji, fashion, mnist
from bench.packages.language import minilm, minilm_tokens, smollm2, smollm2_tokens
from bench.packages.mobilenet_v2 import mobilenet_v2
from bench.packages.nanoguard import nanoguard, nanoguard_tokens
from bench.packages.pp_ocr import lcnet_svtr, mobilenet_v3, ocr_pixels
from bench.packages.sentences import Sentences, sentiment, sms_spam, trec, with_typing_errors
from bench.packages.splade import splade_tiny, splade_tiny_tokens
from bench.packages.thin_resnet import caffe_pixels, thin_resnet


@dataclass(frozen=True)
class DataSet:
    name: str
    family: str
    load: Callable[[], Images | Sentences]
    sizes: dict[str, int]
    """Samples of each split, in this order from one permutation; what is left over is not used."""
    wrong_labels: float = 0.0
    """The share of the labels in "head" and "train" that is replaced by another class; scores and tests are clean."""


@dataclass(frozen=True)
class Model:
    name: str
    family: str
    kind: str
    """What it takes: image or text."""
    load: Callable[[int], nn.Module]
    """Number of classes -> a classifier with a fresh head, in eval mode."""
    prepare: Callable[[Any], Any]
    """What a data set holds -> inputs of the model."""
    scored: int | None = None
    """Samples of the split "score" that an expensive model is scored on, the first ones; None = all."""


def load_pair(model: str, dataset: str) -> tuple[nn.Module, dict[str, tuple[Any, Tensor]]]:
    """The classifier, and the splits "test", "head", "train" and "score", each (inputs, targets).

    Raises ValueError for names that do not exist or fit together, RuntimeError with the line that installs what misses.
    """
    chosen, data = find(model, dataset)
    samples = data.load()
    classes = int(samples.targets.max()) + 1
    splits = {}
    for name, rows in _split_rows(len(samples.targets), data.sizes).items():
        if name == "score":
            rows = rows[: chosen.scored]
        if isinstance(samples, Images):
            inputs = chosen.prepare(samples.pixels[rows])
        else:
            inputs = chosen.prepare([samples.texts[row] for row in rows.tolist()])
        targets = samples.targets[rows]
        if name in ("head", "train"):
            targets = _with_wrong_labels(targets, classes, data.wrong_labels)
        splits[name] = (inputs, targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return chosen.load(classes).eval(), splits


def find(model: str, dataset: str) -> tuple[Model, DataSet]:
    """Raises ValueError where one does not exist or they do not fit together."""
    for name, known in ((model, MODELS), (dataset, DATASETS)):
        if name not in known:
            raise ValueError(f"{name!r} is unknown; there are: {', '.join(known)}")
    chosen, data = MODELS[model], DATASETS[dataset]
    kind = "text" if dataset in _TEXTS else "image"
    if chosen.kind != kind:
        raise ValueError(f"{model} takes {chosen.kind}s, {dataset} holds {kind}s")
    return chosen, data


def _split_rows(samples: int, sizes: dict[str, int]) -> dict[str, Tensor]:
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(2026))
    if sum(sizes.values()) > samples:
        raise ValueError(f"splits of {sizes} need more than the {samples} samples that there are")
    parts = order[: sum(sizes.values())].split(list(sizes.values()))
    return dict(zip(sizes, parts, strict=True))


def _with_wrong_labels(targets: Tensor, classes: int, share: float) -> Tensor:
    """The same ones each time; every other class is equally likely."""
    generator = torch.Generator().manual_seed(11)
    wrong = torch.randperm(len(targets), generator=generator)[: round(share * len(targets))]
    targets = targets.clone()
    targets[wrong] = (targets[wrong] + torch.randint(1, classes, (len(wrong),), generator=generator)) % classes
    return targets


# What there is

_SMALL = {"test": 500, "head": 900, "train": 2100, "score": 1500}  # of MNIST's 5,000
_LARGE = {"test": 1000, "head": 1500, "train": 3072, "score": 1500}
_EMOJI = {"test": 150, "head": 400, "train": 756, "score": 600}  # all 1,906
_TEXT = {"test": 500, "head": 1200, "train": 1536, "score": 1000}
_SMALL_TEXT = {"test": 300, "head": 700, "train": 1000, "score": 800}
_WRONG = 0.3


def _noisy(data: DataSet) -> DataSet:
    return replace(data, name=f"{data.name}-noisy-labels", wrong_labels=_WRONG)


def _by_name(*sets: DataSet) -> dict[str, DataSet]:
    return {data.name: data for data in sets}


_IMAGES = _by_name(
    DataSet("mnist", "mnist", mnist, _SMALL),
    DataSet("fashion", "fashion", fashion, _LARGE),
    DataSet("animals", "animals", animals, _LARGE),
    DataSet("mnist-corrupted", "mnist", partial(corrupted, mnist), _SMALL),
    DataSet("fashion-corrupted", "fashion", partial(corrupted, fashion), _LARGE),
    DataSet("emoji", "emoji", emoji, _EMOJI),
)
_IMAGES |= _by_name(*(_noisy(_IMAGES[name]) for name in ("mnist", "fashion", "animals")))
_TEXTS = _by_name(
    DataSet("trec", "trec", trec, _TEXT),
    DataSet("sms-spam", "sms-spam", sms_spam, _TEXT),
    DataSet("movie-sentiment", "movie-sentiment", partial(sentiment, "movieReviewSnippets"), _TEXT),
    DataSet("amazon-sentiment", "amazon-sentiment", partial(sentiment, "amazonReviewSnippets"), _SMALL_TEXT),
    DataSet("tweet-sentiment", "tweet-sentiment", partial(sentiment, "tweets"), _SMALL_TEXT),
    DataSet("nyt-sentiment", "nyt-sentiment", partial(sentiment, "nytEditorialSnippets"), _SMALL_TEXT),
    DataSet("trec-corrupted", "trec", partial(with_typing_errors, trec), _TEXT),
)
_TEXTS |= _by_name(*(_noisy(_TEXTS[name]) for name in ("trec", "movie-sentiment")))
DATASETS = {**_IMAGES, **_TEXTS}

MODELS = {
    model.name: model
    for model in (
        *(
            Model(
                f"efficientnet-lite{variant}", "efficientnet-lite", "image",
                partial(efficientnet_lite, variant), partial(scaled, 127.0, 128.0),
            )
            for variant in (0, 1, 2)
        ),
        Model("mobilenet-v2", "mobilenet-v2", "image", mobilenet_v2, partial(scaled, 127.5, 127.5)),
        Model("thin-resnet50", "thin-resnet50", "image", thin_resnet, caffe_pixels),
        Model("mobilenet-v1", "mobilenet-v1", "image", mobilenet_v1, partial(scaled, 127.5, 127.5)),
        Model("face-resnet", "face-resnet", "image", face_resnet, face_pixels),
        Model("dense-landmarks", "dense-landmarks", "image", dense_landmarks, face_pixels),
        Model("tiny-xception", "tiny-xception", "image", tiny_xception, face_pixels),
        Model("mobilenet-v3", "mobilenet-v3", "image", mobilenet_v3, ocr_pixels),
        Model("lcnet-svtr", "lcnet-svtr", "image", lcnet_svtr, partial(ocr_pixels, size=48)),
        Model("minilm", "minilm", "text", minilm, minilm_tokens),
        Model("smollm2", "smollm2", "text", smollm2, smollm2_tokens, scored=300),
        Model("splade-tiny", "splade-tiny", "text", splade_tiny, splade_tiny_tokens),
        Model("nanoguard", "nanoguard", "text", nanoguard, nanoguard_tokens, scored=500),
    )
}  # fmt: skip


def main() -> None:
    for name, data in DATASETS.items():
        try:
            samples = data.load()
            counts = torch.bincount(samples.targets).tolist()
            print(f"{name:20} {len(samples.targets):6} samples, classes {counts}")
        except RuntimeError as error:
            print(f"{name:20} {error}")
    for name, model in MODELS.items():
        try:
            loaded = model.load(10)
            layers = sum(parameter.dim() > 1 for parameter in loaded.parameters())
            print(f"{name:20} {layers} weights, {sum(p.numel() for p in loaded.parameters()) / 1e6:.2f} M parameters")
        except RuntimeError as error:
            print(f"{name:20} {error}")


if __name__ == "__main__":
    main()
