"""The user's data from a string: a table of texts, a folder of images, or `module:function` that makes DataLoaders.

Reading (`open_data`) comes before the model is loaded, since a fresh head needs the class names; batches
(`make_loaders`) come after it, since they need the model's tokenizer or image processor.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from zest_fast.foundation.documents import check_regular
from zest_fast.foundation.nearest import nearest, some
from zest_fast.integrations.pretrained import LoadedModel
from zest_fast.integrations.references import is_reference, load_function, nearest_path
from zest_fast.integrations.tables import Table, read_table

# The usual channel statistics of ImageNet, for images scaled to 0..1.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DEFAULT_IMAGE_SIZE = 224

_MOST_PIXELS = 89_478_485  # where Pillow begins to warn: 256 MiB of colours
# By content, whatever the ending says: a "PNG" that is an EPS would be run by Ghostscript.
_IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
_IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_LOOKED_AT = 64  # texts whose tokens are counted
IGNORED = -100  #: the target that cross-entropy leaves out


@dataclass(frozen=True)
class ImageFolder:
    path: Path
    files: list[Path]
    labels: list[str]  #: the name of each file's sub-folder


@dataclass(frozen=True)
class Loaders:
    """Batches: mappings with "labels" for transformers models, pairs (inputs, targets) otherwise."""

    train: DataLoader[Any]
    validation: DataLoader[Any] | None  #: None: none was asked for, or the user's function returned none
    notes: tuple[str, ...] = ()  #: what is strange in the data and the user should know, a sentence each


def open_data(source: str) -> Table | ImageFolder | Loaders:
    """Reads what `source` names; ValueError or TypeError in one line with the nearest valid value.

    source: a .jsonl, .ndjson, .csv, .tsv or .parquet file; a folder with one sub-folder of images for each class; or
        `module:function`, whose function returns a DataLoader or a pair of them (training, validation).
    """
    if is_reference(source):
        return _user_loaders(source, load_function(source)())
    path = Path(source)
    if not path.exists():
        raise ValueError(f"data {source!r} does not exist; {nearest_path(path)}")
    return _open_images(path) if path.is_dir() else read_table(path)


def digest_of_data(source: str) -> str | None:
    """Of what a table holds, or of the names and sizes of images; None for `module:function`, of which nobody knows.

    Raises ValueError as open_data does where there is no such file.
    """
    if is_reference(source):
        return None
    path = Path(source)
    if not path.exists():
        raise ValueError(f"data {source!r} does not exist; {nearest_path(path)}")
    state = hashlib.blake2b(digest_size=16)
    if path.is_dir():
        folder = _open_images(path)
        for file, label in zip(folder.files, folder.labels, strict=True):
            state.update(f"{label}/{file.name}|{file.stat().st_size}\n".encode(errors="surrogateescape"))
    else:
        check_regular(path)
        with open(path, "rb") as table:
            while block := table.read(1 << 20):
                state.update(block)
    return state.hexdigest()


def class_names(labels: Sequence[Any]) -> tuple[str, ...]:
    """The classes among `labels`, sorted: integers (also written as text) by value, everything else as text.

    ValueError where a label is a fraction (a target of regression) or a list (several labels at once): these are no
    classes.
    """
    names = set(label_names(labels))
    integers = all(name.removeprefix("-").isdecimal() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if integers else 0, name)))  # "01" before "1", always


def make_loaders(
    data: Table | ImageFolder | Loaders,
    loaded: LoadedModel,
    *,
    batch_size: int,
    validation_share: float = 0.0,
    seed: int = 0,
    text_column: str = "text",
    label_column: str | None = None,
    max_length: int | None = None,
    image_size: int | None = None,
    same_length: bool = False,
) -> Loaders:
    """Batches of `data` for the model, shuffled and split by `seed`; DataLoaders of the user pass through as they are.

    label_column: the classes of a table of texts; None = texts alone, for a causal LM (labels are the input_ids,
        padding -100).
    max_length: tokens kept of a text; None = what the tokenizer and the model's positions allow.
    same_length: pad every text to the tokens of the longest, so that a sample is the same in every batch.
    image_size: pixels of both sides of an image, then scaled to 0..1 and normalised with ImageNet's mean and deviation;
        None = the model's image processor, or where it has none the size in its configuration, or 224.
    """
    if isinstance(data, Loaders):
        return data
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size}: it has to be 1 or more")
    notes: list[str] = []
    if isinstance(data, ImageFolder):
        examples: Any = list(zip(data.files, encode_labels(data.labels, loaded.class_names), strict=True))
        collate = _image_collate(loaded, image_size)
    else:
        texts = _texts(data, text_column)
        length = _longest_of(texts, loaded, max_length) if same_length else None
        collate = _text_collate(loaded, max_length, length, labelled=label_column is not None)
        notes += [f"texts are padded to {length} tokens, as many as the longest has"] if same_length else []
        labels = [IGNORED] * len(texts)
        if label_column is not None:
            labels = encode_labels(data.column(label_column), loaded.class_names)
            notes += _strange_classes(label_names(data.column(label_column)))
        notes += _unknown_words(texts, loaded.processor)
        examples = list(zip(texts, labels, strict=True))
    train, validation = _split(examples, validation_share, seed)
    shuffle = torch.Generator().manual_seed(seed)
    return Loaders(
        DataLoader(train, batch_size, shuffle=True, generator=shuffle, collate_fn=collate),
        DataLoader(validation, batch_size, collate_fn=collate) if len(validation) else None,
        tuple(notes),
    )


def _strange_classes(labels: list[str]) -> list[str]:
    """Classes that differ in blanks or capitals alone, and more classes than can be learnt from so many rows."""
    notes = []
    counts = Counter(labels)
    alike: dict[str, list[str]] = {}
    for name in sorted(counts):
        alike.setdefault(name.strip().casefold(), []).append(name)
    if pairs := [" and ".join(map(repr, names)) for names in alike.values() if len(names) > 1]:
        notes.append(f"labels that differ in blanks or capitals alone are classes of their own: {some(pairs)}")
    single = [name for name, count in counts.items() if count == 1]
    if len(single) > len(counts) / 2 and len(counts) > 10:
        notes.append(
            f"{len(single)} of the {len(counts)} classes have a single row: are these labels classes, and in the right "
            "column?"
        )
    return notes


def _unknown_words(texts: list[str], tokenizer: Any) -> list[str]:
    """A note where most tokens of the first texts are unknown: they say nothing, and look all alike to the model."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or not callable(tokenizer):
        return []
    ids = [token for text in texts[:_LOOKED_AT] for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    share = ids.count(unknown) / max(len(ids), 1)
    return [f"{share:.0%} of the tokens are unknown to the tokenizer: is it for this language?"] if share > 0.5 else []


def _texts(data: Table, column: str) -> list[str]:
    values = data.column(column)
    for place, value in zip(data.places, values, strict=True):
        if not isinstance(value, str | int | float):
            raise ValueError(
                f"{data.path}, {place}: column {column!r} holds a {type(value).__name__}, not a text; name the column "
                "of texts, or join its parts into one"
            )
        if isinstance(value, str) and not value.strip():
            raise ValueError(f"{data.path}, {place}: column {column!r} is empty")
    return [str(value) for value in values]


def encode_labels(labels: Sequence[Any], names: Sequence[str] | None = None) -> list[int]:
    """Class ids: the position of each label among `names` (None = the sorted classes of `labels` themselves)."""
    ids = {name: index for index, name in enumerate(names or class_names(labels))}
    found = label_names(labels)
    for unknown in set(found) - set(ids):
        raise ValueError(f"label {unknown!r} is none of the model's classes; {nearest(unknown, ids)}")
    return [ids[name] for name in found]


def label_names(labels: Sequence[Any]) -> list[str]:
    """The labels as names of classes, one each: 1, 1.0 (Parquet of pandas, gaps in integers) and "1.0" (CSV) are "1".

    Text is taken for numbers only where all of it is numbers and one of them has a decimal point.
    """
    texts = [_label_name(label) for label in labels]
    if not any(isinstance(label, str) for label in labels) or not all(map(_NUMBER.fullmatch, texts)):
        return texts
    if not any("." in text or "e" in text.lower() for text in texts):
        return texts
    return [_whole(float(text), text) for text in texts]


_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")


_LIST = re.compile(r"\s*\[(|[^\]]*,.*|\s*[-+.\d]+\s*)\]\s*", re.DOTALL)  # as a CSV file holds one; "[spam]" is a name


def _label_name(label: Any) -> str:
    if isinstance(label, float):
        return _whole(label, str(label))
    if isinstance(label, list | tuple | dict | set) or (isinstance(label, str) and _LIST.fullmatch(label)):
        raise ValueError(
            f"label {_shortened(label)} holds several values: multi-label data is not supported yet; give each row one "
            "class, as an integer or a string, or pass data and model as module:function"
        )
    if not isinstance(label, str | int):
        raise ValueError(f"label {_shortened(label)} is a {type(label).__name__}; classes are integers or strings")
    return str(label)


def _whole(number: float, text: str) -> str:
    if not number.is_integer():
        raise ValueError(
            f"label {text} is a fraction: regression is not supported yet; classes are integers or strings (numbers "
            "that are names need a letter: 'v1.5')"
        )
    return str(int(number))


def _shortened(label: Any) -> str:
    text = repr(label)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _user_loaders(source: str, made: Any) -> Loaders:
    if isinstance(made, DataLoader):
        return Loaders(made, None)
    if isinstance(made, tuple) and len(made) == 2 and all(isinstance(loader, DataLoader) for loader in made):
        return Loaders(*made)
    raise TypeError(
        f"{source!r} returned {type(made).__name__}; it has to return a DataLoader or a pair of DataLoaders"
    )


def _open_images(path: Path) -> ImageFolder:
    files, labels = [], []
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        images = sorted(file for file in folder.iterdir() if file.suffix.lower() in _IMAGE_ENDINGS)
        if not images:
            raise ValueError(f"class folder {folder} holds no image ({', '.join(sorted(_IMAGE_ENDINGS))})")
        files += images
        labels += [folder.name] * len(images)
    if not files:
        raise ValueError(f"data folder {path} has no sub-folders; an image folder has one sub-folder for each class")
    return ImageFolder(path, files, labels)


def _split(examples: list[Any], share: float, seed: int) -> tuple[Subset[Any], Subset[Any]]:
    if not 0.0 <= share < 1.0:
        raise ValueError(f"validation share {share}: it has to be at least 0 and below 1")
    held_out = round(len(examples) * share)
    if share > 0 and not 0 < held_out < len(examples):
        raise ValueError(f"{len(examples)} examples are too few for a validation share of {share}")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    return Subset(examples, order[held_out:]), Subset(examples, order[:held_out])  # type: ignore[arg-type]


Collate = Callable[[list[tuple[Any, int]]], Any]


def _text_collate(loaded: LoadedModel, max_length: int | None, length: int | None = None, *, labelled: bool) -> Collate:
    """length: to pad to; None = to the longest of each batch."""
    tokenizer = loaded.processor
    if tokenizer is None or not callable(getattr(tokenizer, "tokenize", None)):
        raise ValueError(
            f"texts need a tokenizer and {loaded.source!r} has none; use a folder with one, or data as module:function"
        )
    accepted = inspect.signature(loaded.model.forward).parameters
    embedding = loaded.model.get_input_embeddings()  # type: ignore[operator]
    vocabulary = getattr(embedding, "num_embeddings", math.inf)
    longest = _longest(loaded)
    if max_length is not None and max_length > longest:
        raise ValueError(f"max length {max_length}: {loaded.source!r} takes {longest} tokens at most")
    padding: dict[str, Any] = {"padding": True, "truncation": True, "max_length": max_length or longest}
    if length is not None:
        padding |= {"padding": "max_length", "max_length": length}

    def collate(examples: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
        texts, labels = zip(*examples, strict=True)
        encoded = tokenizer(list(texts), return_tensors="pt", **padding)
        if encoded["input_ids"].max() >= vocabulary:
            unknown = tokenizer.convert_ids_to_tokens(int(encoded["input_ids"].max()))
            raise ValueError(
                f"token {unknown!r} is beyond the {vocabulary} that {loaded.source!r} embeds; wrong tokenizer?"
            )
        batch = {name: tensor for name, tensor in encoded.items() if name in accepted}
        if labelled:
            batch["labels"] = torch.tensor(labels)
        else:
            batch["labels"] = batch["input_ids"].masked_fill(encoded["attention_mask"] == 0, IGNORED)
        return batch

    return collate


def _longest_of(texts: Sequence[str], loaded: LoadedModel, max_length: int | None) -> int:
    """Tokens of the longest of these texts, as far as they are taken."""
    if loaded.processor is None or not texts:
        return max_length or 1
    limit = min(max_length or _longest(loaded), _longest(loaded))
    return max(len(ids) for ids in loaded.processor(list(texts), truncation=True, max_length=limit)["input_ids"])


def _longest(loaded: LoadedModel) -> int:
    """Tokens that both tokenizer and positions can take (a tokenizer that knows no limit says 1e30)."""
    positions = getattr(loaded.model.config, "max_position_embeddings", None) or 512
    return min(loaded.processor.model_max_length, positions)  # type: ignore[union-attr]


def _image_collate(loaded: LoadedModel, image_size: int | None) -> Collate:
    image_module = _pillow()
    processor = loaded.processor if image_size is None else None
    size = image_size or _size_of_model(loaded.model) or DEFAULT_IMAGE_SIZE
    mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1)

    def simple(images: list[Any]) -> torch.Tensor:
        resized = [image.resize((size, size), image_module.Resampling.BILINEAR) for image in images]
        pixels = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in resized]
        scaled = torch.stack(pixels).view(-1, size, size, 3).permute(0, 3, 1, 2) / 255
        return (scaled - mean) / std

    def collate(examples: list[tuple[Path, int]]) -> Any:
        files, labels = zip(*examples, strict=True)
        images = [_read_image(file, image_module) for file in files]
        pixels = _processed(images, processor, loaded.source) if processor else simple(images)
        targets = torch.tensor(labels)
        return (pixels, targets) if loaded.task is None else {"pixel_values": pixels, "labels": targets}

    return collate


def _size_of_model(model: Any) -> int | None:
    """Pixels of both sides as its configuration says it; None where it does not, or where they differ."""
    size = getattr(getattr(model, "config", None), "image_size", None)
    if isinstance(size, list | tuple) and len(set(size)) == 1:
        size = size[0]
    return size if type(size) is int and size > 0 else None


def _processed(images: list[Any], processor: Any, source: str) -> torch.Tensor:
    try:
        return processor(images=images, return_tensors="pt")["pixel_values"]
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the image processor of {source!r} cannot stack these images ({reason}); pass image_size"
        ) from error


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("an image folder needs Pillow: pip install pillow") from error
    return Image


def _read_image(file: Path, image_module: Any) -> Any:
    check_regular(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", image_module.DecompressionBombWarning)  # an error below
            with image_module.open(file, formats=_IMAGE_FORMATS) as image:
                width, height = image.size
                if width * height <= _MOST_PIXELS:
                    return image.convert("RGB")
    except Exception as error:  # of a torn or unknown file Pillow's readers raise nearly anything
        raise ValueError(f"image {file} cannot be read: {error}") from error
    raise ValueError(f"image {file} has {width} x {height} pixels, more than {_MOST_PIXELS:,}; make it smaller")
