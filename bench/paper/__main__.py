"""The paper's recipes: profile one batch, rank, fine-tune the top 3, 5 and 10 layers, evaluate.

python -m bench.paper --model huggyllama/llama-7b --dataset arc-e --dtype bfloat16
python -m bench.paper --model google-bert/bert-base-uncased --dataset mrpc --arms zest@5 full lora lora+zest@5
python -m bench.paper --model microsoft/resnet-50 --dataset cub --seeds 0 1 2
python -m bench.paper --model ./tiny-llama --dataset piqa --data ./piqa     # no hub: train.jsonl, validation.jsonl

LLaMA takes arc-e, arc-c, hellaswag, piqa, openbookqa and sciq; BERT the tasks of GLUE; MobileNetV2
(google/mobilenet_v2_1.0_224), EfficientNet (google/efficientnet-b0) and ResNet-50 take cifar100 and cub.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench.measure import write_result
from bench.paper.adapters import TASKS, adapter_of
from bench.paper.arms import ARMS, Run, train_and_evaluate
from bench.paper.sources import find, load
from bench.paper.tasks import Recipe
from zest_fast.integrations.pretrained import load_model
from zest_fast.profiling.profile import profile
from zest_fast.ranking.ranking import rank


def main() -> None:
    arguments = _arguments()
    data = find(arguments.dataset)
    recipe = _recipe(data.recipe, arguments)
    train, evaluated = load(arguments.dataset, arguments.data, arguments.limit)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    results: list[dict[str, Any]] = []
    settings = {"model": arguments.model, "dataset": arguments.dataset, "by": arguments.by or "the shipped ranker",
                "recipe": asdict(recipe), "dtype": arguments.dtype, "device": str(device), "train": len(train),
                "evaluated": len(evaluated)}  # fmt: skip
    for seed in arguments.seeds:
        torch.manual_seed(seed)  # a fresh head is drawn from it
        names = None
        if data.kind != "choice":
            names = [str(label) for label in range(max(sample.label for sample in (*train, *evaluated)) + 1)]
        loaded = load_model(arguments.model, task=TASKS[data.kind], class_names=names)
        loaded.model.to(device, getattr(torch, arguments.dtype))
        adapter = adapter_of(data.kind, loaded, arguments.image_size)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[: recipe.batch_size].tolist()
        batch = {name: tensor.to(device) for name, tensor in adapter.batch([train[row] for row in order]).items()}
        ranking = rank(profile(loaded.model, batch), by=arguments.by)
        state = {name: tensor.detach().cpu().clone() for name, tensor in loaded.model.state_dict().items()}
        run = Run(loaded, adapter, recipe, ranking, state, seed)
        before = adapter.evaluate(loaded.model.eval(), evaluated, recipe.batch_size)
        results.append({"arm": "zero-shot", "seed": seed, **before})
        for arm in arguments.arms:
            results.append(train_and_evaluate(run, arm, train, evaluated))
            _print(results[-1], before)
            write_result("paper", settings, results, arguments.out)  # as they come
    print(write_result("paper", settings, results, arguments.out))


def _print(result: dict[str, Any], before: dict[str, float]) -> None:
    scores = ", ".join(f"{name} {result[name]:.1%} (before {before[name]:.1%})" for name in before)
    print(f"seed {result['seed']}, {result['arm']}: {scores}, {result['trained_parameters']:,} parameters", flush=True)


def _recipe(recipe: Recipe, arguments: argparse.Namespace) -> Recipe:
    """The paper's, but for what the command line says."""
    names = ("lr", "weight_decay", "epochs", "batch_size")
    return replace(recipe, **{name: value for name in names if (value := getattr(arguments, name)) is not None})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a hub id or a folder of transformers")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--data", type=Path, help="a folder in the schema of the hub's data set, instead of the hub")
    parser.add_argument("--arms", nargs="+", default=["zest@3", "zest@5", "zest@10"], metavar="ARM",
                        help="zest@N, random@N, lora+zest@N, full, lora")  # fmt: skip
    parser.add_argument("--by", help="rank by this metric; by default the shipped ranker")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device")
    parser.add_argument("--image-size", type=int, help="pixels; by default what the image processor says")
    parser.add_argument("--limit", type=int, help="rows of each split, to try it out")
    for name, kind in (("lr", float), ("weight-decay", float), ("epochs", int), ("batch-size", int)):
        parser.add_argument(f"--{name}", type=kind, help="instead of the paper's")
    parser.add_argument("--out", type=Path, help="folder of the JSON instead of bench/results")
    arguments = parser.parse_args()
    for arm in arguments.arms:
        if not ARMS.fullmatch(arm):
            parser.error(f"--arms {arm}: there are zest@N, random@N, lora+zest@N, full and lora")
    return arguments


if __name__ == "__main__":
    main()
