"""`zest-fast export`: the best layers of a saved profile as a configuration of PEFT, axolotl or LLaMA-Factory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zest_fast.cli.app import app
from zest_fast.cli.options import check_readable, check_writable
from zest_fast.foundation.nearest import nearest
from zest_fast.foundation.replacing import replacing

if TYPE_CHECKING:
    from zest_fast.ranking.ranking import Ranking

TARGETS = ("peft", "axolotl", "axolotl-lora", "llama-factory", "llama-factory-freeze")


@app.command()
def export(
    profile_file: Annotated[Path, typer.Argument(help="What `zest-fast profile --out` saved.", show_default=False)],
    to: Annotated[str, typer.Option(help=f"One of {', '.join(TARGETS)}.", show_default=False)],
    by: Annotated[str | None, typer.Option(help="The metric to rank by; by default the shipped ranker.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many layers to choose.")] = 5,
    r: Annotated[
        int, typer.Option(min=1, help="Rank of the adapters (peft, axolotl-lora, llama-factory), and their lora_alpha.")
    ] = 8,
    model: Annotated[
        str | None,
        typer.Option(help="The model that was profiled: checks that exactly these layers are selected (loads it)."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A file instead of stdout.")] = None,
) -> None:
    """Write the best layers as settings for another trainer."""
    if to not in TARGETS:
        raise ValueError(f"--to {to!r} is unknown; {nearest(to, TARGETS)}")
    check_writable(out, set(), inputs=[profile_file])
    from zest_fast.profiling.layer_profile import LayerProfile
    from zest_fast.ranking.ranking import rank

    check_readable(profile_file, "profile")
    text = _settings(to, rank(LayerProfile.load(profile_file), by=by), top, r, _load(model))
    if out is None:
        typer.echo(text, nl=False)
    else:
        with replacing(out) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _settings(to: str, ranking: Ranking, top: int, r: int, model: Any) -> str:
    if to == "peft":
        if model is None:
            from zest_fast.integrations.exports import trained_head

            whole = list(trained_head(None, ranking, "auto"))
            settings = {"peft_type": "LORA", "r": r, "lora_alpha": r, "target_modules": list(ranking.top(top))}
            return json.dumps(settings | ({"modules_to_save": whole} if whole else {}), indent=2) + "\n"
        from zest_fast.integrations.peft import lora_config

        config = lora_config(ranking, model, n=top, r=r).to_dict()
        kept = {key: config[key] for key in ("peft_type", "task_type", "r", "lora_alpha", "modules_to_save")}
        targets = config["target_modules"]
        kept["target_modules"] = targets if isinstance(targets, str) else sorted(targets)
        return json.dumps(kept, indent=2) + "\n"
    from zest_fast.integrations.exports import as_yaml, axolotl, axolotl_lora, llama_factory

    if to == "axolotl":
        return as_yaml(axolotl(ranking, model, n=top))
    if to == "axolotl-lora":
        return as_yaml(axolotl_lora(ranking, model, n=top, r=r))
    return as_yaml(llama_factory(ranking, model, n=top, method="freeze" if to.endswith("freeze") else "lora", r=r))


def _load(source: str | None) -> Any:
    if source is None:
        return None
    from zest_fast.integrations.pretrained import load_model

    return load_model(source).model
