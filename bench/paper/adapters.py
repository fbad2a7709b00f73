"""What turns the samples of a data set into batches of a model, and a model into accuracies."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from bench.paper.likelihood import accuracy, encode, log_likelihoods, training_batch
from bench.paper.tasks import Item, Labelled
from zest_fast.integrations.data.images import DEFAULT_IMAGE_SIZE, IMAGENET_MEAN, IMAGENET_STD
from zest_fast.integrations.pretrained import LoadedModel

TASKS = {"choice": "causal-lm", "text": "text-classification", "image": "image-classification"}
LONGEST = 512  # tokens, as in the paper's Table 4


class Adapter(Protocol):
    def batch(self, samples: Sequence[Any]) -> dict[str, torch.Tensor]:
        """What `model(**batch)` takes, labels included."""

    def evaluate(self, model: Any, samples: Sequence[Any], batch_size: int) -> dict[str, float]:
        """Accuracies of a model in eval mode."""


def adapter_of(kind: str, loaded: LoadedModel, image_size: int | None) -> Adapter:
    if kind == "image":
        return Classifier(_Images(loaded.processor, image_size))
    if loaded.processor is None:
        raise ValueError(f"model {loaded.source!r} has no tokenizer; use a folder or a hub id that has one")
    positions = getattr(loaded.model.config, "max_position_embeddings", None) or LONGEST
    longest = min(LONGEST, positions, loaded.processor.model_max_length)
    return Choices(loaded.processor, longest) if kind == "choice" else Classifier(_Texts(loaded, longest))


class Choices:
    """A language model that continues the question by its right answer."""

    def __init__(self, tokenizer: Any, longest: int) -> None:
        self._tokenizer, self._longest = tokenizer, longest

    def batch(self, samples: Sequence[Item]) -> dict[str, torch.Tensor]:
        answers = [encode(self._tokenizer, i.context, i.choices[i.answer], self._longest) for i in samples]
        return training_batch(answers, self._tokenizer.pad_token_id)

    def evaluate(self, model: Any, samples: Sequence[Item], batch_size: int) -> dict[str, float]:
        texts = [encode(self._tokenizer, i.context, choice, self._longest) for i in samples for choice in i.choices]
        return accuracy(samples, log_likelihoods(model, texts, batch_size, self._tokenizer.pad_token_id))


class Classifier:
    """A model with an output for each class."""

    def __init__(self, inputs: Any) -> None:
        self._inputs = inputs

    def batch(self, samples: Sequence[Labelled]) -> dict[str, torch.Tensor]:
        labels = torch.tensor([sample.label for sample in samples])
        return {**self._inputs([sample.sample for sample in samples]), "labels": labels}

    @torch.no_grad()
    def evaluate(self, model: Any, samples: Sequence[Labelled], batch_size: int) -> dict[str, float]:
        device, right = next(model.parameters()).device, 0
        for start in range(0, len(samples), batch_size):
            batch = {k: v.to(device) for k, v in self.batch(samples[start : start + batch_size]).items()}
            right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
        return {"accuracy": right / len(samples)}


class _Texts:
    def __init__(self, loaded: LoadedModel, longest: int) -> None:
        self._tokenizer, self._longest = loaded.processor, longest

    def __call__(self, texts: Sequence[tuple[str, ...]]) -> dict[str, torch.Tensor]:
        columns = [list(column) for column in zip(*texts, strict=True)]  # one, or two that are compared
        encoded = self._tokenizer(
            *columns, padding=True, truncation=True, max_length=self._longest, return_tensors="pt"
        )
        return dict(encoded)


class _Images:
    """By the model's image processor; without one, or for another size, resized and normalised as for ImageNet."""

    def __init__(self, processor: Any, size: int | None) -> None:
        self._processor = processor if size is None else None
        self._size = size or DEFAULT_IMAGE_SIZE

    def __call__(self, images: Sequence[Any]) -> dict[str, torch.Tensor]:
        opened = [_opened(image) for image in images]
        if self._processor is not None:
            return {"pixel_values": self._processor(images=opened, return_tensors="pt")["pixel_values"]}
        mean, deviation = (torch.tensor(channel).view(3, 1, 1) for channel in (IMAGENET_MEAN, IMAGENET_STD))
        pixels = [torch.frombuffer(bytearray(i.resize((self._size,) * 2).tobytes()), dtype=torch.uint8) for i in opened]
        scaled = torch.stack(pixels).view(-1, self._size, self._size, 3).permute(0, 3, 1, 2) / 255
        return {"pixel_values": (scaled - mean) / deviation}


def _opened(image: Any) -> Any:
    """RGB: from Pillow's own, a path, or what a Parquet file of the hub holds."""
    from PIL import Image

    if isinstance(image, dict):
        image = io.BytesIO(image["bytes"])
    if isinstance(image, str | Path | io.BytesIO):
        image = Image.open(image)
    return image.convert("RGB")
