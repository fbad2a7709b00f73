"""Contribution sweeps over packaged models and data, one pair after another; run it again and it goes on.

python -m bench.sweeps --out records/                      # every pair, in an order that gives many models early
python -m bench.sweeps --out records/ --pairs minilm/trec minilm/sms-spam
python -m bench.sweeps --out records/ --consolidate zest_fast/sweeping/data/records.parquet
python -m bench.sweeps --probe minilm/trec # how the learning rate of a family was chosen
python -m bench.sweeps --speed             # what prefix reuse saves, into bench/results/sweep_speed.json
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from bench.data import DATASETS, MODELS, find, load_pair
from bench.measure import RESULTS
from zest_fast.sweeping.recipe import Recipe
from zest_fast.sweeping.sweep import sweep
from zest_fast.sweeping.tables import consolidate, sweeps_of

_IMAGE = Recipe(layer_lr_factor=1e-2, note="64x64 pixels; 1,500 images scored")
_TEXT = Recipe(
    batch_size=16,
    layer_lr_factor=3e-2,
    head_lr=5e-3,
    head_samples=400,
    train_samples=512,
    note="16 tokens; 800 or 1,000 sentences scored; factor probed on minilm/trec: 0.003 0.721, 0.01 0.648, 0.03 0.594",
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
    "minilm": _TEXT,
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
"""By family of models. The factor of the layers' rate is the best of PROBED by the mean loss of five layers of one pair
after one seed (of SmolLM2 fewer, which its note says); the notes give those losses."""


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the record files, one for each pair")
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), metavar="MODEL/DATASET")
    parser.add_argument("--consolidate", type=Path, metavar="PARQUET", help="write the records in --out into one file")
    parser.add_argument("--probe", metavar="MODEL/DATASET", help="compare learning rates on five layers")
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
    """Sweep these pairs, but for those that ship with the library; a finished one costs the time that loading takes."""
    for pair in pairs:
        find(*_parts(pair))  # a typing error shows before the first hour
    out.mkdir(parents=True, exist_ok=True)
    shipped = {(sweep["model"], sweep["dataset"]): sweep["recipe_hash"] for sweep in sweeps_of()}
    for pair in pairs:
        model_name, dataset_name = _parts(pair)
        if shipped.get((model_name, dataset_name)) == RECIPES[MODELS[model_name].family].hash:
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
            out=out / f"{model_name}--{dataset_name}.jsonl",
            model_name=model_name,
            dataset_name=dataset_name,
            family=DATASETS[dataset_name].family,
        )
        print(f"{pair}: {_words(frame)}; {time.perf_counter() - began:.0f} s", flush=True)


def probe(pair: str) -> None:
    """The mean loss after training each of five layers alone, for each rate of PROBED."""
    model_name, dataset_name = _parts(pair)
    model, splits = load_pair(model_name, dataset_name)
    recipe = replace(RECIPES[MODELS[model_name].family], seeds=(0,))
    names = [name for name, module in model.named_modules() if getattr(module, "weight", None) is not None]
    layers = [name for name in names if model.get_submodule(name).weight.dim() > 1 and "embed" not in name][:-1]
    five = [layers[round(position * (len(layers) - 1) / 5)] for position in range(1, 6)]
    for factor in PROBED:
        with tempfile.TemporaryDirectory() as folder:
            frame = sweep(
                model,
                splits,
                layers=five,
                recipe=replace(recipe, layer_lr_factor=factor),
                out=Path(folder, "probe.jsonl"),
            )
        losses = frame[frame.head_state == "warm"].set_index("layer").loss
        print(
            f"{pair} factor {factor:g}: mean loss {losses.mean():.4f} (head alone {frame.head_loss[0]:.4f}); "
            + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()),
            flush=True,
        )


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
