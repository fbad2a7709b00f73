"""What the plugins of other training tools share: the keys `zest_*` of their configurations, and what is refused.

A plugin is loaded by its tool, and imports it; this module imports none of them.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from zest_fast.finetuning.selective_backward import SelectiveBackward
from zest_fast.finetuning.trainable_layers import layer_names
from zest_fast.foundation.byte_counts import memory_bytes
from zest_fast.foundation.nearest import nearest, some

_log = logging.getLogger("zest_fast")

KEYS = ("zest_top", "zest_layers", "zest_probe", "zest_max_memory")

TESTED = {
    "axolotl": "0.19.0",
    "lightning": "2.6.6",
    "llamafactory": "0.9.5",
    "ms-swift": "4.6.0",
    "torchtune": "0.6.1",
    "trl": "1.16.0",
}
"""The releases that the plugins were tested with."""


@dataclass(frozen=True)
class ToolSettings:
    """Which layers train: `layers` by name, or the `top` best by the first batch, a probe, and what fits.

    probe, max_memory: as of `zest_fast.integrations.trainer.prepare`.
    """

    top: int | None = None
    layers: tuple[str, ...] | None = None
    probe: float | Literal["auto"] | None = "auto"
    max_memory: str | int | None = None

    def prepare(self, trainer: Any) -> SelectiveBackward:
        """Freeze the rest in a Trainer of transformers, before its `train()`; raises as `prepare`."""
        from zest_fast.integrations.trainer import prepare

        show_log()
        return prepare(trainer, **self.arguments())

    def arguments(self) -> dict[str, Any]:
        """Of `prepare`."""
        layers = self.top if self.layers is None else self.layers
        return {"layers": layers, "probe": self.probe, "max_memory": self.max_memory}


def read_settings(values: Mapping[str, Any]) -> ToolSettings:
    """The keys `zest_*` among those of a configuration; the others are the tool's own.

    Raises ValueError, naming the key, for one that does not exist, for a value of another kind, and where neither or
    both of zest_top and zest_layers say what trains.
    """
    found = {
        key: value for key, value in values.items() if str(key).startswith("zest_") and value not in (None, "auto")
    }
    for key in found:
        if key not in KEYS:
            raise ValueError(f"{key}: there is no such key; {nearest(key, KEYS)}")
    top, layers = found.get("zest_top"), found.get("zest_layers")
    if (top is None) == (layers is None):
        raise ValueError(
            "zest_top and zest_layers are both there: give one of them"
            if layers is not None
            else "neither zest_top (how many layers train) nor zest_layers (which) is there: give one of them"
        )
    if top is not None and (isinstance(top, bool) or not isinstance(top, int) or top < 1):
        raise ValueError(f"zest_top: expected how many layers train, 1 or more, found {top!r}")
    probe: Any = found.get("zest_probe", "auto")
    if probe is False:  # a tool may drop what is null
        probe = None
    elif probe != "auto" and (isinstance(probe, bool | str) or not 0 < probe <= 1):
        raise ValueError(f"zest_probe: expected a share of a sweep's cost such as 0.05, auto or false, found {probe!r}")
    memory = found.get("zest_max_memory")
    if memory is not None:
        memory_bytes(memory, "zest_max_memory")
    if layers is not None:
        if set(found) != {"zest_layers"}:
            others = some(sorted(set(found) - {"zest_layers"}))
            raise ValueError(
                f"{others}: chooses among ranked layers, and zest_layers names them; leave one of them out"
            )
        try:
            layers = layer_names(layers, argument="zest_layers", takes_n=False)
        except TypeError as error:
            raise ValueError(str(error)) from error
        if not layers:
            raise ValueError("zest_layers is empty: nothing would train")
    return ToolSettings(top, layers, probe, memory)


def refuse_conflicts(values: Mapping[str, Any], conflicts: Iterable[str]) -> None:
    """Raise ValueError where a key of the tool is set that freezes, adapts or quantises as well, naming it and ours."""
    ours = next((key for key in ("zest_layers", "zest_top") if values.get(key) is not None), "zest_top")
    for key in conflicts:
        if values.get(key):
            raise ValueError(
                f"{key}: {values[key]!r} and {ours}: {values.get(ours)!r} are both there, and both say what trains and "
                f"how the rest is kept; leave out {key}, or what begins with zest_"
            )


def show_log() -> None:
    """What trains and what `.verify()` finds, on stderr: these tools show loggers of their own, and their users have no
    line in which to set up ours. Where the logger "zest_fast" has a handler, that stays the only one."""
    _log.filters.clear()  # axolotl's loggers drop what is not its own
    if not _log.handlers:
        _log.setLevel(logging.INFO)
        _log.addHandler(logging.StreamHandler())
        _log.propagate = False  # a handler of the tool might say it again


def warn_untested(package: str) -> None:
    """A UserWarning where another minor version of the tool is installed than the one that was tested."""
    try:
        found = version(package)
    except PackageNotFoundError:
        return
    tested = TESTED[package]
    if found.split(".")[:2] != tested.split(".")[:2]:
        warnings.warn(
            f"{package} {found} is installed, and zest_fast's plugin was tested with {package} {tested}: look at what "
            "trains, which the log says",
            stacklevel=3,
        )
