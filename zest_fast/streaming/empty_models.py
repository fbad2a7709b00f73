"""A model of transformers as its configuration makes it, but for the memory of its parameters."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from zest_fast.foundation.documents import parse_json, whole_file
from zest_fast.foundation.hub_kernels import refuse_kernels
from zest_fast.foundation.nearest import nearest
from zest_fast.foundation.text_table import first_line


def empty_model(folder: Path) -> nn.Module:
    """In eval mode: parameters on the meta device, tied as they are; buffers as the code of the model computes them.

    Raises ValueError, naming the configuration, for one that is torn, names no class of transformers or asks for code
    of its own; ImportError without transformers.
    """
    config = _config(folder)
    kind = _class_of(folder / "config.json", config)
    try:
        with _parameters_on_meta():
            model: nn.Module = kind._from_config(config)
    except Exception as error:  # a configuration of strange values makes transformers raise anything
        raise ValueError(
            f"{os.fspath(folder / 'config.json')!r} makes no {kind.__name__} ({type(error).__name__}: {error})"
        ) from error
    return model.eval()


def _config(folder: Path) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("a folder of weights needs transformers: pip install 'zest_fast[transformers]'") from error
    path = folder / "config.json"
    try:
        if not isinstance(parse_json(whole_file(path)), dict):
            raise ValueError("it holds no keys")
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except FileNotFoundError as error:
        there = [entry.name for entry in folder.iterdir()]
        raise ValueError(f"{os.fspath(path)!r} does not exist; {nearest(path.name, there)}") from error
    except Exception as error:
        why = first_line(error)
        raise ValueError(f"{os.fspath(path)!r} is no configuration that transformers knows: {why}") from error
    refuse_kernels(os.fspath(folder), config)
    return config


def _class_of(path: Path, config: Any) -> Any:
    import transformers

    names = config.architectures
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ValueError(f"{os.fspath(path)!r} has no architectures, and the class of the model is needed there")
    kind = getattr(transformers, names[0], None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(f"{os.fspath(path)!r}: architectures names {names[0]!r}, which is no model of transformers")
    return kind


_building = threading.Lock()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters go there as they are registered, before anything was written to their memory; buffers do not.

    `torch.device("meta")` would take the buffers too, and what is not in the files (rotary tables) would be lost.
    """
    thread, register = threading.get_ident(), nn.Module.register_parameter

    def registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if threading.get_ident() == thread and parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    with _building:
        nn.Module.register_parameter = registered  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]
