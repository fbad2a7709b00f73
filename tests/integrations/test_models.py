import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import TEXTS, minilm, save_bert, save_lite0, save_llama, save_resnet
from without_module import refuse_import

import zest_fast
from zest_fast.integrations.pretrained import find_task, load_model
from zest_fast.integrations.references import load_function
from zest_fast.planning.plan import plan


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Writes a module into a fresh current folder and forgets it afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        return name

    yield write
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def test_the_architecture_tells_the_task_and_the_weights_are_those_of_the_folder(tmp_path):
    saved = {
        "text-classification": save_bert(tmp_path / "bert"),
        "causal-lm": save_llama(tmp_path / "llama"),
        "image-classification": save_resnet(tmp_path / "resnet"),
    }
    for task, folder in saved.items():
        assert find_task(str(folder)) == task
        loaded = load_model(str(folder))
        assert loaded.task == task and loaded.fresh == () and not loaded.model.training
        expected = transformers.AutoModel.from_pretrained(folder)
        base = getattr(loaded.model, loaded.model.base_model_prefix)
        for name, parameter in base.named_parameters():
            assert torch.equal(parameter, expected.get_parameter(name)), name


def test_a_trained_head_that_knows_the_classes_stays(tmp_path):
    names = {0: "pos", 1: "neg", 2: "neutral"}
    folder = save_bert(tmp_path / "bert", id2label=names, label2id={name: index for index, name in names.items()})
    loaded = load_model(str(folder), class_names=["neg", "pos"])
    assert loaded.class_names == ("pos", "neg", "neutral")
    assert loaded.fresh == ()


def test_integer_classes_use_the_outputs_of_a_head_of_as_many(tmp_path):
    loaded = load_model(str(save_bert(tmp_path / "bert", num_labels=3)), class_names=["0", "1", "2"])
    assert loaded.class_names == ("0", "1", "2")
    assert loaded.fresh == ()


def test_other_classes_get_a_fresh_head_that_the_seed_decides(tmp_path):
    folder = save_bert(tmp_path / "bert", num_labels=4)
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        loaded = load_model(str(folder), class_names=["a", "b", "c"])
        heads.append(loaded.model.classifier.weight.detach().clone())
    assert loaded.fresh == ("classifier.bias", "classifier.weight")
    assert loaded.model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert heads[0].shape == (3, 16)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_a_bare_encoder_needs_the_task(tmp_path):
    folder = str(save_bert(tmp_path / "bert", transformers.BertModel))
    assert find_task(folder) is None
    with pytest.raises(ValueError, match="does not say its task; pass one of"):
        load_model(folder)
    loaded = load_model(folder, task="text-classification", class_names=["a", "b", "c"])
    assert loaded.model.config.num_labels == 3
    assert "classifier.weight" in loaded.fresh


def test_a_single_class_makes_no_head(tmp_path):
    with pytest.raises(ValueError, match="single class, 'spam'"):
        load_model(str(save_bert(tmp_path / "bert")), class_names=["spam"])


def test_the_tokenizer_of_a_decoder_gets_a_padding_token(tmp_path):
    folder = save_llama(tmp_path / "llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(folder)
    loaded = load_model(str(folder))
    assert loaded.processor.pad_token == "[SEP]"
    assert loaded.model.config.pad_token_id == loaded.processor.pad_token_id == 3


def test_a_folder_without_tokenizer_or_image_processor_has_none(tmp_path):
    folder = save_bert(tmp_path / "bert")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert load_model(str(folder)).processor is None
    assert load_model(str(save_resnet(tmp_path / "resnet", processor=False))).processor is None


def test_real_weights_through_a_function(user_module, tmp_path):
    loaded = load_model(save_lite0(tmp_path))
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) == pytest.approx(4.65e6, rel=0.01)
    assert not loaded.model.training and loaded.task is None and loaded.processor is None
    first = loaded.model.get_submodule("_conv_stem").weight
    assert first.shape == (32, 3, 3, 3) and 0.05 < first.std() < 1.0


def test_real_weights_from_a_folder():
    """MiniLM with its tokenizer: words of a meaning are nearer than others."""
    loaded = load_model(minilm(), task="text-classification", class_names=["no", "yes"])
    assert set(loaded.fresh) == {"classifier.weight", "classifier.bias"}
    batch = loaded.processor(["A cat sits.", "A kitten rests.", "Shares fell."], padding=True, return_tensors="pt")
    with torch.no_grad():
        states = loaded.model.bert(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    pooled = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    assert pooled[0] @ pooled[1] > pooled[0] @ pooled[2] + 0.2


def one_line(message, *parts):
    assert "\n" not in str(message)
    for part in parts:
        assert part in str(message)


def test_unknown_folder_names_the_nearest(tmp_path):
    save_bert(tmp_path / "my-bert")
    with pytest.raises(ValueError) as caught:
        load_model(str(tmp_path / "my-bart"))
    one_line(caught.value, "my-bart", "nearest: 'my-bert'")


def test_unknown_hub_id_names_a_near_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_bert(tmp_path / "my-bert")
    with pytest.raises(ValueError) as caught:
        load_model("my-bertt")
    one_line(caught.value, "'my-bertt' is no folder here", "the hub did not give it", "nearest: 'my-bert'")


def test_a_file_is_no_model(tmp_path):
    folder = save_bert(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"is a file; give the folder"):
        load_model(str(folder / "model.safetensors"))


def test_unknown_task_names_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="'text-clasification' is unknown; nearest: 'text-classification'"):
        load_model(str(tmp_path), task="text-clasification")


def test_a_task_that_the_architecture_has_no_form_for(tmp_path):
    folder = str(save_resnet(tmp_path / "resnet"))
    with pytest.raises(ValueError) as caught:
        load_model(folder, task="causal-lm")
    one_line(caught.value, "(resnet) has no form for causal-lm")


def test_missing_configuration(tmp_path):
    folder = save_bert(tmp_path / "bert")
    (folder / "config.json").rename(folder / "configs.json")
    with pytest.raises(ValueError) as caught:
        load_model(str(folder))
    one_line(caught.value, "config.json does not exist", "nearest: 'configs.json'")


def test_torn_configuration(tmp_path):
    folder = save_bert(tmp_path / "bert")
    (folder / "config.json").write_text((folder / "config.json").read_text()[:40])
    with pytest.raises(ValueError) as caught:
        load_model(str(folder))
    one_line(caught.value, str(folder / "config.json"), "is torn", "line")


def test_missing_weights(tmp_path):
    folder = save_bert(tmp_path / "bert")
    (folder / "model.safetensors").rename(folder / "mode.safetensors")
    with pytest.raises(ValueError) as caught:
        load_model(str(folder))
    one_line(caught.value, str(folder), "no weights file", "nearest: 'mode.safetensors'")


@pytest.mark.parametrize("kept", [3, 1000, -1])
def test_torn_safetensors(tmp_path, kept):
    file = save_bert(tmp_path / "bert") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError) as caught:
        load_model(str(file.parent))
    one_line(caught.value, str(file), "is torn")


def test_torn_pytorch_weights(tmp_path):
    folder = save_bert(tmp_path / "bert")
    torch.save(transformers.AutoModel.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    whole = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError) as caught:
        load_model(str(folder))
    one_line(caught.value, str(folder / "pytorch_model.bin"), "is torn")


def test_weights_that_unfold_are_refused_before_they_do(tmp_path):
    folder = save_bert(tmp_path / "bert")
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(2**24))
    with pytest.raises(ValueError) as caught:
        load_model(str(folder))
    one_line(caught.value, str(folder / "pytorch_model.bin"), "unfold to 16,777,216")


def test_missing_shard(tmp_path):
    folder = save_bert(tmp_path / "bert")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError) as caught:
        load_model(str(folder))
    one_line(caught.value, str(folder / "model-2.safetensors"), "is missing", "model.safetensors.index.json")


def test_torn_tokenizer(tmp_path):
    folder = save_bert(tmp_path / "bert")
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:100])
    with pytest.raises(ValueError) as caught:
        load_model(str(folder))
    one_line(caught.value, "AutoTokenizer", str(folder))


def test_without_transformers_the_pip_line(monkeypatch):
    refuse_import(monkeypatch, "transformers")
    with pytest.raises(ImportError, match=r"pip install 'zest_fast\[transformers\]'"):
        load_model("bert-base-uncased")


def test_references_that_lead_nowhere(user_module):
    user_module("mymodels", "import torch\nnumber = 3\ndef build_net():\n    return 5\n")
    user_module("broken", "import torch_of_tomorrow\n")
    with pytest.raises(ValueError) as caught:
        load_model("mymodel:build_net")
    one_line(caught.value, "no module named 'mymodel'", "nearest: 'mymodels'")
    with pytest.raises(ValueError) as caught:
        load_model("mymodels.nets:build_net")
    one_line(caught.value, "no module named 'mymodels.nets'")
    with pytest.raises(ValueError) as caught:
        load_model("torch.nnn:Linear")
    one_line(caught.value, "no module named 'torch.nnn'", "nearest: 'torch.nn'")
    with pytest.raises(ValueError) as caught:
        load_model("mymodels:build_nets")
    one_line(caught.value, "mymodels has no function 'build_nets'", "nearest: 'build_net'")
    with pytest.raises(TypeError, match="'mymodels:number' is a int"):
        load_model("mymodels:number")
    with pytest.raises(TypeError, match=r"returned int; it has to return a torch.nn.Module"):
        load_model("mymodels:build_net")
    with pytest.raises(ModuleNotFoundError, match="torch_of_tomorrow"):
        load_model("broken:build")


def test_the_texts_of_the_tests_are_known_words(tmp_path):
    """Otherwise the other tests would train on unknown tokens alone."""
    loaded = load_model(str(save_bert(tmp_path / "bert")))
    assert loaded.processor.unk_token_id not in {token for ids in loaded.processor(TEXTS)["input_ids"] for token in ids}


# --- Code and names that come with a folder -------------------------------------------------------------------------

EVIL = """
import pathlib
pathlib.Path(__file__).with_name("marker").touch()
from transformers import BertConfig, BertForSequenceClassification
class EvilConfig(BertConfig):
    model_type = "{kind}"
class EvilModel(BertForSequenceClassification):
    config_class = EvilConfig
"""


def save_evil(folder, kind="evil", file="config.json"):
    """A BERT whose `file` names classes in a module beside it, which leaves a marker when it is run."""
    save_bert(folder)
    settings = json.loads((folder / file).read_text())
    if file == "config.json":
        settings["model_type"] = kind
        autos = ("AutoModel", "AutoModelForSequenceClassification", "AutoModelForCausalLM")
        settings["auto_map"] = {"AutoConfig": "evil.EvilConfig", **dict.fromkeys(autos, "evil.EvilModel")}
    else:
        settings |= {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": [None, "evil.EvilTokenizer"]}}
    (folder / file).write_text(json.dumps(settings))
    (folder / "evil.py").write_text(EVIL.replace("{kind}", kind))
    return folder


@pytest.mark.parametrize("command", ["profile", "finetune", "sweep", "plan"])
def test_code_of_a_folder_is_not_run_whatever_stdin_says(tmp_path, command):
    folder = save_evil(tmp_path / "evil")
    (tmp_path / "films.jsonl").write_text(
        "".join(json.dumps({"text": t, "label": i % 2}) + "\n" for i, t in enumerate(TEXTS))
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HOME": str(tmp_path / "hf")}
    words = [sys.executable, "-c", "from zest_fast.cli import app; app()", command, "./evil"]
    words += ["films.jsonl", "--task", "text-classification"] if command != "plan" else ["--sequence-length", "8"]
    result = subprocess.run(
        words, cwd=tmp_path, env=environment, input="y\n" * 1000, capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert "'./evil' asks to run code of its own" in line and "module:function" in line
    assert command == "plan" or "evil.EvilConfig" in line
    assert not (folder / "marker").exists() and not (tmp_path / "hf").exists()


def test_code_for_a_known_architecture_is_left_out_and_said_to_be(tmp_path):
    folder = save_evil(tmp_path / "evil", kind="bert")
    loaded = load_model(str(folder), class_names=["0", "1"])
    assert type(loaded.model) is transformers.BertForSequenceClassification and not (folder / "marker").exists()
    (note,) = loaded.notes
    assert "code of its own" in note and "evil.EvilModel" in note and "BertForSequenceClassification" in note


def test_code_of_a_tokenizer_is_not_run(tmp_path):
    folder = save_evil(tmp_path / "evil", file="tokenizer_config.json")
    try:
        load_model(str(folder), class_names=["0", "1"])  # newer versions take tokenizer.json instead
    except ValueError as error:
        one_line(error, "AutoTokenizer", "asks to run code of its own", "evil.EvilTokenizer")
    assert not (folder / "marker").exists()


def test_a_plan_runs_no_code_of_a_configuration(tmp_path):
    folder = save_evil(tmp_path / "evil")
    with pytest.raises(ValueError, match="asks to run code of its own"):
        plan(str(folder), "all", batch_size=1, sequence_length=8)
    assert not (folder / "marker").exists()


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_kernels_that_a_configuration_names_are_not_fetched(tmp_path, monkeypatch, key):
    folder = save_bert(tmp_path / "bert")
    there = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**there, key: "evil/kernel"}))
    for refusing in (
        lambda: load_model(str(folder)),
        lambda: plan(str(folder), "all", batch_size=1, sequence_length=8),
    ):
        if transformers.AutoConfig.from_pretrained(folder)._attn_implementation is None:
            continue  # this version of transformers does not read the key
        with pytest.raises(ValueError, match="asks for the kernels of 'evil/kernel'"):
            refusing()


class _Marking:
    def __reduce__(self):
        return (open, ("pickle-ran", "w"))


def test_a_pickle_that_is_more_than_tensors_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = save_bert(tmp_path / "bert")
    (folder / "model.safetensors").unlink()
    torch.save({"a": _Marking()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError) as caught:
        load_model(str(folder))
    one_line(caught.value, "a pickle with more in it than tensors")
    assert "weights_only" not in str(caught.value) and not (tmp_path / "pickle-ran").exists()


@pytest.mark.parametrize("kind", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "{tmp}/secret.safetensors", "a/../../secret.safetensors", "..\\secret", "C:\\secret", ""],
)
def test_an_index_that_leads_out_of_the_folder_is_refused_before_anything_is_read(tmp_path, monkeypatch, kind, name):
    folder = save_bert(tmp_path / "bert")
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    name = name.replace("{tmp}", str(tmp_path))
    (folder / kind).write_text(json.dumps({"metadata": {}, "weight_map": {"classifier.weight": name}}))
    monkeypatch.setattr("safetensors.safe_open", None)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", None)
    with pytest.raises(ValueError) as caught:
        load_model(str(folder))
    one_line(caught.value, kind, repr(name), "outside of", "nothing was read")


def test_an_index_beside_whole_weights_is_looked_at_too(tmp_path):
    folder = save_bert(tmp_path / "bert")
    index = {"weight_map": {"a": "../secret.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside of"):
        load_model(str(folder))


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"weight_map": 5}', '{"weight_map": {"a": 5}}', '{"weight_map": {}}', "{"]
)
def test_an_index_that_is_none(tmp_path, content):
    folder = save_bert(tmp_path / "bert")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError) as caught:
        load_model(str(folder))
    one_line(caught.value, "weights index", "model.safetensors.index.json")


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("config.json", {"transformers_weights": "../secret.safetensors"}),
        ("tokenizer_config.json", {"tokenizer_file": "{tmp}/secret.json"}),
        ("tokenizer_config.json", {"vocab_file": "../secret.json"}),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["../tokenizer.4.0.json"]}),
    ],
)
def test_settings_that_lead_out_of_the_folder_are_refused(tmp_path, file, settings):
    folder = save_bert(tmp_path / "bert")
    for name in ("secret.safetensors", "secret.json", "tokenizer.4.0.json"):
        (tmp_path / name).write_text("{}")
    there = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**there, **settings}).replace("{tmp}", str(tmp_path)))
    with pytest.raises(ValueError) as caught:
        load_model(str(folder))
    one_line(caught.value, str(folder / file), "outside of")


def test_files_of_another_machine_that_are_not_here_are_no_reason(tmp_path):
    folder = save_bert(tmp_path / "bert")
    there = json.loads((folder / "tokenizer_config.json").read_text())
    stale = {"special_tokens_map_file": str(folder / "config.json"), "tokenizer_file": "/home/someone/tokenizer.json"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**there, **stale}))
    assert load_model(str(folder)).processor is not None


def test_the_links_of_a_hub_cache_are_followed(tmp_path):
    """models--owner--name/snapshots/REVISION/FILE -> ../../blobs/DIGEST, for whole weights and for shards."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    save_bert(snapshot)
    expected = load_model(str(snapshot)).model.state_dict()
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    (snapshot / "model.safetensors").rename(snapshot / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(expected, "model-00001-of-00001.safetensors")}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(Path("..") / ".." / "blobs" / str(number))
    loaded = load_model(str(snapshot)).model.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", ["deep", "a long number", "a pipe"])
def test_settings_that_would_not_end_are_refused(tmp_path, name, content):
    """Python's own stack and time, and a pipe, which is waited for."""
    folder = save_bert(tmp_path / "bert")
    (folder / name).unlink(missing_ok=True)
    if content == "a pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).write_text("[" * 100_000 if content == "deep" else '{"a": ' + "9" * 100_000 + "}")
    with pytest.raises(ValueError) as caught:
        load_model(str(folder))
    one_line(caught.value, name)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 50_000 + "1" + "}" * 50_000])
def test_a_deep_configuration_of_what_is_streamed_or_planned_is_refused(tmp_path, content):
    folder = save_bert(tmp_path / "bert")
    (folder / "config.json").write_text(content)
    for read in (zest_fast.open_streamed, lambda source: zest_fast.plan(source, layers=1, batch_size=2)):
        with pytest.raises(ValueError, match=r"bert"):
            read(folder)


def test_an_adapter_is_no_model(tmp_path):
    folder = save_bert(tmp_path / "bert")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "../secret"}))
    with pytest.raises(ValueError) as caught:
        load_model(str(folder))
    one_line(caught.value, "PEFT adapter", "'../secret'", "merge")


@pytest.mark.parametrize(
    "change", [{"architectures": 5}, {"architectures": [5]}, {"id2label": 5}, {"hidden_size": "x"}, {"model_type": 5}]
)
def test_a_configuration_of_strange_types_is_one_line(tmp_path, change):
    folder = save_bert(tmp_path / "bert")
    there = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**there, **change}))
    with pytest.raises((ValueError, TypeError)) as caught:
        load_model(str(folder), class_names=["0", "1"])
    one_line(caught.value, str(folder))
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list, not an object"):
        load_model(str(folder))


# --- module:function ------------------------------------------------------------------------------------------------


def test_what_is_installed_goes_before_the_current_folder(user_module, tmp_path, monkeypatch):
    """A module of the user's imports the real lightgbm and colorsys, whatever lies beside it."""
    for name in ("lightgbm", "colorsys"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        user_module(name, "raise RuntimeError('shadowed')")
    user_module(
        "zest_mine",
        "import colorsys, lightgbm, zest_beside\ndef build(): import zest_late; return lightgbm.__version__",
    )
    user_module("zest_beside", "")
    user_module("zest_late", "")
    path = list(sys.path)
    assert load_function("zest_mine:build")()
    assert sys.path == path  # nothing that is imported later comes from here
    with pytest.raises(ModuleNotFoundError):
        __import__("zest_nowhere")


def test_of_two_modules_of_one_name_the_one_that_was_taken_is_named(user_module, tmp_path):
    user_module("colorsys", "def rgb_to_hsv(): return 1\ndef mine(): return 2\n")
    user_module("getpass", "def getuser(): return 1\n")
    with pytest.warns(UserWarning, match=r"'getpass' was taken from .*getpass\.py, not from .*; rename yours"):
        load_function("getpass:getuser")
    with pytest.raises(ValueError) as caught:
        load_function("colorsys:mine")
    one_line(caught.value, "has no function 'mine'", str(tmp_path / "colorsys.py"), "rename yours")
    (tmp_path / "email").mkdir()
    (tmp_path / "email" / "nets.py").write_text("def build(): return 1")
    with pytest.raises(ValueError) as caught:
        load_function("email.nets:build")
    one_line(caught.value, "no module named 'email.nets'", "'email' was taken from", str(tmp_path / "email"))
