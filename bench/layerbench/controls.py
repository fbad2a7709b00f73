"""Profiles of every pair whose batch says nothing: what a ranking makes of them is not read from the batch.

python -m bench.layerbench.controls                     # every pair that lacks them; minutes, resumable
python -m bench.layerbench.controls --pairs minilm/trec

They are made as a sweep makes its profiles (`zest_fast.sweeping.sweep`): the same head, warm and fresh, the same rows
of the training split, all metrics, seed 0. What differs is the batch:
  shuffled labels  its labels in another order
  noise inputs     images: normal noise with the mean and the standard deviation of each channel of the batch; text:
                   tokens of the vocabulary, each equally likely, at every place of the mask but for those that mark the
                   begin or the end of all samples, such as [CLS] and [SEP]
The head is fitted anew and held against the records: its loss on the split "score", and, for either state of the head,
the gradient norms of the true batch. bench/results/control_profiles.parquet has the columns of `load_records()` but for
the outcomes, and "control"; its metadata say what was checked. The packages that the sweeps read must be there.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow
import torch
from pyarrow import parquet
from torch import Tensor, nn

from bench.data import MODELS, load_pair
from bench.head_alone import SAME_HEAD, check_same_data, refitted_head
from bench.layerbench.control_contestants import INPUTS, LABELS, PATH
from bench.layerbench.protocol import HEAD_STATES, OUTCOMES
from bench.sweeps import MATMUL_PRECISION
from zest_fast.foundation.replacing import replacing
from zest_fast.prefix.inputs import Inputs, rows_of
from zest_fast.prefix.volatile_state import preserved
from zest_fast.profiling.profile import profile
from zest_fast.sweeping.head import classifier_of
from zest_fast.sweeping.objectives import Classification
from zest_fast.sweeping.recipe import Recipe
from zest_fast.sweeping.reused_prefix import ReusedPrefix
from zest_fast.sweeping.tables import SHIPPED, load_records, sweeps_of
from zest_fast.sweeping.trials import draw, evaluate, set_head

SEED = 0
"""Of the sweeps' seeds the one whose batch is replaced; it seeds the shuffle and the noise, too."""
_SAME_GRADIENTS = 2e-2
"""Median relative difference of a layer's gradient norm on the true batch to that in the records: other machines."""
_METADATA = b"zest_fast.control_profiles"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=SHIPPED, help="a Parquet file of contribution records")
    parser.add_argument(
        "--pairs", nargs="+", metavar="MODEL/DATASET", help="only these, anew; default: all that lack them"
    )
    parser.add_argument("--out", type=Path, default=PATH, help="the Parquet file, which is added to")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    add(options.records, options.out, options.pairs)


def add(path: Path, out: Path, pairs: list[str] | None = None) -> None:
    """Profile and write, pair by pair, what `out` lacks. Raises ValueError where data or head are not the sweep's.

    pairs: these in this order, whether `out` has them or not; None = what it lacks, cheap ones first.
    """
    records = load_records(path)
    done = {(entry["model"], entry["dataset"]) for entry in described(out)}
    cheap_first = sorted(sweeps_of(path), key=lambda sweep: sweep["seconds"])
    sweeps = {f"{sweep['model']}/{sweep['dataset']}": sweep for sweep in cheap_first}
    if unknown := set(pairs or ()) - set(sweeps):
        raise ValueError(f"{path.name} holds no records of {', '.join(sorted(unknown))}")
    if pairs is None:
        pairs = [name for name, sweep in sweeps.items() if (sweep["model"], sweep["dataset"]) not in done]
    for name in pairs:
        sweep = sweeps[name]
        began = time.perf_counter()
        swept = records[(records.model == sweep["model"]) & (records.dataset == sweep["dataset"])]
        frame, checks = control_profiles(sweep, swept)
        _write(out, frame, {key: sweep[key] for key in ("model", "dataset", "recipe_hash")} | {"checks": checks})
        print(f"{name}: {json.dumps(checks)}; {time.perf_counter() - began:.0f} s", flush=True)


def control_profiles(
    sweep: Mapping[str, Any], swept: pandas.DataFrame
) -> tuple[pandas.DataFrame, dict[str, list[float] | float]]:
    """The rows of one pair, and what was compared with its records.

    Args:
        sweep: as `sweeps_of` describes it.
        swept: its records, of all seeds and both states of the head.
    """
    model, splits = load_pair(sweep["model"], sweep["dataset"])
    check_same_data(sweep, splits)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(MATMUL_PRECISION.get(MODELS[sweep["model"]].family, "highest"))
    try:
        return _profiles(model.eval(), splits, sweep, swept[swept.seed == SEED])
    finally:
        torch.set_float32_matmul_precision(before)


def _profiles(
    model: nn.Module,
    splits: Mapping[str, tuple[Inputs, Tensor]],
    sweep: Mapping[str, Any],
    swept: pandas.DataFrame,
) -> tuple[pandas.DataFrame, dict[str, list[float] | float]]:
    recipe = Recipe.from_dict(sweep["recipe"])
    _, head = classifier_of(model)
    weight, bias = refitted_head(model, head, splits["head"], recipe, sweep["head_strength"], SEED)
    set_head(head, weight, bias)
    checks: dict[str, list[float] | float] = {"head_loss": _checked_loss(model, splits["score"], swept)}
    inputs, targets = splits["train"]
    rows = draw(len(targets), recipe.train_samples, SEED)[: recipe.profile_samples]
    inputs, targets = rows_of(inputs, rows), targets[rows]
    batches = {
        LABELS: (inputs, targets[torch.randperm(len(targets), generator=_generator())]),
        INPUTS: (noise_like(inputs, model), targets),
    }
    frames = []
    for state in HEAD_STATES:
        of_state = swept[swept.head_state == state].set_index("layer", drop=False)
        with preserved(model, SEED):
            if state == "warm":
                set_head(head, weight, bias)
            else:
                with preserved(model, SEED):
                    head.reset_parameters()
            checks[f"grad_norm, {state}"] = _checked_gradients(model, (inputs, targets), of_state)
            for control, batch in batches.items():
                with preserved(model, SEED):
                    table = profile(model, batch, metrics="all")
                values = [dict(table[name]) | table.info[name] for name in of_state.layer]
                frame = pandas.DataFrame(values, index=of_state.index)
                frames.append(of_state.drop(columns=list(OUTCOMES), errors="ignore").assign(**frame, control=control))
    return pandas.concat(frames, ignore_index=True), checks


def noise_like(inputs: Inputs, model: nn.Module) -> Inputs:
    """Inputs of the same shape that say nothing; see the module."""
    if isinstance(inputs, Tensor):
        places = [dim for dim in range(inputs.dim()) if dim != 1]
        mean, deviation = inputs.mean(places, keepdim=True), inputs.std(places, keepdim=True)
        return mean + deviation * torch.randn(inputs.shape, generator=_generator())
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    replaced = mask.clone()
    last = mask.sum(1) - 1
    every = torch.arange(len(ids))
    kept = set(ids[~mask].tolist())
    for place in (torch.zeros_like(last), last):
        marks = ids[every, place].unique()
        if len(marks) == 1:
            replaced[every, place] = False
            kept |= set(marks.tolist())
    vocabulary = max(module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding))
    words = torch.tensor([word for word in range(vocabulary) if word not in kept])
    drawn = words[torch.randint(len(words), ids.shape, generator=_generator())]
    return {**inputs, "input_ids": torch.where(replaced, drawn, ids)}


def described(path: Path) -> list[dict[str, Any]]:
    """What the file says of each pair."""
    if not path.exists():
        return []
    return json.loads(parquet.read_schema(path).metadata[_METADATA])


def _checked_loss(model: nn.Module, split: tuple[Inputs, Tensor], swept: pandas.DataFrame) -> list[float]:
    inputs, targets = split
    found = evaluate(ReusedPrefix(model, inputs, limit=0, folder=Path()), Classification(targets))["loss"]
    recorded = float(swept.head_loss.iloc[0])
    if abs(found - recorded) > SAME_HEAD * recorded:
        raise ValueError(f"the head of seed {SEED} has a loss of {found}, in the records {recorded}")
    return [round(found, 6), round(recorded, 6)]


def _checked_gradients(model: nn.Module, batch: tuple[Inputs, Tensor], of_state: pandas.DataFrame) -> float:
    """Median relative difference of the layers' gradient norms to the records'."""
    with preserved(model, SEED):
        table = profile(model, batch, metrics=["grad_norm"])
    found = np.array([table[name]["grad_norm"] for name in of_state.layer])
    difference = float(np.median(abs(found / of_state.grad_norm.to_numpy() - 1)))
    if not difference < _SAME_GRADIENTS:
        raise ValueError(f"the true batch has other gradients than in the records: {difference:.1%} in the median")
    return round(difference, 6)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def _write(path: Path, frame: pandas.DataFrame, description: dict[str, Any]) -> None:
    """Add the rows of one pair, or replace them."""
    pair = (description["model"], description["dataset"])
    descriptions = [entry for entry in described(path) if (entry["model"], entry["dataset"]) != pair]
    if path.exists():
        there = parquet.read_table(path).to_pandas(ignore_metadata=True)
        frame = pandas.concat([there[(there.model != pair[0]) | (there.dataset != pair[1])], frame], ignore_index=True)
    table = pyarrow.Table.from_pandas(frame, preserve_index=False)
    told = json.dumps([*descriptions, description]).encode()
    with replacing(path) as temporary:
        parquet.write_table(table.replace_schema_metadata({_METADATA: told}), temporary, compression="zstd")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
