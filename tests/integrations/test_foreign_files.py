"""Files that were made to do harm, or to be something else: each is refused by its name, soon, and in little memory.

What chance makes of files is in test_mutations.py.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from profiles import make_profile
from pyarrow import parquet
from synthetic_records import make_records, one_profile, profile_of, write_sweep

from zest_fast.foundation.documents import shown
from zest_fast.foundation.text_table import printable, text_table
from zest_fast.integrations.data import images
from zest_fast.integrations.data.tables import read_table
from zest_fast.integrations.training_files import plan_training_file
from zest_fast.profiling.layer_profile import LayerProfile
from zest_fast.ranking.ranker import Ranker
from zest_fast.ranking.ranking import rank
from zest_fast.sweeping.records import RecordFile, read_records
from zest_fast.sweeping.tables import load_records, sweeps_of

HEADER = {"model": "tiny", "dataset": "toys", "family": "toys", "recipe": {"seeds": [0]}, "layers": ["a"]}
LOADERS = {
    "ranker.json": Ranker.load,
    "profile.json": LayerProfile.load,
    "profile.parquet": LayerProfile.load,
    "records.jsonl": read_records,
    "out.jsonl": lambda path: RecordFile(path, HEADER),
    "records.parquet": load_records,
    "sweeps.parquet": sweeps_of,
    "table.jsonl": read_table,
    "table.csv": read_table,
    "table.parquet": read_table,
    "trainer.yaml": plan_training_file,
}


@pytest.fixture(scope="module")
def records():
    return make_records(("tower", "castle"), ("digits", "cats"), blocks=3, seeds=1, states=("fresh",))


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/full", "pipe", "folder"])
@pytest.mark.parametrize("name", LOADERS)
def test_what_is_no_file_is_refused_and_not_read(tmp_path, name, device):
    """Reading a device has no end, opening a pipe waits for who writes: a process of its own, with little to waste."""
    path = tmp_path / name
    if device == "pipe":
        os.mkfifo(path)
    elif device == "folder":
        path.mkdir()
    else:
        path.symlink_to(device)
    with pytest.raises(ValueError, match=rf"{name}' is a (device|pipe|folder), no regular file"):
        LOADERS[name](path)


@pytest.mark.parametrize("name", [name for name in LOADERS if "parquet" not in name and "csv" not in name])
def test_json_and_yaml_that_are_deep_or_no_utf8(tmp_path, name):
    path = tmp_path / name
    for content in (b"[" * 100_000, b'{"a":' * 50_000 + b"1" + b"}" * 50_000, b"\xff\xfe{}\n", b"9" * 100_000):
        if name in ("records.jsonl", "out.jsonl"):
            content = b"%08x %s\n" % (zlib.crc32(content), content)
        path.write_bytes(content)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")) as caught:
            LOADERS[name](path)
        assert type(caught.value) is ValueError and len(str(caught.value)) < 500


def test_yaml_whose_aliases_unfold_beyond_measure(tmp_path):
    """A kilobyte that names lists of lists, 10^9 entries once they are written out."""
    lists = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lists += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    settings = "\n".join([*lists, "base_model: tiny", "adapter: lora", "sequence_len: 16"])
    program = (
        "import resource; from pathlib import Path\n"
        "from transformers import LlamaConfig\n"
        "from zest_fast.integrations.training_files import plan_training_file\n"
        "config = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,\n"
        "                     num_key_value_heads=2, vocab_size=32)\n"
        f"path = Path({str(tmp_path / 'bomb.yaml')!r})\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (100, 100))\n"
        "for key in ('datasets', 'lora_target_modules', 'unfrozen_parameters', 'micro_batch_size', 'other'):\n"
        f"    path.write_text({settings!r} + f'\\n{{key}}: *a8')\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "    try: plan_training_file(path, model=config)\n"
        "    except ValueError as error: assert 'bomb.yaml' in str(error) and len(str(error)) < 1000, error\n"
        "    print(key, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    grown = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()}
    assert len(grown) == 5 and max(grown.values()) < 600, grown


def small_but_wide(path: Path) -> Path:
    """A few kilobytes that unfold to one gigabyte and a half: one text of a megabyte, fifteen hundred times."""
    schema = pyarrow.schema([("text", pyarrow.string())], metadata={"zest_fast.records": "[]"})
    part = pyarrow.table({"text": ["x" * 10**6] * 60}, schema=schema)
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for _ in range(25):
            writer.write_table(part)
    return path


def long_but_thin(path: Path) -> Path:
    """A few kilobytes: the same number, thirty million times."""
    schema = pyarrow.schema([("text", pyarrow.int8())], metadata={"zest_fast.records": "[]"})
    with parquet.ParquetWriter(path, schema) as writer:
        for _ in range(30):
            writer.write_table(pyarrow.table({"text": np.zeros(10**6, np.int8)}, schema=schema))
    return path


@pytest.mark.parametrize("name", ["profile.parquet", "records.parquet", "table.parquet"])
@pytest.mark.parametrize("write", [small_but_wide, long_but_thin])
def test_parquet_that_unfolds_beyond_measure(tmp_path, name, write):
    path = write(tmp_path / name)
    assert path.stat().st_size < 2**22
    program = (
        f"import resource; from pathlib import Path\n{_IMPORTS[name]}\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"try: load(Path({str(path)!r}))\n"
        "except ValueError as error: print(error)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    message, grown = found.stdout.splitlines()
    assert name in message and ("unfolds to" in message or "values, and at most" in message), message
    assert int(grown) < 600


_IMPORTS = {
    "profile.parquet": "from zest_fast import LayerProfile; load = LayerProfile.load",
    "records.parquet": "from zest_fast.sweeping.tables import load_records as load",
    "table.parquet": "from zest_fast.integrations.data.tables import read_table as load",
}


def test_parquet_of_nested_texts_is_read(tmp_path):
    columns = {"text": ["a", "b"], "tags": [["x", "y"], []], "more": [{"k": "v"}, None], "raw": [b"1", b"\xff"]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    assert read_table(tmp_path / "t.parquet").columns == columns


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(b"\0" * 1000)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_images_that_are_too_large_or_something_else(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    cases = {
        "bomb.png": (png(30_000, 30_000), r"bomb\.png (has 30000 x 30000 pixels|cannot be read)"),
        "large.png": (png(12_000, 9_000), r"large\.png has 12000 x 9000 pixels, more than 89,478,485"),
        "torn.png": (png(10, 10)[:40], r"torn\.png cannot be read"),
        "script.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", r"script\.png cannot be read"),
        "empty.jpg": (b"", r"empty\.jpg cannot be read"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            images._read_image(tmp_path / name, image_module)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match="is a pipe"):
        images._read_image(tmp_path / "pipe.png", image_module)


def test_profiles_name_the_key(tmp_path):
    profile = make_profile({"a": 1.0, "b": 2.0})
    path = profile.save(tmp_path / "p.json")
    document = json.loads(path.read_text())

    def with_layer(**changes):
        return {**document, "layers": [document["layers"][0], {**document["layers"][1], **changes}]}

    cases = {
        r"layers\[1\].values.snip: expected a number, found \[?a list": with_layer(values={"snip": [1], "plain": 2}),
        r"layers\[1\].values: .* differing: \['plain'\]": with_layer(values={"snip": 1}),
        r"layers\[1\].info.depth: expected": with_layer(info={"depth": "deep"}),
        r"layers\[1\].info.head: expected true or false, found 3": with_layer(info={"head": 3}),
        r"layers\[1\].name: expected a string, found nothing": with_layer(name=None),
        "metrics: 'snip' occurs more than once": {**document, "metrics": ["snip", "snip"]},
        "loss: expected a number, found 'much'": {**document, "loss": "much"},
        "uncovered: expected keys and values, found a list of 1": {**document, "uncovered": ["x"]},
        "layers: it is not there": {name: value for name, value in document.items() if name != "layers"},
        "version: expected an integer, found 'one'": {**document, "version": "one"},
    }
    for message, changed in cases.items():
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"p\.json' is no profile.*" + message):
            LayerProfile.load(path)


def test_rankers_name_the_key(records, tmp_path):
    from mutations import _signed

    path = Ranker().fit(records).save(tmp_path / "r.json")
    document = json.loads(path.read_text())
    model = document["model"]
    architecture = model["architectures"][0]
    cases = {
        "model.strength: expected a finite number from 0 to 1000, found inf": {"strength": float("inf")},
        "model.known.slope: expected a number, found nothing": {"known": {**model["known"], "slope": None}},
        r"model.known.span: expected an interval around 0": {"known": {**model["known"], "span": [0.5, 0.6]}},
        "model.base.new: expected keys and values": {"base": {**model["base"], "new": []}},
        "model.base.known, a key: 'snap_z' is unknown; nearest: 'snip_z'": {
            "base": {"known": {"snap_z": 1}, "new": {}},
        },
        r"model.trees\[0\].left, right: expected every node": {
            "trees": [{**model["trees"][0], "left": [0] * len(model["trees"][0]["left"])}]
        },
        r"model.trees\[0\].features: expected columns below": {
            "features": model["features"][:1],
            "trees": [{**model["trees"][0], "features": [9] * len(model["trees"][0]["left"])}],
        },
        r"model.architectures\[0\].layers: expected 1 to": {"architectures": [{**architecture, "layers": []}]},
        r"architectures\[0\].layers\[1\].name: .* occurs more than once": {
            "architectures": [{**architecture, "layers": [architecture["layers"][0]] * 2}]
        },
        r"model.new_key: unknown key": {"new_key": 1},
    }  # fmt: skip
    for message, changes in cases.items():
        path.write_text(_signed({**document, "model": {**model, **changes}}))
        with pytest.raises(ValueError, match=r"r\.json' is no whole Ranker: .*" + message):
            Ranker.load(path)


def test_records_name_line_and_key(records, tmp_path):
    rows = records[(records.model == "tower") & (records.dataset == "cats")]
    path = write_sweep(rows, tmp_path / "r.jsonl")
    lines = path.read_bytes().splitlines()
    for number, old, new, message in (
        (1, b'"seeds":[0]', b'"seeds":["0"]', r"line 1: recipe.seeds\[0\]: expected an integer, found '0'"),
        (2, b'"seed":0', b'"seed":[0]', r"line 2: seed: expected an integer, found a list of 1"),
        (2, b'"record":"head"', b'"record":"heads"', r"line 2: record: 'heads' is unknown; nearest: 'head'"),
        (4, b'"accuracy":0.5', b'"accuracy":7', "line 4: accuracy: expected a finite number from 0 to 1, found 7"),
    ):
        text = lines[number - 1][9:].replace(old, new)
        changed = [*lines[: number - 1], b"%08x %s" % (zlib.crc32(text), text), *lines[number:]]
        path.write_bytes(b"\n".join(changed) + b"\n")
        with pytest.raises(ValueError, match=r"r\.jsonl', " + message):
            read_records(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_len": 2**38}, "sequence_len: expected a whole number from 1 to 4,194,304, found 274877906944"),
        ({"micro_batch_size": 2**38}, "micro_batch_size: expected a whole number from 1 to 65,536"),
        ({"lora_r": 2**38}, "lora_r: expected a whole number from 1 to 16,384"),
        ({"lora_r": None, "micro_batch_size": [2]}, "micro_batch_size: expected a whole number .* found a list of 1"),
        ({"gradient_accumulation_steps": "many"}, "gradient_accumulation_steps: .* found 'many'"),
        ({"bf16": {"on": True}}, "bf16: expected true or false, found 1 keys"),
        ({"base_model": 5}, "base_model: expected a name"),
        ({"adapter": ["lora"]}, "adapter: expected a name"),
        ({"lora_target_modules": {"q": 1}}, "lora_target_modules: expected a list of at most"),
        ({"optimizer": 3.5}, "optimizer: expected a name"),
    ],
)
def test_files_of_trainers_name_the_key(tmp_path, changes, message):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=32)
    path = tmp_path / "axolotl.yaml"
    keys = {"base_model": "tiny", "sequence_len": 8, "micro_batch_size": "2", "adapter": "lora", "lora_r": 2}
    path.write_text(json.dumps({**keys, **changes}))
    with pytest.raises(ValueError, match=rf"axolotl\.yaml', {message}"):
        plan_training_file(path, model=config)


@pytest.mark.parametrize("tag", ["!!bool x", "!!int ''", "!!timestamp x", "!!float x", "&a [*a", "{? [1] : 2}", "\x1b"])
def test_yaml_that_python_cannot_hold(tmp_path, tag):
    path = tmp_path / "axolotl.yaml"
    path.write_text(f"base_model: tiny\nsequence_len: {tag}\n")
    with pytest.raises(ValueError, match=r"axolotl\.yaml"):
        plan_training_file(path)


def test_names_cannot_command_a_terminal():
    evil = "layer\x1b[2J\x07.\u202etxt\n"
    assert printable(evil) == r"layer\x1b[2J\x07.\u202etxt\n" and printable("ä.层 \\x") == "ä.层 \\x"
    assert printable("\ud800") == r"\ud800" and shown(evil) == repr(evil)
    table = text_table(["layer", "x"], [[evil, "1"]])
    assert "\x1b" not in table and len(table.splitlines()) == 2
    profile = make_profile({evil: 1.0, "b": 2.0}, backend="cpu\x1b[31m")
    rows = one_profile(
        make_records(("a\x1b[31m",), ("cats",), blocks=2, seeds=1, states=("fresh",)), "a\x1b[31m", "cats"
    )
    ranker = Ranker().fit(make_records(("a\x1b[31m",), ("cats", "cars"), blocks=2, seeds=1, states=("fresh",)))
    ranking = rank(profile_of(rows), by=ranker)
    for text in (repr(profile), repr(profile[evil]), repr(rank(profile, by="snip")), repr(ranking), ranking.note):
        assert "\x1b" not in text and "\x07" not in text and "\u202e" not in text
    assert r"knows a\x1b[31m" in ranking.note
