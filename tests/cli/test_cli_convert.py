"""`zest-fast convert`, `push` and `--cast`, as they are typed."""

from __future__ import annotations

import json

import huggingface_hub
import peft
import pytest
import torch
import transformers
from checkpoints import save_llama
from typer.testing import CliRunner

from zest_fast.cli import app
from zest_fast.finetuning.selective_backward import SelectiveBackward

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]


def run(*arguments):
    return CliRunner().invoke(app, [str(one) for one in arguments])


def refused(*arguments):
    result = run(*arguments)
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, (
        result.output
    )
    return result.stderr


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """my-llama and delta.safetensors in the current folder."""
    save_llama(tmp_path / "my-llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "my-llama")
    with SelectiveBackward(model, LAYERS) as tuned:
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        tuned.save(tmp_path / "delta.safetensors", recipe={"model": "owner/base"})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_adapter(folder):
    options = ("--to", "lora", "--error", "0.2")
    result = run("convert", "my-llama", "delta.safetensors", *options, "--out", "adapter")
    assert result.exit_code == 0, result.output
    assert all(layer in result.stdout for layer in LAYERS) and "adapter: LoRA of rank" in result.stdout
    said = run("convert", "my-llama", "delta.safetensors", *options, "--out", "again", "--json")
    document = json.loads(said.stdout)
    assert {one["name"] for one in document["layers"]} == set(LAYERS) and document["error"] <= 0.2
    base = transformers.AutoModelForCausalLM.from_pretrained("my-llama")
    model = peft.PeftModel.from_pretrained(base, "adapter")
    ranks = {name: module.r["default"] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert sorted(ranks.values()) == sorted(one["rank"] for one in document["layers"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--to", "lara", "--out", "x"), "--to 'lara' is unknown"),
        (("--to", "lora", "--out", "x"), "say how exact the adapter is to be: --rank 16, --error 0.05"),
        (("--to", "lora", "--error", "7", "--out", "x"), "--error 7.0"),
        (("--to", "lora", "--rank", "1", "--error", "0.01", "--out", "x"), "cannot be held at --rank 1"),
        (("--to", "lora", "--rank", "1", "--out", "my-llama"), "is there already"),
        (("--to", "gguf", "--out", "x.gguf"), "--to gguf needs --gguf"),
        (("--to", "gguf", "--gguf", "y.gguf", "--rank", "3", "--out", "x.gguf"), "leave them out"),
        (("--to", "gguf-lora", "--gguf", "y.gguf", "--out", "x.gguf"), "leave it out"),
        (("--to", "gguf-lora", "--rank", "3", "--out", "x.bin"), "the ending '.bin' is unknown"),
        (("--to", "gguf", "--gguf", "missing.gguf", "--out", "x.gguf"), "does not exist"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(arguments, said, folder):
    before = sorted(file.name for file in folder.iterdir())
    assert said in refused("convert", "my-llama", "delta.safetensors", *arguments)
    assert sorted(file.name for file in folder.iterdir()) == before


def test_gguf(folder):
    gguf = pytest.importorskip("gguf")
    from gguf_models import save_gguf

    save_gguf(transformers.AutoModelForCausalLM.from_pretrained("my-llama"), folder / "base.gguf")
    result = run(
        "convert", "my-llama", "delta.safetensors", "--to", "gguf", "--gguf", "base.gguf", "--out", "tuned.gguf"
    )
    assert result.exit_code == 0 and "tuned.gguf: 2 tensors replaced, exact" in result.stdout, result.output
    result = run(
        "convert", "my-llama", "delta.safetensors", "--to", "gguf-lora", "--rank", "4", "--out", "a.gguf", "--json"
    )
    assert json.loads(result.stdout)["path"] == "a.gguf", result.output
    assert len(gguf.GGUFReader("a.gguf").tensors) == 4


def test_cast(folder):
    base = transformers.AutoModelForCausalLM.from_pretrained("my-llama", dtype=torch.bfloat16)
    base.save_pretrained("bf16")
    with SelectiveBackward(base.float(), LAYERS) as tuned:
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.add_(0.1)
        tuned.save("f32.safetensors")
    assert "--cast rounds" in refused("apply", "bf16", "f32.safetensors")
    result = run("merge", "bf16", "f32.safetensors", "merged", "--cast")
    assert result.exit_code == 0 and "trained entries" in result.stdout, result.output
    result = run("apply", "bf16", "f32.safetensors", "--cast")
    assert result.exit_code == 0 and "trained entries" in result.stdout, result.output
    one, other = (transformers.AutoModelForCausalLM.from_pretrained(name).state_dict() for name in ("bf16", "merged"))
    assert all(torch.equal(one[name], other[name]) and one[name].dtype == torch.bfloat16 for name in other)
    result = run("merge", "my-llama", "delta.safetensors", "shards", "--max-shard-size", "4KB")
    assert result.exit_code == 0 and len(list((folder / "shards").glob("*.safetensors"))) > 3, result.output


def test_push(folder, monkeypatch):
    seen = {}

    class Api:
        def create_repo(self, repo_id, **options):
            seen.update(options, repo_id=repo_id)
            return "https://huggingface.co/me/tuned"

        def upload_folder(self, *, folder_path, **options):
            seen["card"] = (folder / folder_path / "README.md").read_text()

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    result = run("push", "delta.safetensors", "me/tuned", "--private", "--score", "accuracy=0.875")
    assert result.exit_code == 0 and result.stdout == "https://huggingface.co/me/tuned\n", result.output
    assert seen["repo_id"] == "me/tuned" and seen["private"] is True
    assert 'base_model: "owner/base"' in seen["card"] and "| accuracy | 0.875 |" in seen["card"]
    for arguments, said in (
        (("delta.safetensors", "tuned"), "is no repository of the hub: write USER/NAME"),
        (("delta.safetensors", "me/tuned", "--score", "high"), "--score 'high' is no score"),
        (("my-llama", "me/tuned"), "say --with-base, or name the delta instead"),
        (("nothing", "me/tuned"), "does not exist"),
    ):
        assert said in refused("push", *arguments)
