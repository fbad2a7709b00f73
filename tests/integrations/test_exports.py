"""Exports select exactly the chosen layers by the matching rule of the trainer that they are for.

PEFT is asked itself. axolotl and LLaMA-Factory pull in CUDA packages, so their rules are written down here as their
sources state them:
axolotl, src/axolotl/utils/freeze.py at 107c67ae: LayerNamePattern, freeze_layers_except.
LLaMA-Factory, src/llamafactory/model/adapter.py at 01d87b82: _setup_freeze_tuning, _setup_lora_tuning.
"""

from __future__ import annotations

import inspect
import json
import re

import peft
import pytest
import torch
import transformers
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from small_models import Recurrent, llama
from torch import nn
from transformers import BertConfig, BertForSequenceClassification
from typer.testing import CliRunner

import zest_fast
from zest_fast.cli import app
from zest_fast.integrations.exports import as_yaml, axolotl, axolotl_lora, llama_factory
from zest_fast.integrations.peft import ZestSelector, lora_config, shira_config
from zest_fast.integrations.trainer import ZestCallback

CHOSEN = ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.o_proj")


class Nested(nn.Module):
    """A layer whose whole name is the end of another's: "block.0" and "outer.block.0"."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4))
        self.outer = nn.ModuleDict({"block": nn.Sequential(nn.Linear(4, 4))})
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.outer["block"](self.block(x)))


def bert():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 12, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=30, **sizes))


def parameters_of(model, layers):
    return {name for name, _ in model.named_parameters() if name.rpartition(".")[0] in layers}


def unfrozen_by_axolotl(model, patterns):
    """Dots that no + follows are literal, and the pattern has to match from the beginning of the name."""
    found = set()
    for name, parameter in model.named_parameters():
        for pattern in patterns:
            assert not re.match(r"^(.+)\[([0-9]*)(?::([0-9]*))?\]$", pattern), "read as a range of rows"
            if re.compile(re.sub(r"\.(?!\+)", r"\\.", pattern)).match(name):
                found.add(name)
        assert len(parameter)  # it takes the length of each
    return found


def unfrozen_by_llama_factory(model, settings):
    count, depth = settings["freeze_trainable_layers"], model.config.num_hidden_layers
    blocks = range(max(0, depth - count), depth) if count > 0 else range(min(-count, depth))
    names = [name for name, _ in model.named_parameters()]
    inside = {name.split(".0.")[-1].split(".")[0] for name in names if ".0." in name}
    outside = {name.split(".")[-2] for name in names if re.search(r"\.\d+\.", name) is None}
    modules = [name.strip() for name in settings["freeze_trainable_modules"].split(",")]
    extra = [name.strip() for name in settings.get("freeze_extra_modules", "").split(",") if name]
    assert set(modules) <= inside and set(extra) <= outside
    marks = [f".{block}.{module}" for block in blocks for module in modules] + extra
    return {name for name in names if any(mark in name for mark in marks)}


def adapted_by_peft(model, config):
    wrapped = get_peft_model(model, config)
    prefix = "base_model.model."
    return {name.removeprefix(prefix): m for name, m in wrapped.named_modules() if isinstance(m, LoraLayer)}


# axolotl


@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (llama, CHOSEN),
        (bert, ("bert.encoder.layer.1.output.dense", "bert.encoder.layer.11.attention.self.key")),  # 1 is not 11 or 10
        (Nested, ("block.0",)),
    ],
    ids=["llama", "bert", "nested"],
)
def test_axolotl_unfreezes_exactly_these(make, layers):
    model = make()
    for settings in (axolotl(layers, model, head=None), axolotl(layers)):
        assert unfrozen_by_axolotl(model, settings["unfrozen_parameters"]) == parameters_of(model, layers)


def test_axolotl_takes_layers_that_go_by_a_parameter():
    settings = axolotl(["rnn.weight_ih_l0"], Recurrent(), head=None)
    assert unfrozen_by_axolotl(Recurrent(), settings["unfrozen_parameters"]) == {"rnn.weight_ih_l0", "rnn.bias_ih_l0"}


# LLaMA-Factory


def test_llama_factory_lora_adapts_exactly_these():
    settings = llama_factory(CHOSEN, llama(), r=4)
    assert settings["finetuning_type"] == "lora" and settings["lora_rank"] == 4
    targets = [name.strip() for name in settings["lora_target"].split(",")]  # then it makes a LoraConfig of them
    assert set(adapted_by_peft(llama(), lora_config(targets, llama()))) == set(CHOSEN)


@pytest.mark.parametrize(
    ("blocks", "modules", "extra", "count"),
    [
        ((1, 2), ("mlp",), (), 2),
        ((0,), ("self_attn",), (), -1),
        ((2,), ("mlp", "self_attn"), ("lm_head",), 1),
        ((0, 1, 2), ("mlp",), (), 3),
    ],
)
def test_llama_factory_freeze_trains_exactly_these(blocks, modules, extra, count):
    model = llama()
    marks = [f"layers.{block}.{module}." for block in blocks for module in modules]
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(m in name for m in marks)
    ]
    layers += extra
    settings = llama_factory(layers, model, method="freeze")
    assert settings["freeze_trainable_layers"] == count
    assert unfrozen_by_llama_factory(model, settings) == parameters_of(model, layers)


def test_what_llama_factory_cannot_say_is_refused():
    with pytest.raises(ValueError, match=r"no setting trains exactly these layers.*layers\.0\.mlp.*method='lora'"):
        llama_factory(["model.layers.0.mlp.up_proj"], llama(), method="freeze")
    with pytest.raises(ValueError, match="needs a model whose configuration has one of"):
        llama_factory(["block.0"], Nested(), method="freeze")
    with pytest.raises(ValueError, match=r"would bring in outer\.block\.0; export to PEFT"):
        llama_factory(["block.0"], Nested())
    with pytest.raises(ValueError, match="needs model="):
        llama_factory(CHOSEN, method="freeze")
    with pytest.raises(ValueError, match="method='full' is unknown"):
        llama_factory(CHOSEN, method="full")


# PEFT


@pytest.mark.parametrize(
    ("make", "layers"),
    [(llama, CHOSEN), (Nested, ("block.0",)), (Nested, ("outer.block.0",))],
    ids=["llama", "block", "outer block"],
)
def test_peft_adapts_exactly_these(make, layers):
    model = make()
    assert set(adapted_by_peft(model, lora_config(layers, model, head=None))) == set(layers)


def test_ranks_and_head_go_where_they_belong():
    model = bert()
    layers = ["bert.encoder.layer.1.output.dense", "bert.encoder.layer.11.output.dense"]
    config = lora_config(layers, model, r=8, ranks={layers[0]: 2}, lora_alpha=16)
    adapted = adapted_by_peft(model, config)
    assert {name: layer.r["default"] for name, layer in adapted.items()} == {layers[0]: 2, layers[1]: 8}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "lora" not in name} == {
        f"classifier.modules_to_save.default.{kind}" for kind in ("weight", "bias")
    }


def test_lora_on_the_top_of_a_ranking_learns():
    """LoRA + ZEST of the paper: rank 8 on the n best layers."""
    model = llama()
    ids = torch.randint(40, (4, 8), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    ranking = zest_fast.rank(zest_fast.profile(model, batch), by="snip")
    config = lora_config(ranking, model, n=2)
    assert config.task_type == "CAUSAL_LM" and config.modules_to_save is None
    wrapped = get_peft_model(model, config)
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    assert len(trained) == 4  # an A and a B for each of two layers
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(5):
        loss = wrapped(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# The head of a classifier, which is new in it and would stay at random values


def classifier(name, **sizes):
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(transformers, f"{name}Config")(**{**common, "num_labels": 3, **sizes})
    kind = "ImageClassification" if name in ("ViT", "Swin") else "SequenceClassification"
    return getattr(transformers, f"{name}For{kind}")(config)


CLASSIFIERS = {
    "Bert": (lambda: classifier("Bert", vocab_size=30), "bert.encoder.layer.1.output.dense", {"classifier"}),
    "Roberta": (lambda: classifier("Roberta", vocab_size=30), "roberta.encoder.layer.1.output.dense", {"classifier"}),
    "DistilBert": (
        lambda: classifier("DistilBert", vocab_size=30, dim=16, hidden_dim=32, n_layers=2, n_heads=2),
        "distilbert.transformer.layer.1.ffn.lin2",
        {"pre_classifier", "classifier"},
    ),
    "ViT": (lambda: classifier("ViT", image_size=16, patch_size=8), None, {"classifier"}),
    "Llama": (lambda: classifier("Llama", vocab_size=30), "model.layers.1.mlp.down_proj", {"score"}),
    "Deberta": (lambda: classifier("DebertaV2", vocab_size=30), None, {"pooler", "classifier"}),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_head_of_a_classifier_trains_and_nothing_else_does(name):
    make, layer, head = CLASSIFIERS[name]
    model = make()
    names = [place for place, module in model.named_modules() if isinstance(module, nn.Linear)]
    layer = layer or next(place for place in reversed(names) if place.split(".")[0] not in head)
    of_head = {place for place, _ in model.named_parameters() if place.split(".")[0] in head}
    assert unfrozen_by_axolotl(model, axolotl([layer], model)["unfrozen_parameters"]) == of_head | parameters_of(
        model, [layer]
    )
    settings = llama_factory([layer], model)
    assert set(settings["additional_target"].split(",")) == head and settings["lora_target"] == layer
    config = lora_config([layer], model)
    assert set(config.modules_to_save) == head
    wrapped = get_peft_model(model, config)
    trained = {place for place, parameter in wrapped.named_parameters() if parameter.requires_grad}
    whole = {place.replace(".modules_to_save.default", "") for place in trained if "modules_to_save" in place}
    assert whole == {f"base_model.model.{place}" for place in of_head}
    assert {place.split(".lora_")[0] for place in trained if "lora_" in place} == {f"base_model.model.{layer}"}
    assert len(trained) == len(of_head) + 2


def test_a_layer_inside_the_head_gets_no_adapter():
    model = CLASSIFIERS["Roberta"][0]()
    layers = ["classifier.dense", "roberta.encoder.layer.1.output.dense"]
    assert lora_config(layers, model).target_modules == {layers[1]}
    with pytest.raises(ValueError, match="all of them are in the head, classifier, which trains whole"):
        lora_config(layers[:1], model)


def test_a_head_that_peft_would_take_for_others_too_is_refused():
    model = CLASSIFIERS["DistilBert"][0]()
    with pytest.raises(ValueError, match="classifier would bring in pre_classifier, which would train too"):
        lora_config(["distilbert.transformer.layer.1.ffn.lin2"], model, head="classifier")


@pytest.mark.parametrize("name", ["Bert", "Roberta", "language model"])
def test_the_command_knows_the_head_from_the_profile(name, tmp_path):
    model = llama() if name == "language model" else CLASSIFIERS[name][0]()
    ids = torch.randint(30, (2, 8), generator=torch.Generator().manual_seed(0))
    labels = ids if name == "language model" else torch.tensor([0, 2])
    zest_fast.profile(model, {"input_ids": ids, "labels": labels}, metrics=["snip"]).save(tmp_path / "profile.json")
    common = (tmp_path / "profile.json", "--by", "snip", "--top", 2, "--to")
    settings = json.loads(run(*common, "peft"))
    patterns = re.findall(r'"(.*)"', run(*common, "axolotl"))
    heads = ("classifier.", "lm_head.")
    unfrozen = {place for place in unfrozen_by_axolotl(model, patterns) if place.startswith(heads)}
    if name == "language model":
        assert "modules_to_save" not in settings and not unfrozen
    else:
        assert settings["modules_to_save"] == ["classifier"]
        assert unfrozen == {place for place, _ in model.named_parameters() if place.startswith("classifier.")}


def test_a_ranking_needs_to_be_told_how_many():
    model = llama()
    ids = torch.randint(40, (2, 8), generator=torch.Generator().manual_seed(0))
    profile = zest_fast.profile(model, {"input_ids": ids, "labels": ids}, metrics=["snip"])
    ranking = zest_fast.rank(profile, by="snip")
    for call in (axolotl, llama_factory, lambda layers: lora_config(layers, model), ZestCallback):
        with pytest.raises(ValueError, match="layers is a Ranking of every layer: say how many to take with n="):
            call(ranking)
        with pytest.raises(TypeError, match="layers is a LayerProfile with every layer"):
            call(profile)
        with pytest.raises(TypeError, match="such as"):
            call("lm_head")
    assert ZestCallback(ranking, n=2).layers == ranking.top(2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lora_config(["rnn.weight_ih_l0"], Recurrent(), head=None), ValueError, "not rnn.weight_ih_l0"),
        (lambda: lora_config(CHOSEN, llama(), ranks={"lm_head": 4}), ValueError, "ranks names layers that are not"),
        (lambda: lora_config(["model.layers.1.mlp.up"], llama()), ValueError, "no layer 'model.layers.1.mlp.up'"),
        (lambda: axolotl(["model.layers.1.mlp.up"], llama()), ValueError, "nearest: 'model.layers.1.mlp.up_proj'"),
        (lambda: axolotl([]), ValueError, "layers is empty"),
        (lambda: axolotl("lm_head"), TypeError, "such as ['lm_head']"),
        (lambda: axolotl(CHOSEN, n=2), ValueError, "n is for a Ranking"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


# From the shell


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    model = llama()
    ids = torch.randint(40, (2, 8), generator=torch.Generator().manual_seed(0))
    profile = zest_fast.profile(model, {"input_ids": ids, "labels": ids}, metrics=["snip"])
    profile.save(folder / "profile.json")
    model.save_pretrained(folder / "model")
    return folder, zest_fast.rank(profile, by="snip").top(2)


def run(*arguments):
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_writes_what_the_functions_return(saved):
    folder, top = saved
    common = (folder / "profile.json", "--by", "snip", "--top", 2, "--to")
    assert run(*common, "axolotl") == as_yaml(axolotl(top))
    assert run(*common, "llama-factory", "--r", 4) == as_yaml(llama_factory(top, r=4))
    assert json.loads(run(*common, "peft"))["target_modules"] == list(top)
    checked = run(*common, "axolotl", "--model", folder / "model")
    assert checked == as_yaml(axolotl(top, llama()))
    assert checked.startswith("unfrozen_parameters:\n") and all(f'  - "^{name}.weight$"\n' in checked for name in top)
    run(*common, "peft", "--model", folder / "model", "--out", folder / "adapter_config.json")
    assert json.loads((folder / "adapter_config.json").read_text())["target_modules"] == sorted(top)


def test_the_command_names_an_unknown_target(saved):
    folder, _ = saved
    result = CliRunner().invoke(app, ["export", str(folder / "profile.json"), "--to", "axolotle"])
    assert result.exit_code == 2 and "nearest: 'axolotl'" in result.output


# What else PEFT has


def ranked(model):
    ids = torch.randint(40, (2, 8), generator=torch.Generator().manual_seed(0))
    return zest_fast.rank(zest_fast.profile(model, {"input_ids": ids, "labels": ids}, metrics=["snip"]), by="snip")


def test_ranks_go_by_the_score_and_every_adapter_counts_alike():
    model = llama()
    ranking = ranked(model)
    config = lora_config(ranking, model, n=4, r=6, ranks="score", lora_alpha=12)
    layers = adapted_by_peft(model, config)
    ranks = [layers[name].r["default"] for name in ranking.top(4)]
    assert ranks == sorted(ranks, reverse=True) and ranks[0] == pytest.approx(2 * ranks[-1], abs=1)
    assert sum(ranks) == pytest.approx(4 * 6, abs=2)
    assert {layer.scaling["default"] for layer in layers.values()} == {2.0}
    with pytest.raises(ValueError, match="ranks='score' needs a Ranking"):
        lora_config(CHOSEN, llama(), ranks="score")


@pytest.mark.parametrize("mask", ["random", "magnitude"])
def test_shira_trains_single_weights_of_these_layers(mask):
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = get_peft_model(model, shira_config(CHOSEN, model, r=1, mask=mask))
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    weights = {name: before[f"{name}.weight"] for name in CHOSEN}
    assert sum(map(len, trained)) == sum(sum(weight.shape) for weight in weights.values())
    ids = torch.randint(40, (2, 8), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(trained, lr=1.0)
    wrapped(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    merged = wrapped.merge_and_unload().state_dict()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, merged[name])}
    assert moved == {f"{name}.weight" for name in CHOSEN}
    if mask == "magnitude":
        for name, weight in weights.items():
            changed = weight.abs()[merged[f"{name}.weight"] != weight]
            assert (
                len(changed) and changed.min() >= weight.abs().flatten().sort(descending=True)[0][sum(weight.shape) - 1]
            )


def test_shira_names_what_it_cannot_adapt():
    with pytest.raises(
        ValueError, match=r"r=32: of 'model\.layers\.1\.mlp\.down_proj', which is 16 x 24, 1,280 weights"
    ):
        shira_config(CHOSEN, llama(), r=32)
    with pytest.raises(ValueError, match="mask='largest' is unknown"):
        shira_config(CHOSEN, llama(), mask="largest")
    with pytest.raises(ValueError, match=r"SHiRA adapts nn\.Linear, not rnn"):
        shira_config(["rnn.weight_ih_l0"], Recurrent(), head=None)


def test_a_selector_answers_as_the_one_of_peft_does():
    model = llama()
    ranking = ranked(model)
    selector = ZestSelector(model, ranking)
    best = selector.get_best_targets()
    assert best == [name for name in ranking.names if name != "lm_head"]
    assert selector.get_best_targets(num_modules=3) == list(ranking.top(3)) == selector.get_best_targets(0.1, 3)
    assert selector.get_best_targets(top_p=0.1) == best[:2] and selector.get_best_targets(top_p=0.001) == best[:1]
    fourth = ranking.scores[ranking.names.index(best[3])]
    assert selector.get_best_targets(threshold=fourth) == best[:4]
    kappa = peft.helpers.KappaTuneSelector if hasattr(peft.helpers, "KappaTuneSelector") else None
    for name in ("get_best_targets", "get_best_target_parameters"):
        ours = inspect.signature(getattr(selector, name)).parameters
        assert kappa is None or list(ours) == list(inspect.signature(getattr(kappa, name)).parameters)[1:]
    for arguments, message in (({"top_p": 2}, "top_p=2: expected a share"), ({"num_modules": 0}, "num_modules=0")):
        with pytest.raises(ValueError, match=message):
            selector.get_best_targets(**arguments)
    assert adapted_by_peft(llama(), peft.LoraConfig(target_modules=best[:3])).keys() == set(best[:3])


def test_a_selector_has_the_weights_of_fused_experts():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.MixtralConfig(vocab_size=40, num_key_value_heads=2, num_local_experts=2, **sizes)
    model = transformers.MixtralForCausalLM(config)
    selector = ZestSelector(model, ranked(model))
    experts = selector.get_best_target_parameters()
    assert len(experts) == 4 and all(model.get_parameter(name).dim() == 3 for name in experts)
    assert not set(experts) & set(selector.get_best_targets())


def test_a_selector_refuses_ends_of_other_names():
    model = Nested()
    profile = zest_fast.profile(model, (torch.randn(6, 4), torch.randint(2, (6,))), metrics=["snip"])
    scores = [float(name == "block.0") for name in profile.names]
    with pytest.raises(ValueError, match=r"would bring in outer\.block\.0; lora_config"):
        ZestSelector(model, zest_fast.Ranking(profile, scores, by="mine")).get_best_targets(num_modules=1)


def test_lora_alpha_is_the_rank_in_every_exporter(saved):
    model, folder = llama(), saved[0]
    settings = (
        axolotl_lora(CHOSEN, model, r=4),
        llama_factory(CHOSEN, model, r=4),
        lora_config(CHOSEN, model, r=4).to_dict(),
    )
    assert {found["lora_alpha"] for found in settings} == {4}
    common = (folder / "profile.json", "--by", "snip", "--top", 2, "--r", 4, "--to")
    assert json.loads(run(*common, "peft"))["lora_alpha"] == 4
    assert all("lora_alpha: 4\n" in run(*common, target) for target in ("axolotl-lora", "llama-factory"))


def test_axolotl_gets_one_pattern_where_names_end_alike():
    assert axolotl_lora(["block.0"], Nested(), head=None)["lora_target_modules"] == r"block\.0"
    with pytest.raises(ValueError, match="all of them are in the head, head, which trains whole"):
        axolotl_lora(["head"], Nested())


@pytest.mark.parametrize("use_rslora", [False, True])
def test_adapters_of_another_rank_have_the_factor_of_the_rest(use_rslora):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    config = lora_config(["0", "1"], model, r=2, ranks={"1": 8}, lora_alpha=6, head=None, use_rslora=use_rslora)
    adapted = [module for module in get_peft_model(model, config).modules() if isinstance(module, LoraLayer)]
    assert [module.r["default"] for module in adapted] == [2, 8]
    assert adapted[0].scaling["default"] == pytest.approx(adapted[1].scaling["default"])


def test_layers_that_torch_does_not_call_get_no_adapter():
    """An adapter there does nothing: in nn.MultiheadAttention at all, in an encoder layer on its fast path."""
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(40, 3))
    idle = ["0.self_attn.out_proj", "0.linear2"]
    for configure in (lora_config, shira_config):
        for name in idle:
            with pytest.raises(ValueError, match=f"take the weights of {re.escape(name)} and do not call them"):
                configure([name], model, head=None, r=1)
    selector = ZestSelector(model, (torch.randn(4, 5, 8), torch.randint(3, (4,))))
    assert set(idle) < set(selector.ranking.names)
    assert selector.get_best_targets() == []
