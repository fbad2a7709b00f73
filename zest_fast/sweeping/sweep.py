"""What each layer is worth: fine-tune it alone with the head, and see what that does to the loss on other samples."""

from __future__ import annotations

import base64
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from zest_fast.finetuning.digests import hash_tensors
from zest_fast.foundation.version import __version__
from zest_fast.prefix.inputs import Inputs, rows_of
from zest_fast.prefix.volatile_state import preserved
from zest_fast.profiling.borrowing.model_state import ModelState
from zest_fast.profiling.borrowing.training_modes import in_eval_mode
from zest_fast.profiling.layers import Layer, LayerSelection, find_layers, select_layers
from zest_fast.profiling.metrics import ALL_METRIC_NAMES
from zest_fast.profiling.profile import profile
from zest_fast.sweeping.head import choose_strength, classifier_of, features_of, fit_head
from zest_fast.sweeping.local_workers import local_pool
from zest_fast.sweeping.objectives import Classification
from zest_fast.sweeping.progress import Progress
from zest_fast.sweeping.recipe import Recipe
from zest_fast.sweeping.records import RecordFile
from zest_fast.sweeping.reused_prefix import ReusedPrefix
from zest_fast.sweeping.tables import records_to_frame
from zest_fast.sweeping.trial_order import plan
from zest_fast.sweeping.trials import Trial, Trials, draw, evaluate, saved_parameters, set_head
from zest_fast.sweeping.workers import Pool, distribute

if TYPE_CHECKING:
    import pandas

    from zest_fast.sweeping.slurm_workers import SlurmJobs

SPLITS = ("head", "train", "score")
DEFINITIONS = 1
"""Of what the numbers in a record mean; raised when a metric or the way to a score changes its meaning."""
CACHE_BYTES = 2 << 30


def sweep(
    model: nn.Module,
    dataset: Mapping[str, tuple[Inputs, Tensor]],
    *,
    layers: LayerSelection = None,
    recipe: Recipe | None = None,
    out: str | os.PathLike[str],
    model_name: str | None = None,
    dataset_name: str = "dataset",
    family: str | None = None,
    reuse: bool = True,
    cache_bytes: int = CACHE_BYTES,
    workers: int | str = 1,
    slurm: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> pandas.DataFrame:
    """Fine-tune every layer alone (its weight and bias, with the head; all else frozen) and score it, seed by seed.

    The head is trained first, on samples of its own, and is the same start for every layer of a seed. The score is the
    mean loss on the split "score"; the accuracy stands beside it. The model runs in eval mode throughout. What lies
    below a layer is computed once and reused by all layers above it, after a comparison with the full forward pass;
    where they differ, the full pass is run. The model is afterwards as it was, bit for bit.

    Args:
        model: a classifier that ends in an nn.Linear (its logits [samples, classes], or an output with `.logits`).
        dataset: the splits "head", "train" and "score", each a pair (inputs, targets): a tensor or a mapping of tensors
            (passed as keywords), and class numbers int64 [samples]. A split "test" is not looked at.
        layers: as in `profile`; None = every layer but embeddings. The head is never among them.
        recipe: None = `Recipe()`.
        out: the record file. A sweep that was interrupted, in whatever way, goes on from it.
        model_name: how the records call the model; None = its class.
        dataset_name: how they call the data set.
        family: data sets that share samples are one family; None = the name of the data set.
        reuse: False runs every pass from the input: for measuring what reuse is worth.
        cache_bytes: how much may be kept in memory (by each worker of Ray or Slurm; by all local ones together);
            beyond, it is memory-mapped beside `out`.
        workers: so many processes on this machine, torch's threads shared among them; or "ray", or the address of a Ray
            cluster: a worker for each of its processors; or "slurm:8": eight jobs of Slurm. Numbers do not depend on
            it, but for the rounding of other numbers of threads and other processors. A worker that dies is replaced
            and its trial done again.
        slurm: for "slurm:8": "folder", which all machines share, "timeout_min" of a job, and any other option as
            submitit names it ("partition", "account", "mem_gb", "cpus_per_task": as many threads ...).
            {"cluster": "local"} tries the same with processes of this machine.
        progress: show a bar with an estimate of the time left on a terminal.

    Returns:
        A DataFrame with the columns of `load_records()`: two rows for each seed and layer, for the profile with the
        trained ("warm") head and that with a fresh one.

    Raises:
        ValueError, TypeError: arguments that do not fit, and a record file of another sweep or a damaged one.
        RuntimeError: a record file that cannot be written or is in use, a trial in which worker after worker dies, and
            jobs that cannot be submitted or end before they have begun.
        ImportError, ConnectionError: Ray or submitit is not installed; no Ray cluster answers.

    Examples:
        >>> import torch, zest_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> splits = {name: (torch.randn(24, 4), torch.arange(24) % 3) for name in ("head", "train", "score")}
        >>> recipe = zest_fast.Recipe(steps=2, batch_size=4, seeds=(0,), profile_samples=8)
        >>> frame = zest_fast.sweep(model, splits, recipe=recipe, out="sweep.jsonl", progress=False)
        >>> frame[["layer", "head_state"]].values.tolist()
        [['0', 'warm'], ['0', 'fresh']]
    """
    recipe = recipe or Recipe()
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe is a {type(recipe).__name__}; a zest_fast Recipe is needed")
    _check_workers(workers)
    placed: int | str | SlurmJobs = workers
    if slurm is not None or str(workers).partition(":")[0] == "slurm":
        from zest_fast.sweeping.slurm_workers import slurm_jobs

        placed = slurm_jobs(workers, slurm)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; a torch.nn.Module is needed")
    splits = {name: _split(dataset, name) for name in SPLITS}
    head_name, head = classifier_of(model)
    chosen = [
        layer for layer in select_layers(find_layers(dict(model.named_modules())), layers) if layer.module is not head
    ]
    if not chosen:
        raise ValueError("layers: nothing beside the head is chosen")
    _check_targets(splits, head)
    header = {
        "model": model_name or type(model).__name__,
        "dataset": dataset_name,
        "family": family or dataset_name,
        "recipe": recipe.to_dict(),
        "recipe_hash": recipe.hash,
        "layers": [layer.name for layer in chosen],
        "head": head_name,
        "weights": hash_tensors(_own_tensors(model, head)),
        "data": {name: hash_tensors(_tensors_of(*splits[name])) for name in SPLITS},
        "versions": {"definitions": DEFINITIONS, "torch": torch.__version__.partition("+")[0]},
        "environment": {"command": _command(), **_environment()},
    }
    with RecordFile(out, header) as records, in_eval_mode(model), saved_parameters(tuple(head.parameters())):
        job = _Sweep(model, head_name, head, chosen, splits, recipe, records, reuse, cache_bytes, placed)
        job.run(progress)
        return records_to_frame(header, records.records)


class _Sweep:
    def __init__(
        self,
        model: nn.Module,
        head_name: str,
        head: nn.Linear,
        layers: list[Layer],
        splits: dict[str, tuple[Inputs, Tensor]],
        recipe: Recipe,
        records: RecordFile,
        reuse: bool,
        cache_bytes: int,
        workers: int | str | SlurmJobs,
    ) -> None:
        self._model = model
        self._head_name = head_name
        self._head = head
        self._layers = layers
        self._splits = splits
        self._recipe = recipe
        self._records = records
        self._reuse = reuse
        self._cache_bytes = cache_bytes
        self._workers = workers
        self._draws = {seed: draw(len(splits["train"][1]), recipe.train_samples, seed) for seed in recipe.seeds}

    def run(self, progress: bool) -> None:
        for seed in self._recipe.seeds:
            with preserved(self._model, seed):
                self._prepare_head(seed)
            for state in ("warm", "fresh"):
                with preserved(self._model, seed):
                    self._profile(seed, state)
        reached = self._reached_layers()
        left = {
            layer: tuple(seed for seed in self._recipe.seeds if ("layer", seed, layer.name) not in self._records)
            for layer in self._layers
            if layer.name in reached
        }
        left = {layer: seeds for layer, seeds in left.items() if seeds}
        if not left:
            return
        total = len(self._recipe.seeds) * len(reached)
        with ModelState(list(self._model.modules()), []), Progress(f"{len(reached)} layers", total, progress) as bar:
            self._measure(left, bar)

    # The head, and the profiles with it

    def _prepare_head(self, seed: int) -> None:
        if ("head", seed) in self._records:
            return
        began = time.perf_counter()
        inputs, targets = self._splits["head"]
        rows = draw(len(targets), self._recipe.head_samples, seed)
        features, targets = features_of(self._model, self._head, rows_of(inputs, rows)), targets[rows]
        classes = self._head.out_features
        known = self._records.get("strength")
        if known is None:
            strength = choose_strength(features, targets, classes, self._recipe.head_strengths)
            self._records.append({"record": "strength", "value": strength})
        else:
            strength = known["value"]
        weight, bias = fit_head(features, targets, classes, strength, biased=self._head.bias is not None)
        # Float32 whatever the model's dtype; what the records hold is what every layer starts from.
        kept = {"weight": _encode(weight), "bias": _encode(bias)}
        set_head(self._head, *_head_of(kept))
        score_inputs, score_targets = self._splits["score"]
        score = evaluate(ReusedPrefix(self._model, score_inputs, limit=0, folder=Path()), Classification(score_targets))
        seconds = time.perf_counter() - began
        self._records.append({"record": "head", "seed": seed, **kept, **score, "seconds": round(seconds, 3)})

    def _profile(self, seed: int, state: str) -> None:
        known = self._records.get("profile", seed, state)
        if known is not None and known["metrics"] == list(ALL_METRIC_NAMES):
            return  # else the library has learned more metrics since
        if state == "warm":
            set_head(self._head, *_head_of(self._head_record(seed)))
        else:
            with preserved(self._model, seed):
                self._head.reset_parameters()
        inputs, targets = self._splits["train"]
        rows = self._draws[seed][: self._recipe.profile_samples]
        table = profile(self._model, (rows_of(inputs, rows), targets[rows]), metrics="all")
        wanted = {layer.name for layer in self._layers}
        values = {name: {**dict(table[name]), **table.info[name]} for name in table.names if name in wanted}
        self._records.append(
            {
                "record": "profile",
                "seed": seed,
                "head_state": state,
                "loss": table.loss,
                "backend": table.backend,
                "metrics": table.metrics,
                "layers": values,
            }
        )

    def _head_record(self, seed: int) -> Mapping[str, Any]:
        record = self._records.get("head", seed)
        assert record is not None  # made before anything asks for it
        return record

    def _reached_layers(self) -> set[str]:
        """Layers with a row in the profile: the loss does not depend on any other."""
        record = self._records.get("profile", self._recipe.seeds[0], "warm")
        assert record is not None
        return set(record["layers"])

    # The layers

    def _measure(self, left: Mapping[Layer, tuple[int, ...]], bar: Progress) -> None:
        trials = self._trials(left)
        bar.plan([task.cost for task in trials.tasks.values() for _ in task.seeds])

        def save(trial: Trial, result: Mapping[str, float]) -> None:
            self._records.append({"record": "layer", "seed": trial.seed, "layer": trial.layer, **result})
            bar.advance(trials.tasks[trial.layer].cost)

        if self._workers == 1:
            for trial in trials.left():
                save(trial, trials.run(trial))
        else:
            with self._pool(trials) as pool:
                distribute(trials.left(), pool, save)

    def _pool(self, trials: Trials) -> AbstractContextManager[Pool]:
        if isinstance(self._workers, int):
            return local_pool(trials, self._workers, self._records.close)
        if isinstance(self._workers, str):
            from zest_fast.sweeping.ray_workers import ray_pool

            return ray_pool(trials, self._workers)
        from zest_fast.sweeping.slurm_workers import slurm_pool

        return slurm_pool(trials, self._workers)

    def _trials(self, left: Mapping[Layer, tuple[int, ...]]) -> Trials:
        inputs, targets = self._splits["train"]
        used = torch.cat(list(self._draws.values())).unique()
        samples = len(used) + len(self._splits["score"][1])
        processes = self._workers if isinstance(self._workers, int) else 1
        limit = self._cache_bytes // samples // processes
        return Trials(
            model=self._model,
            head=self._head,
            recipe=self._recipe,
            heads={seed: _head_of(self._head_record(seed)) for seed in self._recipe.seeds},
            rows={seed: torch.searchsorted(used, rows) for seed, rows in self._draws.items()},
            tasks=plan(self._model, tuple(self._head.parameters()), left, inputs, reuse=self._reuse, limit=limit),
            train=(rows_of(inputs, used), Classification(targets[used])),
            score=(self._splits["score"][0], Classification(self._splits["score"][1])),
            limit=limit,
            folder=self._records.path.parent,
        )


def _split(dataset: Mapping[str, Any], name: str) -> tuple[Inputs, Tensor]:
    if not isinstance(dataset, Mapping):
        raise TypeError(f"dataset is a {type(dataset).__name__}; a mapping of the splits {', '.join(SPLITS)} is needed")
    if name not in dataset:
        raise ValueError(
            f"dataset has no split {name!r}; {', '.join(SPLITS)} are needed (there are: {sorted(dataset)})"
        )
    split = dataset[name]
    if not isinstance(split, tuple | list) or len(split) != 2:
        raise TypeError(f"dataset[{name!r}] is a {type(split).__name__}; a pair (inputs, targets) is needed")
    inputs, targets = split
    columns = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    if not columns or not all(isinstance(column, Tensor) for column in columns):
        raise TypeError(f"dataset[{name!r}]: inputs must be a tensor or a mapping of tensors")
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64 or targets.dim() != 1:
        raise TypeError(f"dataset[{name!r}]: targets must be class numbers, an int64 tensor [samples]")
    if not len(targets) or any(len(column) != len(targets) for column in columns):
        sizes = [len(column) for column in columns]
        raise ValueError(f"dataset[{name!r}] has {sizes} rows of inputs and {len(targets)} targets; as many are needed")
    return inputs, targets


def _check_workers(workers: Any) -> None:
    if isinstance(workers, bool) or not isinstance(workers, int | str):
        raise TypeError(
            f"workers is {workers!r}; a number of processes, 'ray', the address of a Ray cluster or 'slurm:N' is needed"
        )
    if workers == "" or (isinstance(workers, int) and workers < 1):
        raise ValueError(f"workers is {workers!r}; at least one is needed")


def _check_targets(splits: Mapping[str, tuple[Inputs, Tensor]], head: nn.Linear) -> None:
    for name, (_, targets) in splits.items():
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= head.out_features:
            raise ValueError(
                f"dataset[{name!r}] has classes {low}..{high}, the model's head has {head.out_features} outputs; "
                "give the model a head with as many outputs as there are classes"
            )


def _own_tensors(model: nn.Module, head: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All that the sweep starts from; the head is trained anew."""
    of_the_head = {id(parameter) for parameter in head.parameters()}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in of_the_head:
            yield name, tensor


def _tensors_of(inputs: Inputs, targets: Tensor) -> list[tuple[str, Tensor]]:
    columns = [("inputs", inputs)] if isinstance(inputs, Tensor) else sorted(inputs.items())
    return [*columns, ("targets", targets)]


def _command() -> str:
    """The command line, without the folders that it names: records travel, folders do not."""
    return " ".join(map(_without_folder, sys.argv))


def _without_folder(word: str) -> str:
    """Also of `--out=/home/me/records.jsonl` and `folder=/home/me/jobs`."""
    option, sign, value = ("", "", word) if os.path.isabs(word) else word.rpartition("=")
    return option + sign + (Path(value).name if os.path.isabs(value) else value)


def _environment() -> dict[str, str]:
    """What the numbers should not depend on."""
    return {
        "zest_fast": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _encode(tensor: Tensor) -> str:
    return base64.b64encode(tensor.float().contiguous().numpy().tobytes()).decode()


def _head_of(record: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Weight and bias, flat."""
    return _decode(record["weight"]), _decode(record["bias"])


def _decode(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=np.float32).copy())
