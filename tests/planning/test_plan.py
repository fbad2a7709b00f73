"""Plans against counted steps that really run, against recorded figures of LLaMA-7B, and in what they refuse."""

from __future__ import annotations

import json
import time

import pytest
import torch
from small_models import assert_same, conv_net, images, snapshot
from typer.testing import CliRunner

import zest_fast
from zest_fast.benchmarking import models
from zest_fast.benchmarking.real_steps import counted_step, upper_half
from zest_fast.cli import app
from zest_fast.integrations.training_files import plan_training_file
from zest_fast.planning import profile_pass
from zest_fast.planning.blocks import layout_of
from zest_fast.planning.counted_memory import peak_bytes
from zest_fast.planning.ledger import KINDS
from zest_fast.planning.plan import plan, plan_profile, planned_peak
from zest_fast.profiling.observer import Statistics

transformers = pytest.importorskip("transformers")
GIB = 2**30

CASES = {
    "bert": (lambda: models.bert(2, 64, num_hidden_layers=4, vocab_size=3000), {"sequence_length": 64}),
    "llama": (lambda: models.llama(2, 64, num_hidden_layers=3, vocab_size=3000), {"sequence_length": 64}),
    "resnet50": (lambda: models.resnet50(2, 96), {"image_size": 96}),
    "mobilenetv2": (lambda: models.mobilenetv2(4, 96), {"image_size": 96}),
}
MIDDLE = [
    "model.layers.16.self_attn.q_proj",
    "model.layers.18.mlp.gate_proj",
    "model.layers.20.self_attn.v_proj",
    "model.layers.24.mlp.down_proj",
    "model.layers.30.mlp.up_proj",
]
SIZES = {"batch_size": 2, "sequence_length": 16}


def tiny_config(**changes):
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 128}
    return transformers.LlamaConfig(**{**sizes, "vocab_size": 100, **changes})


def tiny_plan(layers=("model.layers.2.mlp.up_proj",), **changes):
    return plan(tiny_config(), layers, **{**SIZES, "dtype": "float32", **changes})


@pytest.mark.parametrize("layers", ["all", "five"])
@pytest.mark.parametrize("case", CASES)
def test_within_two_percent_of_counted_steps(case, layers):
    build, sizes = CASES[case]
    model, batch = build()
    layers = upper_half(model) if layers == "five" else layers
    batch_size = next(iter(batch.values())).shape[0]
    planned = plan(model, layers, batch_size=batch_size, dtype="float32", **sizes)
    assert planned.peak_bytes == pytest.approx(counted_step(model, batch, layers, "adamw"), rel=0.02)


def test_llama_7b_as_recorded():
    """The peaks that torch's MemTracker gave (GiB; AdamW, no cache), within 10 s of this process each."""
    started = time.process_time()
    selective = plan("llama-7b", MIDDLE, batch_size=1, sequence_length=512, lean=False)
    assert time.process_time() - started < 10
    assert selective.peak_bytes / GIB == pytest.approx(14.4, abs=0.06)
    assert selective.cut == MIDDLE[0]
    assert 16 in selective.fits and 8 not in selective.fits
    full = plan("LLaMA-7B", "all", batch_size=1, sequence_length=512)
    assert full.peak_bytes / GIB == pytest.approx(50.7, abs=0.1)
    assert full.flops_by_phase["forward"] == pytest.approx(6.77e12, rel=0.03)


def test_quantised_llama_7b_fits_small_cards():
    eight, four = (
        plan("llama-7b", MIDDLE, batch_size=1, sequence_length=512, frozen=kind, lean=False).peak_bytes / GIB
        for kind in ("int8", "nf4")
    )
    assert 8 < eight <= 9 and 5.5 < four <= 6.5


def test_what_a_plan_is_made_of():
    found = tiny_plan()
    weights = 128 * 64 * 4
    assert sum(found.breakdown.values()) == found.peak_bytes
    assert {kind: sum(group[kind] for group in found.groups.values()) for kind in KINDS} == found.breakdown
    assert found.trainable_parameters == 128 * 64
    assert found.breakdown["optimizer"] == 2 * weights + 512  # its two states, and the number of the step
    assert found.groups["embeddings"]["weights"] == 100 * 64 * 4
    assert found.peak_tensor == found.largest[0]
    assert found.peak_tensor.size == max(tensor.size for tensor in found.largest)
    assert "TFLOP" in str(found) and found.peak_tensor.module in str(found)


def test_optimizers_differ_by_their_states():
    trained = sum(p.numel() for p in transformers.LlamaForCausalLM(tiny_config()).parameters()) * 4
    peaks = {
        name: tiny_plan("all", optimizer=name).peak_bytes
        for name in ("sgd", "sgd-momentum", "adamw", "adamw-foreach", "adamw-in-backward", "adamw-8bit")
    }
    assert peaks["sgd-momentum"] - peaks["sgd"] == pytest.approx(trained, rel=0.1)
    assert peaks["sgd"] < peaks["adamw-8bit"] < peaks["adamw-in-backward"] < peaks["adamw"] < peaks["adamw-foreach"]
    assert tiny_plan("all", optimizer=lambda p: torch.optim.SGD(p, lr=1.0)).peak_bytes == peaks["sgd"]


def test_a_higher_cut_costs_less():
    low, high = (tiny_plan([f"model.layers.{block}.mlp.up_proj"]) for block in (0, 3))
    assert high.peak_bytes < low.peak_bytes
    assert high.flops < low.flops < tiny_plan("all").flops


def test_flops_of_grouped_convolutions():
    """Forward, dX and dW cost the same; the first layer needs no dX."""
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3), torch.nn.Conv2d(8, 8, 3, groups=8), torch.nn.Flatten())
    model.append(torch.nn.Linear(32, 2))
    first, depthwise, head = 2 * 16 * 8 * 8 * 9, 2 * 4 * 8 * 9, 2 * 32 * 2
    found = plan(model, "all", batch_size=1, image_size=6, dtype=None)
    assert found.flops_by_phase == {
        "forward": first + depthwise + head,
        "backward": first + 2 * depthwise + 2 * head,
    }


def test_the_model_stays_as_it_is():
    model = transformers.LlamaForCausalLM(tiny_config()).eval()
    before, state = snapshot(model), torch.get_rng_state()
    found = plan(model, ["model.layers.2.mlp.up_proj"], **SIZES, dtype=None)
    plan_profile(model, **SIZES, dtype=None)
    assert_same(before, snapshot(model))
    assert torch.equal(state, torch.get_rng_state())
    assert "use_cache" in found.notes[0]
    zest_fast.SelectiveBackward(model, ["lm_head"])  # not taken for wrapped


def test_forms_of_a_model(tmp_path):
    config = tiny_config(architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    layers = ["model.layers.2.mlp.up_proj"]
    peaks = {
        plan(form, layers, **SIZES, dtype="bf16").peak_bytes
        for form in (config, tmp_path, str(tmp_path / "config.json"))
    }
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    peaks.add(plan(model, layers, **SIZES, dtype=torch.bfloat16).peak_bytes)
    assert len(peaks) <= 2 and max(peaks) - min(peaks) < 40_000  # the module keeps its cache
    bert = transformers.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    assert "BertForSequenceClassification" in plan(bert, "all", **SIZES).model


def test_a_batch_in_place_of_sizes():
    model = conv_net()
    batch = images(), torch.zeros(5, dtype=torch.long)
    expected = plan(model, ["3"], batch_size=5, image_size=6, dtype=None).peak_bytes
    assert planned_peak(model, batch, ["3"]) == expected
    assert planned_peak(model, (images(50), torch.zeros(50, dtype=torch.long)), ["3"]) > expected


def test_none_trains_what_requires_a_gradient():
    model = transformers.LlamaForCausalLM(tiny_config(use_cache=False)).requires_grad_(False)
    model.model.layers[2].mlp.up_proj.weight.requires_grad_(True)
    found = plan(model, None, **SIZES, dtype="float32")
    assert found.peak_bytes == pytest.approx(tiny_plan(lean=False).peak_bytes, rel=0.01)
    with pytest.raises(ValueError, match="nothing would train"):
        plan(model.requires_grad_(False), None, **SIZES)


def test_table_and_what_fits():
    found = tiny_plan(["model.layers.1.mlp.up_proj", "model.layers.2.self_attn.q_proj"])
    table = found.table(lowest_blocks=(0, 3), batch_sizes=(1, 4), optimizers=("sgd", "adamw"))
    assert len(table) == 8 and table["80 GB"].all()
    peaks = table.set_index(["lowest_block", "optimizer", "batch_size"])["peak_bytes"]
    assert peaks[3, "sgd", 1] < peaks[0, "sgd", 1] < peaks[0, "sgd", 4] < peaks[0, "adamw", 4]
    fitting = found.within("1GiB", lowest_blocks=[0], batch_sizes=(1, 4))
    assert list(fitting["batch_size"]) == [4, 1]
    with pytest.raises(
        ValueError, match=r"nothing of the 2 settings fits\. Closest comes lowest_block 0.*batch_size 1"
    ):
        found.within("1MB", lowest_blocks=[0], batch_sizes=(1, 4))
    with pytest.raises(ValueError, match="blocks 0 to 3"):
        found.table(lowest_blocks=[4])


def test_layers_move_with_their_block():
    with torch.device("meta"):
        layout = layout_of(transformers.LlamaForCausalLM(tiny_config()))
        resnet = layout_of(transformers.ResNetForImageClassification(transformers.ResNetConfig()))
    assert layout.blocks == tuple(f"model.layers.{block}" for block in range(4))
    assert len(resnet.blocks) == 16  # bottlenecks, not stages
    names = [f"model.layers.{block}.mlp.up_proj" for block in (0, 1, 3)]
    assert layout.moved(names, 1) == tuple(f"model.layers.{block}.mlp.up_proj" for block in (1, 2, 3))
    with pytest.raises(ValueError, match="no place left"):
        layout.moved(names, 2)
    stand_ins = layout.stand_ins(5, 2)
    assert len(set(stand_ins)) == 5 and min(layout.block_of(name) for name in stand_ins) == 2


@pytest.mark.parametrize("metrics", [None, ["snip"]])
def test_plan_of_a_profile(metrics):
    """A CPU forms smaller pieces of a dW at once than the plan counts, by 32 MiB at the most."""
    model, batch = models.llama(2, 64, num_hidden_layers=2, vocab_size=1000)
    zest_fast.profile(model, batch, metrics=metrics)
    weights = sum(p.numel() for p in model.parameters()) * 4
    real = weights + peak_bytes(lambda: zest_fast.profile(model, batch, metrics=metrics))
    planned = plan_profile(model, batch_size=2, sequence_length=64, dtype=None, metrics=metrics)
    assert 0.98 * real <= planned.peak_bytes <= 1.02 * real + 32 * 2**20
    of_batch = plan_profile(model, batch=batch, metrics=metrics)
    assert 0.98 * real <= of_batch.peak_bytes <= 1.02 * real + 32 * 2**20
    with pytest.raises(ValueError, match="this plan is of a batch"):
        of_batch.again(batch_size=4)


@pytest.mark.parametrize("metrics", [None, ["act_mean", "snip"], ["fisher"], ["rgn"]])
def test_a_plan_watches_what_the_pass_watches(monkeypatch, metrics):
    events = {Statistics: set(), profile_pass._Mute: set()}
    for observer, seen in events.items():
        for event in ("output", "linear", "weight_gradient", "output_gradient"):
            monkeypatch.setattr(observer, event, recording(getattr(observer, event), event, seen))
    model, batch = models.llama(2, 8, num_hidden_layers=1, vocab_size=50)
    zest_fast.profile(model, batch, metrics=metrics)
    plan_profile(model, batch_size=2, sequence_length=8, dtype=None, metrics=metrics)
    of_the_pass, of_the_plan = events.values()
    assert of_the_pass == of_the_plan and of_the_pass


def recording(method, event, seen):
    def record(self, subject, *arguments, **options):
        seen.add((event, getattr(subject, "name", None)))
        return method(self, subject, *arguments, **options)

    return record


BAD = {
    "model": (lambda: plan("llama-7c/none", "all", **SIZES), "'llama-7b'"),
    "no config": (lambda: plan(3, "all", **SIZES), "PretrainedConfig"),
    "neither": (lambda: plan(transformers.CLIPVisionConfig(), "all", **SIZES), "neither a causal LM nor a classifier"),
    "layer": (lambda: tiny_plan(["model.layers.9.mlp.up_proj"]), "no layer 'model.layers.9.mlp.up_proj'"),
    "layers": (lambda: tiny_plan("model.layers.2.mlp.up_proj"), "layer names"),
    "tokens": (lambda: tiny_plan(sequence_length=None), "sequence_length is needed"),
    "pixels": (lambda: plan("resnet-50", "all", batch_size=1), "image_size is needed"),
    "both": (lambda: tiny_plan(image_size=224), "image_size has no meaning"),
    "positions": (lambda: plan("bert-base", "all", batch_size=1, sequence_length=513), "has 512 positions"),
    "batch": (lambda: tiny_plan(batch_size=0), "batch_size=0"),
    "dtype": (lambda: tiny_plan(dtype="bfloat"), "nearest: 'bfloat16'"),
    "optimizer": (lambda: tiny_plan(optimizer="adamww"), "nearest: 'adamw'"),
    "frozen": (lambda: tiny_plan(frozen="int4"), "'int8' or 'nf4'"),
    "nothing frozen": (lambda: tiny_plan("all", frozen="nf4"), "nothing is frozen"),
    "memory": (lambda: tiny_plan().within("much"), "is no size"),
    "metrics": (lambda: plan_profile(tiny_config(), **SIZES, metrics=["act_std"]), "backward"),
    "passes": (lambda: plan_profile(tiny_config(), **SIZES, metrics="all"), "synflow take passes"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, words = BAD[case]
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=words):
        call()


def test_a_model_that_reads_values_is_refused():
    class Reads(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 2, 3)

        def forward(self, x):
            return self.conv(x).mean((2, 3)) * (2 if x.sum().item() > 0 else 1)

    with pytest.raises(ValueError, match="asks for values"):
        plan(Reads(), "all", batch_size=1, image_size=8)


@pytest.fixture
def write(tmp_path):
    tiny_config().save_pretrained(tmp_path)

    def write(name, **keys):
        path = tmp_path / name
        path.write_text(json.dumps(keys))  # JSON is YAML
        return path, str(tmp_path)

    return write


def test_axolotl_file(write):
    path, folder = write(
        "axolotl.yml",
        base_model=str(write("x.json")[1]),
        unfrozen_parameters=[r"model\.layers\.2\.mlp\.up_proj\.weight$"],
        micro_batch_size=2,
        sequence_len=16,
        bf16="auto",
        optimizer="adamw_hf",
        learning_rate=1e-4,
        deepspeed="zero3.json",
    )
    found = plan_training_file(path)
    assert found.trainable_parameters == 128 * 64
    assert found.peak_bytes == pytest.approx(tiny_plan(dtype="bfloat16", lean=False).peak_bytes, rel=0.01)
    assert found.notes == ("not read, and it may change memory: deepspeed",)
    path, _ = write("axolotl.yml", base_model=folder, unfrozen_parameters=["layers.7"], sequence_len=16)
    with pytest.raises(ValueError, match=r"'layers\.7' matches no parameter"):
        plan_training_file(path)


def test_llama_factory_file(write):
    path, folder = write("x.json")
    common = {"model_name_or_path": folder, "cutoff_len": 16, "per_device_train_batch_size": 2, "bf16": True}
    common |= {"disable_gradient_checkpointing": True, "stage": "sft"}
    block = sum(p.numel() for p in transformers.LlamaForCausalLM(tiny_config()).model.layers[3].parameters())
    path, _ = write("lf.yaml", **common, finetuning_type="freeze", freeze_trainable_layers=1)
    found = plan_training_file(path)
    assert found.trainable_parameters == block
    assert found.breakdown["optimizer"] >= 2 * 4 * block  # what trains is kept in float32
    pytest.importorskip("peft")
    path, _ = write("lf.yaml", **common, finetuning_type="lora", lora_rank=4, gradient_accumulation_steps=2)
    assert plan_training_file(path).trainable_parameters == 4 * 4 * (4 * (64 + 64) + 3 * (64 + 128))
    path, _ = write("lf.yaml", **common, finetuning_type="oft")
    with pytest.raises(ValueError, match="'oft' is not planned"):
        plan_training_file(path)


def test_trainer_file(write):
    path, folder = write("args.json", per_device_train_batch_size=2, bf16=True, optim="galore_adamw", learning_rate=0.1)
    with pytest.raises(ValueError, match="names no model"):
        plan_training_file(path)
    found = plan_training_file(path, model=folder, sequence_length=16)
    assert found.setting.dtype == "bfloat16-mixed"
    assert any("'galore_adamw' is not planned" in note for note in found.notes)
    path, _ = write("other.json", colour="red")
    with pytest.raises(ValueError, match="no configuration of axolotl"):
        plan_training_file(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is torn"):
        plan_training_file(path)


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def test_command(write):
    _, folder = write("x.json")
    sizes = "--batch-size", 2, "--sequence-length", 16
    done = run(folder, *sizes, "--layers", "2", "--lowest-block", "2", "--json", "--max-memory", "8GB")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["cut"].startswith("model.layers.2.") and document["fits_gb"] == [8, 16, 24, 40, 80]
    assert {row["lowest_block"] for row in document["table"]} == {0, 1, 2, 3}
    text = run(folder, *sizes, "--layers", "all", "--table").stdout
    assert "peak" in text and "fits" in text
    assert "profile of" in run(folder, *sizes, "--profile").stdout


def test_command_says_what_is_wrong(write):
    _, folder = write("x.json")
    for arguments, words in (
        ((), "pass a model, or --file"),
        ((folder,), "sequence_length is needed"),
        ((folder, "--sequence-length", 16, "--layers", "all", "--max-memory", "1MB"), "Closest comes"),
    ):
        done = run(*arguments)
        assert done.exit_code == 2 and words in done.stderr


def test_a_batch_in_place_of_sizes_and_a_number_of_layers():
    model = transformers.LlamaForCausalLM(tiny_config())
    ids = torch.randint(0, 32, (SIZES["batch_size"], SIZES["sequence_length"]))
    names = ["model.layers.2.mlp.up_proj"]
    by_sizes = plan(model, names, **SIZES, dtype=None)
    by_batch = plan(model, names, batch={"input_ids": ids, "labels": ids})
    assert by_batch.peak_bytes == by_sizes.peak_bytes and by_batch.setting.size == by_sizes.setting.size
    assert by_batch.setting.dtype is None and by_batch.again(optimizer="sgd").peak_bytes < by_batch.peak_bytes
    with pytest.raises(ValueError, match="plan is of a batch, whose sizes cannot be changed"):
        by_batch.table()
    evenly = plan(model, 3, **SIZES).setting.layers
    assert len(evenly) == 3 and {name.split(".")[2] for name in evenly} >= {"0", "3"}
    for arguments, error, message in (
        ({}, TypeError, "needs batch_size= with the sizes of a sample, or batch="),
        ({"batch": {"input_ids": ids}, "batch_size": 2}, ValueError, "batch= says its sizes, and batch_size= too"),
        ({"batch": {"text": "a"}}, ValueError, "a batch of tensors is needed"),
        ({**SIZES, "loss_fn": torch.nn.functional.mse_loss}, ValueError, "loss_fn is of a batch"),
    ):
        with pytest.raises(error, match=message):
            plan(model, names, **arguments)
    for count in (0, 10_000):
        with pytest.raises(ValueError, match=f"layers={count}: there are"):
            plan(model, count, **SIZES)
    with pytest.raises(TypeError, match="layers=True"):
        plan(model, True, **SIZES)
