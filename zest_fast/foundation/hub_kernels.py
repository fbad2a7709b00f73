"""Code that a configuration of transformers would have fetched and run."""

from __future__ import annotations

from typing import Any


def refuse_kernels(source: str, config: Any) -> None:
    """ValueError where a configuration names a repository of kernels, whose code transformers would fetch and run."""
    for part in (config, *(value for value in vars(config).values() if hasattr(value, "model_type"))):
        for key in ("_attn_implementation", "_attn_implementation_internal", "attn_implementation"):
            value = getattr(part, key, None)
            names = list(value.values()) if isinstance(value, dict) else [value]
            if wanted := next((name for name in names if isinstance(name, str) and "/" in name), None):
                raise ValueError(
                    f"model {source!r}: its configuration asks for the kernels of {wanted!r} as attention, code that "
                    "would be fetched and run; this is never done here: take attn_implementation out of its config.json"
                )
