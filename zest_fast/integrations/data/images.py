"""Folders of images with one sub-folder for each class, and the batches made of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zest_fast.foundation.documents import check_regular
from zest_fast.integrations.pretrained import LoadedModel

# The usual channel statistics of ImageNet, for images scaled to 0..1.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DEFAULT_IMAGE_SIZE = 224

_MOST_PIXELS = 89_478_485  # where Pillow begins to warn: 256 MiB of colours
# By content, whatever the ending says: a "PNG" that is an EPS would be run by Ghostscript.
_IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
_IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


@dataclass(frozen=True)
class ImageFolder:
    path: Path
    files: list[Path]
    labels: list[str]  #: the name of each file's sub-folder
    validation: ImageFolder | None = None  #: the part that scores; None = to be split off


def open_images(path: Path) -> ImageFolder:
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


def image_collate(loaded: LoadedModel, image_size: int | None) -> Callable[[list[tuple[Path, int]]], Any]:
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
                if image.mode.startswith(("I", "F")):  # of which conversion keeps nothing above 255
                    raise ValueError(f"it has more than 8 bits a colour (Pillow calls it {image.mode}); save it with 8")
                if width * height <= _MOST_PIXELS:
                    return image.convert("RGB")
    except Exception as error:  # of a torn or unknown file Pillow's readers raise nearly anything
        raise ValueError(f"image {file} cannot be read: {error}") from error
    raise ValueError(f"image {file} has {width} x {height} pixels, more than {_MOST_PIXELS:,}; make it smaller")
