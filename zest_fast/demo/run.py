"""The demo from end to end: warm head, one profiled batch, ranking, fine-tuning of each arm, one look at the test."""

import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.nn import functional as F

from zest_fast.demo import lite0, minilm, report, smollm2
from zest_fast.demo.arms import Arm, Run, hits_on_test, train, validate
from zest_fast.demo.measure import COUNTS, measure_steps
from zest_fast.demo.results import ArmResult, finding
from zest_fast.demo.task import Budget, Task, package_folder
from zest_fast.demo.warm_head import warm_head
from zest_fast.profiling.layer_profile import LayerProfile
from zest_fast.profiling.profile import profile
from zest_fast.ranking.ranking import rank

CHOSEN_RATE = "the learning rate of each arm is chosen on the validation split"
GIVEN_RATE = (
    "a first look: each arm has the middle one of its learning rates, and none is chosen; --full tries them all"
)
TASKS = {"lite0": lite0, "minilm": minilm, "smollm2": smollm2}
NOTES = (
    "every arm starts from the same weights (the head warmed on its own split) and takes the same number of steps on "
    "the same batches (Adam, linear decay)",
    "the layers are the best of the Ranker that ships; it has learned from sweeps, of this very pair where it is among "
    "the shipped records",
    "normalisation layers use their stored statistics and dropout is off in every arm (eval mode)",
    "standard errors cover the sampling of test samples and of random layers, not the randomness of training",
    COUNTS,
)


def run_demo(
    task: str,
    out: Path,
    *,
    seed: int = 0,
    console: Console | None = None,
    budget: Budget | None = None,
    full: bool = False,
) -> dict[str, Any]:
    """Run a demo task and write demo.json, heatmap.png and curves.png into the folder `out`.

    task: "lite0", "minilm" or "smollm2". budget: the task's own unless given. full: random layers beside the others,
    and the learning rate of each arm chosen on the validation split. Returns the content of demo.json.
    Raises ValueError for an unknown task, ImportError with the pip line where a task's packages are missing.
    """
    if task not in TASKS:
        raise ValueError(f"unknown demo task {task!r}; choose one of {', '.join(TASKS)}")
    began, console = time.perf_counter(), console or Console()
    package_folder("matplotlib", task=task, install="pip install 'zest_fast[plot]'")
    budget = budget or TASKS[task].BUDGET
    loaded = TASKS[task].load(budget if full else budget.first_look(), seed)
    loaded.model.eval()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    console.print(f"[bold]{loaded.title}[/bold]")
    with _progress(console) as progress:
        content, results = Demo(loaded, seed, progress).run(out)
    content["seconds"] = time.perf_counter() - began
    report.plot_curves(loaded.title, results, out / "curves.png")
    report.write_json(content, out / "demo.json")
    console.print(report.table(f"{loaded.title}: {loaded.budget.test:,} test samples", results))
    console.print(content["finding"])
    console.print(f"{content['seconds']:.0f} s in all; heat map, curves and every figure are in {out}", highlight=False)
    return content


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


class Demo:
    """One run of a task; `progress` counts training steps."""

    start: tuple[float, float]  # validation loss and accuracy before training, the same for every arm

    def __init__(self, task: Task, seed: int, progress: Progress):
        self.task, self.budget, self.seed = task, task.budget, seed
        self.progress, self.bar = progress, progress.add_task("start", total=self._total_steps())

    def run(self, out: Path) -> tuple[dict[str, Any], list[ArmResult]]:
        strength = self._warm_head()
        self.start = validate(self.task)
        layer_profile, profile_seconds = self._profile()
        layer_profile.plot(out / "heatmap.png")
        ranking = rank(layer_profile)
        self.progress.console.print(
            f"profiled in {profile_seconds:.1f} s, heat map in {out / 'heatmap.png'}; the layers to train are "
            + ", ".join(ranking.top(self.budget.chosen)),
            highlight=False,
        )
        chosen = Arm(f"top {self.budget.chosen} by ZEST", ranking.top(self.budget.chosen), self.budget.scales)
        results = self._results(chosen, self._random_arms(layer_profile))
        by_name = {result.name: result for result in results}
        top, full = by_name[chosen.name], by_name["all layers"]
        rest = [result for result in results if result is not top]
        if self.budget.draws:
            drawn = by_name[f"random {self.budget.chosen}"]
            rest.append(drawn.best_on_validation(f"best of {self.budget.draws} random draws on validation"))
        content = {
            "task": self.task.name,
            "title": self.task.title,
            "seed": self.seed,
            "notes": [*self.task.notes, *NOTES, CHOSEN_RATE if len(self.budget.scales) > 1 else GIVEN_RATE],
            "finding": finding(top, rest, full),
            "profile": {
                "samples": self.budget.profile_batch,
                "layers": len(layer_profile.names),
                "loss": layer_profile.loss,
                "backend": layer_profile.backend,
                "seconds": profile_seconds,
            },
            "head_strength": strength,
            "ranking": {"by": ranking.by, "note": ranking.note},
            "arms": [report.describe_arm(result) for result in results],
            "differences": [report.describe_gap(top, other) for other in rest],
            "budget": asdict(self.budget),
            **report.surroundings(),
        }
        return content, results

    def _say(self, description: str) -> None:
        self.progress.update(self.bar, description=description)

    def _warm_head(self) -> float | None:
        if self.task.head is None:
            return None
        self._say("warming the head")
        return warm_head(self.task)

    def _profile(self) -> tuple[LayerProfile, float]:
        self._say("profiling one batch")
        batch = self.task.splits["train"].batch(slice(self.budget.profile_batch))
        began = time.perf_counter()
        return profile(self.task.model, batch, loss_fn=F.cross_entropy), time.perf_counter() - began

    def _random_arms(self, layer_profile: LayerProfile) -> list[Arm]:
        """Draws from the layers that the ranking chooses from: all but the head."""
        pool = [name for name in layer_profile.names if not layer_profile.info[name]["head"]]
        draw = random.Random(self.seed)
        names = [f"random {self.budget.chosen}, draw {number + 1}" for number in range(self.budget.draws)]
        return [Arm(name, tuple(draw.sample(pool, self.budget.chosen)), self.budget.scales) for name in names]

    def _results(self, chosen: Arm, drawn: list[Arm]) -> list[ArmResult]:
        full = Arm("all layers", None, self.budget.full_scales)
        random_arms = {f"random {self.budget.chosen}": drawn} if drawn else {}
        trained = {chosen.name: [chosen], **random_arms, full.name: [full]}
        if self.task.head is not None:
            trained = {"head only": [Arm("head only", (), self.budget.head_scales)]} | trained
        tuned = {name: self._tune(arms) for name, arms in trained.items()}
        self._say("measuring steps")
        costs = measure_steps(self.task, [arm for arms in trained.values() for arm in arms], full, seed=self.seed)
        self._say("testing")
        results = [
            ArmResult(name, runs, tried, self._test(runs), [costs[run.arm.name] for run in runs])
            for name, (runs, tried) in tuned.items()
        ]
        return results if self.task.head is not None else [self._untrained(), *results]

    def _tune(self, arms: list[Arm]) -> tuple[list[Run], list[dict[str, Any]]]:
        """Runs of the arms at the learning rate whose mean validation loss is least, and what each rate gave."""
        best: list[Run] = []
        tried = []
        for scale in arms[0].scales:
            runs = [self._train(arm, scale) for arm in arms]
            loss = sum(run.loss for run in runs) / len(runs)
            accuracy = sum(run.curve[-1][2] for run in runs) / len(runs)
            tried.append({"scale": scale, "loss": loss, "accuracy": accuracy})
            if not best or loss < sum(run.loss for run in best) / len(best):
                best = runs
        return best, tried

    def _train(self, arm: Arm, scale: float) -> Run:
        self._say(arm.name)
        return train(self.task, arm, scale, start=self.start, seed=self.seed, on_step=self._advance)

    def _advance(self) -> None:
        self.progress.advance(self.bar)

    def _test(self, runs: list[Run]) -> Tensor:
        return torch.stack([hits_on_test(self.task, run) for run in runs])

    def _untrained(self) -> ArmResult:
        """The model as it comes: the baseline where there is no head to train."""
        run = Run(Arm("as it comes", (), ()), scale=0.0, curve=[(0, *self.start)])
        return ArmResult("as it comes", [run], [], self._test([run]), costs=[])

    def _total_steps(self) -> int:
        """Training steps of all runs, for the progress bar."""
        budget, scales = self.budget, len(self.budget.scales)
        runs = scales * (1 + budget.draws) + len(budget.full_scales)
        runs += len(budget.head_scales) if self.task.head is not None else 0
        return runs * budget.steps
