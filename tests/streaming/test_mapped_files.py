"""safetensors files as memory: values, pages that come and go, and files that are refused."""

from __future__ import annotations

import gc
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from streamed_models import mapped_bytes

from zest_fast.streaming.mapped_files import DTYPES, MappedFile, pages_of
from zest_fast.streaming.shard_writer import ShardWriter


def tensors():
    torch.manual_seed(0)
    wide = torch.randn(1024, 1500)
    return {
        "wide": wide,
        "low": wide[:300].bfloat16(),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "none": torch.empty(0, 3),
        "scalar": torch.tensor(3.0),
        "flags": torch.tensor([True, False]),
    }


@pytest.fixture
def path(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_tensors_are_those_of_the_file(path):
    file = MappedFile(path)
    assert file.entries.keys() == tensors().keys()
    for name, tensor in tensors().items():
        found = file.parameter(name)
        assert found.dtype == tensor.dtype and found.shape == tensor.shape and torch.equal(found, tensor)
        assert not found.requires_grad


def test_every_dtype_is_read_and_written(tmp_path):
    made = {name: torch.arange(6).view(2, 3).to(dtype) for name, dtype in DTYPES.items()}
    with ShardWriter(tmp_path / "a", made) as shard:
        for name, tensor in made.items():
            shard.write(name, tensor.dtype, tensor.shape, tensor.split(1))
    for found in (load_file(tmp_path / "a"), {name: MappedFile(tmp_path / "a").tensor(name) for name in made}):
        for name, tensor in made.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_pages_come_with_use_and_go_when_they_are_dropped(path):
    parameter = MappedFile(path).parameter("wide")
    parameter.pages.will_need()
    parameter.sum()
    assert mapped_bytes(path) >= parameter.nbytes - 8192
    parameter.pages.drop()
    assert mapped_bytes(path) <= 2 << 20
    assert torch.equal(parameter, tensors()["wide"])
    del parameter
    gc.collect()
    assert mapped_bytes(path) == 0


def test_what_was_written_or_trains_is_not_dropped(path):
    before = path.read_bytes()
    file = MappedFile(path)
    written, trained = file.parameter("wide"), file.parameter("low")
    with torch.no_grad():
        written.fill_(2.0)
    trained.requires_grad_(True)
    trained.data.fill_(3.0)
    for parameter in (written, trained):
        parameter.pages.used_by_rows()
        parameter.pages.drop()
    assert (written == 2).all() and (trained == 3).all()
    assert path.read_bytes() == before


def test_a_neighbour_s_pages_stay(path):
    """Of what shares a page with it, nothing is dropped: it may have been written to."""
    file = MappedFile(path)
    small, wide = file.parameter("scalar"), file.parameter("wide")
    with torch.no_grad():
        small.fill_(7.0)
    wide.pages.drop()
    assert small == 7


def test_an_address_that_the_dtype_cannot_have_is_copied(tmp_path):
    path = tmp_path / "odd"
    with ShardWriter(path, ["odd", "after"]) as shard:
        shard.write("odd", torch.uint8, (3,), [torch.arange(3, dtype=torch.uint8)])
        shard.write("after", torch.float32, (4,), [torch.arange(4.0)])
    parameter = MappedFile(path).parameter("after")
    assert torch.equal(parameter, torch.arange(4.0)) and pages_of(parameter) is None
    assert torch.equal(load_file(path)["after"], torch.arange(4.0))


def test_a_mapping_outlives_its_file(path):
    parameter = MappedFile(path).parameter("wide")
    path.unlink()
    gc.collect()
    parameter.pages.drop()
    assert torch.equal(parameter, tensors()["wide"])


def test_a_file_may_be_larger_than_the_memory(tmp_path):
    """Private and writable mappings are counted against the memory, unless they are told not to."""
    count = 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = json.dumps({"a": {"dtype": "U8", "shape": [count], "data_offsets": [0, count]}}).encode()
    path = tmp_path / "sparse.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + count)
    assert MappedFile(path).parameter("a")[-1] == 0


def header(**entry):
    return json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}}).encode()


def whole(text, data=b"\0" * 8):
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "0 bytes cannot hold its header"),
        (b"\xff" * 8 + b"{}", "cannot hold its header"),
        (whole(b"{'a'"), "torn JSON"),
        (whole(b"[1, 2]  "), "holds no names"),
        (whole(header(dtype="F12")), "the entry of 'a' is"),
        (whole(header(shape=[-2])), "the entry of 'a' is"),
        (whole(header(shape=2)), "the entry of 'a' is"),
        (whole(header(data_offsets=[0])), "the entry of 'a' is"),
        (whole(b'{"a": 3}'), "the entry of 'a' is"),
        (whole(header(shape=[3])), "8 bytes for .3. of F32"),
        (whole(header(data_offsets=[8, 16]), b"\0" * 16), "'a' begins at byte"),
        (whole(header(), b"\0" * 7), "its header says"),
        (whole(header(), b"\0" * 9), "its header says"),
    ],
)
def test_torn_files_are_named(contents, message, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=rf"model\.safetensors' is torn or no safetensors file.*{message}"):
        MappedFile(path)


def test_a_file_that_is_cut_anywhere_is_refused(path):
    contents = path.read_bytes()
    for length in (*range(0, 2000, 97), len(contents) - 1):
        path.write_bytes(contents[:length])
        with pytest.raises(ValueError, match="is torn"):
            MappedFile(path)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a folder"):
        MappedFile(tmp_path)
    with pytest.raises(FileNotFoundError):
        MappedFile(tmp_path / "absent")


def test_a_shard_says_what_does_not_fit(tmp_path):
    with (
        pytest.raises(ValueError, match=r"'a': 8 bytes were given for \[3\]"),
        ShardWriter(tmp_path / "a", "a") as shard,
    ):
        shard.write("a", torch.float32, (3,), [torch.zeros(2)])
    many = [f"t{number}" for number in range(500)]
    with pytest.raises(ValueError, match="more tensors were written"), ShardWriter(tmp_path / "b", "a") as shard:
        for name in many:
            shard.write(name, torch.float32, (1,), [torch.zeros(1)])
    with pytest.raises(FileExistsError):
        ShardWriter(tmp_path / "a", "a")
