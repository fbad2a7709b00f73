"""What a demo task is made of: a model with its weights, four disjoint splits and a budget."""

import importlib.util
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

SPLITS = ("head", "train", "validation", "test")


@dataclass(frozen=True)
class Budget:
    """How much work a demo does. The defaults of each task take about five minutes on two cores."""

    head: int  # samples that warm the head; the layers never train on them
    train: int
    validation: int
    test: int
    steps: int  # training steps of every run
    batch_size: int
    profile_batch: int  # samples of the one batch that is profiled
    scales: tuple[float, ...]  # learning rates tried for the arms that train chosen layers (see arms.learning_rate)
    head_scales: tuple[float, ...]  # the same for head only, which wants larger ones
    full_scales: tuple[float, ...]  # the same for full fine-tuning, which wants smaller ones
    chosen: int = 5  # layers to fine-tune
    draws: int = 3  # random choices to compare with; 0: none
    checks: int = 2  # points of each validation curve after its start
    timing_rounds: int = 5

    def first_look(self) -> "Budget":
        """Without random choices, and each arm with the middle one of its learning rates instead of the best."""
        return replace(
            self,
            draws=0,
            scales=_middle(self.scales),
            head_scales=_middle(self.head_scales),
            full_scales=_middle(self.full_scales),
        )

    def sizes(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in SPLITS}


def _middle(rates: tuple[float, ...]) -> tuple[float, ...]:
    """The middle one alone; of none, none."""
    return rates[len(rates) // 2 :][:1]


@dataclass(frozen=True)
class Split:
    """Samples of one split: inputs [samples, ...] and integer labels [samples]."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        return self.inputs[rows], self.labels[rows]


@dataclass(frozen=True)
class Task:
    """A model whose call `model(inputs)` returns logits [samples, classes], and what it is trained and tested on."""

    name: str
    title: str  # model and data, for headings
    model: nn.Module
    head: str | None  # module name of the classifier; None: a causal LM, which answers with its own words
    splits: dict[str, Split]
    budget: Budget
    notes: tuple[str, ...] = field(default=())  # what a reader must know to read the figures


def draw_splits(inputs: Tensor, labels: Tensor, budget: Budget, seed: int) -> dict[str, Split]:
    """Cut disjoint random splits; the same seed gives the same splits.

    Raises ValueError when the data are fewer than the budget asks for.
    """
    sizes = budget.sizes()
    wanted = sum(sizes.values())
    if wanted > len(labels):
        raise ValueError(f"budget asks for {wanted} samples ({sizes}), the data have {len(labels)}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = order[:wanted].split(list(sizes.values()))
    return {name: Split(inputs[rows], labels[rows]) for name, rows in zip(sizes, parts, strict=True)}


def package_folder(module: str, *, task: str, install: str) -> Path:
    """Folder of an installed package, found without importing it (some packages import far more than their files need).

    Raises ImportError with the pip line that brings what the task needs.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ImportError(f"demo task {task!r} needs the package {module!r}; install it with: {install}", name=module)
    return Path(spec.origin).parent
