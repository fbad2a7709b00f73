"""A closed window -> the WatchedStep: columns, totals, and in words what is not there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from zest_fast.foundation.nearest import some
from zest_fast.profiling.layer_profile import LayerProfile
from zest_fast.profiling.layers import Layer, Weight
from zest_fast.profiling.metrics import METRICS
from zest_fast.profiling.table import depths, head_or_none, missing_output, other_weights, row_info
from zest_fast.watching.logs.lines import Layout
from zest_fast.watching.noise import RunningNoise, estimate
from zest_fast.watching.processes.together import DID_NOT_MEET
from zest_fast.watching.target import Rows, Target
from zest_fast.watching.watched_step import WatchedStep
from zest_fast.watching.window import OF_WEIGHTS, Asked, Part, Window, number
from zest_fast.watching.window_statistics import WindowStatistics
from zest_fast.watching.words import History

NAN = math.nan
NOISE = ("noise_scale", "noise_scale_error")
_ALL = None  # the key of RunningNoise under which all layers are


class Reporter:
    """Makes the steps of one watch, and keeps what goes from one to the next."""

    def __init__(self) -> None:
        self._history = History()
        self._noise = RunningNoise()
        self._names: list[str] = []
        self._head: str | None = None

    def layout(self, target: Target, rows: Rows, asked: Asked) -> Layout:
        """What the steps of these rows will have in common."""
        depth, head = depths(rows.layers, rows.subject, {}), head_or_none(target.model)
        info = {
            layer.name: row_info(
                layer,
                depth=depth[layer],
                uses=1,
                head=layer.module_name == head,
                trainable=rows.subject.trainable[layer],
                nonfinite=0,
                notes=[target.note],
            )
            for layer in rows.layers
        }
        metrics = [*asked.metrics, *(["update_ratio"] if asked.updates else []), *(NOISE if asked.noise else ())]
        return Layout([layer.name for layer in rows.layers], metrics, info, {}, asked.backend)

    def step(self, window: Window, seconds: float) -> WatchedStep:
        """Everything of a closed window."""
        names = [layer.name for layer in window.rows.subject.layers]
        if names != self._names:  # which is to be asked once: it looks through the model
            self._names, self._head = names, head_or_none(window.target.model)
        return _Step(window, self._history, self._noise, self._head).made(seconds)


class _Step:
    def __init__(self, window: Window, history: History, noise: RunningNoise, head: str | None) -> None:
        self._window, self._asked = window, window.asked
        self._layers, self._statistics = list(window.rows.layers), window.statistics
        self._history, self._noise = history, noise
        self._scale = window.scales.of_the_gradient
        self._notes = list(window.notes)
        self._replaced = set(window.target.replaced_since(window.rows))
        self._depths = depths(self._layers, window.rows.subject, window.taps.order if window.taps else {})
        self._head = head
        self._row_notes = {layer: self._notes_of(layer) for layer in self._layers}

    def made(self, seconds: float) -> WatchedStep:
        window = self._window
        self._say_what_is_missing()
        totals: dict[str, float] = {"grad_norm": self._total_norm(self._statistics)}
        extra: dict[str, dict[Layer, float]] = {}
        if self._asked.updates:
            extra["update_ratio"] = self._update_ratios(totals)
        if self._asked.noise:
            extra |= self._noise_scales(totals)
        profile = self._profile(
            self._statistics, self._asked.metrics, window.loss, self._scale, extra, window.target.note
        )
        nonfinite = {name: int(row["nonfinite"]) for name, row in profile.info.items()}
        self._notes += self._history.notes(self._norms(), nonfinite)
        parts = [self._part(part) for part in window.parts] if self._asked.parts else []
        return WatchedStep(
            step=window.step,
            profile=profile,
            seconds=seconds,
            overflow=window.was_skipped or self._has_overflown(),
            notes=tuple(self._notes),
            parts=tuple(parts),
            totals=totals,
            histograms=self._histograms() if self._asked.histograms else {},
        )

    def _gradient_norm(self, statistics: WindowStatistics, weight: Weight, scale: float) -> float | None:
        """None where no gradient was read."""
        found = statistics.gradients.get(weight)
        return None if found is None else found.gradient.norm / scale

    def _norms(self) -> dict[str, float]:
        found = {
            layer.name: self._gradient_norm(self._statistics, layer.weight, self._scale)
            for layer in self._layers
            if layer not in self._replaced
        }
        return {name: norm for name, norm in found.items() if norm is not None}

    def _total_norm(self, statistics: WindowStatistics) -> float:
        norms = [self._gradient_norm(statistics, weight, self._scale) for weight in self._window.rows.weights]
        read = [norm for norm in norms if norm is not None]
        return math.hypot(*read) if read else NAN

    def _has_overflown(self) -> bool:
        return any(found.gradient.nonfinite for found in self._statistics.gradients.values())

    def _profile(
        self,
        statistics: WindowStatistics,
        metrics: list[str],
        loss: float,
        scale: float,
        extra: Mapping[str, Mapping[Layer, float]],
        note: str,
    ) -> LayerProfile:
        values = np.full((len(self._layers), len(metrics) + len(extra)), NAN)
        info: dict[str, dict[str, Any]] = {}
        window = self._window
        for i, layer in enumerate(self._layers):
            found, nonfinite = statistics.of(layer, scale)
            if layer not in self._replaced:
                values[i] = [METRICS[name].value(found) for name in metrics] + [
                    column[layer] for column in extra.values()
                ]
            info[layer.name] = row_info(
                layer,
                depth=self._depths[layer],
                uses=max(1, round(len(window.statistics.counted_outputs.get(layer, ())) / max(1, window.backwards))),
                head=layer.module_name == self._head,
                trainable=window.rows.subject.trainable[layer],
                nonfinite=nonfinite,
                notes=[*self._row_notes[layer], note],
            )
        return LayerProfile(
            [layer.name for layer in self._layers],
            [*metrics, *extra],
            values,
            info=info,
            loss=loss,
            backend="+".join(sorted(statistics.collector.used)),
            uncovered=self._uncovered(),
        )

    def _part(self, part: Part) -> LayerProfile:
        metrics = [name for name in self._asked.metrics if METRICS[name].needs <= OF_WEIGHTS]
        for weight in part.wrong:
            part.statistics.gradients.pop(weight, None)
        layout = self._window.target.layout
        of = "of the micro-batch of this process" if layout is not None and layout.splits_the_batch else ""
        return self._profile(part.statistics, metrics, number(part.loss, part.scale), part.scale, {}, of)

    def _uncovered(self) -> dict[str, str]:
        rows = {id(weight.parameter) for weight in self._window.rows.weights}
        chosen = {id(layer.weight.parameter) for layer in self._window.rows.subject.chosen}
        return {
            layer.parameter_name: "it does not train; frozen=True watches its weight and outputs"
            if id(layer.weight.parameter) in chosen
            else "not selected by layers="
            for layer in self._window.rows.subject.layers
            if id(layer.weight.parameter) not in rows
        }

    def _notes_of(self, layer: Layer) -> list[str]:
        """Why cells of its row are NaN."""
        if layer in self._replaced:
            return ["it was replaced during the step"]
        notes = [layer.note if self._window.taps else "", self._missing_output(layer)]
        if self._window.taps is not None:
            notes.append(other_weights(layer, self._window.taps))
        if layer.weight in self._statistics.missed_weights:
            notes.append(f"gradient undefined: {self._statistics.missed_weights[layer.weight]}")
        elif layer.weight not in self._statistics.gradients:
            notes.append(self._missing_gradient(layer))
        return [note for note in dict.fromkeys(notes) if note]

    def _missing_gradient(self, layer: Layer) -> str:
        if self._window.rows.subject.trainable[layer]:
            return "no gradient reached it"
        if layer.weight.parameter.requires_grad:
            return "gradient undefined: it was frozen when the step before ended; seen from the next logged step on"
        return "gradient undefined: it does not train"

    def _missing_output(self, layer: Layer) -> str:
        found = missing_output(layer, self._statistics)
        return "" if layer.note and found else found

    def _say_what_is_missing(self) -> None:
        by_reason: dict[str, list[str]] = {}
        for layer, notes in self._row_notes.items():
            for note in notes:
                if not note.endswith("it does not train"):
                    by_reason.setdefault(note, []).append(layer.name)
        self._notes += [f"{some(names)}: {reason}" for reason, names in by_reason.items()]
        window = self._window
        if not window.backwards:
            self._notes.append(
                "no backward pass was seen before the optimizer stepped; gradients are what .grad held then"
            )
        if math.isnan(self._scale):
            self._notes.append(
                "gradients carry different loss scales, so that their statistics are NaN: scaled and unscaled losses "
                "were accumulated, or those of two GradScalers"
            )
        if window.target.is_shared_unseen:
            self._notes.append(
                "several processes run, and the watched model is neither wrapped by DistributedDataParallel nor "
                "sharded: what is seen is of this process"
            )

    def _update_ratios(self, totals: dict[str, float]) -> dict[Layer, float]:
        updates = self._window.updates
        assert updates is not None
        norms = updates.norms
        if norms:
            moved, before = (math.hypot(*column) for column in zip(*norms.values(), strict=True))
            totals["update_ratio"] = _ratio(moved, before)
        else:
            totals["update_ratio"] = NAN
            if not self._window.did_not_meet:
                self._notes.append("update_ratio undefined: no step of an optimizer of torch.optim was seen")
        return {layer: _ratio(*norms[layer.weight]) if layer.weight in norms else NAN for layer in self._layers}

    def _noise_scales(self, totals: dict[str, float]) -> dict[str, dict[Layer, float]]:
        why = self._add_noise()
        if why:
            self._notes.append(f"noise_scale has nothing new of this step: {why}")
        totals["noise_scale"], totals["noise_scale_error"] = self._noise.scale(_ALL)
        scale = totals["noise_scale"]
        totals["batch_size"] = scale if math.isnan(scale) else max(1.0, float(np.round(scale)))
        found = {layer: self._noise.scale(layer.weight.layers[0].parameter_name) for layer in self._layers}
        return {name: {layer: both[place] for layer, both in found.items()} for place, name in enumerate(NOISE)}

    def _add_noise(self) -> str:
        """Adds the estimates of this step; why it has none, where it has none."""
        window, parts = self._window, self._window.squares
        if window.did_not_meet:
            return DID_NOT_MEET
        if len(parts) < 2:
            return "it takes two or more micro-batches that are accumulated, or zest_fast.noise_scale"
        if window.target.is_shared_unseen:
            return "gradients may be averages over processes; pass the model that DistributedDataParallel returned"
        if window.stale:
            return "the accumulated gradient is not the sum of the parts (gradients of before were not cleared)"
        sizes = [samples for samples, _ in parts]
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            return "the number of samples of a micro-batch is not known; pass samples="
        if math.isnan(self._scale):
            return "losses carry different scales"
        share = window.target.layout.share if window.target.layout is not None else 1.0
        total_squares, total_square, complete = np.zeros(len(parts)), 0.0, True
        for weight in window.rows.weights:
            norm = self._gradient_norm(self._statistics, weight, self._scale)
            if norm is None:
                continue
            squares = [of_part.get(weight, 0.0) for _, of_part in parts]
            square_of_mean = (norm / (share * len(parts))) ** 2
            self._noise.add(
                weight.layers[0].parameter_name,
                estimate(squares, square_of_mean, sizes),  # type: ignore[arg-type]
            )
            total_squares += squares
            total_square += square_of_mean
            complete = complete and all(map(math.isfinite, squares))
        if not complete:
            return "the gradient of a weight arrives in several parts, or is not finite; its layer is left out"
        self._noise.add(_ALL, estimate(list(total_squares), total_square, sizes))  # type: ignore[arg-type]
        return ""

    def _histograms(self) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
        found: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
        for layer in self._layers:
            own = found[layer.name] = {}
            if layer.weight in self._window.weight_histograms:
                own["weight"] = self._window.weight_histograms[layer.weight]
            if layer.weight in self._window.histograms:
                counts, edges = self._window.histograms[layer.weight]
                own["gradient"] = (counts, edges / self._scale)
        return found


def _ratio(a: float, b: float) -> float:
    return a / b if b else (NAN if not a else math.inf)
