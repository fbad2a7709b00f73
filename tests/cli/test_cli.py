import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from adversarial_transfer import AdversarialTransfer
from checkpoints import (
    TEXTS,
    minilm,
    save_bert,
    save_digits,
    save_jsonl,
    save_lite0,
    save_llama,
    save_resnet,
    save_tokenizer,
)
from profiles import make_profile
from safetensors.torch import load_file
from typer.testing import CliRunner

import zest_fast.cli.show as show
import zest_fast.demo
from zest_fast.cli import app
from zest_fast.cli.jobs import job
from zest_fast.integrations.pretrained import load_model
from zest_fast.profiling.layer_profile import LayerProfile
from zest_fast.streaming import opening

LABELS = ["pos", "neg", "pos", "neg", "pos", "pos"]

USER_MODULE = """
import torch

def net():
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(12, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.Linear(8, 3)
    )

def noisy_net():
    print("a user's module may print")
    return net()

def batches():
    from torch.utils.data import DataLoader, TensorDataset
    data = TensorDataset(torch.randn(8, 3, 2, 2), torch.arange(8) % 3)
    return DataLoader(data, batch_size=4)

def split_batches():
    return batches(), batches()

def mislabelled():
    from torch.utils.data import DataLoader, TensorDataset
    return DataLoader(TensorDataset(torch.randn(4, 3, 2, 2), torch.full((4,), 9)), batch_size=4)

def infinite_batches():
    from torch.utils.data import DataLoader, TensorDataset
    return DataLoader(TensorDataset(torch.full((4, 3, 2, 2), torch.inf), torch.arange(4) % 3), batch_size=4)

def bug():
    return {}.attribute
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with models and data in it."""
    folder = tmp_path_factory.mktemp("home")
    save_bert(folder / "bert", num_labels=2)
    save_llama(folder / "llama")
    save_resnet(folder / "resnet", num_labels=3)
    save_digits(folder / "digits")
    save_jsonl(folder / "films.jsonl", TEXTS * 4, LABELS * 4)
    (folder / "zest_cli_user.py").write_text(USER_MODULE)
    return folder


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(home, monkeypatch):
    """Runs `zest-fast` with the given words inside the folder `home`."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the current folder is put there
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def document(result):
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refused(result, *parts):
    """One line on stderr that holds `parts`, nothing on stdout, exit code 2."""
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


def saving(folder):
    return "--out", folder / "d.safetensors"


def saved_profile(path):
    scores = {"encoder.0": 1.0, "encoder.1": 3.0, "encoder.2": float("nan"), "head": 9.0}
    make_profile(scores, heads=("head",)).save(path)
    return path


def test_help_and_version_are_quick_because_torch_stays_out():
    code = (
        "import sys; from zest_fast.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'pandas', 'matplotlib'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in ("profile", "rank", "finetune", "demo"):
        assert command in result.stdout
    assert "HEAVY []" in result.stdout


def test_version(run, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: {"zest_fast": "1.2.3"}[name])
    result = run("--version")
    assert result.exit_code == 0 and result.stdout == "zest-fast 1.2.3\n"


def test_profile_of_a_bert_folder_as_json(run):
    found = document(run("profile", "bert", "films.jsonl", "--batch-size", 6, "--json"))
    by_name = {row["name"]: row for row in found["layers"]}
    assert by_name["classifier"]["info"]["head"] and not by_name["bert.pooler.dense"]["info"]["head"]
    assert len(by_name) == 2 * 6 + 2
    assert all(row["metrics"]["snip"] > 0 for row in found["layers"])


def test_profile_measures_the_batch_that_the_seed_draws(run, home):
    """The loss and the snip of the command against autograd on the same batch."""
    from zest_fast.integrations.data.loaders import make_loaders
    from zest_fast.integrations.data.sources import open_data

    found = document(run("profile", "bert", "films.jsonl", "--batch-size", 6, "--seed", 3, "--json"))
    torch.manual_seed(3)  # of the fresh head
    loaded = load_model("bert", class_names=["neg", "pos"])
    loaders = make_loaders(open_data("films.jsonl"), loaded, batch_size=6, seed=3, label_column="label")
    loss = loaded.model(**next(iter(loaders.train))).loss
    loss.backward()
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    weight = loaded.model.bert.pooler.dense.weight
    row = next(row for row in found["layers"] if row["name"] == "bert.pooler.dense")
    assert row["metrics"]["snip"] == pytest.approx((weight * weight.grad).abs().sum().item(), rel=1e-4)


def test_profile_selects_layers_and_metrics_and_saves(run, home, tmp_path):
    chosen = ("--layers", r".*\.q_proj", "--metrics", "snip,grad_norm")
    result = run(
        "profile", "llama", "films.jsonl", *chosen, "--out", tmp_path / "p.parquet", "--plot", tmp_path / "heat.png"
    )
    assert result.exit_code == 0, result.stderr
    assert "model.layers.1.self_attn.q_proj" in result.stdout and "grad_norm" in result.stdout
    saved = LayerProfile.load(tmp_path / "p.parquet")
    assert saved.names == [f"model.layers.{block}.self_attn.q_proj" for block in (0, 1)]
    assert set(saved.metrics) == {"snip", "grad_norm"}
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")


def test_profile_shows_metrics_on_request_and_all_of_them(run):
    words = ("profile", "bert", "films.jsonl", "--batch-size", 6)
    shown = run(*words, "--metrics", "grasp,agree_cos")
    assert shown.exit_code == 0, shown.stderr
    assert "grasp" in shown.stdout and "agree_cos" in shown.stdout and "snip" not in shown.stdout
    found = document(run(*words, "--metrics", "all", "--json"))
    assert all({"snip", "grasp", "synflow", "agree_sign"} <= set(row["metrics"]) for row in found["layers"])


def test_profile_of_an_image_folder(run):
    found = document(run("profile", "resnet", "digits", "--metrics", "snip", "--json"))
    assert {row["info"]["kind"] for row in found["layers"]} >= {"conv2d", "linear"}


def test_profile_of_real_image_weights(run, home):
    """EfficientNet-Lite0 with ImageNet weights on MNIST digits."""
    words = ("profile", save_lite0(home), "digits", "--image-size", 64, "--batch-size", 4, "--json")
    found = document(run(*words, "--metrics", "snip,fisher"))
    assert len(found["layers"]) == 50
    assert all(np.isfinite([*row["metrics"].values()]).all() for row in found["layers"])


def test_profile_of_real_text_weights(run):
    """MiniLM with a new head on two classes."""
    result = run("profile", minilm(), "films.jsonl", "--label-column", "label", "--batch-size", 4, "--json")
    found = document(result)
    assert "classifier.weight" in result.stderr  # the note on the new head
    assert len(found["layers"]) == 6 * 6 + 2
    assert all(row["metrics"]["snip"] > 0 for row in found["layers"])


def test_what_a_users_module_prints_stays_off_stdout(run):
    result = run("profile", "zest_cli_user:noisy_net", "zest_cli_user:batches", "--json")
    assert [row["name"] for row in document(result)["layers"]] == ["1", "3", "4"]
    assert "a user's module may print" in result.stderr


def test_rank_leaves_the_head_and_undefined_scores_out(run, tmp_path):
    path = saved_profile(tmp_path / "p.json")
    found = document(run("rank", path, "--by", "snip", "--top", 2, "--json"))
    assert found["names"] == ["head", "encoder.1", "encoder.0", "encoder.2"]
    assert found["scores"] == [9.0, 3.0, 1.0, None]
    assert found["top"] == ["encoder.1", "encoder.0"]
    assert document(run("rank", path, "--by", "plain", "--top", 1, "--json"))["top"] == ["encoder.0"]
    table = run("rank", path, "--by", "snip", "--top", 2).stdout
    assert table.index("encoder.1") < table.index("encoder.0") and "encoder.2" not in table


def test_rank_needs_no_torch(tmp_path):
    path = saved_profile(tmp_path / "p.json")
    code = (
        "import sys; from zest_fast.cli import app\ntry: app()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    )
    words = [sys.executable, "-c", code, "rank", str(path), "--by", "snip", "--top", "1"]
    result = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "encoder.1" in result.stdout and result.stderr == "False\n"


def test_finetune_trains_the_chosen_layers_and_saves_them(run, tmp_path):
    out = tmp_path / "delta.safetensors"
    words = ("finetune", "bert", "films.jsonl", "--top", 2, "--epochs", 60, "--lr", 0.01, "--batch-size", 8)
    found = document(run(*words, "--validation-share", 0.25, "--out", out, "--json"))
    assert len(found["layers"]) == 2 and "classifier" not in found["layers"]
    assert found["steps"] == len(found["training_loss"]) == 60 * 3
    assert found["after"]["loss"] < found["before"]["loss"] / 2
    assert found["after"]["accuracy"] == 1.0 and found["after"]["predictions"] == 6
    original = dict(load_model("bert").model.named_parameters())
    trained = load_file(out)
    expected = {f"{layer}.{kind}" for layer in (*found["layers"], "classifier") for kind in ("weight", "bias")}
    assert set(trained) == set(found["trainable"]) == expected
    assert all(not torch.equal(tensor, original[name]) for name, tensor in trained.items())
    assert found["trainable_parameters"] == sum(tensor.numel() for tensor in trained.values())
    assert found["parameters"] == sum(parameter.numel() for parameter in original.values())
    assert found["seconds_per_step"] > 0 and found["peak_memory_bytes"] > 2**20


def test_finetune_keeps_what_lies_below_the_cut(run, tmp_path):
    words = ("finetune", "bert", "films.jsonl", "--layers", "bert.encoder.layer.1.output.dense", "--epochs", 3)
    words = (*words, "--cache", tmp_path / "cache", *saving(tmp_path))
    found = document(run(*words, "--json"))
    assert found["cache"].startswith("6 samples") and "16 computed, 50 read" in found["cache"]  # six texts, repeated
    again = run(*words)
    assert "0 computed, 66 read" in again.stdout.replace("\n", " ")
    assert "texts are padded to" in again.stderr and "GB for 22 samples in" in again.stderr
    refused(run(*words, "--cache-limit", "much"), "--cache-limit 'much' is no size")
    refused(run("finetune", "bert", "films.jsonl", "--cache-limit", "1GB"), "pass both")


def test_finetune_leaves_frozen_weights_on_disk(run, tmp_path):
    layer = "model.layers.1.mlp.up_proj"
    words = ("finetune", "llama", "films.jsonl", "--task", "causal-lm", "--layers", layer, "--steps", 3)
    plain = document(run(*words, "--out", tmp_path / "plain.safetensors", "--json"))
    streamed = run(*words, "--stream", "--out", tmp_path / "streamed.safetensors", "--json")
    assert "frozen weights stay on disk" in streamed.stderr
    assert document(streamed)["training_loss"] == plain["training_loss"]
    ours, theirs = (load_file(tmp_path / f"{name}.safetensors") for name in ("streamed", "plain"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert run("pack", "llama", "--frozen", "int8", "--out", tmp_path / "packed").exit_code == 0
    packed = document(run(*words[:1], tmp_path / "packed", *words[2:], "--stream", *saving(tmp_path), "--json"))
    frozen = document(run(*words, "--frozen", "int8", *saving(tmp_path), "--json"))
    assert packed["training_loss"] == frozen["training_loss"]


def test_finetune_streams_to_the_device_that_it_is_told(run, tmp_path, monkeypatch):
    words = ("finetune", "llama", "films.jsonl", "--layers", "model.layers.1.mlp.up_proj", "--steps", 2, "--json")
    words = (*words, *saving(tmp_path), "--stream")
    plain, asked, transfer = document(run(*words)), [], AdversarialTransfer()
    monkeypatch.setattr(opening, "SMALL", 0)
    monkeypatch.setattr(job, "pick_device", lambda name: asked.append(name) or torch.device("cpu"))
    monkeypatch.setattr(opening, "_transfer", lambda device: asked.append(device) or transfer)
    streamed = document(run(*words, "--device", "cuda:1"))
    assert asked == ["cuda:1", "cuda:1", "cpu"]  # checked first, then opened; the last stands for it
    assert streamed["training_loss"] == plain["training_loss"] and len(transfer.copies) > 10


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("llama", "films.jsonl", "--task", "causal-lm", "--stream"), ["--stream needs --layers"]),
        (("llama", "films.jsonl", "--stream", "--layers", "x", "--frozen", "int8"), ["pack the folder"]),
        (("bert", "films.jsonl", "--label-column", "genre", "--stream", "--layers", "x"), []),
        (("zest_cli_user:net", "zest_cli_user:batches", "--stream", "--layers", "x"), ["is no folder"]),
        (("llama", "films.jsonl", "--stream", "--layers", "x", "--device", "gpu"), ["--device 'gpu' is unknown"]),
    ],
)
def test_finetune_refuses_what_cannot_stay_on_disk(run, words, parts):
    refused(run("finetune", *words), *parts)


def test_finetune_probes_before_it_ranks(run, home, tmp_path):
    save_jsonl(home / "more.jsonl", TEXTS * 16, LABELS * 16)
    words = ("finetune", "bert", "more.jsonl", "--top", 2, "--steps", 1, *saving(tmp_path), "--json")
    plain, probed = document(run(*words)), document(run(*words, "--probe", "5%"))
    assert ", probed" in probed["note"] and "probed" not in plain["note"]
    assert len(probed["layers"]) == 2


def test_finetune_of_a_language_model_with_named_layers(run, tmp_path):
    layer = "model.layers.1.mlp.up_proj"
    words = ("finetune", "llama", "films.jsonl", "--layers", layer, "--steps", 3)
    found = document(run(*words, *saving(tmp_path), "--json"))
    assert found["by"] is None and found["layers"] == [layer] and found["trainable"] == [f"{layer}.weight"]
    assert found["steps"] == 3
    assert 0 <= found["before"]["accuracy"] <= 1 and found["before"]["predictions"] > 2


def test_finetune_trains_every_layer_that_the_checkpoint_does_not_hold(run, tmp_path):
    """The classifier of DistilBERT has two layers; a frozen random one would be in the way of what is learnt."""
    config = transformers.DistilBertConfig(vocab_size=16, dim=16, n_layers=2, n_heads=2, hidden_dim=32)
    transformers.DistilBertModel(config).save_pretrained(tmp_path / "distilbert")
    save_tokenizer(tmp_path / "distilbert")
    words = ("finetune", tmp_path / "distilbert", "films.jsonl", "--label-column", "label", "--steps", 1, "--json")
    layer = "transformer.layer.1.ffn.lin2"
    found = document(run(*words, *saving(tmp_path), "--layers", f"distilbert.{layer}"))
    owners = {name.rpartition(".")[0] for name in found["trainable"]}
    assert owners == {f"distilbert.{layer}", "pre_classifier", "classifier"}
    found = document(run(*words, *saving(tmp_path), "--layers", "pre_classifier", "--head", "none"))
    assert found["trainable"] == ["pre_classifier.weight", "pre_classifier.bias"]
    found = document(run(*words, *saving(tmp_path), "--layers", "pre_classifier", "--head", "classifier"))
    assert len(found["trainable"]) == 4


def test_finetune_fits_the_choice_and_the_frozen_weights_into_memory(run, tmp_path):
    words = ("finetune", "llama", "films.jsonl", "--by", "snip", "--top", 2, "--steps", 2, *saving(tmp_path))
    words = (*words, "--prefer", "cheap-cut", "--max-memory", "1GB", "--frozen", "int8", "--checkpoint", "above-cut")
    found = document(run(*words, "--json"))
    assert found["saving"]["frozen"] == "int8" and found["saving"]["checkpoint"] == "above-cut"
    assert "2 layers by snip" in found["choice"] and found["verified"] and len(found["layers"]) == 2
    result = run(*words)
    assert "what was chosen moved" in result.stdout and "2 layers by snip" in " ".join(result.stdout.split())
    assert "--max-memory 1GB: frozen='int8', checkpoint='above-cut'" in " ".join(result.stderr.split())


def test_finetune_says_what_did_not_move(run, tmp_path):
    words = ("finetune", "llama", "films.jsonl", "--layers", "model.layers.1.mlp.up_proj", "--steps", 1, "--lr", 0)
    found = document(run(*words, *saving(tmp_path), "--json"))
    assert not found["verified"] and "did not move" in found["problem"] and "up_proj" in found["problem"]
    assert "did not move" in " ".join(run(*words, *saving(tmp_path)).stdout.split())


def test_finetune_is_repeatable(run, tmp_path):
    words = ("finetune", "bert", "films.jsonl", "--top", 1, "--steps", 2, *saving(tmp_path), "--json")
    first, second = document(run(*words)), document(run(*words))
    assert first["training_loss"] == second["training_loss"]


def test_finetune_shows_a_table(run, tmp_path):
    words = ("finetune", "zest_cli_user:net", "zest_cli_user:split_batches", "--top", 1, "--steps", 2)
    result = run(*words, *saving(tmp_path))
    assert result.exit_code == 0, result.stderr
    for part in ("trainable parameters", "validation after", "seconds per step", "MiB", "d.safetensors"):
        assert part in result.stdout


def test_finetune_without_validation_data_says_so(run, tmp_path):
    words = ("finetune", "zest_cli_user:net", "zest_cli_user:batches", "--top", 1, "--steps", 1)
    found = document(run(*words, *saving(tmp_path), "--json"))
    assert found["before"] is None and found["after"] is None


def test_demo_runs_the_task_and_prints_its_result(run, tmp_path, monkeypatch):
    calls = []

    def run_demo(task, out, *, seed, console, full):
        calls.append((task, out, seed))
        console.print("working")
        return {"accuracy": float("nan")}

    monkeypatch.setattr(zest_fast.demo, "run_demo", run_demo, raising=False)
    result = run("demo", "--task", "minilm", "--out", tmp_path, "--seed", 4, "--json")
    assert document(result) == {"accuracy": None}
    assert calls == [("minilm", tmp_path, 4)]
    assert "working" in result.stderr


def test_doctor_says_what_is_off_and_why(run):
    found = document(run("doctor", "--json"))
    assert found["auto"]["cpu"] == "cpu" and found["backends"]["cpu"]["on"]
    for state in found["backends"].values():
        assert state["on"] or state["why"]
    shown = run("doctor").stdout
    assert "triton" in shown and "backend='auto' on cpu: cpu" in shown
    assert all(f"{name}: {what}" in shown for name, what in found["optional"].items())  # [brackets] and all


def test_doctor_says_that_a_build_without_openmp_has_one_thread(run, monkeypatch):
    assert f"{torch.get_num_threads()} threads" in document(run("doctor", "--json"))["backends"]["cpu"]["why"]
    monkeypatch.setattr("zest_fast._native.has_openmp", False)
    assert "1 thread (built without OpenMP)" in document(run("doctor", "--json"))["backends"]["cpu"]["why"]


def test_json_is_strict(capsys):
    show.json_document({"a": np.float64("inf"), "b": (np.int64(3), np.array([1.0, np.nan]))})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [3, [1.0, None]]}


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("profile", "./bertt", "films.jsonl"), ["'./bertt' does not exist", "nearest: 'bert'"]),
        (("profile", "digits/bert", "films.jsonl"), ["'digits/bert' does not exist", "in 'digits'"]),
        (("profile", "bertt", "films.jsonl"), ["'bertt' is no folder here", "nearest: 'bert'"]),
        (("profile", "zest_cli_users:net", "digits"), ["no module named 'zest_cli_users'", "nearest: 'zest_cli_user'"]),
        (("profile", "zest_cli_user:nett", "digits"), ["has no function 'nett'", "nearest: 'net'"]),
        (("profile", "bert", "film.jsonl"), ["'film.jsonl' does not exist", "nearest: 'films.jsonl'"]),
        (("profile", "bert", "films.jsonl", "--text-column", "txt"), ["no column 'txt'", "nearest: 'text'"]),
        (("profile", "bert", "films.jsonl", "--label-column", "labels"), ["no column 'labels'", "nearest: 'label'"]),
        (("profile", "bert", "films.jsonl", "--task", "causal"), ["task 'causal' is unknown", "'causal-lm'"]),
        (("profile", "bert", "digits"), ["(bert) has no form for image-classification"]),
        (("profile", "resnet", "films.jsonl"), ["films.jsonl is a table", "needs a folder of images"]),
        (("profile", "zest_cli_user:net", "films.jsonl"), ["texts need a tokenizer", "has none"]),
        (("profile", "bert", "films.jsonl", "--max-length", 17), ["max length 17", "16 tokens"]),
        (("profile", "zest_cli_user:net", "zest_cli_user:mislabelled"), ["Target 9 is out of bounds"]),
        (("profile", "bert", "films.jsonl", "--layers", "(q"), ["'(q' is no regular expression"]),
        (("profile", "bert", "films.jsonl", "--out", "p.jso"), ["'.jso'", "nearest: '.json'"]),
        (("profile", "bert", "films.jsonl", "--out", "bertt/p.json"), ["bertt/p.json does not exist", "'bert'"]),
        (("profile", "bert", "films.jsonl", "--plot", "heat.pn"), ["'.pn'", "nearest: '.png'"]),
        (("finetune", "bert", "films.jsonl", "--out", "delta.bin"), ["'.bin'", "'.safetensors'"]),
        (("rank", "films.json"), ["'films.json' does not exist", "nearest: 'films.jsonl'"]),
    ],
)
def test_wrong_words_get_one_line_with_the_nearest_valid_value(run, words, parts):
    refused(run(*words), *parts)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--layers", "bert.encoder.layer.0.attention.self.querry"), ["querry", "query"]),
        (("--metrics", "snipp"), ["snipp", "'snip'"]),
        (("--backend", "gpu"), ["gpu"]),
    ],
)
def test_what_profile_refuses_is_one_line(run, words, parts):
    refused(run("profile", "bert", "films.jsonl", *words), *parts)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--by", "snipp"), ["snipp", "'snip'"]),
        (("--top", "99"), ["99"]),
        (("--layers", "bert.pooler.dens"), ["bert.pooler.dens", "'bert.pooler.dense'"]),
        (("--head", "clasifier"), ["clasifier", "'classifier'"]),
        (("--prefer", "cheap"), ["cheap", "'cheap-cut'"]),
        (("--max-memory", "1KB"), ["--max-memory '1KB'", "a profile of the whole model", "--layers"]),
        (
            ("--max-memory", "1KB", "--layers", "bert.pooler.dense"),
            ["--max-memory '1KB'", "no way to save memory makes a step of these layers fit"],
        ),
        (("--layers", "bert.pooler.dense", "--prefer", "cheap-cut"), ["--layers", "--prefer"]),
        (("--frozen", "int3"), ["int3", "int8"]),
        (("--probe", "much"), ["--probe 'much'", "5% or 0.05"]),
        (("--probe", "0%"), ["--probe '0%'"]),
        (("--probe", "5%", "--by", "snip"), ["--probe", "--by"]),
        (("--probe", "5%", "--layers", "bert.pooler.dense"), ["--probe", "--layers"]),
        (("--probe", "5%"), ["hold 22 samples; a probe needs at least 64"]),
        (("--checkpoint", "all"), ["'all'", "above-cut"]),
        (("--validation-share", "0.01"), ["24 examples are too few for a validation share of 0.01"]),
    ],
)
def test_what_finetune_refuses_is_one_line(run, words, parts, tmp_path):
    refused(run("finetune", "bert", "films.jsonl", *saving(tmp_path), *words), *parts)
    assert not (tmp_path / "d.safetensors").exists()


def test_rank_refuses_an_unknown_metric_and_a_torn_profile(run, tmp_path):
    path = saved_profile(tmp_path / "p.json")
    refused(run("rank", path, "--by", "snipp"), "'snipp'", "nearest: 'snip'")
    refused(run("rank", path, "--by", "snip", "--top", 9), "n=9", "3 layers")
    path.write_text(path.read_text()[:60])
    refused(run("rank", path), str(path))


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_torn_data_is_named(run, tmp_path, ending):
    torn = {"jsonl": '{"text": "a", "label": 1}\n{"te', "csv": "text,label\na,1\nb\n", "parquet": "PAR1"}[ending]
    (tmp_path / f"a.{ending}").write_text(torn)
    line = {"jsonl": "line 2", "csv": "line 3", "parquet": "no whole Parquet file"}[ending]
    refused(run("profile", "bert", tmp_path / f"a.{ending}"), str(tmp_path / f"a.{ending}"), line)


def test_torn_weights_are_named(run, tmp_path):
    file = save_bert(tmp_path / "bert") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    refused(run("profile", tmp_path / "bert", "films.jsonl"), str(file), "is torn")


def test_more_classes_than_outputs(run, home, tmp_path):
    save_digits(tmp_path / "digits", classes=4, each=1)
    refused(run("profile", "zest_cli_user:net", tmp_path / "digits"), "4 classes", "3 outputs (layer '4')")


def test_a_loss_that_is_not_finite_stops_the_training(run, tmp_path):
    words = ("finetune", "zest_cli_user:net", "zest_cli_user:infinite_batches", "--layers", "1", "--steps", 2)
    result = run(*words, *saving(tmp_path))
    last = result.stderr.splitlines()[-1]  # after what it was about to train
    assert result.exit_code == 2 and result.stdout == ""
    assert last.startswith("error: ") and "at step 1" in last and "--lr" in last


def test_debug_shows_the_error_itself(run):
    result = run("--debug", "profile", "bert", "film.jsonl")
    assert isinstance(result.exception, ValueError) and result.exit_code == 1


def test_a_bug_keeps_its_traceback(run):
    assert isinstance(run("profile", "zest_cli_user:bug", "digits").exception, AttributeError)


def test_a_profile_of_several_batches(run, tmp_path):
    words = ("profile", "zest_cli_user:net", "zest_cli_user:batches")
    path = tmp_path / "profile.json"
    result = run(*words, "--batches", 2, "--metrics", "snip", "--out", path, "--json")
    assert result.exit_code == 0, result.output
    document, saved = json.loads(result.stdout), LayerProfile.load(path)
    assert document["batches"] == saved.spread.batches == 2
    assert [row["deviations"]["snip"] for row in document["layers"]] == saved.spread.deviations[:, 0].tolist()
    assert all(row["counts"] == {"snip": 2} for row in document["layers"])
    result = run(*words, "--batches", 2, "--metrics", "snip")
    assert result.exit_code == 0 and "means of 2 batches" in result.stdout and result.stdout.count(" ± ") >= 4
    result = run(*words, "--batches", 3)
    assert result.exit_code == 2 and "--batches 3: the data yields 2" in result.stderr
