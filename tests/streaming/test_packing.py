"""Packed folders: the bits of SelectiveBackward(frozen=...), written whole or not at all, and their source."""

from __future__ import annotations

import errno
import io
import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from streamed_models import LAYERS, resident, save_llama, tokens

from zest_fast import SelectiveBackward, open_streamed, pack
from zest_fast.finetuning.quantised_formats import FORMATS
from zest_fast.finetuning.quantised_weights import QuantisedLinear
from zest_fast.streaming import opening, shard_writer
from zest_fast.streaming.packing import packed_shapes

pytestmark = [pytest.mark.usefixtures("one_thread")]


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    monkeypatch.setattr(opening, "SMALL", 0)


@pytest.fixture(params=["int8", "nf4"])
def kind(request):
    if request.param == "nf4":
        pytest.importorskip("bitsandbytes")
    return request.param


@pytest.fixture
def folder(tmp_path):
    return save_llama(tmp_path / "llama", torch.bfloat16)


@pytest.mark.parametrize("shape", [(5, 7), (3, 96), (64, 48), (1, 1)])
def test_shapes_are_those_of_the_formats(kind, shape):
    for name, tensor in zip(("packed", "scale"), FORMATS[kind].pack(torch.randn(shape)), strict=True):
        assert packed_shapes(kind, shape)[name] == (tensor.dtype, tuple(tensor.shape))


def test_packed_bits_are_those_of_selective_backward(folder, kind, tmp_path):
    model = open_streamed(pack(folder, tmp_path / "packed", frozen=kind))
    plain = resident(folder)
    SelectiveBackward(plain, [], head="lm_head", frozen=kind)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    for (name, found), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert found.dtype == expected.dtype and torch.equal(found, expected), name
    assert torch.equal(model(**tokens()).logits, plain(**tokens()).logits)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    sizes = [sum(file.stat().st_size for file in one.glob("*.safetensors")) for one in (folder, tmp_path / "packed")]
    assert sizes[1] < sizes[0]


def test_layers_that_train_come_from_the_source(folder, kind, tmp_path):
    packed = pack(folder, tmp_path / "packed", frozen=kind)
    model = open_streamed(packed, train=LAYERS)
    for name in LAYERS:
        assert type(model.get_submodule(name)) is torch.nn.Linear
        assert torch.equal(model.get_submodule(name).weight, resident(folder).get_submodule(name).weight)
    (tmp_path / "llama").rename(tmp_path / "elsewhere")
    assert isinstance(open_streamed(packed).get_submodule(LAYERS[0]), QuantisedLinear)  # nothing trains
    with pytest.raises(
        ValueError, match=r"layers that train are read from '.*llama', which it was packed from: .*missing"
    ):
        open_streamed(packed, train=LAYERS)
    (tmp_path / "elsewhere").rename(tmp_path / "llama")
    (tmp_path / "packed").rename(tmp_path / "moved")
    open_streamed(tmp_path / "moved", train=LAYERS)


def test_a_source_that_has_changed_is_refused(folder, kind, tmp_path):
    packed = pack(folder, tmp_path / "packed", frozen=kind)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"][LAYERS[0] + ".weight"]
    tensors = load_file(path)
    tensors[LAYERS[0] + ".weight"][0, 0] += 1
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"'{LAYERS[0]}\.weight' in '.*{path.name}' is not the weight that"):
        open_streamed(packed, train=LAYERS)
    save_file({**tensors, "more": torch.ones(3)}, path)
    with pytest.raises(ValueError, match=r"bytes, and had .* when .* was packed from it"):
        open_streamed(packed, train=LAYERS)


def test_a_packed_file_that_has_changed_is_refused(folder, kind, tmp_path):
    packed = pack(folder, tmp_path / "packed", frozen=kind)
    path = sorted(packed.glob("*.safetensors"))[1]
    contents = path.read_bytes()
    path.write_bytes(contents[:-1])
    with pytest.raises(ValueError, match=rf"{path.name}' has .* bytes, and had .* when it was packed"):
        open_streamed(packed)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path.name}' is missing"):
        open_streamed(packed)
    path.write_bytes(contents)
    document = packed / "zest_fast.json"
    found = json.loads(document.read_text())
    for change, message in (
        ({"frozen": "int8" if kind == "nf4" else "nf4"}, "is needed in"),
        (
            {"layers": {"model.layers.9.mlp.up_proj": found["layers"][LAYERS[0]]}},
            r"which is no nn\.Linear there; nearest",
        ),
        (
            {"layers": {LAYERS[0]: {**found["layers"][LAYERS[0]], "shape": [3, 4]}}},
            r"has shape \[3, 4\], and \[172, 64\]",
        ),
        ({"layers": {LAYERS[0]: {**found["layers"][LAYERS[0]], "file": "other"}}}, "'other' is none of the source"),
        ({"layers": {LAYERS[0]: {}}}, "it is not there"),
        ({"files": {"../x": 3}}, "would lie outside"),
    ):
        document.write_text(json.dumps({**found, **change}))
        with pytest.raises(ValueError, match=message):
            open_streamed(packed)


def test_names_files_and_document(folder, kind, tmp_path):
    (folder / "tokenizer.json").write_text("{}")
    packed = pack(folder, tmp_path / "packed", frozen=kind)
    names = {path.name for path in packed.iterdir()}
    assert {"config.json", "tokenizer.json", "zest_fast.json"} < names
    assert "model.safetensors.index.json" not in names  # or transformers would take it for a model
    assert (packed / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    found = json.loads((packed / "zest_fast.json").read_text())
    assert (found["format"], found["version"], found["frozen"]) == ("zest_fast.packed", 1, kind)
    assert len(found["layers"]) == 28 and found["layers"][LAYERS[0]]["shape"] == [172, 64]
    assert found["source"]["folder"] == str(folder)
    assert list(tmp_path.glob(".*")) == []


# What is refused, and what is left behind: nothing


def test_refusals(folder, tmp_path):
    out = tmp_path / "packed"
    with pytest.raises(ValueError, match="frozen='int4' is unknown; 'int8', 'nf4' are there"):
        pack(folder, out, frozen="int4")
    pack(folder, out, frozen="int8")
    with pytest.raises(FileExistsError, match="it is there already; name a new folder") as caught:
        pack(folder, out, frozen="int8")
    assert str(out) in str(caught.value)
    with pytest.raises(ValueError, match="is packed already; name the folder that it was packed from"):
        pack(out, tmp_path / "twice", frozen="int8")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        pack(folder, tmp_path / "no" / "folder", frozen="int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "packed"]


def test_weights_that_cannot_be_packed(folder, tmp_path):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"][LAYERS[0] + ".weight"]
    tensors = load_file(path)
    for value, message in (
        (torch.full((172, 64), torch.inf), rf"'{LAYERS[0]}\.weight' holds weights that are not finite"),
        (torch.ones(3, 64), r"has shape \[3, 64\], and \[172, 64\] by its config\.json"),
    ):
        save_file({**tensors, LAYERS[0] + ".weight": value}, path)
        with pytest.raises(ValueError, match=message):
            pack(folder, tmp_path / "packed", frozen="int8")
        assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_without_the_library(folder, tmp_path, monkeypatch):
    packed = pack(folder, tmp_path / "packed", frozen="nf4") if "bitsandbytes" in sys.modules else None
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"pip install 'zest_fast\[quant\]'"):
        pack(folder, tmp_path / "other", frozen="nf4")
    if packed is not None:
        with pytest.raises(ImportError, match=r"pip install 'zest_fast\[quant\]'"):
            open_streamed(packed)


class FullDisk(io.FileIO):
    """A file like all of its kind, which take so many writes together."""

    left = 0
    error: BaseException

    def write(self, contents):
        FullDisk.left -= 1
        if FullDisk.left < 0:
            raise FullDisk.error
        return super().write(contents)


@pytest.mark.parametrize("writes", [0, 1, 10, 60])
@pytest.mark.parametrize("kind_of_error", [OSError, KeyboardInterrupt])
def test_a_full_disk_and_an_interrupt_leave_nothing(folder, tmp_path, monkeypatch, writes, kind_of_error):
    FullDisk.left = writes
    FullDisk.error = kind_of_error(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(shard_writer, "open", FullDisk, raising=False)
    with pytest.raises(kind_of_error) as caught:
        pack(folder, tmp_path / "packed", frozen="int8")
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]
    if kind_of_error is OSError:
        assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path / "packed")
        assert caught.value.filename2 is None
    monkeypatch.undo()
    pack(folder, tmp_path / "packed", frozen="int8")


def test_one_tensor_at_a_time_is_in_memory(tmp_path, monkeypatch):
    """The source is mapped, and its pages are dropped tensor by tensor; what is packed is written and forgotten."""
    from streamed_models import mapped_bytes

    folder = save_llama(tmp_path / "wide", size="200MB", hidden_size=512, intermediate_size=2048, vocab_size=4000)
    samples = []
    write = shard_writer.ShardWriter.write

    def sampled(shard, *arguments):
        write(shard, *arguments)
        samples.append(mapped_bytes(folder))

    monkeypatch.setattr(shard_writer.ShardWriter, "write", sampled)
    pack(folder, tmp_path / "packed", frozen="int8")
    largest = 4000 * 512 * 4
    assert len(samples) > 50 and max(samples) <= largest + 2 * (2 << 20)
