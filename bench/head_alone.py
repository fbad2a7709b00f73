"""What the head gains without a layer: trained alone by a sweep's recipe, from where the trials of its layers start.

python -m bench.head_alone zest_fast/sweeping/data/records.parquet                 # every pair that lacks it
python -m bench.head_alone zest_fast/sweeping/data/records.parquet --pairs minilm/trec

`head_loss` in the records is that of the head before it trains along with a layer, so `head_loss - loss` holds what the
head alone would gain. The trials of this program are those of a sweep without the layer: same head, samples, batches,
rates. Their loss and accuracy go into the file's description of the sweep, as "head_retrained", by seed; the rows of
the table stay as they are. The packages that the sweep read must be there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pyarrow import parquet
from torch import Tensor, nn

from bench.data import MODELS, load_pair
from bench.sweeps import MATMUL_PRECISION
from zest_fast.finetuning.digests import hash_tensors
from zest_fast.foundation.replacing import replacing
from zest_fast.prefix.inputs import Inputs, rows_of
from zest_fast.profiling.layers import find_layers
from zest_fast.sweeping.head import classifier_of, features_of, fit_head
from zest_fast.sweeping.objectives import Classification
from zest_fast.sweeping.recipe import Recipe
from zest_fast.sweeping.tables import load_records, sweeps_of
from zest_fast.sweeping.trial_order import plan
from zest_fast.sweeping.trials import Trial, Trials, draw

_CACHE_BYTES = 1 << 30
SAME_HEAD = 2e-3
"""The head is fitted anew where the records were made elsewhere; its loss may differ by so much of itself."""
KEY = "head_retrained"
_METADATA = b"zest_fast.records"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, help="a Parquet file of contribution records; it is written anew")
    parser.add_argument("--pairs", nargs="+", metavar="MODEL/DATASET", help="only these; default: all that lack it")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    add(arguments.records, arguments.pairs)


def add(path: Path, pairs: list[str] | None = None) -> None:
    """Measure and write, pair by pair: what is measured stays. Raises ValueError where a sweep's data differ."""
    for number, sweep in enumerate(sweeps_of(path)):
        pair = f"{sweep['model']}/{sweep['dataset']}"
        if pair in pairs if pairs is not None else KEY not in sweep:
            retrained = head_alone(sweep, _starts(path, sweep))
            _describe(path, number, {KEY: retrained})
            starts = _starts(path, sweep)
            gains = [starts[seed] - result["loss"] for seed, result in retrained.items()]
            print(f"{pair}: the head alone gains {sum(gains) / len(gains):+.4f}", flush=True)


def head_alone(sweep: Mapping[str, Any], starts: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Accuracy and loss by seed. sweep: as `sweeps_of` describes it. starts: the head's loss before, by seed."""
    model, splits = load_pair(sweep["model"], sweep["dataset"])
    recipe = Recipe.from_dict(sweep["recipe"])
    check_same_data(sweep, splits)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(MATMUL_PRECISION.get(MODELS[sweep["model"]].family, "highest"))
    try:
        return _trials(model.eval(), splits, recipe, sweep["head_strength"], starts)
    finally:
        torch.set_float32_matmul_precision(before)


def _trials(
    model: nn.Module,
    splits: Mapping[str, tuple[Inputs, Tensor]],
    recipe: Recipe,
    strength: float,
    starts: Mapping[str, float],
) -> dict[str, dict[str, float]]:
    name, head = classifier_of(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    (layer,) = (layer for layer in find_layers(dict(model.named_modules())) if layer.name == name)
    inputs, targets = splits["train"]
    draws = {seed: draw(len(targets), recipe.train_samples, seed) for seed in recipe.seeds}
    used = torch.cat(list(draws.values())).unique()
    limit = _CACHE_BYTES // (len(used) + len(splits["score"][1]))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        (task,) = plan(model, tuple(head.parameters()), {layer: recipe.seeds}, inputs, reuse=True, limit=limit).values()
        # The head trains anyway; in the layer's place is a number that the loss does not depend on.
        task = replace(task, part=replace(task.part, parameters=(nn.Parameter(torch.ones(1)),)))
        trials = Trials(
            model=model,
            head=head,
            recipe=recipe,
            heads={seed: refitted_head(model, head, splits["head"], recipe, strength, seed) for seed in recipe.seeds},
            rows={seed: torch.searchsorted(used, rows) for seed, rows in draws.items()},
            tasks={name: task},
            train=(rows_of(inputs, used), Classification(targets[used])),
            score=(splits["score"][0], Classification(splits["score"][1])),
            limit=limit,
            folder=Path(folder),
        )
        untrained = replace(recipe, head_lr=1e-30)
        results = {}
        for seed in recipe.seeds:
            trials.recipe = untrained  # of the same trials, whose features are computed once
            start = trials.run(Trial(name, seed))["loss"]
            trials.recipe = recipe
            if abs(start - starts[str(seed)]) > SAME_HEAD * starts[str(seed)]:
                raise ValueError(f"the head of seed {seed} has a loss of {start}, in the records {starts[str(seed)]}")
            result = trials.run(Trial(name, seed))
            results[str(seed)] = {part: result[part] for part in ("accuracy", "loss")}
    return results


def refitted_head(
    model: nn.Module, head: nn.Linear, split: tuple[Inputs, Tensor], recipe: Recipe, strength: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the head that the trials of a sweep start from, fitted anew on the split "head"."""
    inputs, targets = split
    rows = draw(len(targets), recipe.head_samples, seed)
    features = features_of(model, head, rows_of(inputs, rows))
    return fit_head(features, targets[rows], head.out_features, strength, biased=head.bias is not None)


def check_same_data(sweep: Mapping[str, Any], splits: Mapping[str, tuple[Inputs, Tensor]]) -> None:
    """Raises ValueError, naming the split, where samples are not those that the sweep saw."""
    for name, found in sweep["data"].items():
        inputs, targets = splits[name]
        columns = [("inputs", inputs)] if isinstance(inputs, Tensor) else sorted(inputs.items())
        if hash_tensors([*columns, ("targets", targets)]) != found:
            raise ValueError(
                f"{sweep['model']}/{sweep['dataset']}: the samples of {name!r} are not those of the records; install "
                "the versions of the packages that bench.data names"
            )


def _starts(path: Path, sweep: Mapping[str, Any]) -> dict[str, float]:
    frame = load_records(path)
    frame = frame[(frame.model == sweep["model"]) & (frame.dataset == sweep["dataset"])]
    return {str(seed): float(loss) for seed, loss in frame.groupby("seed").head_loss.first().items()}


def _describe(path: Path, number: int, more: Mapping[str, Any]) -> None:
    """Add to what the file says of one sweep."""
    table = parquet.read_table(path)
    sweeps = sweeps_of(path)
    sweeps[number] |= more
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), _METADATA: json.dumps(sweeps).encode()})
    with replacing(path) as temporary:
        parquet.write_table(table, temporary, compression="zstd")


if __name__ == "__main__":
    main()
