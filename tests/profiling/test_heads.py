import pytest
import torch
from torch import nn

from zest_fast.profiling.heads import find_head, is_language_model

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}


class TinyLanguageModel(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(11, 4), nn.Linear(4, 4), nn.Linear(4, 11, bias=False)
        if tied:
            self.out.weight = self.embed.weight


def bert(kind, **config):
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, f"Bert{kind}")(transformers.BertConfig(**TINY, **config))


def llama(kind="ForCausalLM", **config):
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, f"Llama{kind}")(transformers.LlamaConfig(**TINY, **config))


def test_plain_classifier():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4)))
    assert find_head(model) == "2.0"
    assert not is_language_model(model)
    assert find_head(nn.DataParallel(model)) == "module.2.0"


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.ReLU()])
def test_models_of_one_layer_or_none(model):
    assert find_head(model) == ("" if isinstance(model, nn.Linear) else None)


def test_plain_model_whose_last_layer_is_no_linear():
    with pytest.raises(ValueError, match=r"cannot tell .*Conv2d, not an nn\.Linear; pass head="):
        find_head(nn.Sequential(nn.Linear(2, 2), nn.Conv2d(1, 1, 1)))


@pytest.mark.parametrize("tied", [False, True])
def test_plain_language_model(tied):
    assert find_head(TinyLanguageModel(tied)) == "out"
    assert is_language_model(TinyLanguageModel(tied))


@pytest.mark.parametrize(
    ("kind", "head", "language_model"),
    [
        ("ForSequenceClassification", "classifier", False),
        ("ForTokenClassification", "classifier", False),
        ("ForMaskedLM", "cls.predictions.decoder", True),
    ],
)
def test_bert(kind, head, language_model):
    model = bert(kind, num_labels=3)
    assert find_head(model) == head
    assert is_language_model(model) is language_model


@pytest.mark.parametrize("kind", ["Model", "ForQuestionAnswering"])
def test_bert_without_a_head_that_could_be_told(kind):
    assert not is_language_model(bert(kind))
    with pytest.raises(ValueError, match=f"cannot tell .*Bert{kind}.*pass head="):
        find_head(bert(kind))


def test_classifier_with_as_many_labels_as_tokens_is_no_language_model():
    assert not is_language_model(bert("ForSequenceClassification", num_labels=40))


@pytest.mark.parametrize("tied", [False, True])
def test_llama(tied):
    model = llama(tie_word_embeddings=tied)
    assert find_head(model) == "lm_head" and is_language_model(model)


def test_peft_names_are_those_of_the_wrapped_model():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2)  # keeps a trained copy of the head
    model = peft.get_peft_model(bert("ForSequenceClassification", num_labels=3), config)
    assert find_head(model) == "base_model.model.classifier.modules_to_save.default"
    model = peft.get_peft_model(
        llama(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"], r=2)
    )
    assert is_language_model(model)
    assert find_head(model) == "base_model.model.lm_head.base_layer"


def test_lora_on_the_classifier_is_not_taken_for_the_head():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0", "2"], r=2))
    assert find_head(wrapped) == "base_model.model.2.base_layer"


def test_compiled_model_keeps_its_outer_names():
    assert find_head(torch.compile(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3)))) == "_orig_mod.1"
