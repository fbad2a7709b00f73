"""Damaged files, drawn by seed, and a process that reads them and may die of it.

    python tests/support/mutations.py ranker 0 3000        # outcomes of the mutations 0 .. 2999 of a format, as counts
    pytest -m slow tests/foundation/test_mutations.py         # 3,000 of every format

A mutation is an edit of the file's JSON, text or table, with its checksum renewed where it has one, or of its bytes.
What reads it may answer, or refuse by a ValueError that names the file; anything else is a fault: another exception,
a death of the process, more than 5 s, scores that are no numbers.
"""

from __future__ import annotations

import copy
import gzip
import json
import os
import resource
import select
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).parents[1] / "data"
SLOW, HUNG = 5.0, 60.0
"""Seconds of a processor that one answer may take, and of the clock until it is given up."""
_MOST_MEMORY = 6 * 2**30  # of addresses: a file that unfolds without end runs into it here, not on the whole machine

DEEP, LONG_NUMBER = "@deep@", "@number@"
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**38, 2**63, -(2**63) - 1, 10**40, 0.5, -0.0, 1e-320, 1e308, -1e308),
    *(float("nan"), float("inf"), float("-inf"), "", "x", "NaN", "1e999", "\x1b[31m", "\ud800", "\0", "ä" * 300),
    *("8", "1_000", [], [[]], [1, 2], ["a"], [None], {}, {"a": 1}, {"": {}}, DEEP, LONG_NUMBER),
)


# Edits


def of_json(document: Any, chance: np.random.Generator) -> Any:
    """A copy with one to three edits: another value, a key or an entry gone, doubled, renamed or new."""
    document = copy.deepcopy(document)
    for _ in range(int(chance.integers(1, 4))):
        place, parent = _place(document, chance)
        if parent is None:
            return _odd(chance)
        edit = chance.integers(8)
        if edit <= 3:
            parent[place] = _odd(chance)
        elif edit == 4 and isinstance(parent[place], int | float) and not isinstance(parent[place], bool):
            parent[place] = _scaled(parent[place], chance)
        elif edit == 5:
            del parent[place]
        elif edit == 6 and isinstance(parent, list):
            parent.insert(place, copy.deepcopy(parent[int(chance.integers(len(parent)))]))
        elif isinstance(parent, dict):
            parent[("new", "", "layers", str(place) + " ")[int(chance.integers(4))]] = parent[place]
        else:
            parent[place] = _odd(chance)
    return document


def _place(document: Any, chance: np.random.Generator) -> tuple[Any, Any]:
    """A key and what holds it, at any depth; (None, None) now and then, for the whole."""
    if chance.integers(200) == 0 or not isinstance(document, dict | list) or not document:
        return None, None
    parent = document
    while True:
        places = list(parent) if isinstance(parent, dict) else range(len(parent))
        place = places[int(chance.integers(len(places)))]
        child = parent[place]
        if not isinstance(child, dict | list) or not child or chance.integers(6) == 0:
            return place, parent
        parent = child


def _odd(chance: np.random.Generator) -> Any:
    return copy.deepcopy(ODD_VALUES[int(chance.integers(len(ODD_VALUES)))])


def _scaled(value: float, chance: np.random.Generator) -> float:
    return (value + 1, value - 1, -value, value * 2**20, value * 1.0001)[int(chance.integers(5))]


def to_text(document: Any, dumps: Callable[[Any], str] = json.dumps) -> str:
    """JSON, or what `dumps` writes, with the values that no writer writes put in."""
    text = dumps(document)
    for quote in ('"', "'", ""):
        text = text.replace(f"{quote}{DEEP}{quote}", "[" * 100_000 + "]" * 100_000)
        text = text.replace(f"{quote}{LONG_NUMBER}{quote}", "9" * 100_000)
    return text


def of_bytes(data: bytes, chance: np.random.Generator) -> bytes:
    """One to four edits: bits turned, a part overwritten, taken out, doubled or put in, or the end gone."""
    edited = bytearray(data)
    for _ in range(int(chance.integers(1, 5))):
        if not edited:
            break
        at, length = int(chance.integers(len(edited))), int(chance.integers(1, 17))
        edit = chance.integers(7)
        if edit <= 1:
            edited[at] ^= 1 << int(chance.integers(8))
        elif edit == 2:
            edited[at : at + length] = bytes(chance.integers(0, 256, length, dtype=np.uint8))
        elif edit == 3:
            edited[at : at + length] = (b"\xff", b"\0", b"9", b'"', b"\n")[int(chance.integers(5))] * length
        elif edit == 4:
            del edited[at : at + length]
        elif edit == 5:
            edited[at:at] = edited[at : at + 8 * length]
        elif chance.integers(4) == 0:
            del edited[at:]
    return bytes(edited)


def of_words(text: str, chance: np.random.Generator) -> str:
    """LightGBM's text: numbers and lines exchanged."""
    lines = text.split("\n")
    for _ in range(int(chance.integers(1, 4))):
        at = int(chance.integers(min(len(lines), 200)))
        edit = chance.integers(5)
        if edit == 0:
            del lines[at]
        elif edit == 1:
            lines.insert(at, lines[int(chance.integers(len(lines)))])
        else:
            key, equals, value = lines[at].partition("=")
            words = value.split() or [""]
            word = int(chance.integers(len(words)))
            odd = ("-1", "0", "999999999", "-999999999", "nan", "inf", "1e400", "x", "", "3", "9" * 5000, str(2**63))
            words[word] = odd[int(chance.integers(len(odd)))]
            lines[at] = key + equals + " ".join(words if edit < 4 else words * 2)
    return "\n".join(lines)


# Formats: what is written, and what reads it


@dataclass(frozen=True)
class Format:
    name: str
    """Of the file."""
    whole: Callable[[], Any]
    """What mutations start from; called once in the process that reads."""
    write: Callable[[Any, np.random.Generator, Path], None]
    read: Callable[[Path], None]


def _records() -> Any:
    from synthetic_records import make_records

    return make_records(("tower", "castle"), ("digits", "cats"), blocks=2, seeds=1, states=("fresh",))


def _profile() -> Any:
    from synthetic_records import one_profile, profile_of

    return profile_of(one_profile(_records(), "tower", "cats"))


def _ranker_documents() -> tuple[dict[str, Any], dict[str, Any]]:
    """A Ranker of this version and of the first, with LightGBM's text inside; both of a few layers."""
    old = json.loads(gzip.decompress((DATA / "ranker_v1.json.gz").read_bytes()))
    old["model"]["architectures"] = old["model"]["architectures"][:2]
    for architecture in old["model"]["architectures"]:
        del architecture["layers"][4:]
    from zest_fast.ranking.ranker import Ranker

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "old.json"
        path.write_text(_signed(old))
        new = json.loads(Ranker.load(path).save(path).read_text())
    return new, old


def _signed(document: Any) -> str:
    from zest_fast.foundation.documents import json_hash

    if isinstance(document, dict):
        document.pop("checksum", None)
        document["checksum"] = json_hash(document)
    return to_text(document)


def _write_ranker(whole: Any, chance: np.random.Generator, path: Path) -> None:
    new, old = whole
    kind = chance.integers(10)
    if kind == 0:
        path.write_bytes(of_bytes(json.dumps(new).encode(), chance))
    elif kind <= 3:
        document = {**old, "model": {**old["model"], "trees": of_words(old["model"]["trees"], chance)}}
        path.write_text(_signed(document))
    elif kind <= 6:  # what decides: trees, base, errors
        model = dict(new["model"])
        part = ("trees", "base", "known", "new", "strength", "features", "metrics")[int(chance.integers(7))]
        model[part] = of_json(model[part], chance)
        path.write_text(_signed({**new, "model": model}))
    else:
        path.write_text(_signed(of_json(new, chance)))


_KEPT: dict[str, Any] = {}


def _read_ranker(path: Path) -> None:
    from zest_fast.ranking.ranker import Ranker
    from zest_fast.ranking.ranking import rank

    ranker = Ranker.load(path)
    if "profile" not in _KEPT:
        _KEPT["profile"] = _profile()
    profile = _KEPT["profile"]
    ranking = rank(profile, by=ranker)
    assert np.isfinite(ranking.scores[:-1]).all(), "scores that are no numbers"
    repr(ranking), repr(ranker), ranker.knows(profile), ranking.note
    assert np.isfinite(ranker.explain(profile).to_numpy()).all(), "contributions that are no numbers"


def _read_profile(path: Path) -> None:
    from zest_fast.profiling.layer_profile import LayerProfile
    from zest_fast.ranking.ranking import rank

    profile = LayerProfile.load(path)
    repr(profile), profile.to_pandas(spread=profile.spread is not None)
    rankings = [rank(profile, by=metric) for metric in profile.metrics[:2]]
    rankings.append(rank(profile))
    assert not any("\x1b" in repr(ranking) for ranking in rankings)


def _profile_json() -> Any:
    return json.loads(_bytes_of("p.json", lambda path: _profile().save(path)))


def _means() -> Any:
    """The mean of two profiles, one of which lacks a layer."""
    from zest_fast.profiling.averaging import mean_profile
    from zest_fast.profiling.layer_profile import LayerProfile

    one = _profile()
    info = {name: {**one.info[name], "uses": 1, "nonfinite": 0, "note": ""} for name in one}
    settings = {"loss": 1.0, "backend": "cpu", "uncovered": {}}
    profiles = [
        LayerProfile(names, one.metrics, values, info={name: info[name] for name in names}, **settings)
        for names, values in ((one.names, one.values), (one.names[1:], 2 * one.values[1:]))
    ]
    return mean_profile(profiles)


def _means_json() -> Any:
    return json.loads(_bytes_of("p.json", lambda path: _means().save(path)))


def _means_parquet() -> bytes:
    return _bytes_of("p.parquet", lambda path: _means().save(path))


def _ranking_json() -> Any:
    from zest_fast.ranking.ranking import rank

    return json.loads(_bytes_of("r.json", lambda path: rank(_profile()).save(path)))


def _read_ranking(path: Path) -> None:
    from zest_fast.ranking.ranking import Ranking

    ranking = Ranking.load(path)
    json.dumps(ranking.plain(), allow_nan=False)
    ranking.to_pandas(), ranking.explain()
    assert "\x1b" not in repr(ranking)


def _finetuning_json() -> Any:
    """What `zest-fast finetune --json` prints, as far as a report reads it."""
    score = {"loss": 0.5, "accuracy": 0.75, "predictions": 8}
    plan = {"peak_bytes": 9, "flops": 8, "breakdown": {"weights": 5, "loss": 4}, "cut": "a"}
    figures = {"trainable_parameters": 4, "parameters": 8, "delta": "d.safetensors", "verified": True}
    losses = [1.0, 0.5, None, 0.25]
    return {"layers": ["a", "b"], "training_loss": losses, "before": score, "after": score, "plan": plan, **figures}


def _read_report(path: Path) -> None:
    """As tables: drawing is matplotlib's."""
    import zest_fast.profiling.heat_map as heat_map
    from zest_fast.cli.reporting.contents import contents_of
    from zest_fast.cli.reporting.page import page
    from zest_fast.cli.reporting.sources import read_sources

    heat_map.can_draw = lambda: False
    sources = read_sources([path])
    assert "\x1b" not in page(sources, contents_of(sources))


def _write_json(whole: Any, chance: np.random.Generator, path: Path) -> None:
    if chance.integers(4) == 0:
        path.write_bytes(of_bytes(json.dumps(whole).encode(), chance))
    else:
        path.write_text(to_text(of_json(whole, chance)))


def _bytes_of(name: str, save: Callable[[Path], Any]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        save(path)
        return path.read_bytes()


def _profile_parquet() -> bytes:
    return _bytes_of("p.parquet", lambda path: _profile().save(path))


def _records_parquet() -> bytes:
    from synthetic_records import write_sweep

    from zest_fast.sweeping.tables import consolidate

    def save(path: Path) -> None:
        sweeps = [
            write_sweep(rows, path.with_name(f"{model}-{dataset}.jsonl"))
            for (model, dataset), rows in _records().groupby(["model", "dataset"])
        ]
        consolidate(sweeps, path)

    return _bytes_of("r.parquet", save)


def _table_parquet() -> bytes:
    import pandas

    import zest_fast.integrations.data.loaders  # noqa: F401 (as above)

    frame = pandas.DataFrame({"text": ["good", "bad", "fine"] * 9, "label": [1, 0, 1] * 9, "tags": [["a", "b"]] * 27})
    return _bytes_of("t.parquet", lambda path: frame.to_parquet(path))


def _write_parquet(whole: bytes, chance: np.random.Generator, path: Path) -> None:
    """Bytes, most of them of the end, where the metadata stands; or a column or the document in the metadata edited."""
    import pyarrow
    from pyarrow import parquet

    kind = chance.integers(5)
    if kind <= 1:
        path.write_bytes(of_bytes(whole, chance))
        return
    if kind == 2:
        footer = int.from_bytes(whole[-8:-4], "little") + 8
        path.write_bytes(whole[:-footer] + of_bytes(whole[-footer:], chance))
        return
    table = parquet.read_table(pyarrow.BufferReader(whole))
    metadata = dict(table.schema.metadata or {})
    key = next(
        (key for key in (b"zest_fast", b"zest_fast.records", b"zest_fast.watch", b"pandas") if key in metadata), b""
    )
    if kind == 3 and key:
        metadata[key] = to_text(of_json(json.loads(metadata[key]), chance)).encode("utf-8", "surrogatepass")
    else:
        at = int(chance.integers(table.num_columns))
        name, rows = table.schema.names[at], table.num_rows
        columns: tuple[Any, ...] = (
            pyarrow.nulls(rows), pyarrow.array([1.5] * rows), pyarrow.array([-1] * rows), pyarrow.array(["x"] * rows),
            pyarrow.array([float("nan")] * rows), pyarrow.array([b"\xff"] * rows), pyarrow.array([[1, None]] * rows),
            pyarrow.array([[2**62, 0]] * rows), pyarrow.array([None, *[1] * (rows - 1)]), pyarrow.array([2**62] * rows),
            pyarrow.array([{"a": "b"}] * rows), pyarrow.array(["\x1b[2J"] * rows).dictionary_encode(), None,
            pyarrow.array([2**62] * rows, pyarrow.timestamp("ms")), pyarrow.array([True] * rows),
        )  # fmt: skip
        column = columns[int(chance.integers(len(columns)))]
        table = table.remove_column(at)
        if column is not None:
            table = table.add_column(at, name if chance.integers(4) else "new", column)
        if chance.integers(3) == 0:
            table = table.slice(0, int(chance.integers(rows)))
    parquet.write_table(table.replace_schema_metadata(metadata), path)


def _read_records_parquet(path: Path) -> None:
    from zest_fast.ranking.architectures import architectures_of
    from zest_fast.ranking.learning.contributions import check_sweeps, pairs_of
    from zest_fast.sweeping.tables import load_records, sweeps_of

    frame, sweeps = load_records(path), sweeps_of(path)
    _anonymous(lambda: (check_sweeps(sweeps), architectures_of(pairs_of(frame))))


def _anonymous(call: Callable[[], Any]) -> None:
    """What comes after the reading may refuse as well, and does not know the file."""
    try:
        call()
    except ValueError as error:
        raise Refused(str(error)) from error


class Refused(Exception):
    pass


def _records_lines() -> list[Any]:
    from synthetic_records import write_sweep

    rows = _records()
    rows = rows[(rows.model == "tower") & (rows.dataset == "cats")]
    lines = _bytes_of("r.jsonl", lambda path: write_sweep(rows, path)).splitlines()
    return [json.loads(line[9:]) for line in lines]


def _write_records_lines(whole: list[Any], chance: np.random.Generator, path: Path) -> None:
    lines = list(whole)
    kind, at = chance.integers(6), int(chance.integers(len(whole)))
    if kind <= 3:
        lines[at] = of_json(lines[at], chance)
    elif kind == 4:
        lines[at] = lines[int(chance.integers(len(lines)))]
    texts = [to_text(line).encode("utf-8", "surrogatepass") for line in lines]
    data = b"".join(b"%08x %s\n" % (zlib.crc32(text), text) for text in texts)
    path.write_bytes(of_bytes(data, chance) if kind == 5 else data)


def _read_records_lines(path: Path) -> None:
    from zest_fast.sweeping.records import RecordFile, read_records
    from zest_fast.sweeping.tables import consolidate

    header, _ = read_records(path)
    with RecordFile(path, {k: v for k, v in header.items() if k not in ("record", "format")}):
        pass
    out = path.with_name("out.parquet")
    out.unlink(missing_ok=True)
    _anonymous(lambda: consolidate([path], out))
    _read_records_parquet(out)


_AXOLOTL = {
    "base_model": "tiny", "bf16": True, "load_in_4bit": False, "micro_batch_size": 2, "sequence_len": 16,
    "gradient_checkpointing": True, "adapter": "lora", "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"],
    "gradient_accumulation_steps": 4, "optimizer": "adamw_torch", "datasets": [{"path": "x", "type": "alpaca"}],
    "learning_rate": 0.0002, "special_tokens": {"pad_token": "<pad>"},
}  # fmt: skip
_UNFROZEN = {
    **{key: value for key, value in _AXOLOTL.items() if "lora" not in key and key != "adapter"},
    "unfrozen_parameters": ["^lm_head.weight$", "model.layers.1.mlp"],
}
_LLAMA_FACTORY = {
    "model_name_or_path": "tiny", "stage": "sft", "finetuning_type": "lora", "lora_rank": 4,
    "lora_target": "q_proj,v_proj", "quantization_bit": 4, "per_device_train_batch_size": 2, "cutoff_len": 16,
    "bf16": True, "output_dir": "out", "gradient_accumulation_steps": 8, "optim": "adamw_torch",
}  # fmt: skip
_FREEZE = {**_LLAMA_FACTORY, "finetuning_type": "freeze", "freeze_trainable_layers": 1, "quantization_bit": None}
_TRAINER = {
    "output_dir": "out",
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-5,
    "bf16": True,
    "max_length": 16,
}


def _trainer_files() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.yaml"
        path.write_text(json.dumps(_AXOLOTL))
        _read_yaml(path)  # imports transformers and peft, which is no part of an answer
    return [_AXOLOTL, _LLAMA_FACTORY, _UNFROZEN, _FREEZE, _TRAINER]


def _write_yaml(whole: list[dict[str, Any]], chance: np.random.Generator, path: Path) -> None:
    import yaml

    document = whole[int(chance.integers(len(whole)))]
    if chance.integers(3) == 0:
        path.write_bytes(of_bytes(yaml.safe_dump(document).encode(), chance))
        return
    edited = of_json(document, chance)
    text = to_text(edited, lambda value: yaml.safe_dump(value, allow_unicode=False))
    if chance.integers(10) == 0:
        tag = ("!!bool x", "!!int ''", "!!float x", "!!timestamp x", "!!python/object:os.system {}", "&a [*a]", "*b")
        text = text.replace(": ", f": {tag[int(chance.integers(len(tag)))]}\n", 1)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def _read_yaml(path: Path) -> None:
    from transformers import LlamaConfig

    from zest_fast.integrations.training_files import plan_training_file

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=32, max_position_embeddings=64)
    plan_training_file(path, model=config)


def _rows() -> list[Any]:
    import zest_fast.integrations.data.loaders  # noqa: F401 (torch takes its seconds before the first answer)

    return [{"text": f"words {row}", "label": row % 2, "more": {"a": [row]}} for row in range(20)]


def _write_rows(whole: list[Any], chance: np.random.Generator, path: Path) -> None:
    rows = of_json(whole, chance) if chance.integers(2) else whole
    lines = "\n".join(to_text(row) for row in rows) if isinstance(rows, list) else to_text(rows)
    data = lines.encode("utf-8", "surrogatepass")
    path.write_bytes(of_bytes(data, chance) if rows is whole else data)


def _csv() -> bytes:
    import zest_fast.integrations.data.loaders  # noqa: F401 (as above)

    return b"text,label,more\n" + b"".join(b'"words, and ""%d""",%d,x\n' % (row, row % 2) for row in range(20))


def _read_table(path: Path) -> None:
    from zest_fast.integrations.data.labels import class_names
    from zest_fast.integrations.data.tables import read_table

    table = read_table(path)
    table.column("text")
    labels = table.column("label")
    _anonymous(lambda: class_names(labels))


def _watched_log(name: str) -> bytes:
    from watched_runs import make_step

    from zest_fast.watching.logs.sinks import sink_for

    def save(path: Path) -> None:
        sink = sink_for(path)
        for step in (0, 10, 10, 20):
            sink(make_step(step, full=True))
        sink.close()

    return _bytes_of(name, save)


def _watched_lines() -> list[Any]:
    return [json.loads(line) for line in _watched_log("w.jsonl").splitlines()]


def _watched_parquet() -> bytes:
    return _watched_log("w.parquet")


def _write_watched_lines(whole: list[Any], chance: np.random.Generator, path: Path) -> None:
    from zest_fast.watching.logs.lines import with_checksum

    lines = list(whole)
    kind, at = chance.integers(6), int(chance.integers(len(whole)))
    if kind <= 3:
        lines[at] = of_json({key: value for key, value in lines[at].items() if key != "crc"}, chance)
    elif kind == 4:
        lines[at] = lines[int(chance.integers(len(lines)))]
    texts = [
        to_text(line).encode("utf-8", "surrogatepass").replace(b'": ', b'":').replace(b', "', b',"') for line in lines
    ]
    data = b"".join(with_checksum(text) for text in texts)
    path.write_bytes(of_bytes(data, chance) if kind == 5 else data)


def _read_watched(path: Path) -> None:
    from zest_fast.watching.logs.sinks import sink_for
    from zest_fast.watching.logs.watch_log import load_watch

    log = load_watch(path)
    assert not any("\x1b" in text for text in (repr(log), repr(log.steps), *(repr(step.profile) for step in log.steps)))
    log.to_pandas()
    for metric in log.metrics[:2]:
        log.column(metric)
        str(log.drift(metric))
    sink_for(path).close()


def _shard() -> bytes:
    import torch
    from safetensors.torch import save

    tensors = {"a.weight": torch.arange(12.0).view(3, 4), "a.bias": torch.ones(3).bfloat16(), "n": torch.arange(5)}
    return save(tensors, {"format": "pt"})


def _write_shard(whole: bytes, chance: np.random.Generator, path: Path) -> None:
    """Bytes, or the header as JSON, with its own length or another."""
    if chance.integers(3) == 0:
        path.write_bytes(of_bytes(whole, chance))
        return
    length = int.from_bytes(whole[:8], "little")
    header = to_text(of_json(json.loads(whole[8 : 8 + length]), chance)).encode("utf-8", "surrogatepass")
    wrong = (0, 1, 2**31, 2**40, 2**63, 2**64 - 1)
    said = wrong[int(chance.integers(len(wrong)))] if chance.integers(8) == 0 else len(header)
    path.write_bytes(said.to_bytes(8, "little") + header + whole[8 + length :])


def _read_shard(path: Path) -> None:
    from zest_fast.streaming.checkpoints import plain_checkpoint

    checkpoint = plain_checkpoint(path.parent)
    for name in checkpoint:
        checkpoint.parameter(name).double().sum()


_SAMPLES = [bytes([number]) * 16 for number in range(6)]
_DESCRIPTION = {"model": "tiny"}


def _activations(folder: Path) -> Any:
    from zest_fast.prefix.activation_files import ActivationFiles, Room

    return ActivationFiles(Room(folder, 2**20), _DESCRIPTION, 64)


def _cache() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        files = _activations(Path(folder))
        for sample in _SAMPLES:
            files.write(sample, memoryview(sample * 4))
        files.close()
        (written,) = Path(folder).glob("*/*.activations")
        return written.read_bytes()


def _read_cache(path: Path) -> None:
    """What is damaged is not there; what is there is what was written."""
    from zest_fast.foundation.documents import json_hash

    folder = path.with_name("cache")
    (folder / json_hash(_DESCRIPTION)[:32]).mkdir(parents=True, exist_ok=True)
    path.replace(folder / json_hash(_DESCRIPTION)[:32] / path.name)
    files = _activations(folder)
    lost = 0
    for sample in _SAMPLES:
        into = bytearray(64)
        if files.read(sample, memoryview(into)):
            assert into == sample * 4, "another sample's activations"
        else:
            lost += 1
    files.close()
    if lost:
        raise Refused(f"{lost} of {len(_SAMPLES)} are computed again")


def _write_bytes(whole: bytes, chance: np.random.Generator, path: Path) -> None:
    path.write_bytes(of_bytes(whole, chance))


FORMATS = {
    "ranker": Format("r.json", _ranker_documents, _write_ranker, _read_ranker),
    "profile-json": Format("p.json", _profile_json, _write_json, _read_profile),
    "profile-parquet": Format("p.parquet", _profile_parquet, _write_parquet, _read_profile),
    "means-json": Format("p.json", _means_json, _write_json, _read_profile),
    "means-parquet": Format("p.parquet", _means_parquet, _write_parquet, _read_profile),
    "ranking-json": Format("r.json", _ranking_json, _write_json, _read_ranking),
    "finetuning-json": Format("f.json", _finetuning_json, _write_json, _read_report),
    "records-parquet": Format("r.parquet", _records_parquet, _write_parquet, _read_records_parquet),
    "records-jsonl": Format("r.jsonl", _records_lines, _write_records_lines, _read_records_lines),
    "watched-jsonl": Format("w.jsonl", _watched_lines, _write_watched_lines, _read_watched),
    "watched-parquet": Format("w.parquet", _watched_parquet, _write_parquet, _read_watched),
    "trainer-yaml": Format("t.yaml", _trainer_files, _write_yaml, _read_yaml),
    "table-jsonl": Format("t.jsonl", _rows, _write_rows, _read_table),
    "table-csv": Format("t.csv", _csv, _write_bytes, _read_table),
    "table-parquet": Format("t.parquet", _table_parquet, _write_parquet, _read_table),
    "shard": Format("model.safetensors", _shard, _write_shard, _read_shard),
    "prefix-cache": Format("1.activations", _cache, _write_bytes, _read_cache),
}


# The process that reads, and the one that watches it


def serve(name: str, start: int, stop: int, folder: Path) -> None:
    """Read the mutations start .. stop - 1; a line before and a line after each, on stdout."""
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", RuntimeWarning)
    kind = FORMATS[name]
    whole, path = kind.whole(), folder / kind.name
    for number in range(start, stop):
        path.unlink(missing_ok=True)
        kind.write(whole, np.random.default_rng([zlib.crc32(name.encode()), number]), path)
        print(json.dumps({"begin": number}), flush=True)
        began = time.process_time()
        fault = ""
        try:
            kind.read(path)
            outcome = "read"
        except Refused:
            outcome = "refused"
        except ValueError as error:
            outcome = "refused"
            message = str(error)
            if type(error) is not ValueError and type(error).__name__ != "NewerVersionError":
                fault = f"raw {type(error).__name__}: {message[:300]}"
            elif "\x1b" in message or len(message) > 5000:
                fault = f"a message that no terminal should see: {message[:300]!r}"
        except Exception as error:
            outcome = "refused"
            place = traceback.extract_tb(error.__traceback__)[-1]
            fault = f"{type(error).__name__}: {str(error)[:300]} ({place.filename}:{place.lineno})"
        seconds = time.process_time() - began
        if seconds > SLOW:
            fault = fault or f"{seconds:.1f} s"
        line = {"end": number, "outcome": outcome, "fault": fault, "seconds": round(seconds, 3)}
        print(json.dumps(line), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak": peak}), flush=True)


def run(name: str, start: int, stop: int) -> tuple[Counter[str], dict[int, str], float, int]:
    """Counts of outcomes, number -> fault, the slowest answer in seconds, and the largest memory in bytes."""
    counts: Counter[str] = Counter()
    faults: dict[int, str] = {}
    slowest, peak = 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        while start < stop:
            number = start - 1
            for line in _lines(name, start, stop, folder):
                if "begin" in line:
                    number = line["begin"]
                elif "end" in line:
                    counts[line["outcome"]] += 1
                    slowest = max(slowest, line["seconds"])
                    if line["fault"]:
                        faults[line["end"]] = line["fault"]
                    start = line["end"] + 1
                elif "peak" in line:
                    peak = max(peak, line["peak"])
                else:
                    if number < start:
                        raise RuntimeError(f"{name}: {line['died']}, before the first file was read")
                    counts["died"] += 1
                    faults[number] = line["died"]
                    start = number + 1
    return counts, faults, slowest, peak


def _lines(name: str, start: int, stop: int, folder: str) -> Any:
    """What one process says, and {"died": why} where it ends early or hangs."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--serve", name, str(start), str(stop), folder]
    with open(Path(folder) / "stderr", "w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment, bufsize=0)
        assert process.stdout is not None
        ended, buffer, patience = False, b"", 5 * HUNG  # imports take their time on a machine with much to do
        while True:
            if not select.select([process.stdout], [], [], patience)[0]:
                process.kill()
                process.wait()
                yield {"died": f"no answer within {patience:.0f} s"}
                return
            chunk = os.read(process.stdout.fileno(), 2**16)
            if not chunk:
                break
            *lines, buffer = (buffer + chunk).split(b"\n")
            for text in lines:
                if not text.startswith(b'{"'):
                    continue  # what a library under test prints
                line = json.loads(text)
                ended = ended or "peak" in line
                patience = HUNG
                yield line
        process.wait()
        if not ended:
            errors.seek(0)
            yield {"died": f"the process ended with {process.returncode}: {errors.read()[-2000:]}"}


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
        serve(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
    else:
        began = time.perf_counter()
        found, faults, slowest, peak = run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
        for number, fault in faults.items():
            print(f"{sys.argv[1]} {number}: {fault}")
        print(
            f"{sys.argv[1]}: {dict(found)}, {len(faults)} faults, slowest {slowest:.2f} s, {peak / 2**20:.0f} MiB, "
            f"{time.perf_counter() - began:.0f} s in all"
        )
