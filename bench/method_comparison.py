"""SelectiveBackward among the methods of PEFT's method_comparison, in its own form: accuracy, peak memory, time.

python -m bench.method_comparison PEFT/method_comparison/MetaMathQA --n 5 --rate 1e-4

PEFT's benchmark trains on MetaMathQA and tests on GSM8K; it needs a GPU, the hub, and a checkout of PEFT (this was
written against run.py at 026d1e01). Its runner is used as it is, data, loop, evaluation and log included, but for two
functions that know adapters only: the one that makes the model and the one that weighs the checkpoint. The log lands in
its own results folder, under the experiment zest/MODEL-topN, beside those of the adapters.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from zest_fast.finetuning.selective_backward import SelectiveBackward
from zest_fast.profiling.profile import profile
from zest_fast.ranking.ranking import rank

PROFILED = 4  # samples of the training set: a batch of that benchmark


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="method_comparison/MetaMathQA in a checkout of PEFT")
    parser.add_argument("--n", type=int, default=5, help="layers to train")
    parser.add_argument("--by", help="rank by this metric; by default the shipped ranker")
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate of AdamW")
    arguments = parser.parse_args()
    print(compare(arguments.folder, arguments.n, arguments.by, {"lr": arguments.rate, "weight_decay": 0.1}))


def compare(folder: Path, n: int, by: str | None, optimizer: Mapping[str, float]) -> str:
    """Run the benchmark for the top `n` layers; returns the name of the experiment, by which its log is called."""
    if not (folder / "run.py").is_file():
        raise ValueError(f"{str(folder)!r} holds no run.py: name method_comparison/MetaMathQA in a checkout of PEFT")
    name = _write_experiment(folder, n, optimizer)
    with _inside(folder):
        runner = importlib.import_module("run")
        adapt(runner, n, by)
        runner.print_verbose = lambda *words, **_: print(*words, file=sys.stderr)
        runner.main(path_experiment=f"experiments/{name}", experiment_name=name, clean=True)
    return name


def adapt(runner: ModuleType, n: int, by: str | None) -> None:
    """Put SelectiveBackward where the runner would put an adapter around the model."""
    make_model, tuned = runner.get_model, []

    def get_model(**settings: Any) -> torch.nn.Module:
        model = make_model(**settings)
        layers = rank(profile(model, _first_batch(runner, model, settings["model_id"])), by=by).top(n)
        tuned.append(SelectiveBackward(model, layers))
        runner.print_verbose(tuned[-1].summary())
        # What the runner asks a model with adapters for: trained parameters, all parameters.
        model.get_nb_trainable_parameters = lambda: (
            tuned[-1].summary().trainable_parameters,
            tuned[-1].summary().total_parameters,
        )
        return model

    def get_file_size(model: Any, **_: Any) -> int:
        with tempfile.TemporaryDirectory() as folder:
            return tuned[-1].save(Path(folder) / "delta.safetensors").stat().st_size

    runner.get_model, runner.get_file_size = get_model, get_file_size


def _first_batch(runner: ModuleType, model: torch.nn.Module, model_id: str) -> dict[str, torch.Tensor]:
    """The first training samples, padded, every token but padding with its label."""
    config = runner.get_train_config("")
    tokenizer = runner.get_tokenizer(model_id=model_id, max_seq_length=config.max_seq_length)
    train, _, _ = runner.get_train_valid_test_datasets(
        tokenizer=tokenizer, query_template=config.query_template, print_fn=runner.print_verbose
    )
    samples: dict[str, Any] = {key: value for key, value in dict(train[:PROFILED]).items() if key != "response"}
    batch = dict(tokenizer.pad(samples, return_tensors="pt"))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in {**batch, "labels": labels}.items()}


def _write_experiment(folder: Path, n: int, optimizer: Mapping[str, float]) -> str:
    """The folder that the runner asks for: training parameters, and no adapter's configuration."""
    model_id = json.loads((folder / "default_training_params.json").read_text())["model_id"]
    name = f"zest/{model_id.rpartition('/')[2].lower()}-top{n}"
    experiment = folder / "experiments" / name
    experiment.mkdir(parents=True, exist_ok=True)
    (experiment / "training_params.json").write_text(json.dumps({"optimizer_kwargs": dict(optimizer)}, indent=2) + "\n")
    return name


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """The runner imports its neighbours by bare names and reads relative paths."""
    before = Path.cwd()
    os.chdir(folder)
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(folder.resolve()))
        os.chdir(before)


if __name__ == "__main__":
    main()
