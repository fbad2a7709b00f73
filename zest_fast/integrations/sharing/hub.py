"""Deltas, adapters and merged models onto the hub, with a card that says what was trained."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from zest_fast.finetuning.delta_files import FORMAT
from zest_fast.foundation.documents import check_links
from zest_fast.foundation.nearest import some
from zest_fast.integrations.sharing.lora import read_export
from zest_fast.integrations.sharing.model_cards import model_card

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt")
_CARD = "README.md"


def push(
    path: str | os.PathLike[str],
    repo_id: str,
    *,
    delta: str | os.PathLike[str] | None = None,
    base: str | None = None,
    private: bool | None = None,
    with_base: bool = False,
    scores: Mapping[str, float] | None = None,
    license: str | None = None,
    message: str | None = None,
    api: Any = None,
) -> str:
    """Upload a delta, or a folder (an adapter, a merged model), as a model of the hub, in one commit; returns its page.

    The repository is made where it is not there; token and endpoint are those of huggingface_hub. Files whose names
    begin with a dot stay here.

    path: the file of a delta, or a folder.
    delta: what a folder was made of, for its card, which is then made anew; else the folder has to have one, or the
        delta.
    base: the model that the delta was made on, for the card: an id of the hub.
    private: None = what the hub, or the organisation there, does by default.
    with_base: a folder may hold whole weights, which are the base's but for what was trained.
    scores, license: for the card. message: of the commit. api: a huggingface_hub.HfApi to use.

    Raises ValueError where there is no delta or folder, a folder holds links that lead out of it, whole weights without
    `with_base`, or neither has nor gets a card; OSError as the hub answers; ImportError without huggingface_hub.
    """
    source = Path(path)
    files = _files(source)
    if source.is_dir():
        check_links(source, (source / file for file in files), "published")
    weights = [file for file in files if file.endswith(_WEIGHTS)]
    if not weights:
        raise ValueError(f"{os.fspath(path)!r} holds no weights: name the file of a delta, or a folder of weights")
    is_adapter = "adapter_config.json" in files
    own = [file for file in weights if is_adapter and Path(file).stem == "adapter_model"]
    whole = [file for file in weights if file not in own and not _is_delta(_at(source, file))]
    if whole and not with_base:
        raise ValueError(
            f"{os.fspath(path)!r} holds whole weights ({some(whole, 3)}): uploading them publishes the base, too, "
            "whose licence has to allow it: say with_base=True, or name the delta instead"
        )
    card = _card(source, files, delta, base=base, scores=scores, license=license, merged=bool(whole) and not is_adapter)
    api = _api() if api is None else api
    page = api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as staged:
        for file in files:
            link = Path(staged, file)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(_at(source, file).resolve())
        if card is not None:
            Path(staged, _CARD).unlink(missing_ok=True)
            Path(staged, _CARD).write_text(card, encoding="utf-8")
        api.upload_folder(
            repo_id=repo_id, folder_path=staged, commit_message=message or f"Upload {source.name} with zest_fast"
        )
    return str(page)


def _files(source: Path) -> list[str]:
    """What there is to upload, by names within the repository."""
    if source.is_file():
        return [source.name]
    if not source.is_dir():
        raise ValueError(f"{os.fspath(source)!r} does not exist: name the file of a delta, or a folder of weights")
    names = (file.relative_to(source) for file in sorted(source.rglob("*")) if file.is_file())
    return [name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts)]


def _at(source: Path, file: str) -> Path:
    return source if source.is_file() else source / file


def _is_delta(file: Path) -> bool:
    if file.suffix != ".safetensors":
        return False
    try:
        with safe_open(file, framework="pt") as opened:
            return (opened.metadata() or {}).get("format") == FORMAT
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(file)!r} is torn or no safetensors file ({error})") from error


def _card(
    source: Path, files: Collection[str], delta: str | os.PathLike[str] | None, *, merged: bool, **said: Any
) -> str | None:
    """The text of a new card; None where the one in the folder stays."""
    deltas = [file for file in files if file.endswith(".safetensors") and _is_delta(_at(source, file))]
    if delta is None and _CARD in files and (not merged or "zest_fast" in _text(source / _CARD)):
        return None
    if delta is None and len(deltas) != 1:
        raise ValueError(
            f"{os.fspath(source)!r} has no {_CARD} that says what was trained (that of a base is copied when a delta "
            "is merged into it): pass delta=, which it was made of"
        )
    adapter = read_export(source) if "adapter_config.json" in files else None
    return model_card(_at(source, deltas[0]) if delta is None else delta, merged=merged, adapter=adapter, **said)


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _api() -> Any:
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ImportError("the hub needs huggingface_hub: pip install huggingface_hub") from error
    return HfApi()
