"""`zest-fast pack`."""

from __future__ import annotations

import json

import pytest
from checkpoints import save_llama
from typer.testing import CliRunner

import zest_fast
from zest_fast.cli import app
from zest_fast.finetuning.quantised_weights import QuantisedLinear


@pytest.fixture
def run(tmp_path, monkeypatch):
    save_llama(tmp_path / "llama")
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(app, ["pack", *words])


def test_a_packed_folder_opens(run, tmp_path):
    result = run("llama", "--frozen", "int8", "--out", "packed")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("packed: 0.0 MiB; layers that train are read from llama")
    layer = zest_fast.open_streamed("packed").model.layers[0].mlp.up_proj
    assert isinstance(layer, QuantisedLinear) and layer.format == "int8"
    assert json.loads((tmp_path / "packed" / "zest_fast.json").read_text())["source"]["folder"] == str(
        tmp_path / "llama"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("lama", "--frozen", "int8", "--out", "packed"), "'lama' does not exist; nearest: 'llama'"),
        (("llama", "--frozen", "int3", "--out", "packed"), "--frozen 'int3' is unknown"),
        (("llama", "--frozen", "int8", "--out", "llama"), "it is there already; name a new folder: 'llama'"),
        (("llama", "--frozen", "int8", "--out", "no/packed"), "there is no folder"),
    ],
)
def test_refusals_are_one_line(run, words, message, tmp_path):
    result = run(*words)
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "packed").exists()
