"""Contribution sweeps over packaged models and data, one pair after another; run it again and it goes on.

python -m bench.sweeps --out records/                      # every pair, in an order that gives many models early
python -m bench.sweeps --out records/ --pairs minilm/trec minilm/sms-spam
python -m bench.sweeps --out records/ --consolidate zest_fast/sweeping/data/records.parquet
python -m bench.sweeps --probe minilm/trec minilm/sms-spam # how the learning rates of a family were chosen
python -m bench.sweeps --speed             # what prefix reuse saves, into bench/results/sweep_speed.json
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pandas
import torch

from bench.data import DATASETS, MODELS, find, load_pair
from bench.measure import RESULTS
from zest_fast.sweeping.recipe import Recipe
from zest_fast.sweeping.sweep import sweep
from zest_fast.sweeping.tables import consolidate, sweeps_of

_IMAGE = Recipe(layer_lr_factor=1e-2, note="64x64 pixels; 1,500 images scored")
_TEXT = Recipe(
    batch_size=16,
    layer_lr_factor=3e-3,
    head_lr=5e-3,
    head_samples=400,
    train_samples=512,
    note="16 tokens; 800 or 1,000 sentences scored; rates probed on MiniLM's six sets, mean share of the loss of the "
    "head alone, head 5e-4 and 5e-3: factor 0.003 0.956 0.939, 0.01 0.955 0.957, 0.03 0.991 0.985",
)
RECIPES = {
    "efficientnet-lite": replace(
        _IMAGE,
        note=f"{_IMAGE.note}; factor probed on efficientnet-lite0/mnist: 0.003 0.342, 0.01 0.326, 0.03 0.346",
    ),
    "mobilenet-v2": replace(
        _IMAGE,
        layer_lr_factor=3e-3,
        note=f"{_IMAGE.note}; factor probed on mobilenet-v2/mnist: 0.003 0.349, 0.01 0.363, 0.03 0.547",
    ),
    "thin-resnet50": replace(
        _IMAGE,
        note=f"{_IMAGE.note}; factor probed on thin-resnet50/fashion: 0.003 0.702, 0.01 0.681, 0.03 0.682",
    ),
    "mobilenet-v1": replace(
        _IMAGE,
        layer_lr_factor=3e-3,
        note=f"{_IMAGE.note}; factor probed on mobilenet-v1/mnist: 0.003 0.764, 0.01 0.905, 0.03 1.102",
    ),
    "face-resnet": replace(
        _IMAGE, note=f"{_IMAGE.note}; factor probed on face-resnet/fashion: 0.003 0.698, 0.01 0.691, 0.03 0.708"
    ),
    "dense-landmarks": replace(
        _IMAGE,
        note=f"{_IMAGE.note}; factor probed on dense-landmarks/mnist: 0.003 0.509, 0.01 0.490, 0.03 the same, "
        "at the limit",
    ),
    "tiny-xception": replace(
        _IMAGE,
        note=f"{_IMAGE.note}; factor probed on tiny-xception/animals: 0.003 1.053, 0.01 1.020, 0.03 1.020",
    ),
    "mobilenet-v3": replace(
        _IMAGE,
        layer_lr_factor=3e-2,
        note=f"{_IMAGE.note}; factor probed on mobilenet-v3/mnist: 0.003 0.834, 0.01 0.808, 0.03 0.794",
    ),
    "lcnet-svtr": replace(
        _IMAGE,
        layer_lr_factor=3e-2,
        note="64x64 pixels, made 48x48; 1,500 images scored; factor probed on lcnet-svtr/mnist: 0.003 0.127, "
        "0.01 0.121, 0.03 0.120",
    ),
    "minilm": _TEXT,
    "splade-tiny": replace(
        _TEXT,
        layer_lr_factor=3e-2,
        head_lr=5e-4,
        note="16 tokens; 800 or 1,000 sentences scored; rates probed on splade-tiny/trec, mean share of the loss of "
        "the head alone, head 5e-4 and 5e-3: factor 0.003 0.968 0.977, 0.01 0.916 0.947, 0.03 0.892 0.923",
    ),
    "nanoguard": replace(
        _TEXT,
        steps=24,
        layer_lr_factor=3e-2,
        head_lr=5e-4,
        train_samples=384,
        note="16 tokens; 500 sentences scored; factor probed on nanoguard/trec, mean share of the loss of the head "
        "alone: 0.003 0.9963, 0.01 0.9912, 0.03 0.9878",
    ),
    "smollm2": replace(
        _TEXT,
        steps=20,
        batch_size=16,
        layer_lr_factor=1e-2,
        head_lr=1e-4,
        train_samples=320,
        seeds=(0, 1),
        note="16 tokens; 300 sentences scored; every third of the 210 layers; products of matrices in bfloat16; rates "
        "from a short probe of late layers on smollm2/trec (head alone 0.911): factor 0.001 0.904 and 0.003 0.896 "
        "(v_proj of block 20, 24 steps), 0.01 0.875 (20 steps), 0.03 is beyond the limit; batches of 8 and a head rate "
        "of 5e-4 made most layers worse than the head",
    ),
}
"""By family of models. The rates are the best of PROBED by the mean loss of five layers after one seed: of one pair, of
all six for MiniLM, of fewer layers for SmolLM2; the notes give those losses."""


def every_third(name: str, module: torch.nn.Module) -> bool:
    """A third of a LLaMA's layers: kind k of its seven in block b where b + k is a multiple of three.

    Of each kind every third block, and of any three blocks in a row each kind once: no kind and no depth is favoured.
    """
    found = re.search(r"\.layers\.(\d+)\.\w+\.(\w+)$", name)
    return found is not None and found[2] in _LLAMA_KINDS and (int(found[1]) + _LLAMA_KINDS.index(found[2])) % 3 == 0


_LLAMA_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MATMUL_PRECISION = {"smollm2": "medium"}
"""Of families where float32 products would take too long: bfloat16 inside a product, float32 everywhere else."""
LAYERS = {"smollm2": every_third}
"""Of families where the sweep of every layer would take too long; all layers elsewhere."""

SPEED_PAIRS = ("efficientnet-lite0/mnist", "minilm/trec")
PROBED = (3e-3, 1e-2, 3e-2)
PROBED_HEADS = (5e-4, 5e-3)

PAIRS = (
    "efficientnet-lite0/mnist",
    "minilm/trec",
    "mobilenet-v2/mnist",
    "thin-resnet50/fashion",
    "efficientnet-lite0/fashion",
    "minilm/sms-spam",
    "efficientnet-lite1/mnist",
    "mobilenet-v2/fashion",
    "thin-resnet50/animals",
    "minilm/movie-sentiment",
    "efficientnet-lite0/animals",
    "mobilenet-v2/animals",
    "thin-resnet50/mnist",
    "minilm/tweet-sentiment",
    "efficientnet-lite0/mnist-corrupted",
    "efficientnet-lite2/fashion",
    "minilm/amazon-sentiment",
    "mobilenet-v2/mnist-corrupted",
    "thin-resnet50/fashion-corrupted",
    "minilm/nyt-sentiment",
    "efficientnet-lite1/animals",
    "efficientnet-lite0/fashion-corrupted",
    "mobilenet-v2/fashion-corrupted",
    "thin-resnet50/mnist-corrupted",
    "efficientnet-lite2/mnist",
    "efficientnet-lite1/fashion",
    "efficientnet-lite2/animals",
    "efficientnet-lite0/emoji",
    "smollm2/trec",
    "mobilenet-v2/emoji",
    "thin-resnet50/emoji",
    "smollm2/sms-spam",
)
"""Those that version 1 of the protocol of bench.layerbench was frozen with."""
LATER_PAIRS = (
    "splade-tiny/trec",
    "splade-tiny/sms-spam",
    "splade-tiny/movie-sentiment",
    "splade-tiny/trec-corrupted",
    "splade-tiny/trec-noisy-labels",
    "splade-tiny/tweet-sentiment",
    "splade-tiny/amazon-sentiment",
    "splade-tiny/nyt-sentiment",
    "splade-tiny/movie-sentiment-noisy-labels",
    "dense-landmarks/mnist",
    "face-resnet/fashion",
    "mobilenet-v3/mnist",
    "tiny-xception/animals",
    "mobilenet-v1/mnist",
    "nanoguard/trec",
    "lcnet-svtr/mnist",
    "dense-landmarks/fashion-noisy-labels",
    "face-resnet/mnist-noisy-labels",
    "mobilenet-v3/fashion-corrupted",
    "tiny-xception/fashion",
    "mobilenet-v1/animals",
    "nanoguard/sms-spam",
    "dense-landmarks/emoji",
    "face-resnet/animals",
    "mobilenet-v3/emoji",
    "tiny-xception/mnist-corrupted",
    "mobilenet-v1/fashion-noisy-labels",
    "lcnet-svtr/emoji",
    "nanoguard/movie-sentiment-noisy-labels",
    "minilm/trec-noisy-labels",
    "minilm/trec-corrupted",
    "efficientnet-lite0/animals-noisy-labels",
    "mobilenet-v1/emoji",
    "lcnet-svtr/fashion-corrupted",
)
"""Those that came after it; cheap ones first."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the record files, one for each pair")
    parser.add_argument("--pairs", nargs="+", default=[*PAIRS, *LATER_PAIRS], metavar="MODEL/DATASET")
    parser.add_argument("--consolidate", type=Path, metavar="PARQUET", help="write the records in --out into one file")
    parser.add_argument("--probe", nargs="+", metavar="MODEL/DATASET", help="compare learning rates on five layers")
    parser.add_argument(
        "--speed", nargs="*", metavar="MODEL/DATASET", help="time sweeps with and without prefix reuse, into a JSON"
    )
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.probe:
        probe(arguments.probe)
    elif arguments.speed is not None:
        from bench.sweep_speed import measure

        measure({pair: RECIPES[find(*_parts(pair))[0].family] for pair in arguments.speed or SPEED_PAIRS}, RESULTS)
    elif arguments.out is None:
        parser.error("--out is needed")
    elif arguments.consolidate:
        consolidate(arguments.out.glob("*.jsonl"), arguments.consolidate)
    else:
        run(arguments.pairs, arguments.out)


def run(pairs: list[str], out: Path) -> None:
    """Sweep these pairs, but for those that ship with the library and have no file in `out`.

    A finished one costs the time that loading takes, or that its profiles take where this version has more metrics.
    """
    for pair in pairs:
        find(*_parts(pair))  # a typing error shows before the first hour
    out.mkdir(parents=True, exist_ok=True)
    shipped = {(sweep["model"], sweep["dataset"]): sweep["recipe_hash"] for sweep in sweeps_of()}
    for pair in pairs:
        model_name, dataset_name = _parts(pair)
        path = out / f"{model_name}--{dataset_name}.jsonl"
        if not path.exists() and shipped.get((model_name, dataset_name)) == RECIPES[MODELS[model_name].family].hash:
            print(f"{pair}: among the shipped records", flush=True)
            continue
        began = time.perf_counter()
        model, splits = load_pair(model_name, dataset_name)
        torch.set_float32_matmul_precision(MATMUL_PRECISION.get(MODELS[model_name].family, "highest"))
        frame = sweep(
            model,
            splits,
            layers=LAYERS.get(MODELS[model_name].family),
            recipe=RECIPES[MODELS[model_name].family],
            out=path,
            model_name=model_name,
            dataset_name=dataset_name,
            family=DATASETS[dataset_name].family,
        )
        print(f"{pair}: {_words(frame)}; {time.perf_counter() - began:.0f} s", flush=True)


def probe(pairs: list[str]) -> None:
    """For each rate of the layers and of the head, the loss after training each of five layers alone.

    As a share of the loss of the head alone, so that pairs can be averaged: the smallest mean over `pairs` is the best.
    """
    shares = pandas.DataFrame({pair: _probe_pair(pair) for pair in pairs})
    for (factor, head_lr), share in shares.mean(axis=1).sort_values().items():
        print(f"factor {factor:g}, head {head_lr:g}: {share:.4f} of the loss of the head alone", flush=True)


def _probe_pair(pair: str) -> dict[tuple[float, float], float]:
    model_name, dataset_name = _parts(pair)
    model, splits = load_pair(model_name, dataset_name)
    recipe = replace(RECIPES[MODELS[model_name].family], seeds=(0,))
    names = [name for name, module in model.named_modules() if getattr(module, "weight", None) is not None]
    layers = [name for name in names if model.get_submodule(name).weight.dim() > 1 and "embed" not in name][:-1]
    five = [layers[round(position * (len(layers) - 1) / 5)] for position in range(1, 6)]
    shares = {}
    for factor, head_lr in itertools.product(PROBED, PROBED_HEADS):
        with tempfile.TemporaryDirectory() as folder:
            frame = sweep(
                model,
                splits,
                layers=five,
                recipe=replace(recipe, layer_lr_factor=factor, head_lr=head_lr),
                out=Path(folder, "probe.jsonl"),
            )
        losses = frame[frame.head_state == "warm"].set_index("layer").loss
        shares[factor, head_lr] = losses.mean() / frame.head_loss[0]
        print(
            f"{pair} factor {factor:g}, head {head_lr:g}: mean loss {losses.mean():.4f} "
            f"(head alone {frame.head_loss[0]:.4f}); "
            + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()),
            flush=True,
        )
    return shares


def _parts(pair: str) -> tuple[str, str]:
    model, separator, dataset = pair.partition("/")
    if not separator:
        raise ValueError(f"{pair!r} is no pair; write MODEL/DATASET, such as {PAIRS[0]!r}")
    return model, dataset


def _words(frame) -> str:
    warm = frame[frame.head_state == "warm"]
    gain = (warm.head_loss - warm.loss).groupby(warm.layer).mean().sort_values(ascending=False)
    return (
        f"{warm.layer.nunique()} layers x {warm.seed.nunique()} seeds, head alone {warm.head_loss.mean():.4f} "
        f"({warm.head_accuracy.mean():.3f}), best {gain.index[0]} {gain.iloc[0]:+.4f}, "
        f"{(gain < 0).sum()} layers worse than the head alone"
    )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
