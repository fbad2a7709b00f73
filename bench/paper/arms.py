"""Fine-tuning one way or the other from the same weights: zest@5, random@5, full, lora, lora+zest@5."""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bench.paper.adapters import Adapter
from bench.paper.tasks import Recipe
from zest_fast.finetuning.selective_backward import SelectiveBackward
from zest_fast.integrations.pretrained import LoadedModel
from zest_fast.profiling.heads import find_head, is_language_model
from zest_fast.ranking.ranking import Ranking

ARMS = re.compile(r"full|lora|(lora\+)?(zest|random)@[1-9][0-9]*")
LORA_RANK = 8


@dataclass(frozen=True)
class Run:
    """All that the arms of one seed share. state: the weights that each of them starts from, on the CPU."""

    loaded: LoadedModel
    adapter: Adapter
    recipe: Recipe
    ranking: Ranking
    state: dict[str, torch.Tensor]
    seed: int

    @property
    def model(self) -> nn.Module:
        return self.loaded.model


def train_and_evaluate(run: Run, arm: str, train: Sequence[Any], evaluated: Sequence[Any]) -> dict[str, Any]:
    """Accuracies, layers, trained parameters and seconds per step; the model has its old weights afterwards."""
    layers = arm_layers(run.ranking, arm, run.seed)
    try:
        with _trainable(run, arm, layers) as (model, parameters):
            seconds = fit(model, parameters, train, run)
            found = run.adapter.evaluate(model.eval(), evaluated, run.recipe.batch_size)
            count = sum(parameter.numel() for parameter in parameters)
    finally:
        run.model.load_state_dict(run.state)
    return {"arm": arm, "seed": run.seed, **found, "layers": list(layers), "trained_parameters": count,
            "seconds_per_step": round(seconds, 4)}  # fmt: skip


def arm_layers(ranking: Ranking, arm: str, seed: int) -> tuple[str, ...]:
    """The layers of an arm; of full and lora all but the head. Raises ValueError for an arm that does not exist."""
    if not ARMS.fullmatch(arm):
        raise ValueError(f"arm {arm!r} is unknown; there are zest@N, random@N, lora+zest@N, full and lora")
    every = ranking.explain().query("head == False").index.tolist()
    if "@" not in arm:
        return tuple(every)
    n = int(arm.rpartition("@")[2])
    return ranking.top(n) if "zest" in arm else tuple(random.Random(seed).sample(every, n))


def heads(loaded: LoadedModel) -> list[str] | None:
    """What trains beside the layers: the head of a classifier, and whatever the checkpoint did not hold."""
    if is_language_model(loaded.model):
        return None
    fresh = {name.rpartition(".")[0] for name in loaded.fresh}
    return sorted(fresh | {name for name in [find_head(loaded.model)] if name})


@contextmanager
def _trainable(run: Run, arm: str, layers: Sequence[str]) -> Iterator[tuple[Any, list[nn.Parameter]]]:
    model, head = run.model, heads(run.loaded)
    if arm == "full":
        yield model, list(model.requires_grad_(True).parameters())
    elif arm.startswith("lora"):
        from peft import get_peft_model

        from zest_fast.integrations.peft import lora_config

        wrapped = get_peft_model(model, lora_config(layers, model, r=LORA_RANK, head=head))
        try:
            yield wrapped, [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
        finally:
            wrapped.unload()
    else:
        chosen = [
            name for name in layers if name not in (head or ())
        ]  # one that is trained anyway, such as a fresh pooler
        with SelectiveBackward(model, chosen, head=head) as tuned:
            yield model, list(tuned.parameters())


def fit(model: Any, parameters: Sequence[nn.Parameter], train: Sequence[Any], run: Run) -> float:
    """AdamW, its rate falling linearly to zero; returns the median of the seconds per step.

    Seed and epoch alone decide the order of the samples: it is the same for every arm.
    Raises RuntimeError when the loss is not finite.
    """
    torch.manual_seed(run.seed)
    recipe, size = run.recipe, run.recipe.batch_size
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
    steps = recipe.epochs * math.ceil(len(train) / size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    device, seconds = parameters[0].device, []
    model.train()
    for epoch in range(recipe.epochs):
        shuffle = torch.Generator().manual_seed(1000 * run.seed + epoch)
        for rows in torch.randperm(len(train), generator=shuffle).split(size):
            batch = run.adapter.batch([train[row] for row in rows.tolist()])
            start = time.perf_counter()
            loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
            loss.backward()
            if not torch.isfinite(loss):
                raise RuntimeError(
                    f"the loss is {loss.item()} in epoch {epoch + 1}; try a smaller rate than {recipe.lr}"
                )
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) // 2]
