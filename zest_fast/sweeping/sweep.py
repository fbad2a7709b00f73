"""What each layer is worth: fine-tune it alone with the head, and see what that does to the loss on other samples."""

from __future__ import annotations

import base64
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from zest_fast.finetuning.delta import hash_tensors
from zest_fast.finetuning.trainable_layers import Part, chosen_layers
from zest_fast.profiling.layers import Layer, LayerSelection, find_layers, select_layers
from zest_fast.profiling.loss import call_model
from zest_fast.profiling.metrics import ALL_METRIC_NAMES
from zest_fast.profiling.model_state import ModelState
from zest_fast.profiling.profile import profile
from zest_fast.sweeping.boundaries import Boundary, Call, Trace, trace_calls
from zest_fast.sweeping.head import choose_strength, classifier_of, features_of, fit_head
from zest_fast.sweeping.inputs import Inputs, batches, count, logits_of, rows_of
from zest_fast.sweeping.prefix_cache import TRACED, VERIFIED, PrefixCache, find_boundary
from zest_fast.sweeping.progress import Progress
from zest_fast.sweeping.recipe import Recipe
from zest_fast.sweeping.records import RecordFile
from zest_fast.sweeping.tables import records_to_frame

if TYPE_CHECKING:
    import pandas

SPLITS = ("head", "train", "score")
DEFINITIONS = 1
"""Of what the numbers in a record mean; raised when a metric or the way to a score changes its meaning."""
EVALUATION_BATCH = 64
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
        model_name, dataset_name, family: how the records call them (default: the model's class, "dataset", and the
            name of the data set). Data sets that share samples are one family.
        reuse: False runs every pass from the input: for measuring what reuse is worth.
        cache_bytes: how much may be kept in memory; beyond, it is memory-mapped beside `out`.
        progress: show a bar with an estimate of the time left on a terminal.

    Returns:
        A DataFrame with the columns of `load_records()`: two rows for each seed and layer, for the profile with the
        trained ("warm") head and that with a fresh one.

    Raises:
        ValueError, TypeError: arguments that do not fit, and a record file of another sweep or a damaged one.
        RuntimeError: a record file that cannot be written or is in use.
    """
    recipe = recipe or Recipe()
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe is a {type(recipe).__name__}; a zest_fast Recipe is needed")
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
    with RecordFile(out, header) as records, _in_eval_mode(model), _saved(head):
        job = _Sweep(model, head_name, head, chosen, splits, recipe, records, reuse, cache_bytes)
        job.run(progress)
        return records_to_frame(header, records.records)


@dataclass(eq=False)
class _Task:
    """One layer with what is left to do for it."""

    layer: Layer
    part: Part
    seeds: list[int]
    place: Call
    """The first call that uses the layer's weight."""
    boundary: Boundary

    @property
    def cost(self) -> float:
        """Seconds of a traced pass from the boundary on: what the layer costs, up to a factor."""
        return self.boundary.trace.seconds - self.boundary.start


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
        self._draws = {seed: _draw(len(splits["train"][1]), recipe.train_samples, seed) for seed in recipe.seeds}

    def run(self, progress: bool) -> None:
        for seed in self._recipe.seeds:
            self._prepare_head(seed)
            for state in ("warm", "fresh"):
                self._profile(seed, state)
        reached = self._reached_layers()
        left = {
            layer: [seed for seed in self._recipe.seeds if ("layer", seed, layer.name) not in self._records]
            for layer in self._layers
            if layer.name in reached
        }
        left = {layer: seeds for layer, seeds in left.items() if seeds}
        if not left:
            return
        total = len(self._recipe.seeds) * len(reached)
        with ModelState(list(self._model.modules()), []), Progress(f"{len(reached)} layers", total, progress) as bar:
            self._measure(self._planned(left), bar)

    # The head, and the profiles with it

    def _prepare_head(self, seed: int) -> None:
        if ("head", seed) in self._records:
            return
        began = time.perf_counter()
        inputs, targets = self._splits["head"]
        rows = _draw(len(targets), self._recipe.head_samples, seed)
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
        self._set_head(kept)
        score_inputs, score_targets = self._splits["score"]
        score = self._evaluate(PrefixCache(self._model, score_inputs, limit=0, folder=Path()), score_targets)
        seconds = time.perf_counter() - began
        self._records.append({"record": "head", "seed": seed, **kept, **score, "seconds": round(seconds, 3)})

    def _set_head(self, record: Mapping[str, Any]) -> None:
        with torch.no_grad():
            self._head.weight.copy_(_decode(record["weight"]).view_as(self._head.weight))
            if self._head.bias is not None:
                self._head.bias.copy_(_decode(record["bias"]))

    def _profile(self, seed: int, state: str) -> None:
        known = self._records.get("profile", seed, state)
        if known is not None and known["metrics"] == list(ALL_METRIC_NAMES):
            return  # else the library has learned more metrics since
        if state == "warm":
            self._set_head(self._head_record(seed))
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
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

    def _planned(self, left: Mapping[Layer, list[int]]) -> list[_Task]:
        """What is left to do, in the order of the boundaries."""
        inputs, _ = self._splits["train"]
        probe = rows_of(inputs, torch.arange(min(count(inputs), TRACED + VERIFIED)))
        traced = rows_of(probe, torch.arange(min(count(probe), TRACED)))
        call_model(self._model, traced)  # the first pass is slower than the others
        trace = trace_calls(self._model, lambda: call_model(self._model, traced), count(traced))
        tasks = []
        for layer, seeds in left.items():
            place = _first_use(self._model, layer, trace)
            boundary = Boundary(trace, 0.0, (), ())
            if self._reuse and count(probe) == TRACED + VERIFIED:
                boundary = find_boundary(
                    self._model, trace, place, layer.weight.parameter, probe, self._bytes_per_sample
                )
            tasks.append(_Task(layer, chosen_layers(self._model, [layer.name])[0], seeds, place, boundary))
        first = min(task.place.start for task in tasks)
        recomputed = [task.layer.name for task in tasks if not task.boundary.skipped and task.place.start > first]
        if self._reuse and recomputed:
            warnings.warn(
                f"what lies below {len(recomputed)} of {len(tasks)} layers (such as {recomputed[0]!r}) cannot be "
                "reused: the full forward pass runs for them, which takes longer",
                stacklevel=4,
            )
        return sorted(tasks, key=lambda task: task.boundary.start)

    @property
    def _bytes_per_sample(self) -> int:
        return self._cache_bytes // (len(self._score_targets) + len(self._train_rows()))

    @property
    def _score_targets(self) -> Tensor:
        return self._splits["score"][1]

    def _train_rows(self) -> Tensor:
        return torch.cat(list(self._draws.values())).unique()

    def _measure(self, tasks: list[_Task], bar: Progress) -> None:
        train_rows = self._train_rows()
        train_inputs, train_targets = self._splits["train"]
        folder = self._records.path.parent
        limit = self._bytes_per_sample
        score = PrefixCache(self._model, self._splits["score"][0], limit=limit, folder=folder)
        train = PrefixCache(self._model, rows_of(train_inputs, train_rows), limit=limit, folder=folder)
        targets = train_targets[train_rows]
        bar.plan([task.cost for task in tasks for _ in task.seeds])
        for task in tasks:
            score.advance(task.boundary)
            train.advance(task.boundary)
            for seed in task.seeds:
                began = time.perf_counter()
                rows = torch.searchsorted(train_rows, self._draws[seed])
                result = self._score_of(task, seed, train, rows, targets, score)
                seconds = round(time.perf_counter() - began, 3)
                self._records.append(
                    {"record": "layer", "seed": seed, "layer": task.layer.name, **result, "seconds": seconds}
                )
                bar.advance(task.cost)

    def _score_of(
        self, task: _Task, seed: int, train: PrefixCache, rows: Tensor, targets: Tensor, score: PrefixCache
    ) -> dict[str, float]:
        self._set_head(self._head_record(seed))
        with _saved_parameters(task.part.parameters):
            self._train(task.part, seed, train, rows, targets)
            return self._evaluate(score, self._score_targets)

    def _train(self, part: Part, seed: int, cache: PrefixCache, rows: Tensor, targets: Tensor) -> None:
        recipe = self._recipe
        rms = float(part.parameters[0].detach().double().square().mean().sqrt())
        head = list(self._head.parameters())
        groups = [
            {"params": list(part.parameters), "lr": recipe.layer_lr(rms)},
            {"params": head, "lr": recipe.head_lr},
        ]
        trained = [*part.parameters, *head]
        optimizer = torch.optim.Adam(groups)
        rates = [group["lr"] for group in optimizer.param_groups]
        for parameter in trained:
            parameter.requires_grad_(True)
        try:
            with torch.enable_grad():
                for step, batch in enumerate(_batches_of(rows, recipe.steps, recipe.batch_size, seed)):
                    for group, rate in zip(optimizer.param_groups, rates, strict=True):
                        group["lr"] = rate * recipe.learning_rate_scale(step)
                    loss = nn.functional.cross_entropy(logits_of(cache.run(batch)), targets[batch])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        finally:
            for parameter in trained:
                parameter.requires_grad_(False)
                parameter.grad = None

    @torch.no_grad()
    def _evaluate(self, cache: PrefixCache, targets: Tensor) -> dict[str, float]:
        loss, correct = 0.0, 0
        for rows in batches(len(targets), EVALUATION_BATCH):
            logits = logits_of(cache.run(rows)).double()
            loss += float(nn.functional.cross_entropy(logits, targets[rows], reduction="sum"))
            correct += int((logits.argmax(1) == targets[rows]).sum())
        return {"accuracy": correct / len(targets), "loss": loss / len(targets)}


def _first_use(model: nn.Module, layer: Layer, trace: Trace) -> Call:
    """The first call that may use the layer's weight: of an owner, or where that is never called of what holds it."""
    modules = dict(model.named_modules())
    calls = []
    for owner in layer.weight.layers:
        names = [owner.module_name]
        while names[-1]:
            names.append(names[-1].rpartition(".")[0])
        found = (trace.first_call(module) for module in (owner.called_module, *(modules[name] for name in names)))
        calls.append(next(call for call in found if call is not None))
    return min(calls, key=lambda call: call.start)


def _draw(available: int, wanted: int | None, seed: int) -> Tensor:
    """Row numbers for a seed: its own part of one permutation, or random ones where the split is too small for that."""
    if wanted is None or wanted >= available:
        return torch.arange(available)
    if (seed + 1) * wanted <= available:
        order = torch.randperm(available, generator=torch.Generator().manual_seed(0))
        return order[seed * wanted : (seed + 1) * wanted]
    return torch.randperm(available, generator=torch.Generator().manual_seed(seed + 1))[:wanted]


def _batches_of(rows: Tensor, steps: int, size: int, seed: int) -> Iterator[Tensor]:
    """The same batches for every layer of a seed: epochs in random order, without the incomplete batch at the end."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, len(rows))
    done = 0
    while done < steps:
        order = rows[torch.randperm(len(rows), generator=generator)]
        for batch in order[: len(rows) // size * size].split(size)[: steps - done]:
            yield batch
            done += 1


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
    return " ".join(Path(word).name if os.path.isabs(word) else word for word in sys.argv)


def _environment() -> dict[str, str]:
    """What the numbers should not depend on."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("zest_fast")
    except PackageNotFoundError:  # run from a checkout
        own = "unknown"
    return {"zest_fast": own, "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}


def _encode(tensor: Tensor) -> str:
    return base64.b64encode(tensor.float().contiguous().numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=np.float32).copy())


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _saved_parameters(parameters: tuple[nn.Parameter, ...]) -> Iterator[None]:
    """At the end the values of these parameters are what they were."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


def _saved(head: nn.Linear) -> Any:
    return _saved_parameters(tuple(head.parameters()))
