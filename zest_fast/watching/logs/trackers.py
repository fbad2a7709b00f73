"""Sinks for wandb, TensorBoard and trackio, which are imported when a sink is made.

Each value has the tag "layer/metric"; loss, overflow and what holds over all layers are "all layers/...". A NaN (a
metric that a layer does not have) is left out: none of the three has a place for "undefined" in a curve. Infinities are
passed on, which all three show. On a step that overflowed, "all layers/overflow" is 1.
"""

from __future__ import annotations

import importlib
import math
import os
from typing import Any

import numpy as np

from zest_fast.watching.watched_step import WatchedStep

_MOST_BINS = 512  # of a histogram of wandb


class WandbLog:
    """Logs to a run of wandb, which has to have begun: `run`, or the current one of `wandb.init`.

    Its x-axis is a metric of its own, "zest/step", so that steps are right whatever wandb's own counter says, which
    counts calls of `log`: that one moves on by one for each logged step. A script that passes `step=` to `wandb.log`
    itself passes shared_steps=True: then steps are passed as wandb's, which leaves out those below its counter.

    Raises ImportError without wandb; RuntimeError where no run has begun.
    """

    def __init__(self, run: Any = None, *, prefix: str = "zest/", shared_steps: bool = False) -> None:
        self._wandb = _imported("wandb", "wandb", "wandb")
        run = run if run is not None else self._wandb.run
        if run is None:
            raise RuntimeError("wandb has no run: call wandb.init() before the watch begins, or pass run=")
        self._run, self._prefix, self._shared = run, prefix, shared_steps
        if not shared_steps:
            run.define_metric(f"{prefix}step")
            run.define_metric(f"{prefix}*", step_metric=f"{prefix}step")

    def __call__(self, step: WatchedStep) -> None:
        found: dict[str, Any] = {self._prefix + tag: value for tag, value in scalars(step).items()}
        for tag, (counts, edges) in _histograms(step).items():
            found[self._prefix + tag] = self._wandb.Histogram(np_histogram=_fewer_bins(counts, edges))
        if self._shared:
            self._run.log(found, step=step.step)
        else:
            self._run.log({f"{self._prefix}step": step.step, **found})


class TrackioLog:
    """Logs to a run of trackio, which has to have begun: `run`, or the current one of `trackio.init`.

    Raises ImportError without trackio; at the first step RuntimeError where no run has begun.
    """

    def __init__(self, run: Any = None, *, prefix: str = "") -> None:
        self._trackio = _imported("trackio", "trackio", "trackio")
        self._run, self._prefix = run, prefix

    def __call__(self, step: WatchedStep) -> None:
        found: dict[str, Any] = {self._prefix + tag: value for tag, value in scalars(step).items()}
        if hasattr(self._trackio, "Histogram"):  # later versions
            for tag, (counts, edges) in _histograms(step).items():
                found[self._prefix + tag] = self._trackio.Histogram(np_histogram=_fewer_bins(counts, edges))
        (self._trackio if self._run is None else self._run).log(found, step=step.step)


class TensorBoardLog:
    """Logs to a folder, or to a SummaryWriter of `torch.utils.tensorboard` that is there.

    Of a run that is taken up in the same folder, TensorBoard hides what was logged before from the first step on that
    it logs again. `close` closes the writer of a folder, not one that was passed.

    Raises ImportError without tensorboard.
    """

    def __init__(self, folder_or_writer: str | os.PathLike[str] | Any, *, prefix: str = "") -> None:
        self._folder: str | None = None
        self._writer: Any = None
        self._prefix = prefix
        if isinstance(folder_or_writer, str | os.PathLike):
            self._folder = os.fspath(folder_or_writer)
            self._module = _imported("torch.utils.tensorboard", "TensorBoard", "tensorboard")
        else:
            self._writer = folder_or_writer

    def __call__(self, step: WatchedStep) -> None:
        if self._writer is None:
            self._writer = self._module.SummaryWriter(self._folder, purge_step=step.step)
        for tag, value in scalars(step).items():
            self._writer.add_scalar(self._prefix + tag, value, step.step)
        for tag, (counts, edges) in _histograms(step).items():
            self._add_histogram(self._prefix + tag, counts, edges, step.step)
        self._writer.flush()

    def _add_histogram(self, tag: str, counts: np.ndarray, edges: np.ndarray, step: int) -> None:
        """Sums are of the middles of bins: what a histogram knows."""
        middles = (edges[:-1] + edges[1:]) / 2
        self._writer.add_histogram_raw(
            tag,
            min=float(edges[0]),
            max=float(edges[-1]),
            num=int(counts.sum()),
            sum=float((counts * middles).sum()),
            sum_squares=float((counts * middles**2).sum()),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )

    def close(self) -> None:
        """Close the writer of a folder; a step that comes later begins another one."""
        if self._folder is not None and self._writer is not None:
            self._writer.close()
            self._writer = None


def scalars(step: WatchedStep) -> dict[str, float]:
    """Tag -> value, without NaN."""
    found = {"all layers/overflow": float(step.overflow), "all layers/loss": float(step.profile.loss)}
    found |= {f"all layers/{name}": float(value) for name, value in step.totals.items()}
    for name, row in zip(step.profile.names, step.profile.values.tolist(), strict=True):
        found |= {f"{name}/{metric}": value for metric, value in zip(step.profile.metrics, row, strict=True)}
    return {tag: value for tag, value in found.items() if not math.isnan(value)}


def _histograms(step: WatchedStep) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Tag -> counts and edges, without those that have no bins or edges that are not finite."""
    return {
        f"{layer}/{kind}": (np.asarray(counts), np.asarray(edges))
        for layer, kinds in step.histograms.items()
        for kind, (counts, edges) in kinds.items()
        if len(counts) and np.isfinite(edges).all()
    }


def _fewer_bins(counts: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Neighbouring bins put together until there are no more than these tools take."""
    together = math.ceil(len(counts) / _MOST_BINS)
    if together == 1:
        return counts, edges
    starts = np.arange(0, len(counts), together)
    return np.add.reduceat(counts, starts), np.append(edges[:-1][starts], edges[-1])


def _imported(module: str, what: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"logging to {what} needs the package {package}: pip install {package}") from error
