"""How a model is scored by its task: classes by accuracy, numbers by correlation, sets of labels and tags by F1."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from zest_fast.cli.jobs.job import to_device
from zest_fast.cli.jobs.training import loss_and_predictions
from zest_fast.integrations.data.tags import OUTSIDE
from zest_fast.integrations.data.tokens import IGNORED
from zest_fast.profiling.borrowing.training_modes import in_eval_mode


@dataclass(frozen=True)
class Score:
    loss: float  #: mean over what was predicted
    predictions: int  #: samples, or tokens of a language model
    figures: dict[str, float]  #: by the task: accuracy; mse, pearson, spearman; f1 ...

    def plain(self) -> dict[str, Any]:
        return {"loss": self.loss, **self.figures, "predictions": self.predictions}


class _Tally(Protocol):
    def add(self, logits: torch.Tensor, targets: torch.Tensor, labels: Any) -> int:
        """Count a batch; returns how many predictions it has. labels: as the batch has them, before they were flat."""

    def figures(self) -> dict[str, float]: ...


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    loader: DataLoader[Any],
    device: torch.device,
    *,
    task: str | None = None,
    class_names: Sequence[str] | None = None,
    one_by_one: bool = False,
) -> Score:
    """Loss and the figures of the task in eval mode; each module's mode is as before afterwards. class_names: of tags.

    one_by_one: logits of a single text of each batch at a time, which of a large vocabulary take more than a step of
    lean training.
    """
    tally = _tally_for(task, class_names or ())
    total = count = 0.0
    with in_eval_mode(model):
        for batch in _texts_in(loader) if one_by_one else loader:
            moved = to_device(batch, device)
            loss, logits, targets = loss_and_predictions(model, moved, task)
            found = tally.add(logits, targets, moved["labels"] if isinstance(moved, dict) else moved[1])
            total += float(loss) * found if found else 0.0
            count += found
    if not count:
        raise ValueError("the validation data holds nothing to predict")
    return Score(total / count, int(count), tally.figures())


def _texts_in(loader: DataLoader[Any]) -> Iterator[Any]:
    for batch in loader:
        tokens = isinstance(batch, Mapping) and batch["labels"].dim() == 2
        for place in range(len(batch["labels"])) if tokens else ():
            yield {name: tensor[place : place + 1] for name, tensor in batch.items()}
        if not tokens:
            yield batch


def _tally_for(task: str | None, class_names: Sequence[str]) -> _Tally:
    if task == "regression":
        return _Numbers()
    if task == "multi-label":
        return _Sets()
    return _Tags(class_names) if task == "token-classification" else _Classes()


@dataclass
class _Classes:
    right: int = 0
    count: int = 0

    def add(self, logits: torch.Tensor, targets: torch.Tensor, labels: Any) -> int:
        counted = targets != IGNORED
        found = int(counted.sum())
        self.right += int((logits.argmax(1) == targets)[counted].sum())
        self.count += found
        return found

    def figures(self) -> dict[str, float]:
        return {"accuracy": self.right / self.count}


@dataclass
class _Numbers:
    predicted: list[torch.Tensor] = field(default_factory=list)
    wanted: list[torch.Tensor] = field(default_factory=list)

    def add(self, logits: torch.Tensor, targets: torch.Tensor, labels: Any) -> int:
        self.predicted.append(logits.double().cpu())
        self.wanted.append(targets.double().cpu())
        return len(targets)

    def figures(self) -> dict[str, float]:
        """Correlations are NaN where one side is constant, or has a single value."""
        from scipy import stats

        predicted, wanted = torch.cat(self.predicted).numpy(), torch.cat(self.wanted).numpy()
        found = {"mse": float(((predicted - wanted) ** 2).mean())}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of constants, which are NaN
            for name, measure in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
                found[name] = float(measure(predicted, wanted)[0]) if len(wanted) > 1 else float("nan")
        return found


@dataclass
class _Sets:
    """Labels of a probability above a half, by label: [rows that have it and were found, found, that have it]."""

    counts: Any = 0

    def add(self, logits: torch.Tensor, targets: torch.Tensor, labels: Any) -> int:
        found, wanted = logits > 0, targets > 0.5
        self.counts = self.counts + torch.stack([(found & wanted).sum(0), found.sum(0), wanted.sum(0)]).cpu()
        return len(targets)

    def figures(self) -> dict[str, float]:
        both, found, wanted = self.counts.tolist()
        each = [_f1(*counts) for counts in zip(both, found, wanted, strict=True)]
        return {"f1_micro": _f1(sum(both), sum(found), sum(wanted)), "f1_macro": sum(each) / len(each)}


class _Tags:
    """Of tags that begin with B- and I-, the F1 of whole entities; that of single tags without the one for outside."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.classes = _Classes()
        self.outside = names.index(OUTSIDE) if OUTSIDE in names else None
        self.tokens, self.entities = [0, 0, 0], [0, 0, 0]
        self.marked = self.outside is not None and all(name[:2] in ("B-", "I-") for name in names if name != OUTSIDE)

    def add(self, logits: torch.Tensor, targets: torch.Tensor, labels: Any) -> int:
        predicted = logits.argmax(1).view(labels.shape)
        for row, wanted in zip(predicted.tolist(), labels.tolist(), strict=True):
            pairs = [(found, tag) for found, tag in zip(row, wanted, strict=True) if tag != IGNORED]
            for found, tag in pairs if self.outside is not None else ():
                _count(self.tokens, found == tag != self.outside, found != self.outside, tag != self.outside)
            if self.marked:
                found_ones, there = (set(entities([self.names[pair[side]] for pair in pairs])) for side in (0, 1))
                _count(self.entities, len(found_ones & there), len(found_ones), len(there))
        return self.classes.add(logits, targets, labels)

    def figures(self) -> dict[str, float]:
        found = self.classes.figures()
        if self.outside is not None:
            found["token_f1"] = _f1(*self.tokens)
        if self.marked:
            found["entity_f1"] = _f1(*self.entities)
        return found


def entities(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """(kind, first, end) of what tags B-, I- and O mark; an I- after another kind begins one, as in CoNLL."""
    start, kind = 0, ""
    for place, tag in enumerate([*tags, OUTSIDE]):
        mark, _, name = tag.partition("-")
        if kind and (mark != "I" or name != kind):
            yield kind, start, place
            kind = ""
        if mark != OUTSIDE and not kind:
            start, kind = place, name


def _count(counts: list[int], both: int, found: int, wanted: int) -> None:
    for place, more in enumerate((both, found, wanted)):
        counts[place] += more


def _f1(both: int, found: int, wanted: int) -> float:
    """0 where nothing was found and nothing is there, as scikit-learn says."""
    return 2 * both / (found + wanted) if found + wanted else 0.0
